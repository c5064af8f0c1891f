"""The pattern book: the blocks of an unrolled step, found where its operations repeat.

In: the operations of one region. Out: the stretches in which the same operations come again and again, such as the
forward and the backward pass over the layers of a model, and where one block of them ends and the next begins. It goes
by operations and dataflow alone, never by names, and decides nothing: segments (`_segments`) follow these boundaries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from memopt import _cost
from memopt import _graph as g

LEAST, MOST = 16, 1000  # operations in one block
_FLAT = 1.05  # a neck may be this much wider than the narrowest one
_BESIDE = 1.25  # the same for the block before and the one after a stretch, which may be another kind of block
_SHIFT = 6  # operations that their necks may lie elsewhere
_HEAVY = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "scan", "while"})


def boundaries(graph: g.Graph, region: g.Region, most: int) -> list[tuple[int, int, list[int]]]:
    """Return the stretches of equal blocks in a region, in order, each as `(start, end, cuts)`, all positions.

    Cuts lie where a block begins, and once inside it where that is as narrow and there are at most `most` of them. A
    block holds a matmul, a convolution or a loop.
    """
    eqns = [op.eqn for op in region.ops]
    heavy = np.concatenate([[0], np.cumsum([eqn.primitive.name in _HEAVY for eqn in eqns])])
    chosen: list[tuple[int, int, int]] = []
    for start, end, period in _runs(_codes(eqns)):
        apart = all(end <= low or high <= start for low, high, _ in chosen)
        if apart and heavy[start + period] > heavy[start]:
            chosen.append((start, end, period))
    blocks = sum((end - start) // period for start, end, period in chosen)
    return [(*run[:2], _cuts(graph, region, run, blocks, most)) for run in sorted(chosen)]


def last_heavy(region: g.Region) -> int:
    """Return the position after the last matmul, convolution or loop of a region; what follows are mostly updates."""
    return max((op.index + 1 for op in region.ops if op.eqn.primitive.name in _HEAVY), default=0)


def _codes(eqns: Sequence[Any]) -> np.ndarray:
    """Return a number for each equation; those that do the same with the same shapes have the same."""
    names: dict[Any, int] = {}
    keys = [(eqn.primitive, *((v.aval.shape, v.aval.dtype) for v in eqn.outvars if hasattr(v.aval, "shape"))) for eqn in eqns]
    return np.array([names.setdefault(key, len(names)) for key in keys], np.int64)


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


def _cuts(graph: g.Graph, region: g.Region, run: tuple[int, int, int], blocks: int, most: int) -> list[int]:
    """Return the positions of a stretch's cuts: the same in each block, of which every so many are taken."""
    start, end, period = run
    low, high = max(0, start - period), min(len(region.ops), end + period)
    crossing = _crossing_bytes(graph, region, low, high, period)
    whole = (end - start) // period
    profile = crossing[start - low :][: whole * period].reshape(whole, period).max(axis=0)
    narrow = profile <= _FLAT * profile.min()
    begins = [j for j in range(period) if narrow[j] and not narrow[j - 1]] or [int(profile.argmin())]
    phases = [begins[int(np.argmin(profile[begins]))]]
    if 2 * blocks <= most:
        pairs = [(min(b - a, a + period - b), a, b) for a, b in itertools.combinations(begins, 2)]
        apart, *pair = max(pairs, key=lambda pair: pair[0], default=(0,))
        phases = pair if 4 * apart >= period else phases
    every = -(-blocks // most)
    found = [p for phase in phases for p in range(start + phase, end, every * period)]
    if every == 1:
        near = [p + sign * period for p in found for sign in (-1, 1)]
        found += [_narrowest(crossing, p - low) + low for p in near if low <= p < start or end <= p < high]
    level = _BESIDE * profile.min()
    return sorted({p for p in found if start <= p < end or crossing[p - low] <= level})


def _narrowest(crossing: np.ndarray, at: int) -> int:
    first = max(0, at - _SHIFT)
    return first + int(np.argmin(crossing[first : at + _SHIFT + 1]))


def _crossing_bytes(graph: g.Graph, region: g.Region, start: int, end: int, reach: int) -> np.ndarray:
    """Return, for each position of a stretch, the bytes made at most `reach` before it and read at most so far on."""
    change = np.zeros(end - start + 1)
    last: dict[int, int] = {}
    for op in region.ops[start : min(end + reach, len(region.ops))]:
        for v in op.inputs:
            maker = None if v is None else graph.values[v].op
            if maker is not None and maker.region == region.id and maker.index >= start - reach:
                if op.index - maker.index <= reach:
                    last[v] = op.index
    for v, index in last.items():
        low, high = max(graph.values[v].op.index + 1, start), min(index + 1, end)
        if low < high:
            size = _cost.aval_bytes(graph.values[v].aval)
            change[low - start] += size
            change[high - start] -= size
    return np.cumsum(change)[: end - start]
