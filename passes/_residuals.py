"""The sorting table of the passes that store residuals in another form: which values are read later, by whom.

In: a survey. Out: for each value made before it is needed again the operations that read it later, whether those are
the backward pass, module paths for `where=`, and the seconds of moving bytes. It proposes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

from memopt import _compat as c
from memopt import _forms, _fusion, _scopes
from memopt import _graph as g
from memopt._survey import Survey

#: Values below these bytes are not worth another form: their codes and scales round up to whole tiles.
LEAST_BYTES = 4096
#: The smallest values that together hold less than this share of all residual bytes count as small.
SMALL_SHARE = 0.005


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """A value that something may read in a later place than the one that makes it.

    Attributes:
      value: its id in the survey's graph.
      aval: its abstract value, on one device where the step is sharded.
      bytes: bytes of one, padded as the target pads them.
      readers: ids of the operations that read it in a later segment or loop, as the step is written.
      lossy_readers: whether one of those is of the backward pass, or there are none as the step is written, so that
        only repeats may read it.
      module: module path of the operation that makes it; a loop's carry has its loop's.
      trips: how often its region runs.
      mark: what the innermost scope around the operation asks for (`_scopes.mark_of`), or None.
    """

    value: int
    aval: Any
    bytes: int
    readers: frozenset[int]
    lossy_readers: bool
    module: str
    trips: int
    mark: str | None = None


_KNOWN: weakref.WeakKeyDictionary[Survey, list[Residual]] = weakref.WeakKeyDictionary()


def residuals(survey: Survey) -> list[Residual]:
    """Return the forward values that may be stored in another form, also those that only a repeat would read later."""
    if survey not in _KNOWN:
        _KNOWN[survey] = list(_find(survey))
    return _KNOWN[survey]


def _find(survey: Survey) -> Iterator[Residual]:
    graph, marks = survey.graph, _forms.Marks(survey.graph)
    readers = later_readers(graph)
    paths = functools.cache(lambda region: around(graph, region))
    for item in graph.values:
        if item.kind not in (g.MADE, g.CARRY_IN) or not c.guardable(item.var) or c.is_local(item.aval):
            continue
        if item.op is not None and not _is_candidate(item.op, marks):
            continue  # a loop's result; the backward pass's own; a constant, which is made again for nothing
        found = readers.get(item.id, set())
        size = survey.bytes_of_value(item.id)
        if size < LEAST_BYTES:
            continue
        stack = str(c.name_stack(item.op.eqn)) if item.op is not None else ""
        full = "/".join(p for p in (paths(item.region), stack) if p)
        lossy = not found or any(marks.is_backward(graph.ops[o]) for o in found)
        trips = graph.regions[item.region].trips
        path, mark = _scopes.module_path(full), _scopes.mark_of(full)
        yield Residual(item.id, survey.aval_of(item.id), size, frozenset(found), lossy, path, trips, mark)


def _is_candidate(op: g.Op, marks: _forms.Marks) -> bool:
    return not op.bodies and not marks.is_backward(op) and any(v is not None for v in op.inputs)


def later_readers(graph: g.Graph) -> dict[int, set[int]]:
    """Return, by value, the operations that read it in a later time segment or in another region."""
    readers: dict[int, set[int]] = {}
    for region in graph.regions:
        for op in region.ops:
            for i, v in enumerate(op.inputs):
                if v is None or i in op.mapped:
                    continue
                item = graph.values[v]
                made = region.bins[0] if item.op is None else item.op.bin
                if item.region != region.id or made < op.bin:
                    readers.setdefault(v, set()).add(op.id)
    return readers


def small(survey: Survey) -> set[int]:
    """Return the smallest residuals, which together hold less than a small share of the bytes.

    They are mostly statistics of rows: another form of them would save nothing.
    """
    ordered = sorted(residuals(survey), key=lambda one: one.bytes * one.trips)
    least = SMALL_SHARE * sum(one.bytes * one.trips for one in ordered)
    held = itertools.accumulate(one.bytes * one.trips for one in ordered)
    return {one.value for one, total in zip(ordered, held, strict=True) if total < least}


def statistics(graph: g.Graph) -> set[int]:
    """Return what reductions make, and what is made of that alone, element by element or spread out again.

    Sums, maxima and variances of rows: gradients are divided by them, so a small error of theirs is a large one there,
    and one that is rounded to 0 makes them infinite.
    """
    found: set[int] = set()
    for op in graph.ops:
        name, read = op.eqn.primitive.name, [v for v in op.inputs if v is not None]
        made_of = name in _fusion.ELEMENTWISE and read and found.issuperset(read)
        if (name in _fusion.REDUCTIONS and "window" not in name) or made_of:
            found.update(op.outputs)
    return found


def last_backward(graph: g.Graph) -> dict[int, int]:
    """Return, by value, the last segment of its region in which the backward pass reads it or what is made from it.

    Made from it by forward operations, so that a repeat which starts from it serves that reader. A loop reads its
    operands until the last loop that it feeds. Values that no gradient needs, such as an update's, are left out.
    """
    marks, last = _forms.Marks(graph), {}
    for region in reversed(graph.regions):
        for op in reversed(region.ops):
            ends = [op.bin] if marks.is_backward(op) else [last[v] for v in op.outputs if v in last]
            ends += [other.bin for other in op.feeds if other.region == region.id]
            for v in op.inputs if ends else ():
                if v is not None:
                    last[v] = max(last.get(v, -1), *ends)
    return last


def is_view(graph: g.Graph, value: int) -> bool:
    """Say whether a value is an argument in another shape or type: a parameter, which gradients of inputs contract."""
    op = graph.values[value].op
    while op is not None and sum(v is not None for v in op.inputs) == 1:
        value = next(v for v in op.inputs if v is not None)
        op = graph.values[value].op
    return op is None and graph.values[value].kind != g.CARRY_IN


def around(graph: g.Graph, region: int) -> str:
    """Return the name stack around a region: those of the loops that it is in."""
    op = graph.regions[region].op
    if op is None:
        return ""
    return "/".join(p for p in (around(graph, op.region), str(c.name_stack(op.eqn))) if p)


def paths(survey: Survey) -> list[str]:
    """Return the module paths of all operations, for patterns that match nothing."""
    graph = survey.graph
    outside = functools.cache(lambda region: around(graph, region))
    found = {"/".join(p for p in (outside(op.region), str(c.name_stack(op.eqn))) if p) for op in graph.ops}
    return sorted(map(_scopes.module_path, found))


def chosen(survey: Survey, where: tuple[str, ...]) -> list[Residual]:
    """Return the residuals whose module path matches a pattern; all without patterns.

    Raises:
      ValueError: a pattern matches no module path of the step.
    """
    if where:
        _scopes.check_patterns(where, paths(survey))
    return [r for r in residuals(survey) if not where or any(_scopes.match_path(p, r.module) for p in where)]


def move_seconds(survey: Survey, stored: int, plain: int) -> float:
    """Return the seconds of writing and reading a stored form, and of reading the value once to encode it."""
    return (2 * stored + plain) / survey.spec.memory_bytes_per_second
