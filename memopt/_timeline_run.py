"""Lifetimes: the buffers of one computation and of the bodies inside it, on one line of time.

In comes a jaxpr and its fusion decisions; out go buffers with a start and an end, and the bytes alive per equation.
Here stand the facts about loops: carries that are updated in place or copied, stacked buffers that are whole from the
start of the loop, casts of whole stacks that leave the loop. It decides nothing about fusion and knows no addresses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from memopt import _compat
from memopt import _timeline_graph as tg
from memopt._fusion import ELEMENTWISE, FREE, MATMULS, UPDATES, Fusion, Rules
from memopt._timeline_heap import Buffer, live_bytes

LOOPS = frozenset({"scan", "while"})
_NARROWING = MATMULS | {"convert_element_type", "scan"}
_FLOAT32 = np.dtype(np.float32)
_HALF = (np.dtype(jnp.bfloat16), np.dtype(np.float16))


class Run:
    """The buffers of one computation; call `lay_out` before reading `buffers` and `usage`."""

    def __init__(self, jaxpr: Any, platform: str, cache: dict, rules: Rules, loop: Layout | None = None):
        self.jaxpr = jaxpr
        self.graph = graph = tg.flatten(jaxpr, platform, cache.setdefault(("facts", platform), {}))
        self.count, self.loop, self.rules = len(jaxpr.eqns), loop, rules
        self.bodies: dict[int, list[Run]] = {}
        self.inner: dict[int, Run] = {}
        self.across_loops: set[int] = set()
        self.buffers: list[Buffer] = []
        self.length = 0
        self._laid: Any = None
        self._vars: dict[int, Any] = {}
        for index, op in enumerate(graph.ops):
            if op.bodies and op.live and op.name != "pallas_call":
                self._enter(index, op, platform, cache)
        if rules.narrows_matmul_operands:
            self._narrow()
        if rules.widens_halves:
            self._widen()
        written = frozenset(graph.outputs[loop.carried :]) - {-1} if loop else frozenset()
        self.fusion = Fusion(graph, written, rules)
        for index, op in enumerate(graph.ops):
            if op.live and op.name in LOOPS:
                self._postpone(index)

    def _narrow(self) -> None:
        """Store what only default-precision matmuls read as bfloat16, as XLA:TPU does."""
        graph = self.graph
        outputs = set(graph.outputs)
        for value in graph.wide:
            readers = graph.uses[value]
            if readers and graph.ops[readers[0]].name in _NARROWING and value not in outputs and self.narrowed(value):
                graph.bytes[value] = tg.buffer_bytes(graph.avals[value].update(dtype=jnp.bfloat16), "tpu")

    def _widen(self) -> None:
        """Store what matmuls read and make in half precision as float32, as XLA:CPU does."""
        graph = self.graph
        touched = {v for op in graph.ops if op.live and op.name in MATMULS for v in (*op.ins, *op.outs) if v >= 0}
        for value in touched:
            if graph.maker[value] >= 0 and is_half(graph.avals[value]):
                graph.bytes[value] *= 2

    def _postpone(self, loop: int) -> None:
        """Run matmuls that the loop does not wait for after it, where that frees more, as XLA's list scheduler does."""
        graph, fusion = self.graph, self.fusion
        freed = sum(graph.bytes[v] for v in fusion.stored if fusion.until(v) == loop)
        after = next((i for i in range(loop + 1, len(graph.ops)) if graph.ops[i].live), len(graph.ops))
        for index in range(loop - 1, -1, -1):
            op = graph.ops[index]
            if op.live and op.name in LOOPS:
                return
            if not op.live or op.name not in MATMULS or op.outs[0] not in fusion.stored:
                continue
            if min(graph.uses[op.outs[0]], default=len(graph.ops)) < loop or op.outs[0] in fusion.outputs:
                continue
            if graph.pinned.get(op.outs[0], len(graph.ops)) <= loop:
                continue
            dying = {fusion.base[v] for v in op.ins if v >= 0} & fusion.stored
            dying = [v for v in dying if fusion.last[v] < loop and graph.maker[v] >= 0]
            gain = sum(graph.bytes[v] for v in dying) - graph.bytes[op.outs[0]]
            if dying and gain < freed:
                fusion.made[op.outs[0]] = after
                for value in dying:
                    fusion.last[value] = after

    def narrowed(self, value: int) -> bool:
        """Whether every reader of a float32 value turns it into bfloat16."""
        graph = self.graph
        if getattr(graph.avals[value], "dtype", "") != _FLOAT32 or not graph.uses[value]:
            return False
        return all(self._narrows(r, value) for r in graph.uses[value])

    def narrowed_by(self, index: int, value: int) -> bool:
        """Whether one reader turns a float32 value into bfloat16."""
        return getattr(self.graph.avals[value], "dtype", "") == _FLOAT32 and self._narrows(index, value)

    def _narrows(self, index: int, value: int) -> bool:
        op = self.graph.ops[index]
        if op.name in MATMULS:
            return op.eqn.params.get("precision") is None
        if op.name == "convert_element_type":
            return op.eqn.params["new_dtype"] == jnp.bfloat16
        if op.name != "scan":
            return False
        body = self.bodies[index][-1].graph
        inside = [body.inputs[place - len(op.ins)] for place, v in enumerate(op.ins) if v == value]
        return all(v not in body.outputs and self.bodies[index][-1].narrowed(v) for v in inside)

    def _enter(self, index: int, op: tg.Op, platform: str, cache: dict) -> None:
        layout = loop_layout(op)
        for body in op.bodies:
            loop = layout if layout and len(body.outvars) == len(op.outs) else None
            key = (id(body), platform, self.rules, loop)
            if key not in cache:
                cache[key] = (Run(body, platform, cache, self.rules, loop), body)
            run = cache[key][0]
            self.bodies.setdefault(index, []).append(run)
            if op.top not in self.inner or run.graph.ops and len(run.graph.ops) > len(self.inner[op.top].graph.ops):
                self.inner[op.top] = run

    # Reading.

    def var_of(self, value: int) -> Any:
        """Return a variable of the jaxpr that stands for `value`."""
        if not self._vars:
            self._vars = {v: var for var, v in reversed(list(self.graph.number.items()))}
        return self._vars.get(value)

    def top_of(self, index: int) -> int:
        """Return the equation of the jaxpr that holds operation `index`."""
        ops = self.graph.ops
        return ops[index].top if 0 <= index < len(ops) else self.count

    def peak_time(self, index: int) -> int | None:
        """Return the time at which most is alive while equation `index` runs."""
        spans = [self.span[i] for i, op in enumerate(self.graph.ops) if op.top == index and i in self.span]
        times = [t for low, high in spans for t in range(low, high + 1)]
        return max(times, key=lambda t: self.live[t], default=None)

    # Writing.

    def lay_out(self, aliased: Sequence[bool]) -> None:
        """Place every buffer on the line of time."""
        if self._laid == tuple(aliased):
            return
        self._laid = tuple(aliased)
        self.buffers, self.span = [], {}
        self.length = self.emit(self.buffers, 0, aliased)
        self.live = live_bytes(self.buffers, self.length)
        usage, live, ops = [0] * self.count, self.live, self.graph.ops
        for index, (low, high) in self.span.items():
            top, most = ops[index].top, live[low] if low == high else max(live[low : high + 1])
            if most > usage[top]:
                usage[top] = most
        self.usage = np.asarray(usage, np.int64)

    def emit(self, out: list[Buffer], start: int, aliased: Sequence[bool] = ()) -> int:
        """Add this computation's buffers from time `start` on; return the time at which it ends."""
        graph = self.graph
        span: dict[int, tuple[int, int]] = {}
        now = start
        for index, op in enumerate(graph.ops):
            if op.live:
                low = now = now + 1
                for body in self.bodies.get(index, ()):
                    now = body.emit(out, now) + 1
                span[index] = (low, now)
        if out is self.buffers:
            self.span = span
        writer = _Writer(self, out, span, now + 1)
        writer.place()
        return now + 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a loop's operands divide: constants first, then carries, then scanned inputs."""

    consts: int
    carried: int
    scanned: int


def loop_layout(op: tg.Op) -> Layout | None:
    """Return the layout of a loop's operands and results, None for what is no loop."""
    if op.name == "scan":
        consts, carried = _compat.scan_layout(op.eqn)
        return Layout(consts, carried, len(op.ins) - consts - carried)
    if op.name == "while":
        return Layout(len(op.ins) - len(op.outs), len(op.outs), 0)
    return None


def is_half(aval: Any) -> bool:
    """Whether a value is an array of 16-bit floats."""
    return getattr(aval, "dtype", "") in _HALF


class _Writer:
    """Places one computation's stored values as buffers."""

    def __init__(self, run: Run, out: list[Buffer], span: dict[int, tuple[int, int]], end: int):
        self.run, self.out, self.span, self.end = run, out, span, end
        self.graph, self.fusion = run.graph, run.fusion
        self.buffer: dict[int, Buffer] = {}

    def place(self) -> None:
        graph, fusion = self.graph, self.fusion
        loops: list[int] = []
        for index, op in enumerate(graph.ops):
            if not op.live:
                continue
            if op.name in LOOPS:
                loops.append(index)
                self._loop(index, op)
                continue
            for value in op.outs:
                if value in fusion.stored and value not in fusion.direct:
                    self._value(index, op, value)
            if fusion.rules.widens_halves and op.name == "dot_general":
                self._transposed(index, op)
        self._hoist_casts(loops)
        if fusion.rules.widens_halves:
            self._hoist_widening(loops)

    def _when(self, index: int, *, late: bool = False) -> int:
        if index >= len(self.graph.ops) or index < 0:
            return self.end if index >= 0 else min((low for low, _ in self.span.values()), default=self.end)
        while index not in self.span:  # nothing uses its results: what is made there is made by what comes next
            index += 1
            if index >= len(self.graph.ops):
                return self.end
        low, high = self.span[index]
        return high if late else low

    def _value(self, index: int, op: tg.Op, value: int) -> None:
        fusion = self.fusion
        made, last = fusion.made.get(value, index), fusion.until(value)
        if value in fusion.outputs and not self.run.loop:
            self._output(index, op, value)
            return
        if self.run.loop and value in fusion.outputs and self._written_in_place(made, op, value):
            return
        end = self._when(last, late=True)
        shared = self._dying_operand(index, op, value)
        if shared is not None:
            shared.end = max(shared.end, end)
            if shared.first_end > shared.start:
                shared.first_end = max(shared.first_end, shared.end)
            self.buffer[value] = shared
            return
        size = self.graph.bytes[value]
        start = self._when(made)
        self._add(Buffer(size, start, max(start, end), max(start, end), (self.run, value)), value)

    def _add(self, buffer: Buffer, value: int) -> None:
        self.out.append(buffer)
        self.buffer[value] = buffer

    def _output(self, index: int, op: tg.Op, value: int) -> None:
        """An output has its own allocation; it takes over the buffer of an equal temporary that dies in it."""

    def _dying_operand(self, index: int, op: tg.Op, value: int) -> Buffer | None:
        """Return the buffer of an operand of the same size that is read here for the last time, if XLA writes over it.

        The TPU backend does so in a matmul's kernel and in updates; an element-wise kernel of its own writes over the
        result of a matmul, but not over one of several that one kernel writes.
        """
        size, fusion = self.graph.bytes[value], self.fusion
        if op.name not in UPDATES and op.name not in ELEMENTWISE:
            return None
        operands: Iterable[int] = op.ins if op.name in ELEMENTWISE else op.ins[:1]
        if op.name not in UPDATES and fusion.rules.fuses_into_matmuls and index not in fusion.absorbed:
            operands = filter(self._is_written_alone, self._sources(operands))
        for operand in operands:
            base = fusion.base[operand] if operand >= 0 else FREE
            found = self.buffer.get(base)
            if found is not None and fusion.until(base) == index and found.bytes == size:
                return found
        return None

    def _sources(self, values: Iterable[int]) -> list[int]:
        """Return what is in memory of that which element-wise values are computed from."""
        fusion = self.fusion
        found = [fusion.base[source] for v in values if v >= 0 for source in fusion.mix.get(v, (v,))]
        return [source for source in found if source >= 0]

    def _is_written_alone(self, value: int) -> bool:
        """Whether a matmul made `value`, and no sum over it is computed in the matmul's kernel."""
        if not self._is_product(value):
            return False
        for reader in self.fusion.roots[value]:
            op = self.graph.ops[reader]
            if (
                op.name.startswith("reduce")
                and max(filter(self._is_product, self._sources(op.ins)), default=-1) == value
            ):
                return False
        return True

    def _is_product(self, value: int) -> bool:
        maker = self.graph.maker[value]
        return maker >= 0 and self.graph.ops[maker].name in MATMULS

    def _written_in_place(self, made: int, op: tg.Op, value: int) -> bool:
        """Whether a body's new carry is computed into the buffer of the old one, which is not read any more."""
        graph = self.graph
        loop = self.run.loop
        for place in [i for i, v in enumerate(graph.outputs[: loop.carried]) if v == value][:1]:
            old = graph.inputs[place - loop.scanned - loop.carried]
            last = max((self._root_time(r, old) for r in graph.uses[old]), default=-1)
            if last < made or (last == made and (op.name in ELEMENTWISE or op.name in UPDATES)):
                return True
        return False

    def _root_time(self, reader: int, value: int) -> int:
        op = self.graph.ops[reader]
        if op.name in ELEMENTWISE and not any(v in self.fusion.stored for v in op.outs):
            return max(self.fusion.last[v] for v in op.outs)
        return max([reader, *(self.fusion.made.get(v, -1) for v in op.outs)])

    # Loops.

    def _loop(self, index: int, op: tg.Op) -> None:
        low, high = self.span[index]
        body = self.run.bodies[index][-1]
        loop = loop_layout(op)
        for place, value in enumerate(op.outs):
            last = self.fusion.last[value]
            end = max(high, self._when(last, late=True)) if last >= 0 else high
            if value in self.fusion.outputs and not self.run.loop:
                continue
            init = None
            if place < loop.carried:
                source = op.ins[loop.consts + place]
                if body.graph.outputs[place] == body.graph.inputs[place - loop.scanned - loop.carried]:
                    continue
                base = self.fusion.base[source] if source >= 0 else FREE
                init = self.buffer.get(source)
                if init is not None and (self.fusion.last[source] != index or base == FREE):
                    init = None
            self._loop_buffer(value, init, low, end)

    def _loop_buffer(self, value: int, init: Buffer | None, low: int, end: int) -> None:
        self.run.across_loops.add(value)
        if init is not None:
            init.end, init.first_end = max(init.end, end), min(init.first_end, low)
            self.buffer[value] = init
            return
        self._add(Buffer(self.graph.bytes[value], low, end, low, (self.run, value)), value)

    def _hoist_casts(self, loops: list[int]) -> None:
        """XLA:TPU casts a whole stack before the loop where the body reads its slices as bfloat16 only."""
        if not self.fusion.rules.narrows_matmul_operands:
            return
        spans: dict[int, tuple[int, int]] = {}
        for index in loops:
            op = self.graph.ops[index]
            if op.name != "scan":
                continue
            for value in set(op.ins):
                if value >= 0 and self.graph.maker[value] < 0 and self.run.narrowed_by(index, value):
                    low, high = spans.get(value, self.span[index])
                    spans[value] = min(low, self.span[index][0]), max(high, self.span[index][1])
        for value, (low, high) in spans.items():
            self.out.append(Buffer(self.graph.bytes[value] // 2, low, high, high, (self.run, value)))

    def _hoist_widening(self, loops: list[int]) -> None:
        """XLA:CPU casts what a loop reads in half precision before it, one after another: what is read last dies."""
        for index in loops:
            op, layout = self.graph.ops[index], loop_layout(self.graph.ops[index])
            low, high = self.span[index]
            carries = op.ins[layout.consts : layout.consts + layout.carried]
            for value in set(op.ins) - set(carries) - {-1}:
                if not is_half(self.graph.avals[value]):
                    continue
                self.out.append(Buffer(2 * self.graph.bytes[value], low, high, high, (self.run, value)))
                held = self.buffer.get(value)
                if held is not None and held.end == high and self.fusion.until(value) == index:
                    held.end = held.first_end = max(held.start, low - 1)

    def _transposed(self, index: int, op: tg.Op) -> None:
        """XLA:CPU copies a matmul's operand that is not laid out as [batch, m, k] or [batch, k, n].

        What an element-wise kernel makes for this matmul alone, it makes in that layout at once.
        """
        graph = self.graph
        contracting, batches = op.eqn.params["dimension_numbers"]
        for side, value in enumerate(op.ins):
            if value < 0 or graph.maker[value] >= 0 and self._made_for(value):
                continue
            batch, inner, rank = list(batches[side]), sorted(contracting[side]), op.eqn.invars[side].aval.ndim
            first = rank - len(inner) if side == 0 else len(batch)
            if batch != list(range(len(batch))) or inner != list(range(first, first + len(inner))):
                low, high = self.span[index]
                self.out.append(Buffer(graph.bytes[value], low, high, high, (self.run, value)))

    def _made_for(self, value: int) -> bool:
        """Whether an element-wise kernel makes a value that one operation reads."""
        return self.graph.ops[self.graph.maker[value]].name in ELEMENTWISE and len(self.graph.uses[value]) == 1
