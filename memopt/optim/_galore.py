"""GaLore: any optax optimizer, run on gradients projected to few dimensions.

In come an inner transformation and a rank, out comes a transformation whose moments have the projected shape. How the
bases are stored and when they are made anew is a `Projector` (here the plain one; Q-GaLore brings another). The inner
optimizer never sees a full matrix, and nothing here knows what it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt.optim import _projection as projection
from memopt.optim._leaves import Leaf, Where, describe, finish, leaf_key, static_int, zeros_beside
from memopt.optim._projection import Side
from memopt.optim._rounding import stochastic_rounding as round_stochastically


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides which leaves are projected, and how.

    Attributes:
      rank, side, refresh_every, power_iterations, seed, where: as in `scale_by_galore`.
    """

    rank: int
    side: Side = "auto"
    refresh_every: int = 200
    power_iterations: int = 1
    seed: int = 0
    where: Where | None = None

    def projected(self, leaf: Leaf, value: Any) -> bool:
        """Say whether a leaf is projected."""
        return projection.is_projected(leaf, value, self.rank, self.where)

    def basis_shape(self, leaf: Leaf) -> tuple[int, ...]:
        """Return the shape of a leaf's bases."""
        return projection.basis_shape(leaf.shape, self.rank, self.side)

    def new_basis(self, matrix: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
        """Make the basis of one matrix `[m, n]`, the `index`-th of its batch."""
        key = jax.random.fold_in(key, index)
        return projection.range_basis(matrix, self.rank, key, self.side, self.power_iterations)


class Projector(Protocol):
    """How the bases of one leaf are stored, and when they are made anew."""

    def init(self, leaf: Leaf, value: Any, settings: Settings) -> Any:
        """Return the stored form before the first update."""
        ...

    def refresh(
        self, leaf: Leaf, gradient: jax.Array, stored: Any, count: jax.Array, offsets: np.ndarray, settings: Settings
    ) -> Any:
        """Return the stored form after the refreshes that are due at `count` (0 at first)."""
        ...

    def load(self, stored: Any) -> jax.Array:
        """Return the bases, in the parameter's dtype."""
        ...


class PlainProjector:
    """Bases in the parameter's dtype; each matrix is refreshed once a period, at its own update."""

    def init(self, leaf: Leaf, value: Any, settings: Settings) -> jax.Array:
        """Return zeros; the first update makes all bases."""
        return zeros_beside(value, settings.basis_shape(leaf), leaf.dtype)

    def refresh(self, leaf, gradient, stored, count, offsets, settings):
        """Refresh the matrices that are due one after the other: none at most updates, all at the first."""
        gradients, bases = projection.as_batch(gradient), projection.as_batch(stored)
        key = leaf_key(settings.seed, leaf, count)

        def one(index, bases):
            matrix = jax.lax.dynamic_index_in_dim(gradients, index, keepdims=False)
            basis = settings.new_basis(matrix, index, key).astype(bases.dtype)
            return jax.lax.dynamic_update_index_in_dim(bases, basis, index, 0)

        first, last = projection.due_range(offsets, count, settings.refresh_every)
        return jax.lax.fori_loop(first, last, one, bases).reshape(stored.shape)

    def load(self, stored: jax.Array) -> jax.Array:
        """Return them as they are."""
        return stored


class GaLoreState(NamedTuple):
    """State of GaLore.

    Attributes:
      count: int32 scalar, the number of updates so far.
      projectors: the bases of each projected leaf, by its `keystr` path.
      inner: the inner optimizer's state, of the projected shapes.
    """

    count: jax.Array
    projectors: dict[str, Any]
    inner: Any


def low_rank(
    inner: optax.GradientTransformation, settings: Settings, scale: Any, projector: Projector
) -> optax.GradientTransformationExtraArgs:
    """Run an inner transformation on projected gradients: GaLore, whatever stores its bases."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        leaves, values, treedef = describe(params)
        chosen = [settings.projected(*pair) for pair in zip(leaves, values, strict=True)]
        low = [_low_zeros(*parts, settings) for parts in zip(leaves, values, chosen, strict=True)]
        stored = {
            leaf.path: projector.init(leaf, value, settings)
            for leaf, value, yes in zip(leaves, values, chosen, strict=True)
            if yes
        }
        return GaLoreState(jnp.zeros([], jnp.int32), stored, inner.init(treedef.unflatten(low)))

    def update(updates, state, params=None, **extra_args):
        del params
        leaves, values, treedef = describe(updates)
        stored = _refreshed(leaves, values, state, settings, projector)
        bases = [projector.load(stored[leaf.path]) if leaf.path in stored else None for leaf in leaves]
        low = [
            value if basis is None else projection.project(value, basis, settings.side).astype(basis.dtype)
            for value, basis in zip(values, bases, strict=True)
        ]
        low, inner_state = inner.update(treedef.unflatten(low), state.inner, None, **extra_args)
        low = treedef.flatten_up_to(low)
        full = [_full(*parts, settings, scale) for parts in zip(leaves, low, bases, strict=True)]
        return treedef.unflatten(full), GaLoreState(optax.safe_increment(state.count), stored, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _refreshed(
    leaves: Any, values: Any, state: GaLoreState, settings: Settings, projector: Projector
) -> dict[str, Any]:
    """Return all stored bases after the refreshes that are due."""
    projected = [leaf.path in state.projectors for leaf in leaves]
    offsets = projection.refresh_offsets(leaves, projected, settings.refresh_every)
    return {
        leaf.path: projector.refresh(leaf, value, state.projectors[leaf.path], state.count, when, settings)
        for leaf, value, when, yes in zip(leaves, values, offsets, projected, strict=True)
        if yes
    }


def _low_zeros(leaf: Leaf, value: Any, projected: bool, settings: Settings) -> Any:
    """Return what the inner optimizer sees of a parameter: its projected shape, or the parameter itself."""
    if not projected:
        return value
    return zeros_beside(value, projection.low_shape(leaf.shape, settings.rank, settings.side), leaf.dtype)


def _full(leaf: Leaf, low: jax.Array, basis: jax.Array | None, settings: Settings, scale: Any) -> jax.Array:
    if basis is None:
        return low
    return (scale * projection.project_back(low, basis, leaf.shape, settings.side)).astype(leaf.dtype)


def scale_by_galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 128,
    scale: Any = 0.25,
    refresh_every: int = 200,
    side: Side = "auto",
    power_iterations: int = 1,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run any optimizer in a low-rank subspace of the gradients of matrices.

    Memory: for a matrix `[m, n]`, `m <= n`, Adam's moments fall from `2 m n` to `2 r n` elements, and `r m` of the
    basis are added. Leaves with more axes are batches of matrices, as a scan over layers stacks them, each with its own
    basis. Cost: two products of `m n r` an update; one refresh a matrix in `refresh_every` updates, spread so that they
    never come together but at the first update.

    Args:
      inner: the optimizer of projected gradients; None for `optax.scale_by_adam()`. It is called without parameters,
        which have another shape.
      rank: dimensions of the subspace. Matrices with an axis of this length or shorter are not projected.
      scale: factor of the projected leaves' updates, the paper's alpha.
      refresh_every: updates between two bases of a matrix.
      side: "auto" projects the shorter axis, "left" the rows' axis, "right" the columns'.
      power_iterations: of the range finder; more are closer to the singular vectors.
      seed: seeds the range finder.
      where: called with a leaf's `keystr` path and the leaf; says whether it is a matrix. None takes every leaf with
        two axes or more that is not named `bias` or `scale`.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` the integers belong into `static_args`.

    Raises:
      TypeError: an integer setting is traced.
      ValueError: the side is unknown, or the rank or the period is below one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from memopt.optim import scale_by_galore
      >>> optimizer = scale_by_galore(rank=2)
      >>> state = optimizer.init({"kernel": jnp.zeros((3, 8, 16))})
      >>> [leaf.shape for leaf in jax.tree.leaves(state.projectors)], state.inner.mu["kernel"].shape
      ([(3, 8, 2)], (3, 2, 16))

    Source: Zhao et al. 2024, "GaLore", algorithm 2. A randomised range finder stands in for its SVD.

    Limits: the moments are not turned when the basis changes, as published. Refreshing a matrix of a batch that is
    sharded along the batch gathers that matrix.
    """
    settings = make_settings(rank, side, refresh_every, power_iterations, seed, where)
    return low_rank(inner or optax.scale_by_adam(), settings, scale, PlainProjector())


def make_settings(
    rank: Any, side: Side, refresh_every: Any, power_iterations: Any, seed: Any, where: Where | None
) -> Settings:
    """Check the settings of a low-rank optimizer."""
    named = {"rank": rank, "refresh_every": refresh_every, "power_iterations": power_iterations, "seed": seed}
    numbers = {name: static_int(name, value) for name, value in named.items()}
    for name in ("rank", "refresh_every"):
        if numbers[name] < 1:
            raise ValueError(f"{name}={numbers[name]} is too small: choose 1 or more")
    projection.side_of((1, 1), side)
    return Settings(side=side, where=where, **numbers)


def galore(
    learning_rate: optax.ScalarOrSchedule,
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 128,
    scale: Any = 0.25,
    refresh_every: int = 200,
    side: Side = "auto",
    power_iterations: int = 1,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make GaLore with a learning rate: `scale_by_galore`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_galore`.

    Args:
      learning_rate: a number or an optax schedule.
      inner, rank, scale, refresh_every, side, power_iterations, seed, where: as in `scale_by_galore`.
      weight_decay: decoupled, on the full parameters.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as `scale_by_galore`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from memopt.optim import galore, scale_by_adam_8bit
      >>> optimizer = galore(1e-2, scale_by_adam_8bit(), rank=4)
      >>> params = {"kernel": jnp.ones((16, 32))}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> updates["kernel"].shape
      (16, 32)

    Source: Zhao et al. 2024, "GaLore: Memory-efficient LLM training by gradient low-rank projection".

    Limits: as `scale_by_galore`.
    """
    core = scale_by_galore(
        inner,
        rank=rank,
        scale=scale,
        refresh_every=refresh_every,
        side=side,
        power_iterations=power_iterations,
        seed=seed,
        where=where,
    )
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
