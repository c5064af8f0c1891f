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
KEYS_AT_ONCE = 128  # of a block that a mask cuts, so many keys are taken at once: what no query sees is left out
_WIDE = ("v6", "7x")  # in the names of devices whose matmul units take 256 x 256


class Tiling(NamedTuple):
    """In what parts a block is taken. A part's exponentials run beside the products of the next ones.

    Attributes:
        keys, queries: of a part of a whole block, forward.
        ahead: parts whose scores are made before the exponentials of one.
        back_keys: keys of a part of a whole block, backward.
        by_rows: whether q's gradient is queries x head size: then scores' gradients are turned for it, else keys are.
    """

    keys: int
    queries: int
    ahead: int
    back_keys: int
    by_rows: bool


def is_wide(device: str | None) -> bool:
    """Whether a kind of device has matmul units of 256 x 256; None is taken for v5e, which has not."""
    return device is not None and any(name in device for name in _WIDE)


def tiling(head_dim: int, device: str | None = None) -> Tiling:
    """Choose the parts of blocks: a pure function of shape and device, found by static counts of cycles.

    Args:
        head_dim: the larger of both head sizes.
        device: a target's kind or a device's, such as "v6e" or "TPU v6 lite"; None is taken for v5e.

    Example:
        >>> tiling(128, "TPU v6 lite").keys, tiling(128).keys
        (256, 128)
    """
    if is_wide(device):
        return Tiling(keys=256, queries=512, ahead=3, back_keys=512, by_rows=False)
    if head_dim > 64:
        return Tiling(keys=128, queries=256, ahead=2, back_keys=1024, by_rows=True)
    return Tiling(keys=128, queries=512, ahead=2, back_keys=512, by_rows=False)


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


def parts(spec: Spec, lay: Layout, kind: Kind, at_once: int, queries: int | None = None) -> list[Part]:
    """Return the parts in which a block of a kind is taken: so many keys each, with the queries that may see them.

    A part that no query sees is left out. With `queries` a part has at most so many.
    """
    found, wide = [], queries or lay.block_q
    for first in range(0, lay.block_k, at_once):
        last = min(first + at_once, lay.block_k)
        low, high = 0, lay.block_q
        if kind.distance is not None:
            low, high = shown_rows(spec, kind.distance, lay.block_q, first, last - 1)
            low, high = low // LANES * LANES, min(-(-high // LANES) * LANES, lay.block_q)
        for start in range(low // wide * wide, high, wide) if low < high else ():
            found.append(Part(slice(max(low, start), min(high, start + wide)), slice(first, last)))
    return found


def forward_parts(spec: Spec, lay: Layout, kind: Kind, how: Tiling) -> list[Part]:
    """Return the parts of a block in the forward pass: of few keys where some of it is hidden."""
    return parts(spec, lay, kind, how.keys if kind.distance is None else KEYS_AT_ONCE, how.queries)


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
