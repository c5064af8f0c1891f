"""The clock of the house: each region's order of operations cut into time segments.

In: a `Graph`. Out: every operation's `bin` and every region's `bins`, numbered over all regions. A segment is the grain
in which the planner prices memory and in which repeats are shared: uses of a value in one segment read one repeat, uses
in different segments are decided apart. Boundaries lie where little that is short-lived crosses, between the layers of
an unrolled model; a loop is a segment of its own. It prices nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

from memopt import _blocks, _cost
from memopt import _graph as g

MOST_SEGMENTS = 64  # a region, however long: more segments cost planning time and decide no better
MOST_BLOCKS = 96  # parts of repeating blocks
_COARSE = 8  # how much longer segments are behind the last matmul, where an unrolled step updates its state
NEAR = 20  # uses of a repeated value at most 1/NEAR of a region's segments apart share one repeat
ALONE = -1  # in a plan, in place of a segment: operations whose repeats no two segments share
_SMALL = 200  # values this many times smaller than the largest do not widen a neck
_APART = 3  # of necks fewer operations apart only the last counts
ONE_SEGMENT_BODY = 300  # a loop body of up to so many operations is one segment


def assign(graph: g.Graph) -> int:
    """Set `bin` on every operation and `bins` on every region; return the number of segments."""
    count = 0
    for region in graph.regions:
        starts = _boundaries(graph, region)
        edges = [*starts, len(region.ops)]
        for k in range(len(starts)):
            for op in region.ops[edges[k] : edges[k + 1]]:
                op.bin = count + k
        region.bins = range(count, count + max(1, len(starts)))
        count += max(1, len(starts))
    return count


def _boundaries(graph: g.Graph, region: g.Region) -> list[int]:
    total = len(region.ops)
    loops = [i for i, op in enumerate(region.ops) if op.bodies]
    cuts = {0} | {i for i in loops} | {i + 1 for i in loops if i + 1 < total}
    if _repeats_whole(region) and total <= ONE_SEGMENT_BODY:
        return sorted(cuts) if total else []
    crossing = _crossing_bytes(graph, region)
    step = max(1, total // MOST_SEGMENTS)
    stretches = _blocks.stretches(graph, region, MOST_BLOCKS)
    inside = {pair for s in stretches for pair in zip(s.cuts, s.cuts[1:], strict=False)}
    cuts.update(i for s in stretches for i in s.cuts)
    last = _blocks.last_heavy(region) if stretches else total
    cuts |= {last} - {total}
    step = max([step, *(b - a for a, b in inside)])
    edges = [*sorted(cuts), total]
    for lo, hi in zip(edges, edges[1:], strict=False):
        if (lo, hi) not in inside:
            cuts.update(_necks(crossing, lo, hi, step if hi <= last else _COARSE * step))
    return sorted(cuts)


def _repeats_whole(region: g.Region) -> bool:
    """Say whether a region is the body of a loop or a branch; a `shard_map` outside loops is as long as the step."""
    return region.op is not None and (region.trips > 1 or region.op.eqn.primitive.name != "shard_map")


def _necks(crossing: np.ndarray, lo: int, hi: int, step: int) -> list[int]:
    """Return boundaries between `lo` and `hi`, about `step` apart, each where the least crosses."""
    found, at = [], lo
    while hi - at > step:
        first = at + max(1, step // 2)
        window = crossing[first : min(at + 3 * step // 2, hi - 1) + 1]
        at = first + int(np.argmin(window))
        found.append(at)
    return found


def near(region: g.Region) -> int:
    """Return how many segments apart two uses of a repeated value may be to share one repeat."""
    return max(1, len(region.bins) // NEAR)


def chains(graph: g.Graph, repeats: Mapping[int, Set[int]]) -> dict[tuple[int, int], int]:
    """Return, for each operation and segment in which a plan has a repeat of it, the first segment of the same repeat.

    A repeat serves all segments that follow each other at most `near` apart, and is held from the first to the last
    reader in them; so a segment without a reader says that a repeat is kept for the next one.
    """
    first: dict[tuple[int, int], int] = {}
    alone = repeats.get(ALONE, ())
    for region in graph.regions:
        reach = near(region)
        latest: dict[int, tuple[int, int]] = {}  # operation -> its latest segment, the first one of that repeat
        for place in sorted(p for p in repeats if p in region.bins):
            for op in repeats[place]:
                start = place
                if op in latest and op not in alone:
                    before, since = latest[op]
                    start = since if place - before <= reach else place
                first[op, place] = start
                latest[op] = place, start
    return first


def necks(graph: g.Graph, peak: int) -> list[int]:
    """Return the operations of the top region up to segment `peak` whose one result is all that is read later there.

    Left out are small values, values that live long (what every layer reads), and a neck right before another one.
    """
    ops = [op for op in graph.top.ops if op.bin <= peak]
    last: dict[int, int] = {}
    for i, op in enumerate(ops):
        for v in op.inputs:
            if v is not None and graph.values[v].region == graph.top.id and graph.values[v].op is not None:
                last[v] = i
    sizes = {v: _cost.aval_bytes(graph.values[v].aval) for v in last}
    least = max(sizes.values(), default=0) / _SMALL
    count, total = np.zeros(len(ops) + 2, np.int64), np.zeros(len(ops) + 2, np.int64)
    for v, end in last.items():
        start = graph.values[v].op.index
        if sizes[v] >= least and end - start <= len(ops) / 3:
            count[start + 1] += 1
            count[end + 1] -= 1
            total[start + 1] += v
            total[end + 1] -= v
    alone = np.flatnonzero(np.cumsum(count) == 1)
    values = list(dict.fromkeys(np.cumsum(total)[alone].tolist()))
    found = [graph.values[v].op for v in values]
    followed = [op.index + _APART < after.index for op, after in zip(found, found[1:], strict=False)]
    return [op.id for op, far in zip(found, [*followed, True], strict=False) if far]


def _crossing_bytes(graph: g.Graph, region: g.Region) -> np.ndarray:
    """Return, for each position, the bytes of short-lived values that are made before it and read from it on."""
    total = len(region.ops)
    last: dict[int, int] = {}
    for i, op in enumerate(region.ops):
        for v in op.inputs:
            if v is not None and graph.values[v].region == region.id and graph.values[v].op is not None:
                last[v] = i
    change = np.zeros(total + 2)
    for v, end in last.items():
        start = graph.values[v].op.index
        if end - start <= total // 8:
            size = _cost.aval_bytes(graph.values[v].aval)
            change[start + 1] += size
            change[end + 1] -= size
    return np.cumsum(change)[: total + 1]
