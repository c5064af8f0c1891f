"""The sharding pass's search: which strategy on which mesh shape is quickest among those that fit.

In: a flat step, all devices of a mesh, what the pass knows of the step. Out: `Candidate`s, ranked, each with its
layout's state bytes and collective seconds, the best few with the peak that the planner predicts for them after its own
cut. It applies nothing: the pass applies the first one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from memopt import _planner
from memopt._contract import Context, Rewritten
from memopt._program import default_passes
from memopt._target import limit_bytes

_ONE_AXIS = ("zero1", "zero2", "zero3")
_TWO_AXES = ("zero1+tensor", "zero3+tensor", "zero3+tensor+sequence")
#: Candidates that are planned in full, quickest collectives first.
_FINALISTS = 4
_MOST_MODEL_WAYS = 32


@dataclasses.dataclass
class Candidate:
    """One strategy on one mesh.

    Attributes:
      strategy, mesh: what it is.
      rewritten: the step under it; None where it cannot apply, and `why` says so.
      state_bytes: bytes of the arguments on one device.
      collective_seconds: predicted seconds of its collectives.
      peak_bytes, seconds: after the planner's cut: the peak of the quickest plan that fits, and what it and its
        collectives take; None where it was not planned.
      fits: whether a plan fits the device.
    """

    strategy: str
    mesh: Mesh
    rewritten: Rewritten | None = None
    state_bytes: int = 0
    collective_seconds: float = 0.0
    peak_bytes: int | None = None
    seconds: float | None = None
    fits: bool = False
    why: str = ""

    @property
    def title(self) -> str:
        """The strategy and the mesh, in words."""
        return f"{self.strategy} on {'x'.join(map(str, self.mesh.devices.shape))}"


def search(mesh: Mesh, make: Callable[[Candidate], None], context: Context) -> list[Candidate]:
    """Return the candidates, the chosen one first.

    Args:
      mesh: its devices are used in their order, its axes are not.
      make: fills in a candidate's step, state bytes and collective seconds; raises `ValueError` where it cannot apply.
      context: what is known of the step.
    """
    found = []
    for candidate in _candidates(mesh):
        try:
            make(candidate)
        except ValueError as error:
            candidate.why = str(error)
        found.append(candidate)
    limit = limit_bytes(context.target)
    able = [one for one in found if one.rewritten is not None]
    able.sort(key=lambda one: (one.collective_seconds, one.state_bytes))
    if limit is not None:
        held = [one for one in able if one.state_bytes <= limit]
        able = [*held, *sorted((o for o in able if o not in held), key=lambda o: o.state_bytes)]
    best = _best(able, context, limit)
    rest = sorted((one for one in found if one is not best), key=_rank)
    return [best, *rest] if best is not None else rest


def _candidates(mesh: Mesh) -> Iterator[Candidate]:
    devices = mesh.devices.reshape(-1)
    for strategy in _ONE_AXIS:
        yield Candidate(strategy, Mesh(devices, ("data",)))
    for ways in range(2, min(devices.size, _MOST_MODEL_WAYS) + 1):
        if devices.size % ways == 0 and devices.size > ways:
            for strategy in _TWO_AXES:
                yield Candidate(strategy, Mesh(devices.reshape(-1, ways), ("data", "model")))


def _best(able: list[Candidate], context: Context, limit: int | None) -> Candidate | None:
    """Plan candidates until no later one can be quicker, and return the quickest that fits, else the smallest."""
    best: Candidate | None = None
    planned = 0
    for one in able:
        if best is not None and best.fits and one.collective_seconds >= best.seconds:
            break
        if planned >= _FINALISTS and best is not None and best.fits:
            break
        _plan(one, context, limit)
        planned += 1
        if best is None or _rank(one) < _rank(best):
            best = one
    return best


def _rank(one: Candidate) -> tuple:
    """Order: what fits, by seconds; then what was planned, by its peak; then the others by their collectives."""
    if one.fits:
        return 0, one.seconds, one.state_bytes
    if one.peak_bytes is not None:
        return 1, one.peak_bytes, one.state_bytes
    return (2, one.collective_seconds, one.state_bytes) if one.rewritten is not None else (3, 0, 0)


def _plan(one: Candidate, context: Context, limit: int | None) -> None:
    ladder = _planner.make_ladder(
        one.rewritten.closed,
        donated=context.donated or (False,) * len(one.rewritten.closed.in_avals),
        target=context.target,
        passes=default_passes(),
        shardings=one.rewritten.shardings,
    )
    rungs = ladder.rungs
    within = [r for r in rungs if limit is None or r.predicted_peak_bytes <= limit]
    chosen = min(within, key=lambda r: r.seconds) if within else min(rungs, key=lambda r: r.predicted_peak_bytes)
    one.fits, one.peak_bytes = bool(within), chosen.predicted_peak_bytes
    one.seconds = one.collective_seconds + chosen.seconds - min(r.seconds for r in rungs)
