"""Block-wise codes and Adam on them in pure JAX, in element-wise operations that XLA can fuse; arguments as in
`reference`. No table is looked into: on a TPU a gather from 256 entries is slow, comparing with a few decades is not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import codes
from .reference import Spec, from_blocks, step, to_blocks


def quantize(spec: Spec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return uint8 codes and float32 scales."""
    blocks = to_blocks(x.astype(jnp.float32), spec.block)
    scale = codes.scales(blocks, 3)
    code = from_blocks(codes.encode(blocks, scale, spec.signed), x.shape[2])
    return code.astype(jnp.uint8), scale[..., 0].swapaxes(1, 2)


def dequantize(spec: Spec, code: jax.Array, scale: jax.Array) -> jax.Array:
    """Return float32 `[batch, rows, width]`."""
    blocks = to_blocks(code.astype(jnp.float32), spec.block)
    value = codes.decode(blocks, scale.swapaxes(1, 2)[..., None], spec.signed)
    return from_blocks(value, code.shape[2])


def adam(block: int, gradient, mu, nu, count: Any, b1: Any, b2: Any, eps: Any):
    """Return the update and both moments after one Adam step."""
    signed, unsigned = Spec(block, True), Spec(block, False)
    first, second = dequantize(signed, *mu), dequantize(unsigned, *nu)
    update, first, second = step(gradient.astype(jnp.float32), first, second, count, b1, b2, eps)
    return update.astype(gradient.dtype), quantize(signed, first), quantize(unsigned, second)
