"""The element-wise region of an optimizer: from a gradient, through the moments that it feeds, to the update.

In: a flat open jaxpr, and which inputs are moments with which outputs as their new values. Out: for each gradient its
`Region` (what is read, what is run, where the update leaves), and for every other moment the reason why it has none.
Found by dataflow alone, and nothing is changed here. Every value of a region has the shape of the moments, or is a
scalar that all elements share, so the same operations can run on an array of any other shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from memopt import _compat as c
from memopt._rows import ELEMENTWISE

#: Scaling a value by a scalar: these stay outside at both ends, since they commute with a projection.
_SCALINGS = frozenset({"mul", "div", "neg", "convert_element_type", "copy", "copy_p"})


@dataclasses.dataclass(frozen=True)
class Region:
    """The operations of an optimizer on one gradient.

    Attributes:
      gradient: the variable that it reads the gradient from.
      moments: numbers of the moments that are updated in it.
      members: ids of its equations.
      constants: variables of the full shape that are one scalar everywhere, with the equation that makes each.
      update: the one variable that is read outside, beside the new moments.
    """

    gradient: Any
    moments: tuple[int, ...]
    members: frozenset[int]
    constants: Mapping[Any, Any]
    update: Any


def find(
    jaxpr: Any, moments: Sequence[tuple[Any, int]], state: Sequence[tuple[Any, int | None]]
) -> tuple[list[Region], dict[int, str]]:
    """Find the regions of an open jaxpr, in the order in which their gradients are made.

    Args:
      jaxpr: open jaxpr, flat, without dead code.
      moments: for each the variable that comes in, and the number of the output that is its new value.
      state: the same of other state of optimizers, None where the step returns no new value. What depends on it is no
        gradient, and a gradient that it is made of has to be whole.

    Returns:
      `(regions, number of a moment without one -> why)`.
    """
    return _Finder(jaxpr, moments, state).find()


class _Finder:
    def __init__(self, jaxpr: Any, moments: Sequence[tuple[Any, int]], state: Sequence[tuple[Any, int | None]]):
        self.jaxpr, self.moments = jaxpr, dict(enumerate(moments))
        self.state = {var for var, _ in (*state, *moments)}
        own = {place for _, place in moments}
        self.others = [jaxpr.outvars[place] for _, place in state if place is not None and place not in own]
        self.makers = {v: e for e in jaxpr.eqns for v in e.outvars}
        self.order = {v: place for place, e in enumerate(jaxpr.eqns) for v in e.outvars}
        self.constants = _constants(jaxpr)
        self.why: dict[int, str] = {}

    def find(self) -> tuple[list[Region], dict[int, str]]:
        gradients: dict[Any, list[int]] = {}
        while True:
            before, taint = len(self.why), self._taint()
            gradients.clear()
            for number in self._left():
                gradient = self._gradient(number, taint)
                if gradient is not None:
                    gradients.setdefault(gradient, []).append(number)
            if len(self.why) == before:
                break
        self._unmix(gradients, taint)
        ordered = sorted(gradients, key=lambda g: self.order.get(g, -1))
        regions = [self._region(g, gradients[g], taint) for g in ordered]
        return [r for r in regions if r is not None], self.why

    def _unmix(self, gradients: dict[Any, list[int]], taint: Mapping[Any, frozenset[int]]) -> None:
        """Take out moments that make one value together and read different gradients."""
        owner = {number: gradient for gradient, numbers in gradients.items() for number in numbers}
        mixed = {g for numbers in taint.values() if len(found := {owner[n] for n in numbers}) > 1 for g in found}
        for gradient in mixed:
            why = "it makes one value with a moment that reads another gradient"
            self.why.update((number, why) for number in gradients.pop(gradient))

    def _left(self) -> list[int]:
        return [number for number in self.moments if number not in self.why]

    def _taint(self) -> dict[Any, frozenset[int]]:
        """Return the variables that element-wise operations make of moments, with the numbers of those."""
        taint = {self.moments[number][0]: frozenset([number]) for number in self._left()}
        for eqn in self.jaxpr.eqns:
            read = [v for v in _variables(eqn.invars) if v in taint]
            if read and self._is_elementwise(eqn, read[0].aval.shape):
                taint[eqn.outvars[0]] = frozenset().union(*(taint[v] for v in read))
        return taint

    def _is_elementwise(self, eqn: Any, shape: tuple[int, ...]) -> bool:
        """Say whether an equation is an element-wise operation on values of one shape, and on scalars."""
        if eqn.primitive.name not in ELEMENTWISE or eqn.effects or len(eqn.outvars) != 1:
            return False
        shapes = [getattr(v.aval, "shape", None) for v in (*eqn.invars, *eqn.outvars)]
        return shapes[-1] == shape and all(s in ((), shape) for s in shapes)

    def _full(self, eqn: Any) -> list[Any]:
        """Return the operands that differ from element to element, each once."""
        shape = eqn.outvars[0].aval.shape
        return [v for v in dict.fromkeys(_variables(eqn.invars)) if v.aval.shape == shape and v not in self.constants]

    def _gradient(self, number: int, taint: Mapping[Any, frozenset[int]]) -> Any | None:
        """Return the one variable from which the new value of a moment is made beside moments; note why there is none.

        Where non-linear operations of one operand come before it (a sign, a clipping of elements), it is their operand.
        """
        old, place = self.moments[number]
        new = self.jaxpr.outvars[place]
        if isinstance(new, c.Literal) or new is old:
            self.why[number] = "the step returns it as it came in"
            return None
        if new not in taint and old in ancestors(self.jaxpr, [new]):
            self.why[number] = f"its new value is not made of it element by element ({self.makers[new].primitive.name})"
            return None
        read = self._reads(new, taint)
        chains = [self._chain(v) for v in read]
        common = [v for v in chains[0] if all(any(v is w for w in chain) for chain in chains)] if chains else []
        if not common:
            self.why[number] = "its new value is made of more than moments, scalars and one gradient"
            return None
        gradient = self._above(common)
        others = ancestors(self.jaxpr, [gradient]) & (self.state - {old})
        if gradient in self.state or others:
            self.why[number] = "what it averages is no gradient: it depends on other state of the optimizer already"
            return None
        return gradient

    def _reads(self, new: Any, taint: Mapping[Any, frozenset[int]]) -> list[Any]:
        """Return the full values that are no moments' from which a new moment is made."""
        if new not in taint:
            return [new]
        olds = {self.moments[number][0] for number in self._left()}
        found: dict[Any, None] = {}
        todo, seen = [new], {new}
        while todo:
            var = todo.pop()
            if var in olds:
                continue
            for operand in self._full(self.makers[var]):
                if operand not in taint:
                    found[operand] = None
                elif operand not in seen:
                    seen.add(operand)
                    todo.append(operand)
        return list(found)

    def _chain(self, var: Any) -> list[Any]:
        """Return a variable and those that it is made from one after the other by element-wise operations."""
        chain = [var]
        while (eqn := self.makers.get(chain[-1])) is not None and self._is_elementwise(eqn, var.aval.shape):
            full = self._full(eqn)
            if len(full) != 1:
                break
            chain.append(full[0])
        return chain

    def _above(self, chain: Sequence[Any]) -> Any:
        """Return the operand of the first operation of a chain that is no scaling, or the chain's nearest variable."""
        makers = [(above, self.makers[below]) for below, above in zip(chain, chain[1:], strict=False)]
        nonlinear = [above for above, eqn in makers if not self._scales(eqn, above)]
        return nonlinear[-1] if nonlinear else chain[0]

    def _scales(self, eqn: Any, operand: Any) -> bool:
        """Say whether an equation multiplies one variable by a scalar, or changes its float type."""
        if eqn.primitive.name not in _SCALINGS or self._full(eqn) != [operand] or not _is_float(eqn.outvars[0]):
            return False
        times = sum(v is operand for v in _variables(eqn.invars))
        return times == 1 and eqn.invars[0] is operand if eqn.primitive.name == "div" else times == 1

    def _region(self, gradient: Any, numbers: list[int], taint: Mapping[Any, frozenset[int]]) -> Region | None:
        low = {gradient, *(self.moments[number][0] for number in numbers)}
        members: dict[int, Any] = {}
        for eqn in self.jaxpr.eqns:
            full = self._full(eqn) if len(eqn.outvars) == 1 and hasattr(eqn.outvars[0].aval, "shape") else []
            if full and all(v in low for v in full) and self._is_elementwise(eqn, gradient.aval.shape):
                members[id(eqn)] = eqn
                low.add(eqn.outvars[0])
        news = {self.jaxpr.outvars[self.moments[n][1]]: n for n in numbers}
        why = self._trimmed(members, low, news, taint)
        if why is None and not all(v in low for v in news):
            why = "its moments are not made in one region"
        if why is None and self._has_other_readers(gradient, members, taint):
            why = "other state of the optimizer is made of its gradient, and not element by element"
        if why is not None:
            self.why.update((number, why) for number in numbers)
            return None
        (update,) = self._exits(members, low, news, taint)
        needed = self._needed(members, [update, *news])
        return Region(gradient, tuple(numbers), frozenset(map(id, needed)), self.constants, update)

    def _trimmed(self, members: dict[int, Any], low: set[Any], news: Any, taint: Any) -> str | None:
        """Take scalings of the update out of a region; return why no update leaves it, or more than one value."""
        while True:
            exits = self._exits(members, low, news, taint)
            last = [v for v in exits if v not in news and self._is_scaling(members, v)]
            if not last:
                break
            for v in last:
                del members[id(self.makers[v])]
                low.remove(v)
        if not exits:
            return "no update is made of it"
        return None if len(exits) == 1 else f"{len(exits)} values of its update are read by other operations"

    def _is_scaling(self, members: Mapping[int, Any], var: Any) -> bool:
        eqn = self.makers.get(var)
        return eqn is not None and id(eqn) in members and self._scales(eqn, self._full(eqn)[0])

    def _exits(self, members: Mapping[int, Any], low: set[Any], news: Mapping[Any, int], taint: Any) -> list[Any]:
        """Return what other operations, or the step's results beside the new moments, read of what moments make."""
        inner = {v for v in low if v in taint}
        found: dict[Any, None] = {}
        for eqn in self.jaxpr.eqns:
            if id(eqn) not in members:
                found.update((v, None) for v in _variables(eqn.invars) if v in inner)
        own = {self.moments[n][1] for n in news.values()}
        outs = [v for place, v in enumerate(self.jaxpr.outvars) if place not in own]
        found.update((v, None) for v in _variables(outs) if v in inner)
        return list(found)

    def _has_other_readers(self, gradient: Any, members: Mapping[int, Any], taint: Any) -> bool:
        """Say whether a gradient has an effect on other state of the optimizer, beside that through the region."""
        reached = {gradient}
        for eqn in self.jaxpr.eqns:
            inside = id(eqn) in members and eqn.outvars[0] in taint
            if not inside and any(v in reached for v in _variables(eqn.invars)):
                reached.update(eqn.outvars)
        return any(v in reached for v in _variables(self.others))

    def _needed(self, members: Mapping[int, Any], results: Sequence[Any]) -> Iterator[Any]:
        """Yield the members that results of the region are made by."""
        wanted = set(results)
        for eqn in reversed(self.jaxpr.eqns):
            if id(eqn) in members and eqn.outvars[0] in wanted:
                wanted.update(_variables(eqn.invars))
                yield eqn


def ancestors(jaxpr: Any, atoms: Sequence[Any]) -> set[Any]:
    """Return the variables of an open jaxpr that have an effect on these, themselves included."""
    found = set(_variables(atoms))
    for eqn in reversed(jaxpr.eqns):
        if any(v in found for v in eqn.outvars):
            found.update(_variables(eqn.invars))
    return found


def _constants(jaxpr: Any) -> dict[Any, Any]:
    """Return the arrays that are one scalar everywhere, with the equation that makes each."""
    found: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[:1]
        spread = name == "broadcast_in_dim" and len(eqn.invars) == 1 and eqn.invars[0].aval.shape == ()
        if spread or (name in ELEMENTWISE and any(v in found for v in _variables(eqn.invars))):
            if len(eqn.outvars) == 1 and all(v in found or v.aval.shape == () for v in _variables(eqn.invars)):
                found[out[0]] = eqn
    return found


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (v for v in atoms if not isinstance(v, c.Literal))


def _is_float(var: Any) -> bool:
    return np.issubdtype(var.aval.dtype, np.floating) or str(var.aval.dtype) in ("bfloat16", "float16")
