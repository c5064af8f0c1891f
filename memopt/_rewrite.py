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
    """Return the passes that rewrite the step, in the order in which they do; one that has parts as its parts."""
    parts = [part for p in passes for part in (p.parts() if callable(getattr(p, "parts", None)) else [p])]
    found = [p for p in parts if callable(getattr(p, "rewrite", None))]
    return sorted(found, key=lambda p: (p.stage, p.name))


def is_required(passes: Iterable[Any]) -> bool:
    """Whether one of the passes is applied whatever the budget: a rewrite, or a form of what is kept (`always`)."""
    passes = list(passes)
    return any(not p.optional for p in rewriters(passes)) or any(getattr(p, "always", False) for p in passes)


def partitions(passes: Iterable[Any]) -> int:
    """Return into how many parts a pass has the tokens of the step split; 0 where none partitions it."""
    return max((getattr(p, "partitions", 0) for p in passes), default=0)


def feature_parts(passes: Iterable[Any]) -> int:
    """Return into how many parts a pass has the features of the step split, 1 where none does."""
    return max((getattr(p, "feature_parts", 1) for p in passes), default=1)


def apply(
    closed: Any,
    passes: Sequence[Rewriter],
    context: Context,
    *,
    respect_checkpoint: bool = False,
    known: dict[tuple[str, ...], Outcome] | None = None,
) -> Outcome:
    """Run the rewrites of `passes`, one after another.

    Args:
      closed: the step, flat.
      passes: those to run, in order.
      context: what they may know.
      respect_checkpoint: leave `jax.checkpoint` regions as they are when a rewritten step is made flat again.
      known: outcomes of this step by the names of the passes that ran, kept by a caller who runs several sets of them.

    Returns:
      The outcome.

    Raises:
      RuntimeError: a pass returned a step with other inputs or outputs.
    """
    known = {} if known is None else known
    outcome, ran = known.setdefault((), Outcome(closed)), ()
    for one in passes:
        ran = (*ran, one.name)
        if ran not in known:
            known[ran] = _run(outcome, one, context, respect_checkpoint)
        outcome = known[ran]
    return outcome


def _run(outcome: Outcome, one: Rewriter, context: Context, respect_checkpoint: bool) -> Outcome:
    rewritten = one.rewrite(outcome.closed, context)
    if rewritten is None:
        return outcome
    changed = rewritten.closed is not outcome.closed
    if changed:
        _check(one.name, outcome.closed, rewritten)
    return Outcome(
        _flat(rewritten.closed, respect_checkpoint) if changed else outcome.closed,
        (*outcome.applied, one.name) if changed else outcome.applied,
        (*outcome.rows, *rewritten.rows),
        (*outcome.left, *rewritten.left),
        rewritten.shardings or outcome.shardings,
    )


def _flat(closed: Any, respect_checkpoint: bool) -> Any:
    flat = _inline.inline(closed, respect_checkpoint=respect_checkpoint)
    return c.close(c.dce(flat)[0], c.jaxpr_consts(flat))


def _check(name: str, before: Any, after: Rewritten) -> None:
    for what in ("in_avals", "out_avals"):
        old, new = ([(a.shape, a.dtype) for a in getattr(x, what)] for x in (before, after.closed))
        if old != new:
            wrong = next((pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]), (len(old), len(new)))
            raise RuntimeError(f"The pass {name!r} changed the step's {what}: {wrong[0]} became {wrong[1]}.")
