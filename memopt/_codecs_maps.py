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

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _codecs_blocks as b
from memopt._codec import Codec, Encoded, struct


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
    """Return the nearest code of magnitudes in [0, 1]: 0 is zero, the last one is 1, as numbers of the same dtype."""
    start, width, cells = _decades(bits, signed)
    kind = size.dtype.type
    rank, before, largest = jnp.zeros_like(size), 1, 0.0
    for low, cell, count in zip(start, width, cells, strict=True):
        inside = jnp.clip(jnp.floor((size - kind(low)) / kind(cell)), kind(0), kind(count - 1))
        border = (largest + low + cell / 2) / 2  # halfway between this decade's first value and the one before
        rank = jnp.where(size > kind(border), inside + kind(before), rank)
        before, largest = before + int(count), low + cell * (count - 0.5)
    return jnp.where(size > kind((largest + 1.0) / 2), kind(before), rank)


def _dynamic_value(rank: jax.Array, bits: int, signed: bool) -> jax.Array:
    """Undo `_dynamic_rank`."""
    start, width, cells = _decades(bits, signed)
    kind = rank.dtype.type
    value, before = jnp.zeros_like(rank), 1
    for low, cell, count in zip(start, width, cells, strict=True):
        value = jnp.where(rank >= before, (rank - kind(before)) * kind(cell) + kind(low + cell / 2), value)
        before += int(count)
    return jnp.where(rank >= before, kind(1), value)


class _Mapped(Codec):
    """What the maps share: division by a scale, and codes given up for what is not finite."""

    bits: int
    signed: bool

    def accepts(self, dtype) -> bool:
        """Take real floating-point arrays."""
        return b.is_float(dtype)

    def _codes(self, ratio: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _values(self, codes: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _specials(self) -> tuple[tuple[int, float], ...]:
        """Return the codes, of the smallest magnitudes, that blocks with such values give up for them."""
        zero = 2 ** (self.bits - 1) - 1 if self.signed else 0
        one, two, three = (zero + 1, zero - 1, zero + 2) if self.signed else (zero + 1, zero + 2, zero + 3)
        return (one, np.nan), (two, -np.inf), (three, np.inf)

    def _mark(self, q: jax.Array, x: jax.Array, special: jax.Array) -> jax.Array:
        """Put the codes of what is not finite; finite values that had them go to the nearest code left."""
        kind = q.dtype.type
        codes = [code for code, _ in self._specials()]
        spare = min(codes) - 1 if not self.signed else 2 ** (self.bits - 1) - 1
        taken = (q >= min(codes)) & (q <= max(codes)) & special
        q = jnp.where(taken, kind(spare), q)
        for (code, _), found in zip(self._specials(), (jnp.isnan, jnp.isneginf, jnp.isposinf), strict=True):
            q = jnp.where(found(x), kind(code), q)
        return q

    def _unmark(self, value: jax.Array, q: jax.Array, special: jax.Array) -> jax.Array:
        for code, what in self._specials():
            value = jnp.where(special & (q == code), value.dtype.type(what), value)
        return value


@dataclasses.dataclass(frozen=True)
class Dynamic(_Mapped):
    """The dynamic map of 8-bit (or 4-bit) optimizer states, block-wise.

    A float32 array falls to `bits / 32 + 1 / block` of its bytes. The error is relative to the block's largest finite
    magnitude, and far smaller for small values: half a cell of their own decade. A block that is not all finite gives
    up the three codes next to zero. The unsigned map takes negative numbers as zero.

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

    def layout(self, shape, dtype) -> Encoded:
        """Return bytes of codes and a scale a block."""
        view = b.view_shape(shape, self.block)
        rows = self._rows(view)
        scales = b.scale_shape(view, self.block) if rows is None else (*view[:-2], view[-2] // rows, view[-1])
        return struct(self, shape, dtype, (b.packed_shape(view, self.bits), np.uint8), (scales, b.work_dtype(dtype)))

    def _rows(self, view: tuple[int, ...]) -> int | None:
        """Return the rows of a block that runs down them; None where blocks run along the last axis."""
        if not self.down or self.block is None or view[-1] <= self.block:
            return None
        return b.rows_of_block(view, self.block)

    def _apart(self, x: jax.Array, rows: int | None) -> tuple[jax.Array, int]:
        """Return an array with its blocks apart, and the axis along which they run."""
        if rows is None:
            return b.to_blocks(x, self.block), x.ndim
        return x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1]), x.ndim - 1

    def _codes(self, ratio):
        rank = _dynamic_rank(jnp.abs(ratio) if self.signed else jnp.maximum(ratio, 0), self.bits, self.signed)
        if not self.signed:
            return rank
        zero = 2 ** (self.bits - 1) - 1
        return zero + jnp.where(ratio < 0, -jnp.minimum(rank, zero), rank)

    def _values(self, codes):
        if not self.signed:
            return _dynamic_value(codes, self.bits, False)
        rank = codes - (2 ** (self.bits - 1) - 1)
        return jnp.sign(rank) * _dynamic_value(jnp.abs(rank), self.bits, True)

    def _encode(self, x, key):
        view, work = b.view_shape(x.shape, self.block), b.work_dtype(x.dtype)
        rows = self._rows(view)
        blocks, axis = self._apart(x.reshape(view).astype(work), rows)
        low, high, special = b.finite_range(blocks, (axis,))
        scale = jnp.maximum(jnp.maximum(-low, high), work.type(jnp.finfo(jnp.float32).tiny))
        q = self._codes(jnp.where(jnp.isfinite(blocks), b.divide(blocks, scale), 0))
        q = self._mark(q, blocks, special)
        q = b.from_blocks(q, view[-1]) if rows is None else q.reshape(view)
        scale = jnp.where(special, -scale, scale)
        stored = b.store_scales(scale) if rows is None else jnp.squeeze(scale, axis)
        return b.pack(q.astype(jnp.uint8), self.bits), (stored,)

    def _decode(self, encoded):
        view, work = b.view_shape(encoded.shape, self.block), b.work_dtype(encoded.dtype)
        rows, (stored,) = self._rows(view), encoded.scales
        q, axis = self._apart(b.unpack(encoded.codes, self.bits, view).astype(work), rows)
        scale = b.load_scales(stored, view, self.block) if rows is None else jnp.expand_dims(stored, axis)
        value = b.inside(self._values(q) * jnp.abs(scale), encoded.dtype)
        value = self._unmark(value, q, scale < 0)
        return b.from_blocks(value, view[-1]) if rows is None else value.reshape(view)


@dataclasses.dataclass(frozen=True)
class RankOne(_Mapped):
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

    def _encode(self, x, key):
        x = x.reshape(b.view_shape(x.shape, None)).astype(b.work_dtype(x.dtype))
        if x.ndim > 1:
            rows, columns = self._maximum(x, x.ndim - 1), self._maximum(x, x.ndim - 2)
            q = self._quantize(x, *self._smaller(rows, columns))
            return b.pack(q, self.bits), (jnp.squeeze(rows, -1), jnp.squeeze(columns, -2))
        blocks = b.to_blocks(x, self.block)
        scale = self._maximum(blocks, blocks.ndim - 1)
        q = b.from_blocks(self._quantize(blocks, jnp.abs(scale), scale < 0), x.size)
        return b.pack(q, self.bits), (b.store_scales(scale),)

    def _maximum(self, x: jax.Array, axis: int) -> jax.Array:
        _, high, special = b.finite_range(x, (axis,))
        high = jnp.maximum(high, x.dtype.type(4 * 2**self.bits * jnp.finfo(jnp.float32).tiny))  # no code is 0 then
        return jnp.where(special, -high, high)

    def _smaller(self, rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.minimum(jnp.abs(rows), jnp.abs(columns)), (rows < 0) & (columns < 0)

    def _quantize(self, x: jax.Array, scale: jax.Array, special: jax.Array) -> jax.Array:
        q = self._codes(jnp.where(jnp.isfinite(x), b.divide(x, scale), 0))
        return self._mark(q, x, special).astype(jnp.uint8)

    def _decode(self, encoded):
        view, work = b.view_shape(encoded.shape, None), b.work_dtype(encoded.dtype)
        q = b.unpack(encoded.codes, self.bits, view).astype(work)
        if len(view) > 1:
            rows, columns = encoded.scales[0][..., None], encoded.scales[1][..., None, :]
            return self._dequantize(q, *self._smaller(rows, columns), encoded.dtype)
        q = b.to_blocks(q, self.block)
        scale = b.load_scales(encoded.scales[0], view, self.block)
        return b.from_blocks(self._dequantize(q, jnp.abs(scale), scale < 0, encoded.dtype), view[-1])

    def _dequantize(self, q: jax.Array, scale: jax.Array, special: jax.Array, dtype) -> jax.Array:
        return self._unmark(b.inside(self._values(q) * scale, dtype), q, special)
