"""The type case of the codecs: blocks along the last axis, and several small codes in a byte.

In: shapes and arrays. Out: the view in which an array is encoded, its blocks, the scales' shape, packed bytes. No codec
and no rounding is here.

Everything is laid out for XLA:TPU, where the last two axes are tiled: blocks run along the last axis; scales of many
blocks stand with the rows last, so that a handful of blocks is not padded to 128 lanes; and what shares a byte comes
from equal halves (quarters, eighths) of one axis, so that packing slices whole tiles and never interleaves.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128
#: Rows in a tile of 8-bit numbers.
TILE_ROWS = 32


def is_float(dtype) -> bool:
    """Say whether a dtype is a real floating-point type."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def work_dtype(dtype) -> np.dtype:
    """Return the type in which arrays of this dtype are scaled: float64 for float64, else float32."""
    return np.dtype(np.float64) if np.dtype(dtype) == np.float64 else np.dtype(np.float32)


def view_shape(shape: tuple[int, ...], block: int | None) -> tuple[int, ...]:
    """Return the shape in which an array is encoded: trailing axes are merged where the last one is a short block.

    Args:
      shape: the array's shape; 0-D counts as one element.
      block: elements in a block, or None for whole rows.
    """
    shape = tuple(shape) or (1,)
    least = LANES if block is None else min(block, LANES)
    while len(shape) > 1 and shape[-1] < least:
        shape = (*shape[:-2], shape[-2] * shape[-1])
    return shape


def block_size(width: int, block: int | None) -> int:
    """Return the elements in a block of a row this wide, at least one."""
    return max(1, width if block is None else min(block, width))


def scale_shape(view: tuple[int, ...], block: int | None) -> tuple[int, ...]:
    """Return the shape in which one number for each block is stored: blocks before rows; a single block has no axis."""
    count = -(-view[-1] // block_size(view[-1], block))
    if count == 1:
        return view[:-1]
    return (*view[:-2], count, view[-2]) if len(view) > 1 else (count,)


def rows_of_block(view: tuple[int, ...], block: int) -> int | None:
    """Return how many rows a block that runs down the second last axis has; None where rows do not divide into tiles.

    It is a multiple of 32, the rows of a tile of bytes, so that taking blocks apart moves nothing on a TPU.
    """
    if len(view) < 2 or not view[-2] or view[-2] % TILE_ROWS:
        return None
    return max(rows for rows in range(TILE_ROWS, max(block, TILE_ROWS) + 1, TILE_ROWS) if view[-2] % rows == 0)


def to_blocks(x: jax.Array, block: int | None) -> jax.Array:
    """Return `[..., width]` as `[..., blocks, block]`, the last block filled up with its row's last element."""
    size = block_size(x.shape[-1], block)
    count = -(-x.shape[-1] // size)
    rest = count * size - x.shape[-1]
    if rest:
        x = jnp.concatenate([x, jnp.broadcast_to(x[..., -1:], (*x.shape[:-1], rest))], axis=-1)
    return x.reshape(*x.shape[:-1], count, size)


def from_blocks(blocks: jax.Array, width: int) -> jax.Array:
    """Undo `to_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])[..., :width]


def store_scales(scales: jax.Array) -> jax.Array:
    """Return `[..., rows, blocks, 1]` in the shape that is stored (`scale_shape`)."""
    scales = scales[..., 0]
    if scales.shape[-1] == 1:
        return scales[..., 0]
    return jnp.swapaxes(scales, -1, -2) if scales.ndim > 1 else scales


def load_scales(stored: jax.Array, view: tuple[int, ...], block: int | None) -> jax.Array:
    """Undo `store_scales`."""
    size = block_size(view[-1], block)
    if -(-view[-1] // size) == 1:
        return stored[..., None, None]
    return (jnp.swapaxes(stored, -1, -2) if stored.ndim > 1 else stored)[..., None]


def pack_axis(shape: tuple[int, ...], each: int) -> int:
    """Return the axis along which codes share bytes: one that divides evenly, the middle ones first.

    A middle axis is neither the batch, which is often sharded, nor the lanes. The last one is taken next if what is
    left still fills the lanes, then the first.
    """
    order = [*range(1, len(shape) - 1), len(shape) - 1, 0]
    for axis in order:
        least = each * LANES if axis == len(shape) - 1 and len(shape) > 1 else each
        if shape[axis] % least == 0 and shape[axis]:
            return axis
    return int(np.argmax(shape))


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Return the shape of `pack`'s bytes."""
    if bits == 8 or not math.prod(shape):
        return tuple(shape)
    axis = pack_axis(shape, 8 // bits)
    return (*shape[:axis], -(-shape[axis] // (8 // bits)), *shape[axis + 1 :])


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Return unsigned codes below `2**bits` with `8 // bits` of them in a byte.

    Args:
      codes: uint8 of any shape with an axis.
      bits: 1, 2, 4 or 8.
    """
    return codes if bits == 8 or not codes.size else _pack(codes, bits, pack_axis(codes.shape, 8 // bits))


def _pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    each = 8 // bits
    part = -(-codes.shape[axis] // each)
    rest = part * each - codes.shape[axis]
    if rest:
        codes = jnp.pad(codes, [(0, rest if i == axis else 0) for i in range(codes.ndim)])
    parts = [jax.lax.slice_in_dim(codes, i * part, (i + 1) * part, axis=axis) for i in range(each)]
    packed = parts[0]
    for i, one in enumerate(parts[1:], 1):
        packed = packed | (one << np.uint8(i * bits))
    return packed


def unpack(packed: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """Undo `pack` for codes of this shape."""
    if bits == 8 or not math.prod(shape):
        return packed
    axis = pack_axis(shape, 8 // bits)
    return _unpack(packed, bits, axis, shape[axis])


def _unpack(packed: jax.Array, bits: int, axis: int, size: int) -> jax.Array:
    mask = np.uint8(2**bits - 1)
    parts = [(packed >> np.uint8(i * bits)) & mask for i in range(8 // bits)]
    return jax.lax.slice_in_dim(jnp.concatenate(parts, axis=axis), 0, size, axis=axis)


def pack_apart(codes: jax.Array, bits: int, view: tuple[int, ...]) -> jax.Array:
    """Return what `pack` does of codes whose blocks of rows have an axis of their own: `[..., blocks, rows, width]`."""
    axis = _axis_apart(codes.shape[-3], bits, view) if bits < 8 else None
    if axis is None:
        return pack(codes.reshape(view), bits)
    return _pack(codes, bits, axis).reshape(packed_shape(view, bits))


def unpack_apart(packed: jax.Array, bits: int, view: tuple[int, ...], rows: int, hold: bool) -> jax.Array:
    """Undo `pack_apart`; `hold` says that what reads the codes works in this shape too."""
    shape = (*view[:-2], view[-2] // rows, rows, view[-1])
    axis = _axis_apart(shape[-3], bits, view) if bits < 8 else None
    if axis is None:
        codes = unpack(packed, bits, view)
        return held_apart(codes, shape) if hold else codes.reshape(shape)
    halves = (*shape[:axis], shape[axis] * bits // 8, *shape[axis + 1 :])
    return _unpack(held_apart(packed, halves) if hold else packed.reshape(halves), bits, axis, shape[axis])


def held_apart(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return an array in another shape, and hold it there: XLA would work in its own, and write out spread scales."""
    return x if x.shape == shape else jax.lax.optimization_barrier(x.reshape(shape))


def _axis_apart(blocks: int, bits: int, view: tuple[int, ...]) -> int | None:
    """Return the axis along which codes with blocks of rows apart share bytes; None where a byte would span blocks."""
    each = 8 // bits
    axis = pack_axis(view, each)
    if view[axis] % each:
        return None
    if axis == len(view) - 2:
        return axis if blocks % each == 0 else None
    return axis if axis < len(view) - 2 else axis + 1


def finite_range(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return smallest and largest finite value, and whether one is not finite, over axes that are kept with size 1."""
    finite = jnp.isfinite(x)
    none = np.array(0, x.dtype)
    low = jnp.min(jnp.where(finite, x, np.inf), axes, keepdims=True, initial=np.inf)
    high = jnp.max(jnp.where(finite, x, -np.inf), axes, keepdims=True, initial=-np.inf)
    special = ~jnp.all(finite, axes, keepdims=True)
    return jnp.where(jnp.isfinite(low), low, none), jnp.where(jnp.isfinite(high), high, none), special


def largest_finite(x: jax.Array, axes: tuple[int, ...], least: float, nonnegative: bool = False) -> jax.Array:
    """Return the largest finite magnitude, negative where a value is not finite; axes are kept with size 1.

    It is one reduction of two operands, for XLA:TPU to fuse what makes `x` into it: with several, it writes `x` out.

    Args:
      x: array of floats.
      axes: what to reduce, none of them negative.
      least: the least magnitude to return.
      nonnegative: take negative numbers as zero.
    """
    zero, one = x.dtype.type(0), x.dtype.type(1)
    finite = jnp.isfinite(x)
    operands = jnp.where(finite, x if nonnegative else jnp.abs(x), zero), jnp.where(finite, zero, one)
    most, special = jax.lax.reduce(operands, (zero, zero), lambda a, b: tuple(map(jnp.maximum, a, b)), axes)
    most = jnp.maximum(jnp.expand_dims(most, axes), x.dtype.type(least))
    return jnp.where(jnp.expand_dims(special, axes) > 0, -most, most)


def inside(x: jax.Array, dtype) -> jax.Array:
    """Return values clipped to what a dtype can hold as a finite number."""
    most = np.array(jnp.finfo(dtype).max, x.dtype)
    return jnp.clip(x, -most, most)


def divide(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `x / scale` for any positive scale, where a compiler may take its reciprocal, which could underflow."""
    small = jnp.where(scale > 1e30, scale.dtype.type(2.0**-40), scale.dtype.type(1))
    return (x * small) / (scale * small)


def uniform(x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return float32 noise in [0, 1) of an array's shape: from a key, or hashed from each value and its position.

    The hash needs no state and gives the same noise each time, so an encoder under a plan stays a pure function.
    """
    if key is not None:
        return jax.random.uniform(key, x.shape, jnp.float32)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * np.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = bits ^ (place * np.uint32(0x85EBCA6B))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return (mixed >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
