"""The fitting room: a pass that has several choices, such as strategies on a mesh, tried on before one is taken.

In: a step, the passes, one of which searches, and how a step is planned. Out: the ladder of its best choice, with those
of the next ones behind it. The pass ranks; nothing is compiled here, and no concrete pass is known.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from memopt import _rewrite
from memopt._fingerprint import arguments
from memopt._plans import Plans
from memopt._target import limit_bytes

#: So many further choices are compiled where the first is over the budget.
RUNNERS_UP = 2


def searching(passes: Sequence[Any]) -> Any:
    """Return the pass that searches, None where none does."""
    return next((one for one in passes if getattr(one, "searches", False)), None)


def best_ladder(closed: Any, context: Any, passes: Sequence[Any], settings: Any, make: Callable[..., Any]) -> Any:
    """Return the ladder of the best choice; its `others` are the ladders of the next ones.

    Args:
      closed: the step as written.
      context: what passes may know of it.
      passes: the passes, one of which searches.
      settings: with `budget`, `target` and `reserve_bytes`.
      make: makes a ladder from `passes=`, `context=`, `rewritten=` and `sketched=`.

    Its planning time is that of the whole search.
    """
    start = time.perf_counter()
    known: dict[Any, dict] = {}  # what may be known of the step -> what other passes made of it before the choice

    def plan(choice: Any, *, sketched: bool) -> Any:
        chosen = _with(passes, choice)
        its = context_for(chosen, context)
        before = known.setdefault((getattr(its, "partitioned", 0), getattr(its, "feature_parts", 1)), {})
        rewritten = dict(before)
        ladder = make(passes=chosen, context=its, rewritten=rewritten, sketched=sketched)
        before.update((ran, outcome) for ran, outcome in rewritten.items() if choice.name not in ran)
        return ladder

    found = searching(passes).search(closed, context, plan, functools.partial(_limit, settings))
    ladder = next(found)
    ladder.others = found
    ladder.planning_seconds = time.perf_counter() - start
    return ladder


def context_for(passes: Sequence[Any], context: Any) -> Any:
    """Return what passes may know of the step, with these passes in the list."""
    parts = _rewrite.partitions(passes)
    if context is None or not parts:
        return context
    return dataclasses.replace(context, partitioned=parts, feature_parts=_rewrite.feature_parts(passes))


def following(ladder: Any) -> Any:
    """Return the ladder of the next choice after this one's, None where there is none."""
    others = getattr(ladder, "others", None)
    found = None if others is None else next(others, None)
    if found is not None:
        found.others = others
    return found


def saved_choice(closed: Any, plan: Any, passes: Sequence[Any]) -> Sequence[Any]:
    """Return the passes with the choice that a saved plan of these arguments holds for the one that searches."""
    if searching(passes) is None:
        return passes
    saved = [one.fingerprint for one in Plans.of(plan).plans]
    mine = [one for one in saved if one.get("arguments") == arguments(closed)] or saved
    return _with(passes, searching(passes).saved_in(mine[0].get("passes", "")))


def _with(passes: Sequence[Any], choice: Any) -> list[Any]:
    old = searching(passes)
    return [choice if one is old else one for one in passes]


def _limit(settings: Any, ladder: Any) -> int | None:
    """Return the budget in bytes as far as it is known before the arguments are: a percentage with a ladder alone."""
    if settings.budget.fraction is not None:
        return None if ladder is None else int(settings.budget.fraction * ladder.rungs[0].predicted_peak_bytes)
    limit = limit_bytes(settings.target)
    return settings.budget.amount_bytes or (None if limit is None else limit - settings.reserve_bytes)
