"""The ruler: which operations treat the rows of an axis alone, and what they are for some of the rows.

In: an equation and an axis of its result. Out: the axes of its operands along which only the same rows are read (an
operand that is read whole has none), and the parameters of the same operation on fewer rows; None where rows depend on
each other or it is not known. It looks at primitives alone and changes no jaxpr.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from memopt import _fusion, _rows

_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
_ALIKE = _rows.ELEMENTWISE | {"name"}
_RUNNING = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
MATMUL = "dot_general"


@dataclasses.dataclass(frozen=True)
class Cut:
    """An operation on some rows.

    Attributes:
      operands: per operand the axis whose rows are read, None for one that is read whole.
      params: its parameters.
    """

    operands: tuple[int | None, ...]
    params: dict[str, Any]


def cut(eqn: Any, axis: int, rows: int) -> Cut | None:
    """Return what an equation is for so many rows of an axis of its result; None where that is not known."""
    name = eqn.primitive.name
    rule = _elementwise if name in _ALIKE else _reduction if name in _REDUCTIONS else _RULES.get(name)
    if rule is None or eqn.effects or not eqn.outvars:
        return None
    shapes = {len(v.aval.shape) for v in eqn.outvars}
    return None if len(shapes) > 1 or axis >= shapes.pop() else rule(eqn, axis, rows)


def axis_of(eqn: Any, axes: Sequence[int | None]) -> int | None:
    """Return the axis of an equation's result along which rows stay alone, given those of its operands.

    Of a product of two operands that have such axes, the rows are those of the first one, and the other is read whole.
    """
    for axis in range(len(eqn.outvars[0].aval.shape)) if any(a is not None for a in axes) else ():
        found = cut(eqn, axis, 1)
        if found is None:
            continue
        pairs = [(have, read) for have, read in zip(axes, found.operands, strict=True) if have is not None]
        if any(have == read for have, read in pairs) and all(read in (None, have) for have, read in pairs):
            return axis
    return None


def is_cheap(eqn: Any) -> bool:
    """Say whether an operation is one of a few instructions for each element, so that it is run again for nothing."""
    name = eqn.primitive.name
    known = name in _ALIKE or name in _REDUCTIONS or name in _RULES
    return known and name not in _fusion.MATMULS and not eqn.effects


def _shape(eqn: Any) -> tuple[int, ...]:
    return tuple(eqn.outvars[0].aval.shape)


def _put(values: Sequence[int], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _elementwise(eqn: Any, axis: int, rows: int) -> Cut | None:
    shape = _shape(eqn)
    if any(v.aval.shape and not _spreads(v.aval.shape, shape) for v in eqn.invars):
        return None
    return Cut(
        tuple(axis if v.aval.shape and v.aval.shape[axis] == shape[axis] else None for v in eqn.invars), eqn.params
    )


def _spreads(operand: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Say whether an operand has the shape of the result, or one row where that has several."""
    return len(operand) == len(shape) and all(a in (1, b) for a, b in zip(operand, shape, strict=True))


def _reduction(eqn: Any, axis: int, rows: int) -> Cut | None:
    left = [i for i in range(len(eqn.invars[0].aval.shape)) if i not in eqn.params["axes"]]
    return Cut((left[axis],), eqn.params) if len(eqn.invars) == 1 else None


def _broadcast(eqn: Any, axis: int, rows: int) -> Cut | None:
    dims, operand = tuple(eqn.params["broadcast_dimensions"]), eqn.invars[0].aval.shape
    own = dims.index(axis) if axis in dims else None
    own = None if own is None or operand[own] != _shape(eqn)[axis] else own
    if len(eqn.invars) > 1:
        return None
    return Cut((own,), dict(eqn.params, shape=_put(eqn.params["shape"], axis, rows)))


def _reshape(eqn: Any, axis: int, rows: int) -> Cut | None:
    before, after = eqn.invars[0].aval.shape, _shape(eqn)
    if eqn.params["dimensions"] is not None or len(eqn.invars) > 1:
        return None
    ahead = math.prod(after[:axis])
    for own, size in enumerate(before):
        if size == after[axis] and math.prod(before[:own]) == ahead:
            return Cut((own,), dict(eqn.params, new_sizes=_put(eqn.params["new_sizes"], axis, rows)))
    return None


def _squeeze(eqn: Any, axis: int, rows: int) -> Cut | None:
    dims = {d % len(eqn.invars[0].aval.shape) for d in eqn.params["dimensions"]}
    left = [i for i in range(len(eqn.invars[0].aval.shape)) if i not in dims]
    return Cut((left[axis],), eqn.params)


def _transpose(eqn: Any, axis: int, rows: int) -> Cut | None:
    return Cut((eqn.params["permutation"][axis],), eqn.params)


def _matmul(eqn: Any, axis: int, rows: int) -> Cut | None:
    (left, right), (left_batch, right_batch) = (tuple(map(tuple, p)) for p in eqn.params["dimension_numbers"])
    if axis < len(left_batch):
        return Cut((left_batch[axis], right_batch[axis]), eqn.params)
    free = [i for i in range(len(eqn.invars[0].aval.shape)) if i not in (*left, *left_batch)]
    place = axis - len(left_batch)
    if place < len(free):
        return Cut((free[place], None), eqn.params)
    other = [i for i in range(len(eqn.invars[1].aval.shape)) if i not in (*right, *right_batch)]
    return Cut((None, other[place - len(free)]), eqn.params)


def _slice(eqn: Any, axis: int, rows: int) -> Cut | None:
    p, size = eqn.params, eqn.invars[0].aval.shape[axis]
    if (p["start_indices"][axis], p["limit_indices"][axis]) != (0, size):
        return None
    if p["strides"] is not None and p["strides"][axis] != 1:
        return None
    return Cut((axis,), dict(p, limit_indices=_put(p["limit_indices"], axis, rows)))


def _concatenate(eqn: Any, axis: int, rows: int) -> Cut | None:
    return None if eqn.params["dimension"] == axis else Cut((axis,) * len(eqn.invars), eqn.params)


def _split(eqn: Any, axis: int, rows: int) -> Cut | None:
    return None if eqn.params["axis"] == axis else Cut((axis,), eqn.params)


def _pad(eqn: Any, axis: int, rows: int) -> Cut | None:
    return Cut((axis, None), eqn.params) if tuple(eqn.params["padding_config"][axis]) == (0, 0, 0) else None


def _iota(eqn: Any, axis: int, rows: int) -> Cut | None:
    if eqn.params["dimension"] == axis or eqn.invars:
        return None
    return Cut((), dict(eqn.params, shape=_put(eqn.params["shape"], axis, rows)))


def _reverse(eqn: Any, axis: int, rows: int) -> Cut | None:
    return None if axis in eqn.params["dimensions"] else Cut((axis,), eqn.params)


def _running(eqn: Any, axis: int, rows: int) -> Cut | None:
    return None if eqn.params["axis"] == axis else Cut((axis,), eqn.params)


_RULES: dict[str, Callable[[Any, int, int], Cut | None]] = {
    "broadcast_in_dim": _broadcast, "reshape": _reshape, "squeeze": _squeeze, "transpose": _transpose,
    MATMUL: _matmul, "slice": _slice, "concatenate": _concatenate, "split": _split, "pad": _pad, "iota": _iota,
    "rev": _reverse, **dict.fromkeys(_RUNNING, _running),
}  # fmt: skip
