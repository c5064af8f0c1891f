"""APOLLO and APOLLO-Mini: a full-rank gradient, rescaled by what Adam does to a random projection of it.

In come a rank and a granularity, out come optax transformations. The projection is made again from its seed at each
update and stored nowhere; leaves that are no matrices get plain Adam.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt.optim import _projection as projection
from memopt.optim._galore import make_settings
from memopt.optim._leaves import (
    Leaf,
    Where,
    adam_direction,
    adam_init,
    adam_leaf,
    decay,
    finish,
    leaf_key,
    per_leaf,
    wide,
    zeros_beside,
)
from memopt.optim._rounding import stochastic_rounding as round_stochastically

Granularity = Literal["channel", "tensor"]


class ApolloLeaf(NamedTuple):
    """State of one batch of matrices.

    Attributes:
      mu, nu: Adam's moments of the projected gradient, `[..., rank, n]` or `[..., m, rank]`.
      norm: float32 `[...]`, the norm of each matrix's last update; 0 before the first.
    """

    mu: jax.Array
    nu: jax.Array
    norm: jax.Array


def random_projection(leaf: Leaf, rank: int, seed: int, period: jax.Array) -> jax.Array:
    """Make the projection `[shorter axis, rank]` of one leaf, normal with variance `1 / rank`; its batch shares it."""
    length = projection.basis_shape(leaf.shape, rank, "auto")[-2]
    return jax.random.normal(leaf_key(seed, leaf, period), (length, rank), wide(leaf.dtype)) * rank**-0.5


def channel_scale(direction: jax.Array, low: jax.Array, granularity: Granularity, side: str) -> jax.Array:
    """Return how much longer or shorter Adam's direction is than the projected gradient, a channel or a matrix.

    Source: Zhu et al. 2024, equations 5 and 6: the norms' ratio over the projected axis, or over the whole matrix.
    """
    axes = (-2, -1) if granularity == "tensor" else (-2 if side == "left" else -1)
    norms = [jnp.sqrt(jnp.sum(jnp.square(value), axis=axes, keepdims=True)) for value in (direction, low)]
    return norms[0] / (norms[1] + 1e-8)


def limit_growth(update: jax.Array, norm: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """Keep the norm of each matrix's update within `limit` times the last one (Zhu et al. 2024, equation 4)."""
    new = jnp.sqrt(jnp.sum(jnp.square(update), axis=(-2, -1)))
    most = jnp.where(norm > 0, limit * norm.astype(new.dtype), new)
    factor = jnp.where(new > most, most / jnp.where(new > 0, new, 1), 1)
    return update * factor[..., None, None], (new * factor).astype(jnp.float32)


def scale_by_apollo(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    rank: int = 256,
    scale: Any = 1.0,
    granularity: Granularity = "channel",
    refresh_every: int = 200,
    norm_growth: Any = 1.01,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients channel by channel, by Adam's statistics of a random projection.

    Memory: for a matrix `[m, n]`, `m <= n`, `2 r n` elements and one number, in place of `2 m n`; no projection is
    stored. Leaves with more axes are batches of matrices. Cost: one product of `m n r`, and `m r` normal numbers.

    Args:
      b1, b2, eps: of Adam.
      rank: dimensions of the projection. Matrices with an axis of this length or shorter get plain Adam.
      scale: factor of the matrices' updates.
      granularity: "channel" for a factor a row or a column along the longer axis, "tensor" for one a matrix.
      refresh_every: updates between two projections.
      norm_growth: largest ratio of the norms of two consecutive updates of a matrix; None for no limit.
      seed: seeds the projections.
      where: as in `scale_by_galore`.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` the integers belong into `static_args`.

    Raises:
      TypeError: an integer setting is traced.
      ValueError: the granularity is unknown, or the rank or the period is below one.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_apollo
      >>> scale_by_apollo(rank=4).init({"kernel": jnp.zeros((8, 16))}).leaves["['kernel']"].mu.shape
      (4, 16)

    Source: Zhu et al. 2024, "APOLLO: SGD-like memory, AdamW-level performance", algorithm 1.

    Limits: the matrices of a batch share a projection. Adam's bias correction is part of the factor, where the authors'
    code puts it into the learning rate.
    """
    if granularity not in ("channel", "tensor"):
        raise ValueError(f"granularity={granularity!r} is unknown: choose 'channel' or 'tensor'")
    settings = make_settings(rank, "auto", refresh_every, 0, seed, where)

    def init_leaf(leaf, value):
        if not settings.projected(leaf, value):
            return adam_init(leaf, value)
        low = projection.low_shape(leaf.shape, settings.rank, "auto")
        moments = [zeros_beside(value, low, leaf.dtype) for _ in range(2)]
        return ApolloLeaf(*moments, zeros_beside(value, leaf.shape[:-2], jnp.float32))

    def update_leaf(leaf, gradient, state, count):
        if not isinstance(state, ApolloLeaf):
            return adam_leaf(gradient, state, count, b1, b2, eps)
        wide_gradient = gradient.astype(wide(leaf.dtype))
        basis = random_projection(leaf, settings.rank, settings.seed, (count - 1) // settings.refresh_every)
        low = projection.project(wide_gradient, basis, "auto")
        mu = decay(state.mu.astype(low.dtype), low, b1)
        nu = decay(state.nu.astype(low.dtype), jnp.square(low), b2)
        direction = adam_direction(mu, nu, count, b1, b2, eps)
        factor = channel_scale(direction, low, granularity, projection.side_of(leaf.shape, "auto"))
        update, norm = wide_gradient * factor, state.norm
        if norm_growth is not None:
            update, norm = limit_growth(update, norm, norm_growth)
        return scale * update, ApolloLeaf(mu.astype(state.mu.dtype), nu.astype(state.nu.dtype), norm)

    return per_leaf(init_leaf, update_leaf)


def scale_by_apollo_mini(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    rank: int = 1,
    scale: Any = 128.0**0.5,
    granularity: Granularity = "tensor",
    refresh_every: int = 200,
    norm_growth: Any = 1.01,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients matrix by matrix, by Adam's statistics of a projection onto a single dimension.

    Memory: for a matrix `[m, n]`, `m <= n`, `2 n` elements and one number: about that of plain gradient descent. Cost:
    that of `scale_by_apollo`, with rank 1.

    Args:
      b1, b2, eps, rank, scale, granularity, refresh_every, norm_growth, seed, where: as in `scale_by_apollo`; only the
        defaults differ.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as `scale_by_apollo`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_apollo_mini
      >>> scale_by_apollo_mini().init({"kernel": jnp.zeros((8, 16))}).leaves["['kernel']"].mu.shape
      (1, 16)

    Source: Zhu et al. 2024, section 4.2; the authors' code takes the square root of its `scale=128`, which is the
    default here.
    """
    return scale_by_apollo(
        b1,
        b2,
        eps,
        rank=rank,
        scale=scale,
        granularity=granularity,
        refresh_every=refresh_every,
        norm_growth=norm_growth,
        seed=seed,
        where=where,
    )


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    rank: int = 256,
    scale: Any = 1.0,
    granularity: Granularity = "channel",
    refresh_every: int = 200,
    norm_growth: Any = 1.01,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make APOLLO with a learning rate: `scale_by_apollo`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_apollo`.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps, rank, scale, granularity, refresh_every, norm_growth, seed, where: as in `scale_by_apollo`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as `scale_by_apollo`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import apollo
      >>> optimizer = apollo(1e-2)
      >>> params = {"kernel": jnp.ones((16, 32))}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (16, 32)

    Source: Zhu et al. 2024, "APOLLO: SGD-like memory, AdamW-level performance".
    """
    core = scale_by_apollo(
        b1,
        b2,
        eps,
        rank=rank,
        scale=scale,
        granularity=granularity,
        refresh_every=refresh_every,
        norm_growth=norm_growth,
        seed=seed,
        where=where,
    )
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    rank: int = 1,
    scale: Any = 128.0**0.5,
    granularity: Granularity = "tensor",
    refresh_every: int = 200,
    norm_growth: Any = 1.01,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make APOLLO-Mini with a learning rate: `scale_by_apollo_mini`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_apollo_mini`.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps, rank, scale, granularity, refresh_every, norm_growth, seed, where: as in `scale_by_apollo`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as `scale_by_apollo`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import apollo_mini
      >>> optimizer = apollo_mini(1e-2)
      >>> params = {"kernel": jnp.ones((16, 32))}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (16, 32)

    Source: Zhu et al. 2024, "APOLLO: SGD-like memory, AdamW-level performance".
    """
    core = scale_by_apollo_mini(
        b1,
        b2,
        eps,
        rank=rank,
        scale=scale,
        granularity=granularity,
        refresh_every=refresh_every,
        norm_growth=norm_growth,
        seed=seed,
        where=where,
    )
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
