"""Activations of a gate and their derivatives, in operations that kernels of all platforms know; floats in and out."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Activation = Literal["silu", "gelu", "gelu_exact", "relu"]
NAMES: tuple[Activation, ...] = ("silu", "gelu", "gelu_exact", "relu")
_ROOT = 0.7978845608028654  # of 2 / pi
_CUBE = 0.044715


def value_and_slope(name: Activation, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return an activation and its derivative, element by element; "gelu" is the tanh form.

    Example:
        >>> [float(x) for x in value_and_slope("relu", jnp.float32(2.0))]
        [2.0, 1.0]
    """
    half = 0.5 * z
    if name == "silu":
        s = lax.logistic(z)
        return z * s, s * (1 + z * (1 - s))
    if name == "gelu":
        t = jnp.tanh(_ROOT * (z + _CUBE * z * z * z))
        return half * (1 + t), 0.5 * (1 + t) + half * (1 - t * t) * (_ROOT * (1 + 3 * _CUBE * z * z))
    if name == "gelu_exact":
        phi = 0.5 * (1 + lax.erf(z * 0.7071067811865476))
        return z * phi, phi + z * jnp.exp(-half * z) * 0.3989422804014327
    return jnp.maximum(z, jnp.zeros_like(z)), (z > 0).astype(z.dtype)


def value(name: Activation, z: jax.Array) -> jax.Array:
    """Return an activation alone."""
    return value_and_slope(name, z)[0]
