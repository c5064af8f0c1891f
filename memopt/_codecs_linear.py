"""Evenly spaced codes of 8, 4 or 2 bits, and 8-bit floats, with a scale for each block, row or channel.

In: an array of floats. Out: an `Encoded`. Every block whose values are all finite uses all codes. A block that holds a
NaN or an infinity is marked by a negative scale and gives up three codes for them.

Sources: block-wise scaling follows Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, section
2; asymmetric groups with stochastic rounding for activations Chen et al., "ActNN", ICML 2021, section 3; the 8-bit
floats Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _codecs_blocks as b
from memopt._codec import Codec, Encoded, struct


class _Scaled(Codec):
    """What codecs with one scale for a block, a row or a channel have in common."""

    block: int | None
    channels: bool
    down: bool

    def __post_init__(self):
        if self.block is not None and self.block < 1:
            raise ValueError(f"A block has at least one element, not {self.block}.")
        if self.down and (self.block is None or self.channels):
            raise ValueError("Blocks that run down the rows have a size, and are no whole channels.")

    def accepts(self, dtype) -> bool:
        """Take real floating-point arrays."""
        return b.is_float(dtype)

    def _view(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (tuple(shape) or (1,)) if self.channels else b.view_shape(shape, self.block)

    def _rows(self, view: tuple[int, ...]) -> int | None:
        """Return the rows of a block that runs down them; None where blocks run along the last axis."""
        return b.rows_of_block(view, self.block) if self.down else None

    def _width(self, view: tuple[int, ...]) -> int | None:
        """Return the elements of a block along the last axis; None for whole rows."""
        return None if self.down and len(view) > 1 else self.block

    def _code_shape(self, view: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the codes before they share bytes: blocks that run down stay apart."""
        rows = self._rows(view)
        return view if rows is None else (*view[:-2], view[-2] // rows, rows, view[-1])

    def _scale_shape(self, view: tuple[int, ...]) -> tuple[int, ...]:
        if self._rows(view) is not None:
            shape = self._code_shape(view)
            return (*shape[:-2], shape[-1])
        return view[-1:] if self.channels else b.scale_shape(view, self._width(view))

    def _grouped(self, x: jax.Array, view: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        """Return an array with groups apart, in the type in which it is scaled, and the axes that share a scale.

        Behind a barrier: else XLA takes blocks apart in each operation, and writes their scales out in full.
        """
        work = b.work_dtype(x.dtype)
        if self._rows(view) is not None:
            grouped = jax.lax.optimization_barrier(x.reshape(self._code_shape(view)))
            return grouped.astype(work), (len(view) - 1,)
        x = x.reshape(view).astype(work)
        return (x, tuple(range(x.ndim - 1))) if self.channels else (b.to_blocks(x, self._width(view)), (x.ndim,))

    def _codes(self, q: jax.Array, view: tuple[int, ...]) -> jax.Array:
        """Return codes as they are stored, before they share bytes."""
        if self.channels or self._rows(view) is not None:
            return q
        return b.from_blocks(q, view[-1])

    def _blocks(self, codes: jax.Array, view: tuple[int, ...]) -> jax.Array:
        """Undo `_codes`."""
        if self.channels or self._rows(view) is not None:
            return codes
        return b.to_blocks(codes, self._width(view))

    def _flat(self, grouped: jax.Array, view: tuple[int, ...], dtype: Any) -> jax.Array:
        """Return a decoded array in its own shape."""
        if self._rows(view) is not None:
            whole = jax.lax.optimization_barrier(grouped.astype(dtype)).reshape(view)
            return jax.lax.optimization_barrier(whole)  # nor may XLA go on in blocks after it
        return grouped if self.channels else b.from_blocks(grouped, view[-1])

    def _store(self, scales: jax.Array, view: tuple[int, ...]) -> jax.Array:
        if self._rows(view) is not None:
            return scales[..., 0, :]
        return scales.reshape(scales.shape[-1:]) if self.channels else b.store_scales(scales)

    def _load(self, stored: jax.Array, view: tuple[int, ...]) -> jax.Array:
        if self._rows(view) is not None:
            return stored[..., None, :]
        if self.channels:
            return stored.reshape((1,) * (len(view) - 1) + stored.shape)
        return b.load_scales(stored, view, self._width(view))

    def _suffix(self, usual: int) -> str:
        if self.channels:
            return "-channel"
        if self.down:
            return "-down" if self.block == usual else f"-down{self.block}"
        return "-token" if self.block is None else "" if self.block == usual else f"-block{self.block}"


@dataclasses.dataclass(frozen=True)
class Integer(_Scaled):
    """Evenly spaced levels: `bits` a value and one scale (two if asymmetric) a block.

    A bf16 array falls to `bits / 16 + 2 / block` of its bytes. The scale is the block's largest finite magnitude; the
    largest error is half a step: `1 / 254`, `1 / 14`, `1 / 2` of it with 8, 4, 2 bits, and `1 / 255`, `1 / 15`, `1 / 3`
    asymmetric; a whole step, so twice that, when rounding is stochastic. In blocks that are not all finite a step is
    larger, `127 / 126` for 8 bits, `7 / 6` for 4 (asymmetric `255 / 252`, `15 / 12`), and with 2 bits all finite values
    become 0 (asymmetric: the smallest one).

    Args:
      bits: 8, 4 or 2; less than 8 are packed into bytes.
      block: elements that share a scale, along the last axis; None is the whole row (a token's features).
      symmetric: levels around zero; otherwise from the smallest to the largest value of the block.
      stochastic: round up or down at random, so that the error has mean zero.
      channels: share scales along all axes but the last instead: one for each channel.
      down: let blocks run down the second last axis, so that each channel of a run of rows has its own scale; XLA:TPU
        fuses these, and writes out the scales of blocks along the last axis in full. Where rows are no multiple of 32
        each row is a block.

    Example:
      >>> codec = Integer(8)
      >>> codec.decode(codec.encode(np.float32([1.0, -0.25, np.nan]))).tolist()[0]
      1.0
    """

    bits: int = 8
    block: int | None = 128
    symmetric: bool = True
    stochastic: bool = False
    channels: bool = False
    down: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (2, 4, 8):
            raise ValueError(f"Integers of 2, 4 or 8 bits are stored, not of {self.bits}.")

    @property
    def name(self) -> str:
        """Such as `int4-asymmetric-stochastic`."""
        kind = "" if self.symmetric else "-asymmetric"
        return f"int{self.bits}{kind}{'-stochastic' if self.stochastic else ''}{self._suffix(128)}"

    @property
    def error(self) -> float:
        """Half a step (a whole one if stochastic), relative to the block's largest finite magnitude."""
        steps = 2 * (2 ** (self.bits - 1) - 1) if self.symmetric else 2**self.bits - 1
        return (2.0 if self.stochastic else 1.0) / steps

    def layout(self, shape, dtype) -> Encoded:
        """Return bytes of codes, a scale a block, and the blocks' smallest values if asymmetric."""
        view, work = self._view(shape), b.work_dtype(dtype)
        scales = [(self._scale_shape(view), work)] * (1 if self.symmetric else 2)
        return struct(self, shape, dtype, (b.packed_shape(self._code_shape(view), self.bits), np.uint8), *scales)

    def _levels(self, special: jax.Array, work) -> tuple[jax.Array, jax.Array]:
        """Return the lowest and the highest code of finite values, where codes start at zero."""
        top = 2**self.bits - 1
        lowest = 1 if self.symmetric else 0
        low, high = (lowest + 1, top - 1) if self.symmetric else (0, top - 3)
        return jnp.where(special, work.type(low), work.type(lowest)), jnp.where(
            special, work.type(high), work.type(top)
        )

    def _specials(self) -> tuple[int, int, int]:
        """Return the codes of NaN, the positive and the negative infinity in a block that is not all finite."""
        top = 2**self.bits - 1
        return (0, top, 1) if self.symmetric else (top, top - 1, top - 2)

    def _encode(self, x, key):
        view = self._view(x.shape)
        work = b.work_dtype(x.dtype)
        grouped, axes = self._grouped(x, view)
        low, high, special = b.finite_range(grouped, axes)
        first, last = self._levels(special, work)
        if self.symmetric:
            middle = work.type(2 ** (self.bits - 1))
            zero, span = jnp.zeros_like(low), jnp.maximum(jnp.abs(low), jnp.abs(high))
            step = span / jnp.maximum(last - middle, 1)
        else:
            middle, zero = work.type(0), low
            step = high / jnp.maximum(last, 1) - low / jnp.maximum(last, 1)
        step = jnp.maximum(step, work.type(4 * jnp.finfo(jnp.float32).tiny))
        q = jnp.where(jnp.isfinite(grouped), b.divide(grouped / 2 - zero / 2, step / 2), 0) + middle
        q = jnp.floor(q + b.uniform(grouped, key).astype(work)) if self.stochastic else jnp.round(q)
        q = jnp.clip(q, first, last)
        for code, found in zip(self._specials(), (jnp.isnan, jnp.isposinf, jnp.isneginf), strict=True):
            q = jnp.where(found(grouped), work.type(code), q)
        codes = b.pack(self._codes(q, view).astype(jnp.uint8), self.bits)
        scales = (self._store(jnp.where(special, -step, step), view),)
        return codes, scales if self.symmetric else (*scales, self._store(zero, view))

    def _decode(self, encoded):
        view = self._view(encoded.shape)
        work = b.work_dtype(encoded.dtype)
        q = self._blocks(b.unpack(encoded.codes, self.bits, self._code_shape(view)).astype(work), view)
        step = self._load(encoded.scales[0], view)
        special, step = step < 0, jnp.abs(step)
        middle = work.type(2 ** (self.bits - 1) if self.symmetric else 0)
        value = (q - middle) * (step / 2)  # in halves, as twice the largest number may be between the ends of a block
        if not self.symmetric:
            value = value + self._load(encoded.scales[1], view) / 2
        value = b.inside(value * 2, encoded.dtype)
        for code, what in zip(self._specials(), (np.nan, np.inf, -np.inf), strict=True):
            value = jnp.where(special & (q == work.type(code)), work.type(what), value)
        return self._flat(value, view, encoded.dtype)


@dataclasses.dataclass(frozen=True)
class Float8(_Scaled):
    """8-bit floats with one scale a block: small values keep their relative precision.

    A bf16 array falls to `1 / 2 + 2 / block` of its bytes. The error of a value is `2**-4` (e4m3) or `2**-3` (e5m2) of
    its own magnitude, but for values below `2**-14` (`2**-29`) of the block's largest; relative to that one it is at
    most `1 / 28` and `1 / 14`. In blocks that are not all finite, e4m3 keeps its largest code for infinities.

    Args:
      exponent: bits of the exponent, 4 (e4m3) or 5 (e5m2).
      block: elements that share a scale, along the last axis; None is the whole row.
      channels: share scales along all axes but the last instead.
      down: let blocks run down the second last axis, as in `Integer`.

    Example:
      >>> codec = Float8(4)
      >>> codec.decode(codec.encode(np.float32([448.0, -1.0, np.inf]))).tolist()
      [448.0, -1.0, inf]
    """

    exponent: int = 4
    block: int | None = 128
    channels: bool = False
    down: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.exponent not in (4, 5):
            raise ValueError(f"8-bit floats have 4 or 5 bits of exponent, not {self.exponent}.")

    @property
    def name(self) -> str:
        """`fp8-e4m3` or `fp8-e5m2`."""
        return f"fp8-{'e4m3' if self.exponent == 4 else 'e5m2'}{self._suffix(128)}"

    @property
    def error(self) -> float:
        """Half the spacing of the largest codes."""
        return 1 / 28 if self.exponent == 4 else 1 / 14

    @property
    def _dtype(self):
        return jnp.float8_e4m3fn if self.exponent == 4 else jnp.float8_e5m2

    def layout(self, shape, dtype) -> Encoded:
        """Return 8-bit floats and a scale a block."""
        view = self._view(shape)
        scales = (self._scale_shape(view), b.work_dtype(dtype))
        return struct(self, shape, dtype, (self._code_shape(view), self._dtype), scales)

    def _encode(self, x, key):
        view, work = self._view(x.shape), b.work_dtype(x.dtype)
        grouped, axes = self._grouped(x, view)
        low, high, special = b.finite_range(grouped, axes)
        top, below = (448.0, 416.0) if self.exponent == 4 else (57344.0, 57344.0)
        most = jnp.where(special, work.type(below), work.type(top))
        scale = jnp.maximum(jnp.maximum(-low, high) / most, work.type(jnp.finfo(jnp.float32).tiny))
        q = jnp.where(jnp.isfinite(grouped), jnp.clip(b.divide(grouped, scale), -most, most), grouped)
        if self.exponent == 4:  # it has no infinities
            q = jnp.where(jnp.isinf(grouped), jnp.sign(grouped) * work.type(top), q)
        return self._codes(q, view).astype(self._dtype), (self._store(jnp.where(special, -scale, scale), view),)

    def _decode(self, encoded):
        view, work = self._view(encoded.shape), b.work_dtype(encoded.dtype)
        q = self._blocks(encoded.codes.astype(work), view)
        scale = self._load(encoded.scales[0], view)
        value = jnp.where(jnp.isinf(q), q, b.inside(q * jnp.abs(scale), encoded.dtype))
        if self.exponent == 4:
            value = jnp.where((scale < 0) & (jnp.abs(q) == 448), jnp.sign(q) * work.type(np.inf), value)
        return self._flat(value, view, encoded.dtype)
