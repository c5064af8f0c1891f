"""The dumb waiter: loop constants that cost nothing to make are made inside the loop, where they fuse away.

In: an inlined closed jaxpr. Out: an equivalent one in which a `scan` no longer takes as an operand what a few cheap
element-wise operations make from scalars, iotas or much smaller arrays (causal masks, fill values, position tables);
those operations stand in its body instead. JAX hoists them out when it differentiates, and there they are whole arrays
that live as long as both loops. Everything else stays as it is.
"""

from __future__ import annotations

from typing import Any

from memopt import _compat as c
from memopt import _cost

_SINKABLE = frozenset(
    "broadcast_in_dim iota eq ne lt le gt ge and or not xor add sub mul neg select_n convert_element_type reshape "
    "squeeze expand_dims transpose max min".split()
)
LARGEST_CHAIN = 24  # operations
LEAST_RATIO = 16  # a constant is sunk if what it is made from is this many times smaller


def sink(closed: Any) -> Any:
    """Return an equivalent closed jaxpr with cheap loop constants made inside their loops, in nested bodies too."""
    base = c.open_jaxpr(closed)
    eqns, changed = _sink_eqns(base)
    return c.close(c.rebuild(base, eqns=eqns), c.jaxpr_consts(closed)) if changed else closed


def _sink_eqns(base: Any) -> tuple[list[Any], bool]:
    makers: dict[Any, Any] = {}
    out, changed = [], False
    for eqn in base.eqns:
        if eqn.primitive.name == "scan":
            new = _sink_into(eqn, makers)
            changed |= new is not eqn
            eqn = new
        elif eqn.primitive.name in _SINKABLE and not eqn.effects:
            makers[eqn.outvars[0]] = eqn
        out.append(eqn)
    return out, changed


def _sink_into(eqn: Any, makers: dict[Any, Any]) -> Any:
    body = sink(eqn.params["jaxpr"])
    num_consts, num_carry = c.scan_layout(eqn)
    chains = {}
    for i, var in enumerate(eqn.invars[:num_consts]):
        chain = None if isinstance(var, c.Literal) or var not in makers else _chain(var, makers)
        if chain is not None:
            chains[i] = chain
    if not chains:
        return eqn if body is eqn.params["jaxpr"] else c.replace_eqn(eqn, params=dict(eqn.params, jaxpr=body))
    base = c.open_jaxpr(body)
    leaves = list(dict.fromkeys(v for found, _ in chains.values() for v in found))
    inside = {v: c.Var(v.aval) for v in leaves}
    fresh = list(inside.values())
    eqns: list[Any] = []
    rename: dict[Any, Any] = {}
    for i, (_, chain) in chains.items():
        rename[base.invars[i]] = _copy(chain, inside, eqns)
    kept = [i for i in range(num_consts) if i not in chains]
    invars = [base.invars[i] for i in kept] + fresh + list(base.invars[num_consts:])
    eqns += [_renamed(e, rename) for e in base.eqns]
    outvars = [v if isinstance(v, c.Literal) else rename.get(v, v) for v in base.outvars]
    jaxpr = c.close(c.rebuild(base, invars=invars, outvars=outvars, eqns=eqns), c.jaxpr_consts(body))
    params = c.scan_params(eqn, jaxpr, len(kept) + len(leaves), num_carry)
    operands = [eqn.invars[i] for i in kept] + leaves + list(eqn.invars[num_consts:])
    return c.replace_eqn(eqn, invars=operands, params=params)


def _chain(var: Any, makers: dict[Any, Any]) -> tuple[list[Any], list[Any]] | None:
    """Return what a constant is made from and the operations that make it, in order, if they are few and cheap."""
    found: dict[int, Any] = {}
    leaves: dict[Any, None] = {}
    stack = [var]
    while stack:
        one = stack.pop()
        maker = makers.get(one)
        if maker is None:
            leaves[one] = None
            continue
        if id(maker) in found:
            continue
        found[id(maker)] = maker
        if len(found) > LARGEST_CHAIN:
            return None
        stack += [v for v in maker.invars if not isinstance(v, c.Literal)]
    if sum(_cost.aval_bytes(v.aval) for v in leaves) * LEAST_RATIO > _cost.aval_bytes(var.aval):
        return None
    return list(leaves), _ordered(var, makers)


def _ordered(var: Any, makers: dict[Any, Any]) -> list[Any]:
    order: dict[int, Any] = {}
    stack: list[tuple[Any, bool]] = [(var, False)]
    while stack:
        one, done = stack.pop()
        maker = makers.get(one)
        if maker is None or id(maker) in order:
            continue
        if done:
            order[id(maker)] = maker
            continue
        stack.append((one, True))
        stack += [(v, False) for v in maker.invars if not isinstance(v, c.Literal)]
    return list(order.values())


def _copy(chain: list[Any], inside: dict[Any, Any], eqns: list[Any]) -> Any:
    for eqn in chain:
        if eqn.outvars[0] not in inside:
            inside_vars = [v if isinstance(v, c.Literal) else inside[v] for v in eqn.invars]
            inside[eqn.outvars[0]] = c.Var(eqn.outvars[0].aval)
            eqns.append(c.replace_eqn(eqn, invars=inside_vars, outvars=[inside[eqn.outvars[0]]]))
    return inside[chain[-1].outvars[0]]


def _renamed(eqn: Any, rename: dict[Any, Any]) -> Any:
    if not any(not isinstance(v, c.Literal) and v in rename for v in eqn.invars):
        return eqn
    return c.replace_eqn(eqn, invars=[v if isinstance(v, c.Literal) else rename.get(v, v) for v in eqn.invars])
