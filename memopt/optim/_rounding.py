"""Weights in few bits without a copy in many: stochastic rounding to bfloat16, and to block-wise int8.

In come parameters and updates, out go updates or weights that are rounded up or down at random, right on average. It
knows no optimizer: it comes after one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt._codec import Encoded, decode
from memopt._codecs_linear import Integer
from memopt.optim._leaves import describe, leaf_key, static_int


def round_to_bfloat16(values: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 values to bfloat16, up or down at random, so that the mean is the value.

    Args:
      values: float32, any shape.
      key: seeds 16 random bits a value.

    Returns:
      bfloat16. Infinities and NaN stay what they are.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(values), rounded, values).astype(jnp.bfloat16)


class StochasticRoundingState(NamedTuple):
    """Count of updates, int32; the random bits follow from it and the seed."""

    count: jax.Array


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Let bfloat16 parameters move by updates smaller than half their spacing, without a float32 copy of them.

    Put it last in a chain. The update of a bfloat16 parameter is replaced by the difference to the parameter plus
    update, stochastically rounded; `optax.apply_updates` then lands on that value. Other dtypes pass unchanged.

    Memory: 4 bytes in all. Cost: 16 random bits a parameter.

    Args:
      seed: seeds the rounding.

    Returns:
      An optax transformation whose update needs the parameters.

    Raises:
      ValueError: `update` was called without parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from memopt.optim import stochastic_rounding
      >>> optimizer = optax.chain(optax.sgd(1.0), stochastic_rounding())
      >>> params = jnp.ones(1000, jnp.bfloat16)
      >>> updates, _ = optimizer.update(jnp.full(1000, -1e-3, jnp.bfloat16), optimizer.init(params), params)
      >>> moved = optax.apply_updates(params, updates).astype(jnp.float32).mean()
      >>> bool(1.0005 < moved < 1.0015)
      True

    Source: Gupta et al. 2015, "Deep learning with limited numerical precision", section 3; Zamirai et al. 2020,
    "Revisiting BFloat16 training", section 3.

    Limits: the difference is exact in bfloat16 where a parameter changes by less than half of itself; larger updates
    are rounded to nearest a second time.
    """
    seed = static_int("seed", seed)

    def init(params):
        del params
        return StochasticRoundingState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("stochastic_rounding needs the parameters: call update(updates, state, params)")
        leaves, values, treedef = describe(updates)
        old = treedef.flatten_up_to(params)
        keys = [leaf_key(seed, leaf, state.count) for leaf in leaves]
        new = [_rounded(*parts) for parts in zip(values, old, keys, strict=True)]
        return treedef.unflatten(new), StochasticRoundingState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _rounded(update: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    if param.dtype != jnp.bfloat16:
        return update
    old = param.astype(jnp.float32)
    new = round_to_bfloat16(old + update.astype(jnp.float32), key)
    return (new.astype(jnp.float32) - old).astype(update.dtype)


def int8_weights(params: Any, *, block: int = 256, min_size: int = 4096) -> Any:
    """Store weights in int8 with one scale a block, the form that Q-GaLore trains in.

    Memory: `1 + 4 / block` bytes a weight in place of 2 or 4; no other copy is kept. Cost: none a step by itself.

    Args:
      params: a tree of floating arrays.
      block: weights that share a scale, along the last axis.
      min_size: smaller leaves, and those with one axis or none, stay as they are.

    Returns:
      The same tree with an encoded array in the place of each large leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import int8_decode, int8_weights
      >>> stored = int8_weights({"kernel": jnp.ones((64, 64))})
      >>> stored["kernel"].codes.dtype, float(int8_decode(stored)["kernel"][0, 0])
      (dtype('uint8'), 1.0)

    Source: Zhang et al. 2024, "Q-GaLore", section 3.4.
    """
    codec = Integer(8, block)
    chosen = lambda leaf: leaf.ndim >= 2 and leaf.size >= min_size  # noqa: E731
    return jax.tree.map(lambda leaf: codec.encode(leaf) if chosen(leaf) else leaf, params)


def int8_decode(weights: Any) -> Any:
    """Return the weights of `int8_weights` as arrays: what the forward pass reads, and what gradients are taken of.

    Memory: a transient copy in the weights' first dtype; layers that are decoded in their scan hold one at a time.

    Args:
      weights: a tree made by `int8_weights`.

    Returns:
      The tree of arrays, with the shapes and dtypes that were encoded.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import int8_decode, int8_weights
      >>> int8_decode(int8_weights(jnp.zeros((64, 64), jnp.bfloat16))).dtype
      dtype(bfloat16)
    """
    return jax.tree.map(lambda leaf: decode(leaf) if _stored(leaf) else leaf, weights, is_leaf=_stored)


def int8_apply_updates(weights: Any, updates: Any, key: jax.Array) -> Any:
    """Add updates to weights stored in int8, rounding at random, so that small updates are not lost.

    Memory: one decoded leaf at a time. Cost: a uniform random number a weight.

    Args:
      weights: a tree made by `int8_weights`.
      updates: a tree of arrays in the weights' shapes.
      key: seeds the rounding; fold the step into it.

    Returns:
      The new tree, in the same form; its scales are those of the new values.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from memopt.optim import int8_apply_updates, int8_decode, int8_weights
      >>> stored = int8_weights(jnp.ones((64, 64)))
      >>> new = int8_apply_updates(stored, jnp.full((64, 64), -1e-3).at[0].set(0.0), jax.random.key(0))
      >>> round(float(int8_decode(new)[1:].mean()), 3)
      0.999

    Source: Zhang et al. 2024, "Q-GaLore", section 3.4.
    """
    leaves, values, treedef = describe(updates)
    old = treedef.flatten_up_to(weights)
    keys = [jax.random.fold_in(key, leaf.index) for leaf in leaves]
    return treedef.unflatten([_add(*parts) for parts in zip(old, values, keys, strict=True)])


def _stored(leaf: Any) -> bool:
    return isinstance(leaf, Encoded)


def _add(weight: Any, update: jax.Array, key: jax.Array) -> Any:
    if not _stored(weight):
        return (weight + update.astype(weight.dtype)).astype(weight.dtype)
    codec = weight.codec
    random = dataclasses.replace(codec, stochastic=True)
    new = decode(weight).astype(jnp.float32) + update.astype(jnp.float32)
    made = random.encode(new, key)
    return dataclasses.replace(weight, codes=made.codes, scales=made.scales)
