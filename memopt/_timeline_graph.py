"""The timeline's own view of one computation: a flat list of operations over numbered values.

In comes a jaxpr (the step itself or a loop's body); out goes a `Graph` in which calls that XLA inlines are dissolved,
values that are one buffer by another name are one number, and every value knows its bytes, its maker and its readers.
Nothing here decides what is fused or when a buffer dies; nothing here may change the jaxpr.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.extend import core

#: Calls that XLA inlines: their equations run among the caller's own.
INLINED = frozenset(
    "jit pjit closed_call core_call call remat2 checkpoint remat custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr shard_map custom_lin run_state".split()
)
#: Operations whose result is their operand's buffer: no bytes move.
ALIASES = frozenset(
    "squeeze expand_dims name optimization_barrier stop_gradient sharding_constraint pvary pcast mesh_cast "
    "reshard copy_p checkpoint_name random_wrap random_unwrap bitcast_convert_type layout_constraint".split()
)
_SUBLANES = {1: 32, 2: 16, 4: 8, 8: 8}


@dataclasses.dataclass(slots=True)
class Op:
    """One operation: its equation, the equation of the jaxpr that holds it, and the values it reads and makes."""

    name: str
    eqn: Any
    top: int
    path: str
    ins: list[int]
    outs: list[int]
    fenced: bool = False


class Graph:
    """Operations over numbered values; see `flatten`."""

    def __init__(self, platform: str):
        self.platform = platform
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.bytes: list[int] = []
        self.maker: list[int] = []
        self.uses: list[list[int]] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.forced: set[int] = set()
        self.number: dict[Any, int] = {}

    def new(self, aval: Any, maker: int) -> int:
        self.avals.append(aval)
        self.bytes.append(buffer_bytes(aval, self.platform))
        self.maker.append(maker)
        self.uses.append([])
        return len(self.avals) - 1


def logical_bytes(aval: Any) -> int:
    """Return the bytes of an array without any padding (tokens 0, PRNG keys by their base array)."""
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return math.prod(shape) * _item_bytes(dtype)


def buffer_bytes(aval: Any, platform: str) -> int:
    """Return the bytes that a buffer of `aval` takes on `platform`, tile-padded on TPU for the best layout."""
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    return 0 if shape is None or dtype is None else _buffer_bytes(tuple(shape), dtype, platform)


@functools.lru_cache(maxsize=65536)
def _buffer_bytes(shape: tuple[int, ...], dtype: Any, platform: str) -> int:
    size = math.prod(shape) * _item_bytes(dtype)
    if platform != "tpu" or size == 0:
        return size if size == 0 else -(-size // 64) * 64
    item = max(1, _item_bytes(dtype))
    return max(512, math.prod(_tiled(shape, item)) * item)


def _tiled(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    dims = [d for d in shape if d != 1]
    if len(dims) < 2:
        return (-(-math.prod(dims) // 128) * 128,)
    total, best = math.prod(dims), None
    rows = _SUBLANES.get(item, 8)
    for i, minor in enumerate(dims):
        for k, second in enumerate(dims):
            if i != k:
                size = total // (minor * second) * (-(-minor // 128) * 128) * (-(-second // rows) * rows)
                best = size if best is None else min(best, size)
    return (best,)


def _item_bytes(dtype: Any) -> int:
    if hasattr(dtype, "_impl"):
        return 4 * math.prod(dtype._impl.key_shape)
    return max(1, jnp.dtype(dtype).itemsize)


def bodies(eqn: Any) -> list[Any]:
    """Return the jaxprs held in an equation's parameters, closed ones opened."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def flatten(jaxpr: Any, platform: str) -> Graph:
    """Build the graph of `jaxpr`, dissolving the calls that XLA inlines."""
    graph = Graph(platform)
    env: dict[Any, int] = {}
    for var in [*jaxpr.constvars, *jaxpr.invars]:
        env[var] = graph.new(var.aval, -1)
        graph.inputs.append(env[var])
    for index, eqn in enumerate(jaxpr.eqns):
        _add(graph, eqn, env, index, "")
    graph.outputs = [_read(graph, env, v) for v in jaxpr.outvars]
    graph.number = env
    for index, op in enumerate(graph.ops):
        for value in set(op.ins):
            if value >= 0:
                graph.uses[value].append(index)
    return graph


def _read(graph: Graph, env: dict[Any, int], atom: Any) -> int:
    return -1 if isinstance(atom, core.Literal) else env[atom]


def _add(graph: Graph, eqn: Any, env: dict[Any, int], top: int, path: str) -> None:
    name = eqn.primitive.name
    ins = [_read(graph, env, a) for a in eqn.invars]
    if name in INLINED:
        inner = bodies(eqn)
        if len(inner) >= 1 and len(inner[0].outvars) == len(eqn.outvars):
            _inline(graph, eqn, inner[0], env, ins, top, path)
            return
    if name == "reshape" or name in ALIASES or _same_size(eqn):
        if _alias(graph, eqn, env, ins, name):
            return
    op = Op(name, eqn, top, path, ins, [])
    graph.ops.append(op)
    for var in eqn.outvars:
        env[var] = graph.new(var.aval, len(graph.ops) - 1)
        op.outs.append(env[var])


def _same_size(eqn: Any) -> bool:
    if eqn.primitive.name == "broadcast_in_dim":
        operand = eqn.invars[0].aval
        return math.prod(operand.shape) == math.prod(eqn.outvars[0].aval.shape) and operand.ndim > 0
    return False


def _alias(graph: Graph, eqn: Any, env: dict[Any, int], ins: list[int], name: str) -> bool:
    if len(ins) < len(eqn.outvars) or any(v < 0 for v in ins[: len(eqn.outvars)]):
        return False
    for value, var in zip(ins, eqn.outvars, strict=False):
        env[var] = value
        if name == "optimization_barrier":
            graph.forced.add(value)
        else:
            graph.bytes[value] = min(graph.bytes[value], buffer_bytes(var.aval, graph.platform))
    return True


def _inline(graph: Graph, eqn: Any, body: Any, env: dict, ins: list[int], top: int, path: str) -> None:
    inner: dict[Any, int] = {}
    formal = [*body.constvars, *body.invars]
    for var, value in zip(formal[len(formal) - len(ins) :], ins, strict=True):
        inner[var] = value if value >= 0 else graph.new(var.aval, -2)
        if value >= 0:
            graph.bytes[value] = min(graph.bytes[value], buffer_bytes(var.aval, graph.platform))
    for var in formal[: len(formal) - len(ins)]:
        inner[var] = graph.new(var.aval, -2)
    stack = "/".join(p for p in (path, str(eqn.source_info.name_stack)) if p)
    for sub in body.eqns:
        _add(graph, sub, inner, top, stack)
    for var, atom in zip(eqn.outvars, body.outvars, strict=True):
        value = _read(graph, inner, atom)
        env[var] = value if value >= 0 else graph.new(var.aval, -2)
