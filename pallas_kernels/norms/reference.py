"""A norm of rows as its definition; its gradient is JAX's own. Every other form has to equal it.

In: rows, and maybe a scale and a bias. Out: rows of mean square (or variance) 1, scaled and shifted. It saves nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from memopt.pallas_kernels._dtypes import wide


@dataclasses.dataclass(frozen=True)
class Spec:
    """Settings of a norm.

    Attributes:
        centered: subtract the mean of a row first (LayerNorm), or not (RMSNorm).
        epsilon: added to the mean square.
    """

    centered: bool
    epsilon: float


def norm(spec: Spec, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """Return the norm of each row.

    Args:
        spec: the settings.
        x: `[rows, width]`.
        scale, bias: `[width]` or None.

    Returns:
        `[rows, width]` in `x`'s dtype, computed in float32 (float64 for float64).

    Example:
        >>> norm(Spec(centered=True, epsilon=0.0), jnp.asarray([[1.0, 3.0]]), None, None).tolist()
        [[-1.0, 1.0]]
    """
    y = x.astype(wide(x.dtype))
    y = y - y.mean(axis=1, keepdims=True) if spec.centered else y
    y = y * lax.rsqrt((y * y).mean(axis=1, keepdims=True) + jnp.asarray(spec.epsilon, y.dtype))
    y = y if scale is None else y * scale.astype(y.dtype)[None]
    y = y if bias is None else y + bias.astype(y.dtype)[None]
    return y.astype(x.dtype)
