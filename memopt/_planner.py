"""The planner: one ladder of plans for a step and a target, whatever the budget.

In: the closed jaxpr of a step, which arguments are donated, the target and the passes. Out: a `Ladder` of rungs from
"as written" to the smallest peak found, each a complete rewritten step with its predicted peak, its repeated work and
its decisions, none both larger and slower than another. A budget then takes the cheapest rung that fits, with measured
peaks in place of predictions where they are known; so predictions are monotonic in the budget by construction.

The rungs come from searches (`_search`) of the step as it stands, of the step with and without each set of optional
rewrites (`_rewrite`), and of the step with its loops divided into levels (`_split`) where their carries are the memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from memopt import _compat as c
from memopt import _pairs, _rerun, _rewrite, _rungs, _saved, _split
from memopt._contract import Context
from memopt._fingerprint import fingerprint
from memopt._local import Shardings
from memopt._plan import Plan
from memopt._plans import Plans
from memopt._rungs import Rung
from memopt._search import Search
from memopt._step import Step

#: A loop is divided into levels where the stack of its carries is at least this share of the smallest peak found.
_CARRIES = 0.1


class Ladder:
    """All plans of a step, largest peak first; `rungs[0]` is the step as written.

    Args:
      rungs: the plans.
      step: what was planned, None where nothing was.
      planning_seconds: how long it took.
      first: the first rung that may be chosen: 1 where a plan was given or a pass rewrites the step in any case.
      refused: plans that do more harm to gradients than the user allows.
      spares: plans that a rung beats by predicted peak, and none would if the compiler's heap had no holes, or if there
        were no exact forms. Their indices follow those of the rungs; `choose` never takes them.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        step: Step,
        planning_seconds: float,
        first: int = 0,
        spares: Sequence[Rung] = (),
        refused: Sequence[Rung] = (),
    ):
        self.rungs, self.spares, self.refused = list(rungs), list(spares), list(refused)
        self.step = step
        self.planning_seconds = planning_seconds
        self.first = first
        self.rows: tuple[Any, ...] = ()  # of a pass that searched: what it chose from
        self.others: Iterator[Ladder] | None = None  # the ladders of its next choices

    def rung(self, index: int) -> Rung:
        """Return a rung or a spare."""
        return self.rungs[index] if index < len(self.rungs) else self.spares[index - len(self.rungs)]

    def choose(self, budget_bytes: int | None, measured: Mapping[int, int] | None = None) -> int | None:
        """Return the cheapest rung whose peak, measured where known, is within the budget; None where none is."""
        measured = measured or {}
        for i, rung in list(enumerate(self.rungs))[self.first :]:
            if budget_bytes is None or measured.get(i, rung.predicted_peak_bytes) <= budget_bytes:
                return i
        return None

    def plan(self, index: int | None, budget_bytes: int | None = None) -> Plan:
        """Return the readable plan of a rung."""
        rung = self.rung(index or 0)
        step = rung.step
        as_written = rung.closed is step.closed
        error = None if step.sensitivity is None else step.sensitivity.figure(rung.harm)
        left = (*step.left, *step.frozen.left)
        rows = [*self.rows, *(() if as_written else step.outcome.rows), *step.decisions(rung.choice)]
        return Plan(
            baseline_peak_bytes=self.rungs[0].predicted_peak_bytes,
            predicted_peak_bytes=rung.predicted_peak_bytes,
            budget_bytes=budget_bytes,
            baseline_flops=self.step.baseline_flops,
            recompute_flops=rung.recompute_flops,
            predicted_overhead=rung.seconds / max(self.step.baseline_seconds, 1e-12),
            optimality_gap=self._gap(rung, budget_bytes) / max(self.step.baseline_seconds, 1e-12),
            planning_seconds=self.planning_seconds,
            decisions=tuple(rows),
            notes=(
                *step.notes,
                *_error_notes(rung),
                *dict.fromkeys(f"{x.what} was left as it was: {x.why}." for x in left),
            ),
            target=str(step.target),
            fingerprint=step.fingerprint,
            repeats={place: tuple(sorted(ops)) for place, ops in sorted(rung.choice.repeats.items())},
            variant=step.variant_key,
            stores={value: store.name for value, store in sorted(rung.choice.stores.items())},
            rewrites=() if as_written else step.outcome.applied,
            predicted_error=error,
            dropped=() if as_written and step.pruned else step.frozen.dropped,
        )

    def _gap(self, rung: Rung, budget_bytes: int | None) -> float:
        """Return the seconds between a rung and the dual bound at the budget (its own peak where there is none)."""
        budget = rung.predicted_peak_bytes if budget_bytes is None else budget_bytes
        bounds = [r.seconds + r.price * (r.predicted_peak_bytes - budget) for r in self.rungs if r.price is not None]
        floor = min(r.seconds for r in self.rungs)
        return max(0.0, rung.seconds - max([floor, *bounds]))


def make_ladder(
    closed: Any,
    *,
    donated: Sequence[bool],
    target: Any,
    passes: Sequence[Any],
    overrides: Mapping[str, str] | None = None,
    scopes: Any = None,
    shardings: Shardings | None = None,
    context: Context | None = None,
    rewritten: dict[tuple[str, ...], _rewrite.Outcome] | None = None,
    sketched: bool = False,
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
      context: what passes that rewrite the step may know of it.
      rewritten: outcomes of rewrites that ladders of one step share (`_rewrite.apply`); filled further.
      sketched: search for a few plans alone, with all optional rewrites, to compare steps by.

    Returns:
      The ladder.

    Raises:
      ValueError: an override names nothing or asks for something unknown.
    """
    with _uncollected():
        start = time.perf_counter()
        known = {} if rewritten is None else rewritten
        build = functools.partial(Step, closed, target, passes, overrides, shardings, context=context, rewritten=known)
        step = build()
        start += step.compile_seconds
        plain = _rungs.plain_rung(step, donated)
        if step.survey is None:
            return Ladder([plain], step, time.perf_counter() - start)
        forms = (step, *(() if sketched else _without_options(step, build)))
        searches = _best([Search(one, donated, plain) for one in forms])
        if step.local is not None and not sketched:
            searches = _promising(searches)
        found = (s.sketch() if sketched else _search_all(s, build, donated, plain) for s in searches)
        rungs = [rung for some in found for rung in some]
        refused = _rungs.refused(rungs)
        if _rewrite.is_required(passes):
            found = _hull_of(rungs)
            spares = _rungs.spares(found, rungs)
            return Ladder([plain, *found], step, time.perf_counter() - start, 1, spares, refused)
        found = _rungs.hull(plain, rungs)
        spares = _rungs.spares(found, rungs)
        spares += [rung for rung in _rungs.bare(plain, found, rungs) if not any(rung is other for other in spares)]
        return Ladder([plain, *found], step, time.perf_counter() - start, 0, spares, refused)


def _error_notes(rung: Rung) -> list[str]:
    """Return the sentence on what all forms of a plan do to the gradients, where that was measured."""
    harms = rung.step.harms(rung.choice)
    if not harms:
        return []
    words, count = rung.step.sensitivity.words(rung.harm), len(harms)
    stored = f"{count} values" if count > 1 else "one value"
    return [f"In all, {words} is predicted of {stored} in lossy forms: measured one by one, added up as independent."]


def _without_options(step: Step, build: Callable[..., Step]) -> list[Step]:
    """Return the step without the last of the optional rewrites that were made, without the last two, and so on."""
    optional = [p.name for p in step.rewriters if p.optional and p.name in step.outcome.applied]
    found = []
    for count in range(len(optional)):
        left_out = optional[len(optional) - 1 - count :]
        other = build(rewrites=[p.name for p in step.rewriters if p.name not in left_out])
        found += [] if other.survey is None else [other]
    return found


def _best(searches: list[Search]) -> list[Search]:
    """Drop the forms of a step that another one beats in FLOPs, peak and seconds before anything is repeated.

    Of two that are alike the later one stays, which has fewer rewrites.
    """
    kept = [search.kept for search in searches]
    figures = [(r.recompute_flops, r.predicted_peak_bytes, r.seconds) for r in kept]

    def is_beaten(i: int) -> bool:
        no_worse = [j for j, other in enumerate(figures) if all(a <= b for a, b in zip(other, figures[i], strict=True))]
        return any(figures[j] != figures[i] or j > i for j in no_worse)

    return [search for i, search in enumerate(searches) if not is_beaten(i)]


def _promising(searches: list[Search]) -> list[Search]:
    """Drop the forms of a sharded step whose sketched plans are all beaten by sketched plans of other forms.

    Each plan of a sharded step is laid out over the mesh before it is simulated, which takes longer than the rest.
    """
    if len(searches) < 2:
        return searches
    sketched = (rung for search in searches for rung in search.sketch())
    best = _hull_of([dataclasses.replace(rung) for rung in sketched])  # copies: the hull raises seconds
    return [search for search in searches if any(rung.step is search.step for rung in best)]


def _hull_of(rungs: list[Rung]) -> list[Rung]:
    """Return the hull of plans alone, the one of the largest peak included."""
    base = max(rungs, key=lambda r: r.predicted_peak_bytes)
    return _rungs.hull(dataclasses.replace(base, predicted_peak_bytes=base.predicted_peak_bytes + 1), rungs)


def _search_all(search: Search, build: Callable[..., Step], donated: Sequence[bool], plain: Rung) -> list[Rung]:
    """Search a step as it stands, then with its loops divided."""
    step = search.step
    rungs = search.run()
    for variant in _variants(step, plain, rungs):
        other = build(variant=variant, rewrites=[p.name for p in step.rewriters])
        if other.survey is not None:
            rungs += Search(other, donated, plain).run(refined=False)
    return rungs


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector away, which would walk every plan made so far again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _variants(step: Step, plain: Rung, rungs: Sequence[Rung]) -> list[_split.Variant]:
    """List other forms of the loops: inner ones run again, and those divided into levels whose carries are much.

    Much is a share of what memory is left, with one carry for each trip.
    Loops divided into two consecutive parts (`_divide`) are exact too, but XLA:TPU was measured to hold the first
    part's residuals twice: they are not planned.
    """
    if not step.repeatable or not rungs:
        return []
    again = [_split.RERUN] if _rerun.has_nested(step.survey.graph) else []
    if step.local is not None:
        return again  # of divided loops with sharded arguments nothing is known yet
    least = min(r.predicted_peak_bytes for r in [plain, *rungs])
    carries = {path: pair.carry_bytes for path, pair in _pairs.find_all(c.open_jaxpr(step.flat))}
    found = [v for v in _split.candidates(step.flat) if v.kind == "two_level"]
    return again + [v for v in found if carries.get(v.index, 0) >= _CARRIES * least]


def ladder_of_plan(
    closed: Any,
    plan: Plan | Plans,
    *,
    donated: Sequence[bool],
    target: Any,
    passes: Sequence[Any],
    scopes: Any = None,
    shardings: Shardings | None = None,
    context: Context | None = None,
) -> Ladder:
    """Return the ladder of one saved plan, applied without planning: of several the one that was made for this step.

    Raises:
      ValueError: the plan was made for another step, target, JAX version or set of passes, or it is damaged.
    """
    start = time.perf_counter()
    written = Step(closed, target, (), None, shardings)
    start += written.compile_seconds
    plan = Plans.of(plan).choose(fingerprint(closed, target, passes, written.local))
    build = functools.partial(Step, closed, target, passes, None, shardings, context=context, rewrites=plan.rewrites)
    step = build()
    if plan.variant:
        step = build(variant=_variant_of(plan, step))
        if step.survey is None and passes:
            raise _saved.damaged("variant", f"is {plan.variant}, and no loop of this step can be divided so")
    start += step.compile_seconds
    plan.check_fingerprint(step.fingerprint)
    plain = _rungs.plain_rung(step, donated)
    if step.survey is None:
        return Ladder([plain], step, time.perf_counter() - start)
    search = Search(step, donated, plain)
    rung = search.score(step.choice_of(plan))
    return Ladder([plain, rung], step, time.perf_counter() - start, first=1)


def _variant_of(plan: Plan, step: Step) -> _split.Variant:
    """Return how a saved plan divides the loops of this step."""
    variant = _split.Variant(plan.variant[0], tuple(plan.variant[1]), *plan.variant[2:])
    if variant not in (_split.RERUN, *_split.candidates(step.flat)):
        raise _saved.damaged("variant", f"is {plan.variant}, and no loop of this step can be divided so")
    return variant
