"""The scout of sketches: which values of a step weight gradients alone read, and of which norms can be kept.

In: the graph of a flat step. Out: the axes that weight gradients contract of a value; and for a cached sketch its
`Site`s, with the sentences that say why other values are none. All is found on dataflow. It changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from memopt import _compat as c
from memopt import _cost, _forms, _scopes, _stored
from memopt import _graph as g
from memopt._contract import Left
from memopt.passes import _residuals
from memopt.passes import _sketch_norms as ledger

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A value of which rows are kept.

    Attributes:
      name: module path, and a number where several values have one.
      value: its id in the graph.
      rows: how its rows are drawn.
      readers: the contractions of weight gradients that read it.
      loops: the loop that makes it and the one that reads it; None where both stand at the top level.
    """

    name: str
    value: int
    rows: ledger.Rows
    readers: tuple[g.Op, ...]
    loops: tuple[g.Op, g.Op] | None

    @property
    def layers(self) -> int | None:
        """Trips of the loop, None outside loops."""
        return None if self.loops is None else self.loops[0].eqn.params["length"]


def weight_gradients(
    graph: g.Graph, value: int, rank: int, readers: frozenset[int], marks: _forms.Marks
) -> tuple[int, ...] | None:
    """Return the axes that weight gradients contract, where the backward pass reads a value for nothing but those."""
    found = set()
    for reader in (graph.ops[o] for o in readers):
        if reader.eqn.primitive.name != "dot_general":
            return None
        contracting, batches = reader.eqn.params["dimension_numbers"]
        sides = [i for i, v in enumerate(reader.inputs) if v == value]
        if len(sides) != 1 or any(batches) or _feeds_gradients(graph, reader, marks):
            return None
        found.add(tuple(contracting[sides[0]]))
    axes = found.pop() if len(found) == 1 else None
    return axes if axes and len(axes) < rank else None


def _feeds_gradients(graph: g.Graph, op: g.Op, marks: _forms.Marks) -> bool:
    """Say whether another contraction of the backward pass reads what is made from an operation's result."""
    made = set(op.outputs)
    for other in graph.regions[op.region].ops[op.index + 1 :]:
        if made.isdisjoint(v for v in other.inputs if v is not None):
            continue
        if other.eqn.primitive.name in CONTRACTIONS or other.bodies:
            return True
        if marks.is_backward(other):
            made.update(other.outputs)
    return False


def batch_of(pass_: Any, paths: Sequence[str], avals: Sequence[Any]) -> tuple[int | None, int]:
    """Return the argument that holds the numbers of a batch's samples, None where there is none, and their count.

    Raises:
      ValueError: the pattern matches no vector of integers, or several.
    """
    if not pass_.ids:
        return None, pass_.samples
    vectors = [i for i, a in enumerate(avals) if len(a.shape) == 1 and jnp.issubdtype(a.dtype, jnp.integer)]
    found = [i for i in vectors if _stored.matches(paths[i], pass_.ids)]
    if len(found) != 1:
        known, matched = (", ".join(paths[i] for i in some) or "none" for some in (vectors, found))
        raise ValueError(
            f"ids={pass_.ids!r} has to match one argument, a vector of integers that numbers the batch's samples; it "
            f"matches {matched} of {known}."
        )
    return found[0], avals[found[0]].shape[0]


def find(pass_: Any, graph: g.Graph, batch: int) -> tuple[list[Site], list[Left]]:
    """Return what a cached sketch can keep rows of in a step, in order, and why it leaves other such values."""
    marks, sites, left = _forms.Marks(graph), [], []
    readers: dict[int, dict[int, g.Op]] = {}
    for op in filter(marks.is_backward, graph.ops):
        for v in (v for i, v in enumerate(op.inputs) if v is not None and i not in op.mapped):
            readers.setdefault(v, {})[op.id] = op
    used: dict[str, int] = {}
    for item in (graph.values[v] for v in sorted(readers)):
        if not _may_be_kept(graph, marks, item):
            continue
        ops = tuple(readers[item.id].values())
        axes = weight_gradients(graph, item.id, len(item.aval.shape), frozenset(readers[item.id]), marks)
        module = _module(graph, item)
        if axes is None or not (not pass_.where or any(_scopes.match_path(p, module) for p in pass_.where)):
            continue
        used[module] = used.get(module, 0) + 1
        name = module if used[module] == 1 else f"{module}#{used[module]}"
        found = _site(pass_, graph, item, name, axes, ops, batch)
        (sites if isinstance(found, Site) else left).append(found)
    return sites, left


def _may_be_kept(graph: g.Graph, marks: _forms.Marks, item: g.Value) -> bool:
    if item.kind not in (g.MADE, g.CARRY_IN) or not c.guardable(item.var):
        return False
    maker = item.op
    if maker is not None and (maker.bodies or marks.is_backward(maker)):
        return False
    large = _cost.aval_bytes(item.aval) >= _residuals.LEAST_BYTES
    return large and jnp.issubdtype(item.aval.dtype, jnp.floating) and not _residuals.is_view(graph, item.id)


def _module(graph: g.Graph, item: g.Value) -> str:
    stack = str(c.name_stack(item.op.eqn)) if item.op is not None else ""
    around = _residuals.around(graph, item.region)
    return _scopes.module_path("/".join(p for p in (around, stack) if p)) or "step"


def _site(
    pass_: Any,
    graph: g.Graph,
    item: g.Value,
    name: str,
    axes: tuple[int, ...],
    readers: tuple[g.Op, ...],
    batch: int,
) -> Site | Left:
    """Return what can be kept of a value, or why norms of its samples cannot be."""
    what = f"The norm cache of {name}"
    if c.is_local(item.aval):
        return Left(what, "it is one device's part of a sharded value")
    homes = {op.region for op in readers}
    here, there = graph.regions[item.region], graph.regions[min(homes)]
    pair = None if here.id == there.id else (here.op, there.op)
    if len(homes) > 1 or any(op.twins for op in readers):
        return Left(what, "several places of the backward pass read it")
    if pair is None and here.op is not None:
        return Left(what, "the loop that makes it reads it back itself, so that no state can be written in between")
    if pair is not None and not all(_is_top_scan(op) for op in pair):
        return Left(what, "the loops that make and read it are no pair at the top level of the step")
    laid = ledger.layout(item.aval.shape, axes, batch)
    if laid is None:
        return Left(what, f"none of its rows' axes is as long as the batch of {batch} samples, nor a multiple of it")
    return Site(name, item.id, pass_.rows(item.aval.shape, item.aval.dtype, axes, *laid), readers, pair)


def _is_top_scan(op: g.Op | None) -> bool:
    return op is not None and op.eqn.primitive.name == "scan" and op.region == 0
