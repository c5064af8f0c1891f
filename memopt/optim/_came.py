"""CAME: a factored second moment, and a factored measure of how far to trust each update.

In come the usual settings, out come optax transformations. Matrices keep a momentum and four vectors; leaves that are
no matrices keep a momentum and a plain second moment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt.optim._leaves import Moments, Where, decay, finish, is_matrix, per_leaf, wide, zeros_beside
from memopt.optim._rounding import stochastic_rounding as round_stochastically


class Factors(NamedTuple):
    """Row and column means of a batch of matrices of squares, float32 `[..., m]` and `[..., n]`."""

    row: jax.Array
    column: jax.Array


class CameLeaf(NamedTuple):
    """State of one batch of matrices: its momentum, the factors of its second moment, and those of its instability."""

    mu: jax.Array
    nu: Factors
    instability: Factors


def _factors(leaf: Any, value: Any) -> Factors:
    shapes = leaf.shape[:-1], (*leaf.shape[:-2], leaf.shape[-1])
    return Factors(*[zeros_beside(value, shape, wide(leaf.dtype)) for shape in shapes])


def _averaged(factors: Factors, squares: jax.Array, rate: Any) -> Factors:
    return Factors(*[decay(old, jnp.mean(squares, axis), rate) for old, axis in zip(factors, (-1, -2), strict=True)])


def inverse_root(factors: Factors) -> jax.Array:
    """Return one over the root of the matrix of row and column means (Shazeer and Stern 2018, algorithm 4)."""
    row = factors.row / jnp.mean(factors.row, axis=-1, keepdims=True)
    return jax.lax.rsqrt(row)[..., :, None] * jax.lax.rsqrt(factors.column)[..., None, :]


def _clipped(update: jax.Array, threshold: Any, axes: tuple[int, ...]) -> jax.Array:
    rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
    return update / jnp.maximum(1, rms / threshold)


def scale_by_came(
    b1: Any = 0.9,
    b2: Any = 0.999,
    b3: Any = 0.9999,
    eps1: Any = 1e-30,
    eps2: Any = 1e-16,
    clip_threshold: Any = 1.0,
    *,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by a factored second moment, and their momentum by a factored confidence.

    Memory: for a matrix `[m, n]` one moment of `m n` elements and `2 (m + n)` numbers, in place of `2 m n`. Leaves
    with more axes are batches of matrices. Cost: about that of Adam, and eight reductions.

    Args:
      b1: decay of the momentum of updates.
      b2: decay of the second moment.
      b3: decay of the instability.
      eps1, eps2: added to the squares of gradients, and of differences between updates and their momentum.
      clip_threshold: largest root mean square of a matrix's update before its momentum.
      where: as in `scale_by_galore`.

    Returns:
      An optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_came
      >>> scale_by_came().init({"kernel": jnp.zeros((8, 16))}).leaves["['kernel']"].nu.row.shape
      (8,)

    Source: Luo et al. 2023, "CAME: Confidence-guided adaptive memory efficient optimization", algorithm 2.

    Limits: no bias correction, as published. The momentum starts at zero, so early updates are small.
    """

    def init_leaf(leaf, value):
        mu = zeros_beside(value, leaf.shape, leaf.dtype)
        if not is_matrix(leaf, value, where):
            return Moments(mu, zeros_beside(value, leaf.shape, wide(leaf.dtype)))
        return CameLeaf(mu, _factors(leaf, value), _factors(leaf, value))

    def update_leaf(leaf, gradient, state, count):
        del count
        gradient = gradient.astype(wide(leaf.dtype))
        squares = jnp.square(gradient) + eps1
        if isinstance(state, Moments):
            nu = decay(state.nu, squares, b2)
            update = _clipped(gradient * jax.lax.rsqrt(nu), clip_threshold, tuple(range(gradient.ndim)))
            mu = decay(state.mu.astype(update.dtype), update, b1)
            return mu, Moments(mu.astype(state.mu.dtype), nu)
        nu = _averaged(state.nu, squares, b2)
        update = _clipped(gradient * inverse_root(nu), clip_threshold, (-2, -1))
        mu = decay(state.mu.astype(update.dtype), update, b1)
        instability = _averaged(state.instability, jnp.square(update - mu) + eps2, b3)
        return mu * inverse_root(instability), CameLeaf(mu.astype(state.mu.dtype), nu, instability)

    return per_leaf(init_leaf, update_leaf)


def came(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    b3: Any = 0.9999,
    eps1: Any = 1e-30,
    eps2: Any = 1e-16,
    clip_threshold: Any = 1.0,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make CAME with a learning rate: `scale_by_came`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_came`.

    Args:
      learning_rate: a number or an optax schedule; the authors advise one to three times less than AdamW's.
      b1, b2, b3, eps1, eps2, clip_threshold, where: as in `scale_by_came`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.
      seed: seeds the rounding.

    Returns:
      An optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import came
      >>> optimizer = came(1e-2)
      >>> params = {"kernel": jnp.ones((16, 32))}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (16, 32)

    Source: Luo et al. 2023, "CAME: Confidence-guided adaptive memory efficient optimization".
    """
    core = scale_by_came(b1, b2, b3, eps1, eps2, clip_threshold, where=where)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
