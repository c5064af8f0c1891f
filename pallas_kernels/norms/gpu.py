"""Norms of rows for GPUs through Pallas and Triton: one kernel forward, one backward.

In: rows, maybe scale and bias, a cotangent. Out: the norm, or the gradients. A program loads whole rows, padded by
masks to a power of two, and makes their statistics in registers; sums over rows leave it as one partial row a program.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .reference import Spec

PROGRAMS = 256  # of the backward kernel at most: each writes one partial row of a sum over rows


def block_size(width: int, device: str = "gpu") -> int:
    """Choose how many rows are loaded at a time: about 4,096 entries; all GPUs are treated alike.

    Example:
        >>> block_size(768)
        4
    """
    return max(1, 4096 // _padded(width))


def problem(spec: Spec, x, scale, bias, block: int | None) -> str | None:
    """Say why these kernels cannot serve a call, or None where they can."""
    if any(a is not None and a.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) for a in (x, scale, bias)):
        return f"{x.dtype} rows: bfloat16, float16 and float32 are served"
    if x.shape[1] > 16_384:
        return f"a width of {x.shape[1]}: up to 16,384 is served"
    if not x.size:
        return "no rows"
    if block and block & (block - 1):
        return f"blocks of {block} rows: powers of two are needed"
    return None


def forward(spec: Spec, x, scale, bias, block: int | None = None, interpret: bool = False) -> jax.Array:
    """Return the norm; arguments and result as in `reference.norm`, `interpret` runs the kernel on a CPU."""
    block = block or block_size(x.shape[1])
    more = [a for a in (scale, bias) if a is not None]
    return pl.pallas_call(
        functools.partial(_forward_kernel, spec, block, scale is not None),
        grid=(pl.cdiv(x.shape[0], block),),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_warps(x.shape[1])),
        interpret=interpret,
        name="memopt_norm",
    )(x, *more)


def backward(spec: Spec, x, scale, bias, cotangent, block: int | None = None, interpret: bool = False):
    """Return the gradients; arguments and results as in `lean.backward`."""
    block = block or block_size(x.shape[1])
    blocks = pl.cdiv(x.shape[0], block)
    programs = min(blocks, PROGRAMS)
    sums = [a for a in (scale, bias) if a is not None]
    partial = jax.ShapeDtypeStruct((programs, x.shape[1]), jnp.float32)
    dx, *found = pl.pallas_call(
        functools.partial(_backward_kernel, spec, block, pl.cdiv(blocks, programs), scale is not None),
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *[partial] * len(sums)],
        compiler_params=plgpu.CompilerParams(num_warps=_warps(x.shape[1])),
        interpret=interpret,
        name="memopt_norm_gradients",
    )(x, cotangent, *([] if scale is None else [scale]))
    made = iter([total.sum(axis=0).astype(a.dtype) for total, a in zip(found, sums, strict=True)])
    return dx, None if scale is None else next(made), None if bias is None else next(made)


def _padded(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _warps(width: int) -> int:
    return 4 if width <= 4096 else 8


# Kernels. A tile is `[block, padded width]`; entries outside the array are loaded as zeros and never stored.


def _whole(width: int, index) -> Any:
    """Return the slice of a padded row. Its start is 0 whatever the index, which newer JAX must not know: it refuses a
    slice that leaves an array, also where a mask hides what lies outside.
    """
    return pl.ds(index * 0, _padded(width))


class _Tile:
    """Where a block of rows lies, and which of its entries are inside the array."""

    def __init__(self, shape: tuple[int, int], block: int, index):
        padded = _padded(shape[1])
        self.at = pl.ds(index * block, block), _whole(shape[1], index)
        row, column = (lax.broadcasted_iota(jnp.int32, (block, padded), axis) for axis in (0, 1))
        self.columns, self.width = column < shape[1], shape[1]
        self.mask = jnp.logical_and(self.columns, index * block + row < shape[0])

    def load(self, ref) -> jax.Array:
        return plgpu.load(ref.at[self.at], mask=self.mask, other=0.0).astype(jnp.float32)

    def store(self, ref, value) -> None:
        plgpu.store(ref.at[self.at], value.astype(ref.dtype), mask=self.mask)

    def mean(self, value) -> jax.Array:
        return (value.sum(axis=1) * (1 / self.width))[:, None]

    def unit_rows(self, spec: Spec, ref) -> tuple[jax.Array, jax.Array]:
        y = self.load(ref)
        y = jnp.where(self.columns, y - self.mean(y), jnp.zeros_like(y)) if spec.centered else y
        inverse = lax.rsqrt(self.mean(y * y) + spec.epsilon)
        return y * inverse, inverse


def _row(ref, width: int, index) -> jax.Array:
    at = _whole(width, index)
    inside = lax.broadcasted_iota(jnp.int32, (_padded(width),), 0) < width
    return plgpu.load(ref.at[at], mask=inside, other=0.0).astype(jnp.float32)[None]


def _forward_kernel(spec: Spec, block: int, scaled: bool, x_ref, *refs):
    *more, out_ref = refs
    program = pl.program_id(0)
    tile = _Tile(x_ref.shape, block, program)
    y, _ = tile.unit_rows(spec, x_ref)
    if scaled:
        y = y * _row(more[0], tile.width, program)
    if len(more) > scaled:
        y = y + _row(more[-1], tile.width, program)
    tile.store(out_ref, y)


def _backward_kernel(spec: Spec, block: int, count: int, scaled: bool, x_ref, cotangent_ref, *refs):
    scale_ref, (dx_ref, *sums) = (refs[0], refs[1:]) if scaled else (None, refs)
    width, program = x_ref.shape[1], pl.program_id(0)

    def step(i, totals):
        tile = _Tile(x_ref.shape, block, program * count + i)
        y, inverse = tile.unit_rows(spec, x_ref)
        g = tile.load(cotangent_ref)
        h = g if scale_ref is None else g * _row(scale_ref, width, program)
        rest = h - y * tile.mean(h * y)
        tile.store(dx_ref, inverse * (rest - tile.mean(h) if spec.centered else rest))
        terms = ([g * y] if scaled else []) + ([g] if len(sums) > scaled else [])
        return tuple(total + term.sum(axis=0) for total, term in zip(totals, terms, strict=True))

    start = tuple(jnp.zeros((_padded(width),), jnp.float32) for _ in sums)
    totals = lax.fori_loop(0, count, step, start)
    inside = lax.broadcasted_iota(jnp.int32, (_padded(width),), 0) < width
    for ref, total in zip(sums, totals, strict=True):
        plgpu.store(ref.at[program, _whole(width, program)], total, mask=inside)
