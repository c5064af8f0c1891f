"""Lossless forms: bools as bits, integers in the bits that their range needs, values of few numbers as their index.

In: a survey of the step. Out: a `Store` without error for each residual that is known, by how it is made, to fit in
less than its type. Which of them are taken is the planner's choice.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _bounds
from memopt._codec import Codec
from memopt._codecs_exact import Bits, Few, Range
from memopt._contract import Left, Store
from memopt._survey import Survey
from memopt.passes import _residuals

#: Primitives of which a max-pooling gradient reads nothing but where each window's largest value is.
_POOL = "select_and_scatter_add"


@dataclasses.dataclass(frozen=True)
class Lossless:
    """Keep residuals in fewer bytes that hold the same values: found by dataflow, exact, in the default set.

    - masks and comparisons (ReLU, dropout): 8 in a byte, where XLA keeps each in a byte;
    - integers whose range is known (`iota`, `argmax`, remainders, sums of them): 1, 2, 4, 8 or 16 bits;
    - values that can only be a few numbers (the gradient of `max` and `min`, of ReLU6, of a dropout mask that is
      already scaled): 1 or 2 bits;
    - what a max-pooling gradient alone reads: one bit for each element, where the window's largest value is, in place
      of the pooled array;
    - values that were widened: as they were before.

    Memory falls by up to 8 times for masks and 32 times for pooled arrays; the cost is one pass over the value to
    encode and one to decode, which XLA mostly fuses with what makes and reads it. Exact: decoded values are bitwise
    the same, or, for a pooling, give bitwise the same gradient.

    Example:
      >>> import memopt
      >>> memopt.passes.Lossless()
      Lossless()

    Source: binarised ReLU masks and pooling indices as in Jain et al., "Gist: Efficient Data Encoding for Deep Neural
    Network Training", ISCA 2018, section 3.1 (lossless encodings).

    Limits: it is tried on what plans keep that are found without it, and taken where it lowers the predicted peak; the
    smallest values, together under 0.5 % of the bytes, are left. Sharded steps that something is repeated in do not use
    it. Values inside a `shard_map`, and arguments of the step, stay as they are. Windows that overlap or are padded
    are not pooled away. Among equal largest values the first one gets the gradient, as on XLA:CPU.
    """

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "lossless"

    def propose(self, survey: Survey) -> Iterator[Store | Left]:
        """Yield the smallest exact form of each residual that has one."""
        bounds = _bounds.Bounds(survey.graph)
        small = _residuals.small(survey)
        for one in _residuals.residuals(survey):
            if one.value in small:
                continue
            codec = codec_of(one.aval, bounds.of(one.value))
            if codec is not None:
                yield from _coded(survey, one, codec)
            yield from _before(survey, one)
            yield from _pooled(survey, one)


def codec_of(aval: Any, known: _bounds.Known | None) -> Codec | None:
    """Return the codec with the fewest bits for a value of which this is known."""
    if np.dtype(aval.dtype) == np.bool_:
        return Bits()
    if known is None:
        return None
    if known.numbers is not None:
        return Few(tuple(int.from_bytes(n.tobytes(), sys.byteorder) for n in known.numbers))
    needed = Range(known.low, known.high)
    return needed if needed.bits < 8 * np.dtype(aval.dtype).itemsize else None


def _coded(survey: Survey, one: _residuals.Residual, codec: Codec) -> Iterator[Store]:
    layout = codec.layout(one.aval.shape, one.aval.dtype)
    size = sum(survey.bytes_of(leaf) for leaf in (layout.codes, *layout.scales))
    if size < one.bytes:
        seconds = _residuals.move_seconds(survey, size, one.bytes)
        yield Store(one.value, seconds, size, codec.encode, codec.decode, name=codec.name, late=True)


def _before(survey: Survey, one: _residuals.Residual) -> Iterator[Store]:
    """Offer the value as it was before it was widened."""
    op = survey.graph.values[one.value].op
    if op is None or len(op.eqn.invars) != 1:
        return
    form = _undone(op.eqn)
    if form is None:
        return
    encode, decode, aval = form
    size = survey.bytes_of(aval)
    if size < one.bytes:
        yield Store(
            one.value, 2 * size / survey.spec.memory_bytes_per_second, size, encode, decode, name="as before", late=True
        )


def _undone(eqn: Any) -> tuple[Callable, Callable, Any] | None:
    """Return how to undo an equation, how to run it again, and its operand's type."""
    old, new = eqn.invars[0].aval, eqn.outvars[0].aval
    if eqn.primitive.name == "convert_element_type" and jnp.issubdtype(new.dtype, jnp.floating):
        if jnp.issubdtype(old.dtype, jnp.floating) and jnp.promote_types(old.dtype, new.dtype) == new.dtype:
            return (lambda x: x.astype(old.dtype)), (lambda x: x.astype(new.dtype)), old
    return None


def _pooled(survey: Survey, one: _residuals.Residual) -> Iterator[Store]:
    """Offer one bit an element where only the gradients of one max-pooling read a value."""
    readers = [survey.graph.ops[o] for o in sorted(one.readers)]
    if not readers or not jnp.issubdtype(one.aval.dtype, jnp.floating):
        return
    pools = [op for op in readers if op.eqn.primitive.name == _POOL and op.inputs[1] == one.value]
    windows = {(tuple(op.eqn.params["window_dimensions"]), tuple(op.eqn.params["padding"])) for op in pools}
    if not pools or len(windows) > 1 or not all(_is_plain_pool(op.eqn) for op in pools):
        return
    form = _Largest(windows.pop()[0])
    layout = Bits().layout(one.aval.shape, np.bool_)
    size = survey.bytes_of(layout.codes)
    if size < one.bytes:
        seconds = _residuals.move_seconds(survey, size, 2 * one.bytes)
        allowed = frozenset(op.id for op in pools)
        decode = dataclasses.replace(form, dtype=np.dtype(one.aval.dtype).name).decode
        yield Store(one.value, seconds, size, form.encode, decode, name="pooled bits", readers=allowed, late=True)


def _is_plain_pool(eqn: Any) -> bool:
    """Say whether windows lie side by side, without padding, and take the first of equal largest values."""
    window, strides = eqn.params["window_dimensions"], eqn.params["window_strides"]
    shape = eqn.invars[1].aval.shape
    whole = all(n % w == 0 for n, w in zip(shape, window, strict=True))
    padded = any(low or high for low, high in eqn.params["padding"])
    return tuple(window) == tuple(strides) and whole and not padded and eqn.params["select_prim"].name == "ge"


@dataclasses.dataclass(frozen=True)
class _Largest:
    """An array as one bit an element: 1 where a window's largest value is, which its pooling's gradient goes to.

    Args:
      window: the window's size along each axis; windows lie side by side.
      dtype: what `decode` gives back.
    """

    window: tuple[int, ...]
    dtype: str = "float32"

    def encode(self, x: Any) -> Any:
        """Return the bits, found in the order in which the gradient compares (which decides for equals and NaN)."""
        places = list(itertools.product(*map(range, self.window)))
        parts = [self._every(x, place) for place in places]
        best, index = parts[0], jnp.zeros(parts[0].shape, jnp.int32)
        for i, part in enumerate(parts[1:], 1):
            keeps = best >= part
            best, index = jnp.where(keeps, best, part), jnp.where(keeps, index, np.int32(i))
        number = sum(
            (jax.lax.broadcasted_iota(jnp.int32, x.shape, a) % np.int32(w)) * np.int32(math.prod(self.window[a + 1 :]))
            for a, w in enumerate(self.window)
            if w > 1
        )
        return Bits().encode(self._spread(index) == number)

    def decode(self, encoded: Any) -> Any:
        """Return ones and zeros."""
        return Bits().decode(encoded).astype(self.dtype)

    def _every(self, x: Any, place: tuple[int, ...]) -> Any:
        return jax.lax.slice(x, place, x.shape, self.window)

    def _spread(self, index: Any) -> Any:
        for axis, size in enumerate(self.window):
            index = jnp.repeat(index, size, axis=axis) if size > 1 else index
        return index
