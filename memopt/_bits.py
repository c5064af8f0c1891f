"""The assay: which kept value gets how many bits, for plans whose repeats are settled.

In: a search with its plans, whose forms have measured harm (`Store.harm`). Out: more plans, scored by the search: for
each set of repeats on its hull those on the frontier of stored bytes against the sum of harms, and cuts in which harm
has a price beside memory's. Where nothing was measured nothing is done.

For one set of repeats the choice is separable: each kept value stays as it is or takes one of its forms. At a price of
`p` bytes for the harm each value takes what makes `bytes + p * harm` smallest; from the highest price to the lowest
these are the vertices of the frontier (HAWQ-V2, section 3.2, finds the same frontier by trying all sums).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from memopt import _rungs
from memopt._contract import Store
from memopt._network import Choice, Network

_PRICES = (0.1, 10.0, 1000.0)  # of harm in the cuts, in units of what all forms save for what all of them do
_BASES, _MIXES, _LEAST_MIXES = 8, 64, 6  # sets of repeats, and mixes of forms for each
_BUILT = 20_000  # operations built for mixes of one set


def allocate(search: Any) -> None:
    """Score plans with few harm for their bytes; they join the search's `seen`.

    Args:
      search: has `step`, `survey`, `seen`, `kept`, `plain`, `hot`, `stores`, `repeatable`, `harm_price`, `sweep()`,
        `score(choice)`.
    """
    stores = [s for s in search.stores if s.harm is not None]
    if not stores:
        return
    network = search.network = Network(search.survey, search.repeatable, search.hot, search.step.always, search.stores)
    unit = _unit(search, stores)
    for price in _PRICES if unit else ():
        search.harm_price = price * unit
        search.sweep()
    search.harm_price = 0.0
    rungs = [search.kept, *_rungs.by_seconds(search.plain, list(search.seen.values())), *search._hull()]
    bases = list({frozenset(r.choice.repeats.items()): r.choice for r in rungs}.values())
    most = max(_LEAST_MIXES, min(_MIXES, _BUILT // max(1, len(search.survey.graph.ops))))
    for base in _some(bases, _BASES):
        for choice in [
            *frontier(search.step, base, stores, network, most),
            *_alike(search.step, base, stores, network),
        ]:
            search.score(choice)


def _unit(search: Any, stores: Sequence[Store]) -> float:
    """Return the bytes that the smallest forms of all values save, for a unit of what they do in all."""
    smallest = {s.value: s for s in sorted(stores, key=lambda s: -s.bytes)}
    survey = search.survey
    trips = {v: survey.graph.regions[survey.graph.values[v].region].trips for v in smallest}
    saved = sum((survey.bytes_of_value(v) - s.bytes) * trips[v] for v, s in smallest.items())
    harms = [s.repeated_harm if search.repeatable else s.harm for s in smallest.values()]
    harm = sum(x for x in harms if math.isfinite(x))
    return saved * max(1.0, search.weights.sum()) / harm if harm > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class _Option:
    """One way to keep a value: its bytes over all runs, its harm, its form (None: as it is)."""

    bytes: int
    harm: float
    store: Store | None


def frontier(step: Any, base: Choice, stores: Sequence[Store], network: Network, most: int) -> list[Choice]:
    """Return plans with the base's repeats, from nothing in measured forms to the smallest forms of all.

    Args:
      step: the step.
      base: a plan; its measured forms are forgotten, its other forms stay.
      stores: the measured forms.
      network: says which forms do for what reads a value where.
      most: how many plans; of more those in equal steps of bytes.
    """
    other = {v: s for v, s in base.stores.items() if s.harm is None}
    moves = []
    for value, options in _options(step, base, stores, network, other).items():
        for before, after in _corners(options):
            saved = before.bytes - after.bytes
            moves.append(((after.harm - before.harm) / saved, value, saved, after.store))
    chosen, found, saved = dict(other), [], [0]
    for _, value, size, store in sorted(moves, key=lambda move: move[:2]):
        chosen[value] = store
        saved.append(saved[-1] + size)
        found.append(Choice(base.repeats, dict(sorted(chosen.items()))))
    if len(found) <= most:
        return found
    wanted = [saved[-1] * (k + 1) / most for k in range(most)]
    return [found[min(range(len(found)), key=lambda i, x=x: abs(saved[i + 1] - x))] for x in wanted]


def _alike(step: Any, base: Choice, stores: Sequence[Store], network: Network) -> Iterator[Choice]:
    """Yield plans with the base's repeats and one form for all values, which a budget may just let pass."""
    other = {v: s for v, s in base.stores.items() if s.harm is None}
    options = _options(step, base, stores, network, other)
    for name in dict.fromkeys(store.name for store in stores):
        found = {v: o.store for v, own in options.items() for o in own if o.store is not None and o.store.name == name}
        yield Choice(base.repeats, dict(sorted({**other, **found}.items())))


def _options(
    step: Any, base: Choice, stores: Sequence[Store], network: Network, other: Any
) -> dict[int, list[_Option]]:
    """Return the ways to keep each value that a plan keeps and that may take a measured form."""
    survey = step.survey
    values, regions = survey.graph.values, survey.graph.regions
    started = {v for some in base.repeats.values() for op in some for v in survey.graph.ops[op].inputs}
    places: dict[int, list[int]] = {}
    for v, place in survey.read_later(base.repeats):
        if values[v].op is None or values[v].op.id not in base.repeats.get(place, ()):
            places.setdefault(v, []).append(place)
    found: dict[int, list[_Option]] = {}
    for store in stores:
        v = store.value
        if v in places and v not in other and all(network.serves(store, v, place) for place in places[v]):
            trips = regions[values[v].region].trips
            harm = store.repeated_harm if v in started else store.harm
            plain = [] if v in step.asked else [_Option(survey.bytes_of_value(v) * trips, 0.0, None)]
            if math.isfinite(harm):
                found.setdefault(v, plain).append(_Option(store.bytes * trips, harm, store))
    return found


def _corners(options: Sequence[_Option]) -> Iterator[tuple[_Option, _Option]]:
    """Yield the steps along the lower hull of harm over bytes, from the most bytes to the least."""
    here = min(options, key=lambda o: (o.harm, o.bytes)) if all(o.store for o in options) else options[0]
    while True:
        smaller = [o for o in options if o.bytes < here.bytes]
        if not smaller:
            return
        after = min(smaller, key=lambda o: ((o.harm - here.harm) / (here.bytes - o.bytes), o.bytes))
        yield here, after
        here = after


def _some(found: Sequence[Any], most: int) -> list[Any]:
    """Return so many of a sequence, evenly spaced, its ends among them."""
    if len(found) <= most:
        return list(found)
    return [found[round(k * (len(found) - 1) / (most - 1))] for k in range(most)]
