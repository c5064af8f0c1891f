"""The comparison desk: a scatter of one element a row into zeros becomes a comparison with an iota.

In: an inlined closed jaxpr. Out: an equal one, in which a `scatter-add` into zeros that writes at most one place of
each row is `where(iota == index, update, 0)`. That is what the gradient of `take_along_axis` is, so it stands in every
cross-entropy that gathers its labels' logits. XLA fuses no scatter: it holds its result, and what is added to it, whole
in float32; a comparison fuses into the gradient that is made anyway. No sum has more than one term, so no value
changes. Everything else stays as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memopt import _compat as c
from memopt._forms import emit

_SCATTERS = frozenset({"scatter", "scatter-add"})


def onehot(closed: Any) -> Any:
    """Return an equal closed jaxpr whose scatters of one element a row are comparisons, in nested bodies too."""
    base = c.open_jaxpr(closed)
    zeros: set[Any] = set()
    eqns: list[Any] = []
    changed = False
    for eqn in base.eqns:
        inside = c.map_bodies(eqn, onehot)
        eqn, changed = inside, changed or inside is not eqn
        if _makes_zeros(eqn):
            zeros.add(eqn.outvars[0])
        if eqn.primitive.name in _SCATTERS and eqn.invars[0] in zeros and _is_one_a_row(eqn):
            eqns += _comparison(eqn)
            changed = True
        else:
            eqns.append(eqn)
    if not changed:
        return closed
    jaxpr = c.rebuild(base, eqns=eqns)
    return c.close(jaxpr, c.jaxpr_consts(closed)) if isinstance(closed, c.ClosedJaxpr) else jaxpr


def _makes_zeros(eqn: Any) -> bool:
    if eqn.primitive.name != "broadcast_in_dim" or not isinstance(eqn.invars[0], c.Literal):
        return False
    value = np.asarray(eqn.invars[0].val)
    return value.ndim == 0 and value == 0 and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)


def _is_one_a_row(eqn: Any) -> bool:
    """Whether a scatter's windows are single places along one dimension, at most one of them in each row."""
    operand, indices, updates = (v.aval for v in eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    if any(c.is_local(aval) for aval in (operand, indices, updates)):
        return False  # an iota is no part of what varies over a mesh
    if not jnp.issubdtype(indices.dtype, jnp.signedinteger) or indices.dtype.itemsize < 4:
        return False  # the iota has the indices' dtype, and has to count to the end of the dimension
    if eqn.params["mode"] == lax.GatherScatterMode.ONE_HOT or len(numbers.scatter_dims_to_operand_dims) != 1:
        return False
    (along,) = numbers.scatter_dims_to_operand_dims
    if tuple(numbers.inserted_window_dims) not in ((), (along,)) or indices.shape[-1] != 1:
        return False
    rows = tuple(numbers.scatter_indices_batching_dims)
    if any(size != 1 for d, size in enumerate(indices.shape[:-1]) if d not in rows):
        return False
    sizes = [updates.shape[d] for d in numbers.update_window_dims]
    whole = [1 if d == along else operand.shape[d] for d in _windows(numbers, operand.ndim)]
    return sizes == whole and operand.size > updates.size > 0


def _windows(numbers: Any, ndim: int) -> list[int]:
    """Return the operand's dimensions that the updates' window dimensions stand for, in order."""
    left_out = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    return [d for d in range(ndim) if d not in left_out]


def _comparison(eqn: Any) -> list[Any]:
    """Return the equations that make the same array by a comparison."""
    operand, indices, updates = (v.aval for v in eqn.invars)
    clipped = eqn.params["mode"] == lax.GatherScatterMode.CLIP
    make = functools.partial(_placed, eqn.params["dimension_numbers"], operand.shape, clipped)
    traced = jax.make_jaxpr(make)(
        jax.ShapeDtypeStruct(indices.shape, indices.dtype), jax.ShapeDtypeStruct(updates.shape, updates.dtype)
    )
    eqns, (result,) = emit(c.open_jaxpr(traced), eqn.invars[1:], None)
    eqns[-1] = c.replace_eqn(eqns[-1], outvars=eqn.outvars)
    assert result not in [v for e in eqns[:-1] for v in e.outvars]
    return [c.with_source(e, eqn.source_info) for e in eqns]


def _placed(numbers: Any, shape: tuple[int, ...], clipped: bool, indices: jax.Array, updates: jax.Array) -> jax.Array:
    """Return zeros of `shape` with each row's update at its index.

    What is out of bounds stands at the edge if `clipped`, else nowhere.
    """
    (along,) = numbers.scatter_dims_to_operand_dims
    if clipped:
        indices = jnp.clip(indices, 0, shape[along] - 1)
    rows = tuple(numbers.scatter_indices_batching_dims)
    index = _spread(indices, dict(zip(rows, numbers.operand_batching_dims, strict=True)), shape)
    # The dimensions of the updates: windows stand for the operand's, the others for those of the indices in order.
    windows = tuple(numbers.update_window_dims)
    scattered = [d for d in range(updates.ndim) if d not in windows]
    place = dict(zip(windows, _windows(numbers, len(shape)), strict=True))
    place |= {scattered[r]: b for r, b in zip(rows, numbers.operand_batching_dims, strict=True)}
    update = _spread(updates, {d: at for d, at in place.items() if at != along}, shape)
    here = lax.broadcasted_iota(indices.dtype, shape, along) == index
    return lax.select(here, update, lax.full_like(update, 0))


def _spread(x: jax.Array, place: dict[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Broadcast `x` to `shape`, its dimension `d` at `place[d]`; the others are of size one."""
    kept = sorted(place)
    order = sorted(kept, key=place.__getitem__)
    x = lax.transpose(lax.squeeze(x, [d for d in range(x.ndim) if d not in place]), [kept.index(d) for d in order])
    return lax.broadcast_in_dim(x, shape, tuple(int(place[d]) for d in order))
