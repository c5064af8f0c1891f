"""What the codecs of optimizer state share: scales and codes that are made apart, blocks of rows with an axis of their
own, and codes that are given up for what is not finite.

In: an array of floats, and old codes. Out: scales alone, codes for given scales, or the array again, in the shape that
its user works in. Which value a code stands for is the subclass's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _codecs_blocks as b
from memopt._codec import Codec, Encoded


class Mapped(Codec):
    """What the maps share: division by a scale, and codes given up for what is not finite.

    Scales and codes can be made apart (`measure`, `write`): who can make an array twice then never holds it.
    """

    bits: int
    signed: bool
    block: int | None

    def accepts(self, dtype) -> bool:
        """Take real floating-point arrays."""
        return b.is_float(dtype)

    def rows_apart(self, shape: tuple[int, ...]) -> int | None:
        """Return the rows of a block where blocks run down the second last axis, else None."""
        return None

    def apart(self, shape: tuple[int, ...], rows: int | None) -> tuple[int, ...]:
        """Return the shape of an array in which blocks of so many rows have an axis of their own; None: its own shape.

        Who works in this shape leaves XLA:TPU nothing to move: between two shapes it writes out what scales spread to.
        """
        if rows is None:
            return tuple(shape)
        view = b.view_shape(shape, self.block)
        return (*view[:-2], view[-2] // rows, rows, view[-1])

    def measure(self, x: jax.Array, shape: tuple[int, ...], rows: int | None = None) -> tuple[jax.Array, ...]:
        """Return the scales alone, as `encode` stores them: each from one reduction, so that XLA fuses `x` into it.

        Args:
          x: an array, in the shape that `apart` gives for `rows`.
          shape: its own shape.
          rows: rows of a block that has an axis of its own.
        """
        return _measure(self, x, tuple(shape), rows)

    def write(self, x: jax.Array, scales: tuple[jax.Array, ...], like: Encoded, rows: int | None = None) -> Encoded:
        """Return an array in the form of `like`, with the scales that `measure` gave for it."""
        return dataclasses.replace(like, codes=_write(self, x, scales, like.shape, rows), scales=scales)

    def read(self, encoded: Encoded, rows: int | None = None) -> jax.Array:
        """Return what `decode` does, in the shape that `apart` gives for `rows`."""
        return _read(encoded, rows)

    def _encode(self, x, key):
        scales = self._measure(x, x.shape, None)
        return self._write(x, scales, x.shape, None), scales

    def _decode(self, encoded):
        return self._read(encoded, None)

    def _measure(self, x: jax.Array, shape: tuple[int, ...], rows: int | None) -> tuple[jax.Array, ...]:
        raise NotImplementedError

    def _write(self, x: jax.Array, scales: Any, shape: tuple[int, ...], rows: int | None) -> jax.Array:
        raise NotImplementedError

    def _read(self, encoded: Encoded, rows: int | None) -> jax.Array:
        raise NotImplementedError

    def _codes(self, ratio: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _values(self, codes: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _given_up(self) -> int:
        """Return the code of NaN, in blocks that are not all finite; the codes beside it are those of the infinities.

        They are next to zero, so that what had them moves little.
        """
        return 2 ** (self.bits - 1) + 1 if self.signed else 2

    def _is_given_up(self, q: jax.Array, special: jax.Array) -> jax.Array:
        reach = jnp.where(special, q.dtype.type(1.5), q.dtype.type(-1))  # a number a block: XLA:TPU is slow with masks
        return jnp.abs(q - q.dtype.type(self._given_up())) < reach

    def _mark(self, q: jax.Array, x: jax.Array, special: jax.Array) -> jax.Array:
        """Put the codes of what is not finite; finite values that had them go to zero, or the smallest code."""
        kind, nan = q.dtype.type, self._given_up()
        q = jnp.where(self._is_given_up(q, special), kind(nan - 2), q)
        for code, found in ((nan - 1, jnp.isneginf), (nan, jnp.isnan), (nan + 1, jnp.isposinf)):
            q = jnp.where(found(x), kind(code), q)
        return q

    def _unmark(self, value: jax.Array, q: jax.Array, special: jax.Array) -> jax.Array:
        what = ((q - q.dtype.type(self._given_up())) * q.dtype.type(np.inf)).astype(value.dtype)
        return jnp.where(self._is_given_up(q, special), what, value)


# Traced once for a codec, shape and dtype, as `encode` is.


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _measure(codec: Mapped, x: jax.Array, shape: tuple[int, ...], rows: int | None) -> tuple[jax.Array, ...]:
    return codec._measure(x, shape, rows)


@functools.partial(jax.jit, static_argnums=(0, 3, 4), inline=True)
def _write(codec: Mapped, x: jax.Array, scales: Any, shape: tuple[int, ...], rows: int | None) -> jax.Array:
    return codec._write(x, scales, shape, rows)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _read(encoded: Encoded, rows: int | None) -> jax.Array:
    shape = encoded.codec.apart(encoded.shape, rows)
    return encoded.codec._read(encoded, rows).astype(encoded.dtype).reshape(shape)
