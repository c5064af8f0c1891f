"""The sharding pass's search: which strategy on which mesh shape is quickest among those that split all and fit.

In: a flat step, all devices of a mesh, how a candidate is laid out and planned. Out: `Candidate`s, ranked: each with
its layout's state bytes and collective seconds, the best few with a few plans, the best with the whole ladder that the
planner makes of it, so that strategy, mesh shape and cut are chosen together. It applies nothing, and compiles nothing.

Forms that split parameters and state in full come before all others, whatever the others' seconds. What whole
parameters save is one gather of the weights, in the backward loop, where it can run beside the layers' matmuls; the one
that they need instead, after the update, has nothing to run beside. The links' seconds, which are all added up here,
tell nothing of this, and a form with whole parameters would be taken wherever it fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from memopt._errors import format_bytes
from memopt._plan import Decision

_ONE_AXIS = ("zero1", "zero2", "zero3")
_TWO_AXES = ("zero1+tensor", "zero3+tensor", "zero3+tensor+sequence")
#: Parameters and state are split in full where they take at most this much of the least under any candidate.
_FULLY_SPLIT = 1.05
#: Candidates that are planned in full, quickest collectives first.
_FINALISTS = 4
_MOST_MODEL_WAYS = 32
#: Candidates that the plan prints beside the chosen one.
_RUNNERS_UP = 6


@dataclasses.dataclass(eq=False)
class Candidate:
    """One strategy on one mesh.

    Attributes:
      strategy, mesh: what it is.
      applies: whether it can be laid out at all; `why` says why not.
      argument_bytes: bytes of the arguments on one device.
      state_bytes: of these, what parameters and state take.
      collective_seconds: predicted seconds of its collectives.
      whole: whether parameters or state are not split as far as another candidate splits them.
      ladder: the plans of the step under it; None where it was not planned.
      sketched: whether its ladder holds a few plans alone.
      peak_bytes, seconds: the peak of the quickest plan that fits, and what its repeats and the collectives take.
      fits: whether a plan fits the budget.
      missed: whether its plans were compiled, and were over the budget.
    """

    strategy: str
    mesh: Mesh
    applies: bool = True
    argument_bytes: int = 0
    state_bytes: int = 0
    collective_seconds: float = 0.0
    whole: bool = False
    ladder: Any = None
    sketched: bool = False
    peak_bytes: int | None = None
    seconds: float | None = None
    fits: bool = False
    missed: bool = False
    why: str = ""

    @property
    def title(self) -> str:
        """The strategy and the mesh, in words."""
        return f"{self.strategy} on {'x'.join(map(str, self.mesh.devices.shape))}"

    def row(self, *, chosen: bool) -> Decision:
        """Return what the plan says of it."""
        name, sends = f"shard/auto/{self.title}", self.collective_seconds
        if not self.applies:
            return Decision(name, "", "", 0, "cannot apply", self.why)
        reason = f"collectives {sends * 1e3:.3g} ms, arguments {format_bytes(self.argument_bytes)} a device"
        reason += ", not all of parameters and state split" if self.whole else ""
        if self.peak_bytes is None:
            return Decision(name, "", "", 0, "runner-up", f"{reason}; not planned", collective_seconds=sends)
        fits = "compiled over the budget" if self.missed else "fits" if self.fits else "does not fit"
        reason += f"; peak {format_bytes(self.peak_bytes)} predicted, {fits}, {self.seconds * 1e3:.3g} ms in all"
        choice = "chosen" if chosen else "runner-up"
        return Decision(name, "", "", self.peak_bytes, choice, reason, collective_seconds=sends)


def candidates(mesh: Mesh) -> Iterator[Candidate]:
    """Yield every strategy on every shape of mesh that the search knows."""
    devices = mesh.devices.reshape(-1)
    for strategy in _ONE_AXIS:
        yield Candidate(strategy, Mesh(devices, ("data",)))
    for ways in range(2, min(devices.size, _MOST_MODEL_WAYS) + 1):
        if devices.size % ways == 0:
            for strategy in _TWO_AXES:
                yield Candidate(strategy, Mesh(devices.reshape(-1, ways), ("data", "model")))


def search(
    mesh: Mesh,
    lay_out: Callable[[Candidate], None],
    plan: Callable[[Candidate, bool], Any],
    limit: Callable[[Any], int | None],
) -> Iterator[Any]:
    """Yield the ladders of the candidates, the best first, each with rows on all of them.

    Candidates are compared by a few plans of each; the best one is then planned in full. Whoever compiles the first one
    and finds it over the budget takes the next one.

    Args:
      mesh: its devices are used in their order, its axes are not.
      lay_out: fills in a candidate's bytes and collective seconds; raises `ValueError` where it cannot apply.
      plan: makes a candidate's ladder, of a few plans alone where the second argument says so.
      limit: a ladder, or None -> the budget in bytes, None where there is none.

    Raises:
      ValueError: no candidate applies.
    """
    found = list(candidates(mesh))
    for one in found:
        try:
            lay_out(one)
        except ValueError as error:
            one.applies, one.why = False, str(error)
    able = [one for one in found if one.applies]
    if not able:
        why = found[0].why
        raise ValueError(f"No sharding strategy applies to this step on {mesh.size} devices. {found[0].title}: {why}")
    least = min(one.state_bytes for one in able)
    for one in able:
        one.whole = one.state_bytes > _FULLY_SPLIT * least
    able = _ordered(able, limit(None))
    _plan_finalists(able, plan, limit)
    while able:
        best = min(able, key=_rank)
        while best.ladder is None or best.sketched:
            _plan(best, plan, limit, sketched=False)
            best = min(able, key=_rank)
        best.ladder.rows = tuple(_rows(best, found))
        yield best.ladder
        best.missed = True
        able.remove(best)


def _ordered(able: Sequence[Candidate], limit: int | None) -> list[Candidate]:
    """Return candidates by `_rank`'s order; those whose arguments alone do not fit come last, smallest first."""
    able = sorted(able, key=_rank)
    held = [one for one in able if limit is None or one.argument_bytes <= limit]
    return [*held, *sorted((one for one in able if one not in held), key=lambda one: one.argument_bytes)]


def _plan_finalists(able: list[Candidate], plan: Callable, limit: Callable) -> None:
    """Plan candidates until no later one can come before the best that fits."""
    best: Candidate | None = None
    for planned, one in enumerate(able):
        if best is not None and best.fits and (planned >= _FINALISTS or not _may_beat(one, best)):
            break
        _plan(one, plan, limit, sketched=True)
        if best is None or _rank(one) < _rank(best):
            best = one


def _may_beat(one: Candidate, best: Candidate) -> bool:
    return (one.whole, one.collective_seconds) < (best.whole, best.seconds)


def _rank(one: Candidate) -> tuple:
    """Order: what fits, split in full first, by seconds; then what was planned, by its peak; then the others."""
    if one.fits:
        return 0, one.whole, one.seconds, one.argument_bytes
    if one.peak_bytes is not None:
        return 1, one.peak_bytes, one.argument_bytes
    return (2, one.whole, one.collective_seconds, one.argument_bytes) if one.applies else (3,)


def _plan(one: Candidate, plan: Callable, limit: Callable[[Any], int | None], *, sketched: bool) -> None:
    one.ladder, one.sketched = plan(one, sketched), sketched
    budget, rungs = limit(one.ladder), one.ladder.rungs[one.ladder.first :]
    within = [r for r in rungs if budget is None or r.predicted_peak_bytes <= budget]
    chosen = min(within, key=lambda r: r.seconds) if within else min(rungs, key=lambda r: r.predicted_peak_bytes)
    one.fits, one.peak_bytes = bool(within), chosen.predicted_peak_bytes
    one.seconds = one.collective_seconds + chosen.seconds - min(r.seconds for r in rungs)


def _rows(best: Candidate, found: Sequence[Candidate]) -> Iterator[Decision]:
    yield best.row(chosen=True)
    others = sorted((one for one in found if one is not best), key=_shown)
    yield from (one.row(chosen=False) for one in others[:_RUNNERS_UP])


def _shown(one: Candidate) -> tuple:
    """Order of the plan's rows: what was compiled, what was planned, the others by seconds, split in full or not."""
    return not one.missed, not one.applies, one.peak_bytes is None, one.collective_seconds
