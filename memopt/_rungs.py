"""Rungs: complete plans of one step, and which of many are worth keeping.

In: rungs in any order. Out: the hull, in which none is beaten in predicted peak and cost by another, and the spares,
which some rung beats by predicted peak and none would if the compiler's heap had no holes. Nothing is built here, and
nothing simulated but the step as written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from memopt import _timeline
from memopt._network import Choice
from memopt._step import Step


@dataclasses.dataclass(eq=False)
class Rung:
    """One complete plan: the rewritten step and its predicted figures.

    Attributes:
      closed: the rewritten closed jaxpr, with the step's own inputs and outputs.
      predicted_peak_bytes: predicted peak per device.
      packed_peak_bytes: the same if the compiler's heap had no holes: the least that it can come to.
      seconds: predicted time that the plan adds to the step as written.
      recompute_flops: matmul and convolution FLOPs that it adds.
      choice: what is run again where, and what is kept in another form.
      step: what it is a plan of.
      price: the price of memory, in seconds per byte, at which the cut chose it; None for the step as written.
      usage: the largest predicted bytes of temporaries in each time segment; None for the step as written.
      harm: the sum of what the forms that it keeps values in were measured to do to the gradients (`Store.harm`).
    """

    closed: Any
    predicted_peak_bytes: int
    packed_peak_bytes: int
    seconds: float
    recompute_flops: float
    choice: Choice
    step: Step
    price: float | None = None
    usage: np.ndarray | None = dataclasses.field(default=None, repr=False)
    harm: float = 0.0

    @property
    def allowed(self) -> bool:
        """Whether it does no more harm than the user allows."""
        limit = self.step.harm_limit
        return limit is None or self.harm <= limit

    def jaxpr(self) -> Any:
        """Return the rewritten closed jaxpr."""
        return self.closed


def plain_rung(step: Step, donated: Sequence[bool]) -> Rung:
    """Return the step as written."""
    timeline = _timeline.simulate(step.live, donated=donated, target=step.target, local=step.local)
    return Rung(step.closed, timeline.peak_bytes, timeline.packed_peak_bytes, 0.0, 0.0, Choice({}), step)


def hull(plain: Rung, rungs: list[Rung]) -> list[Rung]:
    """Drop every plan that another one beats in peak and cost, or that saves nothing; largest peak first.

    The cost is the repeated FLOPs, then the seconds; where a plan stores a value for seconds (a transfer, a codec), it
    is the seconds of all of them: FLOPs alone would call a slow transfer free. Where harm was measured and no limit is
    set, it is the harm first. Plans over a limit are dropped.
    """
    out = _falling(plain, _by_cost(rungs))
    if any(rung.harm for rung in out) and out[0].step.harm_limit is None:
        return out  # plans of more harm may well take less time
    for before, rung in zip(out, out[1:], strict=False):
        rung.seconds = max(rung.seconds, before.seconds)  # fewer FLOPs for more bytes may take longer: say the longer
    return out


def refused(rungs: list[Rung]) -> list[Rung]:
    """Return the plans over the limit of harm that none beats in peak and harm, the least harm first."""
    out: list[Rung] = []
    for rung in sorted((r for r in rungs if not r.allowed), key=lambda r: (r.harm, r.predicted_peak_bytes)):
        if not out or rung.predicted_peak_bytes < out[-1].predicted_peak_bytes:
            out.append(rung)
    return out


def spares(chosen: list[Rung], rungs: list[Rung]) -> list[Rung]:
    """Return the plans beside the chosen ones that none beats in cost and in what it would take without holes."""
    out, least = [], None
    for rung in _by_cost(rungs):
        if least is None or rung.packed_peak_bytes < least:
            least = rung.packed_peak_bytes
            if not any(rung is other for other in chosen):
                out.append(rung)
    return out


def bare(plain: Rung, chosen: list[Rung], rungs: list[Rung]) -> list[Rung]:
    """Return the hull of plans without exact forms, less the chosen plans; none where no chosen plan has such forms."""
    if not any(has_forms(rung) for rung in chosen):
        return []
    out = _falling(plain, _by_cost([rung for rung in rungs if not has_forms(rung)]))
    return [rung for rung in out if not any(rung is other for other in chosen)]


def has_forms(rung: Rung) -> bool:
    """Say whether a plan keeps values in exact forms that were tried when the search was over (`Store.late`)."""
    return any(store.late for store in rung.choice.stores.values())


def by_seconds(plain: Rung, rungs: list[Rung]) -> list[Rung]:
    """Return the hull of peak and seconds alone, whatever harm is done; no seconds are changed."""
    return _falling(plain, sorted(rungs, key=lambda rung: (rung.seconds, rung.predicted_peak_bytes)))


def _falling(plain: Rung, rungs: list[Rung]) -> list[Rung]:
    """Return the plans whose peak is below the plain step's and below that of all plans before them."""
    out: list[Rung] = []
    for rung in rungs:
        if rung.predicted_peak_bytes < (out[-1] if out else plain).predicted_peak_bytes:
            out.append(rung)
    return out


def _by_cost(rungs: list[Rung]) -> list[Rung]:
    rungs = [rung for rung in rungs if rung.allowed]
    ranked = any(rung.harm and rung.step.harm_limit is None for rung in rungs)
    timed = any(s.seconds for rung in rungs for s in rung.choice.stores.values())

    def cost(rung: Rung) -> tuple[float, float, float, int]:
        seconds, flops, harm = rung.seconds, rung.recompute_flops, rung.harm if ranked else 0.0
        first, second = (seconds, flops) if timed else (flops, seconds)
        return harm, first, second, rung.predicted_peak_bytes

    return sorted(rungs, key=cost)
