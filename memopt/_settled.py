"""The store room: of each region, what stands the same in every plan, made once for all of them.

In: a `Graph`. Out: for each region a `Settled` table, aligned with its operations: the equation as it stands where
nothing that it reads is repeated or kept in another form, whose results it reads, and the variable that a barrier after
it is tied to. The builder takes from here what a plan leaves alone and makes only the rest anew. It builds and decides
nothing.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

from memopt import _compat as c
from memopt import _fusion
from memopt import _graph as g


@dataclasses.dataclass(frozen=True, eq=False)
class Settled:
    """One region's table.

    Attributes:
      eqns: per operation its equation, None where each plan has to look at it: it has bodies, or reads what another
        region makes.
      makers: per operation the ids of the operations whose results it reads.
      latest: per position the variable made last before it by an operation that XLA materialises, or None.
      runs: `(segment, first position, position after the last)`, in order.
      open: the positions at which `eqns` is None.
    """

    eqns: list[Any]
    makers: list[frozenset[int]]
    latest: list[Any]
    runs: list[tuple[int, int, int]]
    open: list[int]


_TABLES: weakref.WeakKeyDictionary[g.Graph, tuple[list[Settled], dict[Any, int]]] = weakref.WeakKeyDictionary()


def tables(graph: g.Graph) -> tuple[list[Settled], dict[Any, int]]:
    """Return the table of each region, and the time segment of each variable that an operation of the graph makes.

    Made at the first call, when the operations have their segments.
    """
    if graph not in _TABLES:
        bins = {var: op.bin for op in graph.ops for var in op.eqn.outvars}
        _TABLES[graph] = [_table(graph, region) for region in graph.regions], bins
    return _TABLES[graph]


def _table(graph: g.Graph, region: g.Region) -> Settled:
    eqns = [_settled(graph, region, op) for op in region.ops]
    makers = [frozenset(graph.values[v].op.id for v in op.inputs if _is_made(graph, v)) for op in region.ops]
    latest, runs = [None], []
    for position, op in enumerate(region.ops):
        latest.append(_tied_to(op) or latest[-1])
        if not runs or runs[-1][0] != op.bin:
            runs.append((op.bin, position, position))
        runs[-1] = (op.bin, runs[-1][1], position + 1)
    return Settled(eqns, makers, latest, runs, [i for i, eqn in enumerate(eqns) if eqn is None])


def _is_made(graph: g.Graph, value: int | None) -> bool:
    return value is not None and graph.values[value].op is not None


def _settled(graph: g.Graph, region: g.Region, op: g.Op) -> Any | None:
    if op.bodies or any(v is not None and graph.values[v].region != region.id for v in op.inputs):
        return None
    invars = [v if o is None else graph.values[o].var for v, o in zip(op.eqn.invars, op.inputs, strict=True)]
    same = all(a is b for a, b in zip(invars, op.eqn.invars, strict=True))
    return op.eqn if same else c.replace_eqn(op.eqn, invars=invars)


def _tied_to(op: g.Op) -> Any | None:
    if op.eqn.primitive.name in _fusion.ELEMENTWISE:
        return None
    return next((v for v in op.eqn.outvars if c.guardable(v)), None)
