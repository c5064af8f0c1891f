"""The register of names: every value that is read again later, with a name, a place in the user's code and a price.

In: a survey and a plan's repeats. Out: `Decision` rows, and for `overrides=` and scopes the operations that must not,
or must, be run again. It decides nothing of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from memopt import _compat as c
from memopt import _cost, _scopes
from memopt import _graph as g
from memopt._plan import Decision
from memopt._survey import Survey

KEEP, RECOMPUTE = "keep", "recompute"


class Names:
    """Module paths and unique names of a survey's operations.

    Args:
      survey: the step.
    """

    def __init__(self, survey: Survey):
        self.survey = survey
        self._stacks: dict[str, str] = {}
        self._prefix: dict[int, str] = {}
        self._cached: dict[int, str] | None = None

    def stack(self, op: g.Op) -> str:
        """Return an operation's full name stack: those of the loops around it, joined to its own."""
        return "/".join(part for part in (self._around(op.region), str(c.name_stack(op.eqn))) if part)

    def module(self, op: g.Op) -> str:
        """Return the module path of an operation."""
        stack = self.stack(op)
        if stack not in self._stacks:
            self._stacks[stack] = _scopes.module_path(stack)
        return self._stacks[stack]

    def name(self, op: g.Op) -> str:
        """Return an operation's name for `overrides=`."""
        if self._cached is None:
            counts: dict[str, int] = {}
            self._cached = {}
            for one in self.survey.graph.ops:
                base = "/".join(p for p in (self.module(one), one.eqn.primitive.name) if p)
                self._cached[one.id] = f"{base}.{counts.setdefault(base, 0)}"
                counts[base] += 1
        return self._cached[op.id]

    def results(self, op: g.Op) -> list[str]:
        """Return the names of an operation's results: its own, with a number where there are several."""
        name, count = self.name(op), len(op.outputs)
        return [name] if count == 1 else [f"{name}:{i}" for i in range(count)]

    def value(self, value: int) -> str:
        """Return the name of a value: that of its operation's result, or of the loop and its carry."""
        item = self.survey.graph.values[value]
        if item.op is not None:
            return self.results(item.op)[item.op.outputs.index(value)]
        return f"{self.name(self.survey.graph.regions[item.region].op)}/carry.{item.operand}"

    def _around(self, region: int) -> str:
        if region not in self._prefix:
            op = self.survey.graph.regions[region].op
            self._prefix[region] = "" if op is None else self.stack(op)
        return self._prefix[region]


def settle(survey: Survey, names: Names, overrides: Mapping[str, str] | None) -> tuple[set[int], set[int]]:
    """Return the operations that must not be run again and those that must, by scopes and overrides.

    Raises:
      ValueError: an override names no value of this step, or asks for something unknown.
    """
    never, always = set(), set()
    marks = {s: _scopes.mark_of(s) for s in {names.stack(op) for op in survey.graph.ops}}
    if any(marks.values()):
        for op in survey.graph.ops:
            mark = marks[names.stack(op)]
            (never if mark == KEEP else always if mark == RECOMPUTE else set()).add(op.id)
    if overrides:
        known = {name: op.id for op in survey.graph.ops for name in (names.name(op), *names.results(op))}
        for name, choice in overrides.items():
            _override(known, name, choice, never, always)
    return never, always


def _override(known: dict[str, int], name: str, choice: str, never: set[int], always: set[int]) -> None:
    if name not in known:
        near = ", ".join(map(repr, difflib.get_close_matches(name, known, n=3, cutoff=0.0)))
        raise ValueError(f"The override {name!r} names no value of this step; the nearest are {near}.")
    if choice not in (KEEP, RECOMPUTE):
        raise ValueError(f"The override of {name!r} is {choice!r}; it can be 'keep' or 'recompute'.")
    op = known[name]
    never.discard(op)
    always.discard(op)
    (never if choice == KEEP else always).add(op)


def decisions(
    survey: Survey,
    names: Names,
    chosen: Any,
    repeatable: Mapping[int, float],
    harms: Mapping[int, tuple[float, str]],
) -> list[Decision]:
    """Return a row for every value that the plan (a `Choice`) keeps for later or runs again, largest first.

    `harms` says of values in measured forms what these do to the gradients, as a number and in words.
    """
    repeats = chosen.repeats
    rows: dict[int, tuple[str, int, int]] = {}
    for value, place in survey.read_later(repeats):
        item = survey.graph.values[value]
        if item.op is None and item.kind != g.CARRY_IN:
            continue
        form = chosen.stores[value].name if value in chosen.stores else KEEP
        choice = RECOMPUTE if item.op is not None and item.op.id in repeats.get(place, ()) else form
        count = rows[value][2] if value in rows else 0
        rows[value] = (choice, survey.kept_bytes(value, place), count + 1)
    out = [
        _row(survey, names, value, *row, repeatable, chosen.stores.get(value), harms.get(value, (None, "")))
        for value, row in rows.items()
    ]
    return sorted(out, key=lambda d: (-d.value_bytes, d.name))


def _row(survey, names, value, choice, size, count, repeatable, store, harm) -> Decision:
    item, name = survey.graph.values[value], names.value(value)
    places = f"read in {count} later place{'s' if count > 1 else ''}"
    stored_bytes = error = None
    if store is not None and choice == store.name:
        exact = f"with a relative error of at most {store.error:g}" if store.error else "exactly"
        share = store.bytes / max(1, survey.bytes_of_value(value))
        stored_bytes = round(size * share)
        places += f"; kept {exact} in {share:.1%} of its bytes"
        error = harm[0]
        places += f"; by itself {harm[1]}, measured" if harm[1] else ""
    if item.op is None:
        loop = survey.graph.regions[item.region].op
        reason = f"{places}; a loop's carry"
        return Decision(
            name, names.module(loop), c.user_source(loop.eqn), size, choice, reason, stored_bytes, error=error
        )
    op = item.op
    trips = survey.graph.regions[op.region].trips
    flops = _cost.matmul_flops(op.eqn) * trips
    if op.id in repeatable:
        price = f"running it again takes {repeatable[op.id] * trips * 1e6:.3g} us and {flops:.3g} matmul FLOPs"
    else:
        price = "it cannot be run again"
    reason = f"{places}; {price}"
    return Decision(name, names.module(op), c.user_source(op.eqn), size, choice, reason, stored_bytes, error=error)
