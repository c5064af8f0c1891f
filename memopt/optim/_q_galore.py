"""Q-GaLore: GaLore with 4-bit bases, refreshed seldom where the subspace stands still.

In come what GaLore takes and the settings of the lazy refresh, out comes the same transformation with another
`Projector`. The 8-bit moments are those of `_eightbit`, the int8 weights those of `_rounding`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt._codec import Encoded, decode
from memopt._codecs_linear import Integer
from memopt.optim import _projection as projection
from memopt.optim._eightbit import scale_by_adam_8bit
from memopt.optim._galore import Settings, low_rank, make_settings
from memopt.optim._leaves import Leaf, Where, finish, leaf_key, static_int
from memopt.optim._projection import Side
from memopt.optim._rounding import stochastic_rounding as round_stochastically


class LazyBases(NamedTuple):
    """Bases of one leaf in 4 bits, with the schedule of each of its matrices.

    Attributes:
      bases: the encoded bases, of the shape that GaLore's have.
      gap: int32 `[batch]`, updates from one refresh to the next.
      due: int32 `[batch]`, the count at which the next refresh comes.
      similarity: float32 `[batch, queue]`, the last similarities of a new first direction to the old one; below zero
        where there is none yet.
    """

    bases: Encoded
    gap: jax.Array
    due: jax.Array
    similarity: jax.Array


@dataclasses.dataclass(frozen=True)
class LazyProjector:
    """Stores bases in 4 bits, and doubles a matrix's period when its dominant direction has stayed for a while.

    Attributes:
      codec: of the bases.
      threshold: mean similarity from which the period grows.
      growth: factor of the period.
      queue: similarities that are averaged.
    """

    codec: Integer
    threshold: float
    growth: float
    queue: int

    def init(self, leaf: Leaf, value: Any, settings: Settings) -> LazyBases:
        """Return zero bases; the first update makes all of them."""
        del value
        bases = self.codec.encode(jnp.zeros(settings.basis_shape(leaf), leaf.dtype))
        gap = jnp.full(leaf.count, settings.refresh_every, jnp.int32)
        return LazyBases(
            bases, gap, jnp.zeros(leaf.count, jnp.int32), jnp.full((leaf.count, self.queue), -1.0, jnp.float32)
        )

    def refresh(self, leaf, gradient, stored, count, offsets, settings):
        """Refresh the matrices whose time has come, one after the other; nothing is decoded when none is due."""
        gradients = projection.as_batch(gradient)
        key = leaf_key(settings.seed, leaf, count)
        first = jnp.asarray(np.where(offsets > 0, offsets, settings.refresh_every).astype(np.int32))

        def some(stored):
            bases = projection.as_batch(decode(stored.bases))

            def one(index, carry):
                return jax.lax.cond(
                    stored.due[index] <= count,
                    lambda carry: self._one(index, carry, settings.new_basis(gradients, index, key), count, first),
                    lambda carry: carry,
                    carry,
                )

            carry = (bases, stored.gap, stored.due, stored.similarity)
            bases, *rest = jax.lax.fori_loop(0, leaf.count, one, carry)
            return LazyBases(self.codec.encode(bases.reshape(stored.bases.shape)), *rest)

        return jax.lax.cond(jnp.any(stored.due <= count), some, lambda stored: stored, stored)

    def _one(self, index, carry, basis, count, first):
        """Put one new basis and note how its first direction compares with the old one's."""
        bases, gap, due, similarity = carry
        old, new = bases[index, :, 0].astype(basis.dtype), basis[:, 0]
        norms = jnp.sqrt(jnp.sum(old**2) * jnp.sum(new**2))
        cosine = jnp.where(norms > 0, jnp.abs(jnp.sum(old * new)) / jnp.maximum(norms, 1e-30), -1.0)
        queue = jnp.append(similarity[index, 1:], cosine.astype(jnp.float32))
        queue = jnp.where(count == 0, jnp.full_like(queue, -1.0), queue)
        stays = jnp.all(queue >= 0) & (jnp.mean(queue) >= self.threshold)
        wait = jnp.where(stays, (gap[index].astype(jnp.float32) * self.growth).astype(jnp.int32), gap[index])
        then = jnp.where(count == 0, first[index], count + wait)
        bases = jax.lax.dynamic_update_index_in_dim(bases, basis.astype(bases.dtype), index, 0)
        return bases, gap.at[index].set(wait), due.at[index].set(then), similarity.at[index].set(queue)

    def load(self, stored: LazyBases) -> jax.Array:
        """Return the decoded bases."""
        return decode(stored.bases)


def scale_by_q_galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 128,
    scale: Any = 0.25,
    refresh_every: int = 200,
    threshold: float = 0.4,
    growth: float = 2.0,
    queue: int = 5,
    block: int = 256,
    side: Side = "auto",
    power_iterations: int = 1,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run GaLore with 4-bit bases, lazily refreshed, and 8-bit moments.

    Memory: for a matrix `[m, n]`, `m <= n`, about `2 r n + r m / 2` bytes. Cost: that of GaLore, a decoding of the
    bases an update, and fewer refreshes: a matrix whose dominant direction stays waits longer and longer.

    Args:
      inner: the optimizer of projected gradients; None for `scale_by_adam_8bit()`.
      rank, scale, side, power_iterations, seed, where: as in `scale_by_galore`.
      refresh_every: updates between two bases of a matrix, at first.
      threshold: mean similarity (absolute cosine of old and new first direction) from which a matrix waits longer.
      growth: by which factor.
      queue: number of similarities averaged.
      block: elements of a basis that share a scale, along its last axis.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` the integers belong into `static_args`.

    Raises:
      TypeError, ValueError: as `scale_by_galore`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_q_galore
      >>> state = scale_by_q_galore(rank=16).init({"kernel": jnp.zeros((64, 128))})
      >>> state.projectors["['kernel']"].bases.codes.size
      512

    Source: Zhang et al. 2024, "Q-GaLore: Quantized GaLore with INT4 projection and layer-adaptive low-rank gradients",
    sections 3.2 and 3.3.

    Limits: the int8 weights of the paper are `int8_weights` and `int8_apply_updates`, since an optax transformation
    does not hold the weights. A basis rounded to 4 bits is not quite orthonormal, as published.
    """
    settings = make_settings(rank, side, refresh_every, power_iterations, seed, where)
    numbers = static_int("queue", queue), static_int("block", block)
    codec = Integer(4, numbers[1], symmetric=False)
    return low_rank(inner or scale_by_adam_8bit(), settings, scale, LazyProjector(codec, threshold, growth, numbers[0]))


def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 128,
    scale: Any = 0.25,
    refresh_every: int = 200,
    threshold: float = 0.4,
    growth: float = 2.0,
    queue: int = 5,
    block: int = 256,
    side: Side = "auto",
    power_iterations: int = 1,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make Q-GaLore with a learning rate: `scale_by_q_galore`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_q_galore`.

    Args:
      learning_rate: a number or an optax schedule.
      inner, rank, scale, refresh_every, threshold, growth, queue, block, side, power_iterations, seed, where: as in
        `scale_by_q_galore`.
      weight_decay: decoupled, on the full parameters.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as `scale_by_galore`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import q_galore
      >>> optimizer = q_galore(1e-2, rank=4)
      >>> params = {"kernel": jnp.ones((16, 32))}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (16, 32)

    Source: Zhang et al. 2024, "Q-GaLore".

    Limits: as `scale_by_q_galore`.
    """
    core = scale_by_q_galore(
        inner,
        rank=rank,
        scale=scale,
        refresh_every=refresh_every,
        threshold=threshold,
        growth=growth,
        queue=queue,
        block=block,
        side=side,
        power_iterations=power_iterations,
        seed=seed,
        where=where,
    )
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
