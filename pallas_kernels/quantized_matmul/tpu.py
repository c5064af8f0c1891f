"""Matmuls with quantized weights for TPUs (Mosaic): codes are fetched as they are stored and widened in VMEM.

In: activations and a `QuantizedWeight`. Out: the product, or the gradient of the activations. Tiles of 8-bit codes are
multiplied as integers that bfloat16 holds exactly, and the float32 sums of a group are scaled; groups too small for the
matrix units are scaled before the product. The weight is read, never padded or copied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .reference import quantize_rows
from .weight import QuantizedWeight, unpack

LANES = 128
VMEM_BYTES = 64 * 2**20


def block_sizes(tokens: int, weight: QuantizedWeight, device: str = "tpu") -> tuple[int, int, int]:
    """Choose `(tokens, rows, columns)` of a tile: a pure function of shape and device.

    Args:
        tokens: rows of the activations.
        weight: the weight; blocks of its rows hold whole groups, or a group whole blocks.
        device: kind of device; all TPUs from v5e on are treated alike.

    Example:
        >>> block_sizes(2048, jax.eval_shape(lambda: _zeros(4096, 14336)))
        (512, 512, 512)
    """
    rows, columns = (_largest(size) for size in weight.shape)
    if weight.group % rows:
        rows = next((n for n in (512, 256, 128) if weight.shape[0] % n == 0 and n % weight.group == 0), rows)
    return min(512, -(-tokens // 32) * 32), rows, columns


def _zeros(rows: int, columns: int) -> QuantizedWeight:
    return QuantizedWeight(jnp.zeros((rows, columns), jnp.int8), jnp.zeros((1, columns)), 8, rows, 256)


def _largest(size: int) -> int:
    return next((n for n in (512, 256, 128) if size % n == 0), size)


def problem(x, weight: QuantizedWeight, blocks: tuple[int, int, int] | None) -> str | None:
    """Say why these kernels cannot serve a call, or None where they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{x.dtype} activations: bfloat16 and float32 are served"
    if any(size % LANES for size in weight.shape):
        return f"a weight of {weight.shape}: multiples of {LANES} are served"
    tokens, rows, columns = blocks or block_sizes(x.shape[0], weight)
    if rows % LANES or columns % LANES or weight.shape[0] % rows or weight.shape[1] % columns or tokens % 32:
        return f"blocks of {(tokens, rows, columns)}: multiples of {LANES} that divide {weight.shape} are needed"
    if weight.group % rows and rows % weight.group:
        return f"groups of {weight.group} rows, of which blocks of {rows} hold a part"
    if weight.group < 16 or (weight.bits == 4 and (rows % weight.unit or weight.unit % 16)):
        return f"groups of {weight.group} rows, packed by {weight.unit}: multiples of 16 are served"
    return None


def matmul(x, weight: QuantizedWeight, rounded: bool, blocks=None, interpret: bool = False) -> jax.Array:
    """Return `x @ weight` from one kernel; arguments as in `reference.matmul`, `interpret` runs it on a CPU."""
    block = blocks or block_sizes(x.shape[0], weight)
    codes, scale = quantize_rows(x) if rounded else (x, None)
    grid = pl.cdiv(x.shape[0], block[0]), weight.shape[1] // block[2], weight.shape[0] // block[1]
    token_specs = [pl.BlockSpec((block[0], block[1]), lambda i, j, r: (i, r))]
    token_specs += [pl.BlockSpec((block[0], 1), lambda i, j, r: (i, 0))] * rounded
    call = pl.pallas_call(
        functools.partial(_kernel, weight.bits, weight.unit, rounded),
        grid=grid,
        in_specs=[*token_specs, *_weight_specs(weight, block, lambda i, j, r: (r, j))],
        out_specs=pl.BlockSpec((block[0], block[2]), lambda i, j, r: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype),
        scratch_shapes=[pltpu.VMEM((block[0], block[2]), jnp.float32)],
        compiler_params=_params(),
        interpret=interpret,
        name="memopt_quantized_matmul",
    )
    operands = (codes, scale) if rounded else (codes,)
    return call(*operands, weight.codes, _scales(weight, block[1]))


def gradient(cotangent, weight: QuantizedWeight, blocks=None, interpret: bool = False) -> jax.Array:
    """Return the gradient of the activations from one kernel; arguments as in `reference.gradient`."""
    block = blocks or block_sizes(cotangent.shape[0], weight)
    grid = pl.cdiv(cotangent.shape[0], block[0]), weight.shape[0] // block[1], weight.shape[1] // block[2]
    return pl.pallas_call(
        functools.partial(_gradient_kernel, weight.bits, weight.unit),
        grid=grid,
        in_specs=[
            pl.BlockSpec((block[0], block[2]), lambda i, r, j: (i, j)),
            *_weight_specs(weight, block, lambda i, r, j: (r, j)),
        ],
        out_specs=pl.BlockSpec((block[0], block[1]), lambda i, r, j: (i, r)),
        out_shape=jax.ShapeDtypeStruct((cotangent.shape[0], weight.shape[0]), cotangent.dtype),
        scratch_shapes=[pltpu.VMEM((block[0], block[1]), jnp.float32)],
        compiler_params=_params(),
        interpret=interpret,
        name="memopt_quantized_matmul_gradient",
    )(cotangent, weight.codes, _scales(weight, block[1]))


def _weight_specs(weight: QuantizedWeight, block, index):
    """Return the specs of codes and scales; the scales are `[blocks or groups, groups of a block, columns]`."""
    step = max(weight.group // block[1], 1)

    def scales_index(*grid):
        r, j = index(*grid)
        return r // step, 0, j

    rows = block[1] * weight.bits // 8
    groups = max(block[1] // weight.group, 1)
    return [pl.BlockSpec((rows, block[2]), index), pl.BlockSpec((1, groups, block[2]), scales_index)]


def _scales(weight: QuantizedWeight, rows: int) -> jax.Array:
    return weight.scales.reshape(-1, max(rows // weight.group, 1), weight.shape[1])


def _params():
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


# Kernels.


def _kernel(bits: int, unit: int, rounded: bool, x_ref, *refs):
    scale_ref, (codes_ref, scales_ref, out_ref, acc) = (refs[0], refs[1:]) if rounded else (None, refs)
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    x, codes, scales = x_ref[...], _codes(bits, unit, codes_ref), scales_ref[0]
    group = codes.shape[0] // scales.shape[0]
    if group < LANES:
        if rounded:
            x = x.astype(jnp.float32).astype(out_ref.dtype)
        acc[...] += _dot(x, _scaled(codes, scales, x.dtype), 0)
    else:
        for g in range(scales.shape[0]):
            part = slice(g * group, (g + 1) * group)
            acc[...] += _dot(x[:, part], _as(codes[part], x.dtype), 0) * scales[g : g + 1]

    @pl.when(step == steps - 1)
    def _():
        out = acc[...] if scale_ref is None else acc[...] * scale_ref[...]
        out_ref[...] = out.astype(out_ref.dtype)


def _gradient_kernel(bits: int, unit: int, cotangent_ref, codes_ref, scales_ref, out_ref, acc):
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    cotangent = cotangent_ref[...]
    acc[...] += _dot(cotangent, _scaled(_codes(bits, unit, codes_ref), scales_ref[0], cotangent.dtype), 1)

    @pl.when(step == steps - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)


def _codes(bits: int, unit: int, ref) -> jax.Array:
    return ref[...] if bits == 8 else unpack(ref[...], unit)


def _as(codes, dtype):
    """Return codes in the dtype of what they are multiplied with: all of them are exact in 8 bits and in bfloat16."""
    if dtype == jnp.int8:
        return codes.astype(jnp.int8)
    return codes.astype(jnp.float32).astype(dtype)


def _scaled(codes, scales, dtype):
    """Return a tile of the weight, each group of rows times its scale, rounded to the dtype of the product."""
    columns = codes.shape[1]
    grouped = codes.astype(jnp.float32).reshape(scales.shape[0], -1, columns)
    return (grouped * scales[:, None]).reshape(-1, columns).astype(dtype)


def _dot(a, b, b_axis: int):
    """Contract the last axis of `a`, in int32 for 8-bit codes and float32 for the rest, into float32."""
    numbers = (((1,), (b_axis,)), ((), ()))
    if a.dtype == jnp.int8:
        return lax.dot_general(a, b, numbers, preferred_element_type=jnp.int32).astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
