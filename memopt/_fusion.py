"""Which values XLA really puts in memory, and which only ever live inside a fused kernel.

In comes a `Graph` (or a jaxpr), out go the values that get a buffer, each with its bytes, when it is made and when it
is read last. Every rule is a named fact about XLA's fusion; what differs between backends stands in one table. Nothing
here knows of loops around the computation, of donation or of addresses: those are the timeline's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from memopt import _timeline_graph as tg

#: Element-wise and data-movement operations: XLA computes them inside the kernel of whoever reads them.
CHEAP = frozenset(
    "abs add add_any and broadcast_in_dim ceil clamp complex conj convert_element_type copy copy_p div eq expand_dims "
    "floor ge gt imag integer_pow iota is_finite le lt max min mul ne neg not one_minus_square or pad real reshape rev "
    "reduce_precision round select_n shift_left shift_right_arithmetic shift_right_logical sign slice split square sub "
    "transpose xor dynamic_slice concatenate rem nextafter population_count clz full empty tile "
    "bitcast_convert_type".split()
)
#: The same for functions that take many instructions.
EXPENSIVE = frozenset(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p "
    "logistic pow rsqrt sin sinh sqrt tan tanh igamma polygamma random_fold_in random_split random_seed".split()
)
ELEMENTWISE = CHEAP | EXPENSIVE
MATMULS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor reduce argmax argmin "
    "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split()
)
#: Operations that overwrite their first operand where it dies there.
UPDATES = frozenset(
    "dynamic_update_slice scatter scatter-add scatter_add scatter-mul scatter-min scatter-max scatter_mul".split()
)
RANDOM = frozenset({"random_bits", "threefry2x32", "rng_bit_generator"})


@dataclasses.dataclass(frozen=True)
class Rules:
    """What differs between backends.

    Args:
      narrows_matmul_operands: a float32 value that only default-precision matmuls read is stored as bfloat16 (TPU).
      fuses_into_matmuls: element-wise producers and consumers run inside matmul kernels (TPU).
      softmax_row: rows of at most this many elements go from the matmul through their maximum to `x - max` in one
        kernel, so that only `x - max` is stored, in the wider type.
      repeats_softmax: whether exponentials are computed again in each matmul that reads them: "always", "fused" (only
        behind such a kernel, or where the maxima of the rows are known before) or "never".
      widens_halves: bfloat16 and float16 are computed in float32: what matmuls read and make is stored wide, and what a
        loop's body reads is cast as a whole before the loop (CPU).
    """

    narrows_matmul_operands: bool
    fuses_into_matmuls: bool
    softmax_row: int
    repeats_softmax: str = "always"
    widens_halves: bool = False


RULES = {
    "tpu": Rules(True, True, 1024),
    "tpu:v5p": Rules(True, True, 1024, "never"),
    "tpu:v6e": Rules(True, True, 1024, "fused"),
    "cpu": Rules(False, False, 0, widens_halves=True),
    "gpu": Rules(False, False, 0),
}


def rules_for(platform: str, kind: str | None = None) -> Rules:
    """Return the rules of a device kind, or of its platform where the kind has none of its own."""
    return RULES.get(f"{platform}:{kind}") or RULES[platform]


def materialised(jaxpr: Any, platform: str) -> set[Any]:
    """Return the variables of `jaxpr` that XLA puts in memory, its arguments included.

    Args:
      jaxpr: an open or closed jaxpr; bodies of its loops are not entered.
      platform: `"tpu"`, `"cpu"` or `"gpu"`.

    Returns:
      The set of variables of this jaxpr that get a buffer.
    """
    graph = tg.flatten(getattr(jaxpr, "jaxpr", jaxpr), platform)
    kept = Fusion(graph).stored | set(graph.inputs)
    return {var for var, value in graph.number.items() if value in kept}


_ERRORS = frozenset({"erf", "erfc", "erf_inv"})
_MASKS = frozenset({"select_n", "add"})
#: What is done with the maximum of a row before it is subtracted.
_ROWS = frozenset({"max", "broadcast_in_dim", "convert_element_type"})
_QUOTIENTS = frozenset({"exp", "exp2", "logistic"})
FREE, INFINITE = -1, 1 << 60
#: How many operations a kernel that nothing waits for is put off by at most.
_PATIENCE = 64
#: Of so many values, the latest, a residual stream is known to be computed from; more of them decide no better.
_SOURCES = 512


class Fusion:
    """The decisions for one graph: `stored`, `bytes`, `made` and `last` (operation indices) per value.

    A *root* is an operation that writes its result to memory or reads its operands from it. A value whose readers, seen
    through fused operations, are one root lives inside that root's kernel. With more roots it is stored, unless what it
    is computed from is in memory at least as long anyway: then each root computes it again.
    """

    def __init__(self, graph: tg.Graph, written: frozenset[int] = frozenset(), rules: Rules | None = None):
        self.graph, self.rules = graph, rules or rules_for(graph.platform)
        self.written = written  # outputs that go straight into a stacked buffer
        self.base: list[int] = list(range(len(graph.avals)))
        self.mix: dict[int, tuple[int, ...]] = {}
        self.fused_max: dict[int, set[int]] = {}
        self.softmaxes: set[int] = set()
        self.stored: set[int] = set()
        self.direct: set[int] = set()
        self.copies: dict[int, int] = {}  # made whole for one reader; all others compute them again
        self.need: list[int] = [-1] * len(graph.avals)
        self.ready: list[int] = [-1] * len(graph.avals)
        self.bytes = graph.bytes
        self.last: list[int] = [-1] * len(graph.avals)
        self.roots: list[tuple[int, ...]] = [()] * len(graph.avals)  # the first three
        self.late: list[int] = [-1] * len(graph.avals)
        self.made: dict[int, int] = {}
        self.absorbed: dict[int, int] = {}
        self.runs: dict[int, int] = {}  # when a matmul runs that is computed in its reader's kernel
        self.all_out: list[bool] = [False] * len(graph.avals)
        self.end = len(graph.ops)
        self.outputs = {v for v in graph.outputs if v >= 0}
        self.convolves = any(op.name == "conv_general_dilated" for op in graph.ops)
        self._find_bases()
        self._decide()
        self._schedule()

    def until(self, value: int) -> int:
        """Return the operation that reads the buffer of `value` last."""
        return self.copies.get(value, self.last[value])

    # What each element-wise value is computed from.

    def _find_bases(self) -> None:
        graph, base, ready, forced = self.graph, self.base, self.ready, self.graph.forced
        for value, maker in enumerate(graph.maker):
            if maker == -2:
                base[value] = FREE
        for value in graph.inputs:
            self.late[value] = INFINITE
        for index, op in enumerate(graph.ops):
            if not op.live:
                continue
            when = index
            if op.name in ELEMENTWISE:
                self._base_of(op)
                if not forced or forced.isdisjoint(op.ins):  # else it may stand behind the barrier
                    when = -1
                    for v in op.ins:
                        if v >= 0 and ready[v] > when:
                            when = ready[v]
            elif self._is_one_hot(op):
                base[op.outs[0]] = FREE
            for value in op.outs:
                ready[value] = when

    def _base_of(self, op: tg.Op) -> None:
        sizes, base, outs = self.graph.bytes, self.base, op.outs
        size = sizes[outs[0]]
        found: list[int] = []
        for v in op.ins:
            source = base[v] if v >= 0 else FREE
            if source >= 0 and sizes[source] * 16 > size and source not in found:
                found.append(source)
        if op.name == "sub" and self._ends_softmax(op):
            return
        for out in outs:
            if not found:
                base[out] = FREE
            elif len(found) == 1 and sizes[found[0]] <= size:
                base[out] = found[0]
            else:
                mixed = {source for v in found for source in self.mix.get(v, (v,))}
                self.mix[out] = tuple(sorted(mixed)[-_SOURCES:])

    def _ends_softmax(self, op: tg.Op) -> bool:
        """Whether this is `x - max(x)` of a masked product, which the TPU backend computes in the matmul's kernel.

        Without a mask the product itself is stored, in its own type; so it is where something else reads the maximum,
        as the same softmax does that a plan runs again from kept statistics.
        """
        if not self.rules.softmax_row or -1 in op.ins:
            return False
        graph, (x, top) = self.graph, op.ins
        row = graph.avals[x].shape[-1] if getattr(graph.avals[x], "shape", ()) else 0
        source, top = self.base[x], self.base[top]
        maker = graph.ops[graph.maker[top]] if top >= 0 and graph.maker[top] >= 0 else None
        if not (128 <= row <= self.rules.softmax_row and row % 128 == 0 and maker and source >= 0):
            return False
        if maker.name != "reduce_max" or self.base[maker.ins[0]] != source or not self._chain_has(x, _MASKS):
            return False
        if self._is_read_elsewhere(top):
            return False
        self.fused_max[source] = {graph.maker[top], graph.maker[op.outs[0]]}
        self.softmaxes.add(op.outs[0])
        return True

    def _is_read_elsewhere(self, top: int) -> bool:
        """Whether the maximum of rows is read by more than one operation, or handed out."""
        graph, found, todo = self.graph, set(), [top]
        while todo:
            value = todo.pop()
            if value in self.outputs:
                return True
            for reader in graph.uses[value]:
                if graph.ops[reader].name in _ROWS:
                    todo += graph.ops[reader].outs
                else:
                    found.add(reader)
        return len(found) > 1

    def _is_one_hot(self, op: tg.Op) -> bool:
        """Whether a scatter of single elements into a constant becomes a comparison with an iota."""
        if not op.name.startswith("scatter") or self.base[op.ins[0]] != FREE or self.rules.softmax_row == 0:
            return False
        graph = self.graph
        updates = tg.elements(graph.avals[op.ins[2]]) if op.ins[2] >= 0 else 1
        numbers = op.eqn.params.get("dimension_numbers")
        return updates * 2 <= tg.elements(graph.avals[op.outs[0]]) and not numbers.update_window_dims

    # Who is stored, from the last operation to the first.

    def _decide(self) -> None:
        graph, base, late, last, stored = self.graph, self.base, self.late, self.last, self.stored
        for index in range(self.end - 1, -1, -1):
            op = graph.ops[index]
            if not op.live:
                continue
            when = index
            for value in op.outs:
                self._gather(value)
                if self._needs_buffer(op, index, value):
                    stored.add(value)
                    if self.convolves and self._is_laid_out_for_convolution(value):
                        graph.bytes[value] = max(graph.bytes[value], _image_bytes(graph.avals[value]))
                elif value in self.written:
                    stored.add(value)
                    self.direct.add(value)
                if op.name in ELEMENTWISE and (value not in stored or value in self.copies):
                    when = max(when, last[value])
                    until = late[value]
                    for source in self.mix.get(value, ()):
                        if late[source] < until:
                            late[source] = until
            when = max(when, self.runs.get(index, -1))
            for value in op.ins:
                if value >= 0:
                    source = base[value]
                    if source >= 0 and late[source] < when:
                        late[source] = when

    def _gather(self, value: int) -> None:
        """Collect the roots that read `value`, through the operations that are fused into them."""
        ops, stored, copies, ready, runs = self.graph.ops, self.stored, self.copies, self.ready, self.runs
        found: list[int] = []
        last, need, all_out = -1, -1, True
        for reader in self.graph.uses[value]:
            op = ops[reader]
            outs = op.outs
            through = op.name in ELEMENTWISE
            if not through or not stored.isdisjoint(outs):
                found.append(reader)
                late = runs.get(reader, -1)
                reached = reader if late < 0 else late
                if reached > last:
                    last = reached
                if late > need:
                    need = late
                for v in outs:
                    if ready[v] > need:
                        need = ready[v]
                    if all_out and v not in self.outputs:
                        all_out = False
            if through:
                for v in outs:
                    if v not in stored or v in copies:
                        found += self.roots[v]
                        if self.last[v] > last:
                            last = self.last[v]
                        if self.need[v] > need:
                            need = self.need[v]
                        all_out = all_out and self.all_out[v]
        if value in self.outputs and value not in self.written:
            last = self.end
        self.roots[value] = tuple(found if len(found) < 2 else sorted(set(found))[:3])
        self.last[value], self.need[value], self.all_out[value] = last, need, all_out and bool(found)

    def _needs_buffer(self, op: tg.Op, index: int, value: int) -> bool:
        graph = self.graph
        if value in self.outputs and value not in self.written:
            return True
        roots = self.roots[value]
        if not roots or self.base[value] == FREE:
            return False
        if value in graph.forced:
            return True
        if op.name not in ELEMENTWISE:
            return self._anchor_needs_buffer(op, index, value)
        if self._read_whole(value):
            if self._is_repeated(value):
                self.copies[value] = max(r for r in graph.uses[value] if self._is_opaque(graph.ops[r], value))
            return True
        return len(roots) > 1 and not self._is_repeated(value)

    def _is_repeated(self, value: int) -> bool:
        """Whether every root computes `value` itself, from what is in memory as long anyway."""
        if self.convolves and self._is_laid_out_for_convolution(value):
            return False
        if self.base[value] != value:
            return not self._is_dear(value)
        if value in self.softmaxes:
            return False
        mix = self.mix.get(value, (value,))
        if self._is_dear(value):
            return False
        if len(mix) > 1 and len(self.roots[value]) > 2:
            return False
        if len(mix) > 1 and all(self.graph.ops[r].name in MATMULS for r in self.roots[value]):
            larger = any(self.graph.bytes[b] > self.graph.bytes[value] for b in mix)
            return not larger and self.graph.ops[self.graph.maker[value]].name != "div"
        late, last = self.late, self.last[value]
        return all(late[b] >= last for b in reversed(mix))  # the latest is the likeliest to be gone

    def _is_dear(self, value: int) -> bool:
        """Whether `value` holds a function that this backend does not compute again in each matmul that reads it."""
        graph, mode = self.graph, self.rules.repeats_softmax
        if graph.maker[value] >= 0 and graph.ops[graph.maker[value]].name in _ERRORS:
            return True
        if graph.maker[value] < 0 or not all(graph.ops[r].name in MATMULS for r in self.roots[value]):
            return False
        row = (getattr(graph.avals[value], "shape", ()) or (1,))[-1]
        mix = self.mix.get(value, (self.base[value],))
        if mode == "always" or row % 128:
            return False
        if mode == "fused" and (mix[0] in self.softmaxes or self._is_without_maximum(mix[0])):
            return False
        return self._chain_has(value, _QUOTIENTS)

    def _is_without_maximum(self, source: int) -> bool:
        """Whether a matmul made `source` and nothing takes its maximum: a softmax of it has kept its statistics."""
        maker, ops = self.graph.maker[source], self.graph.ops
        if maker < 0 or ops[maker].name not in MATMULS:
            return False
        return all(ops[reader].name != "reduce_max" for reader in self.graph.uses[source])

    def _chain_has(self, value: int, names: frozenset[str], depth: int = 24) -> bool:
        """Whether one of `names` lies between `value` and what it is computed from."""
        graph = self.graph
        todo, seen, stop = [value], set(), {*self.mix.get(value, ()), self.base[value]} - {value}
        while todo and len(seen) < depth:
            place = graph.maker[todo.pop()]
            if place < 0 or place in seen or graph.ops[place].name not in ELEMENTWISE:
                continue
            seen.add(place)
            if graph.ops[place].name in names:
                return True
            todo += [v for v in graph.ops[place].ins if v >= 0 and v not in stop and self.base[v] != FREE]
        return False

    def _is_laid_out_for_convolution(self, value: int) -> bool:
        """Whether this is an image that convolutions of the TPU backend read in a layout of their own."""
        graph = self.graph
        if not self.rules.fuses_into_matmuls or any(graph.maker[b] >= 0 for b in self.mix.get(value, (value,))):
            return False
        readers = [graph.ops[r] for r in graph.uses[value]]
        return any(r.name == "conv_general_dilated" and r.ins[0] == value for r in readers)

    def _read_whole(self, value: int) -> bool:
        """Whether an operation that is no fusion reads this very value."""
        ops = self.graph.ops
        for reader in self.graph.uses[value]:
            op = ops[reader]
            if op.name not in ELEMENTWISE and self._is_opaque(op, value):
                return True
        return False

    def _is_opaque(self, op: tg.Op, value: int) -> bool:
        if op.name in ELEMENTWISE or op.name in REDUCTIONS:
            return False
        if op.name in MATMULS:
            return not self.rules.fuses_into_matmuls
        if op.name in UPDATES:
            return value == op.ins[0] and not self._is_one_hot(op)
        return True

    def _anchor_needs_buffer(self, op: tg.Op, index: int, value: int) -> bool:
        graph = self.graph
        if op.name in MATMULS or op.name in RANDOM or op.name in REDUCTIONS:
            if self.fused_max.get(value, set()) >= set(self.roots[value]):
                return False
            if self.all_out[value] and self._first_in_kernel(self.roots[value][0], index, op):
                self.runs[index] = self._idle_until(op, max(index, self.need[value]))
                return False
            roots = self.roots[value]
            if len(roots) == 1 and self._takes(graph.ops[roots[0]], roots[0], index, op):
                self.runs[index] = max(index, self.need[value])
                return False
        return True

    def _idle_until(self, op: tg.Op, index: int) -> int:
        """Return when XLA's scheduler runs a kernel that nothing waits for: before the next that makes as much."""
        graph = self.graph
        freed = max((graph.bytes[v] for v in op.ins if v >= 0), default=0)
        before = index
        for later in range(index + 1, min(index + _PATIENCE, self.end)):
            if not graph.ops[later].live:
                continue
            made = [v for v in graph.ops[later].outs if v in self.stored and v not in self.outputs]
            if any(graph.bytes[v] >= freed for v in made):
                return before
            before = later
        return index

    def _takes(self, root: tg.Op, place: int, index: int, op: tg.Op) -> bool:
        """Whether the kernel of `root` can compute this anchor as well: one matmul in a kernel, none below another."""
        if root.name in REDUCTIONS:
            return self.rules.fuses_into_matmuls or op.name not in MATMULS
        if root.name not in ELEMENTWISE:
            return op.name in RANDOM and root.name in MATMULS
        return op.name not in MATMULS or self._first_in_kernel(place, index, op)

    def _first_in_kernel(self, root: int, index: int, op: tg.Op) -> bool:
        """Whether the kernel of `root` holds no other matmul; in time it is the last that gets there."""
        if not self.rules.fuses_into_matmuls:
            return False
        return op.name not in MATMULS or self.absorbed.setdefault(root, index) == index

    # When each stored value is made.

    def _schedule(self) -> None:
        """Place fused outputs where their last operand is there: XLA's scheduler runs an update with its gradient."""
        maker = self.graph.maker
        for value in sorted(self.stored):
            index = maker[value]
            moved = value in self.outputs or index in self.absorbed or self._made_by_matmul(value)
            self.made[value] = max(self.ready[value], 0) if moved else index

    def _made_by_matmul(self, value: int) -> bool:
        """Whether a matmul's kernel writes this element-wise function of its result beside the result."""
        maker = self.graph.maker[self.base[value]] if self.base[value] >= 0 else -1
        matmul = maker >= 0 and self.graph.ops[maker].name in MATMULS and self.rules.fuses_into_matmuls
        return matmul and self.ready[value] == maker


def _image_bytes(aval: Any) -> int:
    """Return the bytes of an image whose batch the TPU backend puts in the 128 lanes, as it does with few channels."""
    batch, *spatial, channels = aval.shape
    if channels >= 8:
        return 0
    packed = max(4 // aval.dtype.itemsize, 1 << (channels - 1).bit_length())
    return -(-batch // 128) * 128 * math.prod(spatial) * packed * aval.dtype.itemsize
