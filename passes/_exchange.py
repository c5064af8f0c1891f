"""The exchange: plain operations out, a call in their place, on every level of a step and in pairs of loops.

In: a flat jaxpr, and what makes a call of what was found (`_match_attention`, `_match_loss`). Out: the jaxpr with the
exchanges made, forward and backward together; what the backward call reads of the forward one is handed over, stacked
by a loop where the two stand in a pair of loops. It proves nothing: what comes in is found and proven already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from memopt import _compat as c
from memopt import _pairs
from memopt._contract import Left
from memopt._plan import Decision
from memopt.passes import _match_attention, _match_loss
from memopt.passes._match import FIRST, OUTER, SECOND, Node, Space

#: A space and what was found in it -> a call with `found`, `node` (it makes the forward result), `operands`, `forward`,
#: `backward` and `row(number)`; None where there is nothing to exchange.
Maker = Callable[[Space, Any], Any]


class Exchange:
    """One rewrite of a step: what takes the place of what is found, and what it did so far, for the plan.

    Args:
        attention: makes the call that takes an attention's place; None to look for none.
        losses: the same for matmuls into a cross-entropy. Both may raise `NotImplementedError` with the reason.
    """

    def __init__(self, attention: Maker | None = None, losses: Maker | None = None):
        self.attention, self.losses = attention, losses
        self.rows: list[Decision] = []
        self.left: list[Left] = []
        self.seen: set[Any] = set()  # near misses that are listed already

    def level(self, jaxpr: Any, quiet: bool = False) -> Any:
        """Return a level rewritten: its own operations, its pairs of loops, then the bodies inside."""
        jaxpr = self._space(jaxpr, None, quiet)
        paired: set[int] = set()
        for index in range(len(jaxpr.eqns)):
            pair = _pairs.find(jaxpr, index)
            if pair is not None and len(pair.readers) == 1:
                jaxpr = self._space(jaxpr, (index, pair.readers[0]), quiet)
                paired.update((index, pair.readers[0]))
        eqns = [self._bodies(eqn, quiet or index in paired) for index, eqn in enumerate(jaxpr.eqns)]
        changed = any(a is not b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        return c.rebuild(jaxpr, eqns=eqns) if changed else jaxpr

    def _bodies(self, eqn: Any, quiet: bool) -> Any:
        if eqn.primitive.name not in ("scan", "cond", "while"):
            return eqn
        params = dict(eqn.params)
        for key, position, body in c.subjaxprs(eqn.params):
            inner = self.level(c.open_jaxpr(body), quiet)
            if inner is c.open_jaxpr(body):
                continue
            new = c.close(inner, c.jaxpr_consts(body))
            if position is None:
                params[key] = new
            else:
                items = list(params[key])
                items[position] = new
                params[key] = type(eqn.params[key])(items)
        same = all(params[key] is eqn.params[key] for key in params)
        return eqn if same else c.replace_eqn(eqn, params=params)

    def _space(self, jaxpr: Any, pair: tuple[int, int] | None, quiet: bool) -> Any:
        eqns = jaxpr.eqns if pair is None else c.open_jaxpr(jaxpr.eqns[pair[0]].params["jaxpr"]).eqns
        if not any(eqn.primitive.name == "exp" for eqn in eqns):
            return jaxpr
        space = Space(jaxpr, pair)
        edit = _Edit(space)
        for node, found in _match_attention.find(space) if self.attention else ():
            if pair is not None and node.side == OUTER:
                continue
            self._take(self.attention, space, edit, node, found, quiet, "attention")
        for node, found in _match_loss.find(space) if self.losses and pair is None else ():
            self._take(self.losses, space, edit, node, found, quiet, "loss")
        return edit.done()

    def _take(self, make: Maker, space: Space, edit: _Edit, node: Node, found: Any, quiet: bool, what: str) -> None:
        """Put a call in the place of what was found, or note the reason against it."""
        call = None
        if not isinstance(found, str):
            try:
                call = make(space, found)
            except NotImplementedError as error:
                found = str(error)
        if call is None:
            self._leave(node, found, quiet, what)
            return
        edit.replace(call, call.node)
        self.rows.append(call.row(len(self.rows)))

    def _leave(self, node: Node, why: str, quiet: bool, what: str) -> None:
        key = (c.user_source(node.eqn), why)
        if not quiet and key not in self.seen:
            self.seen.add(key)
            self.left.append(Left(f"{what} at {key[0] or str(c.name_stack(node.eqn)) or 'an unnamed place'}", why))


class _Edit:
    """Exchanges equations of a space, and hands values from one body to the other where the new ones need them."""

    def __init__(self, space: Space):
        self.space = space
        self.new: dict[str, dict[int, Any]] = {OUTER: {}, FIRST: {}, SECOND: {}}  # None deletes
        self.rename: dict[Any, Any] = {}  # variable -> the one that has its value now
        self.handed: list[tuple[Any, Any]] = []  # variable of the first body -> of the second
        self.given: dict[str, list[tuple[Any, Any]]] = {FIRST: [], SECOND: []}  # variable of the level -> of a body

    def replace(self, call: Any, first: Node) -> None:
        """Put a call in the place of what it was found to equal; `first` makes the forward result."""
        found, space = call.found, self.space
        out, lse = self._forward(call, first)
        copies = [v for v, number in space.numbered() if number == first.outs[0] and v is not out]
        for var in copies:
            self.rename[var] = out
        if not found.grads:
            return
        side = next(iter(found.grads.values())).side
        index = min(node.index for node in found.grads.values())
        eqn = next(node for node in found.grads.values() if node.index == index).eqn
        operands = [self._variable(side, value) for value in call.operands]
        saved = [out, lse] if side == first.side else [self._hand(out), self._hand(lse)]
        if side != first.side:
            self.rename.update((var, saved[0]) for var in copies)
        cotangent = self._variable(side, found.cotangent)
        outvars = [node.eqn.outvars[0] for node in found.grads.values()]
        for node in found.grads.values():
            self.new[side][node.index] = None
        self.new[side][index] = _call_eqn(call.backward, [*operands, *saved, cotangent], outvars, eqn)

    def _forward(self, call: Any, node: Node) -> tuple[Any, Any]:
        operands = [self._variable(node.side, value) for value in call.operands]
        aval = jax.eval_shape(call.forward, *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands))[1]
        out, lse = node.eqn.outvars[0], c.Var(c.ShapedArray(aval.shape, aval.dtype))
        self.new[node.side][node.index] = _call_eqn(call.forward, operands, [out, lse], node.eqn)
        return out, lse

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
            if eqn is not None:
                found.append(c.replace_eqn(eqn, invars=[self._renamed(v) for v in eqn.invars]))
        return found

    def _renamed(self, var: Any) -> Any:
        return var if isinstance(var, c.Literal) else self.rename.get(var, var)


def _call_eqn(function: Any, operands: list[Any], outvars: list[Any], like: Any) -> Any:
    """Return a `jit` equation that calls a function; it is inlined when the step is made flat again."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands]
    traced = c.open_jaxpr(jax.make_jaxpr(jax.jit(lambda *arrays: function(*arrays)))(*shapes))
    call = traced.eqns[-1]
    return c.new_eqn(operands, outvars, call.primitive, call.params, call.effects, like.source_info, like.ctx)
