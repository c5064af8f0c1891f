"""Optimizer state that is encoded between updates: which leaves, with which codecs, and Adam, momentum and Lion on it.

In come a gradient and encoded moments of one leaf, out go its update and the moments encoded again. A leaf is decoded,
used and encoded by itself, and new moments are made twice, once for their scales and once for their codes, so that
XLA:TPU can fuse each into what reads it rather than hold a copy in full precision. Updates leave the kernel that writes
the codes in the gradient's dtype: else XLA:TPU held a part of them in float32, and decoded a moment again for the rest.
The codecs are the framework's; nothing here knows what their codes mean.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt._codec import Codec, Encoded, decode
from memopt._codecs_blocks import held_apart
from memopt.optim._leaves import Leaf, adam_direction, decay, per_leaf, wide, zeros_beside


@dataclasses.dataclass(frozen=True)
class Stores:
    """How the moments of leaves are kept.

    Attributes:
      mu: the codec of first moments.
      nu: the codec of second moments.
      min_size: leaves with fewer elements keep plain moments.
      stable_embedding: keep plain float32 moments of embeddings and output heads, whatever their size.
    """

    mu: Codec
    nu: Codec
    min_size: int
    stable_embedding: bool

    def encodes(self, leaf: Leaf) -> bool:
        """Say whether a leaf's moments are encoded."""
        return leaf.size >= max(1, self.min_size) and not (self.stable_embedding and leaf.named_table)

    def init(self, leaf: Leaf, value: Any, codec: Codec) -> Any:
        """Return a zero moment: encoded, or plain in wide precision."""
        if not self.encodes(leaf):
            return zeros_beside(value, leaf.shape, wide(leaf.dtype))
        return encoded_zeros(codec, leaf.shape, wide(leaf.dtype), value)


def encoded_zeros(codec: Codec, shape: tuple[int, ...], dtype: Any, value: Any) -> Encoded:
    """Encode zeros without making them, laid out over the mesh of the parameter `value` where axes are its own.

    The codecs of moments write zeros as one repeated code and repeated scales, which a small sample shows.
    """
    sample = _sample(codec, jnp.dtype(dtype))
    wanted = codec.layout(shape, dtype)
    fills = [sample.scales[min(i, len(sample.scales) - 1)].reshape(-1)[0] for i in range(len(wanted.scales))]
    codes = zeros_beside(value, wanted.codes.shape, wanted.codes.dtype, sample.codes.reshape(-1)[0])
    pairs = zip(wanted.scales, fills, strict=True)
    scales = tuple(zeros_beside(value, one.shape, one.dtype, fill) for one, fill in pairs)
    return dataclasses.replace(wanted, codes=codes, scales=scales)


@functools.cache
def _sample(codec: Codec, dtype: Any) -> Encoded:
    """Encode 256 zeros, also where whoever asks is being traced."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, codec.encode(jnp.zeros(256, dtype)))


def load(moment: Any, dtype: Any) -> jax.Array:
    """Return a moment in an arithmetic dtype, decoding it where it is encoded."""
    return decode(moment).astype(dtype) if isinstance(moment, Encoded) else moment.astype(dtype)


def save(new: jax.Array, like: Any) -> Any:
    """Return a moment in the form of the old one."""
    return like.codec.encode(new.astype(like.dtype)) if isinstance(like, Encoded) else new.astype(like.dtype)


class EncodedMoments(NamedTuple):
    """Adam's two moments of one leaf, each encoded or plain."""

    mu: Any
    nu: Any


def advance(leaf: Leaf, rule: Callable[[Any, Any], tuple[Any, Any]], gradient: Any, state: Any) -> tuple[Any, Any]:
    """Return an update, and new moments in the forms of the old ones.

    Args:
      leaf: what is known of the leaf.
      rule: `(gradient, moments) -> (update, new moments)`, all in wide precision; element-wise, since they may come in
        another shape, in which XLA:TPU has nothing to move.
      gradient: the gradient of the leaf, in its own precision.
      state: its moments, each encoded or plain.
    """
    work = wide(leaf.dtype)
    olds, treedef = jax.tree.flatten(state, is_leaf=_is_encoded)
    if not all(map(_is_encoded, olds)):
        update, news = rule(gradient.astype(work), treedef.unflatten(load(old, work) for old in olds))
        return update, treedef.unflatten(map(save, treedef.flatten_up_to(news), olds))
    rows = next((rows for old in olds if (rows := old.codec.rows_apart(old.shape))), None)

    def follow(gradient, state):
        olds = treedef.flatten_up_to(state)
        moments = treedef.unflatten(old.codec.read(old, rows).astype(work) for old in olds)
        update, news = rule(gradient.astype(work), moments)
        news = [new.astype(old.dtype) for new, old in zip(treedef.flatten_up_to(news), olds, strict=True)]
        return update.reshape(leaf.shape), list(zip(news, olds, strict=True))

    gradient = held_apart(gradient, olds[0].codec.apart(leaf.shape, rows))
    measured = [old.codec.measure(new, old.shape, rows) for new, old in follow(gradient, state)[1]]
    gradient, state, measured = jax.lax.optimization_barrier((gradient, state, measured))
    update, pairs = follow(gradient, state)
    update = jax.lax.optimization_barrier(update.astype(leaf.dtype))
    kept = [old.codec.write(new, scales, old, rows) for (new, old), scales in zip(pairs, measured, strict=True)]
    return update, treedef.unflatten(kept)


def _is_encoded(one: Any) -> bool:
    return isinstance(one, Encoded)


def encoded_adam_leaf(leaf: Leaf, gradient: Any, state: EncodedMoments, count: Any, b1: Any, b2: Any, eps: Any) -> Any:
    """Take one Adam step on one leaf with stored moments."""

    def rule(gradient, old):
        mu, nu = decay(old.mu, gradient, b1), decay(old.nu, jnp.square(gradient), b2)
        return adam_direction(mu, nu, count, b1, b2, eps), EncodedMoments(mu, nu)

    return advance(leaf, rule, gradient, state)


def scale_by_encoded_adam(stores: Stores, b1: Any, b2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """Make Adam whose moments are stored as `stores` says; the update uses them before they are rounded."""

    def init_leaf(leaf, value):
        return EncodedMoments(stores.init(leaf, value, stores.mu), stores.init(leaf, value, stores.nu))

    def update_leaf(leaf, gradient, state, count):
        return encoded_adam_leaf(leaf, gradient, state, count, b1, b2, eps)

    return per_leaf(init_leaf, update_leaf)


def scale_by_encoded_momentum(stores: Stores, momentum: Any, nesterov: bool) -> optax.GradientTransformationExtraArgs:
    """Make heavy-ball momentum whose trace is stored as `stores.mu` says."""

    def init_leaf(leaf, value):
        return stores.init(leaf, value, stores.mu)

    def update_leaf(leaf, gradient, state, count):
        del count

        def rule(gradient, old):
            trace = momentum * old + gradient
            return (gradient + momentum * trace if nesterov else trace), trace

        return advance(leaf, rule, gradient, state)

    return per_leaf(init_leaf, update_leaf)


def scale_by_encoded_lion(stores: Stores, b1: Any, b2: Any) -> optax.GradientTransformationExtraArgs:
    """Make Lion whose momentum is stored as `stores.mu` says."""

    def init_leaf(leaf, value):
        return stores.init(leaf, value, stores.mu)

    def update_leaf(leaf, gradient, state, count):
        del count

        def rule(gradient, old):
            return jnp.sign(decay(old, gradient, b1)), decay(old, gradient, b2)

        return advance(leaf, rule, gradient, state)

    return per_leaf(init_leaf, update_leaf)
