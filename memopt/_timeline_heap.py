"""Addresses: what XLA's buffer assignment makes of a set of lifetimes.

In come buffers with a size, a start and an end; out go the most bytes alive at once and the size of the heap that XLA
lays out for them, with the holes its order leaves. Pure arithmetic: nothing here knows of jaxprs or devices.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
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
    total, found = 0, []
    for step in change[: length + 1]:
        total += step
        found.append(total)
    return found


def without_fast_memory(buffers: Sequence[Buffer], length: int, capacity: int, patience: int = 40) -> list[Buffer]:
    """Return the buffers that stay in main memory when the shortest-lived ones go to a fast memory of `capacity` bytes.

    Buffers that live longer than `patience` steps are written back to main memory at once and stay.
    """
    if not capacity:
        return list(buffers)
    used = np.zeros(length + 2, np.int64)
    kept = []
    for b in sorted(buffers, key=lambda b: (b.end - b.start, -b.bytes)):
        window = used[b.start : b.end + 1]
        small = 2 * b.bytes <= capacity * 1.2 and window.max(initial=0) + b.bytes <= capacity
        if b.end - b.start <= patience and small:
            window += b.bytes
        else:
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
    placed: list[tuple[int, int]] = []  # (low, high), sorted
    ends: list[tuple[int, int, int]] = []
    top = 0
    for b in buffers:
        while ends and ends[0][0] < b.start:
            _, low, high = heapq.heappop(ends)
            del placed[bisect.bisect_left(placed, (low, high))]
        at = _hole(placed, b.bytes)
        bisect.insort(placed, (at, at + b.bytes))
        heapq.heappush(ends, (b.end, at, at + b.bytes))
        top = max(top, at + b.bytes)
    return top


def _hole(placed: Sequence[tuple[int, int]], size: int) -> int:
    best, at, edge = None, 0, 0
    for low, high in placed:
        room = low - edge
        if room >= size and (best is None or room < best):
            best, at = room, edge
        edge = max(edge, high)
    return edge if best is None else at
