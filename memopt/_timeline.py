"""The memory timeline: what XLA's compiled program will hold at each equation, predicted from the jaxpr alone.

In comes a closed jaxpr, which arguments are donated and a target; out goes a `Timeline` with the compiler's own terms
(argument, output, alias, temp, peak bytes), the bytes live at every equation and the values alive at the peak. It may
not compile anything, change the jaxpr or know of passes; which values exist at all is decided by `memopt._fusion`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from memopt import _compat_timeline, _fusion
from memopt import _timeline_graph as tg

LOOPS = frozenset({"scan", "while"})
#: Operations whose result may take the buffer of an operand that dies there.
IN_PLACE = _fusion.ELEMENTWISE | frozenset(
    "dynamic_update_slice scatter scatter-add scatter_add scatter-mul scatter-min scatter-max sort while scan".split()
)


@dataclasses.dataclass(frozen=True)
class Live:
    """One value that is alive at some time, with where it comes from."""

    aval: Any
    bytes: int
    kind: str
    name: str
    source: str
    made_at: int
    last_used_at: int
    var: Any = None


@dataclasses.dataclass
class Timeline:
    """A predicted memory timeline; `usage` is in bytes of temporaries per equation of the jaxpr."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int
    usage: np.ndarray
    inner: dict[int, Any]
    peak_index: int
    _live: Any = None
    body: Any = None  # for an inner timeline, the open jaxpr whose equations `usage` counts

    def alive(self, index: int | None = None) -> list[Live]:
        """Return what is alive at equation `index` (the peak by default), largest first, bodies at their own peak."""
        found = self._live(self.peak_index if index is None else index)
        return sorted(found, key=lambda item: -item.bytes)


def simulate(
    closed_jaxpr: Any, *, donated: Sequence[bool] = (), target: Any, cache: dict | None = None, local: Any = None
) -> Timeline:
    """Predict the memory timeline of the compiled program of `closed_jaxpr`.

    Args:
      closed_jaxpr: the step.
      donated: a flag for each argument; missing ones are not donated.
      target: a `Target` or a platform name.
      cache: an optional dict, kept by the caller, that shares the results of bodies between calls.
      local: of a sharded step, what one device holds (`memopt._local.Local`); all bytes are then per device.

    Returns:
      The timeline.
    """
    closed_jaxpr = closed_jaxpr if local is None else local.twin(closed_jaxpr)
    platform = getattr(target, "platform", None) or str(target).split(":")[0]
    jaxpr = getattr(closed_jaxpr, "jaxpr", closed_jaxpr)
    run = _Run(jaxpr, platform, {} if cache is None else cache)
    flags = list(donated) + [False] * (len(jaxpr.invars) - len(donated))
    argument_bytes = sum(tg.buffer_bytes(v.aval, platform) for v in jaxpr.invars)
    output_bytes = sum(tg.buffer_bytes(v.aval, platform) for v in jaxpr.outvars)
    alias_bytes = _alias_bytes(jaxpr, flags, platform)
    usage, temp = run.usage, int(run.usage.max(initial=0))
    return Timeline(
        argument_bytes=argument_bytes,
        output_bytes=output_bytes,
        alias_bytes=alias_bytes,
        temp_bytes=temp,
        peak_bytes=argument_bytes + output_bytes - alias_bytes + temp,
        usage=usage,
        inner={i: _inner_timeline(r) for i, r in run.inner.items()},
        peak_index=int(usage.argmax()) if usage.size else 0,
        _live=run.alive,
    )


def _inner_timeline(run: _Run) -> Timeline:
    temp = int(run.usage.max(initial=0))
    inner = {i: _inner_timeline(r) for i, r in run.inner.items()}
    peak = int(run.usage.argmax()) if run.usage.size else 0
    return Timeline(0, 0, 0, temp, temp, run.usage, inner, peak, run.alive, run.jaxpr)


def _alias_bytes(jaxpr: Any, flags: Sequence[bool], platform: str) -> int:
    """Match donated arguments to outputs of the same shape and dtype, as JAX does."""
    free: dict[tuple, int] = {}
    for var, flag in zip(jaxpr.invars, flags, strict=False):
        if flag:
            key = (tuple(var.aval.shape), str(var.aval.dtype))
            free[key] = free.get(key, 0) + 1
    total = 0
    for var in jaxpr.outvars:
        aval = var.aval
        key = (tuple(getattr(aval, "shape", ())), str(getattr(aval, "dtype", "")))
        if free.get(key, 0):
            free[key] -= 1
            total += tg.buffer_bytes(aval, platform)
    return total


class _Run:
    """The liveness of one computation; bodies of its equations are runs of their own."""

    def __init__(self, jaxpr: Any, platform: str, cache: dict):
        self.jaxpr = jaxpr
        self.graph = graph = tg.flatten(jaxpr, platform)
        self.count = len(jaxpr.eqns)
        self.kept = _fusion.stored(graph)
        self.inner: dict[int, _Run] = {}
        self.peaks = [self._body_peak(op, platform, cache) for op in graph.ops]
        self.last = _last_uses(graph, self.kept)
        self.live = self._sweep()
        self.usage = np.zeros(self.count, np.int64)
        for op, size in zip(graph.ops, self.live, strict=True):
            self.usage[op.top] = max(self.usage[op.top], size)

    def _body_peak(self, op: tg.Op, platform: str, cache: dict) -> int:
        peak = 0
        for body in tg.bodies(op.eqn) if op.name not in ("pallas_call",) else ():
            key = (id(body), platform)
            if key not in cache:
                cache[key] = (_Run(body, platform, cache), body)
            run = cache[key][0]
            size = int(run.usage.max(initial=0))
            if size >= peak:
                peak, self.inner[op.top] = size, run
        return peak

    def _sweep(self) -> list[int]:
        graph, ends, live, now = self.graph, {}, [], 0
        skip = set(graph.inputs) | set(graph.outputs)
        for index, op in enumerate(graph.ops):
            made = sum(graph.bytes[v] for v in op.outs if v in self.kept and v not in skip)
            dying = ends.pop(index, 0)
            reuse = min(made, dying) if op.name in IN_PLACE else 0
            live.append(now + made - reuse + self.peaks[index])
            for value in op.outs:
                if value in self.kept and value not in skip and self.last.get(value, index) > index:
                    ends[self.last[value]] = ends.get(self.last[value], 0) + graph.bytes[value]
                elif value in self.kept and value not in skip:
                    dying += graph.bytes[value]
            now += made - dying
        return live

    def alive(self, index: int) -> list[Live]:
        """Return what is alive while equation `index` runs, its body's own values included."""
        graph, found = self.graph, []
        times = [i for i, op in enumerate(graph.ops) if op.top == index]
        if not times:
            return found
        now = max(times, key=lambda i: self.live[i])
        for value in self.kept:
            maker = graph.maker[value]
            if maker <= now <= self.last.get(value, -1) or (value in graph.inputs):
                found.append(self._describe(value, now))
        if index in self.inner:
            run = self.inner[index]
            peak = int(run.usage.argmax()) if run.usage.size else 0
            found += [item for item in run.alive(peak) if item.kind not in ("argument", "output")]
        return found

    def _describe(self, value: int, now: int) -> Live:
        graph = self.graph
        maker, last = graph.maker[value], self.last.get(value, -1)
        if maker < 0:
            return Live(graph.avals[value], graph.bytes[value], "argument", "", "", -1, last)
        op = graph.ops[maker]
        kind = "output" if value in graph.outputs else "residual" if last - maker > 20 else "transient"
        name = "/".join(p for p in (op.path, str(op.eqn.source_info.name_stack), op.name) if p)
        source = _compat_timeline.user_source(op.eqn.source_info)
        top = graph.ops[last].top if 0 <= last < len(graph.ops) else self.count
        return Live(graph.avals[value], graph.bytes[value], kind, name, source, op.top, top)


def _last_uses(graph: tg.Graph, kept: set[int]) -> dict[int, int]:
    """Return the operation at which each value is read last, fused readers counted where their result is made."""
    last: dict[int, int] = {}
    for value in graph.outputs:
        last[value] = len(graph.ops)
    for index in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[index]
        when = index
        if not any(v in kept for v in op.outs):
            when = max((last.get(v, index) for v in op.outs), default=index)
        for value in op.ins:
            if value >= 0:
                last[value] = max(last.get(value, -1), when)
    return last
