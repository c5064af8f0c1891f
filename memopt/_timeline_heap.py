"""Addresses: what XLA's buffer assignment makes of a set of lifetimes.

In come buffers with a size, a start and an end; out go the most bytes alive at once and the size of the heap that XLA
lays out for them, with the holes its order leaves. Pure arithmetic: nothing here knows of jaxprs or devices.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(slots=True)
class Buffer:
    """One allocation: `bytes` from time `start` to time `end`, both included.

    `first_end` is when the first of the values that share the buffer dies: XLA's count of fragmentation follows only it.
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


def heap_bytes(buffers: Sequence[Buffer], share: float = 1 / 4096) -> int:
    """Return the size of the heap when buffers are placed in the order in which they are made, best fit.

    Buffers below `share` of the largest total are not placed but added at their sum's peak.
    """
    if not buffers:
        return 0
    floor = max(b.bytes for b in buffers) * share
    large = sorted((b for b in buffers if b.bytes > floor), key=lambda b: b.start)
    small = [b for b in buffers if b.bytes <= floor]
    length = max(b.end for b in buffers)
    return _place(large) + max(live_bytes(small, length), default=0)


def _place(buffers: Sequence[Buffer]) -> int:
    free: list[list[int]] = []
    ends: list[tuple[int, int, int]] = []
    top = 0
    for b in buffers:
        while ends and ends[0][0] < b.start:
            _, low, high = heapq.heappop(ends)
            _release(free, low, high)
        hole = min((f for f in free if f[1] - f[0] >= b.bytes), key=lambda f: f[1] - f[0], default=None)
        if hole is None:
            if free and free[-1][1] == top:
                low = free.pop()[0]
            else:
                low = top
            top = low + b.bytes
        else:
            low = hole[0]
            hole[0] += b.bytes
            if hole[0] == hole[1]:
                free.remove(hole)
        heapq.heappush(ends, (b.end, low, low + b.bytes))
    return top


def _release(free: list[list[int]], low: int, high: int) -> None:
    place = 0
    while place < len(free) and free[place][0] < low:
        place += 1
    if place and free[place - 1][1] == low:
        free[place - 1][1] = high
        if place < len(free) and free[place][0] == high:
            free[place - 1][1] = free.pop(place)[1]
    elif place < len(free) and free[place][0] == high:
        free[place][0] = low
    else:
        free.insert(place, [low, high])
