"""The memory timeline: what XLA's compiled program will hold at each equation, predicted from the jaxpr alone.

In comes a closed jaxpr, which arguments are donated and a target; out goes a `Timeline` with the compiler's own terms
(argument, output, alias, temp, peak bytes), the bytes live at every equation and the values alive at the peak. It may
not compile anything, change the jaxpr or know of passes. Which values exist is decided by `memopt._fusion`, how long
they live and where loops put them by `memopt._timeline_run`, how they are packed by `memopt._timeline_heap`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from memopt import _compat_timeline
from memopt import _timeline_graph as tg
from memopt import _timeline_heap as heap
from memopt._fusion import rules_for
from memopt._timeline_run import Run

MIB = 1 << 20
#: The part of the vector memory in which XLA:TPU keeps short-lived values, and on which devices; the rest holds
#: prefetched operands.
FAST_MEMORY_BYTES, FAST_KINDS = 72 * MIB, frozenset({"v5e", "v5p", "v6e"})

#: XLA:TPU starts every buffer, however small, on a multiple of this.
SMALL_BUFFER_BYTES = 16 * 1024
SMALL_BUFFERS = 10_000

__all__ = ["Live", "Timeline", "simulate"]


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
    """A predicted memory timeline.

    `usage` holds the bytes of temporaries alive while each equation of the jaxpr runs, bodies included. `temp_bytes` is
    what the compiler reports for them, which on TPU is more than the largest `usage`: it counts the holes of its heap.
    `packed_peak_bytes` is the peak with a heap that has no holes, the least that any layout can come to.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int
    packed_peak_bytes: int
    usage: np.ndarray
    inner: dict[int, Any]
    peak_index: int
    _run: Any = None
    body: Any = None  # for an inner timeline, the open jaxpr whose equations `usage` counts

    def alive(self, index: int | None = None) -> list[Live]:
        """Return what is alive at equation `index` (the peak by default), largest first, bodies at their own peak."""
        index = self.peak_index if index is None else index
        return sorted(_alive(self, index), key=lambda item: -item.bytes)

    def release(self) -> None:
        """Let go of the buffers, after which `alive` finds none; they refer to each other and would outlive this."""
        self._run.buffers.clear()

    def within(self, index: int) -> Iterator[tuple[Any, int, list[Timeline]]]:
        """Yield the equations inside the call that equation `index` makes, such as a `shard_map`.

        Each comes with the bytes of temporaries alive while it runs, and with the timelines of its own bodies.
        """
        run = self._run
        for i, op in enumerate(run.graph.ops):
            if op.top == index and i in run.span:
                low, high = run.span[i]
                yield op.eqn, int(max(run.live[low : high + 1])), [_inner_timeline(b) for b in run.bodies.get(i, ())]


def simulate(
    closed_jaxpr: Any, *, donated: Sequence[bool] = (), target: Any, cache: dict | None = None, local: Any = None
) -> Timeline:
    """Predict the memory timeline of the compiled program of `closed_jaxpr`.

    Args:
      closed_jaxpr: the step.
      donated: a flag for each argument; missing ones are not donated.
      target: a `Target` or a platform name.
      cache: an optional dict, kept by the caller, that shares the results of bodies between calls.
      local: how the arguments of a sharded step are split over devices; all figures are then one device's.

    Returns:
      The timeline.
    """
    closed_jaxpr = closed_jaxpr if local is None else local.twin(closed_jaxpr)
    platform = getattr(target, "platform", None) or str(target).split(":")[0]
    jaxpr = getattr(closed_jaxpr, "jaxpr", closed_jaxpr)
    flags = list(donated) + [False] * (len(jaxpr.invars) - len(donated))
    kind = _kind(target)
    cache = {} if cache is None else cache
    run = Run(jaxpr, platform, cache, rules_for(platform, kind))
    argument_bytes, output_bytes, alias_bytes, aliased = _interface(jaxpr, flags, platform, cache)
    run.lay_out(aliased)
    fast_bytes = FAST_MEMORY_BYTES if platform == "tpu" and kind in FAST_KINDS else 0
    temp_bytes, packed_bytes = _reported_bytes(run, platform, fast_bytes)
    inner = {i: _inner_timeline(r) for i, r in run.inner.items()}
    fixed_bytes = argument_bytes + output_bytes - alias_bytes
    return Timeline(
        argument_bytes=argument_bytes,
        output_bytes=output_bytes,
        alias_bytes=alias_bytes,
        temp_bytes=temp_bytes,
        peak_bytes=fixed_bytes + temp_bytes,
        packed_peak_bytes=fixed_bytes + packed_bytes,
        usage=run.usage,
        inner=inner,
        peak_index=int(run.usage.argmax()) if run.usage.size else 0,
        _run=run,
    )


def _kind(target: Any) -> str:
    return getattr(target, "kind", None) or (str(target).split(":") + [""])[1]


def _reported_bytes(run: Run, platform: str, fast_bytes: int) -> tuple[int, int]:
    """Return the bytes of temporaries as the compiler reports them, and what it would report if there were no holes.

    XLA:TPU lays buffers out in the order in which they are made and reports the size of that heap plus what it takes
    for fragmentation: the heap less the most bytes alive, counted with only the first of the values that share a buffer
    (so a loop's carries and stacks count until the loop starts). Found by comparing reported figures with dumped
    assignments, equal within 0.1 % over scanned and unrolled steps.
    """
    buffers = heap.without_fast_memory(run.buffers, run.length, fast_bytes)
    packed = max(heap.live_bytes(buffers, run.length), default=0)
    if platform != "tpu":
        return heap.heap_bytes(buffers), packed
    first = max(heap.live_bytes(buffers, run.length, first=True), default=0)
    size = heap.expected_heap_bytes(buffers, run.length)
    size += SMALL_BUFFER_BYTES * min(len(buffers), SMALL_BUFFERS)
    return size + max(0, size - first), packed + max(0, packed - first)


def _inner_timeline(run: Run) -> Timeline:
    run.lay_out(())
    temp = int(run.usage.max(initial=0))
    inner = {i: _inner_timeline(r) for i, r in run.inner.items()}
    peak = int(run.usage.argmax()) if run.usage.size else 0
    return Timeline(0, 0, 0, temp, temp, temp, run.usage, inner, peak, run, run.jaxpr)


def _interface(jaxpr: Any, flags: Sequence[bool], platform: str, cache: dict) -> tuple[int, int, int, tuple]:
    """Return the bytes of arguments, of outputs and of outputs in a donated buffer, and which outputs those are."""
    avals = [v.aval for v in jaxpr.invars], [v.aval for v in jaxpr.outvars]
    key = ("interface", platform, tuple(flags), *(tuple(map(id, side)) for side in avals))
    if key not in cache:
        sizes = (sum(tg.buffer_bytes(aval, platform) for aval in side) for side in avals)
        cache[key] = (*sizes, *_aliases(jaxpr, flags, platform)), avals  # which keeps the ids their own
    return cache[key][0]


def _aliases(jaxpr: Any, flags: Sequence[bool], platform: str) -> tuple[int, tuple[bool, ...]]:
    """Match donated arguments to outputs of the same shape and dtype, as JAX does: the bytes, and which outputs."""
    free: dict[tuple, int] = {}
    for var, flag in zip(jaxpr.invars, flags, strict=False):
        if flag:
            key = (tuple(var.aval.shape), str(var.aval.dtype))
            free[key] = free.get(key, 0) + 1
    total, found = 0, []
    for var in jaxpr.outvars:
        key = (tuple(getattr(var.aval, "shape", ())), str(getattr(var.aval, "dtype", "")))
        found.append(bool(free.get(key, 0)))
        if found[-1]:
            free[key] -= 1
            total += tg.buffer_bytes(var.aval, platform)
    return total, tuple(found)


def _alive(timeline: Timeline, index: int) -> list[Live]:
    run, graph = timeline._run, timeline._run.graph
    found = [_argument(run, v) for v in graph.inputs]
    time = run.peak_time(index)
    if time is None:
        return found
    for buffer in run.buffers:
        if buffer.start <= time <= buffer.end and buffer.value[0] is run:
            found.append(_describe(run, buffer))
    if index in timeline.inner:
        body = timeline.inner[index]
        found += [item for item in body.alive(body.peak_index) if item.kind not in ("argument", "output")]
    return found


def _argument(run: Run, value: int) -> Live:
    graph = run.graph
    last = run.top_of(graph.uses[value][-1]) if graph.uses[value] else -1
    return Live(graph.avals[value], graph.bytes[value], "argument", "", "", -1, last, run.var_of(value))


def _describe(run: Run, buffer: heap.Buffer) -> Live:
    graph, value = run.graph, buffer.value[1]
    aval, var, last = graph.avals[value], run.var_of(value), run.top_of(run.fusion.last[value])
    if graph.maker[value] < 0:
        return Live(aval, buffer.bytes, "transient", "", "", -1, last, var)
    op = graph.ops[graph.maker[value]]
    kind = "output" if value in graph.outputs else "residual" if value in run.across_loops else "transient"
    name = "/".join(p for p in (op.path, str(op.eqn.source_info.name_stack), op.name) if p)
    source = _compat_timeline.user_source(op.eqn.source_info)
    return Live(aval, buffer.bytes, kind, name, source, op.top, last, var)
