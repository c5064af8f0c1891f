"""Gated activations for GPUs through Pallas and Triton: one kernel forward, one backward, over flat entries.

In: gate and up of any one shape, a cotangent. Out: `activation(gate) * up`, or both gradients. The matmuls of a gated
MLP are left to the compiler's library on GPUs: there is no kernel of the whole MLP here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .activations import Activation, value, value_and_slope

BLOCK = 1024  # entries of a program


def gated_problem(activation: Activation, gate, up, block: int | None) -> str | None:
    """Say why these kernels cannot serve a call, or None where they can."""
    if activation == "gelu_exact":
        return "Pallas does not lower the error function for GPUs"
    if any(x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) for x in (gate, up)):
        return f"{gate.dtype} gates: bfloat16, float16 and float32 are served"
    if not gate.size:
        return "no entries"
    if block and block & (block - 1):
        return f"blocks of {block} entries: powers of two are needed"
    return None


def gated(activation: Activation, gate, up, block: int | None = None, interpret: bool = False) -> jax.Array:
    """Return `activation(gate) * up`."""
    return _elementwise(_gated_kernel, activation, [gate, up], [gate], block, interpret, "memopt_gated")[0]


def gated_gradients(activation: Activation, gate, up, cotangent, block=None, interpret: bool = False):
    """Return the gradients of gate and up."""
    operands, name = [gate, up, cotangent], "memopt_gated_gradients"
    return tuple(_elementwise(_gradient_kernel, activation, operands, [gate, up], block, interpret, name))


def _elementwise(kernel, activation, operands, like, block: int | None, interpret: bool, name: str):
    block, shape, size = block or BLOCK, operands[0].shape, operands[0].size
    made = pl.pallas_call(
        functools.partial(kernel, activation, size, block),
        grid=(pl.cdiv(size, block),),
        out_shape=[jax.ShapeDtypeStruct((size,), x.dtype) for x in like],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name=name,
    )(*(x.reshape(size) for x in operands))
    return [x.reshape(shape) for x in made]


def _loaded(size: int, block: int, refs):
    first = pl.program_id(0) * block
    inside = first + lax.broadcasted_iota(jnp.int32, (block,), 0) < size
    at = pl.ds(first, block)
    return at, inside, [plgpu.load(ref.at[at], mask=inside, other=0.0).astype(jnp.float32) for ref in refs]


def _gated_kernel(activation, size, block, gate_ref, up_ref, out_ref):
    at, inside, (z, u) = _loaded(size, block, (gate_ref, up_ref))
    plgpu.store(out_ref.at[at], (value(activation, z) * u).astype(out_ref.dtype), mask=inside)


def _gradient_kernel(activation, size, block, gate_ref, up_ref, cotangent_ref, dgate_ref, dup_ref):
    at, inside, (z, u, g) = _loaded(size, block, (gate_ref, up_ref, cotangent_ref))
    a, slope = value_and_slope(activation, z)
    plgpu.store(dgate_ref.at[at], (g * u * slope).astype(dgate_ref.dtype), mask=inside)
    plgpu.store(dup_ref.at[at], (g * a).astype(dup_ref.dtype), mask=inside)
