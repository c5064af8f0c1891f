"""The sharding pass's plan: which values are constrained, which weights are gathered where, what each leaf becomes.

In: a step's `Flow`, `Roles` and `Rules`. Out: a `Places`, the constraints that `_shard_apply.py` puts into the jaxpr,
and the spec of every input and output. It changes nothing and knows no mesh but its sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from memopt import _compat as c
from memopt import _fusion
from memopt.passes import _shard_sums, _shard_uses
from memopt.passes._shard_flow import Flow, is_float, is_var, shape_of
from memopt.passes._shard_roles import BATCH, MOMENT, PARAMETER, Roles
from memopt.passes._shard_rules import Rules, Spec

_LOOKUPS = frozenset({"gather", "take", "dynamic_slice"})
_SCATTERS = frozenset({"scatter-add", "scatter_add"})
_CUTS = frozenset({"dynamic_slice", "dynamic_update_slice"})


@dataclasses.dataclass
class Places:
    """Constraints to be put into a step.

    Attributes:
      made: variable -> specs, one after the other, right after it is made.
      used: (id of an equation, operand) -> specs of the operand at this use, one after the other.
      results: output -> specs, one after the other, at the end.
      inputs: spec of each input.
      outputs: spec of each output; None leaves it to XLA.
      gathered: bytes of weights brought together next to their uses, once for each gather in the step as written.
      joined: (id of a loop, operand) -> the axes along which this operand's sequence is brought together before it.
    """

    made: dict[Any, tuple[Spec, ...]] = dataclasses.field(default_factory=dict)
    used: dict[tuple[int, int], tuple[Spec, ...]] = dataclasses.field(default_factory=dict)
    results: dict[int, tuple[Spec, ...]] = dataclasses.field(default_factory=dict)
    inputs: list[Spec] = dataclasses.field(default_factory=list)
    outputs: list[Spec | None] = dataclasses.field(default_factory=list)
    gathered: int = 0
    joined: dict[tuple[int, int], tuple[str, ...]] = dataclasses.field(default_factory=dict)


def places(flow: Flow, roles: Roles, rules: Rules) -> Places:
    """Decide where a step is constrained."""
    found = Places()
    found.inputs = [rules.leaf(i) for i in range(len(flow.jaxpr.invars))]
    for var, spec in zip(flow.jaxpr.invars, found.inputs, strict=True):
        if any(spec):
            found.made[var] = (spec,)
    _activations(flow, roles, rules, found)
    _gradients(flow, roles, rules, found)
    _weights(flow, roles, rules, found)
    _outputs(flow, roles, rules, found)
    return found


def _activations(flow: Flow, roles: Roles, rules: Rules, found: Places) -> None:
    """Hold matmul results and what loops carry to the split of their groups."""
    whole: dict[Any, Spec] = {}
    for body in flow.bodies:
        for eqn in body.eqns:
            if eqn.primitive.name in _fusion.MATMULS or _sums_parts(eqn, rules):
                _hold(eqn.outvars[0], roles, rules, found)
            elif eqn.primitive.name == "scan":
                _join(eqn, roles, rules, found, whole)
            elif eqn.primitive.name == "gather":
                _pick(eqn, roles, rules, found)
    for after, first in flow.carried.items():
        if first in whole:
            found.made[first] = found.made[after] = (whole[first],)
        else:
            _hold(first, roles, rules, found)


def _sums_parts(eqn: Any, rules: Rules) -> bool:
    """Say whether an equation adds up rows of features over a dimension that devices split."""
    if eqn.primitive.name != "reduce_sum" or not is_var(eqn.invars[0]):
        return False
    outer = rules.batch_groups | rules.sequence_groups
    gone = {rules.groups.of(eqn.invars[0], d) for d in eqn.params["axes"]}
    return any(g in rules.tensor for g in gone) and any(g not in outer for g in rules.groups.all_of(eqn.outvars[0]))


def _join(eqn: Any, roles: Roles, rules: Rules, found: Places, whole: dict[Any, Spec]) -> None:
    """Bring together before a loop what its trips read whole along the sequence, or cut a part of the sequence from.

    XLA would bring it together in every trip. What the loop carries is put into `whole`.
    """
    body = c.open_jaxpr(eqn.params["jaxpr"])
    clashing = {axis for one in body.eqns if one.primitive.name in _fusion.MATMULS for _, axis in clashes(one, rules)}
    cut = _cut(body, rules)
    num_consts, num_carry = c.scan_layout(eqn)
    for position, (outer, inner) in enumerate(zip(eqn.invars, body.invars[: num_consts + num_carry], strict=False)):
        axes = cut.get(inner, set())
        if position < num_consts:
            axes = axes | _split(inner, rules, sequence=True) & clashing
        if not axes and not (inner in cut and any(cut.values())):
            continue
        spec = tuple(tuple(a for a in one if a not in axes) for one in rules.value(inner))
        if position >= num_consts and inner not in roles.gradients:
            whole[inner] = spec
            result = eqn.outvars[position - num_consts]
            found.made[result] = (spec, rules.value(result))  # else XLA splits what is carried as its readers want it
        if is_var(outer) and outer in roles.data:
            found.used[id(eqn), position] = (spec,)
            if axes:
                found.joined[id(eqn), position] = tuple(sorted(axes))


def _cut(body: Any, rules: Rules) -> dict[Any, set[str]]:
    """Return the variables from which a body cuts parts at places that it works out; with the axes of the sequence."""
    found: dict[Any, set[str]] = {}
    for eqn in body.eqns:
        if eqn.primitive.name in _CUTS and is_var(eqn.invars[0]):
            var = eqn.invars[0]
            part = eqn.outvars[0] if eqn.primitive.name == "dynamic_slice" else eqn.invars[1]
            shorter = (own < size for own, size in zip(shape_of(part), shape_of(var), strict=True))
            dims = zip(shorter, rules.groups.all_of(var), rules.value(var), strict=True)
            axes = {a for cut, group, axes in dims if cut and group in rules.sequence_groups for a in axes}
            found.setdefault(var, set()).update(axes)
    return found


def _pick(eqn: Any, roles: Roles, rules: Rules, found: Places) -> None:
    """Pick one feature of each row where the features are split: whole rows of indices meet parts of all features.

    Else XLA splits what is picked from along the sequence first, such as logits.
    """
    source, indices = eqn.invars[:2]
    if not is_var(source) or source not in roles.data or not is_var(indices):
        return
    gone = eqn.params["dimension_numbers"].collapsed_slice_dims
    axes = {a for d in gone for a in rules.value(source)[d]}
    if axes & _split(indices, rules, sequence=True):
        found.used[id(eqn), 1] = (tuple(tuple(a for a in one if a not in axes) for one in rules.value(indices)),)


def clashes(eqn: Any, rules: Rules) -> Iterator[tuple[Any, str]]:
    """Yield the operands of a matmul whose sequence an axis splits that splits features of the same matmul."""
    operands = [v for v in eqn.invars if is_var(v)]
    features = set().union(*(_split(v, rules, sequence=False) for v in (*operands, eqn.outvars[0])))
    for var in operands:
        yield from ((var, axis) for axis in sorted(_split(var, rules, sequence=True) & features))


def _split(var: Any, rules: Rules, *, sequence: bool) -> set[str]:
    """Return the axes that split a value's sequence, or those that split its other dimensions."""
    pairs = zip(rules.groups.all_of(var), rules.value(var), strict=True)
    return {axis for group, axes in pairs if (group in rules.sequence_groups) is sequence for axis in axes}


def _hold(var: Any, roles: Roles, rules: Rules, found: Places) -> None:
    if not is_var(var) or var not in roles.data or not is_float(var) or var in roles.gradients:
        return
    spec = rules.value(var)
    if any(spec):
        found.made[var] = (spec,)


def _gradients(flow: Flow, roles: Roles, rules: Rules, found: Places) -> None:
    """Bring each gradient to the form in which it is kept, where it is made: inside loops too."""
    for var, (leaf, dims) in roles.gradients.items():
        stored = rules.stored(flow.jaxpr.invars[leaf], rules.layout.gradients)
        spec = tuple(() if d is None else stored[d] for d in dims)
        if len(spec) == len(shape_of(var)) and _divides(spec, var, rules):
            needed = rules.features(flow.jaxpr.invars[leaf])
            whole = tuple(() if d is None else needed[d] for d in dims)
            added_up = _shard_sums.is_added_up_whole(flow, var, whole, spec, rules)
            found.made[var] = (whole, spec) if added_up else (spec,)
            _scatter(flow, var, spec, rules, found)


def _divides(spec: Spec, var: Any, rules: Rules) -> bool:
    return all(size % rules.count(axes) == 0 for size, axes in zip(shape_of(var), spec, strict=True))


def _scatter(flow: Flow, var: Any, spec: Spec, rules: Rules, found: Places) -> None:
    """Bring what is added to rows of a table's gradient to its split along features, where that takes two moves."""
    eqn = flow.makers.get(var, (None, 0))[0]
    if eqn is None or eqn.primitive.name not in _SCATTERS:
        return
    numbers, updates = eqn.params["dimension_numbers"], eqn.invars[2]
    kept = [d for d in range(len(spec)) if d not in numbers.inserted_window_dims]
    if len(kept) != len(numbers.update_window_dims):
        return
    rows: list[tuple[str, ...]] = [()] * len(shape_of(updates))
    for dim, source in zip(numbers.update_window_dims, kept, strict=True):
        rows[dim] = spec[source]
    back = _moves(tuple(rows), rules.value(updates))[:-1][::-1]
    if back:
        found.used[id(eqn), 2] = (*back, tuple(rows))


def _weights(flow: Flow, roles: Roles, rules: Rules, found: Places) -> None:
    """Gather each parameter next to its uses, where it is stored in more parts than it is used in."""
    for i, var in enumerate(flow.jaxpr.invars):
        if roles.kinds[i] != PARAMETER or found.inputs[i] == rules.features(var):
            continue
        stored, needed = found.inputs[i], rules.features(var)
        uses, slices = _shard_uses.uses(flow, roles, rules, var, stored)
        for part, dims in slices:  # held as they are stored, or XLA brings all that they are cut from together for each
            found.made[part] = (tuple(() if d is None else stored[d] for d in dims),)
        for eqn, position, dims in uses:
            at_use = tuple(needed[d] if d is not None else () for d in dims)
            if eqn.primitive.name in _LOOKUPS and position == 0:
                _look_up(eqn, tuple(stored[d] if d is not None else () for d in dims), at_use, rules, found)
                continue
            found.used[id(eqn), position] = (at_use,)
            found.gathered += eqn.invars[position].aval.size * eqn.invars[position].aval.dtype.itemsize


def _look_up(eqn: Any, stored: Spec, at_use: Spec, rules: Rules, found: Places) -> None:
    """Look rows up in a table that is split along its features, without bringing the table together.

    The indices are brought together (they are small), the rows come out split along the features, and are then brought
    to their split over the batch: an all-to-all. Where words are split, each device looks up its own, and rows are
    added up.
    """
    out = eqn.outvars[0]
    numbers = eqn.params.get("dimension_numbers")
    offsets = getattr(numbers, "offset_dims", ())
    gone = {*getattr(numbers, "collapsed_slice_dims", ()), *getattr(numbers, "operand_batching_dims", ())}
    kept = [d for d in range(len(stored)) if d not in gone]
    words = {a for d in gone for a in stored[d]}
    if len(kept) != len(offsets) or not any(stored[d] for d in kept):
        found.used[id(eqn), 0] = (at_use,)
        return
    # What devices with other words add up may be left split along the sequence.
    rows = [axes if axes and words.issuperset(axes) else () for axes in rules.value(out)]
    for dim, source in zip(offsets, kept, strict=True):
        rows[dim] = stored[source]
    found.used[id(eqn), 1] = (((),) * len(shape_of(eqn.invars[1])),)
    found.made[out] = (tuple(rows), *_moves(tuple(rows), rules.value(out)))


def _moves(start: Spec, end: Spec) -> list[Spec]:
    """Return the specs on the way from rows split along features to rows split along the batch and the sequence.

    An all-to-all moves what is innermost in the features: axes that go to two dimensions take two.
    """
    steps: list[Spec] = []
    here = [tuple(axes) for axes in start]
    features = max(range(len(start)), key=lambda d: len(start[d]))
    while here[features]:
        last = here[features][-1]
        dim = next((d for d, axes in enumerate(end) if last in axes and d != features), None)
        moved = () if dim is None else tuple(a for a in end[dim] if a in here[features])
        if not moved or here[features][-len(moved) :] != moved or here[dim]:
            break
        more = tuple(a for a in end[dim] if a not in moved)
        if end[dim] != (*more, *moved):
            break
        if more:  # each device has these rows already: it drops the others
            here[dim] = more
            steps.append(tuple(here))
        here[features], here[dim] = here[features][: -len(moved)], end[dim]
        steps.append(tuple(here))
    return steps if steps and steps[-1] == end else [*steps, end]


def _outputs(flow: Flow, roles: Roles, rules: Rules, found: Places) -> None:
    """Bring new parameters and state to the form in which they came in; the update runs in the form of the moments."""
    back = {o: i for i, o in roles.result_of.items()}
    for o, var in enumerate(flow.jaxpr.outvars):
        i = back.get(o)
        if i is None or roles.kinds[i] in (BATCH,) or not is_var(var):
            found.outputs.append(None)
            continue
        spec = found.inputs[i]
        found.outputs.append(spec)
        leaf = flow.jaxpr.invars[i]
        if roles.kinds[i] == PARAMETER:
            update = rules.stored(leaf, rules.layout.moments)
            found.results[o] = (update, spec) if update != spec and var in roles.update else (spec,)
        elif roles.kinds[i] == MOMENT:
            found.results[o] = (spec,)
        else:
            found.results[o] = (spec,)
