"""Addresses: what XLA's buffer assignment makes of a set of lifetimes.

In come buffers with a size, a start and an end; out go the most bytes alive at once and the size of the heap that XLA
lays out for them, with the holes its order leaves. Pure arithmetic: nothing here knows of jaxprs or devices.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(slots=True)
class Buffer:
    """One allocation: `bytes` from time `start` to time `end`, both included.

    `first_end` is when the first of the values that share the buffer dies: XLA counts fragmentation by it alone.
    """

    bytes: int
    start: int
    end: int
    first_end: int
    value: Any = None


def live_bytes(buffers: Sequence[Buffer], length: int, *, first: bool = False) -> list[int]:
    """Return the bytes alive at each time; with `first`, only while each buffer's first value is."""
    change = [0] * (length + 2)
    for b in buffers:
        change[b.start] += b.bytes
        change[min(b.first_end if first else b.end, length) + 1] -= b.bytes
    return list(itertools.accumulate(change[: length + 1]))


def without_fast_memory(buffers: Sequence[Buffer], length: int, capacity: int, patience: int = 40) -> list[Buffer]:
    """Return the buffers that stay in main memory when the shortest-lived ones go to a fast memory of `capacity` bytes.

    Buffers that live longer than `patience` steps are written back to main memory at once and stay.
    """
    if not capacity:
        return list(buffers)
    used = np.zeros(length + 2, np.int64)
    kept = []
    for b in sorted(buffers, key=lambda b: (b.end - b.start, -b.bytes)):
        if b.end - b.start <= patience and 2 * b.bytes <= capacity * 1.2:
            window = used[b.start : b.end + 1]
            if window.max(initial=0) + b.bytes <= capacity:
                window += b.bytes
                continue
        kept.append(b)
    return kept


def heap_bytes(buffers: Sequence[Buffer], share: float = 1 / 4096) -> int:
    """Return the size of the heap when buffers are placed in the order in which they are made, best fit.

    Buffers below `share` of the largest total are not placed but added at their sum's peak.
    """
    if not buffers:
        return 0
    floor = max(b.bytes for b in buffers) * share
    large = sorted((b for b in buffers if b.bytes > floor), key=lambda b: (b.start, -b.bytes))
    small = [b for b in buffers if b.bytes <= floor]
    length = max(b.end for b in buffers)
    return _place(large) + max(live_bytes(small, length), default=0)


def _place(buffers: Sequence[Buffer]) -> int:
    """Place buffers in order of their start, each in the smallest hole below another live one that holds it."""
    heap = _Heap()
    ends: list[tuple[int, int, int]] = []
    for b in buffers:
        while ends and ends[0][0] < b.start:
            _, low, high = heapq.heappop(ends)
            heap.free(low, high)
        at = heap.take(b.bytes)
        heapq.heappush(ends, (b.end, at, at + b.bytes))
    return heap.most


class _Heap:
    """The holes between live buffers, found by size (the lowest of equal ones first) and by address."""

    def __init__(self) -> None:
        self.holes: list[tuple[int, int]] = []  # (size, low), sorted
        self.from_low: dict[int, int] = {}  # of each hole: low -> high
        self.from_high: dict[int, int] = {}
        self.edge = 0  # above it nothing is live
        self.most = 0

    def take(self, size: int) -> int:
        """Place a buffer and return its address."""
        found = bisect.bisect_left(self.holes, (size, -1))
        if found == len(self.holes):
            at, self.edge = self.edge, self.edge + size
            self.most = max(self.most, self.edge)
            return at
        room, at = self.holes[found]
        high = at + room
        self._drop(at, high)
        if room > size:
            self._add(at + size, high)
        return at

    def free(self, low: int, high: int) -> None:
        """Give back the place of a buffer, joined to the holes beside it."""
        if low in self.from_high:
            before = self.from_high[low]
            self._drop(before, low)
            low = before
        if high == self.edge:
            self.edge = low
            return
        if high in self.from_low:
            after = self.from_low[high]
            self._drop(high, after)
            high = after
        self._add(low, high)

    def _add(self, low: int, high: int) -> None:
        bisect.insort(self.holes, (high - low, low))
        self.from_low[low], self.from_high[high] = high, low

    def _drop(self, low: int, high: int) -> None:
        del self.holes[bisect.bisect_left(self.holes, (high - low, low))]
        del self.from_low[low], self.from_high[high]
