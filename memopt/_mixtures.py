"""Mixtures: plans between two plans, which follow the one up to some operation and the other after it.

In: two choices of one graph. Out: choices of that graph. Nothing is scored here.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from memopt._network import Choice


def mixtures(one: Choice, other: Choice, always: Set[int], graph: Any) -> list[Choice]:
    """Return the two plans that follow one choice for the first half of what they differ in, and the other after it."""
    left, right = ({(op, place) for place, ops in x.repeats.items() for op in ops} for x in (one, other))
    makers = {v: _maker(graph, v) for v in {*one.stores, *other.stores}}
    stored = {makers[v] for v in makers if one.stores.get(v) is not other.stores.get(v)}
    differing = sorted({op for op, _ in left ^ right} | stored)
    if len(differing) < 2:
        return []
    middle = differing[len(differing) // 2]
    both = {e for e in left | right if e[0] in always}
    return [
        _joined((a, x.stores), (b, y.stores), middle, both, makers)
        for (a, x), (b, y) in (((left, one), (right, other)), ((right, other), (left, one)))
    ]


def _joined(first: tuple, second: tuple, middle: int, both: Set, makers: Mapping[int, int]) -> Choice:
    """Return the first plan's decisions on the operations before one, and the second's on the rest."""
    entries = {e for e in first[0] if e[0] < middle} | {e for e in second[0] if e[0] >= middle}
    repeats: dict[int, set[int]] = {}
    for op, place in sorted(entries | both):
        repeats.setdefault(place, set()).add(op)
    stores = {v: s for v, s in first[1].items() if makers[v] < middle}
    stores |= {v: s for v, s in second[1].items() if makers[v] >= middle}
    return Choice({place: frozenset(ops) for place, ops in repeats.items()}, dict(sorted(stores.items())))


def _maker(graph: Any, value: int) -> int:
    """Return the operation that makes a value; of a loop's carry the loop's."""
    item = graph.values[value]
    op = item.op or graph.regions[item.region].op
    return -1 if op is None else op.id
