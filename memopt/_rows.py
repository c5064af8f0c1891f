"""The slicer: equations over stacks of layers, written anew for one layer.

In: an equation whose operands are stacks (their leading axis counts layers) or whole values that all layers share.
Out: the parameters of the same operation on one layer, or None where layers depend on each other. It looks at
primitives alone, knows nothing of optimizers or loops, and changes no jaxpr.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from memopt import _compat as c
from memopt import _fusion

#: Reductions over the layers that a loop can gather one layer at a time, with what joins two of their results.
GATHERED = {"reduce_sum": "add", "reduce_max": "max", "reduce_min": "min", "reduce_and": "and", "reduce_or": "or"}

_REDUCTIONS = frozenset({*GATHERED, "reduce_prod", "argmax", "argmin"})
_ONE_AXIS = {
    "cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis", "cumlogsumexp": "axis",
    "concatenate": "dimension", "sort": "dimension",
}  # fmt: skip
_BATCHED = frozenset("cholesky triangular_solve eigh householder_product geqrf qr lu svd top_k".split())
_MOVES = frozenset(
    "broadcast_in_dim concatenate iota pad reshape rev slice split transpose dynamic_slice expand_dims squeeze full "
    "empty tile bitcast_convert_type random_fold_in random_split random_seed".split()
)
#: Operations that compute each element of their result from the same element of their operands.
ELEMENTWISE = (_fusion.ELEMENTWISE - _MOVES) | {"stop_gradient"}


@dataclasses.dataclass(frozen=True)
class Row:
    """An operation on one layer.

    Attributes:
      params: its parameters.
      gather: None, or the name of the primitive that joins the results of two layers: then the operation on the stack
        has one result for all layers.
      inner: None, or what stands in the operation's place: an open jaxpr without constants, of the layer's number
        (int32) and the operands.
    """

    params: dict[str, Any]
    gather: str | None = None
    inner: Any | None = None


def row(eqn: Any, stacked: Sequence[bool], length: int) -> Row | None:
    """Return what an equation is for one layer; None where that is unknown or layers depend on each other.

    Args:
      eqn: the equation.
      stacked: for each operand, whether its leading axis counts layers; others are the same for all layers.
      length: the number of layers.
    """
    if eqn.effects or any(s and not _leads(v.aval, length) for v, s in zip(eqn.invars, stacked, strict=True)):
        return None
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return _elementwise(eqn, stacked)
    rule = _rule(name)
    found = None if rule is None else rule(eqn, stacked)
    whole = found is not None and found.gather is not None
    if found is None or whole or all(_leads(v.aval, length) for v in eqn.outvars):
        return found
    return None


def row_aval(aval: Any) -> Any:
    """Return the type of one layer of a stack."""
    return c.row_aval(aval)


def _leads(aval: Any, length: int) -> bool:
    shape = getattr(aval, "shape", ())
    return bool(shape) and shape[0] == length and not c.is_local(aval)


def _rule(name: str) -> Callable[[Any, Sequence[bool]], Row | None] | None:
    if name in _REDUCTIONS:
        return _reduction
    if name in _ONE_AXIS:
        return _one_axis
    if name in _BATCHED:
        return _batched
    return _RULES.get(name)


def _elementwise(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    """All operands are stacks, or scalars."""
    fits = all(s or not v.aval.shape for v, s in zip(eqn.invars, stacked, strict=True))
    return Row(eqn.params) if fits and any(stacked) else None


def _recast(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    """The same bits as numbers of another type, element by element where both types have as many."""
    same = eqn.invars[0].aval.dtype.itemsize == eqn.outvars[0].aval.dtype.itemsize
    return _elementwise(eqn, stacked) if same else None


def _reduction(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    axes = tuple(eqn.params["axes"])
    rest = dict(eqn.params, axes=tuple(a - 1 for a in axes if a))
    if 0 not in axes:
        return Row(rest)
    name = eqn.primitive.name
    return Row(rest, GATHERED[name]) if name in GATHERED else None


def _several(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    """A reduction of several operands together: those come first, then what each begins with."""
    axes, half = tuple(eqn.params["dimensions"]), len(stacked) // 2
    fits = all(stacked[:half]) and not any(stacked[half:]) and 0 not in axes
    return Row(dict(eqn.params, dimensions=tuple(a - 1 for a in axes))) if fits else None


def _one_axis(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    key = _ONE_AXIS[eqn.primitive.name]
    axis = eqn.params[key]
    return Row(dict(eqn.params, **{key: axis - 1})) if axis > 0 and all(stacked) else None


def _batched(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    least = 1 if eqn.primitive.name == "top_k" else 2
    fits = all(stacked) and all(len(v.aval.shape) > least for v in eqn.invars)
    axis = eqn.params.get("axis")
    return Row(eqn.params if axis is None else dict(eqn.params, axis=axis - 1)) if fits and axis != 0 else None


def _broadcast(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    dims, shape = tuple(eqn.params["broadcast_dimensions"]), tuple(eqn.params["shape"])
    if len(stacked) != 1:
        return None
    if stacked[0]:
        if dims[0] != 0:
            return None
        dims = dims[1:]
    elif 0 in dims:
        return None
    return Row(dict(eqn.params, shape=shape[1:], broadcast_dimensions=tuple(d - 1 for d in dims)))


def _reshape(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    sizes = tuple(eqn.params["new_sizes"])
    if not stacked[0] or not sizes or eqn.params["dimensions"] is not None:
        return None
    return Row(dict(eqn.params, new_sizes=sizes[1:])) if sizes[0] == eqn.invars[0].aval.shape[0] else None


def _squeeze(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    dims = tuple(eqn.params["dimensions"])
    return Row(dict(eqn.params, dimensions=tuple(d - 1 for d in dims))) if stacked[0] and 0 not in dims else None


def _transpose(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    order = tuple(eqn.params["permutation"])
    return Row(dict(eqn.params, permutation=tuple(a - 1 for a in order[1:]))) if stacked[0] and order[0] == 0 else None


def _reverse(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    dims = tuple(eqn.params["dimensions"])
    return Row(dict(eqn.params, dimensions=tuple(d - 1 for d in dims))) if 0 not in dims else None


def _slice(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    p = eqn.params
    starts, limits, strides = tuple(p["start_indices"]), tuple(p["limit_indices"]), p["strides"]
    whole = starts[0] == 0 and limits[0] == eqn.invars[0].aval.shape[0] and (strides is None or strides[0] == 1)
    strides = None if strides is None else tuple(strides)[1:]
    return Row(dict(p, start_indices=starts[1:], limit_indices=limits[1:], strides=strides)) if whole else None


def _pad(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    config = tuple(eqn.params["padding_config"])
    fits = stacked[0] and not stacked[1] and tuple(config[0]) == (0, 0, 0)
    return Row(dict(eqn.params, padding_config=config[1:])) if fits else None


def _dot(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    """A batch of matmuls, one a layer; or stacked rows times one matrix."""
    (left, right), (left_batch, right_batch) = (tuple(map(tuple, pair)) for pair in eqn.params["dimension_numbers"])
    if all(stacked):
        if not left_batch or left_batch[0] != 0 or right_batch[0] != 0:
            return None
        left_batch, right_batch = left_batch[1:], right_batch[1:]
        right, right_batch = _less(right), _less(right_batch)
    elif not stacked[0] or left_batch or 0 in left:
        return None
    numbers = ((_less(left), right), (_less(left_batch), right_batch))
    return Row(dict(eqn.params, dimension_numbers=numbers))


def _iota(eqn: Any, stacked: Sequence[bool]) -> Row | None:
    """Numbers along another axis are the same for all layers."""
    axis = eqn.params["dimension"]
    return Row(dict(eqn.params, shape=tuple(eqn.params["shape"])[1:], dimension=axis - 1)) if axis > 0 else None


def _less(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(a - 1 for a in axes)


_RULES = {
    "broadcast_in_dim": _broadcast, "reshape": _reshape, "squeeze": _squeeze, "transpose": _transpose,
    "rev": _reverse, "slice": _slice, "pad": _pad, "dot_general": _dot,
    "iota": _iota, "reduce": _several, "bitcast_convert_type": _recast,
}  # fmt: skip
