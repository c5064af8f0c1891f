"""The planner: one ladder of plans for a step and a target, whatever the budget.

In: the closed jaxpr of a step, which arguments are donated, the target and the passes. Out: a `Ladder` of rungs from
"as written" to the smallest peak found, each a complete rewritten step with its predicted peak, its repeated work and
its decisions, none both larger and slower than another. A budget then takes the cheapest rung that fits, with measured
peaks in place of predictions where they are known; so predictions are monotonic in the budget by construction.

The rungs come from a sweep of the price of memory: for each price one minimum cut (`_network`), built (`_apply`) and
scored on the whole timeline (`_timeline`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from memopt import _apply, _cost, _inline, _timeline
from memopt import _compat as c
from memopt._contract import Left, Repeat
from memopt._network import Network
from memopt._survey import Survey


@dataclasses.dataclass(eq=False)
class Rung:
    """One complete plan: the rewritten step and its predicted figures."""

    closed: Any
    predicted_peak_bytes: int
    seconds: float
    recompute_flops: float
    repeats: dict[int, frozenset[int]]
    timeline: Any = None

    def jaxpr(self) -> Any:
        """Return the rewritten closed jaxpr, with the step's own inputs and outputs."""
        return self.closed


class Ladder:
    """All plans of a step, largest peak first; `rungs[0]` is the step as written."""

    def __init__(self, rungs: Sequence[Rung], survey: Survey | None, left: Sequence[Left], planning_seconds: float):
        self.rungs = list(rungs)
        self.survey = survey
        self.left = list(left)
        self.planning_seconds = planning_seconds

    def choose(self, budget_bytes: int | None, measured: dict[int, int] | None = None) -> int | None:
        """Return the cheapest rung whose peak, measured where known, is within the budget; None where none is."""
        measured = measured or {}
        for i, rung in enumerate(self.rungs):
            if budget_bytes is None or measured.get(i, rung.predicted_peak_bytes) <= budget_bytes:
                return i
        return None


def make_ladder(
    closed: Any, *, donated: Sequence[bool], target: Any, passes: Sequence[Any], overrides: Any = None, scopes: Any = None
) -> Ladder:
    """Plan a step.

    Args:
      closed: closed jaxpr of the step.
      donated: per input, whether it is donated.
      target: the target.
      passes: the passes that may propose.
      overrides: decision name -> `"keep"` or `"recompute"`.
      scopes: marks set by name scope.

    Returns:
      The ladder; its first rung is the step as written.
    """
    start = time.perf_counter()
    plain = _plain_rung(closed, donated, target)
    if not passes:
        return Ladder([plain], None, [], time.perf_counter() - start)
    respect = any(getattr(p, "respect_checkpoint", False) for p in passes)
    flat = _inline.inline(closed, respect_checkpoint=respect)
    flat = c.close(c.dce(flat)[0], c.jaxpr_consts(flat))
    survey = Survey(flat, target)
    proposals = [x for p in passes for x in p.propose(survey)]
    repeatable = {x.op: x.seconds for x in proposals if isinstance(x, Repeat)}
    left = [x for x in proposals if isinstance(x, Left)]
    search = _Search(survey, repeatable, donated, plain)
    rungs = search.run()
    return Ladder(rungs, survey, left, time.perf_counter() - start)


def _plain_rung(closed: Any, donated: Sequence[bool], target: Any) -> Rung:
    timeline = _timeline.simulate(closed, donated=donated, target=target)
    return Rung(closed, timeline.peak_bytes, 0.0, 0.0, {}, timeline)


class _Search:
    """The sweep of prices and what it finds."""

    def __init__(self, survey: Survey, repeatable: dict[int, float], donated: Sequence[bool], plain: Rung):
        self.survey = survey
        self.repeatable = repeatable
        self.donated = donated
        self.plain = plain
        self.plain_flops = _cost.matmul_flops(plain.closed)
        self.cache: dict = {}
        self.seen: dict[Any, Rung] = {}

    def run(self) -> list[Rung]:
        kept = self.score({})
        usage = self.usage(kept)
        hot = usage > 0.25 * usage.max(initial=0)
        self.network = Network(self.survey, self.repeatable, hot)
        self.sweep(hot.astype(float))
        return _hull([self.plain, *self.seen.values()])

    def sweep(self, weights: np.ndarray) -> None:
        for price in np.geomspace(1e-16, 1e-7, 28):
            self.score(self.network.solve(price * weights))

    def score(self, repeats: dict[int, frozenset[int]]) -> Rung:
        """Build and simulate a plan, once."""
        key = frozenset(repeats.items())
        if key not in self.seen:
            closed, bins = _apply.apply(self.survey.graph, repeats)
            timeline = _timeline.simulate(closed, donated=self.donated, target=self.survey.target)
            flops = _cost.matmul_flops(closed) - self.plain_flops
            self.seen[key] = Rung(closed, timeline.peak_bytes, self._seconds(repeats), flops, repeats, timeline)
            self.seen[key].bins = bins
        return self.seen[key]

    def _seconds(self, repeats: dict[int, frozenset[int]]) -> float:
        regions = self.survey.region_of_bin
        return sum(self.repeatable[op] * regions[place].trips for place, ops in repeats.items() for op in ops)

    def usage(self, rung: Rung) -> np.ndarray:
        """Return the largest predicted bytes of temporaries in each time segment."""
        usage = np.zeros(self.survey.bins)
        _spread(c.open_jaxpr(rung.closed), rung.timeline, 0, rung.bins, usage)
        return usage


def _spread(jaxpr: Any, timeline: Any, outside: float, bins: dict, usage: np.ndarray) -> None:
    for i, eqn in enumerate(jaxpr.eqns):
        place = next((bins[v] for v in eqn.outvars if v in bins), None)
        if place is not None:
            usage[place] = max(usage[place], outside + timeline.usage[i])
        inner = timeline.inner.get(i)
        if inner is not None:
            for _, _, body in c.subjaxprs(eqn.params)[:1]:
                base = outside + timeline.usage[i] - max(inner.usage.max(initial=0), 0)
                _spread(c.open_jaxpr(body), inner, base, bins, usage)


def _hull(rungs: list[Rung]) -> list[Rung]:
    """Drop every plan that another one beats in peak and cost; largest peak first."""
    ordered = sorted(rungs, key=lambda r: (r.seconds, r.recompute_flops, r.predicted_peak_bytes))
    out: list[Rung] = []
    for rung in ordered:
        if not out or rung.predicted_peak_bytes < out[-1].predicted_peak_bytes:
            out.append(rung)
    return out
