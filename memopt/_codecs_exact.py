"""Codes that lose nothing: bools as bits, integers of a known range in as many bits as the range needs.

In: an array of bools or integers. Out: an `Encoded` without scales, whose error is 0.0. XLA keeps a bool in a byte, and
an index in four.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from memopt import _codecs_blocks as b
from memopt._codec import Codec, Encoded, struct


@dataclasses.dataclass(frozen=True)
class Bits(Codec):
    """Bools, eight in a byte.

    Example:
      >>> codec = Bits()
      >>> codec.decode(codec.encode(np.array([True, False]))).tolist()
      [True, False]
    """

    @property
    def name(self) -> str:
        """`bits`."""
        return "bits"

    @property
    def error(self) -> float:
        """None."""
        return 0.0

    def accepts(self, dtype) -> bool:
        """Take bools."""
        return np.dtype(dtype) == np.bool_

    def layout(self, shape, dtype) -> Encoded:
        """Return bytes of eight bools each."""
        return struct(self, shape, dtype, (b.packed_shape(b.view_shape(shape, None), 1), np.uint8))

    def _encode(self, x, key):
        return b.pack(x.reshape(b.view_shape(x.shape, None)).astype(jnp.uint8), 1), ()

    def _decode(self, encoded):
        return b.unpack(encoded.codes, 1, b.view_shape(encoded.shape, None)) != 0


@dataclasses.dataclass(frozen=True)
class Range(Codec):
    """Integers that are known to lie in a range, in 1, 2, 4, 8, 16 or 32 bits.

    A value outside the range comes back wrong: the range has to be proven, not hoped for.

    Args:
      low: smallest value.
      high: largest value.

    Example:
      >>> codec = Range(-1, 2)
      >>> codec.encode(np.int32([-1, 0, 1, 2])).codes.nbytes, codec.decode(codec.encode(np.int32([2, -1]))).tolist()
      (1, [2, -1])
    """

    low: int
    high: int

    def __post_init__(self):
        if self.high < self.low or self.high - self.low >= 2**32:
            raise ValueError(f"A range has at least one and at most 2**32 values, not {self.low}..{self.high}.")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        needed = max(1, int(self.high - self.low).bit_length())
        return 2 ** math.ceil(math.log2(needed))

    @property
    def name(self) -> str:
        """Such as `2-bit`."""
        return f"{self.bits}-bit"

    @property
    def error(self) -> float:
        """None."""
        return 0.0

    def accepts(self, dtype) -> bool:
        """Take integers."""
        return bool(jnp.issubdtype(dtype, jnp.integer))

    def layout(self, shape, dtype) -> Encoded:
        """Return unsigned integers, packed below a byte."""
        if self.bits >= 8:
            return struct(self, shape, dtype, (shape, np.dtype(f"uint{self.bits}")))
        return struct(self, shape, dtype, (b.packed_shape(b.view_shape(shape, None), self.bits), np.uint8))

    def _encode(self, x, key):
        # Wrapping arithmetic: the difference is right whenever it fits, whatever the signs.
        wide = x.astype(jnp.uint64 if x.dtype.itemsize == 8 else jnp.uint32)
        codes = wide - np.array(self.low & (2 ** (8 * wide.dtype.itemsize) - 1), wide.dtype)
        if self.bits >= 8:
            return codes.astype(np.dtype(f"uint{self.bits}")), ()
        return b.pack(codes.reshape(b.view_shape(x.shape, None)).astype(jnp.uint8), self.bits), ()

    def _decode(self, encoded):
        codes = encoded.codes
        if self.bits < 8:
            codes = b.unpack(codes, self.bits, b.view_shape(encoded.shape, None))
        wide = codes.astype(np.uint64 if encoded.dtype.itemsize == 8 else np.uint32)
        return wide + np.array(self.low & (2 ** (8 * wide.dtype.itemsize) - 1), wide.dtype)
