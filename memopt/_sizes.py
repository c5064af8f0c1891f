"""Bytes of values: what an array takes as a dense block, and what it takes in a platform's memory.

Comes in: abstract values (anything with a shape and a dtype). Goes out: whole numbers of bytes. Nothing here looks at
equations or asks a device.
"""

import functools
import itertools
import math
from typing import Any

import jax

_ALIGNMENT_BYTES = 64  # XLA:CPU and XLA:GPU buffers start and end on these.
_LANES, _SUBLANES = 128, 8
_PACKED_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def aval_bytes(aval: Any) -> int:
    """Return the bytes of one value as a dense array, without the target's padding.

    Args:
        aval: abstract value of any shape and dtype. Booleans take a byte, 4-bit types half a byte, typed PRNG keys
            their base array's bytes; tokens and references take none.

    Returns:
        Bytes, rounded up for types below a byte.

    Example:
        >>> import jax
        >>> aval_bytes(jax.ShapeDtypeStruct((3, 5), "float32"))
        60
    """
    bits = element_bits(aval)
    return (math.prod(aval.shape) * bits + 7) // 8 if bits else 0


def padded_bytes(aval: Any, platform: str) -> int:
    """Return the bytes that one value takes in the memory of a platform.

    On TPU an array of two or more dimensions is stored in tiles over its two minor-most ones: the minor dimension is
    padded to 128 lanes, the second to 8 rows, or to the next power of two if it is smaller (not below what packs into
    32 bits: 1 row for float32, 2 for bfloat16, 4 for int8 and bool). XLA chooses which dimensions come last and takes
    the pair with the least padding, so the order of the dimensions does not matter. One-dimensional arrays and scalars
    are padded to the next power of two between 512 bytes' worth and 1,024 elements, then to multiples of 1,024
    elements. Elsewhere a buffer is rounded up to 64 bytes.

    Args:
        aval: abstract value.
        platform: "tpu", "cpu" or "gpu".

    Returns:
        Bytes, at least `aval_bytes`.

    Example:
        >>> import jax
        >>> padded_bytes(jax.ShapeDtypeStruct((200, 3), "float32"), "tpu")
        4096

    Source: the rule that reproduces the argument sizes of compiled one-operation programs for TPU v5e exactly
    (`tests/test_cost.py` holds them).

    Limits: what a layout is chosen for can force another: an operand of a matmul or a kernel may be padded more.
    """
    bits = element_bits(aval)
    if not bits or is_on_host(aval):
        return 0
    if platform == "tpu":
        return _tiled_bytes(tuple(aval.shape), bits)
    size = (math.prod(aval.shape) * bits + 7) // 8
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def is_on_host(aval: Any) -> bool:
    """Say whether a value is in the host's memory, where it takes none of the device's."""
    return getattr(aval, "memory_space", None) is jax.memory.Space.Host


def element_bits(aval: Any) -> int:
    """Return the bits of one element as XLA stores it, 0 for what holds no array of its own (tokens, references)."""
    dtype = getattr(aval, "dtype", None)
    return 0 if dtype is None or not _holds_array(type(aval)) else _dtype_bits(dtype)


@functools.lru_cache(maxsize=64)
def _holds_array(kind: type) -> bool:
    return not hasattr(kind, "inner_aval")


@functools.lru_cache(maxsize=256)
def _dtype_bits(dtype: Any) -> int:
    return _PACKED_BITS.get(dtype.name, 8 * dtype.itemsize)


@functools.lru_cache(maxsize=65536)
def _tiled_bytes(shape: tuple[int, ...], bits: int) -> int:
    count, packing = math.prod(shape), max(1, 32 // bits)
    if len(shape) < 2 or not count:
        tile = min(1024, max(_LANES * packing, 1 << (count - 1).bit_length())) if count else 1
        return -(-count // tile) * tile * bits // 8
    padded = min(
        count // (minor * second) * _round_up(minor, _LANES) * _round_up(second, _rows(second, packing))
        for minor, second in itertools.permutations(shape, 2)
    )
    return padded * bits // 8


def _rows(second: int, packing: int) -> int:
    return max(packing, min(_SUBLANES, 1 << (second - 1).bit_length()))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
