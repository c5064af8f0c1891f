"""Block-wise codes and Adam on them as their definitions: the nearest entry of a table, whole arrays at a time.

In: arrays `[batch, rows, width]` and the size of a block. Out: codes and scales `[batch, blocks, rows]`, the array
again, or an Adam step. Every other form has to equal it; the moments exist in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import codes


@dataclasses.dataclass(frozen=True)
class Spec:
    """Settings: elements that share a scale, along the last axis, and whether codes have a sign."""

    block: int
    signed: bool = True


def quantize(spec: Spec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return uint8 codes `[batch, rows, width]` and float32 scales `[batch, blocks, rows]`."""
    blocks = to_blocks(x.astype(jnp.float32), spec.block)
    scale = codes.scales(blocks, 3)
    table = codes.values(spec.signed)
    middles = jnp.asarray((table[1:] + table[:-1]) / 2, jnp.float32)
    small = jnp.where(jnp.abs(scale) > 1e30, 2.0**-40, 1.0)  # a compiler's reciprocal of the scale would underflow
    ratio = jnp.where(jnp.isfinite(blocks), blocks * small / (jnp.abs(scale) * small), 0.0)
    code = jnp.searchsorted(middles, ratio).astype(jnp.float32)
    code = codes._mark(code, blocks, scale < 0, spec.signed)
    return from_blocks(code, x.shape[2]).astype(jnp.uint8), scale[..., 0].swapaxes(1, 2)


def dequantize(spec: Spec, code: jax.Array, scale: jax.Array) -> jax.Array:
    """Return float32 `[batch, rows, width]`."""
    scale, width = scale.swapaxes(1, 2)[..., None], code.shape[2]
    code = to_blocks(code, spec.block)
    value = jnp.asarray(codes.values(spec.signed), jnp.float32)[code] * jnp.abs(scale)
    nan = codes.given_up(spec.signed)
    for which, what in ((nan - 1, -np.inf), (nan, np.nan), (nan + 1, np.inf)):
        value = jnp.where((scale < 0) & (code == which), what, value)
    return from_blocks(value, width)


def adam(block: int, gradient, mu, nu, count: Any, b1: Any, b2: Any, eps: Any):
    """Return the update and both moments, as codes and scales, after one Adam step.

    Args:
        block: elements that share a scale.
        gradient: `[batch, rows, width]`.
        mu, nu: codes and scales of the moments, of signed and of unsigned values.
        count: the number of this step, 1 at first.
        b1, b2, eps: Adam's.
    """
    signed, unsigned = Spec(block, True), Spec(block, False)
    first, second = (dequantize(s, *m) for s, m in ((signed, mu), (unsigned, nu)))
    update, first, second = step(gradient.astype(jnp.float32), first, second, count, b1, b2, eps)
    return update.astype(gradient.dtype), quantize(signed, first), quantize(unsigned, second)


def step(gradient, mu, nu, count: Any, b1: Any, b2: Any, eps: Any):
    """Return Adam's bias-corrected direction and both moments, all float32 (Kingma and Ba 2015, algorithm 1)."""
    b1, b2, eps, one, two = scalars(count, b1, b2, eps)
    mu = b1 * mu + (1 - b1) * gradient
    nu = b2 * nu + (1 - b2) * (gradient * gradient)
    return mu / one / (jnp.sqrt(nu / two) + eps), mu, nu


def scalars(count: Any, b1: Any, b2: Any, eps: Any) -> jax.Array:
    """Return b1, b2, eps and both bias corrections: float32[5]."""
    count = jnp.asarray(count).astype(jnp.float32)
    b1, b2, eps = (jnp.asarray(x, jnp.float32) for x in (b1, b2, eps))
    return jnp.stack([b1, b2, eps, 1 - b1**count, 1 - b2**count])


def to_blocks(x: jax.Array, block: int) -> jax.Array:
    """Return `[..., width]` as `[..., blocks, block]`, the last block filled up with its row's last element."""
    rest = -x.shape[-1] % block
    if rest:
        x = jnp.concatenate([x, jnp.broadcast_to(x[..., -1:], (*x.shape[:-1], rest))], axis=-1)
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def from_blocks(x: jax.Array, width: int) -> jax.Array:
    """Undo `to_blocks`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])[..., :width]
