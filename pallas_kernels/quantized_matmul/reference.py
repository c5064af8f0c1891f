"""A matmul with a quantized weight as its definition: the whole weight is dequantized. Other forms have to equal it.

In: activations and a `QuantizedWeight`. Out: the product, or the gradient of the activations; activations in 8 bits.
It saves nothing: the weight exists in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .weight import QuantizedWeight, dequantize


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return activations `[tokens, rows]` as int8 codes and a float32 scale `[tokens, 1]`, to the nearest code."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=1, keepdims=True) * (1 / 127)
    safe = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return jnp.clip(jnp.round(wide / safe), -127, 127).astype(jnp.int8), scale


def matmul(x: jax.Array, weight: QuantizedWeight, rounded: bool) -> jax.Array:
    """Return `x @ weight` in `x`'s dtype.

    Args:
        x: `[tokens, rows]`, floating.
        weight: the weight.
        rounded: multiply `x` as 8-bit codes with a scale for each token.
    """
    wide = x.astype(jnp.float32)
    if rounded:
        codes, scale = quantize_rows(x)
        wide = codes.astype(jnp.float32) * scale
    return jnp.dot(wide, dequantize(weight), precision="highest").astype(x.dtype)


def gradient(cotangent: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Return the gradient of the activations, `cotangent @ weight.T`; rounding of activations counts as no change."""
    wide = cotangent.astype(jnp.float32)
    return jnp.dot(wide, dequantize(weight).T, precision="highest").astype(cotangent.dtype)
