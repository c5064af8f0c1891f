"""The finishing bench: better plans near those that the cut has found, for steps with few operations.

In: a search (survey, operations that may be run again, scorer, plans found so far). Out: more plans, scored by the
search itself. The cut's plans lie on the lower hull of peak against time and know no order within a segment; here a
local search over single decisions fills in what lies between and below: a value run again just after the peak, kept for
a later use or run once more, and repeats left out that free nothing. It plays thousands of plans on a model of its own
(`_Model`: which value is held from when to when) and hands the best ones, and nothing else, to the scorer. It measures
nothing of XLA, and does nothing for steps with loops or with more operations than `MOST_OPERATIONS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memopt import _fusion, _segments
from memopt import _graph as g
from memopt._network import Choice
from memopt._survey import Survey

MOST_OPERATIONS = 160  # longer steps are left to the cut
_PLAYED = 60_000  # operations played in all: the number of plans tried falls with the length of the step
_FRONT = 40  # plans scored at most
_LONG = 100  # in plans of more repeats, single ones are not tried
_DEEPER = 30  # plans that are no best ones, from which the search goes on when the best ones give nothing new
#: Operations that may write their result into the buffer of an operand.
_IN_PLACE = _fusion.ELEMENTWISE | _fusion.UPDATES | {"sort", "while", "scan"}

Plan = frozenset[tuple[int, int]]  # (operation, segment in which its repeat is there); the segment may be ALONE


def refine(search: Any) -> None:
    """Score better plans near those that a search has found; they join its `seen`.

    Args:
      search: has `survey`, `repeatable`, `seen`, `always`, `score(choice)` and `holding(survey)`.
    """
    graph = search.survey.graph
    if len(graph.regions) > 1 or len(graph.ops) > MOST_OPERATIONS or search.always or not search.repeatable:
        return
    model = _Model(graph, search.repeatable, search.holding(search.survey))
    starts = [_entries(rung.choice.repeats) for rung in search.seen.values() if not rung.choice.stores]
    for plan in _Front(model, starts).best():
        search.score(Choice(_repeats(plan)))


@dataclasses.dataclass(frozen=True)
class Holding:
    """What the model knows of each operation: one entry for each.

    Attributes:
      size_bytes: bytes of its results while they live; results of the step are held throughout and count none.
      fused: whether XLA computes it inside whoever reads it.
      in_place: whether its result may take the buffer of an operand that dies there.
    """

    size_bytes: Sequence[int]
    fused: Sequence[bool]
    in_place: Sequence[bool]


def holding(survey: Survey) -> Holding:
    """Return what the operations of a step hold under XLA, by the rules of the timeline."""
    graph = survey.graph
    stored = _fusion.materialised(graph.closed, survey.target.platform)
    results = {v for v in graph.top.outs if v is not None}
    kept = [[v for v in op.outputs if v not in results] for op in graph.ops]
    return Holding(
        [sum(survey.bytes_of_value(v) for v in values) for values in kept],
        [not any(graph.values[v].var in stored or v in results for v in op.outputs) for op in graph.ops],
        [op.eqn.primitive.name in _IN_PLACE for op in graph.ops],
    )


def _entries(repeats: Mapping[int, frozenset[int]]) -> Plan:
    return frozenset((op, place) for place, ops in repeats.items() for op in ops)


def _repeats(plan: Plan) -> dict[int, frozenset[int]]:
    return {place: frozenset(ops) for place, ops in sorted(_by_place(plan).items())}


def _by_place(plan: Plan) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for op, place in plan:
        if place in found:
            found[place].add(op)
        else:
            found[place] = {op}
    return found


@dataclasses.dataclass(slots=True)
class _Played:
    """What a plan's schedule holds: runs in order, each with its operation, its last reader and where it is read."""

    peak_bytes: int
    seconds: float
    op: list[int]
    last: list[int]
    read: list[list[int]]
    original: list[int]
    tight: tuple[int, ...]  # the first and the last run at which the peak is reached


class _Model:
    """Plays a plan as the builders will place it: repeats before their first reader, shared along chains."""

    def __init__(self, graph: g.Graph, repeatable: Mapping[int, float], holding: Holding):
        self.graph, self.repeatable, self.holding = graph, repeatable, holding
        self.place = [op.bin for op in graph.ops]
        self.end, self.near = graph.top.bins[-1], _segments.near(graph.top)
        self.reads = [_makers(graph, op.inputs) for op in graph.ops]
        self.results = _makers(graph, graph.top.outs)
        self.known: dict[Plan, _Played] = {}

    def play(self, plan: Plan) -> _Played:
        """Return the schedule of a plan; played once."""
        if plan not in self.known:
            self.known[plan] = _Play(self, plan).result()
        return self.known[plan]


def _makers(graph: g.Graph, values: Sequence[int | None]) -> tuple[int, ...]:
    ops = [graph.values[v].op for v in values if v is not None]
    return tuple(dict.fromkeys(op.id for op in ops if op is not None))


class _Play:
    """One plan while it is played."""

    def __init__(self, model: _Model, plan: Plan):
        self.model = model
        self.planned = _by_place(plan)
        self.chain = _segments.chains(model.graph, self.planned)
        self.clones: dict[int, tuple[int, int]] = {}
        self.op: list[int] = []
        self.last: list[int] = []
        self.read: list[list[int]] = []
        self.reads: list[list[int]] = []
        self.original: list[int] = []
        self.forced: set[int] = set()  # runs whose results pass a barrier, and are in memory for it

    def result(self) -> _Played:
        model = self.model
        for op, place in enumerate(model.place):
            self.original.append(self._run(op, place, [self._get(v, place) for v in model.reads[op]]))
        for run in [self._get(v, model.end) for v in model.results]:
            self.last[run] = len(self.op)
            self.read[run].append(model.end)
        return self._summed()

    def _run(self, op: int, place: int, reads: list[int]) -> int:
        now = len(self.op)
        for run in reads:
            self.last[run] = now
            self.read[run].append(place)
        self.op.append(op)
        self.last.append(now)
        self.read.append([])
        self.reads.append(reads)
        return now

    def _get(self, op: int, place: int) -> int:
        """Return the run that a reader at this place reads, repeating what is planned."""
        if op not in self.planned.get(place, ()) or self.model.place[op] >= place:
            return self.original[op]
        if not self._shared(op, place):
            self._repeat(op, place)
        return self.clones[op][1]

    def _shared(self, op: int, place: int) -> bool:
        return op in self.clones and self.clones[op][0] == self.chain[op, place]

    def _repeat(self, op: int, place: int) -> None:
        planned, reads = self.planned[place], self.model.reads
        batch, stack = set(), [op]
        while stack:
            one = stack.pop()
            if one not in batch:
                batch.add(one)
                stack += [v for v in reads[one] if v in planned and self._later(v, place)]
        for one in sorted(batch):
            again = [v in planned and self.model.place[v] < place for v in reads[one]]
            runs = [self.clones[v][1] if yes else self.original[v] for v, yes in zip(reads[one], again, strict=True)]
            self.forced.update(run for run, yes in zip(runs, again, strict=True) if not yes)
            self.clones[one] = (self.chain[one, place], self._run(one, place, runs))

    def _later(self, op: int, place: int) -> bool:
        return self.model.place[op] < place and not self._shared(op, place)

    def _summed(self) -> _Played:
        sizes = self._sizes()
        peak, tight = self._sweep(sizes)
        ends = tuple(dict.fromkeys((tight[0], tight[-1]))) if tight else ()
        return _Played(peak, self._seconds(), self.op, self.last, self.read, self.original, ends)

    def _sizes(self) -> list[int]:
        """Return each run's bytes; what a fused run reads is held until its own readers are done."""
        held = self.model.holding
        sizes = [0] * len(self.op)
        for run in range(len(self.op) - 1, -1, -1):
            op = self.op[run]
            if held.fused[op] and run not in self.forced:
                for source in self.reads[run]:
                    self.last[source] = max(self.last[source], self.last[run])
            else:
                sizes[run] = held.size_bytes[op]
        return sizes

    def _sweep(self, sizes: list[int]) -> tuple[int, list[int]]:
        dying = [0] * (len(self.op) + 1)
        for run, size in enumerate(sizes):
            if self.last[run] > run:
                dying[self.last[run]] += size
        held = peak = 0
        tight: list[int] = []
        for run, size in enumerate(sizes):
            now = held + size
            if self.model.holding.in_place[self.op[run]]:
                now -= min(size, dying[run])
            if now > peak:
                peak, tight = now, []
            if now == peak:
                tight.append(run)
            held += (size if self.last[run] > run else 0) - dying[run]
        return peak, tight

    def _seconds(self) -> float:
        return sum(self.model.repeatable[op] for run, op in enumerate(self.op) if self.original[op] != run)


class _Front:
    """The plans that no other beats in peak and time, found by trying the neighbours of each."""

    def __init__(self, model: _Model, starts: Sequence[Plan]):
        self.model = model
        self.most = _PLAYED // max(1, len(model.place))
        self.front: dict[Plan, _Played] = {}  # in the order found
        self.tried: set[Plan] = set()
        for plan in [frozenset(), *starts]:
            self._offer(plan)

    def best(self) -> list[Plan]:
        """Search, and return the plans found, largest peak first."""
        self._exhaust()
        for plan in self._deeper():
            self._try(plan)
        self._exhaust()
        found = sorted(self.front, key=lambda plan: -self.front[plan].peak_bytes)
        every = -(-len(found) // _FRONT)
        return found[::-1][::every][::-1] if found else []

    def _exhaust(self) -> None:
        while True:
            new = [plan for plan in self.front if plan not in self.tried]
            if not new or len(self.model.known) >= self.most:
                return
            for plan in sorted(new, key=lambda p: (self.front[p].peak_bytes, self.front[p].seconds)):
                if plan in self.front:
                    self._try(plan)

    def _deeper(self) -> list[Plan]:
        """Return plans that have almost the smallest peak, the quickest first."""
        least = min(played.peak_bytes for played in self.front.values())
        found: dict[Plan, None] = {}
        for bound in (least, 1.1 * least):
            near = [
                (p.seconds, len(plan), plan)
                for plan, p in self.model.known.items()
                if p.peak_bytes <= bound and plan not in self.tried
            ]
            near.sort(key=lambda item: item[:2])
            found.update((plan, None) for _, _, plan in near[:_DEEPER])
        return list(found)

    def _try(self, plan: Plan) -> None:
        self.tried.add(plan)
        for other in _neighbours(self.model, plan):
            if len(self.model.known) >= self.most:
                return
            if other not in self.model.known:
                self._offer(other)

    def _offer(self, plan: Plan) -> None:
        new = self.model.play(plan)
        for old in self.front.values():
            if old.peak_bytes <= new.peak_bytes and old.seconds <= new.seconds * (1 + 1e-12):
                return
        self.front = {
            p: old for p, old in self.front.items() if old.peak_bytes < new.peak_bytes or old.seconds < new.seconds
        }
        self.front[plan] = new


def _neighbours(model: _Model, plan: Plan) -> Iterator[Plan]:
    """Yield plans that hold less at the peak of this one, and plans that repeat less."""
    played = model.play(plan)
    for time in played.tight:
        for run, op in enumerate(played.op):
            if run < time <= played.last[run] and op in model.repeatable:
                yield from _released(model, plan, played, run)
    yield from _without(plan)


def _released(model: _Model, plan: Plan, played: _Played, run: int) -> Iterator[Plan]:
    """Yield plans in which later readers of a run read a repeat instead."""
    op = played.op[run]
    places = sorted({p for p in played.read[run] if p > model.place[op]})
    for i, first in enumerate(places):
        rest = places[i:]
        chained, each = {(op, p) for p in (*range(first, rest[-1], model.near), rest[-1])}, {(op, p) for p in rest}
        for new in (chained, each, {(op, first)}) if len(rest) > 1 else (each,):
            for whole in _with_inputs(model, plan, played, op, new, first):
                yield plan | whole
                alone = {
                    (o, _segments.ALONE)
                    for o, p in whole
                    if (o, p - 1) in plan or (o, p + 1) in plan or (o, p + 1) in whole
                }
                if alone:
                    yield plan | whole | alone


def _with_inputs(model, plan: Plan, played: _Played, op: int, new: set, place: int) -> Iterator[set]:
    """Yield a repeat by itself, with its inputs' repeats, and with all that is not there any more at its place."""
    yield new
    once, all_of_it = set(new), set(new)
    stack, depth = [op], 0
    while stack:
        gone = [v for one in stack for v in model.reads[one] if _gone(model, plan, played, v, place)]
        stack = [v for v in dict.fromkeys(gone) if (v, place) not in all_of_it]
        all_of_it |= {(v, place) for v in stack}
        depth += 1
        if depth == 1:
            once = set(all_of_it)
    if once != new:
        yield once
    if all_of_it != once:
        yield all_of_it


def _gone(model: _Model, plan: Plan, played: _Played, op: int, place: int) -> bool:
    if op not in model.repeatable or model.place[op] >= place or (op, place) in plan:
        return False
    return max(played.read[played.original[op]], default=-1) < place


def _without(plan: Plan) -> Iterator[Plan]:
    """Yield a plan without one repeat, one operation's repeats, one place's; and with repeats apart or made earlier."""
    for op in {op for op, _ in plan}:
        yield frozenset(e for e in plan if e[0] != op)
    for place in {place for _, place in plan}:
        yield frozenset(e for e in plan if e[1] != place)
    if len(plan) > _LONG:
        return
    for entry in plan:
        yield plan - {entry}
    for op in {op for op, _ in plan}:
        yield plan | {(op, _segments.ALONE)}
    for op, place in plan:
        if place > 0:
            yield plan | {(op, place - 1)}
