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
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memopt import _apply, _cost, _inline, _segments, _sink, _specs, _timeline
from memopt import _compat as c
from memopt._contract import Left, Repeat, Store
from memopt._decisions import Names, decisions, settle
from memopt._local import Shardings, local_shapes
from memopt._network import Choice, Network
from memopt._plan import Decision, Plan, fingerprint
from memopt._refine import holding, refine
from memopt._survey import Survey


_HOT = 0.5  # segments that hold less than this share of the peak's temporaries cannot bind
_SWEEP = tuple(np.geomspace(5e-4, 2.0, 9))  # prices tried, in units of the step's seconds per byte of its temporaries
_REFINEMENTS = 6  # prices tried between two of these
_VARIATIONS = 16  # cuts with varied costs
_VARIED = 0.5  # standard deviation of the logarithm of a varied cost


@dataclasses.dataclass(eq=False)
class Rung:
    """One complete plan: the rewritten step and its predicted figures.

    Attributes:
      closed: the rewritten closed jaxpr, with the step's own inputs and outputs.
      predicted_peak_bytes: predicted peak per device.
      seconds: predicted time that the plan adds to the step as written.
      recompute_flops: matmul and convolution FLOPs that it adds.
      choice: what is run again where, and what is kept in another form.
      price: the price of memory, in seconds per byte, at which the cut chose it; None for the step as written.
    """

    closed: Any
    predicted_peak_bytes: int
    seconds: float
    recompute_flops: float
    choice: Choice
    timeline: Any
    price: float | None = None
    bins: dict[Any, int] = dataclasses.field(default_factory=dict, repr=False)

    def jaxpr(self) -> Any:
        """Return the rewritten closed jaxpr."""
        return self.closed


class Ladder:
    """All plans of a step, largest peak first; `rungs[0]` is the step as written.

    Args:
      rungs: the plans.
      step: what was planned, None where nothing was.
      planning_seconds: how long it took.
    """

    def __init__(self, rungs: Sequence[Rung], step: _Step, planning_seconds: float):
        self.rungs = list(rungs)
        self.step = step
        self.planning_seconds = planning_seconds

    def choose(self, budget_bytes: int | None, measured: Mapping[int, int] | None = None) -> int | None:
        """Return the cheapest rung whose peak, measured where known, is within the budget; None where none is."""
        measured = measured or {}
        for i, rung in enumerate(self.rungs):
            if budget_bytes is None or measured.get(i, rung.predicted_peak_bytes) <= budget_bytes:
                return i
        return None

    def plan(self, index: int | None, budget_bytes: int | None = None) -> Plan:
        """Return the readable plan of a rung."""
        rung = self.rungs[index or 0]
        step = self.step
        rows = step.decisions(rung.choice)
        return Plan(
            baseline_peak_bytes=self.rungs[0].predicted_peak_bytes,
            predicted_peak_bytes=rung.predicted_peak_bytes,
            budget_bytes=budget_bytes,
            baseline_flops=step.baseline_flops,
            recompute_flops=rung.recompute_flops,
            predicted_overhead=rung.seconds / max(step.baseline_seconds, 1e-12),
            optimality_gap=self._gap(rung, budget_bytes) / max(step.baseline_seconds, 1e-12),
            planning_seconds=self.planning_seconds,
            decisions=tuple(rows),
            notes=(*step.notes, *dict.fromkeys(f"{x.what} was left as it was: {x.why}." for x in step.left)),
            target=str(step.target),
            fingerprint=step.fingerprint,
            repeats={place: tuple(sorted(ops)) for place, ops in sorted(rung.choice.repeats.items())},
            stores={value: store.name for value, store in sorted(rung.choice.stores.items())},
        )

    def _gap(self, rung: Rung, budget_bytes: int | None) -> float:
        """Return the seconds between a rung and the dual bound at the budget (its own peak where there is none)."""
        budget = rung.predicted_peak_bytes if budget_bytes is None else budget_bytes
        bounds = [r.seconds + r.price * (r.predicted_peak_bytes - budget) for r in self.rungs if r.price is not None]
        floor = min(r.seconds for r in self.rungs)
        return max(0.0, rung.seconds - max([floor, *bounds]))


class _Step:
    """A step as the planner sees it: surveyed, with what the passes proposed."""

    def __init__(
        self, closed: Any, target: Any, passes: Sequence[Any], overrides: Mapping[str, str] | None, shardings: Any
    ):
        self.closed, self.target, self.passes = closed, target, passes
        self.local = None if shardings is None else local_shapes(self.flat, shardings)
        self.notes = () if self.local is None else self.local.notes
        self.baseline_flops = _cost.matmul_flops(closed)
        self.baseline_seconds = self.seconds(closed)
        self.left: list[Left] = []
        self.survey: Survey | None = None
        self.repeatable: dict[int, float] = {}
        self.stores: list[Store] = []
        self.always: set[int] = set()
        if passes:
            self._survey(overrides)

    @functools.cached_property
    def flat(self) -> Any:
        """The step without plain calls and dead code."""
        respect = any(getattr(p, "respect_checkpoint", False) for p in self.passes)
        flat = _inline.inline(self.closed, respect_checkpoint=respect)
        return _sink.sink(c.close(c.dce(flat)[0], c.jaxpr_consts(flat)))

    def seconds(self, closed: Any) -> float:
        """Return one device's predicted seconds of this step or of a rewrite of it."""
        twin = closed if self.local is None else self.local.twin(closed)
        return _cost.jaxpr_seconds(twin, _specs.spec_for(self.target))

    def _survey(self, overrides: Mapping[str, str] | None) -> None:
        self.survey = Survey(self.flat, self.target, self.local)
        self.names = Names(self.survey)
        proposals = [x for p in self.passes for x in p.propose(self.survey)]
        never, self.always = settle(self.survey, self.names, overrides)
        self.repeatable = {x.op: x.seconds for x in proposals if isinstance(x, Repeat) and x.op not in never}
        self.always &= set(self.repeatable)
        self.stores = [x for x in proposals if isinstance(x, Store) and self._kept_by_op(x) not in never]
        self.left = [x for x in proposals if isinstance(x, Left)]

    def _kept_by_op(self, store: Store) -> int | None:
        maker = self.survey.graph.values[store.value].op
        return None if maker is None else maker.id

    def decisions(self, choice: Choice) -> list[Decision]:
        """Return the rows of a plan."""
        return [] if self.survey is None else decisions(self.survey, self.names, choice, self.repeatable)

    def choice_of(self, plan: Plan) -> Choice:
        """Return the choice that a saved plan holds."""
        forms = {(store.value, store.name): store for store in self.stores}
        repeats = {place: frozenset(ops) for place, ops in plan.repeats.items()}
        return Choice(repeats, {value: forms[value, name] for value, name in plan.stores.items()})

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """What a saved plan of this step is good for."""
        return fingerprint(self.closed, self.target, self.passes, self.local)


def make_ladder(
    closed: Any,
    *,
    donated: Sequence[bool],
    target: Any,
    passes: Sequence[Any],
    overrides: Mapping[str, str] | None = None,
    scopes: Any = None,
    shardings: Shardings | None = None,
) -> Ladder:
    """Plan a step.

    Args:
      closed: closed jaxpr of the step.
      donated: per input, whether it is donated.
      target: the target.
      passes: the passes that may propose; without any the ladder holds the step as written alone.
      overrides: decision name -> `"keep"` or `"recompute"`.
      scopes: unused; marks are read from name stacks.
      shardings: those of the arguments and results, where any is sharded; all figures are then per device.

    Returns:
      The ladder.

    Raises:
      ValueError: an override names nothing or asks for something unknown.
    """
    start = time.perf_counter()
    step = _Step(closed, target, passes, overrides, shardings)
    plain = _plain_rung(step, donated)
    rungs = [plain] if step.survey is None else _Search(step, donated, plain).run()
    return Ladder(rungs, step, time.perf_counter() - start)


def ladder_of_plan(
    closed: Any,
    plan: Plan,
    *,
    donated: Sequence[bool],
    target: Any,
    passes: Sequence[Any],
    scopes: Any = None,
    shardings: Shardings | None = None,
) -> Ladder:
    """Return the ladder of one saved plan, applied without planning.

    Raises:
      ValueError: the plan was made for another step, target, JAX version or set of passes.
    """
    start = time.perf_counter()
    step = _Step(closed, target, passes, None, shardings)
    plan.check_fingerprint(step.fingerprint)
    plain = _plain_rung(step, donated)
    if step.survey is None:
        return Ladder([plain], step, time.perf_counter() - start)
    search = _Search(step, donated, plain)
    rung = search.score(step.choice_of(plan))
    return Ladder([rung], step, time.perf_counter() - start)


def _plain_rung(step: _Step, donated: Sequence[bool]) -> Rung:
    timeline = _timeline.simulate(step.closed, donated=donated, target=step.target, local=step.local)
    return Rung(step.closed, timeline.peak_bytes, 0.0, 0.0, Choice({}), timeline)


class _Search:
    """The sweep of prices and what it finds."""

    holding = staticmethod(holding)

    def __init__(self, step: _Step, donated: Sequence[bool], plain: Rung):
        self.step = step
        self.survey = step.survey
        self.repeatable, self.always = step.repeatable, step.always
        self.donated = donated
        self.plain = plain
        self.seen: dict[Any, Rung] = {}
        self.undone_seconds = 0.0
        kept = self.score(Choice({}))
        self.undone_seconds = step.baseline_seconds - step.seconds(kept.closed)
        kept.seconds -= self.undone_seconds

    def run(self) -> list[Rung]:
        usage = self.usage(self.score(Choice({})))
        self.network = Network(
            self.survey, self.repeatable, usage > _HOT * usage.max(initial=0), self.step.always, self.step.stores
        )
        self.unit = self.step.baseline_seconds / max(1.0, usage.max(initial=0))
        self.sweep(usage)
        self.vary(usage)
        refine(self)
        return [self.plain, *_hull(self.plain, list(self.seen.values()))]

    def sweep(self, usage: np.ndarray) -> None:
        """Find the lower hull of peak against time for one price in all segments that the peak's bytes reach.

        Between two neighbours the price at which both cost the same is tried next, where the gap is largest.
        """
        weights = (usage > _HOT * usage.max(initial=0)).astype(float)
        found = {p: self._at(p * self.unit, weights) for p in _SWEEP}
        span = max(r.predicted_peak_bytes for r in found.values()) - min(r.predicted_peak_bytes for r in found.values())
        for _ in range(_REFINEMENTS):
            ordered = sorted(found.items())
            gaps = [
                (a[1].predicted_peak_bytes - b[1].predicted_peak_bytes, a[0], b[0])
                for a, b in zip(ordered, ordered[1:], strict=False)
                if b[0] > 1.05 * a[0]
            ]
            gap, low, high = max(gaps, default=(0, 0.0, 0.0))
            if gap <= 0.06 * span:
                break
            found[float(np.sqrt(low * high))] = self._at(float(np.sqrt(low * high)) * self.unit, weights)

    def _at(self, price: float, weights: np.ndarray) -> Rung:
        return self.score(self.network.solve(price * weights), price)

    def vary(self, usage: np.ndarray) -> None:
        """Look between hull points: operations that cost alike are told apart by varied costs, where the gap is largest.

        At one price all of them are kept or all repeated; with costs that differ a little, some are and some are not.
        """
        weights = (usage > _HOT * usage.max(initial=0)).astype(float)
        random = np.random.default_rng(0)
        for _ in range(_VARIATIONS):
            rungs = _hull(self.plain, list(self.seen.values()))
            gaps = [
                (a.predicted_peak_bytes - b.predicted_peak_bytes, i)
                for i, (a, b) in enumerate(zip(rungs, rungs[1:], strict=False))
                if a.price and b.price
            ]
            gap, at = max(gaps, default=(0, 0))
            if gap <= 0.02 * self.plain.predicted_peak_bytes:
                break
            prices = sorted((rungs[at].price, rungs[at + 1].price))
            price = float(np.exp(random.uniform(*np.log(prices))))
            factors = np.exp(random.normal(0.0, _VARIED, len(self.survey.graph.ops)))
            self.score(self.network.solve(price * weights, factors), price)

    def score(self, choice: Choice, price: float | None = None) -> Rung:
        """Build and simulate a plan, once."""
        key = choice.key
        if key not in self.seen:
            closed, bins = _apply.apply(self.survey.graph, choice.repeats)
            local = self.step.local
            timeline = _timeline.simulate(closed, donated=self.donated, target=self.survey.target, local=local)
            flops = _cost.matmul_flops(closed) - self.step.baseline_flops
            seconds = self._seconds(choice) - self.undone_seconds
            self.seen[key] = Rung(closed, timeline.peak_bytes, seconds, flops, choice, timeline, price, bins)
        return self.seen[key]

    def _seconds(self, choice: Choice) -> float:
        regions, graph = self.survey.region_of_bin, self.survey.graph
        runs = sorted({(op, first) for (op, _), first in _segments.chains(graph, choice.repeats).items()})
        repeated = sum(self.repeatable[op] * regions[first].trips for op, first in runs)
        encoded = sum(s.seconds * graph.regions[graph.values[v].region].trips for v, s in choice.stores.items())
        return repeated + encoded

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
            base = outside + timeline.usage[i] - max(inner.usage.max(initial=0), 0)
            _spread(inner.body, inner, base, bins, usage)


def _hull(plain: Rung, rungs: list[Rung]) -> list[Rung]:
    """Drop every plan that another one beats in peak and cost, or that saves nothing; largest peak first."""
    ordered = sorted(rungs, key=lambda r: (r.recompute_flops, r.seconds, r.predicted_peak_bytes))
    out: list[Rung] = []
    for rung in ordered:
        if rung.predicted_peak_bytes < (out[-1] if out else plain).predicted_peak_bytes:
            out.append(rung)
    for before, rung in zip(out, out[1:], strict=False):
        rung.seconds = max(rung.seconds, before.seconds)  # fewer FLOPs for more bytes may take longer: say the longer
    return out
