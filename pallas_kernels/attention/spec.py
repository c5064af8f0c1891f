"""What an attention computes, apart from its arrays: the static settings, and which blocks of scores exist at all.

In: Python numbers. Out: a frozen `Spec`, the list of blocks to visit (numpy, at trace time), and block sizes. Nothing
here touches an array of the model; every form of attention (reference, lean, kernels) reads the same `Spec`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import numpy as np

MASKED = -3e38  # the score of a hidden pair; finite, so that no difference of two of them is NaN
LOWEST = -1.5e38  # where a running maximum starts: exp(MASKED - m) is 0 for every m from here up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Static settings of one attention.

    The score of query row `r` and key column `c` is `scale * q[r] . k[c]`, soft-capped, plus bias and ALiBi term. The
    pair is hidden unless all of `causal`, `window`, `blocks` and the dynamic masks allow it.

    Args:
        scale: factor of the products.
        causal: allow `c <= r + offset` alone.
        offset: shifts the diagonal to the right; 0 aligns the first row with the first column.
        window: `(left, right)`: allow `r - left <= c <= r + right`, None for no bound.
        soft_cap: `cap` in `cap * tanh(score / cap)`, None for none.
        kind: `"softmax"`, or `"sigmoid"`: `1 / (1 + exp(-score - sigmoid_bias))` for each pair by itself.
        sigmoid_bias: added to the scores of sigmoid attention, usually minus the logarithm of the number of keys.
        dropout: rate at which weights are dropped, in [0, 1).
        blocks: `(size, rows, columns, bytes)` of a boolean mask over blocks of `size` x `size` pairs, None for all.

    Example:
        >>> Spec(scale=0.125, causal=True).hides
        True
    """

    scale: float
    causal: bool = False
    offset: int = 0
    window: tuple[int | None, int | None] | None = None
    soft_cap: float | None = None
    kind: Literal["softmax", "sigmoid"] = "softmax"
    sigmoid_bias: float = 0.0
    dropout: float = 0.0
    blocks: tuple[int, int, int, bytes] | None = None

    @property
    def hides(self) -> bool:
        """Whether the settings alone hide any pair."""
        return self.causal or self.window is not None or self.blocks is not None

    @property
    def block_mask(self) -> np.ndarray | None:
        """The boolean mask over blocks, or None."""
        if self.blocks is None:
            return None
        _, rows, columns, data = self.blocks
        return np.frombuffer(data, bool).reshape(rows, columns)


class Extras(NamedTuple):
    """Arrays that attention reads beside q, k, v and bias; none of them has a gradient.

    Attributes:
        mask: bool, broadcastable to `[batch, heads, queries, keys]`: True allows.
        q_segments, kv_segments: int32 `[batch, length]`; pairs of unequal segments are hidden. Both or none.
        slopes: float32 `[heads]`, the ALiBi slopes: `slopes[h] * (c - r)` is added to the scores.
        seed: uint32 `[2]`, decides what dropout drops.
    """

    mask: jax.Array | None = None
    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    slopes: jax.Array | None = None
    seed: jax.Array | None = None


WHOLE, PARTIAL, HIDDEN = 0, 1, 2  # kinds of blocks: no pair is hidden by the settings, some may be, all are
CUT = 3  # and from here up: as PARTIAL, at the first, second, ... of a few distances from the diagonal


class Visits(NamedTuple):
    """The blocks of scores that are visited, in order: block row, block column, and the kind of block."""

    rows: np.ndarray
    columns: np.ndarray
    kinds: np.ndarray

    def by_column(self) -> Visits:
        """Return the same blocks, ordered by column and then by row."""
        order = np.lexsort((self.rows, self.columns))
        return Visits(self.rows[order], self.columns[order], self.kinds[order])


def visits(spec: Spec, queries: int, keys: int, block_q: int, block_k: int) -> Visits:
    """List the blocks that hold at least one allowed pair, by row and then by column.

    A row or column of blocks with no such block gets one (all hidden), so that whoever walks the list reaches all
    outputs.

    Args:
        spec: the settings.
        queries, keys: lengths; blocks at the end may be ragged.
        block_q, block_k: sizes of a block.

    Returns:
        The list, as int32 arrays of equal length.

    Example:
        >>> visits(Spec(scale=1.0, causal=True), 4, 4, 2, 2).columns.tolist()
        [0, 0, 1]
    """
    row, column = np.arange(math.ceil(queries / block_q))[:, None], np.arange(math.ceil(keys / block_k))[None]
    first_r, last_r = row * block_q, np.minimum((row + 1) * block_q, queries) - 1
    first_c, last_c = column * block_k, np.minimum((column + 1) * block_k, keys) - 1
    some = np.ones((row.size, column.size), bool)
    whole = some & ((column + 1) * block_k <= keys)
    for left, right in _bounds(spec):
        if right is not None:
            some, whole = some & (first_c <= last_r + right), whole & (last_c <= first_r + right)
        if left is not None:
            some, whole = some & (last_c >= first_r - left), whole & (first_c >= last_r - left)
    if (mask := spec.block_mask) is not None:
        covered = _covered(mask, spec.blocks[0], some.shape, block_q, block_k)
        some, whole = some & covered.any(axis=(1, 3)), whole & covered.all(axis=(1, 3))
    kinds = np.where(whole, WHOLE, np.where(some, PARTIAL, HIDDEN))
    missing_rows, missing_columns = ~some.any(axis=1), ~some.any(axis=0)
    some[missing_rows, 0] = True
    some[0, missing_columns] = True
    rows, columns = np.nonzero(some)
    return Visits(*(x.astype(np.int32) for x in (rows, columns, kinds[rows, columns])))


def distances(spec: Spec, walk: Visits, block_q: int, block_k: int, most: int = 4) -> tuple[int, ...]:
    """Return how far the blocks that `causal` or `window` cut lie from the diagonal: first column less first row.

    Each is a kind of its own (`CUT`), since which parts of such a block are hidden is known before it runs. Where there
    are more than `most` of them, or none, the answer is empty.

    Example:
        >>> spec = Spec(scale=1.0, causal=True)
        >>> distances(spec, visits(spec, 8, 8, 2, 4), 2, 4)
        (-2, 0)
    """
    cut = walk.kinds == PARTIAL
    found = np.unique(walk.columns[cut] * block_k - walk.rows[cut] * block_q)
    return tuple(found.tolist()) if _bounds(spec) and found.size <= most else ()


def shown_rows(spec: Spec, distance: int, size: int, first: int, last: int) -> tuple[int, int]:
    """Return the rows, from and to, that may see columns `first` to `last` of a block at a distance from the diagonal.

    Args:
        spec: the settings.
        distance: first column of the block less its first row.
        size: rows of the block.
        first, last: columns, counted from the block's first.

    Example:
        >>> shown_rows(Spec(scale=1.0, causal=True), 0, 512, 128, 255)
        (128, 512)
    """
    low, high = 0, size
    for left, right in _bounds(spec):
        low = low if right is None else max(low, first + distance - right)
        high = high if left is None else min(high, last + distance + left + 1)
    return min(low, size), max(high, 0)


def _bounds(spec: Spec) -> list[tuple[int | None, int | None]]:
    bounds = [(None, spec.offset)] if spec.causal else []
    return bounds + ([spec.window] if spec.window is not None else [])


def _covered(mask: np.ndarray, size: int, shape: tuple[int, int], block_q: int, block_k: int) -> np.ndarray:
    """Return the mask's cells that each block covers, as `[rows, cells, columns, cells]`."""
    if block_q % size or block_k % size:
        raise ValueError(f"blocks of {block_q} x {block_k} do not cover whole cells of a block mask of size {size}")
    across, down = block_q // size, block_k // size
    whole = np.zeros((shape[0] * across, shape[1] * down), bool)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    # Cells past the end of the mask stand for no pair: they repeat the last one that does.
    whole[mask.shape[0] :], whole[:, mask.shape[1] :] = whole[mask.shape[0] - 1], whole[:, mask.shape[1] - 1 :][:, :1]
    return whole.reshape(shape[0], across, shape[1], down)


def lean_blocks(batch_heads: int, queries: int, keys: int, spec: Spec, tile_bytes: int = 4 * 2**20) -> tuple[int, int]:
    """Choose the block sizes of the lean form: a float32 tile of all heads has at most `tile_bytes` where it can.

    Args:
        batch_heads: sequences times query heads, which one tile holds all of.
        queries, keys: lengths.
        spec: the settings; a block mask fixes what the sizes are multiples of.
        tile_bytes: bytes of one tile of scores.

    Returns:
        `(block_q, block_k)`, at least 64 unless the lengths are shorter.

    Example:
        >>> lean_blocks(12, 1024, 1024, Spec(scale=1.0))
        (256, 256)
    """
    unit = spec.blocks[0] if spec.blocks else 64
    side = unit
    while side * 2 <= 1024 and batch_heads * (side * 2) ** 2 * 4 <= tile_bytes:
        side *= 2
    if spec.blocks:
        return side, side
    return min(side, queries), min(side, keys)
