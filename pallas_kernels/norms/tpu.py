"""Norms of rows for TPUs (Mosaic): one kernel forward, one backward, which reads input and cotangent alone.

In: rows, maybe scale and bias, a cotangent. Out: the norm, or the gradients. A block holds whole rows, so statistics
are made in VMEM and never written; sums over the rows stay in VMEM until the last block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import lean
from .reference import Spec

LANES = 128
VMEM_BYTES = 48 * 2**20


def block_size(rows: int, width: int, device: str = "tpu") -> int:
    """Choose how many rows a block holds: about 2 MiB of float32; all TPUs from v5e on are treated alike.

    Example:
        >>> block_size(8192, 2048)
        256
    """
    return min(max(16, 2**19 // width // 16 * 16), 1024, -(-rows // 16) * 16)


def problem(spec: Spec, x, scale, bias, block: int | None) -> str | None:
    """Say why these kernels cannot serve a call, or None where they can."""
    if any(a is not None and a.dtype not in (jnp.bfloat16, jnp.float32) for a in (x, scale, bias)):
        return f"{x.dtype} rows: bfloat16 and float32 are served"
    if x.shape[1] % LANES or x.shape[1] > 16_384:
        return f"a width of {x.shape[1]}: multiples of {LANES} up to 16,384 are served"
    if not x.shape[0]:
        return "no rows"
    if block and block % 16:
        return f"blocks of {block} rows: multiples of 16 are needed"
    return None


def forward(spec: Spec, x, scale, bias, block: int | None = None, interpret: bool = False) -> jax.Array:
    """Return the norm; arguments and result as in `reference.norm`, `interpret` runs the kernel on a CPU."""
    block = block or block_size(*x.shape)
    rows, shared = _specs(x, block)
    more = [a[None] for a in (scale, bias) if a is not None]
    return pl.pallas_call(
        functools.partial(_forward_kernel, spec, scale is not None),
        grid=(pl.cdiv(x.shape[0], block),),
        in_specs=[rows, *[shared] * len(more)],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="memopt_norm",
    )(x, *more)


def backward(spec: Spec, x, scale, bias, cotangent, block: int | None = None, interpret: bool = False):
    """Return the gradients; arguments and results as in `lean.backward`."""
    block = block or block_size(*x.shape)
    rows, shared = _specs(x, block)
    sums = [a for a in (scale, bias) if a is not None]
    given = [] if scale is None else [scale[None]]
    dx, *found = pl.pallas_call(
        functools.partial(_backward_kernel, spec, x.shape[0], scale is not None),
        grid=(pl.cdiv(x.shape[0], block),),
        in_specs=[rows, rows, *[shared] * len(given)],
        out_specs=[rows, *[shared] * len(sums)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(jax.ShapeDtypeStruct((1, x.shape[1]), jnp.float32) for _ in sums),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="memopt_norm_gradients",
    )(x, cotangent, *given)
    made = iter([total[0].astype(a.dtype) for total, a in zip(found, sums, strict=True)])
    return dx, None if scale is None else next(made), None if bias is None else next(made)


def _specs(x, block: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    return pl.BlockSpec((block, x.shape[1]), lambda i: (i, 0)), pl.BlockSpec((1, x.shape[1]), lambda i: (0, 0))


# Kernels.


def _forward_kernel(spec: Spec, scaled: bool, x_ref, *refs):
    *more, out_ref = refs
    y, _ = lean.unit_rows(spec, x_ref[...])
    if scaled:
        y = y * more[0][...].astype(y.dtype)
    if len(more) > scaled:
        y = y + more[-1][...].astype(y.dtype)
    out_ref[...] = y.astype(out_ref.dtype)


def _backward_kernel(spec: Spec, rows: int, scaled: bool, x_ref, cotangent_ref, *refs):
    scale_ref, (dx_ref, *sums) = (refs[0], refs[1:]) if scaled else (None, refs)
    y, inverse = lean.unit_rows(spec, x_ref[...])
    g = cotangent_ref[...].astype(y.dtype)
    dx = lean.row_gradient(spec, y, inverse, g if scale_ref is None else g * scale_ref[...].astype(y.dtype))
    dx_ref[...] = dx.astype(dx_ref.dtype)
    if not sums:
        return

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    terms = ([g * y] if scaled else []) + ([g] if len(sums) > scaled else [])
    for ref, term in zip(sums, terms, strict=True):
        ref[...] += _within(term, rows).sum(axis=0, keepdims=True)


def _within(x, rows: int):
    """Return a block with the rows that lie past the end of the array set to zero."""
    if rows % x.shape[0] == 0:
        return x
    row = pl.program_id(0) * x.shape[0] + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < rows, x, jnp.zeros_like(x))
