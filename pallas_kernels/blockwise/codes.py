"""The dynamic 8-bit map, computed and not looked up: decades, each cut into twice the cells of the next smaller one.

In: float32 ratios of values to their block's scale, or codes as float32. Out: the other. Operations are those that
kernels know. A block that is not all finite has a negative scale and gives up three codes next to zero for NaN and the
infinities.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def decades(signed: bool) -> list[tuple[float, float, int]]:
    """Return each decade's start, cell width and number of cells, from the smallest to the largest."""
    power = [10.0 ** (e - 6) for e in range(7)]
    cells = [2 ** (e + (0 if signed else 1)) for e in range(7)]
    return [(0.1 * p, 0.9 * p / n, n) for p, n in zip(power, cells, strict=True)]


def values(signed: bool) -> np.ndarray:
    """Return the values of all codes, in ascending order: float64[256].

    Example:
        >>> values(signed=True)[[127, 255]].tolist()
        [0.0, 1.0]
    """
    positive = np.concatenate([low + cell * (np.arange(n) + 0.5) for low, cell, n in decades(signed)])
    return np.concatenate([-positive[::-1] if signed else positive[:0], [0.0], positive, [1.0]])


def encode(x: jax.Array, scale: jax.Array, signed: bool) -> jax.Array:
    """Return codes as float32.

    Args:
        x: float32, any values.
        scale: broadcast against `x`; negative where the block of `x` is not all finite.
        signed: whether the map has negative values; without them they are taken as zero.
    """
    special, size = scale < 0, jnp.abs(scale)
    small = jnp.where(size > 1e30, jnp.full_like(size, 2.0**-40), jnp.ones_like(size))
    ratio = jnp.where(jnp.abs(x) <= LARGEST, (x * small) / (size * small), jnp.zeros_like(x))
    rank = _rank(jnp.abs(ratio) if signed else jnp.maximum(ratio, jnp.zeros_like(ratio)), signed)
    if signed:
        rank = 127 + jnp.where(ratio < 0, -jnp.minimum(rank, jnp.full_like(rank, 127)), rank)
    return _mark(rank, x, special, signed)


def decode(code: jax.Array, scale: jax.Array, signed: bool) -> jax.Array:
    """Undo `encode`, up to half a cell; codes and results are float32."""
    if signed:
        rank = code - 127
        value = jnp.sign(rank) * _value(jnp.abs(rank), signed)
    else:
        value = _value(code, signed)
    value = jnp.clip(value * jnp.abs(scale), -LARGEST, LARGEST)
    what = (code - given_up(signed)) * jnp.full_like(code, np.inf)  # no number at 0, and an infinity on either side
    return jnp.where(_is_given_up(code, scale < 0, signed), what, value)


def scales(x: jax.Array, axis: int) -> jax.Array:
    """Return the scale of each block along an axis, which is kept: the largest finite magnitude, with its mark."""
    finite = jnp.abs(x) <= LARGEST
    most = jnp.where(finite, jnp.abs(x), jnp.zeros_like(x)).max(axis=axis, keepdims=True)
    most = jnp.maximum(most, jnp.full_like(most, TINY))
    return jnp.where(_all(finite, axis), most, -most)


def _all(truth: jax.Array, axis: int) -> jax.Array:
    return jnp.where(truth, 1.0, 0.0).astype(jnp.float32).min(axis=axis, keepdims=True) > 0.5


def given_up(signed: bool) -> int:
    """Return the code of NaN in a block that is not all finite; those beside it are the codes of the infinities."""
    return 129 if signed else 2


def _is_given_up(code: jax.Array, special: jax.Array, signed: bool) -> jax.Array:
    near = jnp.abs(code - given_up(signed)) < jnp.full_like(code, 1.5)
    return jnp.logical_and(special, near)


def _mark(code: jax.Array, x: jax.Array, special: jax.Array, signed: bool) -> jax.Array:
    nan = given_up(signed)
    code = jnp.where(_is_given_up(code, special, signed), jnp.full_like(code, nan - 2), code)
    for which, found in ((nan - 1, x == -np.inf), (nan, x != x), (nan + 1, x == np.inf)):
        code = jnp.where(found, jnp.full_like(code, which), code)
    return code


def _rank(size: jax.Array, signed: bool) -> jax.Array:
    """Return the nearest code of magnitudes in [0, 1]: 0 is zero, the last one is 1.

    A decade of `n` cells starts at rank `n` (unsigned: `n - 1`), at `n / 9` cells.
    """
    (low, cell, count), *later = decades(signed)
    per, cells, first = jnp.full_like(size, 1 / cell), jnp.full_like(size, count), (low + cell / 2) / 2
    largest = low + cell * (count - 0.5)
    for low, cell, count in later:
        beyond = size > np.float32((largest + low + cell / 2) / 2)  # halfway between its first value and the one before
        per = jnp.where(beyond, jnp.full_like(per, 1 / cell), per)
        cells = jnp.where(beyond, jnp.full_like(cells, count), cells)
        largest = low + cell * (count - 0.5)
    inside = jnp.clip(jnp.floor(size * per - cells * np.float32(1 / 9)), jnp.zeros_like(cells), cells - 1)
    rank = jnp.where(size > np.float32(first), inside + cells - (0 if signed else 1), jnp.zeros_like(size))
    last = 128.0 if signed else 255.0
    return jnp.where(size > np.float32((largest + 1.0) / 2), jnp.full_like(rank, last), rank)


def _value(rank: jax.Array, signed: bool) -> jax.Array:
    """Undo `_rank`: the float `rank + 1/2` (unsigned: 3/2) has the decade in its exponent, the cell in its mantissa."""
    word = jax.lax.bitcast_convert_type(rank + (0.5 if signed else 1.5), jnp.int32)
    mantissa = jax.lax.bitcast_convert_type(word & 0x7FFFFF | 0x3F800000, jnp.float32)
    decade = ((word >> 23) - (127 if signed else 128)).astype(jnp.float32)
    power = jnp.round(jnp.exp(decade * np.float32(np.log(10))))
    value = jnp.minimum(power * (mantissa * np.float32(0.9e-6) - np.float32(0.8e-6)), jnp.ones_like(rank))
    return jnp.where(rank >= 1, value, jnp.zeros_like(value))  # the last rank is a cell beyond the last decade
