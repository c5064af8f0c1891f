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

from memopt import _apart, _fusion
from memopt import _compat as c
from memopt import _graph as g


@dataclasses.dataclass(frozen=True, eq=False)
class Settled:
    """One region's table.

    Attributes:
      eqns: per operation its equation, None where each plan has to look at it: it has bodies, or reads what another
        region makes.
      makers: per operation the ids of the operations whose results it reads.
      latest: per position the variable made last before it that XLA materialises and later matmuls wait for, or None:
        a gradient that goes to its update alone would be held in memory by a barrier.
      runs: `(segment, first position, position after the last)`, in order.
      open: the positions at which `eqns` is None.
    """

    eqns: list[Any]
    makers: list[frozenset[int]]
    latest: list[Any]
    runs: list[tuple[int, int, int]]
    open: list[int]


_FUSED = _fusion.ELEMENTWISE | _fusion.REDUCTIONS
#: Each kernel that reads their result puts it together by itself.
_JOINING = frozenset({"concatenate", "pad"})
_TABLES: weakref.WeakKeyDictionary[g.Graph, tuple[list[Settled], dict[Any, int]]] = weakref.WeakKeyDictionary()


def tables(graph: g.Graph) -> tuple[list[Settled], dict[Any, int]]:
    """Return the table of each region, and the time segment of each variable that an operation of the graph makes.

    Made at the first call, when the operations have their segments.
    """
    if graph not in _TABLES:
        bins = {var: op.bin for op in graph.ops for var in op.eqn.outvars}
        ties = _ties(graph)
        _TABLES[graph] = [_table(graph, region, ties) for region in graph.regions], bins
    return _TABLES[graph]


def _ties(graph: g.Graph) -> set[int]:
    """Return the values that a barrier may be tied to: XLA materialises them, and matmuls wait for them.

    A matmul whose result element-wise operations alone read goes on in the same kernel; to hold its result for a
    barrier beside theirs would cost its bytes (XLA:TPU does so up to the end, though nothing reads it then). The value
    that such a kernel ends with, the first one that another kernel reads, is tied to in its place, if it is computed
    and not put together of parts. Batched matmuls make scores and their gradients, which are written in any case: a
    reduction of them has to come first.
    """
    onward = _onward(graph)
    whole = {v for op in graph.ops if op.eqn.primitive.name not in _FUSED for v in op.inputs}
    found: set[int] = set()
    going: set[int | None] = set()
    for op in graph.ops:
        name, goes_on = op.eqn.primitive.name, not going.isdisjoint(op.inputs)
        if name in _fusion.ELEMENTWISE and not goes_on:
            continue
        if name in _fusion.ELEMENTWISE or (name in _fusion.MATMULS and not _apart.is_batched(op.eqn)):
            going.update(v for v in op.outputs if v not in whole)
            found.update(v for v in op.outputs if v in whole and name not in _JOINING)
        else:
            found.update(op.outputs)
    return found & onward


def _onward(graph: g.Graph) -> set[int]:
    """Return the values that a matmul or a loop reads at last; a gradient of weights goes to its update alone."""
    found = {v for region in graph.regions[1:] for v in region.outs if v is not None}
    for op in reversed(graph.ops):
        if op.eqn.primitive.name not in _FUSED or not found.isdisjoint(op.outputs):
            found.update(v for v in op.inputs if v is not None)
    return found


def _table(graph: g.Graph, region: g.Region, ties: set[int]) -> Settled:
    eqns = [_settled(graph, region, op) for op in region.ops]
    makers = [frozenset(graph.values[v].op.id for v in op.inputs if _is_made(graph, v)) for op in region.ops]
    latest, runs = [None], []
    for position, op in enumerate(region.ops):
        latest.append(_tied_to(op, ties) or latest[-1])
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


def _tied_to(op: g.Op, ties: set[int]) -> Any | None:
    made = zip(op.outputs, op.eqn.outvars, strict=True)
    return next((v for o, v in made if o in ties and c.guardable(v)), None)
