"""The timeline's own view of one computation: a flat list of operations over numbered values.

In comes a jaxpr (the step itself or a loop's body); out goes a `Graph` in which calls that XLA inlines are dissolved,
values that are one buffer by another name are one number, dead operations are marked, and every value knows its bytes,
its maker and its readers. Nothing here decides what is fused or when a buffer dies; nothing may change the jaxpr.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from memopt import _compat as c
from memopt import _convolved, _cost
from memopt._sizes import is_on_host

_FLOAT32 = np.dtype(np.float32)
_Literal = core.Literal  # looked up once: it is asked of every operand of every plan

#: Calls whose equations run among the caller's own.
INLINED = c.INLINED_CALLS | {"shard_map"}
#: Operations whose kernels choose the layout of what they read and make.
_LAID_OUT = frozenset({"dot_general", "conv_general_dilated"})
#: Operations whose result is their operand's buffer: no bytes move.
ALIASES = frozenset(
    "reshape squeeze expand_dims name optimization_barrier stop_gradient sharding_constraint pvary pcast mesh_cast "
    "reshard copy_p random_wrap random_unwrap layout_constraint".split()
)


@dataclasses.dataclass(slots=True, eq=False)
class Fact:
    """What is known of an equation by itself, whatever it reads; `call` is the body that is dissolved, or None."""

    eqn: Any
    primitive: Any
    aval: Any  # of its first result
    name: str
    call: Any
    renames: bool
    bodies: tuple[Any, ...]
    results: tuple[tuple[Any, int, bool], ...]  # aval, bytes, whether it is float32


@dataclasses.dataclass(slots=True)
class Op:
    """One operation: its equation, the equation of the jaxpr that holds it, and the values it reads and makes."""

    name: str
    eqn: Any
    top: int
    path: str
    ins: list[int]
    outs: list[int]
    bodies: tuple[Any, ...] = ()
    live: bool = False


class Graph:
    """Operations over numbered values; see `flatten`. A value's maker is -1 for inputs and -2 for constants."""

    def __init__(self, platform: str, facts: dict[int, Fact]):
        self.platform, self.facts = platform, facts
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.bytes: list[int] = []
        self.maker: list[int] = []
        self.uses: list[list[int]] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.forced: set[int] = set()
        self.pinned: dict[int, int] = {}  # values that are made before this operation, as a barrier there asks
        self.number: dict[Any, int] = {}
        self.padding: dict[int, float] = {}  # bytes in memory over bytes, where a kernel asks for a layout
        self.wide: list[int] = []  # float32 values that operations make

    def new(self, aval: Any, maker: int) -> int:
        """Add a value and return its number."""
        self.avals.append(aval)
        self.bytes.append(buffer_bytes(aval, self.platform))
        self.maker.append(maker)
        return len(self.avals) - 1


def buffer_bytes(aval: Any, platform: str) -> int:
    """Return the bytes that a buffer of `aval` takes on `platform`, tile-padded on TPU for the best layout."""
    return _cost.padded_bytes(aval, platform)


def elements(aval: Any) -> int:
    """Return the number of elements, 0 for what is no array."""
    shape = getattr(aval, "shape", None)
    return 0 if shape is None else math.prod(shape)


def bodies(eqn: Any) -> list[Any]:
    """Return the jaxprs held in an equation's parameters, closed ones opened."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def flatten(jaxpr: Any, platform: str, facts: dict[int, Fact] | None = None) -> Graph:
    """Build the graph of `jaxpr`, dissolving the calls that XLA inlines and marking what is live.

    Args:
      jaxpr: an open jaxpr.
      platform: `"tpu"`, `"cpu"` or `"gpu"`.
      facts: what is known of single equations on this platform; kept by a caller who has many jaxprs that share them.
    """
    graph = Graph(platform, {} if facts is None else facts)
    env: dict[Any, int] = {}
    for var in [*jaxpr.constvars, *jaxpr.invars]:
        env[var] = graph.new(var.aval, -1)
        graph.inputs.append(env[var])
    _add(graph, jaxpr.eqns, env, "")
    graph.outputs = [_read(env, v) for v in jaxpr.outvars]
    graph.number = env
    _mark_live(graph)
    return graph


def _mark_live(graph: Graph) -> None:
    """Find what XLA's dead-code elimination leaves, and note each value's readers among it."""
    wanted = set(graph.outputs)
    for op in reversed(graph.ops):
        outs = op.outs
        if (outs[0] in wanted if len(outs) == 1 else not wanted.isdisjoint(outs)) or op.eqn.effects:
            op.live = True
            wanted.update(op.ins)
    graph.uses = uses = [[] for _ in graph.avals]
    for index, op in enumerate(graph.ops):
        if op.live:
            ins = op.ins
            for value in ins if len(ins) == 1 else set(ins):
                if value >= 0:
                    uses[value].append(index)


def _read(env: dict[Any, int], atom: Any) -> int:
    return -1 if isinstance(atom, core.Literal) else env[atom]


def _fact(graph: Graph, eqn: Any) -> Fact:
    """Look at an equation, once for all that have its parameters and differ in their variables alone."""
    name, inside = eqn.primitive.name, tuple(bodies(eqn))
    call = inside[0] if name in INLINED and inside and len(inside[0].outvars) == len(eqn.outvars) else None
    avals = [v.aval for v in eqn.outvars]
    results = tuple((a, buffer_bytes(a, graph.platform), getattr(a, "dtype", "") == _FLOAT32) for a in avals)
    renames = name in ALIASES or _only_renames(eqn)
    new = Fact(eqn, eqn.primitive, avals[0] if avals else None, name, call, renames, inside, results)
    if len(results) == 1 and not inside:
        graph.facts[id(eqn.params)] = new  # it keeps the parameters, so their id stays their own
    return new


def _add(graph: Graph, eqns: Sequence[Any], env: dict[Any, int], path: str, top: int | None = None) -> None:
    """Add equations in order; those of a dissolved call have its equation, `top`, and its path."""
    facts, ops, avals, sizes, maker = graph.facts, graph.ops, graph.avals, graph.bytes, graph.maker
    tpu, padding, padded = graph.platform == "tpu", graph.padding, graph.padding.keys()
    for index, eqn in enumerate(eqns):
        place, results = index if top is None else top, eqn.outvars
        fact = facts.get(id(eqn.params))
        if fact is None or fact.primitive is not eqn.primitive or fact.aval is not results[0].aval:
            fact = _fact(graph, eqn)
        ins = [-1 if type(a) is _Literal else env[a] for a in eqn.invars]
        if fact.call is not None:
            _inline(graph, eqn, fact.call, env, ins, place, path)
            continue
        if fact.renames and _alias(graph, eqn, fact, env, ins):
            continue
        number, outs = len(ops), []
        for var, (aval, size, wide) in zip(results, fact.results, strict=True):
            env[var] = value = len(avals)
            outs.append(value)
            avals.append(aval)
            sizes.append(size)
            maker.append(number)
            if wide:
                graph.wide.append(value)
        ops.append(Op(fact.name, eqn, place, path, ins, outs, fact.bodies))
        if tpu and (fact.name in _LAID_OUT or (padding and not padded.isdisjoint(ins))):
            _lay_out(graph, ops[number])


def _lay_out(graph: Graph, op: Op) -> None:
    """Pad what a batched matmul reads or makes as its kernel needs it: the two tiled dimensions are no batch ones.

    Images keep the layout of the convolutions that make or read them, element-wise results that of an operand of the
    same shape.
    """
    if op.name == "conv_general_dilated":
        for operand, size in _convolved.laid_out(op.eqn):
            value = op.outs[0] if operand is None else op.ins[operand]
            if value >= 0 and graph.maker[value] >= 0:
                graph.bytes[value] = max(graph.bytes[value], size)
                graph.padding[value] = graph.bytes[value] / max(1, _cost.aval_bytes(graph.avals[value]))
        return
    if op.name == "dot_general":
        (_, batches), out = op.eqn.params["dimension_numbers"], op.eqn.outvars[0].aval
        sides = [(value, atom.aval, dims) for value, atom, dims in zip(op.ins, op.eqn.invars, batches, strict=True)]
        for value, aval, dims in [*sides, (op.outs[0], out, range(len(batches[0])))]:
            if dims and value >= 0 and graph.maker[value] >= 0 and aval.ndim - len(dims) >= 2:
                inner = tuple(d for i, d in enumerate(aval.shape) if i not in dims)
                rest = math.prod(aval.shape[i] for i in dims)
                size = rest * buffer_bytes(aval.update(shape=inner), "tpu")
                graph.bytes[value] = max(graph.bytes[value], size)
                graph.padding[value] = graph.bytes[value] / max(1, _cost.aval_bytes(aval))
        return
    for value in op.ins:
        if value in graph.padding:
            for out in op.outs:
                aval = graph.avals[out]
                if getattr(aval, "shape", None) == getattr(graph.avals[value], "shape", ()) and not is_on_host(aval):
                    graph.padding[out] = graph.padding[value]
                    graph.bytes[out] = max(graph.bytes[out], int(_cost.aval_bytes(aval) * graph.padding[value]))


def _only_renames(eqn: Any) -> bool:
    if eqn.primitive.name == "broadcast_in_dim":
        operand = eqn.invars[0].aval
        return elements(operand) == elements(eqn.outvars[0].aval) and operand.ndim > 0
    if eqn.primitive.name == "convert_element_type":
        return eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype
    return False


def _alias(graph: Graph, eqn: Any, fact: Fact, env: dict[Any, int], ins: list[int]) -> bool:
    if len(ins) < len(fact.results) or any(v < 0 for v in ins[: len(fact.results)]):
        return False
    for value, var, (_, size, _) in zip(ins, eqn.outvars, fact.results, strict=False):
        env[var] = value
        if fact.name == "optimization_barrier":
            graph.forced.add(value)
            graph.pinned.setdefault(value, len(graph.ops))
        elif fact.name != "random_wrap" and fact.name != "random_unwrap":
            graph.bytes[value] = _view_bytes(graph, value, size)
    return True


def _view_bytes(graph: Graph, value: int, size: int) -> int:
    """Return the bytes of a buffer that is also read under another shape: the larger, unless a copy is much smaller."""
    old = graph.bytes[value]
    return min(old, size) if graph.maker[value] < 0 or max(old, size) > 1.5 * min(old, size) else max(old, size)


def _behind_barrier(eqn: Any, ins: list[int]) -> list[int]:
    """Return the operands that a `jax.checkpoint` reads behind a barrier, which JAX adds when it lowers it."""
    if not eqn.params.get("differentiated"):
        return []
    prevented = eqn.params.get("prevent_cse", False)
    flags = prevented if isinstance(prevented, tuple) else (prevented,) * len(ins)
    return [v for v, flag in zip(ins, flags, strict=True) if flag and v >= 0]


def _inline(graph: Graph, eqn: Any, body: Any, env: dict, ins: list[int], top: int, path: str) -> None:
    inner: dict[Any, int] = {}
    formal = [*body.constvars, *body.invars]
    for var, value in zip(formal[len(formal) - len(ins) :], ins, strict=True):
        inner[var] = value if value >= 0 else graph.new(var.aval, -2)
        if value >= 0 and value not in graph.padding:
            graph.bytes[value] = min(graph.bytes[value], buffer_bytes(var.aval, graph.platform))
    for var in formal[: len(formal) - len(ins)]:
        inner[var] = graph.new(var.aval, -2)
    graph.forced.update(_behind_barrier(eqn, ins))
    stack = "/".join(p for p in (path, str(eqn.source_info.name_stack)) if p)
    _add(graph, body.eqns, inner, stack, top)
    for var, atom in zip(eqn.outvars, body.outvars, strict=True):
        value = _read(inner, atom)
        env[var] = value if value >= 0 else graph.new(var.aval, -2)
