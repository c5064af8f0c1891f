"""A norm of rows in pure JAX whose backward pass reads the input alone: the statistics of a row are made again.

In: rows, maybe scale and bias, a cotangent. Out: the norm, or the gradients. Nothing in float32 is as large as the
rows once a compiler has fused the element-wise operations, which are written so that it can.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from memopt.pallas_kernels._dtypes import wide

from .reference import Spec


def forward(spec: Spec, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """Return the norm; arguments and result as in `reference.norm`."""
    y, _ = unit_rows(spec, x)
    y = y if scale is None else y * scale.astype(y.dtype)[None]
    y = y if bias is None else y + bias.astype(y.dtype)[None]
    return y.astype(x.dtype)


def backward(
    spec: Spec, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Return the gradients of `x`, `scale` and `bias`, None for those that are not there."""
    y, inverse = unit_rows(spec, x)
    g = cotangent.astype(y.dtype)
    dx = row_gradient(spec, y, inverse, g if scale is None else g * scale.astype(y.dtype)[None])
    dscale = None if scale is None else (g * y).sum(axis=0).astype(scale.dtype)
    dbias = None if bias is None else g.sum(axis=0).astype(bias.dtype)
    return dx.astype(x.dtype), dscale, dbias


def unit_rows(spec: Spec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return rows without scale and bias in float32, and `[rows, 1]`: the factor that made them so."""
    y = x.astype(wide(x.dtype))
    y = y - y.mean(axis=1, keepdims=True) if spec.centered else y
    inverse = lax.rsqrt((y * y).mean(axis=1, keepdims=True) + jnp.asarray(spec.epsilon, y.dtype))
    return y * inverse, inverse


def row_gradient(spec: Spec, y: jax.Array, inverse: jax.Array, g: jax.Array) -> jax.Array:
    """Return the gradient of the rows from `unit_rows` and the gradient `g` of its first result."""
    rest = g - y * (g * y).mean(axis=1, keepdims=True)
    return inverse * (rest - g.mean(axis=1, keepdims=True) if spec.centered else rest)
