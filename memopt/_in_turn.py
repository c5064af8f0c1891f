"""The turnstile: stored leaves go through the step one after the other.

In: a flat closed jaxpr and which of its inputs belong to one stored leaf. Out: an equal one in which a leaf is decoded
only when the results of the leaf before it are done, tied by `optimization_barrier`s. So XLA holds one decoded leaf (or
those that make one result together) at a time and not all of them. It knows no codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memopt import _compat as c

#: A result that more leaves than this have an effect on, such as a norm over all of them, ties no leaves together.
_TOGETHER = 8


def stored_leaves(paths: Sequence[str], mark: str) -> dict[str, list[int]]:
    """Return the inputs of each stored leaf, by its path: a node with a child of this name, and its other children."""
    nodes = [path[: -len(mark)] for path in paths if path.endswith(mark)]
    return {node: [i for i, p in enumerate(paths) if p.startswith(node + ".")] for node in nodes}


def in_turn(closed: Any, leaves: Sequence[Sequence[int]]) -> Any:
    """Return an equal closed jaxpr in which groups of leaves follow each other.

    Args:
      closed: closed jaxpr, flat.
      leaves: for each stored leaf the numbers of its inputs.
    """
    base = c.open_jaxpr(closed)
    units = _units(base, leaves)
    if len(units) < 2:
        return closed
    eqns, outvars = list(base.eqns), list(base.outvars)
    renamed: dict[Any, Any] = {}
    barriers: list[Any] = []
    for (_, done), (inputs, _) in zip(units, units[1:], strict=False):
        waiting = [base.invars[i] for i in inputs]
        made = [v for k in done if c.guardable(v := base.outvars[k])]
        eqn, outs = c.barrier_eqn([*made, *waiting], eqns[0])
        renamed.update(zip(waiting, outs[len(made) :], strict=True))
        after = dict(zip(made, outs, strict=False))
        for k in done:
            outvars[k] = _read(after, outvars[k])
        barriers.append(eqn)
    return c.close(c.rebuild(base, eqns=_sorted(eqns, renamed, barriers), outvars=outvars), c.jaxpr_consts(closed))


def _units(base: Any, leaves: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Return `(inputs, outputs)` of each group of leaves that make results together, first the one ready first.

    A group is ready when what its leaves are used with is there: a backward pass makes the last layer's gradients
    first, and none of them should have to wait for the first layer's.
    """
    reach: dict[Any, frozenset[int]] = {}
    ready: dict[Any, int] = {}
    for number, places in enumerate(leaves):
        reach.update((base.invars[i], frozenset([number])) for i in places)
    for place, eqn in enumerate(base.eqns):
        read = [v for v in eqn.invars if not isinstance(v, c.Literal)]
        found = frozenset().union(*(reach.get(v, ()) for v in read))
        when = max((ready.get(v, -1) for v in read), default=-1) if found else place
        ready.update((v, when) for v in eqn.outvars)
        if found:
            reach.update((v, found) for v in eqn.outvars)
    inputs = set(base.invars)
    results = [
        (k, reach[v])
        for k, v in enumerate(base.outvars)
        if not isinstance(v, c.Literal) and v in reach and v not in inputs and len(reach[v]) <= _TOGETHER
    ]
    group = list(range(len(leaves)))
    for _, own in results:
        least = min(_root(group, n) for n in own)
        for n in own:
            group[_root(group, n)] = least
    members: dict[int, tuple[list[int], list[int]]] = {}
    for number, places in enumerate(leaves):
        members.setdefault(_root(group, number), ([], []))[0].extend(places)
    for k, own in results:
        members[_root(group, min(own))][1].append(k)
    units = [unit for _, unit in sorted(members.items()) if unit[1]]
    return sorted(units, key=lambda unit: max(ready[base.outvars[k]] for k in unit[1]))


def _root(group: list[int], number: int) -> int:
    while group[number] != number:
        number = group[number]
    return number


def _sorted(eqns: Sequence[Any], renamed: dict[Any, Any], barriers: Sequence[Any]) -> list[Any]:
    """Return the equations, reading renamed inputs, with the barriers among them, in an order that dataflow allows."""
    todo = [c.replace_eqn(e, invars=[_read(renamed, v) for v in e.invars]) if _hit(renamed, e) else e for e in eqns]
    makers = {v: e for e in [*todo, *barriers] for v in e.outvars if not isinstance(v, c.DropVar)}
    out: list[Any] = []
    done: set[int] = set()
    for start in [*todo, *barriers]:
        stack = [start]
        while stack:
            eqn = stack[-1]
            needs = [makers[v] for v in eqn.invars if not isinstance(v, c.Literal) and v in makers]
            missing = [m for m in needs if id(m) not in done]
            if missing and id(eqn) not in done:
                stack += missing
                continue
            stack.pop()
            if id(eqn) not in done:
                done.add(id(eqn))
                out.append(eqn)
    return out


def _hit(renamed: dict[Any, Any], eqn: Any) -> bool:
    return any(not isinstance(v, c.Literal) and v in renamed for v in eqn.invars)


def _read(names: dict[Any, Any], atom: Any) -> Any:
    return atom if isinstance(atom, c.Literal) else names.get(atom, atom)
