"""The workshop of the minimum cut: which values to keep and which operations to run again, at given prices.

In: a `Survey` (graph, seconds, bytes) and the operations that passes allow to be run again. Out: for a vector of prices
(seconds per byte and time segment), the cheapest set of repeats, exactly, by one maximum flow.

The network has a node for each value that is needed in a later segment or in a paired loop's body, per place where it
is needed, and a node for each operation that could be run again there. Cut arcs are what is paid: the arc from an
operation to a value is the price of keeping that value until this place, the arc from the source to an operation is the
price of running it again (its seconds, and its outputs' bytes while they live there). An operation that runs needs its
inputs at the same place. A value needed in several places is kept up to one of them and repeated after it.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ortools.graph.python import max_flow

from memopt import _forms, _segments
from memopt import _graph as g
from memopt._contract import Store
from memopt._survey import Survey

SOURCE, SINK = 0, 1
_UNIT = 1e-13  # seconds in one unit of capacity
_INFINITE = 1 << 58
_LARGEST = 1 << 52
MOST_NODES_A_PLACE = 2000  # beyond these the nearest operations are candidates, the farther ones must be kept
MOST_NODES = 40_000


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What one cut decided.

    Attributes:
      repeats: segment -> operations that are run again there.
      stores: value -> the form that it is kept in, for values that are not kept as they are.
    """

    repeats: Mapping[int, frozenset[int]]
    stores: Mapping[int, Store] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Any:
        """A hashable form; equal choices have equal keys."""
        return frozenset(self.repeats.items()), frozenset((v, id(s)) for v, s in self.stores.items())


class Network:
    """The cut's structure, built once; prices change per `solve`.

    Args:
      survey: the step with its seconds and bytes.
      repeatable: operation id -> seconds of one run, of all operations that may be run again.
      hot: segments where memory may bind; needs that span none of them are kept for nothing.
      always: operations whose results are never kept for a later place.
      stores: other forms in which values may be kept.
    """

    def __init__(
        self,
        survey: Survey,
        repeatable: dict[int, float],
        hot: np.ndarray,
        always: frozenset[int] = frozenset(),
        stores: Sequence[Store] = (),
    ):
        self.survey = survey
        self.graph = survey.graph
        self.repeatable = repeatable
        self.always = always
        self.stores: dict[int, list[Store]] = {}
        self.narrow: dict[int, Store] = {}  # forms for some readers alone: the smallest of each value
        asked = {store.value for store in stores if store.asked}
        for store in sorted(stores, key=lambda store: store.bytes):
            if store.value in asked and not store.asked:
                continue
            if store.readers is None:
                self.stores.setdefault(store.value, []).append(store)
            else:
                self.narrow.setdefault(store.value, store)
        self.marks = _forms.Marks(self.graph)
        self.readers: dict[tuple[int, int], list[g.Op]] = {}  # (value, place) -> what reads it there, as written
        self.forward: set[int] = set()  # places in which something is not of the backward pass
        if stores:
            self._find_readers()
        self.coded: dict[int, Store] = {}  # arc that pays for a form beside the value itself -> that form
        self.encodings: list[
            tuple
        ] = []  # (arc, value), another form of keeping it, runs of the operation that makes it
        self.hot = np.concatenate([[0], np.cumsum(hot.astype(np.int64))])
        self.nodes: dict[tuple, int] = {}
        self.op_nodes: dict[tuple[int, int], int] = {}
        self.count = 2
        self.arcs: list[
            tuple
        ] = []  # tail, head, seconds, bytes held, first and last segment that they are held in, operation
        self.queue: list[tuple] = []
        self.per_place: dict[int, int] = {}
        self.depth = 0  # operations between a need and what is being expanded: the nearest are expanded first
        places = max(1, survey.bins)
        self.most = max(100, min(MOST_NODES_A_PLACE, MOST_NODES // places))
        self._hard_needs()
        while self.queue:
            self.depth, _, *item = heapq.heappop(self.queue)
            self._expand(*item)
        self._seal()

    def solve(self, prices: np.ndarray, factors: np.ndarray | None = None, harm_price: float = 0.0) -> Choice:
        """Return the cheapest choice at these prices (seconds per byte, per segment).

        Args:
          prices: the price of memory in each segment.
          factors: what each operation's seconds are multiplied by, to look at other choices that cost about the same.
          harm_price: seconds for the harm of a form, where that was measured.
        """
        if not len(self.tails):
            return Choice({})
        total = np.concatenate([[0.0], np.cumsum(prices)])
        span = total[self.last + 1] - total[self.first]
        seconds = self.seconds if factors is None else self.seconds * np.append(factors, 1.0)[self.operation]
        cost = seconds + self.held * span
        encoded = {}
        for (arc, value), store, runs in self.encodings:
            price = (
                store.seconds * runs
                + self.held[arc] * store.bytes / max(1, self.survey.bytes_of_value(value)) * span[arc]
            )
            if harm_price and store.harm is not None:
                price += harm_price * (store.repeated_harm if self.repeatable else store.harm)
            if price < cost[arc] or store.asked:
                cost[arc] = price
                encoded[arc] = (value, store)
        forced = ~np.isfinite(self.seconds)
        capacity = np.minimum(np.where(forced, 0.0, cost) / _UNIT, _LARGEST).astype(np.int64)
        capacity[forced] = _INFINITE
        flow = max_flow.SimpleMaxFlow()
        flow.add_arcs_with_capacity(self.tails, self.heads, capacity)
        if flow.solve(SOURCE, SINK) != flow.OPTIMAL:
            raise RuntimeError("the maximum flow of a memory plan was not solved; please report the step")
        chosen: dict[int, set[int]] = {}
        sink_side = set(flow.get_sink_side_min_cut())
        for (op, place), node in self.op_nodes.items():
            if node in sink_side:
                chosen.setdefault(place, set()).add(op)
        kept = {
            value: store
            for arc, (value, store) in encoded.items()
            if self.heads[arc] in sink_side and self.tails[arc] not in sink_side
        }
        for arc, store in self.coded.items():
            if self.heads[arc] in sink_side and self.tails[arc] not in sink_side:
                kept.setdefault(store.value, store)
        return Choice({place: frozenset(ops) for place, ops in chosen.items()}, kept)

    def _node(self) -> int:
        self.count += 1
        return self.count - 1

    def _arc(self, tail, head, seconds=np.inf, held=0.0, first=0, last=-1, op=-1) -> None:
        self.arcs.append((tail, head, seconds, held, first, last, op))

    def _price_repeats(self) -> None:
        """Price each operation's repeats: one run, shared by places near each other, bytes from first use to last."""
        places: dict[int, list[int]] = {}
        for op, place in self.op_nodes:
            places.setdefault(op, []).append(place)
        for op, found in places.items():
            there = float(sum(self.survey.repeated_bytes[v] for v in self.graph.ops[op].outputs))
            before: int | None = None
            for place in sorted(found):
                region = self.survey.region_of_bin[place]
                seconds = self.repeatable[op] * region.trips
                node = self.op_nodes[op, place]
                if before is not None and before in region.bins and place - before <= _segments.near(region):
                    self._arc(self.op_nodes[op, before], node, seconds, op=op)
                    self._arc(SOURCE, node, 0.0, there, before + 1, place)
                else:
                    self._arc(SOURCE, node, seconds, there, place, place, op)
                before = place

    def _seal(self) -> None:
        self._price_repeats()
        table = np.array(self.arcs, dtype=np.float64).reshape(-1, 7)
        self.tails, self.heads = table[:, 0].astype(np.int32), table[:, 1].astype(np.int32)
        self.seconds, self.held = table[:, 2], table[:, 3]
        self.first, self.last, self.operation = (table[:, k].astype(np.int64) for k in (4, 5, 6))
        self.arcs = []

    def _hard_needs(self) -> None:
        needs = sorted(self.survey.needs(), key=lambda need: (need[0], self._when(*need)))
        before: tuple[int, int] | None = None
        for value, place in needs:
            span = self.survey.span(value, place)
            outside = self.graph.values[value].kind in (g.CONST_IN, g.XS_IN) and not self.survey.is_here(value, place)
            maker = self.graph.values[value].op
            forced = maker is not None and maker.id in self.always
            if not outside and not forced and (span is None or self.hot[span[1] + 1] == self.hot[span[0]]):
                continue
            chained = before if before is not None and before[0] == value else None
            node = self._available(value, place, chained)
            if node is not None:
                self._arc(self._coded(node, value, place, chained), SINK)
                before = (value, place)

    def _find_readers(self) -> None:
        for op in self.graph.ops:
            for v in dict.fromkeys(v for i, v in enumerate(op.inputs) if v is not None and i not in op.mapped):
                self.readers.setdefault((v, op.bin), []).append(op)
            if not op.bodies and not self.marks.is_backward(op):
                self.forward.add(op.bin)

    def serves(self, store: Store, value: int, place: int) -> bool:
        """Say whether a form does for what reads a value at a place, and for what is repeated from it there."""
        readers = self.readers.get((value, place), [])
        if store.error and place in self.forward and not readers:
            return False  # a repeat from a lossy form serves the backward pass alone
        return all(self.marks.serves(store, reader) for reader in readers)

    def _coded(self, node: int, value: int, place: int, chained: tuple[int, int] | None) -> int:
        """Return the node of a value or of a form of it that does for its readers here, though not for repeats."""
        store, span = self.narrow.get(value), self.survey.span(value, place)
        if store is None or span is None or not self.serves(store, value, place):
            return node
        first = span[0] if chained is None else max(span[0], self._when(*chained) + 1)
        runs = self.graph.regions[self.graph.values[value].region].trips
        held = self.survey.kept_bytes(value, place) * store.bytes / max(1, self.survey.bytes_of_value(value))
        coded = self._node()
        self.coded[len(self.arcs)] = store
        self._arc(node, coded, store.seconds * runs if chained is None else 0.0, held, first, span[1])
        return coded

    def _when(self, value: int, place: int) -> int:
        return place if self.survey.is_here(value, place) else self.survey.region_of_bin[place].op.bin

    def _available(self, value: int, place: int, chained: tuple[int, int] | None = None) -> int | None:
        """Return the node of a value at a place (None where it is there anyway); queue it to be expanded."""
        item = self.graph.values[value]
        if self.survey.is_here(value, place) and (item.op is None or item.op.bin >= place):
            return None
        node = self.nodes.get((value, place))
        if node is None:
            node = self.nodes[value, place] = self._node()
            heapq.heappush(self.queue, (self.depth + 1, len(self.nodes), value, place, chained))
        return node

    def _expand(self, value: int, place: int, chained: tuple[int, int] | None) -> None:
        item, node = self.graph.values[value], self.nodes[value, place]
        if item.kind in (g.CONST_IN, g.XS_IN) and not self.survey.is_here(value, place):
            self._outside(item, place, node)
            return
        first, last = self.survey.span(value, place) or (0, -1)
        if chained is not None:
            first = max(first, self._when(*chained) + 1)
        held = self.survey.kept_bytes(value, place)
        op_node = self._operation(item.op, place) if item.op is not None else None
        if first <= last:
            runs = self.graph.regions[item.region].trips
            forms = [store for store in self.stores.get(value, ()) if self.serves(store, value, place)]
            self.encodings += [((len(self.arcs), value), store, runs) for store in forms]
        if op_node is None:
            self._arc(SOURCE, node, 0.0, held, first, last)
            return
        seconds = self.survey.keep_seconds(value, place) if first <= last and chained is None else 0.0
        self._arc(op_node, node, np.inf if item.op.id in self.always else seconds, held, first, last)
        if chained is not None and (item.op.id, chained[1]) in self.op_nodes:
            self._arc(op_node, self.op_nodes[item.op.id, chained[1]])

    def _outside(self, item: g.Value, place: int, node: int) -> None:
        loop = self.survey.region_of_bin[place].op
        outer = self.graph.regions[item.region].op.inputs[item.operand]
        have = None if outer is None else self._available(outer, loop.bin)
        if have is not None:
            self._arc(have, node)

    def _operation(self, op: g.Op, place: int) -> int | None:
        """Return the node of running an operation again at a place, or None where it may not or need not be tried."""
        if op.id not in self.repeatable:
            return None
        if op.region == self.survey.region_of_bin[place].id and self.hot[place + 1] == self.hot[op.bin + 1]:
            return None  # memory binds nowhere between its first run and this place
        node = self.op_nodes.get((op.id, place))
        if node is not None:
            return node
        if self.per_place.get(place, 0) >= self.most:
            return None
        self.per_place[place] = self.per_place.get(place, 0) + 1
        node = self.op_nodes[op.id, place] = self._node()
        for v in dict.fromkeys(op.inputs):
            have = None if v is None else self._available(v, place)
            if have is not None:
                self._arc(have, node)
        return node
