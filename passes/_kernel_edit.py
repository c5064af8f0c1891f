"""The hand that puts kernels in: equations of a level, or of both bodies of a loop pair, exchanged for calls.

In: a `Space`, and calls with what they were found to equal. Out: the level with all exchanges made, and with values
handed from one body to the other where the new equations need them. It decides nothing.
"""

from __future__ import annotations

from typing import Any

import jax

from memopt import _compat as c
from memopt import _pairs
from memopt.passes._match import FIRST, OUTER, SECOND, Node, Space


class Edit:
    """Exchanges equations of a space, and hands values from one body to the other where the new ones need them."""

    def __init__(self, space: Space):
        self.space = space
        self.new: dict[str, dict[int, Any]] = {OUTER: {}, FIRST: {}, SECOND: {}}  # None deletes
        self.late: dict[str, dict[int, Any]] = {OUTER: {}, FIRST: {}, SECOND: {}}  # after the one of that index
        self.rename: dict[Any, Any] = {}  # variable -> the one that has its value now
        self.handed: list[tuple[Any, Any]] = []  # variable of the first body -> of the second
        self.given: dict[str, list[tuple[Any, Any]]] = {FIRST: [], SECOND: []}  # variable of the level -> of a body

    def replace(self, call: Any, first: Node) -> None:
        """Put a call in the place of what it was found to equal; `first` makes the forward result."""
        found, space = call.found, self.space
        outs = self._forward(call, first)
        copies = [v for v, number in space.numbered() if number == first.outs[0] and v is not outs[0]]
        for var in copies:
            self.rename[var] = outs[0]
        if not found.grads:
            return
        side = next(iter(found.grads.values())).side
        index = min(node.index for node in found.grads.values())
        eqn = next(node for node in found.grads.values() if node.index == index).eqn
        operands = [self._variable(side, value) for value in call.operands]
        if side != first.side and (copies or call.keeps_result):
            outs = [self._hand(var) for var in outs]
            self.rename.update((var, outs[0]) for var in copies)
        saved = outs if call.keeps_result else []
        cotangent = self._variable(side, found.cotangent)
        outvars = [node.eqn.outvars[0] for node in found.grads.values()]
        for node in found.grads.values():
            self.new[side][node.index] = None
        if others := getattr(found, "others", ()):
            outvars[0] = self._add(side, found.grads["x"], others)
        self.new[side][index] = _call_eqn(call.backward, [*operands, *saved, cotangent], outvars, eqn)

    def _add(self, side: str, total: Node, others: list[int]) -> Any:
        """Put a sum in the place of `total`, of `others` and of the variable that is returned."""
        aval = total.eqn.outvars[0].aval
        part = c.Var(c.ShapedArray(aval.shape, aval.dtype))
        operands = [*(self._variable(side, value) for value in others), part]

        def add(*arrays: jax.Array) -> list[jax.Array]:
            first, *rest = (x.reshape(aval.shape).astype(aval.dtype) for x in arrays)
            for x in rest:
                first = first + x
            return [first]

        self.late[side][total.index] = _call_eqn(add, operands, [total.eqn.outvars[0]], total.eqn)
        return part

    def join(self, part: Node, total: Node) -> None:
        """Take a part out of a sum: what is left of the sum has it already."""
        self.new[part.side][part.index] = self.new[total.side][total.index] = None
        rest = next(v for v, n in zip(total.eqn.invars, total.ins, strict=True) if not self._is_part(n, part.outs[0]))
        self.rename[total.eqn.outvars[0]] = rest

    def _is_part(self, value: int, part: int) -> bool:
        while value != part and (node := self.space.makers.get(value)) is not None and len(node.ins) == 1:
            value = node.ins[0]
        return value == part

    def _forward(self, call: Any, node: Node) -> list[Any]:
        operands = [self._variable(node.side, value) for value in call.operands]
        avals = jax.eval_shape(call.forward, *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands))
        outs = [node.eqn.outvars[0], *(c.Var(c.ShapedArray(aval.shape, aval.dtype)) for aval in avals[1:])]
        self.new[node.side][node.index] = _call_eqn(call.forward, operands, outs, node.eqn)
        return outs

    def _variable(self, side: str, value: int) -> Any:
        """Return the variable that has a value on a side, handing it over where it has none yet."""
        held = self.space.held
        if (side, value) not in held:
            if side == SECOND and (FIRST, value) in held:
                held[side, value] = self._hand(held[FIRST, value])
            else:
                outer = held[OUTER, value]
                held[side, value] = c.Var(outer.aval)
                self.given[side].append((outer, held[side, value]))
        return held[side, value]

    def _hand(self, var: Any) -> Any:
        for first, second in self.handed:
            if first is var:
                return second
        self.handed.append((var, c.Var(var.aval)))
        return self.handed[-1][1]

    def done(self) -> Any:
        """Return the level with all exchanges made."""
        space, jaxpr = self.space, self.space.jaxpr
        if not any(self.new.values()):
            return jaxpr
        if space.pair is None:
            eqns = self._exchanged(OUTER, jaxpr.eqns)
            return c.rebuild(jaxpr, eqns=eqns, outvars=[self._renamed(v) for v in jaxpr.outvars])
        first, second = (_pairs.Loop(jaxpr.eqns[i]) for i in space.pair)
        stacked = [c.Var(c.stacked_aval(var.aval, first.length)) for var, _ in self.handed]
        eqns = list(jaxpr.eqns)
        eqns[space.pair[0]] = self._loop(FIRST, first, [var for var, _ in self.handed], [], stacked)
        slices = [(stack, var) for stack, (_, var) in zip(stacked, self.handed, strict=True)]
        eqns[space.pair[1]] = self._loop(SECOND, second, [], slices, [])
        return c.rebuild(jaxpr, eqns=eqns)

    def _loop(self, side: str, loop: _pairs.Loop, outs: list[Any], slices: list[tuple[Any, Any]], results: list[Any]):
        consts, carry, xs = loop.sorted(loop.body.invars)
        given = self.given[side]
        invars = [*consts, *(var for _, var in given), *carry, *xs, *(var for _, var in slices)]
        outvars = [self._renamed(v) for v in (*loop.body.outvars, *outs)]
        body = c.rebuild(loop.body, invars=invars, outvars=outvars, eqns=self._exchanged(side, loop.body.eqns))
        operands = [*loop.consts, *(var for var, _ in given)], loop.init, [*loop.xs, *(var for var, _ in slices)]
        return _pairs.scan_eqn(loop.eqn, body, operands, [*loop.eqn.outvars, *results], loop.length)

    def _exchanged(self, side: str, eqns: list[Any]) -> list[Any]:
        found = []
        for index, eqn in enumerate(eqns):
            eqn = self.new[side].get(index, eqn)
            for one in (eqn, self.late[side].get(index)):
                if one is not None:
                    found.append(c.replace_eqn(one, invars=[self._renamed(v) for v in one.invars]))
        return found

    def _renamed(self, var: Any) -> Any:
        while not isinstance(var, c.Literal) and var in self.rename:
            var = self.rename[var]
        return var


def _call_eqn(function: Any, operands: list[Any], outvars: list[Any], like: Any) -> Any:
    """Return a `jit` equation that calls a function; it is inlined when the step is made flat again."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands]
    traced = c.open_jaxpr(jax.make_jaxpr(jax.jit(lambda *arrays: function(*arrays)))(*shapes))
    call = traced.eqns[-1]
    return c.new_eqn(operands, outvars, call.primitive, call.params, call.effects, like.source_info, like.ctx)
