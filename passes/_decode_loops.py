"""Stored stacks in loops: layers that a loop reads as slices are decoded one at a time, inside it.

In: a flat closed jaxpr and which of its inputs are stored leaves. Out: an equal one in which a loop that reads a
decoded stack as slices takes the stored stack, and decodes the layer at the start of its body. So the frozen weights
under an adapter are never decoded as a whole, in the forward loop or in the backward one. A stack that anything else
reads, or whose layers are not stored by themselves, stays as it was. It knows no codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memopt import _compat as c
from memopt import _forms, _pairs, _rows


def sink(closed: Any, stored: Sequence[int]) -> Any:
    """Return an equal closed jaxpr in which loops decode the layers of the stacks that they read as slices.

    Args:
      closed: closed jaxpr, flat.
      stored: the numbers of the inputs that are codes and scales.
    """
    base = c.open_jaxpr(closed)
    inputs = {base.invars[i] for i in stored}
    makers = {v: e for e in base.eqns for v in e.outvars}
    chains = {v: chain for v in _slices(base) if (chain := _chain(v, inputs, makers)) is not None}
    if not chains:
        return closed
    eqns = [_Sinker(e, chains).build() if e.primitive.name == "scan" else e for e in base.eqns]
    return c.close(c.dce(c.rebuild(base, eqns=eqns))[0], c.jaxpr_consts(closed))


def _slices(jaxpr: Any) -> set[Any]:
    """Return the variables that loops of one length read as slices, and nothing else reads."""
    lengths: dict[Any, set[int]] = {}
    others = {v for v in jaxpr.outvars if not isinstance(v, c.Literal)}
    for eqn in jaxpr.eqns:
        loop = _pairs.Loop(eqn) if eqn.primitive.name == "scan" else None
        first = len(eqn.invars) if loop is None else loop.first_xs
        others.update(v for v in eqn.invars[:first] if not isinstance(v, c.Literal))
        for v in eqn.invars[first:]:
            if not isinstance(v, c.Literal):
                lengths.setdefault(v, set()).add(loop.length)
    return {v for v, found in lengths.items() if len(found) == 1 and v not in others}


def _chain(var: Any, inputs: set[Any], makers: dict[Any, Any]) -> list[tuple[Any, list[bool], _rows.Row]] | None:
    """Return the operations on one layer that make a stack of stored inputs alone, in order; None where there are none.

    Scalars that the step makes are no stacks, and none of these operations may read one: a layer's values would then
    not follow from the loop's slices.
    """
    if var in inputs or var not in makers:
        return None
    length, found, seen, todo = var.aval.shape[0], [], set(), [var]
    while todo:
        one = todo.pop()
        if one in inputs:
            if not one.aval.shape or one.aval.shape[0] != length:
                return None
            continue
        eqn = makers.get(one)
        if eqn is None or len(eqn.outvars) != 1:
            return None
        if id(eqn) in seen:
            continue
        stacked = [not isinstance(v, c.Literal) for v in eqn.invars]
        row = _rows.row(eqn, stacked, length)
        if row is None or row.gather is not None or row.inner is not None:
            return None
        seen.add(id(eqn))
        found.append((eqn, stacked, row))
        todo += [v for v, s in zip(eqn.invars, stacked, strict=True) if s]
    return _in_order(found, makers)


def _in_order(found: list, makers: dict[Any, Any]) -> list:
    """Order operations as the step has them."""
    places = {id(e): i for i, e in enumerate(makers.values())}
    return sorted(found, key=lambda one: places[id(one[0])])


class _Sinker:
    """One loop built anew with decoding at the start of its body."""

    def __init__(self, eqn: Any, chains: dict[Any, Any]):
        self.eqn, self.chains, self.loop = eqn, chains, _pairs.Loop(eqn)

    def build(self) -> Any:
        """Return the loop's equation, the very same where it reads no stack that can be decoded by layer."""
        loop, body = self.loop, self.loop.body
        if not any(not isinstance(v, c.Literal) and v in self.chains for v in loop.xs):
            return self.eqn
        consts, carry, xs = loop.sorted(body.invars)
        rows: dict[Any, Any] = {}  # outer variable -> the layer's, in the body
        before, outer, inner, renamed = [], [], [], {}
        for operand, slice_ in zip(loop.xs, xs, strict=True):
            if isinstance(operand, c.Literal) or operand not in self.chains:
                outer.append(operand)
                inner.append(slice_)
                continue
            for eqn, stacked, row in self.chains[operand]:
                if eqn.outvars[0] in rows:
                    continue
                for v, s in zip(eqn.invars, stacked, strict=True):
                    if s and v not in rows:
                        outer.append(v)
                        inner.append(c.Var(_rows.row_aval(v.aval)))
                        # Behind a barrier: else what one loop decodes is handed on to a later one, for all layers.
                        barrier, (rows[v],) = c.barrier_eqn([inner[-1]], eqn)
                        before.append(barrier)
                invars = [rows[v] if s else v for v, s in zip(eqn.invars, stacked, strict=True)]
                if not any(stacked):  # a constant in a layer's shape
                    barrier, invars = c.barrier_eqn(invars, eqn)
                    before.append(barrier)
                out = rows[eqn.outvars[0]] = c.Var(_rows.row_aval(eqn.outvars[0].aval))
                before.append(c.replace_eqn(eqn, invars=invars, outvars=[out], params=row.params))
            renamed[slice_] = rows[operand]
        taken = c.rebuild(body, invars=[*consts, *carry, *xs], eqns=body.eqns)
        eqns, outs = _forms.emit(taken, [*consts, *carry, *(renamed.get(v, v) for v in xs)], None)
        new = c.rebuild(body, invars=[*consts, *carry, *inner], eqns=[*before, *eqns], outvars=outs)
        return _pairs.scan_eqn(self.eqn, new, (loop.consts, loop.init, outer), self.eqn.outvars, loop.length)
