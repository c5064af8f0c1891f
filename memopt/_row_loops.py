"""The turnstile: loops that go through the layers of stacks one after another, taken apart for one layer.

In: a loop whose trips each read and write the same row of all its stacks: a `scan` over rows without a carry
(`lax.map`), or a `while` that counts through a range of rows (`fori_loop`) and rewrites them. Out: what it does to one
layer, given that layer's number, as a jaxpr; or None where rows depend on each other or the range may leave the stack.
It looks at dataflow alone and changes no jaxpr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _forms, _pairs
from memopt._rows import Row


def row(
    eqn: Any, dependent: Sequence[bool], length: int, makers: Mapping[Any, Any], is_read: Callable[[Any], bool]
) -> tuple[tuple[bool, ...], Row] | None:
    """Return which operands of a loop are stacks, and what it is for one layer; None where that is unknown.

    Args:
      eqn: the equation.
      dependent: for each operand, whether it has to be taken as a stack.
      length: the number of layers.
      makers: variable -> the equation that makes it.
      is_read: says whether a result of the equation is read.
    """
    if eqn.effects or eqn.primitive.name not in ("scan", "while"):
        return None
    found = _mapped(eqn, length) if eqn.primitive.name == "scan" else _counted(eqn, length, makers, is_read)
    if found is None or any(d and not s for d, s in zip(dependent, found[0], strict=True)):
        return None
    return found


def _mapped(eqn: Any, length: int) -> tuple[tuple[bool, ...], Row] | None:
    """A `scan` without a carry: its body is what it does to a row."""
    loop = _pairs.Loop(eqn)
    if loop.num_carry or loop.length != length or c.jaxpr_consts(eqn.params["jaxpr"]) or not loop.ys:
        return None
    number = c.Var(c.ShapedArray((), np.dtype("int32")))
    body = c.rebuild(loop.body, invars=[number, *loop.body.invars])
    return (*[False] * loop.num_consts, *[True] * len(loop.xs)), Row({}, inner=body)


def _counted(eqn: Any, length: int, makers: Mapping[Any, Any], is_read: Callable[[Any], bool]) -> Any:
    """A `while` over rows: one of its trips, taken where the layer's number is in its range."""
    loop = _Counted(eqn)
    counters = [v for k, v in enumerate(eqn.outvars) if k in (loop.counter, loop.limit)]
    if loop.counter is None or any(not isinstance(v, c.DropVar) and is_read(v) for v in counters):
        return None
    first, last = loop.bounds
    if interval(first, makers)[0] < 0 or interval(last, makers)[1] > length:
        return None
    return loop.row(length)


class _Counted:
    """A `while` equation that counts upwards by one, and what it counts.

    Attributes:
      counter: the counter's place among the carries; None where it has none.
      limit: the limit's place there, or None where it is no carry.
      bounds: the atoms outside that the counter starts from and stays below.
    """

    def __init__(self, eqn: Any):
        self.eqn = eqn
        cond = c.open_jaxpr(eqn.params["cond_jaxpr"])
        self.body = c.open_jaxpr(eqn.params["body_jaxpr"])
        self.num_cond, self.num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        self.first = self.num_cond + self.num_body
        self.consts = eqn.invars[self.num_cond : self.first]
        self.init = eqn.invars[self.first :]
        self.carries = self.body.invars[self.num_body :]
        self.makers = {v: e for e in self.body.eqns for v in e.outvars}
        self.counter, self.limit, self.bounds = None, None, ()
        if not c.jaxpr_consts(eqn.params["body_jaxpr"]) and not c.jaxpr_consts(eqn.params["cond_jaxpr"]):
            self._find(cond)

    def _find(self, cond: Any) -> None:
        test = cond.eqns[0] if len(cond.eqns) == 1 else None
        if test is None or test.primitive.name != "lt" or test.outvars[0] is not cond.outvars[0]:
            return
        places = [None if isinstance(v, c.Literal) else cond.invars.index(v) for v in test.invars]
        if places[0] is None or places[0] < self.num_cond:
            return
        counter = places[0] - self.num_cond
        carried = None if places[1] is None or places[1] < self.num_cond else places[1] - self.num_cond
        if not self._counts(counter) or (carried is not None and not self._stays(carried)):
            return
        at = places[1] if carried is None else self.first + carried
        limit = test.invars[1] if at is None else self.eqn.invars[at]
        self.counter, self.limit, self.bounds = counter, carried, (self.init[counter], limit)

    def _counts(self, place: int) -> bool:
        eqn = self._maker(self.body.outvars[place])
        if eqn is None or eqn.primitive.name != "add" or self.carries[place].aval.dtype != np.int32:
            return False
        return any(a is self.carries[place] and _is(b, 1) for a, b in (eqn.invars, eqn.invars[::-1]))

    def _stays(self, place: int) -> bool:
        return self.body.outvars[place] is self.carries[place]

    def _maker(self, atom: Any) -> Any | None:
        return None if isinstance(atom, c.Literal) else self.makers.get(atom)

    def row(self, length: int) -> tuple[tuple[bool, ...], Row] | None:
        """Return which operands are stacks, and what the loop does to one layer of them."""
        counted = {k for k in (self.counter, self.limit) if k is not None}
        written = {k: self._written(k, length) for k in range(len(self.carries)) if k not in counted}
        if any(part is None for part in written.values()):
            return None
        writes = [self._maker(self.body.outvars[k]) for k in written]
        read = [e for e in self.body.eqns if self._is_at_row(e, length)]
        stacks = {e.invars[0] for e in read} & set(self.body.invars) | {self.carries[k] for k in written}
        for eqn in self.body.eqns:
            alone = any(eqn is e for e in (*read, *writes))
            if any(not isinstance(v, c.Literal) and v in stacks for v in eqn.invars[alone:]):
                return None
        trip = self._trip(stacks, {id(e) for e in read}, {id(e) for e in writes}, written)
        flags = [v in stacks for v in self.body.invars]
        stacked = (*[False] * self.num_cond, *flags)
        return stacked, Row({}, inner=self._inner(trip, stacked, list(written)))

    def _written(self, place: int, length: int) -> Any | None:
        """Return the part `[1, ...]` that a trip writes into its row of a carry; None where it does anything else."""
        carried, out = self.carries[place], self.body.outvars[place]
        eqn = self._maker(out)
        if eqn is None or eqn.primitive.name != "dynamic_update_slice" or eqn.invars[0] is not carried:
            return None
        fits = eqn.invars[1].aval.shape == (1, *carried.aval.shape[1:]) and carried.aval.shape[0] == length
        alone = not any(v is out for e in self.body.eqns for v in e.invars)
        return eqn.invars[1] if fits and alone and self._at_row(eqn.invars[2:], length) else None

    def _is_at_row(self, eqn: Any, length: int) -> bool:
        """Say whether an equation reads this trip's row of a stack."""
        if eqn.primitive.name != "dynamic_slice":
            return False
        shape = eqn.invars[0].aval.shape
        return (
            shape[0] == length and eqn.outvars[0].aval.shape == (1, *shape[1:]) and self._at_row(eqn.invars[1:], length)
        )

    def _at_row(self, places: Sequence[Any], length: int) -> bool:
        return self._is_number(places[0], length) and all(_is(v, 0) for v in places[1:])

    def _is_number(self, atom: Any, length: int) -> bool:
        """Say whether an atom is the counter, also after `i < 0 ? i + length : i`; the counter is in range."""
        counter = self.carries[self.counter]
        if atom is counter:
            return True
        eqn = self._maker(atom)
        if eqn is None or eqn.primitive.name != "select_n" or eqn.invars[1] is not counter:
            return False
        test = self._maker(eqn.invars[0])
        return test is not None and test.primitive.name == "lt" and test.invars[0] is counter and _is(test.invars[1], 0)

    def _trip(self, stacks: set[Any], read: set[int], writes: set[int], written: Mapping[int, Any]) -> Any:
        """Return one trip as an open jaxpr over rows: its inputs are the body's, its results the rows written."""
        rows = {v: c.Var(c.row_aval(v.aval)) for v in stacks}
        eqns = []
        for eqn in self.body.eqns:
            if id(eqn) in read:
                eqns.append(_pairs.reshape(rows[eqn.invars[0]], eqn.outvars[0], eqn))
            elif id(eqn) not in writes:
                eqns.append(eqn)
        outvars = []
        for place, part in written.items():
            outvars.append(c.Var(rows[self.carries[place]].aval))
            eqns.append(_pairs.reshape(part, outvars[-1], self.eqn))
        return c.rebuild(self.body, invars=[rows.get(v, v) for v in self.body.invars], outvars=outvars, eqns=eqns)

    def _inner(self, trip: Any, stacked: Sequence[bool], places: Sequence[int]) -> Any:
        """Return what the loop does to one layer, as a jaxpr of the layer's number and the operands."""
        run = c.as_function(c.close(trip))
        places_of = {v: i for i, v in enumerate(self.eqn.invars) if not isinstance(v, c.Literal)}
        first, last = (v if isinstance(v, c.Literal) else places_of[v] for v in self.bounds)

        def one(number, *operands):
            def value(bound):
                return bound.val if isinstance(bound, c.Literal) else operands[bound]

            def due():
                values = list(operands[self.num_cond :])
                values[self.num_body + self.counter] = number
                return run(*values)

            kept = [operands[self.first + k] for k in places]
            return jax.lax.cond((value(first) <= number) & (number < value(last)), due, lambda: kept)

        avals = [c.row_aval(v.aval) if s else v.aval for v, s in zip(self.eqn.invars, stacked, strict=True)]
        shapes = [jax.ShapeDtypeStruct((), np.int32), *[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]]
        inner = _forms.flat(jax.make_jaxpr(one)(*shapes))
        order = {k: v for k, v in zip(places, inner.outvars, strict=True)}
        blank = c.Literal(np.int32(0), c.ShapedArray((), np.dtype("int32")))
        return c.rebuild(inner, outvars=[order.get(k, blank) for k in range(len(self.carries))])


def interval(atom: Any, makers: Mapping[Any, Any]) -> tuple[float, float]:
    """Return bounds of a scalar that literals, minima, maxima and choices among such tell; infinities else."""
    if isinstance(atom, c.Literal):
        return (atom.val, atom.val) if np.ndim(atom.val) == 0 else (-math.inf, math.inf)
    eqn = makers.get(atom)
    name = "" if eqn is None or atom.aval.shape else eqn.primitive.name
    if name == "convert_element_type" and eqn.invars[0].aval.dtype == atom.aval.dtype:  # a weak type alone
        return interval(eqn.invars[0], makers)
    if name not in ("max", "min", "clamp", "select_n"):
        return -math.inf, math.inf
    parts = [interval(v, makers) for v in eqn.invars]
    if name == "select_n":
        return min(low for low, _ in parts[1:]), max(high for _, high in parts[1:])
    if name == "clamp":
        return min(parts[0][0], parts[2][0]), parts[2][1]
    join = max if name == "max" else min
    return join(low for low, _ in parts), join(high for _, high in parts)


def _is(atom: Any, value: int) -> bool:
    return isinstance(atom, c.Literal) and np.ndim(atom.val) == 0 and int(atom.val) == value
