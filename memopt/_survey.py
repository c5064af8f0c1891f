"""The measuring room: seconds, bytes, spans and needs of every value and operation of a step.

In: an inlined closed jaxpr, which arguments are donated, and a target. Out: a `Survey`, the one object that passes and
the planner read: the graph, its time segments, one run's seconds of each operation on the target's device, the bytes of
keeping a value, and which values are needed where. It decides nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from memopt import _compat as c
from memopt import _convolved, _cost, _fusion, _segments, _sizes, _specs
from memopt import _graph as g

#: Share of an operation's roofline seconds that a repeat takes at least, where memory and not arithmetic is the limit.
REPEATED_TRAFFIC = 0.1


class Survey:
    """A step, measured.

    Args:
      closed: inlined closed jaxpr.
      target: the target (`memopt._target.Target`).
      local: of a sharded step, what one device holds; bytes and seconds are then per device.

    Attributes:
      graph: the numbered graph.
      bins: number of time segments over all regions.
      region_of_bin: segment -> region.
      seconds: operation id -> predicted seconds of one run.
      repeat_seconds: operation id -> seconds of a second run next to its reader: an element-wise operation or a
        reduction fuses there and takes no traffic of its own; of another one's traffic, which mostly replaces that of
        the kept value, `REPEATED_TRAFFIC` counts.
      repeated_bytes: value id -> bytes that a repeat of it holds while it lives, 0 where XLA fuses it away.
    """

    def __init__(self, closed: Any, target: Any, local: Any = None):
        self.target = target
        self.local = local
        self.spec = _specs.spec_for(target)
        self.graph = g.Graph(closed)
        self.bins = _segments.assign(self.graph)
        self.region_of_bin = [r for r in self.graph.regions for _ in r.bins]
        self.seconds = [_cost.eqn_seconds(self._on_device(op.eqn), self.spec) for op in self.graph.ops]
        lean = self.spec.without_memory()
        self.repeat_seconds = []
        for op, seconds in zip(self.graph.ops, self.seconds, strict=True):
            arithmetic = _cost.eqn_seconds(self._on_device(op.eqn), lean)
            self.repeat_seconds.append(arithmetic if _fuses(op) else max(arithmetic, REPEATED_TRAFFIC * seconds))
        self._held_until = self._holds()
        self.repeated_bytes = self._repeated_bytes()

    def _on_device(self, eqn: Any) -> Any:
        return eqn if self.local is None else self.local.equation(eqn)

    def aval_of(self, value: int) -> Any:
        """Return a value's abstract value, on one device where the step is sharded."""
        var = self.graph.values[value].var
        return var.aval if self.local is None else self.local.aval(var)

    def bytes_of(self, aval: Any) -> int:
        """Return the bytes of one such array on the target, tile padding included."""
        return _cost.padded_bytes(aval, self.target.platform)

    def is_here(self, value: int, place: int) -> bool:
        """Say whether a value's home is the region of this place."""
        return self.graph.values[value].region == self.region_of_bin[place].id

    def kept_bytes(self, value: int, place: int) -> int:
        """Return the bytes of keeping a value for this place: its own, or its stack's over the loop that makes it."""
        return self._one[value] if self.is_here(value, place) else self._handed(value, place)[2]

    def bytes_of_value(self, value: int) -> int:
        """Return the bytes of one such value, not of its stack."""
        return self._one[value]

    def span(self, value: int, place: int) -> tuple[int, int] | None:
        """Return the first and last segment in which keeping a value for this place costs memory (None: none does)."""
        item = self.graph.values[value]
        if self.is_here(value, place):
            held = self._held_until.get(value, item.op.bin if item.op else place)
            return None if held >= place else (held + 1, place)
        maker, outer, _ = self._handed(value, place)
        last = self._reader(place, maker).bin
        first = maker.bin
        if outer is not None:
            held = self._held_until.get(outer, -1)
            first = max(first, held + 1)
        return None if first > last else (first, last)

    def _reader(self, place: int, maker: g.Op) -> g.Op:
        """Return the operation around a place that stands in one region with what makes a value read there."""
        reader = self.region_of_bin[place].op
        while reader.region != maker.region:
            reader = self.graph.regions[reader.region].op
        return reader

    def _handed(self, value: int, place: int) -> tuple[g.Op, int | None, int]:
        """Return how a value comes into another body, over as many levels of bodies as lie between.

        Returns:
          The operation that hands it out in a region that holds both bodies, its result that does so already (None:
          there is none yet), and the bytes of that.
        """
        around = self.region_of_bin[place].op
        regions = {around.region}
        while self.graph.regions[around.region].op is not None:
            around = self.graph.regions[around.region].op
            regions.add(around.region)
        return self._handed_to(value, frozenset(regions))

    @functools.cache  # noqa: B019 (a survey lives as long as its ladder)
    def _handed_to(self, value: int, regions: frozenset[int]) -> tuple[g.Op, int | None, int]:
        home, aval, outer = self.graph.values[value].region, self.aval_of(value), value
        while True:
            maker = self.graph.regions[home].op
            if maker.eqn.primitive.name == "scan":
                aval = c.stacked_aval(aval, maker.eqn.params["length"])
            position = None if outer is None else self.graph.out_position(maker, outer)
            outer = None if position is None else maker.outputs[position]
            if maker.region in regions:
                return maker, outer, self.bytes_of(aval)
            home = maker.region

    def keep_seconds(self, value: int, place: int) -> float:
        """Return the seconds of writing a kept value and reading it back, beyond what its operation takes anyway.

        What no fusion makes is written in any case; a loop's stack is also read slice by slice.
        """
        op = self.graph.values[value].op
        passes = 0.0 if op is None or not _fuses(op) else 1.0
        passes += 0.0 if self.is_here(value, place) else 1.0
        return passes * self.kept_bytes(value, place) / self.spec.memory_bytes_per_second

    def read_later(self, repeats: Mapping[int, frozenset[int]]) -> Iterator[tuple[int, int]]:
        """Yield `(value, place)` for all that is read in a later segment or loop, by operations or repeats."""
        yield from self.needs()
        seen = set(self.needs())
        for place, ops in repeats.items():
            for op in ops if place != _segments.ALONE else ():
                for v in self.graph.ops[op].inputs:
                    if v is None or (v, place) in seen:
                        continue
                    item = self.graph.values[v]
                    if not self.is_here(v, place) or (item.op is not None and item.op.bin < place):
                        seen.add((v, place))
                        yield v, place

    @functools.cached_property
    def _needs(self) -> list[tuple[int, int]]:
        return list(self._find_needs())

    def needs(self) -> list[tuple[int, int]]:
        """Return `(value, place)` for everything that an operation reads and that was made in an earlier segment."""
        return self._needs

    def _find_needs(self) -> Iterator[tuple[int, int]]:
        seen: set[tuple[int, int]] = set()
        for region in self.graph.regions:
            for op in region.ops:
                for i, v in enumerate(op.inputs):
                    if v is None or i in op.mapped or (v, op.bin) in seen:
                        continue
                    item = self.graph.values[v]
                    if item.region != region.id or (item.op is not None and item.op.bin < op.bin):
                        seen.add((v, op.bin))
                        yield v, op.bin
            for v in region.outs:
                if v is not None and self.graph.values[v].region != region.id and (v, region.bins[-1]) not in seen:
                    seen.add((v, region.bins[-1]))
                    yield v, region.bins[-1]

    def _holds(self) -> dict[int, int]:
        """Return, for values of a region that something holds anyway, the last segment in which it does."""
        never = np.iinfo(np.int64).max
        held: dict[int, int] = {}
        for region in self.graph.regions:
            for v in region.outs:
                if v is not None:
                    held[v] = int(never)
            for op in region.ops:
                if op.bodies and op.feeds:  # its stacks may be read by others than the loops it feeds
                    for v in op.outputs:
                        held.setdefault(v, -1)
        for region in self.graph.regions:
            for op in region.ops:
                for i, v in enumerate(op.inputs):
                    if v in held and i not in op.mapped and self.graph.values[v].region == region.id:
                        held[v] = max(held[v], op.bin)
        return {v: b for v, b in held.items() if b >= 0}

    @functools.cached_property
    def _one(self) -> list[int]:
        sizes = [self.bytes_of(self.aval_of(v.id)) for v in self.graph.values]
        images = self._images() if self.target.platform == "tpu" else {}
        return [max(size, images.get(v, 0)) for v, size in enumerate(sizes)]

    def _images(self) -> dict[int, int]:
        """Return the bytes of what convolutions make or read on TPUs, and of what is element-wise made from it."""
        found: dict[int, int] = {}
        for op in self.graph.ops:
            if op.eqn.primitive.name == "conv_general_dilated":
                for operand, size in _convolved.laid_out(self._on_device(op.eqn)):
                    value = op.outputs[0] if operand is None else op.inputs[operand]
                    if value is not None and self.graph.values[value].op is not None:
                        found[value] = max(found.get(value, 0), size)
            elif op.eqn.primitive.name in _fusion.ELEMENTWISE:
                made = self.aval_of(op.outputs[0])
                for value in op.inputs:
                    if value in found and (aval := self.aval_of(value)).shape == made.shape:
                        size = found[value] * _sizes.element_bits(made) // _sizes.element_bits(aval)
                        found[op.outputs[0]] = max(found.get(op.outputs[0], 0), size)
        return found

    def _repeated_bytes(self) -> list[int]:
        """Count a repeated value's bytes where its operation is one that XLA materialises, else nothing."""
        out = list(self._one)
        for op in self.graph.ops:
            if op.eqn.primitive.name in _fusion.ELEMENTWISE or op.eqn.primitive.name in _FREE:
                for v in op.outputs:
                    out[v] = 0
        return out


_FREE = frozenset("broadcast_in_dim reshape squeeze expand_dims iota convert_element_type transpose slice rev".split())
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce argmax argmin".split()
)


def _fuses(op: g.Op) -> bool:
    name = op.eqn.primitive.name
    return name in _fusion.ELEMENTWISE or name in _FREE or name in _REDUCTIONS
