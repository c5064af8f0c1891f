"""Block-wise codes and Adam on them for TPUs (Mosaic): moments exist in float32 in VMEM alone, a tile at a time.

In: arrays `[batch, rows, width]`, codes and scales. Out: as in `reference`. A tile is some rows of one block of
columns, so that a scale is the maximum of a row of the tile; codes and scales of an Adam step are written in place.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import codes
from .reference import Spec, scalars

LANES = 128
VMEM_BYTES = 48 * 2**20


def block_rows(rows: int, block: int, device: str = "tpu") -> int:
    """Choose how many rows a tile has: 128, or all where there are fewer; all TPUs from v5e on are treated alike.

    Example:
        >>> block_rows(8192, 2048), block_rows(40, 2048)
        (128, 40)
    """
    return rows if rows <= LANES else LANES


def problem(x, block: int) -> str | None:
    """Say why these kernels cannot serve an array `[batch, rows, width]`, or None where they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32, jnp.uint8):
        return f"{x.dtype} values: bfloat16 and float32 are served"
    if not x.size or x.shape[1] < 8:
        return f"{x.shape[1]} rows: 8 or more are served"
    if block > 4096 or (block % LANES and block < x.shape[2]):
        return f"blocks of {block} elements: multiples of {LANES} up to 4,096, or whole rows, are served"
    return None


def quantize(spec: Spec, x: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return uint8 codes and float32 scales from one kernel; `interpret` runs it on a CPU."""
    call = _call(functools.partial(_quantize_kernel, spec, x.shape[2]), x, spec.block, interpret)
    return _unpacked(*call(["values"], ["codes", "scales"], "memopt_quantize_blocks")(x))


def dequantize(spec: Spec, code: jax.Array, scale: jax.Array, interpret: bool = False) -> jax.Array:
    """Return float32 `[batch, rows, width]` from one kernel."""
    call = _call(functools.partial(_dequantize_kernel, spec), code, spec.block, interpret)
    (out,) = call(["codes", "scales"], ["floats"], "memopt_dequantize_blocks")(_signed(code), scale[:, :, None])
    return out


def adam(block: int, gradient, mu, nu, count: Any, b1: Any, b2: Any, eps: Any, interpret: bool = False):
    """Return the update and both moments after one Adam step, from one kernel."""
    call = _call(functools.partial(_adam_kernel, block, gradient.shape[2]), gradient, block, interpret)
    moments, settings = ["codes", "scales"] * 2, scalars(count, b1, b2, eps)
    operands = [part for moment in (mu, nu) for part in (_signed(moment[0]), moment[1][:, :, None])]
    aliases = {2: 1, 3: 2, 4: 3, 5: 4}
    run = call(["settings", "values", *moments], ["values", *moments], "memopt_adam_8bit", aliases)
    update, *moments = run(settings, gradient, *operands)
    return update, _unpacked(*moments[:2]), _unpacked(*moments[2:])


def _signed(code: jax.Array) -> jax.Array:
    """Return bytes as kernels take them."""
    return lax.bitcast_convert_type(code, jnp.int8)


def _unpacked(code: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.bitcast_convert_type(code, jnp.uint8), scale[:, :, 0]


def _call(kernel, like, block: int, interpret: bool):
    """Return a function that makes a call of a kernel over tiles from the names of its operands and results."""
    (batch, rows, width), count = like.shape, pl.cdiv(like.shape[2], block)
    tile = block_rows(rows, block), min(block, width)
    whole = pl.BlockSpec((None, *tile), lambda b, i, j: (b, i, j))
    specs = {
        "values": whole,
        "floats": whole,
        "codes": whole,
        "scales": pl.BlockSpec((None, None, 1, tile[0]), lambda b, i, j: (b, j, 0, i)),
        "settings": pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    shapes = {
        "values": jax.ShapeDtypeStruct(like.shape, like.dtype),
        "floats": jax.ShapeDtypeStruct(like.shape, jnp.float32),
        "codes": jax.ShapeDtypeStruct(like.shape, jnp.int8),
        "scales": jax.ShapeDtypeStruct((batch, count, 1, rows), jnp.float32),
    }

    def make(operands: list[str], results: list[str], name: str, aliases: dict[int, int] | None = None):
        return pl.pallas_call(
            kernel,
            grid=(batch, pl.cdiv(rows, tile[0]), count),
            in_specs=[specs[key] for key in operands],
            out_specs=[specs[key] for key in results],
            out_shape=[shapes[key] for key in results],
            input_output_aliases=aliases or {},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpret,
            name=name,
        )

    return make


# Kernels.


def _quantize_kernel(spec: Spec, width: int, x_ref, code_ref, scale_ref):
    _write(spec, width, x_ref[...].astype(jnp.float32), code_ref, scale_ref)


def _dequantize_kernel(spec: Spec, code_ref, scale_ref, out_ref):
    out_ref[...] = _read(spec, code_ref, scale_ref)


def _adam_kernel(block: int, width: int, settings_ref, gradient_ref, *refs):
    (mu_ref, mu_scale_ref, nu_ref, nu_scale_ref), (out_ref, *new) = refs[:4], refs[4:]
    b1, b2, eps, one, two = (settings_ref[i] for i in range(5))
    signed, unsigned = Spec(block, True), Spec(block, False)
    g = gradient_ref[...].astype(jnp.float32)
    mu = b1 * _read(signed, mu_ref, mu_scale_ref) + (1 - b1) * g
    nu = b2 * _read(unsigned, nu_ref, nu_scale_ref) + (1 - b2) * (g * g)
    out_ref[...] = (mu / one / (jnp.sqrt(nu / two) + eps)).astype(out_ref.dtype)
    _write(signed, width, mu, *new[:2])
    _write(unsigned, width, nu, *new[2:])


def _read(spec: Spec, code_ref, scale_ref) -> jax.Array:
    code = code_ref[...].astype(jnp.int32)
    code = jnp.where(code < 0, code + 256, code).astype(jnp.float32)
    return codes.decode(code, _as_column(scale_ref[...]), spec.signed)


def _write(spec: Spec, width: int, x, code_ref, scale_ref) -> None:
    if width % x.shape[1]:
        # Columns past the end of a row hold anything; they are no part of its last block.
        column = pl.program_id(2) * x.shape[1] + lax.broadcasted_iota(jnp.int32, x.shape, 1)
        x = jnp.where(column < width, x, jnp.zeros_like(x))
    scale = codes.scales(x, 1)
    code = codes.encode(x, scale, spec.signed).astype(jnp.int32)
    code_ref[...] = jnp.where(code > 127, code - 256, code).astype(jnp.int8)
    scale_ref[...] = _as_row(scale)


def _as_column(row) -> jax.Array:
    """`[1, rows]` to `[rows, 1]`."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _as_row(column) -> jax.Array:
    """`[rows, 1]` to `[1, rows]`."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
