"""The sharding pass's tracker: where a parameter is used, through loops, casts, layouts and slices of it.

In: a step's `Flow`, `Roles` and `Rules`, a parameter and how it is stored. Out: the reads in which it meets data, and
its slices on the way there. Up to these nothing has to be brought together. Nothing is decided or changed here.
"""

from __future__ import annotations

from typing import Any

from memopt import _fusion
from memopt.passes._shard_flow import Flow, is_var, reshaped, shape_of
from memopt.passes._shard_roles import Dims, Roles
from memopt.passes._shard_rules import Rules, Spec


def uses(
    flow: Flow, roles: Roles, rules: Rules, leaf: Any, stored: Spec
) -> tuple[list[tuple[Any, int, Dims]], list[tuple[Any, Dims]]]:
    """Follow a parameter to where it is used.

    Args:
      flow, roles, rules: what the step is, and how its values are split.
      leaf: the parameter.
      stored: how it is stored.

    Returns:
      The reads where it meets data, each an equation, the operand, and its dimensions in the leaf, None for one that is
      only a part of one; and the slices of it that are cut at positions known at run time, with their dimensions.
    """
    found: list[tuple[Any, int, Dims]] = []
    slices: list[tuple[Any, Dims]] = []
    todo: list[tuple[Any, Dims]] = [(leaf, tuple(range(len(shape_of(leaf)))))]
    seen = {leaf}
    while todo:
        var, dims = todo.pop()
        for eqn, position, _ in flow.readers.get(var, ()):
            if id(eqn) in flow.inner:
                links = [x for x in flow.inner[id(eqn)][0] if x.outer is var]
                after: list[tuple[Any, Dims]] | None = [(x.inner, dims[1:] if x.sliced else dims) for x in links]
            elif any(v in roles.update for v in eqn.outvars):
                continue
            else:
                after = _views(eqn, position, dims, roles, rules, stored)
            if after is None:
                found.append((eqn, position, dims))
                continue
            slices += after if eqn.primitive.name == "dynamic_slice" else []
            for out, moved in after:
                if out not in seen:
                    seen.add(out)
                    todo.append((out, moved))
        for link in flow.outer_of.get(var, ()):
            if link.outer not in seen:
                seen.add(link.outer)
                todo.append((link.outer, (None, *dims) if link.sliced else dims))
    return found, slices


def _views(
    eqn: Any, position: int, dims: Dims, roles: Roles, rules: Rules, stored: Spec
) -> list[tuple[Any, Dims]] | None:
    """Return what an equation makes of a weight alone, with its dimensions; None where the weight is used.

    A slice along a dimension that is not split is such a thing: the slice alone is then gathered. So is a weight of
    which a dimension is cut in two, where the first of these is split as the dimension was.
    """
    name, var, outs = eqn.primitive.name, eqn.invars[position], [v for v in eqn.outvars if is_var(v)]
    if any(is_var(v) and v in roles.data for v in (*eqn.invars, *outs)) or name in _fusion.MATMULS:
        return None
    if name == "transpose":
        return [(v, tuple(dims[d] for d in eqn.params["permutation"])) for v in outs]
    if all(shape_of(v) == shape_of(var) for v in outs):
        return [(v, dims) for v in outs]
    if name == "reshape":
        after = _cut(shape_of(var), shape_of(outs[0]), dims, rules, stored)
        return None if after is None else [(outs[0], after)]
    if name == "dynamic_slice" and position == 0:
        pairs = list(zip(dims, shape_of(var), shape_of(outs[0]), strict=True))
        if all(before == after or dim is None or not stored[dim] for dim, before, after in pairs):
            return [(outs[0], tuple(dim if before == after else None for dim, before, after in pairs))]
    return None


def _cut(before: tuple[int, ...], after: tuple[int, ...], dims: Dims, rules: Rules, stored: Spec) -> Dims | None:
    """Return the dimensions of a weight that was cut along some of them, None where it was joined or lost its split."""
    if len(after) <= len(before) or 1 in after:
        return None
    found = reshaped(before, after, dims)
    sizes = dict(zip(found, after, strict=True))
    split = [d for d in dims if d is not None and stored[d]]
    return found if all(d in sizes and sizes[d] % rules.count(stored[d]) == 0 for d in split) else None
