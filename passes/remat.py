"""Rematerialization: forward values that are run again where they are read, instead of being kept.

In: a survey of the step. Out: one `Repeat` for each operation that may be run a second time without changing what the
step computes. Which of them are run again is the planner's choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from memopt._contract import Left, Repeat
from memopt._survey import Survey

#: Primitives whose second run could give another result, or whose cost cannot be known before running.
_NEVER = frozenset({"rng_uniform", "while", "optimization_barrier", "pure_callback", "io_callback", "debug_callback"})
#: Added to every repeat, so that nothing is repeated that saves nothing.
_EACH_SECONDS = 1e-8


@dataclasses.dataclass(frozen=True)
class Remat:
    """Let the planner run operations again instead of keeping their results.

    Memory falls by the values no longer kept; the cost is the operations' second run. Exact: the same operations on
    the same inputs, random bits from the same key. Effects are never repeated.

    Args:
      respect_checkpoint: leave regions that the user wrapped in `jax.checkpoint` as they are, instead of planning them
        as part of the whole.

    Example:
      >>> import memopt
      >>> memopt.passes.Remat()
      Remat(respect_checkpoint=False)

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv 1604.06174); the choice by minimum
    cut follows the recomputation problem of Jain et al., "Checkmate", MLSys 2020, section 4.
    """

    respect_checkpoint: bool = False

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "remat"

    def propose(self, survey: Survey) -> Iterator[Repeat | Left]:
        """Yield a `Repeat` for every operation without effects whose second run gives the same values."""
        for op in survey.graph.ops:
            name = op.eqn.primitive.name
            if op.eqn.effects:
                yield Left(name, "it has an effect, and effects are never repeated")
            elif name == "while":
                yield Left(name, "its number of iterations is not known before it runs")
            elif name not in _NEVER and not op.feeds and not op.mapped:
                yield Repeat(op.id, survey.repeat_seconds[op.id] + _EACH_SECONDS)
