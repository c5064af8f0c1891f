"""A low-rank AdamW whose basis is picked from the discrete cosine transform: only the numbers of its columns are kept.

In come a rank and a period, out come optax transformations. There is no decomposition: the columns that a gradient is
aligned with most are found by one fast transform and a sort.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy import fft

from memopt.optim import _projection as projection
from memopt.optim._galore import make_settings
from memopt.optim._leaves import (
    Where,
    adam_direction,
    adam_init,
    adam_leaf,
    decay,
    finish,
    per_leaf,
    wide,
    zeros_beside,
)
from memopt.optim._rounding import stochastic_rounding as round_stochastically


class DctLeaf(NamedTuple):
    """State of one batch of matrices.

    Attributes:
      mu, nu: Adam's moments of the projected gradient, `[..., m, rank]`, the shorter axis projected.
      columns: int32 `[..., rank]`, the chosen columns of the cosine basis, rising.
    """

    mu: jax.Array
    nu: jax.Array
    columns: jax.Array


def cosine_columns(columns: jax.Array, length: int, dtype: Any) -> jax.Array:
    """Return columns of the orthonormal cosine basis (the inverse of the DCT of type II).

    Args:
      columns: int32 `[..., rank]`, numbers from 0.
      length: rows of the basis.
      dtype: of the result.

    Returns:
      `[..., length, rank]`.
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, (*columns.shape[:-1], length, columns.shape[-1]), columns.ndim - 1)
    places = (2 * rows + 1) * columns[..., None, :]
    turns = (places % (4 * length)).astype(dtype) / (2 * length)
    factor = jnp.where(columns == 0, length**-0.5, (2 / length) ** 0.5).astype(dtype)
    return jnp.cos(jnp.pi * turns) * factor[..., None, :]


def best_columns(tall: jax.Array, rank: int) -> jax.Array:
    """Return the columns of the cosine basis that gradients `[..., m, n]` are aligned with most, rising."""
    aligned = jnp.sum(jnp.square(fft.dct(tall, norm="ortho", axis=-1)), axis=-2)
    return jnp.sort(jax.lax.top_k(aligned, rank)[1].astype(jnp.int32), axis=-1)


def carry_over(moment: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Move the columns of a moment to their new places: those that stay keep their values, new ones start at zero.

    Since the basis is orthonormal, this is the rotation of the moment from the old subspace into the new one.

    Args:
      moment: `[..., m, rank]`.
      old, new: int32 `[..., rank]`, rising.
    """
    stays = (old[..., :, None] == new[..., None, :]).astype(moment.dtype)
    return jnp.einsum("...mo,...on->...mn", moment, stays, precision=jax.lax.Precision.HIGHEST)


def scale_by_dct_low_rank(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    rank: int = 128,
    scale: Any = 1.0,
    refresh_every: int = 200,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run Adam on the gradient's strongest cosine components.

    Memory: for a matrix `[m, n]`, `n <= m`, `2 r m` elements and `r` column numbers, in place of `2 m n`; no basis is
    stored. Leaves with more axes are batches of matrices. Cost: two products of `m n r` and `n r` cosines an update,
    one fast transform of the gradient a refresh.

    Args:
      b1, b2, eps: of Adam.
      rank: number of columns. Matrices with an axis of this length or shorter get plain Adam.
      scale: factor of the matrices' updates.
      refresh_every: updates between two choices of columns; leaves take turns. The first update chooses for all.
      where: as in `scale_by_galore`.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` the integers belong into `static_args`.

    Raises:
      TypeError: an integer setting is traced.
      ValueError: the rank or the period is below one.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_dct_low_rank
      >>> state = scale_by_dct_low_rank(rank=4).init({"kernel": jnp.zeros((8, 16))})
      >>> state.leaves["['kernel']"].columns.shape, state.leaves["['kernel']"].mu.shape
      ((4,), (16, 4))

    Source: Modoranu et al. 2025, "SVD-free low-rank adaptive gradient optimization for large language models",
    algorithm of DCT-AdamW, without its error feedback, which would keep a full-sized buffer.

    Limits: the shorter axis is always projected; moments of a leaf whose first axis is shorter are stored transposed.
    Columns are chosen one matrix after the other; in a batch that is sharded along the batch that gathers the matrix.
    """
    settings = make_settings(rank, "auto", refresh_every, 0, 0, where)

    def init_leaf(leaf, value):
        if not settings.projected(leaf, value):
            return adam_init(leaf, value)
        low = (*leaf.shape[:-2], max(leaf.shape[-2:]), settings.rank)
        columns = jnp.broadcast_to(jnp.arange(settings.rank, dtype=jnp.int32), (*leaf.shape[:-2], settings.rank))
        return DctLeaf(*[zeros_beside(value, low, leaf.dtype) for _ in range(2)], columns)

    def update_leaf(leaf, gradient, state, count):
        if not isinstance(state, DctLeaf):
            return adam_leaf(gradient, state, count, b1, b2, eps)
        turned = leaf.shape[-2] < leaf.shape[-1]
        tall = gradient.astype(wide(leaf.dtype))
        tall = jnp.swapaxes(tall, -1, -2) if turned else tall
        due = (count == 1) | ((count - 1 - leaf.index) % settings.refresh_every == 0)
        state = _refreshed(tall, state, jnp.where(due, np.int32(leaf.count), np.int32(0)))
        basis = cosine_columns(state.columns, tall.shape[-1], tall.dtype)
        low = projection.project(tall, basis, "right")
        mu, nu = decay(state.mu.astype(low.dtype), low, b1), decay(state.nu.astype(low.dtype), jnp.square(low), b2)
        direction = adam_direction(mu, nu, count, b1, b2, eps)
        update = scale * projection.project_back(direction, basis, tall.shape, "right")
        update = jnp.swapaxes(update, -1, -2) if turned else update
        return update, DctLeaf(mu.astype(state.mu.dtype), nu.astype(state.nu.dtype), state.columns)

    return per_leaf(init_leaf, update_leaf)


def _refreshed(tall: jax.Array, state: DctLeaf, due: jax.Array) -> DctLeaf:
    """Choose the columns of the first `due` matrices of a leaf anew, one after the other: of none, or of all."""
    talls, *carry = [projection.as_batch(value) for value in (tall, *state[:2])]
    columns = state.columns.reshape(-1, state.columns.shape[-1])

    def one(index, carry):
        row = [jax.lax.dynamic_index_in_dim(value, index, keepdims=False) for value in (talls, *carry)]
        new = best_columns(row[0], columns.shape[-1])
        moved = [carry_over(moment, row[-1], new) for moment in row[1:3]]
        pairs = zip(carry, (*moved, new), strict=True)
        return tuple(jax.lax.dynamic_update_index_in_dim(value, part, index, 0) for value, part in pairs)

    made = jax.lax.fori_loop(np.int32(0), due, one, (*carry, columns))
    return DctLeaf(*[value.reshape(old.shape) for value, old in zip(made, state, strict=True)])


def dct_low_rank(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    rank: int = 128,
    scale: Any = 1.0,
    refresh_every: int = 200,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make low-rank AdamW on a cosine basis: `scale_by_dct_low_rank`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_dct_low_rank`.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps, rank, scale, refresh_every, where: as in `scale_by_dct_low_rank`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.
      seed: seeds the rounding.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as `scale_by_dct_low_rank`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import dct_low_rank
      >>> optimizer = dct_low_rank(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 32))}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (16, 32)

    Source: Modoranu et al. 2025, "SVD-free low-rank adaptive gradient optimization for large language models".
    """
    core = scale_by_dct_low_rank(b1, b2, eps, rank=rank, scale=scale, refresh_every=refresh_every, where=where)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
