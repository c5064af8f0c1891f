"""Q-GaLore: GaLore with 4-bit bases, refreshed seldom where the subspace stands still.

In come what GaLore takes and the settings of the lazy refresh, out comes the same transformation with another
`Projector`. The 8-bit moments are those of `_eightbit`, the int8 weights those of `_rounding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
        rows = _Rows(stored.bases)
        gradients, key = projection.as_batch(gradient), leaf_key(settings.seed, leaf, count)
        first = jnp.asarray(np.where(offsets > 0, offsets, settings.refresh_every).astype(np.int32))

        def one(index, carry):
            taken = [jax.lax.dynamic_index_in_dim(v, index, keepdims=False) for v in (gradients, first, *carry)]

            def anew(matrix, begin, gap, due, similarity, *row):
                del due
                basis = settings.new_basis(matrix, index, key)
                schedule = self._schedule(rows.basis(row), basis, gap, similarity, count, begin)
                return *schedule, *rows.row(basis)

            row = jax.lax.cond(taken[3] <= count, anew, lambda matrix, begin, *row: row, *taken)
            pairs = zip(carry, row, strict=True)
            return tuple(jax.lax.dynamic_update_index_in_dim(value, new, index, 0) for value, new in pairs)

        def some(stored, last):
            carry = (*stored[1:], *rows.split(stored.bases))
            gap, due, similarity, *parts = jax.lax.fori_loop(np.int32(0), last, one, carry)
            return LazyBases(rows.join(parts), gap, due, similarity)

        now = jnp.any(stored.due <= count)
        if rows.alone:
            return some(stored, jnp.where(now, np.int32(leaf.count), np.int32(0)))
        return jax.lax.cond(now, lambda stored: some(stored, np.int32(leaf.count)), lambda stored: stored, stored)

    def _schedule(self, old, new, gap, similarity, count, first):
        """Note how the first direction of a new basis compares with the old one's, and say when the next one is due."""
        old, new = old[:, 0].astype(new.dtype), new[:, 0]
        norms = jnp.sqrt(jnp.sum(old**2) * jnp.sum(new**2))
        cosine = jnp.where(norms > 0, jnp.abs(jnp.sum(old * new)) / jnp.maximum(norms, 1e-30), -1.0)
        queue = jnp.append(similarity[1:], cosine.astype(jnp.float32))
        queue = jnp.where(count == 0, jnp.full_like(queue, -1.0), queue)
        stays = jnp.all(queue >= 0) & (jnp.mean(queue) >= self.threshold)
        wait = jnp.where(stays, (gap.astype(jnp.float32) * self.growth).astype(jnp.int32), gap)
        return wait, jnp.where(count == 0, first, count + wait), queue

    def load(self, stored: LazyBases) -> jax.Array:
        """Return the decoded bases."""
        return decode(stored.bases)


class _Rows:
    """Takes the encoded bases of a batch apart by matrix: as codes where no byte is shared, else decoded.

    Attributes:
      alone: whether each matrix is encoded as it would be by itself.
    """

    def __init__(self, like: Encoded):
        self.like, self.single = like, (1, *like.shape[-2:])
        whole, alone = (like.codec.layout(shape, like.dtype) for shape in (like.shape, self.single))
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True)
        self.alone = len(like.shape) == 3 and all(a.shape == (like.shape[0], *b.shape[1:]) for a, b in pairs)

    def split(self, bases: Encoded) -> list[jax.Array]:
        """Return arrays with the batch as their first axis."""
        return jax.tree.leaves(bases) if self.alone else [projection.as_batch(decode(bases))]

    def basis(self, row: Sequence[jax.Array]) -> jax.Array:
        """Return one matrix `[m, rank]` from its row of those arrays."""
        if not self.alone:
            return row[0]
        codes, *scales = (part[None] for part in row)
        return decode(dataclasses.replace(self.like, codes=codes, scales=tuple(scales), shape=self.single))[0]

    def row(self, basis: jax.Array) -> list[jax.Array]:
        """Undo `basis`."""
        basis = basis.astype(self.like.dtype)
        return [part[0] for part in jax.tree.leaves(self.like.codec.encode(basis[None]))] if self.alone else [basis]

    def join(self, parts: Sequence[jax.Array]) -> Encoded:
        """Undo `split`."""
        if not self.alone:
            return self.like.codec.encode(parts[0].reshape(self.like.shape))
        return dataclasses.replace(self.like, codes=parts[0], scales=tuple(parts[1:]))


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
    does not hold the weights. A basis rounded to 4 bits is not quite orthonormal, as published. Where codes of two
    matrices of a batch share a byte or their scales are not stored by matrix (ranks below 128, several batch axes, odd
    axes), a refresh decodes all of them, and `FuseUpdate` leaves the leaf alone.
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
