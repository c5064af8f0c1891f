"""Dtypes of the arithmetic inside kernels: what products are summed in. Python values in and out."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return float32, or float64 for float64, under strict promotion of dtypes too.

    Example:
        >>> wide(jnp.bfloat16)
        dtype('float32')
    """
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")
