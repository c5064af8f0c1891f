"""The partition wall: a pair of loops divided into two consecutive pairs, so that each may have a plan of its own.

In: an inlined closed jaxpr and the place of a forward loop whose residuals later loops read. Out: an equivalent closed
jaxpr with two shorter loops for each of them. No stack is sliced: each loop takes whole stacks as constants and indexes
them, residuals are stacked by each forward loop and read by its own reading loop, and stacks that others read are
written by both loops into one carried buffer. Exact: the same equations in the same order. It plans nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _pairs
from memopt._pairs import Loop, Pair

_INDEX = np.dtype("int32")


def divide(closed: Any, index: int | tuple[int, ...], at: int) -> Any | None:
    """Divide a pair of loops into iterations `[0, at)` and `[at, length)`.

    The planner then sees two pairs, whose prices it may settle apart. Memory: none by the jaxpr, but XLA:TPU's compiled
    temporaries were seen to grow by the size of the first part's residuals, with no copy of them in its program; so a
    divided step must be measured, not predicted alone. Cost: none.

    Args:
      closed: inlined closed jaxpr.
      index: place of the forward loop among the equations, or its path into bodies.
      at: first iteration of the second part, by position in the stacks, whatever the direction.

    Returns:
      The rewritten closed jaxpr with the same inputs and outputs; None where there is no pair at this place, its bodies
      have effects, a part would be empty, or the types of its values say that they differ between the devices of a
      `shard_map` (the indices and the buffers' zeros would not).
    """

    def change(jaxpr: Any, place: int) -> Any | None:
        pair = _pairs.find(jaxpr, place)
        divided = None if pair is None else region(jaxpr, pair, at)
        return None if divided is None else divided[0]

    return _pairs.rewrite(closed, index, change)


def region(jaxpr: Any, pair: Pair, at: int) -> tuple[Any, int] | None:
    """Return an open jaxpr with one pair divided, and the place of the forward loop over `[0, at)`."""
    loops = [Loop(jaxpr.eqns[i]) for i in (pair.index, *pair.readers)]
    if not 0 < at < pair.length or any(_varies(loop) for loop in loops):
        return None
    parts = [_Part(0, at), _Part(at, pair.length)]
    residuals = {loops[0].ys[i] for i in pair.residuals}
    eqns: list[Any] = []
    for i, eqn in enumerate(jaxpr.eqns):
        if i == pair.index or i in pair.readers:
            _divided(Loop(eqn), residuals, parts, eqns)
        else:
            eqns.append(eqn)
    place = next(i for i, eqn in enumerate(eqns) if eqn is parts[0].first)
    return c.rebuild(jaxpr, eqns=eqns), place


class _Part:
    """The iterations `[start, stop)` of all loops of a pair."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop
        self.length = stop - start
        self.numbers: Any = None  # the scanned indices, made once, so that a pair shares them
        self.stacks: dict[Any, Any] = {}  # residual stack of the whole loop -> that of this part
        self.first: Any = None  # the forward loop's equation

    def indices(self, like: Any, eqns: list[Any]) -> Any:
        """Return the scanned indices from 0 on; what a part starts from is added inside the bodies."""
        if self.numbers is None:
            params = {"dtype": _INDEX, "shape": (self.length,), "dimension": 0, "sharding": None}
            eqn, self.numbers = _pairs.op(jax.lax.iota_p, [], c.ShapedArray((self.length,), _INDEX), like, **params)
            eqns.append(eqn)
        return self.numbers


def _varies(loop: Loop) -> bool:
    """Say whether a loop handles values that differ between devices of a `shard_map`, by their types."""
    return any(_varying(v.aval) for v in (*loop.body.invars, *loop.body.outvars))


def _varying(aval: Any) -> bool:
    kinds = (getattr(aval, "manual_axis_type", None), aval)  # JAX from 0.10 on, and before
    return any(getattr(kind, "varying", None) or getattr(kind, "vma", None) for kind in kinds)


def _divided(loop: Loop, residuals: set[Any], parts: list[_Part], eqns: list[Any]) -> None:
    """Emit a loop in two parts, in the order in which it runs; carries and buffers flow from one to the next."""
    buffers = [i for i, y in enumerate(loop.ys) if y not in residuals and not isinstance(y, c.DropVar)]
    carry = list(loop.init)
    for i in buffers:
        carry.append(_zeros(loop.ys[i].aval, loop.eqn, eqns))
    order = parts[::-1] if loop.reverse else parts
    for part in order:
        last = part is order[-1]
        finals = loop.finals if last else [c.Var(v.aval) for v in loop.body.invars[loop.num_consts : loop.first_xs]]
        written = [loop.ys[i] if last else c.Var(loop.ys[i].aval) for i in buffers]
        build = _Body(loop, part, residuals, buffers)
        stacks = [c.Var(c.stacked_aval(v.aval, part.length)) for v in build.stacked]
        part.stacks.update(zip(build.stacked_of, stacks, strict=True))
        xs = [part.indices(loop.eqn, eqns), *(part.stacks[v] for v in build.own)]
        operands = ([*build.consts, *build.whole], carry, xs)
        eqn = _pairs.scan_eqn(loop.eqn, build.jaxpr(), operands, [*finals, *written, *stacks], part.length)
        part.first = part.first or eqn
        eqns.append(eqn)
        carry = [*finals, *written]


class _Body:
    """The body of one part: `(constants, whole stacks; carries, buffers; index, own residuals)`."""

    def __init__(self, loop: Loop, part: _Part, residuals: set[Any], buffers: list[int]):
        self.loop, self.start, self.buffers = loop, part.start, buffers
        self.old = _pairs.fresh(loop.body)
        self.consts = loop.consts
        self.own = list(dict.fromkeys(v for v in loop.xs if v in part.stacks))
        self.whole = list(dict.fromkeys(v for v in loop.xs if v not in part.stacks))
        ys = self.old.outvars[loop.num_carry :]
        made = {y: v for y, v in zip(loop.ys, ys, strict=True) if y in residuals}
        self.stacked_of, self.stacked = list(made), list(made.values())

    def jaxpr(self) -> Any:
        """Return the body as an open jaxpr."""
        loop, old = self.loop, self.old
        consts, carry, xs = loop.sorted(old.invars)
        ys = old.outvars[loop.num_carry :]
        number = c.Var(c.ShapedArray((), _INDEX))
        eqns: list[Any] = []
        index = self._index(number, eqns)
        own = {v: c.Var(x.aval) for v, x in zip(loop.xs, xs, strict=True) if v in self.own}
        whole = {v: c.Var(v.aval) for v in self.whole}
        env = {
            x: own[v] if v in own else _element(whole[v], index, x.aval, loop.eqn, eqns)
            for v, x in zip(loop.xs, xs, strict=True)
        }
        eqns += [c.replace_eqn(e, invars=[_read(env, v) for v in e.invars]) for e in old.eqns]
        buffers = [c.Var(loop.ys[i].aval) for i in self.buffers]
        written = [
            _put(b, _read(env, ys[i]), index, loop.eqn, eqns) for b, i in zip(buffers, self.buffers, strict=True)
        ]
        outs = [_read(env, v) for v in old.outvars[: loop.num_carry]]
        outs += written + [_read(env, v) for v in self.stacked]
        invars = [*consts, *(whole[v] for v in self.whole), *carry, *buffers, number, *(own[v] for v in self.own)]
        return c.rebuild(old, invars=invars, outvars=outs, eqns=eqns)

    def _index(self, number: Any, eqns: list[Any]) -> Any:
        if not self.start:
            return number
        eqn, index = _pairs.op(jax.lax.add_p, [number, _pairs.literal(self.start)], number.aval, self.loop.eqn)
        eqns.append(eqn)
        return index


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return atom if isinstance(atom, c.Literal) else env.get(atom, atom)


def _starts(index: Any, rank: int) -> list[Any]:
    return [index, *(_pairs.literal(0) for _ in range(rank))]


def _element(stack: Any, index: Any, aval: Any, like: Any, eqns: list[Any]) -> Any:
    """Emit the reading of one element of a stack."""
    shape = tuple(aval.shape)
    one, part = _pairs.op(
        jax.lax.dynamic_slice_p,
        [stack, *_starts(index, len(shape))],
        c.stacked_aval(aval, 1),
        like,
        slice_sizes=(1, *shape),
    )
    flat, out = _pairs.op(jax.lax.squeeze_p, [part], aval, like, dimensions=(0,))
    eqns += [one, flat]
    return out


def _put(buffer: Any, value: Any, index: Any, like: Any, eqns: list[Any]) -> Any:
    """Emit the writing of one element into a buffer."""
    row = c.Var(c.stacked_aval(value.aval, 1))
    starts = _starts(index, len(value.aval.shape))
    write, out = _pairs.op(jax.lax.dynamic_update_slice_p, [buffer, row, *starts], buffer.aval, like)
    eqns += [_pairs.reshape(value, row, like), write]
    return out


def _zeros(aval: Any, like: Any, eqns: list[Any]) -> Any:
    """Emit an array of zeros (of keys whose data are zeros, for typed keys)."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        made = _pairs.fresh(c.open_jaxpr(jax.make_jaxpr(lambda: jax.lax.full(aval.shape, 0, aval.dtype))()))
        eqns.extend(e.replace(source_info=like.source_info) for e in made.eqns)
        return made.outvars[0]
    zero = c.Literal(np.zeros((), aval.dtype), c.ShapedArray((), aval.dtype))
    params = {"shape": tuple(aval.shape), "broadcast_dimensions": (), "sharding": None}
    eqn, out = _pairs.op(jax.lax.broadcast_in_dim_p, [zero], aval, like, **params)
    eqns.append(eqn)
    return out
