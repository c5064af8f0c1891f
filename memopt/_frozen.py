"""The register of what is not kept: values that only gradients of frozen weights would read.

In: the graph of a step, the paths of its arguments, the bytes of its values. Out: a row for each forward value that a
contraction multiplies with a frozen argument and that the backward pass does not read: differentiated with respect to
that argument, the step would keep it. And a sentence for gradients that are multiplied by zero, which stay. Found on
dataflow; what tells forward, backward and update apart are the transforms that JAX notes on operations. It changes
nothing: gradients that nothing needs are gone before (`_prune`).

An argument is frozen if the backward pass ends before it: no operation of the update reads it together with what the
backward pass made, and no result of the step looks like a gradient of it that is returned as it is.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from memopt import _compat as c
from memopt import _forms, _fusion, _paired
from memopt import _graph as g
from memopt._contract import Left
from memopt._decisions import Names
from memopt._plan import Decision

DROPPED = "dropped"
#: Operations after which a weight is still one: other shapes, types and scales of it.
_SAME = (_fusion.ELEMENTWISE - {"concatenate", "select_n"}) | {"squeeze", "stop_gradient", "name"}


@dataclasses.dataclass(frozen=True)
class Found:
    """What frozen arguments spare a step, as rows of a plan, and what they could spare, as sentences."""

    dropped: tuple[Decision, ...] = ()
    left: tuple[Left, ...] = ()


def find(graph: g.Graph, paths: Sequence[str], bytes_of: Callable[[int], int]) -> Found:
    """Return a row for each value that only gradients of frozen arguments would read, largest first.

    Args:
      graph: the step, without dead code.
      paths: per input of the step, its path among the arguments; shorter, or empty texts, where they are not known.
      bytes_of: the bytes of one value, by its id.
    """
    flow = _Flow(graph)
    if not flow.backward_reads:
        return Found()
    names = Names(types.SimpleNamespace(graph=graph))
    weights: dict[int, set[int]] = {}
    for value, leaf in flow.unread():
        weights.setdefault(value, set()).add(leaf)
    rows = [_row(graph, names, value, sorted(leaves), paths, bytes_of) for value, leaves in weights.items()]
    left = (Left(*_ZEROED),) if any(map(flow.is_zeroed, graph.ops)) else ()
    return Found(tuple(sorted(rows, key=lambda row: (-row.value_bytes, row.name))), left)


_ZEROED = (
    "A gradient that is multiplied by zero",
    "zero times infinity is not zero, so what only that gradient reads is kept; take gradients of what is trained"
    " alone, or replace the others by zeros (optax.set_to_zero)",
)


def _row(graph, names, value, leaves, paths, bytes_of) -> Decision:
    item = graph.values[value]
    op = graph.regions[item.region].op if item.op is None else item.op
    name = f"{names.name(op)}/carry.{item.operand}" if item.op is None else names.results(op)[op.outputs.index(value)]
    texts = [f"`{paths[i]}`" if i < len(paths) and paths[i] else f"argument {i}" for i in leaves]
    told = " and ".join(texts) if len(texts) < 3 else f"{texts[0]} and {len(texts) - 1} more"
    reason = f"only the gradient of frozen {told} would read it, which nothing that is returned needs"
    size = bytes_of(value) * graph.regions[item.region].trips
    return Decision(name, names.module(op), c.user_source(op.eqn), size, DROPPED, reason)


class _Flow:
    """What reaches what in a graph: weights from arguments, and gradients to the step's results.

    Attributes:
      late: values that depend on the backward pass.
      mixed: of these, the ones in which an argument has a part: updated state.
      trained: inputs of the step that have a part in such values.
      backward_reads: what operations of the backward pass read; empty where there is none.
    """

    def __init__(self, graph: g.Graph):
        self.graph = graph
        self.marks = _forms.Marks(graph)
        self.invars = c.open_jaxpr(graph.closed).invars
        self.late: set[int] = set()
        self.mixed: set[int] = set()
        self.trained: set[int] = set()
        self.backward_reads: set[int] = set()
        self._forms_of: dict[int, frozenset[int]] = {
            graph.top.env[v]: frozenset([i]) for i, v in enumerate(self.invars)
        }
        self._origins: dict[int, frozenset[int]] = {}  # value of an update -> inputs of the step that it is made from
        for op in graph.ops:  # those of a body come after the one that has it, and before what reads its results
            self._see(op)

    def _see(self, op: g.Op) -> None:
        if op.eqn.primitive is c.optimization_barrier_p:
            self._pass_on(op)
            return
        read = [v for i, v in enumerate(op.inputs) if v is not None and i not in op.mapped]
        if op.eqn.primitive.name == "select_n" and len(read) > 2:
            read = read[1:]  # whether all gradients are finite, say, makes no gradient of what is chosen
        is_backward, is_late = self.marks.is_backward(op), any(v in self.late for v in read)
        if is_backward:
            self.backward_reads.update(read)
        elif not self.is_inside(op):
            self._update(op, read, is_late)
        if op.eqn.primitive.name in _SAME and len(op.outputs) == 1 and read:
            own = [self.of(v) for v in read]
            self._forms_of[op.outputs[0]] = frozenset().union(*own) if all(own) else frozenset()
        if is_backward or is_late or self._holds_backward(op):
            self.late.update(op.outputs)
        for body in op.bodies:
            shift = _paired.first_operand(op.eqn)
            for v, outer in zip(c.open_jaxpr(body.jaxpr).invars, op.inputs[shift:], strict=False):
                if outer in self.late:
                    self.late.add(body.env[v])

    def _pass_on(self, op: g.Op) -> None:
        """A barrier: each result is its own operand."""
        if self.marks.is_backward(op):
            self.backward_reads.update(v for v in op.inputs if v is not None)
        for v, out in zip(op.inputs, op.outputs, strict=True):
            if v is None:
                continue
            self._forms_of[out] = self.of(v)
            if v in self._origins:
                self._origins[out] = self._origins[v]
            for found in (self.late, self.mixed):
                if v in found:
                    found.add(out)

    def _update(self, op: g.Op, read: Sequence[int], is_late: bool) -> None:
        """Follow arguments through what is neither forward nor backward pass, to where they meet gradients."""
        origins = frozenset().union(*(self._origins.get(v) or self.of(v) for v in read))
        if not is_late:
            self._origins.update((v, origins) for v in op.outputs if origins)
            return
        if not op.bodies:
            self.trained.update(origins)
        if origins or any(v in self.mixed for v in read):
            self.mixed.update(op.outputs)

    def _holds_backward(self, op: g.Op) -> bool:
        """Say whether a body of an operation, such as a loop over microbatches, has a backward pass in it."""
        inner = (one for body in op.bodies for one in body.ops)
        return any(self.marks.is_backward(one) or self._holds_backward(one) for one in inner)

    def is_inside(self, op: g.Op | None) -> bool:
        """Say whether an operation stands in what is differentiated, by itself or by what it is in."""
        while op is not None:
            if "jvp" in c.transforms(op.eqn):
                return True
            op = self.graph.regions[op.region].op
        return False

    def of(self, value: int) -> frozenset[int]:
        """Return the inputs of the step of which a value is another form: cast, reshaped, scaled, a layer's part."""
        if value not in self._forms_of:
            item, found = self.graph.values[value], frozenset()
            if item.kind in (g.CONST_IN, g.XS_IN) and item.operand is not None:
                outer = self.graph.regions[item.region].op.inputs[item.operand]
                found = frozenset() if outer is None else self.of(outer)
            self._forms_of[value] = found
        return self._forms_of[value]

    def unread(self) -> Iterator[tuple[int, int]]:
        """Yield values that the backward pass does not read, with the frozen input that each is multiplied with."""
        frozen = self._frozen()
        for op in self.graph.ops:
            if not _is_contraction(op) or self.marks.is_backward(op) or not self.is_inside(op):
                continue
            for value, weight in (op.inputs, op.inputs[::-1]):
                if value is None or weight is None or self.of(value) or value in self.backward_reads:
                    continue
                if self.graph.values[value].kind in (g.MADE, g.CARRY_IN) and self._largest(weight) in frozen:
                    yield value, self._largest(weight)

    def _largest(self, weight: int) -> int | None:
        """Return the largest of the inputs that a weight is made of: its numbers, not their scales."""
        return max(sorted(self.of(weight)), key=lambda i: np.prod(self.invars[i].aval.shape), default=None)

    def _frozen(self) -> set[int]:
        """Return the inputs that the backward pass ends before."""
        outs = {v for v in self.graph.top.outs if v in self.late and v not in self.mixed}
        raw = {_type(self.graph.values[v].aval) for v in outs}
        return {i for i, v in enumerate(self.invars) if i not in self.trained and _type(v.aval) not in raw}

    def is_zeroed(self, op: g.Op) -> bool:
        """Say whether an operation of the update multiplies a gradient by zero."""
        if op.eqn.primitive.name != "mul" or self.is_inside(op) or not any(v in self.late for v in op.inputs):
            return False
        return any(isinstance(v, c.Literal) and not np.any(v.val) for v in op.eqn.invars)


def _is_contraction(op: g.Op) -> bool:
    """Say whether an operation may be one with a weight: without dimensions that both operands have alike."""
    name = op.eqn.primitive.name
    return name == "conv_general_dilated" or (name == "dot_general" and not op.eqn.params["dimension_numbers"][1][0])


def _type(aval: Any) -> tuple[Any, ...]:
    return tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None)
