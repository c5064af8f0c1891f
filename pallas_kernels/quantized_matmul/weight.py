"""The stored form of a quantized weight: 8-bit codes, or two 4-bit codes a byte, with a scale for each group of rows.

In: a float matrix. Out: a `QuantizedWeight`, a pytree. Codes are symmetric around zero, so that zero stays zero and no
offset has to be multiplied. Nothing here multiplies activations.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

CODES = {8: 127, 4: 7}  # the largest code; the most negative one is not used
UNIT = 256  # rows within which two halves share bytes, where the groups allow it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix `[rows, columns]` in codes; entry `(r, c)` is `code[r, c] * scales[r // group, c]`.

    The following conditions hold: `scales.shape == (rows // group, columns)`; 8-bit codes have
    `codes.shape == (rows, columns)`, 4-bit ones `(rows // 2, columns)`. A byte of these holds, of each `unit` rows, row
    `i` of the first half in its low and of the second half in its high four bits.

    Attributes:
        codes: int8.
        scales: float32.
        bits: 8 or 4.
        group: rows that share a scale.
        unit: rows that are packed together; divides `group`.
    """

    codes: jax.Array
    scales: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    unit: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, `(rows, columns)`."""
        return self.scales.shape[0] * self.group, self.scales.shape[1]


def quantize_weight(
    weight: jax.Array, bits: int = 8, group: int | Literal["adaptive"] | None = None, shrink: float = 0.9
) -> QuantizedWeight:
    """Quantize a matrix, symmetric and to the nearest code.

    Memory: 1 byte an entry, or half a byte, and 4 bytes a scale. The error of an entry is at most half its scale, which
    is the largest magnitude of its group divided by 127 or 7.

    Args:
        weight: `[rows, columns]`, floating.
        bits: 8 or 4.
        group: rows that share a scale, a divisor of `rows`; None for all of them; "adaptive" halves it from all rows on
            for as long as that shrinks the mean scale to less than `shrink` of what it was, which reads the weight.
        shrink: see `group`.

    Returns:
        The quantized weight.

    Raises:
        ValueError: the weight is no floating matrix, or bits or group do not fit it.

    Example:
        >>> quantize_weight(jnp.array([[1.0, -4.0], [0.5, 2.0]])).codes.tolist()
        [[127, -127], [64, 64]]

    Source: group scales, and halving while ranges shrink, follow Kim et al. 2023, "FineQuant: Unlocking Efficiency with
    Fine-Grained Weight-Only Quantization for LLMs"; the threshold is on the mean over the matrix.
    """
    if weight.ndim != 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weight {weight.dtype} {weight.shape}: give a floating matrix [rows, columns]")
    if bits not in CODES:
        raise ValueError(f"{bits=}: 8 and 4 are served")
    rows = weight.shape[0]
    if group == "adaptive":
        group = _adaptive_group(weight, bits, shrink)
    group = rows if group is None else group
    if rows % group or (bits == 4 and group % 2):
        raise ValueError(f"{group=} must divide {rows} rows" + (", and be even for 4 bits" if bits == 4 else ""))
    return _quantized(weight, bits, group)


def _quantized(weight: jax.Array, bits: int, group: int) -> QuantizedWeight:
    grouped = weight.astype(jnp.float32).reshape(-1, group, weight.shape[1])
    scales = jnp.abs(grouped).max(axis=1) * (1 / CODES[bits])
    safe = jnp.where(scales == 0, jnp.ones_like(scales), scales)
    codes = jnp.clip(jnp.round(grouped / safe[:, None]), -CODES[bits], CODES[bits]).astype(jnp.int8)
    unit = group
    while unit > UNIT and unit % 4 == 0:
        unit //= 2
    codes = codes.reshape(weight.shape)
    return QuantizedWeight(pack(codes, unit) if bits == 4 else codes, scales, bits, group, unit)


def _adaptive_group(weight: jax.Array, bits: int, shrink: float) -> int:
    group, least = weight.shape[0], 2 if bits == 4 else 1
    tops = jnp.abs(weight.astype(jnp.float32)).max(axis=0, keepdims=True)
    while group % 2 == 0 and (group // 2) % least == 0 and group // 2 >= 16:
        finer = jnp.abs(weight.astype(jnp.float32)).reshape(-1, group // 2, weight.shape[1]).max(axis=1)
        if not bool(finer.mean() < shrink * tops.mean()):
            break
        group, tops = group // 2, finer
    return group


def pack(codes: jax.Array, unit: int) -> jax.Array:
    """Return 4-bit codes `[rows, columns]`, int8, as `[rows / 2, columns]` bytes; see `QuantizedWeight`."""
    low, high = jnp.split(codes.reshape(-1, unit, codes.shape[1]), 2, axis=1)
    packed = (low & jnp.int8(15)) | (high << jnp.int8(4))
    return packed.reshape(-1, codes.shape[1])


def unpack(packed: jax.Array, unit: int) -> jax.Array:
    """Return what `pack` packed, int32: also for a slice of whole units of rows, and inside a kernel."""
    wide = packed.astype(jnp.int32)
    low, high = (wide << 28) >> 28, wide >> 4
    halves = [x.reshape(-1, unit // 2, packed.shape[1]) for x in (low, high)]
    return jnp.concatenate(halves, axis=1).reshape(-1, packed.shape[1])


def dequantize(weight: QuantizedWeight, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Return the matrix `[rows, columns]` that a quantized weight stands for, all of it at once.

    Example:
        >>> dequantize(quantize_weight(jnp.array([[1.0], [-0.5]]), bits=4)).round(3).tolist()
        [[1.0], [-0.571]]
    """
    codes = weight.codes if weight.bits == 8 else unpack(weight.codes, weight.unit)
    grouped = codes.astype(jnp.float32).reshape(-1, weight.group, weight.shape[1])
    return (grouped * weight.scales[:, None]).reshape(weight.shape).astype(dtype)
