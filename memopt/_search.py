"""The search: many plans of one step, each built and scored on the whole timeline.

In: a `Step`. Out: `Rung`s, each a complete rewritten step with its predicted peak and its cost; of these the hull, in
which none is beaten by another. Plans come from a sweep of the price of memory, one minimum cut each (`_network`), from
cuts with varied costs between them, and for short steps from a local search (`_refine`). Which rung is taken for a
budget is the planner's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memopt import _apply, _bits, _cost, _late, _layers, _mixtures, _segments, _settled, _timeline
from memopt import _compat as c
from memopt._network import Choice, Network
from memopt._refine import holding, refine
from memopt._rungs import Rung, hull
from memopt._step import Step
from memopt._usage import usage_of

_HOT = 0.5  # segments that hold less than this share of the peak's temporaries cannot bind
_SWEEP = tuple(np.geomspace(5e-4, 2.0, 9))  # prices tried, in units of the step's seconds per byte of its temporaries
_REFINEMENTS = 6  # prices tried between two of these
_KEPT = 1e9  # what the cost of repeating is multiplied by, of what a plan must keep
_NARROW = 0.004  # gaps between neighbours below this share of the smaller peak are not filled
_FREE = 0.02  # weight of a gap in which no matmul FLOPs are at stake
_STEEP = 8  # power of a segment's share of the peak by which its price falls
_DEAR = 0.1  # share of a plan's repeated FLOPs from which one operation's are looked at by themselves
_DEAREST, _TRIED = 1, 5_000  # how many of those: at least, and times the operations of the step
_FILLS, _LEAST_FILLS = 40, 6  # plans tried between neighbours on the hull, and for the longest steps
_FILLED = 15_000  # operations built for them in all
_BISECTIONS = 10  # prices tried for one cut with varied costs
_VARIED = 0.5  # standard deviation of the logarithm of a varied cost


class Search:
    """The sweep of prices and what it finds."""

    holding = staticmethod(holding)

    def __init__(self, step: Step, donated: Sequence[bool], plain: Rung):
        self.step = step
        self.survey = step.survey
        self.repeatable, self.always = step.repeatable, step.always
        self.donated = donated
        self.plain = plain
        self.scored: dict[Any, Rung] = {}  # every plan that was built
        self.seen: dict[Any, Rung] = {}  # those that the present technique has come upon
        self.cache: dict = {}  # what the timelines of its plans share
        self.undone_seconds = 0.0
        self.kept = self.score(Choice({}))
        self.undone_seconds = step.baseline_seconds - step.seconds(step.flat if step.asked else self.kept.closed)
        self.kept.seconds -= self.undone_seconds
        if self.always:
            self.seen.clear()  # what the user asked to run again is run again in every plan
        self.given = bool(self.always or step.asked)
        self.late = _late.forms(step)
        self.stores = [s for s in step.stores if not (s.late and step.repeatable)]
        self.usage = self.kept.usage
        self.hot = self.usage > _HOT * self.usage.max(initial=0)
        self.unit = step.baseline_seconds / max(1.0, self.usage.max(initial=0))
        self.weights = self.hot.astype(float)
        self.harm_price = 0.0  # bytes for the harm of a form

    def run(self, *, refined: bool = True) -> list[Rung]:
        """Return all plans that were found; without `refined` those of the sweep alone.

        Each technique is searched by itself first, as if its pass were the only one, then all of them together from
        what these searches found: so none alone has a plan that no plan of the mix is as good as.
        """
        start, found = dict(self.seen), {}
        for repeatable, stores in self._alone():
            self.seen = dict(start)
            self._look(repeatable, stores, refined)
            found |= self.seen
        self.seen = found or start
        self._look(self.repeatable, self.stores, refined)
        _bits.allocate(self)
        self.repack()
        return list(self.seen.values())

    def sketch(self) -> list[Rung]:
        """Return a few plans: nothing repeated, and cuts at every second price of the sweep, with nothing stored."""
        if self.repeatable:
            self.network = Network(self.survey, self.repeatable, self.hot, self.step.always, ())
            for price in _SWEEP[::2]:
                self._at(price * self.unit, self.weights)
        return list(self.seen.values()) or [self.kept]

    def _alone(self) -> list[tuple[dict[int, float], Sequence[Any]]]:
        """Return what each technique may repeat and store, and what those that store may together; none for one alone.

        What the user asked to run again is run again in every plan, and no technique is then searched that cannot.
        """
        own = [[s for s in stores if not (s.late and self.repeatable)] for stores in self.step.stores_by_pass]
        own = [stores for stores in own if stores]
        if len(own) > 1 and self.repeatable:
            own.append(self.stores)
        repeats = [(self.repeatable, ())] if self.repeatable and own else []
        found = [*repeats, *(({}, stores) for stores in own if not self.always)]
        return found if len(own) > 1 or repeats else []

    def _look(self, repeatable: dict[int, float], stores: Sequence[Any], refined: bool) -> None:
        """Search with these operations to repeat and these forms to store values in."""
        self.network = Network(self.survey, repeatable, self.hot, self.step.always, stores)
        self.sweep()
        if refined:
            self.seed(self.usage, necks=not stores and not _layers.plan(self))
            self.tighten()
            self.prune()
            self.fill()
            if repeatable and not stores:
                refine(self)

    def sweep(self) -> None:
        """Find the lower hull of peak against time for one price in all segments that the peak's bytes reach.

        Between two neighbours the price at which both cost the same is tried next, where the gap is largest.
        """
        weights = self.weights
        prices = _SWEEP[::2] if len(self.survey.graph.ops) > _layers.LONG else _SWEEP
        found = {p: self._at(p * self.unit, weights) for p in prices}
        span = max(r.predicted_peak_bytes for r in found.values()) - min(r.predicted_peak_bytes for r in found.values())
        for _ in range(_REFINEMENTS):
            ordered = sorted(found.items())
            gaps = [
                (a[1].predicted_peak_bytes - b[1].predicted_peak_bytes, a[0], b[0])
                for a, b in zip(ordered, ordered[1:], strict=False)
                if b[0] > 1.05 * a[0]
            ]
            gap, low, high = max(gaps, default=(0, 0.0, 0.0))
            if gap <= 0.06 * span:
                break
            found[float(np.sqrt(low * high))] = self._at(float(np.sqrt(low * high)) * self.unit, weights)

    def _at(self, price: float, weights: np.ndarray) -> Rung:
        choice = self.network.solve(price * weights, harm_price=price * self.harm_price)
        return self.score(choice, None if self.harm_price else price)  # a price of harm leaves no bound on seconds

    def seed(self, usage: np.ndarray, *, necks: bool) -> None:
        """Try what people choose by hand: all matmuls kept, those without batch dimensions, named values, block inputs.

        Each is one cut in which repeating what is kept costs too much to be chosen, and one more with memory priced
        where that plan's peak is; so it is at least as good as the `jax.checkpoint` policy of that name. Block inputs
        are where a step narrows to one value (`_segments.necks`): each of them, every second, every fourth; steps that
        are planned block by block need no such cuts.
        """
        ops = self.survey.graph.ops
        found = _segments.necks(self.survey.graph, int(usage.argmax()))[::-1] if necks else []
        seeds = [{op.id for op in ops if kept(op)} for kept in (_is_matmul, _is_plain_matmul, _is_named)]
        price = _SWEEP[-1] * self.unit
        for kept in dict.fromkeys(frozenset(s) for s in [*seeds, *(found[::every] for every in (1, 2, 4))]):
            if kept:
                factors = np.array([_KEPT if op.id in kept else 1.0 for op in ops])
                rung = self.score(self.network.solve(price * self.weights, factors))
                self.score(self.network.solve(price * self._tight(rung), factors))

    def tighten(self) -> None:
        """Price memory where it binds: cut again for each plan, a segment's price falling with the bytes it lacks.

        One price in all segments also pays for bytes that the peak never sees; a plan that lowers the peak elsewhere is
        left alone by it.
        """
        for rung in [r for r in self._hull() if r.price]:
            self._at(rung.price, self._tight(rung))

    def _tight(self, rung: Rung) -> np.ndarray:
        usage = rung.usage
        weights = self.weights * (usage / usage.max(initial=1)) ** _STEEP
        return weights * self.weights.sum() / max(weights.sum(), 1e-9)

    def prune(self) -> None:
        """Keep what is dear to repeat, for each plan that repeats it, one operation at a time.

        Where memory binds in many segments alike, the price asks for bytes there that lower no peak.
        """
        for rung in self._hull():
            for choice in [*self._kept_again(rung, _DEAR * rung.recompute_flops), *self._kept_plain(rung)]:
                self.score(choice, rung.price)

    def _kept_plain(self, rung: Rung) -> list[Choice]:
        """Return the plan without one of its stores, those first that take the most seconds for a byte saved."""
        survey, stores = self.survey, rung.choice.stores
        saved = {v: max(1, survey.bytes_of_value(v) - s.bytes) for v, s in stores.items()}
        dear = sorted((v for v, s in stores.items() if s.seconds), key=lambda v: (-stores[v].seconds / saved[v], v))
        most = max(_DEAREST, _TRIED // len(survey.graph.ops) // max(1, len(stores)))
        kept = [{v: s for v, s in stores.items() if v != one} for one in dear[:most]]
        return [Choice(rung.choice.repeats, stores) for stores in kept]

    def _kept_again(self, rung: Rung, least_flops: float = 0.0) -> list[Choice]:
        """Return the plan without the repeats of one operation, the dearest first."""
        runs: dict[int, float] = {}
        for (op, place), first in _segments.chains(self.survey.graph, rung.choice.repeats).items():
            if place == first and op not in self.always:
                trips = self.survey.region_of_bin[place].trips
                runs[op] = runs.get(op, 0.0) + trips * _cost.matmul_flops(self.survey.graph.ops[op].eqn)
        dear = sorted((-flops, op) for op, flops in runs.items() if flops > least_flops)
        found = []
        for _, op in dear[: max(_DEAREST, _TRIED // len(self.survey.graph.ops))]:
            repeats = {place: ops - {op} for place, ops in rung.choice.repeats.items()}
            found.append(Choice({place: ops for place, ops in repeats.items() if ops}, rung.choice.stores))
        return found

    def fill(self) -> None:
        """Look between neighbours on the hull, where the gap is largest: mixtures of both, then a cut of varied costs.

        A mixture takes one plan's decisions for the operations up to some one, and the other's for the rest: layers of
        an unrolled step then have different plans. At one price, operations that cost alike are all kept or all
        repeated; with costs varied a little (seeded), some are and some are not.
        """
        random = np.random.default_rng(0)
        tried: set[Any] = set()
        most = len(self.seen) + max(_LEAST_FILLS, min(_FILLS, _FILLED // max(1, len(self.survey.graph.ops))))
        while len(self.seen) < most:
            rungs = [self.plain] * (not self.given) + self._hull()
            wide = [pair for pair in zip(rungs, rungs[1:], strict=False) if _is_wide(pair)]
            gap = max((p for p in wide if (id(p[0]), id(p[1])) not in tried), key=_between, default=None)
            if gap is None:
                break
            tried.add((id(gap[0]), id(gap[1])))
            mixed = _mixtures.mixtures(gap[0].choice, gap[1].choice, self.always, self.survey.graph)
            for choice in [*mixed, *self._kept_again(gap[1]), *self._kept_plain(gap[1])]:
                self.score(choice)
            self._vary(gap, random)

    def _vary(self, gap: tuple[Rung, Rung], random: np.random.Generator) -> None:
        """Vary the costs, and find the price at which the cut's plan then costs something between two neighbours'."""
        factors = np.exp(random.normal(0.0, _VARIED, len(self.survey.graph.ops)))
        low, high = _SWEEP[0] * self.unit, _SWEEP[-1] * self.unit
        for _ in range(_BISECTIONS):
            price = float(np.sqrt(low * high))
            choice = self.network.solve(price * self.weights, factors)
            seconds = self._seconds(choice) - self.undone_seconds
            if gap[0].seconds < seconds < gap[1].seconds:
                self.score(choice, price)
                return
            low, high = (low, price) if seconds >= gap[1].seconds else (price, high)

    def repack(self) -> None:
        """Try the exact forms that take next to no time on what each plan on the hull keeps."""
        late = _late.smallest(self.late)
        for rung in [self.kept] * (not self.given) + self._hull() if late else ():
            for choice in _late.choices(self.step, rung.choice, rung.predicted_peak_bytes, late):
                self.score(choice, rung.price)

    def _hull(self) -> list[Rung]:
        return hull(self.plain, list(self.seen.values()))

    def score(self, choice: Choice, price: float | None = None) -> Rung:
        """Build and simulate a plan, once; what the user asked to be stored is stored in every one."""
        if self.step.asked:
            choice = Choice(choice.repeats, dict(sorted({**choice.stores, **self._asked(choice.repeats)}.items())))
        key = choice.key
        if key not in self.scored:
            chains = _segments.chains(self.survey.graph, choice.repeats)
            decodings: dict[int, int] = {}
            closed, bins = _apply.apply(self.survey.graph, choice.repeats, choice.stores, chains, decodings)
            local = self.step.local
            timeline = _timeline.simulate(
                closed, donated=self.donated, target=self.survey.target, cache=self.cache, local=local
            )
            flops = _cost.matmul_flops(closed) - self.step.baseline_flops
            seconds = self._seconds(choice, chains) + self._again(choice, decodings) - self.undone_seconds
            own = _settled.tables(self.survey.graph)[1]
            usage = usage_of(c.open_jaxpr(closed), timeline, own, bins, self.survey.bins)
            timeline.release()
            peaks = timeline.peak_bytes, timeline.packed_peak_bytes
            harm = self.step.harm(choice)
            self.scored[key] = Rung(closed, *peaks, seconds, flops, choice, self.step, price, usage, harm)
        self.seen[key] = self.scored[key]
        return self.seen[key]

    def _asked(self, repeats: Mapping[int, frozenset[int]]) -> dict[int, Any]:
        """Return the forms that the user asked for, of values that something reads later from where they are kept."""
        makers = {v: self.survey.graph.values[v].op for v in self.step.asked}
        kept = {
            v
            for v, place in self.survey.read_later(repeats)
            if v in makers and (makers[v] is None or makers[v].id not in repeats.get(place, ()))
        }
        return {v: store for v, store in self.step.asked.items() if v in kept}

    def _seconds(self, choice: Choice, chains: Mapping[tuple[int, int], int] | None = None) -> float:
        regions, graph = self.survey.region_of_bin, self.survey.graph
        chains = _segments.chains(graph, choice.repeats) if chains is None else chains
        runs = sorted({(op, first) for (op, _), first in chains.items()})
        repeated = sum(self.repeatable[op] * regions[first].trips for op, first in runs)
        encoded = sum(s.seconds * graph.regions[graph.values[v].region].trips for v, s in choice.stores.items())
        return repeated + encoded

    def _again(self, choice: Choice, decodings: Mapping[int, int]) -> float:
        """Return the seconds of reading stored values back more than once."""
        regions, values = self.survey.graph.regions, self.survey.graph.values
        return sum(
            (decodings[v] - 1) * store.again_seconds * regions[values[v].region].trips
            for v, store in choice.stores.items()
            if store.again_seconds is not None and v in decodings
        )


def _bytes_between(above: Rung, below: Rung) -> int:
    return above.predicted_peak_bytes - below.predicted_peak_bytes


def _is_wide(gap: tuple[Rung, Rung]) -> bool:
    return _bytes_between(*gap) > _NARROW * gap[1].predicted_peak_bytes


def _between(gap: tuple[Rung, Rung]) -> float:
    """What a plan between two neighbours could save at most: bytes for seconds."""
    free = gap[1].recompute_flops <= gap[0].recompute_flops and gap[0].choice.stores == gap[1].choice.stores
    return _bytes_between(*gap) * (gap[1].seconds - gap[0].seconds) * (_FREE if free else 1.0)


def _is_matmul(op: Any) -> bool:
    return op.eqn.primitive.name in ("dot_general", "conv_general_dilated")


def _is_plain_matmul(op: Any) -> bool:
    return _is_matmul(op) and (op.eqn.primitive.name != "dot_general" or not any(op.eqn.params["dimension_numbers"][1]))


def _is_named(op: Any) -> bool:
    return op.eqn.primitive.name == "name"
