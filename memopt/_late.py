"""The repacker: plans whose kept values are put into smaller exact forms, tried when the search is over.

In: a search with its plans. Out: for each plan on the hull the same repeats with what it keeps in the forms that are
`late`, scored like any other; the planner keeps those that are smaller. Forms that take next to no time need no cut of
their own, which would take as long as the search without them. Where no plan keeps enough of such values nothing is
built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memopt._contract import Store
from memopt._network import Choice

#: Share of a plan's predicted peak that its forms must save, as bytes, for a plan with them to be built.
_LEAST = 0.01


def forms(step: Any) -> list[Store]:
    """Return the forms of a step that the search looks at only when it is over.

    Where nothing may be repeated all forms are part of every cut. What only undoes the operation that makes a value is
    left to repeats, which take no bytes more. Sharded steps have none: nothing is known of packing along sharded axes.
    """
    if not step.repeatable or step.local is not None:
        return []
    return [store for store in step.stores if store.late and not _is_repeat(step, store)]


def _is_repeat(step: Any, store: Store) -> bool:
    survey = step.survey
    op = survey.graph.values[store.value].op
    if op is None or op.id not in step.repeatable:
        return False
    read = sum(survey.bytes_of_value(v) for v in set(op.inputs) if v is not None)
    return 0 < read <= store.bytes


def choices(step: Any, choice: Choice, peak_bytes: int, late: Mapping[int, Store]) -> list[Choice]:
    """Return a plan with the forms of all that it keeps, and with each kind of them alone where there are several.

    Args:
      step: the step.
      choice: the plan.
      peak_bytes: its predicted peak.
      late: value -> its smallest form.
    """
    survey, values = step.survey, step.survey.graph.values
    kept = {
        v
        for v, place in survey.read_later(choice.repeats)
        if v in late
        and v not in choice.stores
        and (values[v].op is None or values[v].op.id not in choice.repeats.get(place, ()))
    }
    trips = {v: survey.graph.regions[values[v].region].trips for v in kept}
    saved = sum((survey.bytes_of_value(v) - late[v].bytes) * trips[v] for v in kept)
    if saved < _LEAST * peak_bytes:
        return []
    kinds = sorted({late[v].name for v in kept})
    groups = [kinds, *([kind] for kind in kinds if len(kinds) > 1)]
    found = [{v: late[v] for v in sorted(kept) if late[v].name in group} for group in groups]
    return [Choice(choice.repeats, dict(sorted({**choice.stores, **stores}.items()))) for stores in found]


def smallest(stores: list[Store]) -> dict[int, Store]:
    """Return the smallest form of each value."""
    return {s.value: s for s in sorted(stores, key=lambda s: -s.bytes)}
