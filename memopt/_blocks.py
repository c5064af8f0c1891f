"""The pattern book: the blocks of an unrolled step, found where its operations repeat.

In: the operations of one region. Out: the stretches in which the same operations come again and again, such as the
forward and the backward pass over the layers of a model, and where one block of them ends and the next begins. It goes
by operations and dataflow alone, never by names, and decides nothing: segments (`_segments`) follow these boundaries,
and plans (`_layers`) are made block by block.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from memopt import _cost
from memopt import _graph as g

LEAST, MOST = 16, 1000  # operations in one block
_FLAT = 1.05  # a neck may be this much wider than the narrowest one
_BESIDE = 1.25  # the same for the block before and the one after a stretch, which may be another kind of block
_SHIFT = 6  # their necks may lie elsewhere by one operation in so many of a block
_HEAVY = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "scan", "while"})


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Equal blocks one after another.

    Attributes:
      start, end: positions of the first operation and after the last one.
      period: operations in one block.
      parts: in how many parts each block is cut.
      cuts: positions of the cuts; the first is where a block begins.
    """

    start: int
    end: int
    period: int
    parts: int
    cuts: tuple[int, ...]


def stretches(graph: g.Graph, region: g.Region, most: int) -> list[Stretch]:
    """Return the stretches of equal blocks in a region, in order.

    Cuts lie where a block begins, and once inside it where that is as narrow and there are at most `most` of them. A
    block holds a matmul, a convolution or a loop.
    """
    eqns = [op.eqn for op in region.ops]
    heavy = np.concatenate([[0], np.cumsum([is_heavy(op) for op in region.ops])])
    chosen: list[tuple[int, int, int]] = []
    for start, end, period in _runs(_codes(eqns)):
        apart = all(end <= low or high <= start for low, high, _ in chosen)
        if apart and heavy[start + period] > heavy[start]:
            chosen.append((start, end, period))
    blocks = sum((end - start) // period for start, end, period in chosen)
    return [_stretch(graph, region, run, blocks, most) for run in sorted(chosen)]


def is_heavy(op: g.Op) -> bool:
    """Say whether an operation is a matmul, a convolution or a loop."""
    return op.eqn.primitive.name in _HEAVY


def last_heavy(region: g.Region) -> int:
    """Return the position after the last matmul, convolution or loop of a region; what follows are mostly updates."""
    return max((op.index + 1 for op in region.ops if is_heavy(op)), default=0)


def crossing(graph: g.Graph, region: g.Region, start: int, end: int, reach: int) -> dict[int, tuple[int, int]]:
    """Return values made at most `reach` before they are read: value -> first and last position that they cross."""
    last: dict[int, int] = {}
    for op in region.ops[max(0, start) : min(end + reach, len(region.ops))]:
        for v in op.inputs:
            maker = None if v is None else graph.values[v].op
            if maker is not None and maker.region == region.id and op.index - maker.index <= reach:
                last[v] = op.index
    return {v: (graph.values[v].op.index + 1, index) for v, index in last.items()}


def _codes(eqns: Sequence[Any]) -> np.ndarray:
    """Return a number for each equation; those that do the same with the same shapes have the same."""
    names: dict[Any, int] = {}
    found = []
    for eqn in eqns:
        shapes = ((v.aval.shape, v.aval.dtype) for v in eqn.outvars if hasattr(v.aval, "shape"))
        found.append(names.setdefault((eqn.primitive, *shapes), len(names)))
    return np.array(found, np.int64)


def _runs(codes: np.ndarray) -> list[tuple[int, int, int]]:
    """Return `(start, end, period)` of all runs of at least two equal blocks: the longest first, then short periods."""
    found = []
    for period in range(LEAST, min(MOST, len(codes) // 2) + 1):
        same = np.concatenate([[0], (codes[:-period] == codes[period:]).astype(np.int8), [0]])
        change = np.diff(same)
        for start, stop in zip(np.flatnonzero(change == 1), np.flatnonzero(change == -1), strict=True):
            if stop - start >= period:
                found.append((int(start), int(stop) + period, period))
    return sorted(found, key=lambda run: (run[0] - run[1], run[2]))


def _stretch(graph: g.Graph, region: g.Region, run: tuple[int, int, int], blocks: int, most: int) -> Stretch:
    start, end, period = run
    low, high = max(0, start - period), min(len(region.ops), end + period)
    held = _crossing_bytes(graph, region, low, high, period)
    whole = (end - start) // period
    profile = held[start - low :][: whole * period].reshape(whole, period).max(axis=0)
    phases = _phases(profile, 2 if 2 * blocks <= most else 1)
    every = -(-blocks // most)
    found = {p for phase in phases for p in range(start + phase, end, every * period)}
    if every == 1:
        near = [p + sign * period for p in found for sign in (-1, 1)]
        found |= {
            q for p in near if not start <= p < end for q in _necks(held, p, low, period // _SHIFT, profile.min())
        }
    return Stretch(start, end, period, len(phases), tuple(sorted(found)))


def _phases(profile: np.ndarray, parts: int) -> list[int]:
    """Return where in a block the cuts lie: as far apart as may be where as little crosses as anywhere in it."""
    period = len(profile)
    narrow = profile <= _FLAT * profile.min()
    begins = [j for j in range(period) if narrow[j] and not narrow[j - 1]] or [int(profile.argmin())]
    pairs = [(min(b - a, a + period - b), a, b) for a, b in itertools.combinations(begins, 2)]
    apart, *pair = max(pairs, key=lambda pair: pair[0], default=(0,))
    return pair if parts == 2 and 4 * apart >= period else [begins[int(np.argmin(profile[begins]))]]


def _necks(held: np.ndarray, at: int, low: int, shift: int, level: float) -> list[int]:
    """Return the position nearest to `at` where about as much crosses as at the cuts, if there is one near."""
    first = max(low, at - shift)
    off = np.abs(held[first - low : max(0, at + shift + 1 - low)] - level)
    close = first + np.flatnonzero(off <= (_BESIDE - 1) * level)
    return close[np.argsort(np.abs(close - at), kind="stable")][:1].tolist()


def _crossing_bytes(graph: g.Graph, region: g.Region, start: int, end: int, reach: int) -> np.ndarray:
    """Return, for each position of a stretch, the bytes made at most `reach` before it and read at most so far on."""
    change = np.zeros(end - start + 1)
    for v, (first, last) in crossing(graph, region, start, end, reach).items():
        low, high = max(first, start), min(last + 1, end)
        if low < high:
            size = _cost.aval_bytes(graph.values[v].aval)
            change[low - start] += size
            change[high - start] -= size
    return np.cumsum(change)[: end - start]
