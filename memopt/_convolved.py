"""Bytes of what convolutions read and make on TPUs, where their kernels choose which dimensions are tiled.

Comes in: convolution equations. Goes out: for each image-like operand and result the bytes that XLA:TPU gives it.
Kernels (the windows of weights) are stored as any other array. Nothing here looks at a device.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from memopt import _sizes

#: XLA:TPU moves parts of a row of an image into the batch where that has fewer images than a tile has rows: so many.
_SPLITS = 8
#: Parts of a row overlap by one element on each side of a window of 3; it is kept where a part is at least so long.
_LEAST_PART = 4


def laid_out(eqn: Any) -> Iterator[tuple[int | None, int]]:
    """Yield the bytes of each image that a convolution reads or makes, on TPUs.

    Batch and features are the two tiled dimensions, whatever the others are: one of them is padded to 128 lanes and
    the other to whole tiles, whichever way takes less. Up to seven images are cut into eight parts each, features
    in the lanes then; the parts overlap.

    Args:
        eqn: an equation of `conv_general_dilated`.

    Yields:
        The number of the operand, or None for the result, and its bytes.

    Source: layouts and buffers of programs compiled for TPU v5e, of 1 to 64 images with 32 to 128 features (with 2 to 7
    images only 4 were compiled; the overlap is that of windows of 3).
    """
    numbers, result = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    left, right = (v.aval for v in eqn.invars)
    if _extent(right, numbers.rhs_spec) > _extent(result, numbers.out_spec):  # the gradient of a window
        yield 0, image_bytes(left, numbers.lhs_spec[1], numbers.lhs_spec[0])
        yield 1, image_bytes(right, numbers.rhs_spec[1], numbers.rhs_spec[0])
    else:
        yield 0, image_bytes(left, *numbers.lhs_spec[:2])
        yield None, image_bytes(result, *numbers.out_spec[:2])


def image_bytes(aval: Any, batch: int, features: int) -> int:
    """Return the bytes on TPUs of an array whose dimensions of the batch and of features are these.

    Args:
        aval: abstract value of an image or volume: the batch, features, and one or more dimensions of space.
        batch, features: the numbers of these dimensions.

    Example:
        >>> import jax
        >>> image_bytes(jax.ShapeDtypeStruct((8, 128, 128, 32), "bfloat16"), 0, 3) // 2**20  # 32 features in 128 lanes
        32
    """
    shape = [n for i, n in enumerate(aval.shape) if i not in (batch, features)]
    images, wide = aval.shape[batch], aval.shape[features]
    if not (shape and math.prod(aval.shape)):
        return _sizes.padded_bytes(aval, "tpu")
    if images >= _SPLITS or shape[-1] < _SPLITS:
        return math.prod(shape) * _sizes.padded_bytes(jax.ShapeDtypeStruct((images, wide), aval.dtype), "tpu")
    part = -(-shape[-1] // _SPLITS)
    part += part >= _LEAST_PART
    lanes = -(-wide // 128) * 128
    return math.prod(shape[:-1]) * part * images * _SPLITS * lanes * _sizes.element_bits(aval) // 8


def _extent(aval: Any, spec: tuple[int, ...]) -> int:
    return math.prod(aval.shape[i] for i in spec[2:])
