"""Optimizer state that is encoded between updates: which leaves, with which codecs, and Adam, momentum and Lion on it.

In come a gradient and encoded moments of one leaf, out go its update and the moments encoded again. A leaf is decoded,
used and encoded by itself, so that no copy in full precision outlives its update. The codecs are the framework's;
nothing here knows what their codes mean.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt._codec import Codec, Encoded, decode
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


def encoded_adam_leaf(leaf: Leaf, gradient: Any, state: EncodedMoments, count: Any, b1: Any, b2: Any, eps: Any) -> Any:
    """Take one Adam step on one leaf with stored moments."""
    gradient = gradient.astype(wide(leaf.dtype))
    mu = decay(load(state.mu, gradient.dtype), gradient, b1)
    nu = decay(load(state.nu, gradient.dtype), jnp.square(gradient), b2)
    update = adam_direction(mu, nu, count, b1, b2, eps)
    return update, EncodedMoments(save(mu, state.mu), save(nu, state.nu))


def scale_by_encoded_adam(stores: Stores, b1: Any, b2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """Make Adam whose moments are stored as `stores` says; the update uses them before they are rounded."""

    def init_leaf(leaf, value):
        return EncodedMoments(stores.init(leaf, value, stores.mu), stores.init(leaf, value, stores.nu))

    def update_leaf(leaf, gradient, state, count):
        return encoded_adam_leaf(leaf, gradient, state, count, b1, b2, eps)

    return per_leaf(init_leaf, update_leaf, stores.encodes)


def scale_by_encoded_momentum(stores: Stores, momentum: Any, nesterov: bool) -> optax.GradientTransformationExtraArgs:
    """Make heavy-ball momentum whose trace is stored as `stores.mu` says."""

    def init_leaf(leaf, value):
        return stores.init(leaf, value, stores.mu)

    def update_leaf(leaf, gradient, state, count):
        del count
        gradient = gradient.astype(wide(leaf.dtype))
        trace = momentum * load(state, gradient.dtype) + gradient
        return (gradient + momentum * trace if nesterov else trace), save(trace, state)

    return per_leaf(init_leaf, update_leaf, stores.encodes)


def scale_by_encoded_lion(stores: Stores, b1: Any, b2: Any) -> optax.GradientTransformationExtraArgs:
    """Make Lion whose momentum is stored as `stores.mu` says."""

    def init_leaf(leaf, value):
        return stores.init(leaf, value, stores.mu)

    def update_leaf(leaf, gradient, state, count):
        del count
        gradient = gradient.astype(wide(leaf.dtype))
        mu = load(state, gradient.dtype)
        return jnp.sign(decay(mu, gradient, b1)), save(decay(mu, gradient, b2), state)

    return per_leaf(init_leaf, update_leaf, stores.encodes)
