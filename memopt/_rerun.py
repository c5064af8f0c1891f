"""The rehearsal room: inner forward loops that run once more in the outer loop's reading body.

In: an inlined closed jaxpr in which a loop in the body of a forward loop hands its stacks, stacked once more, to a loop
in the body that reads it. Out: an equal jaxpr in which that loop runs again right before its reader, from its own
inputs: what `jax.checkpoint` on the outer body would do with it. The two then stand in one body and are planned there
as any pair. It decides nothing.
"""

from __future__ import annotations

from typing import Any

from memopt import _apply, _paired, _pairs, _segments
from memopt import _compat as c
from memopt import _graph as g


def rerun(closed: Any) -> Any | None:
    """Run each inner forward loop again where the reading body needs what it stacks.

    Memory: the inner loop's stacks are those of one iteration of the outer loop. Cost: the inner loop's second run.

    Args:
      closed: inlined closed jaxpr.

    Returns:
      The rewritten closed jaxpr with the same inputs and outputs; None where there is no such loop.
    """
    graph = g.Graph(closed, nested=False)
    _segments.assign(graph)
    repeats: dict[int, set[int]] = {}
    for op in graph.ops:
        for maker in _inner_makers(graph, op):
            repeats.setdefault(op.bin, set()).add(maker.id)
    if not repeats:
        return None
    return _apply.apply(graph, {place: frozenset(ops) for place, ops in repeats.items()})[0]


def has_nested(graph: g.Graph) -> bool:
    """Say whether a graph pairs a loop with one in the body that the body around it reads."""
    return any(
        op.eqn.primitive.name == "scan" and op.region != reader.region for op in graph.ops for reader in op.feeds
    )


def _inner_makers(graph: g.Graph, op: g.Op) -> list[g.Op]:
    """Return the loops in other bodies whose stacks a loop reads, of those that may run twice."""
    if op.eqn.primitive.name != "scan":
        return []
    first = sum(c.scan_layout(op.eqn))
    region = graph.regions[op.region]
    found = [_paired.maker_of(graph, region, v, "scan") for v in op.inputs[first:]]
    makers = [m for m in dict.fromkeys(found) if m is not None and m.region != op.region]
    return [m for m in makers if not m.feeds and not m.mapped and not m.eqn.effects and _pairs.Loop(m.eqn).pure]
