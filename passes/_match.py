"""Where patterns are looked for: one level of a step, or both bodies of a loop pair at once, as numbered values.

In: a flat jaxpr, and maybe a forward `scan` with the reverse one that reads its residuals. Out: a `Space`: equations
in order, a number for each value such that equal computations have equal numbers (so what a user's `jax.checkpoint`
repeats is one value), who makes and who reads it, and under which variable each body has it. It changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from memopt import _compat as c
from memopt._pairs import Loop

OUTER, FIRST, SECOND = "outer", "first", "second"  # the level itself, the forward body, the backward body

# What neither computes anything nor matters to where a value comes from.
_PLAIN = frozenset({"name", "copy", "copy_p", "stop_gradient", "optimization_barrier"})


@dataclasses.dataclass
class Node:
    """One equation of a space: where it stands, and the numbers of what it reads (None for a literal) and makes."""

    side: str
    index: int
    eqn: Any
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.eqn.primitive.name


class Space:
    """The values of one level, or of a pair of loops in it.

    Attributes:
        nodes: equations, those of the first body before those of the second; an equation that computes a known value
            again is left out.
        makers: value -> the node that makes it.
        readers: value -> the nodes that read it.
        avals: value -> its type.
        held: `(side, value)` -> the variable under which that side has the value.
        escapes: values that leave the space in another way than as a residual from the first body to the second.
        fixed: values that depend on no input of the step, such as a causal mask.
    """

    def __init__(self, jaxpr: Any, pair: tuple[int, int] | None = None):
        self.nodes: list[Node] = []
        self.makers: dict[int, Node] = {}
        self.readers: dict[int, list[Node]] = {}
        self.avals: dict[int, Any] = {}
        self.held: dict[tuple[str, int], Any] = {}
        self.escapes: set[int] = set()
        self.fixed: set[int] = set()
        self._numbers: dict[Any, int] = {}
        self._keys: dict[Any, int] = {}
        self._count = 0
        self.jaxpr, self.pair = jaxpr, pair
        if pair is None:
            self._inputs(OUTER, (*jaxpr.constvars, *jaxpr.invars))
            self._walk(OUTER, jaxpr.eqns)
            self.escapes.update(self.number(v) for v in jaxpr.outvars if not isinstance(v, c.Literal))
        else:
            self._walk_pair(*(Loop(jaxpr.eqns[i]) for i in pair))

    def number(self, var: Any) -> int:
        """Return the number of a variable, giving one where it has none."""
        if var not in self._numbers:
            self._numbers[var] = self._new(var.aval)
        return self._numbers[var]

    def root(self, value: int) -> int:
        """Return what a value is a copy of, through names and barriers of one operand."""
        while (node := self.makers.get(value)) is not None and node.name in _PLAIN and len(node.ins) == 1:
            if node.ins[0] is None:
                break
            value = node.ins[0]
        return value

    def literal(self, node: Node, position: int) -> float | None:
        """Return an operand as a number, where it is a literal or a broadcast one; None otherwise."""
        operand = node.eqn.invars[position]
        if isinstance(operand, c.Literal):
            return float(operand.val) if np.ndim(operand.val) == 0 else None
        return self.constant(node.ins[position])

    def constant(self, value: int) -> float | None:
        """Return a value as a number, where it is a broadcast or cast literal; None otherwise."""
        node = self.makers.get(value)
        if node is None or node.name not in ("broadcast_in_dim", "convert_element_type", "reshape", *_PLAIN):
            return None
        return self.literal(node, 0)

    def _new(self, aval: Any) -> int:
        self._count += 1
        self.avals[self._count] = aval
        return self._count

    def _inputs(self, side: str, variables: Iterable[Any]) -> None:
        for var in variables:
            self.held[side, self.number(var)] = var

    def _walk(self, side: str, eqns: Iterable[Any]) -> None:
        for index, eqn in enumerate(eqns):
            self._enter(side, index, eqn)

    def _enter(self, side: str, index: int, eqn: Any) -> None:
        ins = tuple(None if isinstance(v, c.Literal) else self.number(v) for v in eqn.invars)
        key = _key(eqn, ins)
        known = self._keys.get(key) if key is not None else None
        if known is not None:
            for var, value in zip(eqn.outvars, known, strict=True):
                if not isinstance(var, c.DropVar):
                    self._numbers[var] = value
                    self.held.setdefault((side, value), var)
            return
        outs = tuple(self._new(v.aval) if isinstance(v, c.DropVar) else self.number(v) for v in eqn.outvars)
        node = Node(side, index, eqn, ins, outs)
        self.nodes.append(node)
        if key is not None:
            self._keys[key] = outs
        for value, var in zip(outs, eqn.outvars, strict=True):
            self.makers[value] = node
            self.held[side, value] = var
        if not eqn.effects and all(v is None or v in self.fixed for v in ins) and not c.subjaxprs(eqn.params):
            self.fixed.update(outs)
        for value in {v for v in ins if v is not None}:
            self.readers.setdefault(value, []).append(node)

    def _walk_pair(self, first: Loop, second: Loop) -> None:
        self._outer_constants()
        for side, loop in ((FIRST, first), (SECOND, second)):
            inner = loop.sorted(loop.body.invars)
            for var, operand in zip(inner[0], loop.consts, strict=True):
                self._share(side, var, ("const", operand))
            self._inputs(side, inner[1])
            for var, operand in zip(inner[2], loop.xs, strict=True):
                self._share(side, var, ("slice", operand))
            self._walk(side, loop.body.eqns)
            outs = loop.body.outvars
            self._leave(outs[: loop.num_carry])
            if side == FIRST:
                self._hand_over(loop, second, outs[loop.num_carry :])
            else:
                self._leave(outs[loop.num_carry :])

    def _outer_constants(self) -> None:
        """Enter the equations of the level that depend on nothing, so that hoisted masks can be looked into."""
        for index, eqn in enumerate(self.jaxpr.eqns):
            ready = all(isinstance(v, c.Literal) or self._numbers.get(v) in self.fixed for v in eqn.invars)
            if ready and not eqn.effects and not c.subjaxprs(eqn.params):
                self._enter(OUTER, index, eqn)

    def _share(self, side: str, var: Any, key: tuple[str, Any]) -> None:
        if isinstance(key[1], c.Literal):
            self._inputs(side, [var])
            return
        if key[0] == "const" and key[1] in self._numbers:
            self._numbers[var] = self._numbers[key[1]]
        elif key in self._keys:
            self._numbers[var] = self._keys[key]
        else:
            self._keys[key] = self.number(var)
        self.held[side, self._numbers[var]] = var
        if key[0] == "const":
            self.held.setdefault((OUTER, self._numbers[var]), key[1])

    def _hand_over(self, first: Loop, second: Loop, outs: list[Any]) -> None:
        """Let the second body's slices of what the first one stacked be the first one's values."""
        read_elsewhere = _read_elsewhere(self.jaxpr, self.pair)
        sliced = {v for v in second.xs if not isinstance(v, c.Literal)}
        for stacked, out in zip(first.ys, outs, strict=True):
            if isinstance(stacked, c.DropVar) or isinstance(out, c.Literal):
                continue
            if stacked in sliced and second.reverse != first.reverse and second.length == first.length:
                self._keys["slice", stacked] = self.number(out)
            if stacked not in sliced or stacked in read_elsewhere:
                self.escapes.add(self.number(out))

    def _leave(self, outs: Iterable[Any]) -> None:
        self.escapes.update(self.number(v) for v in outs if not isinstance(v, c.Literal))


def _read_elsewhere(jaxpr: Any, pair: tuple[int, int]) -> set[Any]:
    """Return the variables that the level reads in another way than as slices of the second loop."""
    found = {v for v in jaxpr.outvars if not isinstance(v, c.Literal)}
    for index, eqn in enumerate(jaxpr.eqns):
        operands = list(eqn.invars)
        if index == pair[1]:
            loop = Loop(eqn)
            operands = [*loop.consts, *loop.init]
        found.update(v for v in operands if not isinstance(v, c.Literal))
    return found


def _key(eqn: Any, ins: tuple[int | None, ...]) -> Any | None:
    """Return a hashable key that equal computations share, or None for what is never taken as equal."""
    if eqn.effects or c.subjaxprs(eqn.params) or eqn.primitive.name in ("rng_uniform", "optimization_barrier"):
        return None
    literals = tuple(f"{v.aval}:{v.val!r}" for v in eqn.invars if isinstance(v, c.Literal))
    key = (eqn.primitive, tuple((k, repr(v)) for k, v in eqn.params.items()), ins, literals)
    return (*key, tuple(str(v.aval) for v in eqn.outvars)) if not any(ins) else key
