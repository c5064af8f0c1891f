"""Walking a tree of gradients leaf by leaf: what every optimizer of this package stands on.

In come parameters, gradients and states as trees; out go descriptions of their leaves, and optax transformations made
of two functions on one leaf. Nothing here knows an algorithm. Everything that is not an array is worked out again from
shapes and paths, so that states hold arrays alone: they shard, donate, stack and save like any other optax state.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Where = Callable[[str, Any], bool]
"""A choice of leaves: called with the leaf's `jax.tree_util.keystr` path and the leaf."""

#: What Flax calls parameters that are vectors, also where a scan has stacked them into matrices.
VECTOR_NAMES = frozenset({"bias", "scale"})
#: What Flax and the usual models call tables of embeddings and output heads.
TABLE_NAMES = frozenset({"embedding", "embed", "wte", "wpe", "lm_head", "head", "unembed"})


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of one leaf before anything runs.

    Attributes:
      index: its place in tree order; seeds are folded with it.
      path: its `jax.tree_util.keystr`, without the field in which nnx wraps it.
      words: the names on its path.
      shape: its shape. The last two axes are a matrix, all before them are a batch of matrices.
      dtype: its dtype.
    """

    index: int
    path: str
    words: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """The number of matrices in the batch."""
        return math.prod(self.shape[:-2])

    @property
    def named_matrix(self) -> bool:
        """Whether it has two axes or more and no name that means a vector."""
        return len(self.shape) >= 2 and self.words[-1:] not in [(name,) for name in VECTOR_NAMES]

    @property
    def named_table(self) -> bool:
        """Whether a name on its path means an embedding or an output head."""
        return not TABLE_NAMES.isdisjoint(self.words)


def is_matrix(leaf: Leaf, value: Any, where: Where | None) -> bool:
    """Say whether a leaf is treated as a batch of matrices: by the user's choice, else by its axes and its name."""
    if where is None:
        return leaf.named_matrix
    return len(leaf.shape) >= 2 and bool(where(leaf.path, value))


def describe(tree: Any) -> tuple[list[Leaf], list[Any], Any]:
    """Return the leaves' descriptions, the leaves, and the tree's structure."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [
        Leaf(index, *_named(path), tuple(jnp.shape(value)), jnp.result_type(value))
        for index, (path, value) in enumerate(pairs)
    ]
    return leaves, [value for _, value in pairs], treedef


def _named(path: Sequence[Any]) -> tuple[str, tuple[str, ...]]:
    """Return a path and its names without the fields of wrappers, which nnx takes off between `init` and `update`."""
    kept = tuple(key for key in path if getattr(key, "name", None) not in ("value", "raw_value"))
    words = [getattr(key, "key", getattr(key, "name", None)) for key in kept]
    return jax.tree_util.keystr(kept), tuple(word for word in words if isinstance(word, str))


def wide(dtype: Any) -> Any:
    """Return the dtype of an update's arithmetic: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def leaf_key(seed: int, leaf: Leaf, count: Any) -> jax.Array:
    """Return the random key of one leaf at one count; nothing of it is stored."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), leaf.index), count)


def static_int(name: str, value: Any) -> int:
    """Return an integer that shapes depend on.

    Raises:
      TypeError: it is not known before the step runs, as under `optax.inject_hyperparams` without `static_args`.
    """
    try:
        return operator.index(value)
    except (TypeError, jax.errors.ConcretizationTypeError) as error:
        remedy = f"under optax.inject_hyperparams name it in static_args=({name!r}, ...)"
        raise TypeError(f"{name}={value!r} has to be a Python int, since shapes depend on it; {remedy}") from error


def zeros_beside(value: Any, shape: tuple[int, ...], dtype: Any, fill: Any = 0) -> jax.Array:
    """Make an array that belongs to a parameter, sharded like it on the axes that have the same length.

    Args:
      value: the parameter. One that is not laid out over a mesh, or is traced, leaves the choice to JAX.
      shape, dtype: of the new array.
      fill: its value.
    """
    filled = jnp.full(shape, fill, dtype)
    sharding = None if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or len(shape) > len(value.shape):
        return filled
    spec = (*sharding.spec, *[None] * (len(value.shape) - len(sharding.spec)))
    kept = [part if new == old else None for part, new, old in zip(spec, shape, value.shape, strict=False)]
    partition = jax.sharding.PartitionSpec(*kept[: len(shape)])
    return jax.device_put(filled, jax.sharding.NamedSharding(sharding.mesh, partition))


class PerLeafState(NamedTuple):
    """State of an optimizer that treats every leaf by itself.

    Attributes:
      count: int32 scalar, the number of updates so far.
      leaves: the state of each leaf, by its `keystr` path. It does not mirror the parameters' tree: a leaf's state is a
        tree itself, and nnx puts arrays alone in the place of parameters.
    """

    count: jax.Array
    leaves: dict[str, Any]


InitLeaf = Callable[[Leaf, Any], Any]
UpdateLeaf = Callable[[Leaf, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


def per_leaf(init_leaf: InitLeaf, update_leaf: UpdateLeaf) -> optax.GradientTransformationExtraArgs:
    """Make an optax transformation of two functions on one leaf.

    Args:
      init_leaf: `(leaf, parameter) -> state`, the state any tree of arrays.
      update_leaf: `(leaf, gradient, state, count) -> (update, state)`, the count of this update being 1 at first. The
        update is cast to the gradient's dtype.
    """

    def init(params):
        leaves, values, _ = describe(params)
        states = {leaf.path: init_leaf(leaf, value) for leaf, value in zip(leaves, values, strict=True)}
        return PerLeafState(jnp.zeros([], jnp.int32), states)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = optax.safe_increment(state.count)
        leaves, values, treedef = describe(updates)
        states = [state_of(state.leaves, leaf) for leaf in leaves]
        done = []
        for leaf, value, old in zip(leaves, values, states, strict=True):
            new, kept = update_leaf(leaf, value, old, count)
            done.append((new.astype(leaf.dtype), kept))
        states = {leaf.path: pair[1] for pair, leaf in zip(done, leaves, strict=True)}
        return treedef.unflatten([pair[0] for pair in done]), PerLeafState(count, states)

    return optax.GradientTransformationExtraArgs(init, update)


def state_of(states: dict[str, Any], leaf: Leaf) -> Any:
    """Return the state of one leaf.

    Raises:
      ValueError: `init` did not see this leaf.
    """
    if leaf.path not in states:
        raise ValueError(f"there is no state for {leaf.path}: call init with parameters of the gradients' tree")
    return states[leaf.path]


class Moments(NamedTuple):
    """Adam's two moments of one leaf."""

    mu: jax.Array
    nu: jax.Array


def adam_direction(mu: Any, nu: Any, count: Any, b1: Any, b2: Any, eps: Any) -> jax.Array:
    """Return Adam's bias-corrected direction from its moments in wide precision (Kingma and Ba 2015, algorithm 1)."""
    steps = count.astype(mu.dtype)
    corrected = jnp.sqrt(nu / (1 - b2**steps)) + eps
    return mu / (1 - b1**steps) / corrected


def decay(moment: jax.Array, value: jax.Array, rate: Any) -> jax.Array:
    """Return one step of an exponential moving average."""
    return rate * moment + (1 - rate) * value


def adam_leaf(gradient: jax.Array, state: Moments, count: Any, b1: Any, b2: Any, eps: Any) -> tuple[Any, Moments]:
    """Take one plain Adam step on one leaf, in wide precision; the moments keep the dtypes that they have."""
    wide_gradient = gradient.astype(wide(gradient.dtype))
    mu = decay(state.mu.astype(wide_gradient.dtype), wide_gradient, b1)
    nu = decay(state.nu.astype(wide_gradient.dtype), jnp.square(wide_gradient), b2)
    update = adam_direction(mu, nu, count, b1, b2, eps)
    return update, Moments(mu.astype(state.mu.dtype), nu.astype(state.nu.dtype))


def adam_init(leaf: Leaf, value: Any) -> Moments:
    """Return the zero moments of a leaf that keeps plain ones, in its own dtype."""
    return Moments(zeros_beside(value, leaf.shape, leaf.dtype), zeros_beside(value, leaf.shape, leaf.dtype))


def finish(
    core: optax.GradientTransformation, learning_rate: Any, weight_decay: Any, mask: Any, *last: Any
) -> optax.GradientTransformationExtraArgs:
    """Chain what every alias ends with: decoupled weight decay, the learning rate, and what comes after it."""
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    parts = [core, *([optax.add_decayed_weights(weight_decay, mask)] if decays else [])]
    chained = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate), *last)
    return optax.with_extra_args_support(chained)
