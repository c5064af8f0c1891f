"""In what parts the TPU kernels of attention take a block: bits of the list of visits, kinds of blocks, their cost.

In: the settings and the layout of a call. Out: the bits of each visit, the bodies that a kernel needs, the parts of a
block that any query sees. Numpy at trace time, but for the choice of a body.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from .spec import CUT, HIDDEN, PARTIAL, WHOLE, Spec, Visits, distances, shown_rows

LANES = 128
FIRST, LAST = 1, 2  # bits of a visit: it opens or closes an output block; three bits for its kind, head bits above
KIND_SHIFT, KIND_BITS, HEAD_SHIFT = 2, 7, 5
KEYS_AT_ONCE = 128  # a tile is taken by so many keys, whose exponentials run beside the next ones' products


class Layout(NamedTuple):
    """Shapes of one call: lengths are padded to whole blocks, operands are `[batch, heads, length, head_dim]`."""

    batch: int
    heads: int
    kv_heads: int
    queries: int  # without padding
    keys: int
    block_q: int
    block_k: int

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads


class Part(NamedTuple):
    """A part of a tile: slices of the queries and of the keys, in whole registers of lanes."""

    queries: slice
    keys: slice


class Kind(NamedTuple):
    """A kind of block: its number in the flags, whether its scores are masked, its distance from the diagonal."""

    number: int
    masked: bool
    distance: int | None = None


def flags_of(spec: Spec, walk: Visits, major: np.ndarray, lay: Layout, names: tuple[str, ...]) -> np.ndarray:
    """Return the bits of each visit, where `major` numbers the output block that a visit adds to."""
    first = np.concatenate([[True], major[1:] != major[:-1]])
    last = np.concatenate([first[1:], [True]])
    return (first * FIRST + last * LAST + (_numbers(spec, lay, walk, names)[0] << KIND_SHIFT)).astype(np.int32)


def _numbers(spec: Spec, lay: Layout, walk: Visits, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the number of each visit's kind, and the distances that the kinds from `CUT` up stand for."""
    found, at = distances(spec, walk, lay.block_q, lay.block_k), walk.columns * lay.block_k - walk.rows * lay.block_q
    numbers = walk.kinds
    for place, distance in enumerate(found):
        numbers = np.where((walk.kinds == PARTIAL) & (at == distance), CUT + place, numbers)
    is_dynamic = "mask" in names or "q_segments" in names
    return np.where((numbers == WHOLE) & is_dynamic, PARTIAL, numbers), found


def kinds(spec: Spec, lay: Layout, walk: Visits, names: tuple[str, ...]) -> tuple[Kind, ...]:
    """Return which kinds of blocks there are."""
    numbers, found = _numbers(spec, lay, walk, names)
    return tuple(Kind(n, n != WHOLE, found[n - CUT] if n >= CUT else None) for n in sorted(set(numbers.tolist())))


def parts(spec: Spec, lay: Layout, kind: Kind, at_once: int) -> list[Part]:
    """Return the parts in which a block of a kind is taken: so many keys each, with the queries that may see them.

    A part that no query sees is left out.
    """
    found = []
    for first in range(0, lay.block_k, at_once):
        last = min(first + at_once, lay.block_k)
        low, high = 0, lay.block_q
        if kind.distance is not None:
            low, high = shown_rows(spec, kind.distance, lay.block_q, first, last - 1)
            low, high = low // LANES * LANES, min(-(-high // LANES) * LANES, lay.block_q)
        if low < high:
            found.append(Part(slice(low, high), slice(first, last)))
    return found


def for_each_kind(kinds: tuple[Kind, ...], flags, update) -> None:
    """Trace `update(kind)` for the kinds of blocks there are, and run that of this visit; skip hidden ones.

    The kinds are branches of one `cond`, so that whoever counts the work of the body sees that only one of them runs.
    """
    number = (flags >> KIND_SHIFT) & KIND_BITS
    shown = [one for one in kinds if one.number != HIDDEN]
    if not shown:
        return
    bodies = [functools.partial(update, one) for one in shown]
    place = sum((number >= one.number).astype(jnp.int32) for one in shown[1:])
    run = bodies[0] if len(shown) == 1 else lambda: lax.switch(place, bodies)
    if len(shown) < len(kinds):
        pl.when(number != HIDDEN)(run)
    else:
        run()


def counted(spec: Spec, lay: Layout, walk: Visits, names: tuple[str, ...]) -> list[tuple[Kind, int]]:
    """Return the kinds of blocks that are computed, and how many of the walk are of each."""
    numbers, _ = _numbers(spec, lay, walk, names)
    return [(one, int((numbers == one.number).sum())) for one in kinds(spec, lay, walk, names) if one.number != HIDDEN]


def cost(lay: Layout, width: int, blocks: Sequence[tuple[int, list[Part]]], arrays: Sequence[Any]) -> pl.CostEstimate:
    """Return what a kernel costs.

    Args:
        lay: the layout; every query head walks the blocks.
        width: sum of the head sizes over the products of a tile.
        blocks: how many there are of a kind, and its parts.
        arrays: operands and results; their bytes are stated as if each were moved once.
    """
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    sizes = [(n, (q.stop - q.start) * (k.stop - k.start)) for n, taken in blocks for q, k in taken]
    pairs = lay.batch * lay.heads * sum(n * size for n, size in sizes)
    return pl.CostEstimate(flops=2 * pairs * width, transcendentals=pairs, bytes_accessed=moved)
