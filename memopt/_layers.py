"""The floor plan: plans of an unrolled step made block by block, different blocks as different as pays.

In: a search (graph, survey, operations that may be run again, scorer). Out: more plans, scored by the search itself.
The blocks of the forward pass are found where its operations repeat (`_blocks`). A few *levels* say what a block keeps:
what enters it, what narrows it inside, the matmuls of a part of it that save much for their bytes (attention scores do
not), those of all parts, all matmuls, everything. Where a block keeps what enters it alone, attention may also be run
again twice: for what follows it in the block, and for its own backward pass, so that the scores do not wait for that
through the rest of the block. Each level is built and simulated once for all blocks alike; from those timelines
follow the bytes that a block at a level holds until its backward pass, and those at work there. Then, for one bound
on the bytes after another, the levels of all blocks that cost the fewest FLOPs are chosen by dynamic programming over
the blocks, and that plan goes to the scorer. The last blocks, whose backward pass comes first, may so be kept whole,
where one price of memory for all would repeat them. It measures nothing of XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from memopt import _blocks, _cost, _segments
from memopt import _graph as g
from memopt._network import Choice

_BOUNDS, _LEAST_BOUNDS, _BUILT = 16, 6, 30_000  # bounds tried, and operations of the step times bounds
_CLOSE = 0.04  # levels nearer than this share of their bytes need no bound between them
_SLACK = 1.005  # a bound may be passed by this much: what a block holds is known about so well
_DENSE = 0.5  # of the median over the matmuls of the blocks
LONG = 2000  # operations of a step from which fewer plans are tried
_STATES = 300  # partial plans kept at each block
_LEAST_BLOCKS = 3


@dataclasses.dataclass(frozen=True)
class Level:
    """What blocks do: operations of all blocks whose results are kept, and those whose repeats are never shared."""

    kept: frozenset[int]
    alone: frozenset[int] = frozenset()


def plan(search: Any) -> bool:
    """Score plans made block by block; they join the search's `seen`. Say whether the step has such blocks.

    Args:
      search: has `survey`, `repeatable`, `always` and `score(choice)`, which returns a rung with its `usage`.
    """
    layers = _layers(search)
    if layers is None:
        return False
    table = _Table(search, layers)
    bounds = table.bounds(max(_LEAST_BOUNDS, min(_BOUNDS, _BUILT // len(search.survey.graph.ops))))
    found = [levels for bound in bounds if (levels := table.cheapest(bound)) is not None]
    frugal = 1 if len(search.survey.graph.ops) > LONG else 2
    for levels in dict.fromkeys([*found, *_last_alone(table, frugal)]):
        search.score(layers.choice([table.kept[k] for k in levels]))
    return True


def _last_alone(table: _Table, most: int) -> Iterator[tuple[int, ...]]:
    """Yield the most frugal plans, but for the last block: its backward pass is first, where XLA's heap has holes."""
    blocks = table.flops.shape[1]
    by_bytes = sorted(range(len(table.each)), key=lambda k: table.each[k])
    for at, frugal in enumerate(by_bytes[:most]):
        for last in by_bytes[at + 1 :]:
            if table.flops[last, -1] < table.flops[frugal, -1]:
                yield (frugal,) * (blocks - 1) + (last,)


def _layers(search: Any) -> Layers | None:
    """Return the blocks of the forward pass: the longest stretch that is read again after its end."""
    graph = search.survey.graph
    found = [Layers(search, s) for s in _blocks.stretches(graph, graph.top, _segments.MOST_BLOCKS) if s.parts]
    found = [x for x in found if len(x.blocks) >= _LEAST_BLOCKS and x.needs]
    return max(found, key=lambda x: len(x.needs), default=None)


class Layers:
    """The blocks of a forward pass, and who reads them in the backward pass.

    Attributes:
      blocks: for each block, the positions of its first operation, of its inner cuts, and after its last operation.
      needs: `(operation, segment)`: what is read in later segments than those of the blocks.
    """

    def __init__(self, search: Any, stretch: _blocks.Stretch):
        self.search, self.graph = search, search.survey.graph
        self.top = self.graph.top
        cuts = stretch.cuts
        starts = range(0, len(cuts) - stretch.parts, stretch.parts)
        self.blocks = [cuts[k : k + stretch.parts + 1] for k in starts]
        self.period = stretch.period
        if not self.blocks:
            self.needs = []
            return
        self.first, self.end = self.blocks[0][0], self.blocks[-1][-1]
        self.last_bin = self.top.ops[self.end - 1].bin
        self.needs = list(self._find_needs())

    def _find_needs(self) -> Iterator[tuple[g.Op, int]]:
        survey = self.search.survey
        for value, place in survey.needs():
            op = self.graph.values[value].op
            if op is not None and place > self.last_bin and op.region == self.top.id and survey.is_here(value, place):
                if self.first <= op.index < self.end:
                    yield op, place

    @functools.cached_property
    def block_of(self) -> np.ndarray:
        """For each position of the top region, the block that it is in, or -1."""
        found = np.full(len(self.top.ops), -1)
        for k, block in enumerate(self.blocks):
            found[block[0] : block[-1]] = k
        return found

    @functools.cached_property
    def levels(self) -> list[Level]:
        """What blocks may keep, from little to everything; last, little again, with attention run again twice."""
        ends = self._crossing([block[-1] for block in self.blocks])
        necks = ends | self._crossing([cut for block in self.blocks for cut in block[1:-1]])
        parts = [self._matmuls(k, self._dense) for k in range(len(self.blocks[0]) - 1)]
        every = necks.union(*(self._matmuls(k, 0.0) for k in range(len(parts))))
        whole = frozenset(op.id for op in self.top.ops[self.first : self.end])
        found = [ends, necks, *(necks | part for part in parts), necks.union(*parts), every, whole]
        return [*map(Level, dict.fromkeys(found)), *([Level(ends, self._light)] if self._light else [])]

    @functools.cached_property
    def _light(self) -> frozenset[int]:
        """The matmuls that save little for their bytes, and what lies between them and those that save much."""
        if len(self.blocks[0]) == 2:  # no block has a rest
            return frozenset()
        ops = self.top.ops[self.first : self.end]
        dense = {op.id for op in ops if _is_matmul(op) and _flops_a_byte(op) >= self._dense}
        found = {op.id for op in ops if _is_matmul(op)} - dense
        for op in ops:
            if op.id not in dense and any(m.id in found for m in self._makers(op)):
                found.add(op.id)
        for op in reversed(ops):
            if op.id in found:
                found.update(m.id for m in self._makers(op) if m.id not in dense and self.first <= m.index)
        return frozenset(found & set(self.search.repeatable))

    def _makers(self, op: g.Op) -> Iterator[g.Op]:
        made = (self.graph.values[v].op for v in op.inputs if v is not None)
        return (m for m in made if m is not None and m.region == self.top.id)

    def _crossing(self, cuts: Sequence[int]) -> frozenset[int]:
        """Return the operations that make what crosses these positions and is read soon after."""
        held = _blocks.crossing(self.graph, self.top, self.first, self.end, self.period)
        wanted = set(cuts)
        return frozenset(
            self.graph.values[v].op.id
            for v, (low, high) in held.items()
            if self.first < low and any(p in wanted for p in range(low, min(high, self.end) + 1))
        )

    @functools.cached_property
    def _dense(self) -> float:
        """The FLOPs that a matmul has to save for each byte of its result, for blocks that do not keep all of them."""
        ops = [op for op in self.top.ops[self.first : self.end] if _is_matmul(op)]
        return _DENSE * float(np.median([_flops_a_byte(op) for op in ops])) if ops else 0.0

    def _matmuls(self, part: int, least: float) -> frozenset[int]:
        ranges = [self.top.ops[block[part] : block[part + 1]] for block in self.blocks]
        return frozenset(op.id for ops in ranges for op in ops if _is_matmul(op) and _flops_a_byte(op) >= least)

    def choice(self, kept: Sequence[Level]) -> Choice:
        """Return the plan in which each block keeps the results of these operations and repeats what else is read."""
        repeats: dict[int, set[int]] = {}
        for op, place in self.needs:
            found = repeats.setdefault(place, set())
            stack = [op]
            while stack:
                one = stack.pop()
                if one.id not in found and self._is_repeated(one, kept):
                    found.add(one.id)
                    stack += [m for v in one.inputs if v is not None and (m := self.graph.values[v].op) is not None]
        alone = {op for op in frozenset().union(*(level.alone for level in kept)) if op in self._of(op, kept).alone}
        if repeats and alone:
            repeats[_segments.ALONE] = alone
        return Choice({place: frozenset(ops) for place, ops in repeats.items() if ops})

    def _is_repeated(self, op: g.Op, kept: Sequence[Level]) -> bool:
        if op.region != self.top.id or self.block_of[op.index] < 0 or op.id not in self.search.repeatable:
            return False
        return op.id in self.search.always or op.id not in self._of(op.id, kept).kept

    def _of(self, op: int, kept: Sequence[Level]) -> Level:
        return kept[self.block_of[self.graph.ops[op].index]]

    def flops(self, choice: Choice) -> np.ndarray:
        """Return the matmul FLOPs that a plan repeats of each block."""
        found = np.zeros(len(self.blocks))
        for (op, place), first in _segments.chains(self.graph, choice.repeats).items():
            if place == first:
                found[self.block_of[self.graph.ops[op].index]] += _cost.matmul_flops(self.graph.ops[op].eqn)
        return found


@dataclasses.dataclass(frozen=True)
class _Partial:
    """Levels of the first blocks: the bytes that they hold more than at the first level, and what they repeat."""

    held: float
    flops: float
    levels: tuple[int, ...]


class _Table:
    """What each level costs and holds in each block, from one simulation a level."""

    def __init__(self, search: Any, layers: Layers):
        self.kept = layers.levels
        count = len(layers.blocks)
        choices = [layers.choice([level] * count) for level in self.kept]
        usage = np.array([search.score(choice).usage for choice in choices])
        self.flops = np.array([layers.flops(choice) for choice in choices])
        owner = self._owners(layers)
        first = min(owner, default=layers.last_bin + 1)
        head = usage[:, layers.last_bin + 1 : first].max(axis=1, initial=0)
        work = np.zeros((len(self.kept), count))
        for place, block in owner.items():
            work[:, block] = np.maximum(work[:, block], usage[:, place])
        self.held = np.median(np.diff(work - work[:1], axis=1), axis=1)  # more than at the first level, for each block
        before = np.arange(count)
        self.work = work - self.held[:, None] * before  # in use at a block's backward pass, without earlier blocks
        self.head = (head - self.held * count).max()
        self.each = np.maximum(work.max(axis=1), self.head + self.held * count)  # with all blocks alike

    def _owners(self, layers: Layers) -> dict[int, int]:
        """Return the last block that is read in each segment of the backward pass; what it ends with is the next's."""
        ends, found = self.kept[0].kept, {}
        for op, place in layers.needs:
            if op.id not in ends:
                found[place] = max(found.get(place, -1), int(layers.block_of[op.index]))
        return found

    def bounds(self, count: int) -> list[float]:
        """Return bounds on the bytes, from what all blocks take at some level to the least that can be.

        More of them lie in the middle between two, where bytes times FLOPs at stake are most.
        """
        each = [float(x) for x in self.each]
        low, high = 0.0, min(each)
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cheapest(middle) is not None else (middle, high)
        repeated = {x: self._flops_within(x) for x in {*each, high}}
        while len(repeated) < max(count, len(each) + 3):
            found = sorted(repeated)
            gaps = [((b - a) * (repeated[a] - repeated[b]), a, b) for a, b in zip(found, found[1:], strict=False)]
            _, low, high = max((gap for gap in gaps if gap[2] > (1 + _CLOSE) * gap[1]), default=(0, 0.0, 0.0))
            if high == 0.0:
                break
            middle = (low + high) / 2
            repeated[middle] = self._flops_within(middle)
        return sorted((_SLACK * x for x in repeated), reverse=True)

    def _flops_within(self, bound: float) -> float:
        levels = self.cheapest(_SLACK * bound)
        return np.inf if levels is None else sum(self.flops[k, block] for block, k in enumerate(levels))

    def cheapest(self, bound: float) -> tuple[int, ...] | None:
        """Return the level of each block that repeats the fewest FLOPs within a bound; None where nothing fits."""
        states = [_Partial(0.0, 0.0, ())]
        for block in range(self.work.shape[1]):
            states = _best(
                _Partial(s.held + held, s.flops + flops, (*s.levels, k))
                for s in states
                for k, (held, flops) in enumerate(zip(self.held, self.flops[:, block], strict=True))
                if self.work[k, block] + s.held <= bound
            )
        fitting = [s for s in states if self.head + s.held <= bound]
        return min(fitting, key=lambda s: (s.flops, s.held)).levels if fitting else None


def _best(states: Iterator[_Partial]) -> list[_Partial]:
    """Return the partial plans that no other beats in bytes and FLOPs."""
    found: list[_Partial] = []
    for state in sorted(states, key=lambda s: (s.held, s.flops)):
        if not found or state.flops < found[-1].flops:
            found.append(state)
    every = -(-len(found) // _STATES)
    return found[::every] if every > 1 else found


def _is_matmul(op: g.Op) -> bool:
    return op.eqn.primitive.name in ("dot_general", "conv_general_dilated")


def _flops_a_byte(op: g.Op) -> float:
    return _cost.matmul_flops(op.eqn) / max(1, sum(_cost.aval_bytes(v.aval) for v in op.eqn.outvars))
