"""A matmul with a quantized weight in pure JAX, a slice of its columns at a time: the weight never exists in floats.

In: activations and a `QuantizedWeight`. Out: the product, or the gradient of the activations. A `scan` walks slices of
columns; what is left over at the end is a last slice of its own, so that nothing is padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .reference import quantize_rows
from .weight import QuantizedWeight, dequantize, unpack


def chunk_size(rows: int, columns: int, tile_bytes: int = 8 * 2**20) -> int:
    """Choose how many columns are dequantized at a time: `tile_bytes` of float32 where that is 128 or more.

    Example:
        >>> chunk_size(4096, 14336)
        512
    """
    return min(columns, max(128, 1 << max((tile_bytes // (4 * rows)).bit_length() - 1, 0)))


def matmul(x: jax.Array, weight: QuantizedWeight, rounded: bool, chunk: int | None = None) -> jax.Array:
    """Return `x @ weight`; arguments as in `reference.matmul`, `chunk` the columns of a slice."""
    codes, scale = quantize_rows(x) if rounded else (x, None)
    start = jnp.zeros((x.shape[0], weight.shape[1]), x.dtype)

    def step(out, first, size):
        part = _slice(weight, first, size)
        made = _by_codes(codes, part) * scale if rounded else _product(x, dequantize(part, x.dtype), 0)
        return lax.dynamic_update_slice_in_dim(out, made.astype(x.dtype), first, 1)

    return _walk(step, start, weight, chunk)


def gradient(cotangent: jax.Array, weight: QuantizedWeight, chunk: int | None = None) -> jax.Array:
    """Return the gradient of the activations; arguments as in `reference.gradient`."""

    def step(total, first, size):
        part = lax.dynamic_slice_in_dim(cotangent, first, size, 1)
        return total + _product(part, dequantize(_slice(weight, first, size), cotangent.dtype), 1)

    start = jnp.zeros((cotangent.shape[0], weight.shape[0]), jnp.float32)
    return _walk(step, start, weight, chunk).astype(cotangent.dtype)


def _walk(step: Callable[..., Any], carry: Any, weight: QuantizedWeight, chunk: int | None) -> Any:
    chunk = chunk or chunk_size(*weight.shape)
    count, tail = divmod(weight.shape[1], chunk)
    if count:
        firsts = jnp.arange(0, count * chunk, chunk, dtype=jnp.int32)
        carry, _ = lax.scan(lambda carry, first: (step(carry, first, chunk), None), carry, firsts)
    return step(carry, jnp.int32(count * chunk), tail) if tail else carry


def _slice(weight: QuantizedWeight, first: Any, size: int) -> QuantizedWeight:
    codes, scales = (lax.dynamic_slice_in_dim(x, first, size, 1) for x in (weight.codes, weight.scales))
    return dataclasses.replace(weight, codes=codes, scales=scales)


def _product(a: jax.Array, b: jax.Array, b_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((1,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _by_codes(codes: jax.Array, part: QuantizedWeight) -> jax.Array:
    """Multiply 8-bit codes into int32, group by group, and add the groups by their scales."""
    integers = part.codes if part.bits == 8 else unpack(part.codes, part.unit).astype(jnp.int8)
    left = codes.reshape(codes.shape[0], -1, part.group)
    right = integers.reshape(-1, part.group, part.shape[1])
    sums = lax.dot_general(left, right, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * part.scales[:, None]).sum(axis=0)
