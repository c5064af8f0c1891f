"""A gated activation that keeps its two inputs, and a gated MLP a slice of hidden units at a time, in pure JAX.

In: gate and up, or rows and three weights; a cotangent. Out: the result, or the gradients. The hidden activations of
an MLP exist for one slice at a time, forward and backward: the backward pass makes them again from the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memopt.pallas_kernels._dtypes import wide

from .activations import Activation, value, value_and_slope


def gated(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return `activation(gate) * up`; arguments as in `reference.gated`."""
    z, u = (x.astype(wide(gate.dtype)) for x in (gate, up))
    return (value(activation, z) * u).astype(gate.dtype)


def gated_gradients(
    activation: Activation, gate: jax.Array, up: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of gate and up."""
    z, u, g = (x.astype(wide(gate.dtype)) for x in (gate, up, cotangent))
    a, slope = value_and_slope(activation, z)
    return (g * u * slope).astype(gate.dtype), (g * a).astype(up.dtype)


# The whole MLP.


def chunk_size(tokens: int, hidden: int, tile_bytes: int = 16 * 2**20) -> int:
    """Choose how many hidden units are made at a time: `tile_bytes` of float32 for all tokens, where that is 128.

    Example:
        >>> chunk_size(2048, 8192)
        2048
    """
    return min(hidden, max(128, 1 << max((tile_bytes // (4 * max(tokens, 1))).bit_length() - 1, 0)))


def mlp(activation: Activation, x, gate, up, down, chunk: int | None = None) -> jax.Array:
    """Return the gated MLP; arguments and result as in `reference.mlp`, `chunk` the hidden units of a slice."""

    def step(total, first, size):
        part_gate, part_up, part_down = _parts(gate, up, down, first, size)
        hidden = value(activation, product(x, part_gate, 1, 0)) * product(x, part_up, 1, 0)
        return total + product(hidden.astype(x.dtype), part_down, 1, 0)

    start = jnp.zeros((x.shape[0], down.shape[1]), wide(x.dtype))
    return _walk(step, start, x.shape[0], gate.shape[1], chunk).astype(x.dtype)


def mlp_gradients(activation: Activation, x, gate, up, down, cotangent, chunk: int | None = None):
    """Return the gradients of rows, gate, up and down, the weights' in their own dtypes."""

    def step(carry, first, size):
        dx, dgate, dup, ddown = carry
        part_gate, part_up, part_down = _parts(gate, up, down, first, size)
        a, slope = value_and_slope(activation, product(x, part_gate, 1, 0))
        u, g = product(x, part_up, 1, 0), product(cotangent, part_down, 1, 1)
        part = product((a * u).astype(x.dtype), cotangent, 0, 0)
        dz, du = (g * u * slope).astype(x.dtype), (g * a).astype(x.dtype)
        dx = dx + product(dz, part_gate, 1, 1) + product(du, part_up, 1, 1)
        dgate, dup = (
            lax.dynamic_update_slice_in_dim(whole, product(x, d, 0, 0).astype(whole.dtype), first, 1)
            for whole, d in ((dgate, dz), (dup, du))
        )
        return dx, dgate, dup, lax.dynamic_update_slice_in_dim(ddown, part.astype(ddown.dtype), first, 0)

    start = jnp.zeros(x.shape, wide(x.dtype)), *(jnp.zeros_like(w) for w in (gate, up, down))
    dx, *weights = _walk(step, start, x.shape[0], gate.shape[1], chunk)
    return dx.astype(x.dtype), *weights


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contract one axis of two matrices into float32 (float64 for float64)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=wide(a.dtype))


def _parts(gate, up, down, first, size: int) -> list[jax.Array]:
    sides = ((gate, 1), (up, 1), (down, 0))
    return [lax.dynamic_slice_in_dim(weight, first, size, axis) for weight, axis in sides]


def _walk(step: Callable[..., Any], carry: Any, tokens: int, hidden: int, chunk: int | None) -> Any:
    chunk = min(chunk or chunk_size(tokens, hidden), hidden)
    count, tail = divmod(hidden, chunk)
    firsts = jnp.arange(0, count * chunk, chunk, dtype=jnp.int32)
    carry, _ = lax.scan(lambda carry, first: (step(carry, first, chunk), None), carry, firsts)
    return step(carry, jnp.int32(count * chunk), tail) if tail else carry
