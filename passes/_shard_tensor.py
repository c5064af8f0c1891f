"""The sharding pass's column and row rules: which groups of features a set of mesh axes splits best.

In: a step's `Flow`, `Groups` and `Roles`, the number of devices, and rates. Out: the groups to split. A matmul whose
result carries such a group runs in parts (a column rule); one that contracts it makes partial sums, which cost an
all-reduce (a row rule); one that does neither is repeated on every device. The cheapest set of groups by these seconds
is the alternation of columns and rows that people write by hand, found without a name. Nothing is changed here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from memopt import _cost, _fusion
from memopt.passes._shard_flow import Flow, Groups, is_float, is_var, shape_of
from memopt.passes._shard_roles import PARAMETER, Roles

_MOST_EXACT = 10
_STARTS = 8
#: Share of the parameters that can be split that a set has to split.
_NEARLY = 0.9
_REDUCING = frozenset("reduce_sum reduce_max reduce_min reduce_prod argmax argmin".split())


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation as the search sees it: seconds, result bytes, groups of its result, groups that it sums over."""

    seconds: float
    bytes: float
    kept: frozenset[int]
    summed: frozenset[int]


def tensor_groups(
    flow: Flow,
    groups: Groups,
    roles: Roles,
    ways: int,
    taken: set[int],
    spec: Any,
) -> frozenset[int]:
    """Return the groups of features to split over `ways` devices.

    Args:
      flow, groups, roles: what the step is.
      ways: devices.
      taken: groups that are split otherwise: the batch, the sequence.
      spec: figures of one device, that weigh work against traffic.

    Of the sets that split nearly all parameters that can be split, the one with the fewest seconds.

    Raises:
      ValueError: no group of the parameters' dimensions divides.
    """
    works = list(_works(flow, groups, spec))
    multiplied = {g for work in works for g in work.kept | work.summed}
    candidates = _candidates(flow, groups, roles, ways, taken, multiplied)
    held = _held(flow, groups, roles)
    sets = _subsets(candidates, list(held))
    split = {s: sum(size for own, size in held.items() if own & s) for s in sets}
    most = max(split.values())
    sets = [s for s in sets if split[s] >= _NEARLY * most]
    best = min(sets, key=lambda s: (_seconds(works, s, ways, spec.link_bytes_per_second), sorted(s)))
    for group in candidates:  # what fits beside it splits more parameters
        if not any(len(own & (best | {group})) > 1 for own in held):
            best |= {group}
    return best


def _held(flow: Flow, groups: Groups, roles: Roles) -> dict[frozenset[int], int]:
    """Return the elements of all parameters of rank two or more, by the groups that they have."""
    held: dict[frozenset[int], int] = {}
    for var, kind in zip(flow.jaxpr.invars, roles.kinds, strict=True):
        if kind == PARAMETER and len(shape_of(var)) > 1:
            own = frozenset(g for g in groups.all_of(var) if g is not None)
            held[own] = held.get(own, 0) + var.aval.size
    return held


def _candidates(
    flow: Flow, groups: Groups, roles: Roles, ways: int, taken: set[int], multiplied: set[int]
) -> list[int]:
    """Return the groups of matmuls' and tables' dimensions that divide, those with most parameter bytes first."""
    weight: dict[int, int] = {}
    twice: set[int] = set()
    for var, kind in zip(flow.jaxpr.invars, roles.kinds, strict=True):
        if kind != PARAMETER or len(shape_of(var)) < 2:
            continue
        own = [g for g in groups.all_of(var) if g in multiplied and g not in taken]
        twice |= {g for g in own if own.count(g) > 1}
        for group in set(own):
            weight[group] = weight.get(group, 0) + var.aval.size
    found = {g: w for g, w in weight.items() if g not in twice and groups.divisor(g) % ways == 0}
    if not found:
        sizes = sorted({groups.divisor(g) for g in weight if g not in twice}, reverse=True)
        near = max([math.gcd(size, ways) for size in sizes], default=1)
        raise ValueError(
            f"Strategy 'tensor' over {ways} devices: no dimension of features divides by {ways} wherever it goes (they "
            f"divide by {sizes[:8] or 'nothing'}). Nearest: {near} devices along that axis, or 'zero3'."
        )
    return sorted(found, key=lambda g: (-found[g], g))


def _subsets(candidates: Sequence[int], held: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Return the sets to try, none with two groups of one parameter: all of a few groups, else greedy ones.

    A greedy set takes groups in order of their parameters' bytes while they fit; for each of the largest groups one
    starts after it, because the group of the residual stream fits nearly everywhere and excludes all others.
    """

    def fits(chosen: frozenset[int]) -> bool:
        return not any(len(own & chosen) > 1 for own in held)

    if len(candidates) <= _MOST_EXACT:
        sizes = range(1, len(candidates) + 1)
        return [s for n in sizes for s in map(frozenset, itertools.combinations(candidates, n)) if fits(s)]
    found = []
    for start in range(min(len(candidates), _STARTS)):
        chosen: frozenset[int] = frozenset()
        for group in candidates[start:]:
            chosen = chosen | {group} if fits(chosen | {group}) else chosen
        found.append(chosen)
    return found


def _works(flow: Flow, groups: Groups, spec: Any) -> Iterator[Work]:
    for body in flow.bodies:
        trips = flow.trips[id(body)]
        for eqn in body.eqns:
            name = eqn.primitive.name
            if name in _fusion.MATMULS:
                yield _matmul(eqn, groups, trips, spec)
            elif name == "gather" and is_var(eqn.invars[0]):
                gone = eqn.params["dimension_numbers"].collapsed_slice_dims
                rows = frozenset(g for d in gone if (g := groups.of(eqn.invars[0], d)) is not None)
                yield Work(0.0, _bytes(eqn.outvars[0]) * trips, frozenset(), rows)
            elif name in _REDUCING and is_float(eqn.invars[0]):
                size = _bytes(eqn.outvars[0]) * trips
                yield Work(0.0, size, frozenset(), _gone(eqn, groups))
            elif is_var(eqn.outvars[0]) if eqn.outvars else False:
                yield from _cuts(eqn, groups, trips)


def _matmul(eqn: Any, groups: Groups, trips: int, spec: Any) -> Work:
    out = eqn.outvars[0]
    kept = frozenset(g for g in groups.all_of(out) if g is not None)
    read = {g for v in eqn.invars if is_var(v) for g in groups.all_of(v) if g is not None}
    seconds = _cost.eqn_seconds(eqn, spec) * trips
    return Work(seconds, _bytes(out) * trips, kept, frozenset(read - kept))


def _gone(eqn: Any, groups: Groups) -> frozenset[int]:
    axes = eqn.params.get("axes", ())
    found = (groups.of(eqn.invars[0], d) for d in axes) if is_var(eqn.invars[0]) else ()
    return frozenset(g for g in found if g is not None)


def _cuts(eqn: Any, groups: Groups, trips: int) -> Iterator[Work]:
    """Yield the traffic of slicing or joining along a group: its parts lie on other devices."""
    out = eqn.outvars[0]
    for dim, group in enumerate(groups.all_of(out)):
        if group in groups.cut and eqn.primitive.name in ("slice", "concatenate", "split", "pad"):
            ranked = [v for v in eqn.invars if len(shape_of(v)) == len(shape_of(out))]
            if any(shape_of(v)[dim] != shape_of(out)[dim] for v in ranked):
                yield Work(0.0, 0.5 * _bytes(out) * len(eqn.outvars) * trips, frozenset(), frozenset({group}))


def _bytes(var: Any) -> float:
    return float(var.aval.size * var.aval.dtype.itemsize)


def _seconds(works: Sequence[Work], chosen: frozenset[int], ways: int, link: float) -> float:
    total = 0.0
    for work in works:
        kept, summed = bool(chosen & work.kept), bool(chosen & work.summed)
        total += work.seconds / ways if kept or summed else work.seconds
        if summed:
            total += 2 * work.bytes / (ways if kept else 1) / link
    return total
