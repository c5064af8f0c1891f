"""The dynamic 8-bit map, computed and not looked up: decades, each cut into twice the cells of the next smaller one.

In: float32 ratios of values to their block's scale, or codes as float32. Out: the other. Operations are those that
kernels know. A block that is not all finite has a negative scale and gives up the codes of the three smallest
magnitudes for NaN and the infinities.
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
    for which, what in specials(signed):
        value = jnp.where(jnp.logical_and(scale < 0, code == which), jnp.full_like(value, what), value)
    return value


def scales(x: jax.Array, axis: int) -> jax.Array:
    """Return the scale of each block along an axis, which is kept: the largest finite magnitude, with its mark."""
    finite = jnp.abs(x) <= LARGEST
    most = jnp.where(finite, jnp.abs(x), jnp.zeros_like(x)).max(axis=axis, keepdims=True)
    most = jnp.maximum(most, jnp.full_like(most, TINY))
    return jnp.where(_all(finite, axis), most, -most)


def _all(truth: jax.Array, axis: int) -> jax.Array:
    return jnp.where(truth, 1.0, 0.0).astype(jnp.float32).min(axis=axis, keepdims=True) > 0.5


def specials(signed: bool) -> tuple[tuple[int, float], ...]:
    """Return the codes that stand for NaN and the infinities in a block that is not all finite."""
    zero = 127 if signed else 0
    one, two, three = (zero + 1, zero - 1, zero + 2) if signed else (zero + 1, zero + 2, zero + 3)
    return (one, np.nan), (two, -np.inf), (three, np.inf)


def _mark(code: jax.Array, x: jax.Array, special: jax.Array, signed: bool) -> jax.Array:
    given = [which for which, _ in specials(signed)]
    taken = jnp.logical_and(special, jnp.logical_and(code >= min(given), code <= max(given)))
    code = jnp.where(taken, jnp.full_like(code, 127 if signed else min(given) - 1), code)
    for which, found in zip(given, (x != x, x == -np.inf, x == np.inf), strict=True):
        code = jnp.where(found, jnp.full_like(code, which), code)
    return code


def _rank(size: jax.Array, signed: bool) -> jax.Array:
    """Return the nearest code of magnitudes in [0, 1]: 0 is zero, the last one is 1."""
    rank, before, largest = jnp.zeros_like(size), 1, 0.0
    for low, cell, count in decades(signed):
        inside = jnp.clip(jnp.floor((size - np.float32(low)) / np.float32(cell)), 0.0, float(count - 1))
        border = (largest + low + cell / 2) / 2  # halfway between this decade's first value and the one before
        rank = jnp.where(size > np.float32(border), inside + before, rank)
        before, largest = before + count, low + cell * (count - 0.5)
    return jnp.where(size > np.float32((largest + 1.0) / 2), jnp.full_like(rank, before), rank)


def _value(rank: jax.Array, signed: bool) -> jax.Array:
    value, before = jnp.zeros_like(rank), 1
    for low, cell, count in decades(signed):
        inside = (rank - before) * np.float32(cell) + np.float32(low + cell / 2)
        value = jnp.where(rank >= before, inside, value)
        before += count
    return jnp.where(rank >= before, jnp.ones_like(value), value)
