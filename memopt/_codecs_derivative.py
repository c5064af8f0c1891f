"""Codes of local derivatives: what a gradient is multiplied with on its way back, in 4, 2 or 1 bits.

In: the derivative of an element-wise function at each element. Out: an `Encoded`. They are codecs like others, but for
derivatives alone: `Rounded` keeps nothing of a number but whether it is nearer to 1 than to 0.

Sources: 4-bit codes of derivatives in place of inputs follow "S2A: A Unified Framework for Parameter and Memory
Efficient Transfer Learning" (Jin et al., arXiv 2503.08154), masks for Hard-Swish and ReLU6 "MobileTL: On-device
Transfer Learning with Inverted Residual Blocks" (Chiang et al., AAAI 2023, arXiv 2212.03246).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from memopt import _codecs_blocks as b
from memopt._codec import Codec, Encoded, struct
from memopt._codecs_exact import Bits
from memopt._codecs_linear import Integer


@dataclasses.dataclass(frozen=True)
class Levels(Integer):
    """Evenly spaced levels from the smallest to the largest derivative of a block, `Integer` by another name.

    Example:
      >>> codec = Levels(4)
      >>> codec.decode(codec.encode(np.float32([0.0, 1.0]))).tolist()
      [0.0, 1.0]
    """

    bits: int = 4
    symmetric: bool = False
    down: bool = True

    @property
    def name(self) -> str:
        """`derivative4` or `derivative2`."""
        return f"derivative{self.bits}"


@dataclasses.dataclass(frozen=True)
class Rounded(Codec):
    """One bit: 1 where a derivative is above one half, else 0. Exact for functions that are clipped straight lines.

    Hard-Swish is taken for a ramp: its derivative, from -1/2 to 3/2, is above one half where its argument is positive.
    What is not a number comes back as 0.

    Example:
      >>> codec = Rounded()
      >>> codec.decode(codec.encode(np.float32([1.0, 0.0, 0.75]))).tolist()
      [1.0, 0.0, 1.0]
    """

    @property
    def name(self) -> str:
        """`derivative-mask`."""
        return "derivative-mask"

    @property
    def error(self) -> float:
        """Half of 1, for derivatives from -1/2 to 3/2."""
        return 0.5

    def accepts(self, dtype) -> bool:
        """Take real floating-point arrays."""
        return b.is_float(dtype)

    def layout(self, shape, dtype) -> Encoded:
        """Return bytes of eight numbers each."""
        return struct(self, shape, dtype, (b.packed_shape(b.view_shape(shape, None), 1), np.uint8))

    def _encode(self, x, key):
        return Bits().encode(x > 0.5).codes, ()

    def _decode(self, encoded):
        return b.unpack(encoded.codes, 1, b.view_shape(encoded.shape, None)).astype(jnp.float32)


#: The codecs of derivatives by the names that users write.
DERIVATIVES: dict[str, Codec] = {one.name: one for one in (Levels(4), Levels(2), Rounded())}
