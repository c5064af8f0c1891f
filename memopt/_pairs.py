"""The matchmaker: a loop that stacks residuals, the later loops that read them, and the tools to build loops anew.

In: an inlined jaxpr. Out: `Pair`s (a forward `scan` and the `scan`s of the same length and the other direction that
read what it stacked), found in every region, and small constructors of loops and of the few operations between them.
It builds equations directly, never by tracing what the user wrote, and keeps their source information. It chooses
nothing and changes nothing by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _cost

Path = tuple[int, ...]  # equation, body, equation, body, ..., equation

_CLONED = frozenset({"scan", "while", "cond", "shard_map"})
_IMPURE = frozenset({"rng_uniform", "pure_callback", "io_callback", "debug_callback"})


class Loop:
    """A `scan` equation, its operands and results sorted by what they are."""

    def __init__(self, eqn: Any):
        self.eqn = eqn
        self.num_consts, self.num_carry = c.scan_layout(eqn)
        self.first_xs = self.num_consts + self.num_carry
        self.length: int = eqn.params["length"]
        self.reverse: bool = eqn.params["reverse"]
        self.body = c.open_jaxpr(eqn.params["jaxpr"])
        self.consts, self.init, self.xs = self.sorted(eqn.invars)
        self.finals, self.ys = list(eqn.outvars[: self.num_carry]), list(eqn.outvars[self.num_carry :])

    def sorted(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Cut a list with one item for each operand into those of constants, carries and slices."""
        operands = list(operands)
        return operands[: self.num_consts], operands[self.num_consts : self.first_xs], operands[self.first_xs :]

    @property
    def pure(self) -> bool:
        """Say whether its body may run twice: no effects but those of named axes, nothing that calls out."""
        named = all(type(e).__name__ == "NamedAxisEffect" for e in self.eqn.effects)
        return named and not c.jaxpr_consts(self.eqn.params["jaxpr"]) and not _impure(self.body)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A loop and the later ones that read its residuals.

    Attributes:
      index: the first loop's place among its region's equations.
      readers: places of the loops that read a residual as slices.
      residuals: positions among the first loop's `ys` of those stacks that only the readers read.
      residual_bytes: logical bytes of these stacks.
      length: trips of all these loops.
      carry_bytes: logical bytes of the first loop's carry, once for each trip.
    """

    index: int
    readers: tuple[int, ...]
    residuals: tuple[int, ...]
    residual_bytes: int
    length: int
    carry_bytes: int


def find(jaxpr: Any, index: int) -> Pair | None:
    """Return the pair that the equation at a place of an open jaxpr begins, if there is one.

    A residual is a stack that nothing reads but later loops of the same length and the other direction, as slices.
    """
    eqns = jaxpr.eqns
    if not 0 <= index < len(eqns) or eqns[index].primitive.name != "scan":
        return None
    loop = Loop(eqns[index])
    if not loop.pure:
        return None
    places = {v: i for i, v in enumerate(loop.ys) if not isinstance(v, c.DropVar)}
    for v in jaxpr.outvars:
        if not isinstance(v, c.Literal):
            places.pop(v, None)
    readers: dict[int, set[Any]] = {}
    for i in range(index + 1, len(eqns)):
        read = {v for v in eqns[i].invars if not isinstance(v, c.Literal) and v in places}
        for v in read - _sliced(eqns[i], loop) if read else ():
            del places[v]
        if read:
            readers[i] = read
    found = tuple(i for i, read in readers.items() if any(v in places for v in read))
    residuals = sorted(i for v, i in places.items() if any(v in read for read in readers.values()))
    size = sum(_cost.aval_bytes(loop.ys[i].aval) for i in residuals)
    carried = loop.length * sum(_cost.aval_bytes(v.aval) for v in loop.init)
    return Pair(index, found, tuple(residuals), size, loop.length, carried) if found else None


def find_all(jaxpr: Any, prefix: Path = ()) -> Iterator[tuple[Path, Pair]]:
    """Yield every pair of an open jaxpr and of the bodies of its loops, branches and `shard_map`s, with its path."""
    for i, eqn in enumerate(jaxpr.eqns):
        pair = find(jaxpr, i)
        if pair is not None:
            yield (*prefix, i), pair
        if eqn.primitive.name in _CLONED:
            for k, (_, _, body) in enumerate(c.subjaxprs(eqn.params)):
                yield from find_all(c.open_jaxpr(body), (*prefix, i, k))


def rewrite(closed: Any, path: int | Path, change: Callable[[Any, int], Any | None]) -> Any | None:
    """Return a closed jaxpr with one region changed and dead code dropped, or None where `change` refuses.

    Args:
      closed: closed jaxpr.
      path: place of an equation at the top level, or `(equation, body, ..., equation)` down to a region.
      change: function of an open jaxpr and a place in it, to an open jaxpr with the same inputs and outputs or None.
    """
    base = _rewritten(c.open_jaxpr(closed), (path,) if isinstance(path, int) else tuple(path), change)
    return None if base is None else c.close(c.dce(base)[0], c.jaxpr_consts(closed))


def _rewritten(jaxpr: Any, path: Path, change: Callable[[Any, int], Any | None]) -> Any | None:
    place = path[0]
    if len(path) == 1:
        return change(jaxpr, place)
    eqn = jaxpr.eqns[place]
    key, position, body = c.subjaxprs(eqn.params)[path[1]]
    inner = _rewritten(c.open_jaxpr(body), path[2:], change)
    if inner is None:
        return None
    new = _closed_like(body, inner)
    if position is not None:
        items = eqn.params[key]
        new = type(items)([*items[:position], new, *items[position + 1 :]])
    eqns = list(jaxpr.eqns)
    eqns[place] = c.replace_eqn(eqn, params=dict(eqn.params, **{key: new}))
    return c.rebuild(jaxpr, eqns=eqns)


def fresh(jaxpr: Any) -> Any:
    """Return a copy of an open jaxpr in which every variable, those of inner bodies included, is a new one."""
    env = {v: c.Var(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)}
    eqns = []
    for eqn in jaxpr.eqns:
        invars = [v if isinstance(v, c.Literal) else env[v] for v in eqn.invars]
        outvars = [v if isinstance(v, c.DropVar) else c.Var(v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outvars, strict=True))
        params = _fresh_bodies(eqn.params) if eqn.primitive.name in _CLONED else eqn.params
        eqns.append(c.replace_eqn(eqn, invars=invars, outvars=outvars, params=params))
    outs = [v if isinstance(v, c.Literal) else env[v] for v in jaxpr.outvars]
    ins, consts = [env[v] for v in jaxpr.invars], [env[v] for v in jaxpr.constvars]
    return c.rebuild(jaxpr, constvars=consts, invars=ins, outvars=outs, eqns=eqns)


def scan_eqn(
    like: Any,
    body: Any,
    operands: tuple[Sequence[Any], Sequence[Any], Sequence[Any]],
    outvars: Sequence[Any],
    length: int,
    unroll: int | None = None,
) -> Any:
    """Return a `scan` like another one over an open body, with `(constants, carries, slices)` as operands."""
    consts, init, xs = operands
    params = c.scan_params(like, c.close(body), len(consts), len(init))
    params.update(length=length, unroll=max(1, min(unroll or params["unroll"], length)))
    effects = frozenset(like.effects) | frozenset(body.effects)
    return c.new_eqn([*consts, *init, *xs], list(outvars), like.primitive, params, effects, like.source_info, like.ctx)


def op(primitive: Any, operands: Sequence[Any], aval: Any, like: Any, **params: Any) -> tuple[Any, Any]:
    """Return an equation without effects of one result, with the source information of another, and its variable."""
    out = c.Var(aval)
    return c.new_eqn(list(operands), [out], primitive, params, c.no_effects, like.source_info, like.ctx), out


def reshape(operand: Any, out: Any, like: Any) -> Any:
    """Return the equation that gives an array the shape of a variable: free, where leading axes alone change."""
    params = {"new_sizes": tuple(out.aval.shape), "dimensions": None, "sharding": None}
    return c.new_eqn([operand], [out], jax.lax.reshape_p, params, c.no_effects, like.source_info, like.ctx)


def literal(value: int) -> Any:
    """Return an int32 literal."""
    return c.Literal(np.int32(value), c.ShapedArray((), np.dtype("int32")))


def _sliced(eqn: Any, first: Loop) -> set[Any]:
    """Return the variables that a loop paired with another one takes as slices and in no other way."""
    if eqn.primitive.name != "scan" or eqn.params["length"] != first.length:
        return set()
    loop = Loop(eqn)
    if loop.reverse == first.reverse or not loop.pure:
        return set()
    other = {v for v in (*loop.consts, *loop.init) if not isinstance(v, c.Literal)}
    return {v for v in loop.xs if not isinstance(v, c.Literal)} - other


def _impure(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _IMPURE:
            return True
        if any(_impure(c.open_jaxpr(body)) for _, _, body in c.subjaxprs(eqn.params)):
            return True
    return False


def _closed_like(old: Any, inner: Any) -> Any:
    return c.close(inner, c.jaxpr_consts(old)) if isinstance(old, c.ClosedJaxpr) else inner


def _fresh_bodies(params: dict[str, Any]) -> dict[str, Any]:
    new = dict(params)
    for key, position, body in c.subjaxprs(params):
        copy = _closed_like(body, fresh(c.open_jaxpr(body)))
        if position is None:
            new[key] = copy
        else:
            items = list(new[key])
            items[position] = copy
            new[key] = type(params[key])(items)
    return new
