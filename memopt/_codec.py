"""The mint: what an encoded array is, what a codec has to do, and the check that the two agree.

In: an array of floats, bools or integers. Out: an `Encoded`, a frozen pytree of codes and scales with a static layout,
and the array again. Codecs are in `_codecs_*.py`, the table of their names in `_codecs.py`. Nothing here knows a plan:
residuals, optimizer state and gradients are encoded alike.

What every codec keeps:

- it is a frozen, hashable dataclass; equal codecs give equal programs;
- `encode` and `decode` are pure, and work under `jit`, `vmap`, `scan` and `shard_map`; a scan stacks the leaves;
- leaves follow from shape and dtype alone (`layout`), empty, 0-D and odd-sized arrays included;
- every value that is not finite comes back as itself: NaN as NaN, an infinity with its sign. Finite neighbours in the
  same block then have fewer codes left (each codec says how many), but stay finite;
- a finite value comes back finite;
- `|decoded - x| <= error * scale_of(x)`, where the codec says what the scale is (mostly the largest finite magnitude of
  the block), plus one rounding to the array's dtype and four times float32's smallest normal number.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["codec", "shape", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class Encoded:
    """An array in the form that a codec gave it.

    The following hold, and `validate` checks them:

    - `codes` and every one of `scales` have the shape and dtype of `codec.layout(shape, dtype)`;
    - `shape` is a tuple of ints and `dtype` a NumPy dtype: those of the array that `decode` returns.

    Under `vmap` and `scan` the leaves have leading axes outside that they do not have inside; decode inside.

    Attributes:
      codes: the numbers themselves, small integers (packed where less than a byte), or 8-bit floats.
      scales: what turns codes into values, by block, row or column; empty where nothing is needed.
      codec: the codec that made it (static).
      shape: the decoded array's shape (static).
      dtype: the decoded array's dtype (static).
    """

    codes: Any
    scales: tuple[Any, ...]
    codec: Codec
    shape: tuple[int, ...]
    dtype: np.dtype


class Codec(abc.ABC):
    """A way to write an array with fewer bytes. Subclasses are frozen dataclasses whose fields are their settings."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What plans call it, such as `"int8"`."""

    @property
    @abc.abstractmethod
    def error(self) -> float:
        """The largest error of a decoded value, relative to its scale; 0.0 is exact."""

    @abc.abstractmethod
    def layout(self, shape: tuple[int, ...], dtype: Any) -> Encoded:
        """Return the `Encoded` of an array of this shape and dtype, with `jax.ShapeDtypeStruct` leaves."""

    @abc.abstractmethod
    def accepts(self, dtype: Any) -> bool:
        """Say whether arrays of this dtype can be encoded."""

    @abc.abstractmethod
    def _encode(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Return codes and scales."""

    @abc.abstractmethod
    def _decode(self, encoded: Encoded) -> jax.Array:
        """Return the array; its dtype may still be wider."""

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Encoded:
        """Return an array in this codec's form.

        Args:
          x: array of any shape; its dtype must be one that the codec accepts.
          key: a PRNG key for codecs that round at random; without one they derive their noise from the values.

        Raises:
          TypeError: the codec does not take this dtype.
        """
        x = jnp.asarray(x)
        if not self.accepts(x.dtype):
            raise TypeError(f"The codec {self.name!r} takes no {x.dtype} arrays: leave this one as it is.")
        codes, scales = _encode(self, x, key)
        return Encoded(codes, scales, self, tuple(x.shape), np.dtype(x.dtype))

    def decode(self, encoded: Encoded) -> jax.Array:
        """Return the array again, with the shape and dtype that it had.

        Raises:
          ValueError: the leaves are not those of the layout.
        """
        validate(encoded)
        return _decode(encoded)

    def for_state(self) -> Codec:
        """Return the codec in the layout that suits arrays which a step reads and writes whole, such as its state."""
        return self

    def encoded_bytes(self, aval: Any) -> int:
        """Return the bytes of all leaves for an array like this, without a device's padding."""
        leaves = jax.tree.leaves(self.layout(tuple(aval.shape), np.dtype(aval.dtype)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


# Traced once for a codec, shape and dtype, however many arrays of a step have them; a caller's jaxpr has them inline.


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _encode(codec: Codec, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return codec._encode(x, key)


@functools.partial(jax.jit, inline=True)
def _decode(encoded: Encoded) -> jax.Array:
    return encoded.codec._decode(encoded).astype(encoded.dtype).reshape(encoded.shape)


def decode(encoded: Encoded) -> jax.Array:
    """Return the array that an `Encoded` stands for.

    Example:
      >>> from memopt._codecs import codec
      >>> decode(codec("int8").encode(np.float32([1.0, -0.5, np.inf]))).tolist()[::2]
      [1.0, inf]
    """
    return encoded.codec.decode(encoded)


def validate(encoded: Encoded) -> None:
    """Check that an `Encoded` is what its codec lays out for its shape and dtype; costs nothing when traced.

    Raises:
      ValueError: it is not; the message names the leaf.
    """
    want = encoded.codec.layout(encoded.shape, encoded.dtype)
    if len(want.scales) != len(encoded.scales):
        raise ValueError(f"{encoded.codec.name!r} has {len(want.scales)} scales, this array has {len(encoded.scales)}.")
    found = [("codes", want.codes, encoded.codes)]
    found += [(f"scales[{i}]", *pair) for i, pair in enumerate(zip(want.scales, encoded.scales, strict=True))]
    for name, wanted, leaf in found:
        if tuple(leaf.shape) != wanted.shape or leaf.dtype != wanted.dtype:
            raise ValueError(
                f"{name} of {encoded.codec.name!r} for {encoded.dtype}{list(encoded.shape)} must be {wanted.dtype}"
                f"{list(wanted.shape)}, not {leaf.dtype}{list(leaf.shape)}. Leaves that `vmap` or `scan` stacked are "
                "decoded inside it."
            )


def struct(codec: Codec, shape, dtype, codes: tuple, *scales: tuple) -> Encoded:
    """Return a layout from (shape, dtype) pairs."""
    leaves = [jax.ShapeDtypeStruct(tuple(one), two) for one, two in (codes, *scales)]
    return Encoded(leaves[0], tuple(leaves[1:]), codec, tuple(shape), np.dtype(dtype))
