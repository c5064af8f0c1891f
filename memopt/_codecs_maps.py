"""Codes whose spacing grows with magnitude: the dynamic map of 8-bit and 4-bit optimizer states, and the linear map
without zero, with a scale for each block or from rows and columns together.

In: an array of floats. Out: an `Encoded`. Values and codes are computed, not looked up: a gather from a table of 256 is
slow on a TPU, comparing with a few decades is not.

The dynamic map has, with `n` bits, decades `10**-e`, each cut into twice as many equal cells as the next smaller one; a
code stands for the middle of its cell. One more code each is 0 and 1. What is encoded is a value divided by its scale.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, sections 2 and 3 (dynamic tree
quantization, blocks of 2,048; the unsigned map turns the sign's bit into one more of the fraction); Li et al., "Memory
Efficient Optimizers with 4-bit States", NeurIPS 2023, section 4 (blocks of 128, rank-1 normalisation, maps without
zero).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _codecs_blocks as b
from memopt._codec import Encoded, struct
from memopt._codecs_mapped import Mapped


def _decades(bits: int, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each decade's start, cell width and number of cells, from the smallest decade to the largest."""
    exponents = np.arange(bits - 1)
    cells = 2 ** (exponents + (0 if signed else 1))
    power = 10.0 ** (exponents - (bits - 2))
    return 0.1 * power, 0.9 * power / cells, cells


def dynamic_values(bits: int, signed: bool) -> np.ndarray:
    """Return the values of the dynamic map in ascending order, by code: float64[2**bits].

    Example:
      >>> dynamic_values(4, signed=False)[[0, -2, -1]].tolist()
      [0.0, 0.94375, 1.0]
    """
    start, width, cells = _decades(bits, signed)
    made = [s + w * (np.arange(n) + 0.5) for s, w, n in zip(start, width, cells, strict=True)]
    positive = np.concatenate(made)
    negative = -positive[::-1] if signed else positive[:0]
    return np.concatenate([negative, [0.0], positive, [1.0]])


def _dynamic_rank(size: jax.Array, bits: int, signed: bool) -> jax.Array:
    """Return the nearest code of magnitudes in [0, 1]: 0 is zero, the last one is 1, as numbers of the same dtype.

    A decade is chosen first and one rank worked out in it: operations for each decade would be half of what XLA:TPU
    compiles in an optimizer's update. A decade of `n` cells starts at rank `n` (unsigned: `n - 1`), at `n / 9` cells.
    """
    start, width, cells = _decades(bits, signed)
    kind = size.dtype.type
    borders = (np.concatenate([[0.0], (start + width * (cells - 0.5))[:-1]]) + start + width / 2) / 2
    per, count = kind(1 / width[0]), kind(cells[0])
    for border, cell, n in list(zip(borders, width, cells, strict=True))[1:]:
        later = size > kind(border)  # halfway between this decade's first value and the one before
        per, count = jnp.where(later, kind(1 / cell), per), jnp.where(later, kind(n), count)
    inside = jnp.clip(jnp.floor(size * per - count * kind(1 / 9)), 0, count - 1)
    rank = jnp.where(size > kind(borders[0]), inside + count - kind(0 if signed else 1), 0)
    top = (start[-1] + width[-1] * (cells[-1] - 0.5) + 1.0) / 2
    return jnp.where(size > kind(top), kind(sum(cells) + 1), rank)


def _dynamic_value(rank: jax.Array, bits: int, signed: bool) -> jax.Array:
    """Undo `_dynamic_rank`, but for rank 0, which is not looked at.

    A decade of `n = 2**e` cells starts at rank `n` (unsigned: `n - 1`), so that the float `rank + 1/2` (or 3/2) has the
    decade in its exponent and the place in it in its mantissa: selections for each decade compile more slowly.
    """
    kind, info = rank.dtype.type, jnp.finfo(rank.dtype)
    one = np.ones((), rank.dtype).view(f"int{info.bits}")[()]
    word = jax.lax.bitcast_convert_type(rank + kind(0.5 if signed else 1.5), one.dtype)
    mantissa = jax.lax.bitcast_convert_type(word & (2**info.nmant - 1) | one, rank.dtype)
    decade = (word >> info.nmant) - ((one >> info.nmant) + (0 if signed else 1))
    power = jnp.round(jnp.exp(decade.astype(rank.dtype) * kind(np.log(10))))
    least = 10.0 ** (2 - bits)
    return jnp.minimum(power * (mantissa * kind(0.9 * least) - kind(0.8 * least)), 1)  # the last rank is a cell beyond


@dataclasses.dataclass(frozen=True)
class Dynamic(Mapped):
    """The dynamic map of 8-bit (or 4-bit) optimizer states, block-wise.

    A float32 array falls to `bits / 32 + 1 / block` of its bytes. The error is relative to the block's largest finite
    magnitude, and far smaller for small values: half a cell of their own decade. A block that is not all finite gives
    up the three codes above zero. The unsigned map takes negative numbers as zero.

    Args:
      bits: 8 or 4.
      signed: for first moments; unsigned for second ones, with twice as many codes for positive values.
      block: elements that share a scale, along the last axis (a shorter row is one block); None is the whole row.
      down: let blocks run down the second last axis where rows are longer than a block: XLA:TPU writes out in full the
        scales of several blocks in a row. Where rows are no multiple of 32, blocks run along the last axis.

    Example:
      >>> codec = Dynamic(8, signed=False)
      >>> codec.decode(codec.encode(np.float32([1.0, 0.0]))).tolist()
      [1.0, 0.0]
    """

    bits: int = 8
    signed: bool = True
    block: int | None = 2048
    down: bool = False

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"The dynamic map has 4 or 8 bits, not {self.bits}.")
        if self.block is not None and self.block < 1:
            raise ValueError(f"A block has at least one element, not {self.block}.")

    @property
    def name(self) -> str:
        """Such as `dynamic8-unsigned`."""
        usual = 2048 if self.bits == 8 else 128
        block = "" if self.block == usual else "-row" if self.block is None else f"-block{self.block}"
        return f"dynamic{self.bits}{'' if self.signed else '-unsigned'}{block}{'-down' if self.down else ''}"

    @property
    def error(self) -> float:
        """The largest gap that a value can fall into, half of it: signed, from the last negative value to -1."""
        values = dynamic_values(self.bits, self.signed)
        return float(max(np.max(np.diff(values)) / 2, 1.0 + values[0] if self.signed else 0.0))

    def for_state(self):
        """Return it with blocks that run down: XLA:TPU writes the scales of several blocks in a row out in full."""
        return dataclasses.replace(self, down=True)

    def layout(self, shape, dtype) -> Encoded:
        """Return bytes of codes and a scale a block."""
        view = b.view_shape(shape, self.block)
        rows = self.rows_apart(shape)
        scales = b.scale_shape(view, self.block) if rows is None else (*view[:-2], view[-2] // rows, view[-1])
        return struct(self, shape, dtype, (b.packed_shape(view, self.bits), np.uint8), (scales, b.work_dtype(dtype)))

    def rows_apart(self, shape):
        """Return the rows of a block that runs down them; None where blocks run along the last axis."""
        view = b.view_shape(shape, self.block)
        if not self.down or self.block is None or view[-1] <= self.block:
            return None
        return b.rows_of_block(view, self.block)

    def _codes(self, ratio):
        rank = _dynamic_rank(jnp.abs(ratio) if self.signed else jnp.maximum(ratio, 0), self.bits, self.signed)
        if not self.signed:
            return rank
        zero = 2 ** (self.bits - 1) - 1
        return zero + jnp.where(ratio < 0, -jnp.minimum(rank, zero), rank)

    def _values(self, codes):
        if not self.signed:
            return jnp.where(codes > 0, _dynamic_value(codes, self.bits, False), 0)
        rank = codes - (2 ** (self.bits - 1) - 1)
        return jnp.sign(rank) * _dynamic_value(jnp.abs(rank), self.bits, True)

    def _measure(self, x, shape, rows):
        blocks, axis = self._blocks(x, shape)
        scale = b.largest_finite(blocks, (axis,), jnp.finfo(jnp.float32).tiny)
        return (b.store_scales(scale) if self.rows_apart(shape) is None else jnp.squeeze(scale, axis),)

    def _write(self, x, scales, shape, rows):
        (blocks, _), scale = self._blocks(x, shape), self._spread(scales, shape)
        q = self._codes(jnp.where(jnp.isfinite(blocks), b.divide(blocks, jnp.abs(scale)), 0))
        q = self._mark(q, blocks, scale < 0).astype(jnp.uint8)
        view = b.view_shape(shape, self.block)
        if self.rows_apart(shape) is None:
            return b.pack(b.from_blocks(q, view[-1]), self.bits)
        return b.pack_apart(q, self.bits, view)

    def _read(self, encoded, rows):
        shape, own = encoded.shape, self.rows_apart(encoded.shape)
        view, scale = b.view_shape(shape, self.block), self._spread(encoded.scales, shape)
        if own is None:
            q = b.to_blocks(b.unpack(encoded.codes, self.bits, view), self.block)
        else:
            q = b.unpack_apart(encoded.codes, self.bits, view, own, hold=rows is not None)
        q = q.astype(b.work_dtype(encoded.dtype))
        value = self._unmark(b.inside(self._values(q) * jnp.abs(scale), encoded.dtype), q, scale < 0)
        return (b.from_blocks(value, view[-1]) if own is None else value).reshape(self.apart(shape, rows))

    def _blocks(self, x: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, int]:
        """Return an array with its blocks apart, in the precision of scales, and the axis along which they run."""
        x, rows = x.astype(b.work_dtype(x.dtype)), self.rows_apart(shape)
        if rows is None:
            blocks = b.to_blocks(x.reshape(b.view_shape(shape, self.block)), self.block)
            return blocks, blocks.ndim - 1
        return x.reshape(self.apart(shape, rows)), len(b.view_shape(shape, self.block)) - 1

    def _spread(self, scales: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
        """Return stored scales in a shape that broadcasts to the blocks."""
        if self.rows_apart(shape) is None:
            return b.load_scales(scales[0], b.view_shape(shape, self.block), self.block)
        return jnp.expand_dims(scales[0], -2)


@dataclasses.dataclass(frozen=True)
class RankOne(Mapped):
    """4-bit codes of nonnegative values, without a code for zero, scaled by the smaller of row and column maximum.

    For second moments: a zero there would divide by nothing, so the smallest code is 1/16 of the scale. A float32
    matrix falls to `1 / 8` of its bytes plus one row and one column. The error is relative to the element's own scale:
    half a step, and `1 / 16` for what lies below the smallest code. Axes before the last two (a scan's stack) have
    their own rows and columns; trailing axes are merged into rows of at least 128; 1-D arrays are scaled by blocks of
    128. Negative values are taken as the smallest code. Where rows and columns with values that are not finite cross,
    three codes are given up, and finite values may be off by `7 / 32`.

    Args:
      bits: 4 or 8.

    Example:
      >>> codec = RankOne()
      >>> codec.decode(codec.encode(np.float32([[1.0, 0.5], [0.25, 0.0625]]))).tolist()
      [[1.0, 0.5], [0.25, 0.0625]]
    """

    bits: int = 4
    signed = False
    block = 128

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"The map without zero has 4 or 8 bits, not {self.bits}.")

    @property
    def name(self) -> str:
        """`rank1-linear4`."""
        return f"rank1-linear{self.bits}"

    @property
    def error(self) -> float:
        """One step: what is nearly zero becomes the smallest code."""
        return 2.0**-self.bits

    def layout(self, shape, dtype) -> Encoded:
        """Return bytes of codes, and the maxima of rows and of columns, or of blocks."""
        view, work = b.view_shape(shape, None), b.work_dtype(dtype)
        codes = (b.packed_shape(view, self.bits), np.uint8)
        if len(view) == 1:
            return struct(self, shape, dtype, codes, (b.scale_shape(view, self.block), work))
        return struct(self, shape, dtype, codes, (view[:-1], work), ((*view[:-2], view[-1]), work))

    def _codes(self, ratio):
        levels = 2**self.bits
        return jnp.clip(jnp.round(ratio * levels) - 1, 0, levels - 1)

    def _values(self, codes):
        return (codes + 1) * codes.dtype.type(2.0**-self.bits)

    def _measure(self, x, shape, rows):
        x = self._wide(x, shape, rows)
        view = b.view_shape(shape, None)
        if len(view) == 1:
            blocks = b.to_blocks(x, self.block)
            return (b.store_scales(self._maximum(blocks, (blocks.ndim - 1,))),)
        down = tuple(range(len(view) - 2, x.ndim - 1))  # two axes where blocks of rows are apart
        return self._maximum(x, (x.ndim - 1,)).reshape(view[:-1]), jnp.squeeze(self._maximum(x, down), down)

    def _write(self, x, scales, shape, rows):
        x, view = self._wide(x, shape, rows), b.view_shape(shape, None)
        if len(view) == 1:
            scale = b.load_scales(scales[0], view, self.block)
            q = self._quantize(b.to_blocks(x, self.block), jnp.abs(scale), scale < 0)
            return b.pack(b.from_blocks(q, view[-1]), self.bits)
        q = self._quantize(x, *self._spread(scales, x.shape))
        return b.pack(q, self.bits) if rows is None else b.pack_apart(q, self.bits, view)

    def _wide(self, x: jax.Array, shape: tuple[int, ...], rows: int | None) -> jax.Array:
        x = x.astype(b.work_dtype(x.dtype))
        return x.reshape(b.view_shape(shape, None)) if rows is None else x

    def _maximum(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        least = 4 * 2**self.bits * jnp.finfo(jnp.float32).tiny  # no code is 0 then
        return b.largest_finite(x, axes, least, nonnegative=True)

    def _spread(self, scales: tuple[jax.Array, ...], shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Return the smaller scales of rows and columns, for an array of this shape, and whether both say special."""
        rows, columns = scales
        apart = len(shape) - columns.ndim - 1  # 1 where blocks of rows have an axis
        rows = rows.reshape(*shape[:-1], 1)
        columns = columns.reshape(*columns.shape[:-1], *[1] * (apart + 1), columns.shape[-1])
        return self._smaller(rows, columns)

    def _smaller(self, rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.minimum(jnp.abs(rows), jnp.abs(columns)), (rows < 0) & (columns < 0)

    def _quantize(self, x: jax.Array, scale: jax.Array, special: jax.Array) -> jax.Array:
        q = self._codes(jnp.where(jnp.isfinite(x), b.divide(x, scale), 0))
        return self._mark(q, x, special).astype(jnp.uint8)

    def _read(self, encoded, rows):
        view, work = b.view_shape(encoded.shape, None), b.work_dtype(encoded.dtype)
        if len(view) == 1:
            q = b.to_blocks(b.unpack(encoded.codes, self.bits, view).astype(work), self.block)
            scale = b.load_scales(encoded.scales[0], view, self.block)
            return b.from_blocks(self._dequantize(q, jnp.abs(scale), scale < 0, encoded.dtype), view[-1])
        q = b.unpack if rows is None else functools.partial(b.unpack_apart, rows=rows, hold=True)
        q = q(encoded.codes, self.bits, view).astype(work)
        return self._dequantize(q, *self._spread(encoded.scales, q.shape), encoded.dtype)

    def _dequantize(self, q: jax.Array, scale: jax.Array, special: jax.Array, dtype) -> jax.Array:
        return self._unmark(b.inside(self._values(q) * scale, dtype), q, special)
