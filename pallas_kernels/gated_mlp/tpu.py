"""Gated activations and gated MLPs for TPUs (Mosaic): hidden activations of an MLP exist in VMEM alone.

In: gate and up, or rows and three weights; a cotangent. Out: the result, or the gradients. Forward, a block of rows
stays while blocks of hidden units pass. Backward, where VMEM holds the gradient of all rows (`HELD_BYTES`), one kernel
makes all four gradients and the hidden activations once more; else there is a kernel for the rows and one for the
weights, and hidden activations are made twice more.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .activations import Activation, value, value_and_slope
from .lean import product

LANES = 128
VMEM_BYTES = 60 * 2**20
HELD_BYTES = 16 * 2**20  # of float32: the gradient of 2,048 rows of a width of 2,048


# The activation alone: gate and up are [rows, hidden].


def gated_problem(activation: Activation, gate, up, blocks: tuple[int, int] | None) -> str | None:
    """Say why the kernels of the activation cannot serve a call, or None where they can."""
    if any(x.dtype not in (jnp.bfloat16, jnp.float32) for x in (gate, up)):
        return f"{gate.dtype} gates: bfloat16 and float32 are served"
    if gate.shape[1] % LANES or not gate.shape[0]:
        return f"{gate.shape}: widths that are multiples of {LANES} are served"
    if blocks and (blocks[0] % 16 or blocks[1] % LANES):
        return f"blocks of {blocks}: multiples of 16 and {LANES} are needed"
    return None


def gated(activation: Activation, gate, up, blocks: tuple[int, int] | None = None, interpret: bool = False):
    """Return `activation(gate) * up`, both `[rows, hidden]`."""
    return _elementwise(_gated_kernel, activation, [gate, up], [gate], blocks, interpret, "memopt_gated")[0]


def gated_gradients(activation: Activation, gate, up, cotangent, blocks=None, interpret: bool = False):
    """Return the gradients of gate and up."""
    operands, name = [gate, up, cotangent], "memopt_gated_gradients"
    return tuple(_elementwise(_gated_gradient_kernel, activation, operands, [gate, up], blocks, interpret, name))


def _elementwise(kernel, activation, operands, like, blocks, interpret: bool, name: str):
    shape = operands[0].shape
    rows, columns = blocks or (min(256, -(-shape[0] // 16) * 16), _dividing(shape[1], 1024))
    spec = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    return pl.pallas_call(
        functools.partial(kernel, activation),
        grid=(pl.cdiv(shape[0], rows), pl.cdiv(shape[1], columns)),
        in_specs=[spec] * len(operands),
        out_specs=[spec] * len(like),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=name,
    )(*operands)


def _gated_kernel(activation, gate_ref, up_ref, out_ref):
    z, u = (ref[...].astype(jnp.float32) for ref in (gate_ref, up_ref))
    out_ref[...] = (value(activation, z) * u).astype(out_ref.dtype)


def _gated_gradient_kernel(activation, gate_ref, up_ref, cotangent_ref, dgate_ref, dup_ref):
    z, u, g = (ref[...].astype(jnp.float32) for ref in (gate_ref, up_ref, cotangent_ref))
    a, slope = value_and_slope(activation, z)
    dgate_ref[...] = (g * u * slope).astype(dgate_ref.dtype)
    dup_ref[...] = (g * a).astype(dup_ref.dtype)


# The whole MLP: x [tokens, dim], gate and up [dim, hidden], down [hidden, out].


def block_sizes(tokens: int, dim: int, hidden: int, device: str = "tpu") -> tuple[int, int]:
    """Choose `(tokens, hidden units)` of a tile: a pure function of shape; all TPUs from v5e on are treated alike.

    Example:
        >>> block_sizes(2048, 2048, 8192)
        (512, 256)
    """
    limit = 512 if dim <= 1024 else 256 if dim <= 2048 else 128
    return min(512 if dim <= 2048 else 256, -(-tokens // 16) * 16), _dividing(hidden, limit)


def _dividing(size: int, limit: int) -> int:
    return next(n for n in (1024, 512, 256, 128) if n <= limit and size % n == 0)


def problem(activation: Activation, x, gate, up, down, blocks: tuple[int, int] | None) -> str | None:
    """Say why the kernels of the whole MLP cannot serve a call, or None where they can."""
    operands = (x, gate, up, down)
    if x.dtype not in (jnp.bfloat16, jnp.float32) or len({a.dtype for a in operands}) != 1:
        return f"operands of {sorted({str(a.dtype) for a in operands})}: all bfloat16 or all float32 are served"
    sizes = (*gate.shape, down.shape[1])
    if any(size % LANES for size in sizes) or max(sizes[0], sizes[2]) > 4096 or not x.shape[0]:
        return f"a width of {sizes[0]} to {sizes[2]} over {sizes[1]}: multiples of {LANES}, up to 4,096, are served"
    if x.dtype == jnp.float32 and max(sizes[0], sizes[2]) > 2048:
        return f"float32 rows of a width of {max(sizes[0], sizes[2])}: up to 2,048 is served"
    if blocks and (blocks[0] % 16 or blocks[1] % LANES or sizes[1] % blocks[1]):
        return f"blocks of {blocks}: multiples of 16, and of {LANES} that divide {sizes[1]}, are needed"
    return None


def mlp(activation: Activation, x, gate, up, down, blocks=None, interpret: bool = False) -> jax.Array:
    """Return the gated MLP from one kernel; arguments and result as in `reference.mlp`."""
    (tokens, dim), out = x.shape, down.shape[1]
    block = blocks or block_sizes(tokens, max(dim, out), gate.shape[1])
    return pl.pallas_call(
        functools.partial(_mlp_kernel, activation),
        grid=(pl.cdiv(tokens, block[0]), gate.shape[1] // block[1]),
        in_specs=[pl.BlockSpec((block[0], dim), lambda i, j: (i, 0)), *_weights(block, dim, out, 1)],
        out_specs=pl.BlockSpec((block[0], out), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((tokens, out), x.dtype),
        scratch_shapes=[pltpu.VMEM((block[0], out), jnp.float32)],
        compiler_params=_params("parallel"),
        interpret=interpret,
        name="memopt_gated_mlp",
    )(x, gate, up, down)


def mlp_gradients(activation: Activation, x, gate, up, down, cotangent, blocks=None, interpret: bool = False):
    """Return the gradients of rows and weights; arguments and results as in `lean.mlp_gradients`."""
    (tokens, dim), out = x.shape, down.shape[1]
    block = blocks or block_sizes(tokens, max(dim, out), gate.shape[1])
    grid = gate.shape[1] // block[1], pl.cdiv(tokens, block[0])
    operands = x, cotangent, gate, up, down
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, gate, up, down)]
    held = grid[1] * block[0] * dim * 4
    if held <= HELD_BYTES:
        return tuple(_all_gradients(activation, block, grid, operands, shapes, interpret))
    dx = _row_gradient(activation, block, grid[::-1], operands, shapes[0], interpret)
    return dx, *_weight_gradients(activation, block, grid, operands, shapes[1:], interpret)


def _all_gradients(activation, block, grid, operands, shapes, interpret: bool):
    (tokens, dim), out = operands[0].shape, operands[4].shape[1]
    last = grid[0] - 1
    # The block of the rows' gradient stays in place until the last hidden units, which finish one after another.
    rows = pl.BlockSpec((block[0], dim), lambda j, i: (jnp.where(j == last, i, 0), 0))
    return pl.pallas_call(
        functools.partial(_all_kernel, activation, tokens),
        grid=grid,
        in_specs=[*_rows(block, dim, out, 1), *_weights(block, dim, out, 0)],
        out_specs=[rows, *_weights(block, dim, out, 0)],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((grid[1], block[0], dim), jnp.float32), *_sums(block, dim, out)],
        compiler_params=_params("arbitrary"),
        interpret=interpret,
        name="memopt_gated_mlp_gradients",
    )(*operands)


def _row_gradient(activation, block, grid, operands, shape, interpret: bool):
    dim, out = operands[0].shape[1], operands[4].shape[1]
    return pl.pallas_call(
        functools.partial(_row_kernel, activation),
        grid=grid,
        in_specs=[*_rows(block, dim, out, 0), *_weights(block, dim, out, 1)],
        out_specs=pl.BlockSpec((block[0], dim), lambda i, j: (i, 0)),
        out_shape=shape,
        scratch_shapes=[pltpu.VMEM((block[0], dim), jnp.float32)],
        compiler_params=_params("parallel"),
        interpret=interpret,
        name="memopt_gated_mlp_dx",
    )(*operands)


def _weight_gradients(activation, block, grid, operands, shapes, interpret: bool):
    (tokens, dim), out = operands[0].shape, operands[4].shape[1]
    return pl.pallas_call(
        functools.partial(_weight_kernel, activation, tokens),
        grid=grid,
        in_specs=[*_rows(block, dim, out, 1), *_weights(block, dim, out, 0)],
        out_specs=_weights(block, dim, out, 0),
        out_shape=shapes,
        scratch_shapes=_sums(block, dim, out),
        compiler_params=_params("parallel"),
        interpret=interpret,
        name="memopt_gated_mlp_dweights",
    )(*operands)


def _rows(block, dim: int, out: int, axis: int):
    return [pl.BlockSpec((block[0], size), lambda *grid: (grid[axis], 0)) for size in (dim, out)]


def _weights(block, dim: int, out: int, axis: int):
    wide = pl.BlockSpec((dim, block[1]), lambda *grid: (0, grid[axis]))
    return [wide, wide, pl.BlockSpec((block[1], out), lambda *grid: (grid[axis], 0))]


def _sums(block, dim: int, out: int):
    return [pltpu.VMEM(shape, jnp.float32) for shape in ((dim, block[1]), (dim, block[1]), (block[1], out))]


def _params(outer: str):
    return pltpu.CompilerParams(dimension_semantics=(outer, "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


# Kernels of the whole MLP.


def _mlp_kernel(activation, x_ref, gate_ref, up_ref, down_ref, out_ref, acc):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    x = x_ref[...]
    hidden = value(activation, product(x, gate_ref[...], 1, 0)) * product(x, up_ref[...], 1, 0)
    acc[...] += product(hidden.astype(x.dtype), down_ref[...], 1, 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)


def _tile(activation, x, g, gate_ref, up_ref, down_ref):
    """Return hidden activations and the gradients of gate and up, in the dtype of the rows."""
    a, slope = value_and_slope(activation, product(x, gate_ref[...], 1, 0))
    u, dh = product(x, up_ref[...], 1, 0), product(g, down_ref[...], 1, 1)
    return tuple(part.astype(x.dtype) for part in (a * u, dh * u * slope, dh * a))


def _row_kernel(activation, x_ref, cotangent_ref, gate_ref, up_ref, down_ref, dx_ref, acc):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    _, dz, du = _tile(activation, x_ref[...], cotangent_ref[...], gate_ref, up_ref, down_ref)
    acc[...] += product(dz, gate_ref[...], 1, 1) + product(du, up_ref[...], 1, 1)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        dx_ref[...] = acc[...].astype(dx_ref.dtype)


def _weight_kernel(activation, tokens: int, *refs):
    x_ref, cotangent_ref, gate_ref, up_ref, down_ref, *outs = refs
    _add_weights(activation, tokens, x_ref, cotangent_ref, (gate_ref, up_ref, down_ref), outs[3:])
    _finish(outs[:3], outs[3:])


def _all_kernel(activation, tokens: int, *refs):
    x_ref, cotangent_ref, gate_ref, up_ref, down_ref, dx_ref, *outs = refs
    (held, *sums), outs = outs[3:], outs[:3]
    j, i = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        held[i] = jnp.zeros(held.shape[1:], held.dtype)

    dz, du = _add_weights(activation, tokens, x_ref, cotangent_ref, (gate_ref, up_ref, down_ref), sums)
    held[i] += product(dz, gate_ref[...], 1, 1) + product(du, up_ref[...], 1, 1)
    _finish(outs, sums)

    @pl.when(j == pl.num_programs(0) - 1)
    def _():
        dx_ref[...] = held[i].astype(dx_ref.dtype)


def _add_weights(activation, tokens: int, x_ref, cotangent_ref, weights, sums):
    """Add the part of a block of rows to the weights' gradients, and return the gradients of gate and up."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    x, g = (_within(ref[...], tokens) for ref in (x_ref, cotangent_ref))
    hidden, dz, du = _tile(activation, x, g, *weights)
    for ref, (a, b) in zip(sums, ((x, dz), (x, du), (hidden, g)), strict=True):
        ref[...] += product(a, b, 0, 0)
    return dz, du


def _finish(outs, sums) -> None:
    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        for out, ref in zip(outs, sums, strict=True):
            out[...] = ref[...].astype(out.dtype)


def _within(x, tokens: int):
    """Return a block with the rows that lie past the end of the array set to zero."""
    if tokens % x.shape[0] == 0:
        return x
    row = pl.program_id(1) * x.shape[0] + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < tokens, x, jnp.zeros_like(x))
