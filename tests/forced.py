"""Rewrites for the tests: in comes a closed jaxpr, out comes a rewritten one; what is repeated is drawn, not planned.

``force`` draws operations to run again for every time segment and builds that, whatever it costs: small programs leave
the planner little to do, and this asks of the builders everything that any planner could. ``rungs`` takes the planner's
own plans.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from memopt import _apply, _forms, _inline, _segments, _sink
from memopt import _compat as c
from memopt._contract import Store
from memopt._planner import make_ladder
from memopt._survey import Survey
from memopt._target import Target
from memopt.passes import Remat

TARGET = "tpu:v5e:1x1"


def survey_of(closed: Any, *, respect_checkpoint: bool = False) -> Survey:
    """Return a step's survey, as the planner makes it."""
    flat = _inline.inline(closed, respect_checkpoint=respect_checkpoint)
    flat = _sink.sink(c.close(c.dce(flat)[0], c.jaxpr_consts(flat)))
    return Survey(flat, Target.parse(TARGET))


def repeatable(survey: Survey) -> dict[int, list[int]]:
    """Return segment -> operations that may be run again there: earlier ones of its region and its source regions."""
    allowed = {p.op for p in Remat().propose(survey) if hasattr(p, "op")}
    found: dict[int, list[int]] = {}
    for place, region in enumerate(survey.region_of_bin):
        here = [op.id for op in region.ops if op.id in allowed and op.bin < place]
        there = [op.id for s in region.sources for op in survey.graph.regions[s].ops if op.id in allowed]
        if here or there:
            found[place] = here + there
    return found


def force(closed: Any, *, share: float, seed: int = 0, late: bool = False) -> Any:
    """Return the step with this share of everything that may be repeated repeated, drawn for each segment apart.

    Segments near each other share one repeat; with ``late`` only the second half of a region repeats, so that first
    runs and repeats are both there.
    """
    survey = survey_of(closed)
    rng = np.random.default_rng(seed)
    places = {p: ops for p, ops in repeatable(survey).items() if not late or _late(survey, p)}
    repeats = {p: frozenset(op for op in ops if rng.random() < share) for p, ops in places.items()}
    alone = sorted(set().union(*places.values())) if seed % 4 > 1 else []
    repeats[_segments.ALONE] = frozenset(op for op in alone if rng.random() < 0.3)
    return _apply.apply(survey.graph, repeats)[0]


def _late(survey: Survey, place: int) -> bool:
    bins = survey.region_of_bin[place].bins
    return place - bins[0] >= len(bins) // 2


def forced(share: float, seed: int = 0, late: bool = False) -> Callable[[Any], Any]:
    """Return ``force`` with these settings."""
    return functools.partial(force, share=share, seed=seed, late=late)


def stored(seed: int) -> Callable[[Any], Any]:
    """Return a rewrite that keeps half of all values as pairs of themselves and a number, and repeats operations.

    Values of odd numbers are read back again where something larger was made since.
    """

    def rewrite(closed: Any) -> Any:
        survey = survey_of(closed)
        rng = np.random.default_rng(seed)
        pair = functools.partial(Store, seconds=0.0, bytes=1, encode=lambda x: (x, x.ndim), decode=lambda pair: pair[0])
        forms = [pair(v.id, again_seconds=0.0 if v.id % 2 else None) for v in survey.graph.values]
        drawn = {s.value: s for s in forms if _forms.refusal(survey.graph, s) is None and rng.random() < 0.5}
        repeats = {p: frozenset(o for o in ops if rng.random() < 0.2) for p, ops in repeatable(survey).items()}
        return _apply.apply(survey.graph, repeats, drawn)[0]

    return rewrite


def ladder(closed: Any) -> list[Any]:
    """Return the planner's rewritten steps, largest peak first, the plain step left out."""
    donated = (False,) * len(closed.in_avals)
    ladder = make_ladder(closed, donated=donated, target=Target.parse(TARGET), passes=[Remat()])
    return [r.closed for r in ladder.rungs]


def smallest(closed: Any) -> Any:
    """Return the planner's step of the smallest predicted peak."""
    return ladder(closed)[-1]


def middle(closed: Any) -> Any:
    """Return a step from the middle of the planner's ladder."""
    found = ladder(closed)
    return found[len(found) // 2]


def drawn(seed: int) -> Callable[[Any], Any]:
    """Return the rewrite for a seed: the planner's own plans for one in five, forced repeats for the rest."""
    if seed % 10 in (3, 6):
        return smallest if seed % 10 == 3 else middle
    return forced({0: 0.0, 5: 1.0, 9: 1.0}.get(seed % 10, 0.5), seed, late=seed % 2 == 1)
