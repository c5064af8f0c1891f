"""The sharding pass's tariff: what a layout's collectives take, on the links of a mesh.

In: a step's `Flow`, its `Rules` and `Places`, the target. Out: predicted seconds of one step's collectives. Gathers of
weights, sums over a split contraction (scattered where the result is kept split over the same axes), gathers of a
split sequence between the parts of `"tensor"`, the traffic of lookups and the new parameters' gathers are counted; a
resharding that XLA adds on its own account is not. Nothing is changed here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from memopt import _compat as c
from memopt import _fusion
from memopt._links import axis_bytes_per_second
from memopt._target import Target
from memopt.passes._shard_flow import Flow, is_var, shape_of
from memopt.passes._shard_places import Places, clashes
from memopt.passes._shard_rules import Rules, Spec


@dataclasses.dataclass
class Sent:
    """What one device sends in a step by one kind of collective: bytes, seconds on the links, and along which axes."""

    bytes: float = 0.0
    seconds: float = 0.0
    axes: set[str] = dataclasses.field(default_factory=set)


def collective_seconds(flow: Flow, rules: Rules, found: Places, target: Target) -> float:
    """Return the predicted seconds of a step's collectives under one layout, one after the other."""
    return sum(one.seconds for one in sent_by_kind(flow, rules, found, target).values())


def sent_by_kind(flow: Flow, rules: Rules, found: Places, target: Target) -> dict[str, Sent]:
    """Return what one device is predicted to send in a step, by the kind of collective."""
    total = math.prod(rules.sizes.values())
    kinds: dict[str, Sent] = {}
    for kind, axes, size in _sent(flow, rules, found):
        if axes and size:
            one = kinds.setdefault(kind, Sent())
            one.bytes += size
            one.seconds += size / axis_bytes_per_second(target, rules.count(axes), total)
            one.axes.update(axes)
    return kinds


def _sent(flow: Flow, rules: Rules, found: Places) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield a kind of collective, the axes that a device sends along, and the bytes that it sends."""
    once: set[tuple[Any, str]] = set()  # constants of loops that were brought together before them
    for body in flow.bodies:
        trips = flow.trips[id(body)]
        joined = set(once)  # operands of this body that were brought together along an axis
        for eqn in body.eqns:
            for position, atom in enumerate(eqn.invars):
                specs = found.used.get((id(eqn), position))
                if (id(eqn), position) in found.joined:
                    axes = found.joined[id(eqn), position]
                    yield "all-gather", axes, _local(atom, specs[-1], rules) * _share(axes, rules) * trips
                    links = flow.inner[id(eqn)][0]
                    once |= {(link.inner, axis) for link in links if link.outer is atom for axis in axes}
                elif specs is not None and is_var(atom):
                    yield from _gathered(atom, specs[-1], rules, trips)
            if eqn.primitive.name in _fusion.MATMULS:
                yield from _summed(eqn, rules, found, trips)
                yield from _joined(eqn, rules, trips, joined)
            elif eqn.primitive.name == "gather" and len(found.made.get(eqn.outvars[0], ())) > 1:
                axes = rules.layout.batch
                yield "all-to-all", axes, 2 * _local(eqn.outvars[0], rules.value(eqn.outvars[0]), rules) * trips
            elif eqn.primitive.name == "shard_map":
                yield from _inside(c.open_jaxpr(eqn.params["jaxpr"]), rules, trips)
    for specs in found.results.values():
        if len(specs) > 1:
            axes = rules.layout.moments
            out = next(v for o, v in enumerate(flow.jaxpr.outvars) if found.results.get(o) is specs)
            yield "all-gather", axes, _local(out, specs[-1], rules) * _share(axes, rules)


def _inside(body: Any, rules: Rules, trips: int) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield what the body of a `shard_map` sends: its values are those of one device."""
    for eqn in body.eqns:
        name, length = eqn.primitive.name, eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for _, _, inner in c.subjaxprs(eqn.params):
            yield from _inside(c.open_jaxpr(inner), rules, trips * length)
        if name in ("ppermute", "all_to_all"):
            named = eqn.params["axis_name"]
            axes = tuple(named) if isinstance(named, (tuple, list)) else (named,)
            size = sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars if is_var(v)) * trips
            permuted = name == "ppermute"
            yield (
                "collective-permute" if permuted else "all-to-all",
                axes,
                size * (1 if permuted else _share(axes, rules)),
            )


def _gathered(atom: Any, spec: Spec, rules: Rules, trips: int) -> Iterator[tuple[str, tuple[str, ...], float]]:
    axes = tuple(a for a in rules.layout.parameters if not any(a in s for s in spec))
    if axes and atom.aval.size >= rules.least_elements:
        yield "all-gather", axes, _local(atom, spec, rules) * _share(axes, rules) * trips


def _summed(eqn: Any, rules: Rules, found: Places, trips: int) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield the traffic of the partial sums of a matmul: an axis that splits operands and not the result's own spec."""
    out = eqn.outvars[0]
    made = found.made.get(out, ())
    stored = {a for axes in (made[-1] if made else ()) for a in axes}
    own = set(rules.groups.all_of(out))
    summed = set()
    for v in filter(is_var, eqn.invars):
        pairs = zip(rules.groups.all_of(v), rules.value(v), strict=True)
        summed |= {axis for group, axes in pairs if group not in own for axis in axes}
    summed -= {axis for _, axis in clashes(eqn, rules)}
    spec = tuple(tuple(a for a in axes if a not in summed) for axes in rules.value(out))
    for axis in sorted(summed):
        scattered = axis in stored or (axis in rules.layout.gradients and _is_gradient(out, rules))
        size = (1 if scattered else 2) * _local(out, spec, rules) * _share((axis,), rules) * trips
        yield "reduce-scatter" if scattered else "all-reduce", (axis,), size


def _joined(
    eqn: Any, rules: Rules, trips: int, joined: set[tuple[Any, str]]
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield the gathers of a matmul's operands along an axis that splits the matmul otherwise, once in each body.

    Between the parts of `"tensor"` this is the sequence: of what goes into columns, and of cotangents of rows.
    """
    for var, axis in clashes(eqn, rules):
        if (var, axis) not in joined:
            joined.add((var, axis))
            spec = tuple(tuple(a for a in axes if a != axis) for axes in rules.value(var))
            yield "all-gather", (axis,), _local(var, spec, rules) * _share((axis,), rules) * trips


def _is_gradient(out: Any, rules: Rules) -> bool:
    """Say whether a matmul makes a parameter's gradient, perhaps transposed: it has none of the batch's groups."""
    return not any(g in rules.batch_groups for g in rules.groups.all_of(out))


def _share(axes: tuple[str, ...], rules: Rules) -> float:
    ways = rules.count(axes)
    return (ways - 1) / ways


def _local(var: Any, spec: Spec, rules: Rules) -> float:
    ways = rules.count([a for axes in spec for a in axes]) if len(spec) == len(shape_of(var)) else 1
    return var.aval.size * var.aval.dtype.itemsize / ways
