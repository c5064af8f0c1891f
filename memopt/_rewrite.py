"""The workshop before the survey: passes that put other equations in the place of the step's own.

In: a flat jaxpr, the passes, and what they may know of the step. Out: an equal flat jaxpr after every rewrite, with the
rows and sentences that the plan prints. It knows no concrete pass, and plans nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from memopt import _compat as c
from memopt import _inline
from memopt._contract import Context, Left, Rewriter, Rewritten
from memopt._plan import Decision


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A step after its rewrites: the jaxpr, who changed it, and what there is to say."""

    closed: Any
    applied: tuple[str, ...] = ()
    rows: tuple[Decision, ...] = ()
    left: tuple[Left, ...] = ()
    shardings: Any = None  # of arguments and results, where a rewrite decided them (`memopt._local.Shardings`)


def rewriters(passes: Iterable[Any]) -> list[Rewriter]:
    """Return the passes that rewrite the step, in the order in which they do."""
    found = [p for p in passes if callable(getattr(p, "rewrite", None))]
    return sorted(found, key=lambda p: (p.stage, p.name))


def is_required(passes: Iterable[Any]) -> bool:
    """Whether one of the passes is applied whatever the budget."""
    return any(not p.optional for p in rewriters(passes))


def apply(closed: Any, passes: Sequence[Rewriter], context: Context, *, respect_checkpoint: bool = False) -> Outcome:
    """Run the rewrites of `passes`, one after another.

    Args:
      closed: the step, flat.
      passes: those to run, in order.
      context: what they may know.
      respect_checkpoint: leave `jax.checkpoint` regions as they are when a rewritten step is made flat again.

    Returns:
      The outcome.

    Raises:
      RuntimeError: a pass returned a step with other inputs or outputs.
    """
    outcome = Outcome(closed)
    for one in passes:
        rewritten = one.rewrite(outcome.closed, context)
        if rewritten is None:
            continue
        changed = rewritten.closed is not outcome.closed
        if changed:
            _check(one.name, outcome.closed, rewritten)
        outcome = Outcome(
            _flat(rewritten.closed, respect_checkpoint) if changed else outcome.closed,
            (*outcome.applied, one.name) if changed else outcome.applied,
            (*outcome.rows, *rewritten.rows),
            (*outcome.left, *rewritten.left),
            rewritten.shardings or outcome.shardings,
        )
    return outcome


def _flat(closed: Any, respect_checkpoint: bool) -> Any:
    flat = _inline.inline(closed, respect_checkpoint=respect_checkpoint)
    return c.close(c.dce(flat)[0], c.jaxpr_consts(flat))


def _check(name: str, before: Any, after: Rewritten) -> None:
    for what in ("in_avals", "out_avals"):
        old, new = ([(a.shape, a.dtype) for a in getattr(x, what)] for x in (before, after.closed))
        if old != new:
            wrong = next((pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]), (len(old), len(new)))
            raise RuntimeError(f"The pass {name!r} changed the step's {what}: {wrong[0]} became {wrong[1]}.")
