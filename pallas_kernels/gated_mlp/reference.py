"""A gated activation and a gated MLP as their definitions; gradients are JAX's own. Other forms have to equal them.

In: gate and up, or rows and three weights. Out: activation(gate) * up, and its product with the last weight. All hidden
activations exist, in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from memopt.pallas_kernels._dtypes import wide

from .activations import Activation

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def gated(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return `activation(gate) * up`, computed in float32, in the dtype of `gate`."""
    dtype = wide(gate.dtype)
    return (_ACTIVATIONS[activation](gate.astype(dtype)) * up.astype(dtype)).astype(gate.dtype)


def mlp(activation: Activation, x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Return `gated(x @ gate, x @ up) @ down`.

    Args:
        activation: of the gate.
        x: `[tokens, dim]`.
        gate, up: `[dim, hidden]`, in `x`'s dtype.
        down: `[hidden, out]`, in `x`'s dtype.

    Returns:
        `[tokens, out]` in `x`'s dtype. Products are summed in float32, hidden activations rounded to `x`'s dtype.
    """
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=wide(x.dtype))
    return product(gated(activation, product(x, gate), product(x, up)).astype(x.dtype), down).astype(x.dtype)
