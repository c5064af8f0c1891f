"""The pruner: dead code that JAX's own removal leaves standing, so that nothing kept serves it.

In: a flat closed jaxpr. Out: an equal one without dead code, in which also a `while` loop no longer carries what
nothing reads, a barrier no longer passes what nothing reads on, and a choice whose outcome is known is made. So
gradients that a step takes and then drops (frozen weights, accumulated beside the trained ones or replaced by zeros)
go, and with them what only they read. Everything else stays as it is; a gradient times zero stays, because zero times
infinity is not zero.

Source of the aim: Miao et al., "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient
Finetuning", 2024 (arXiv 2402.18789), graph pruning; there by rules for each operator, here on dataflow.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from memopt import _compat as c


def prune(closed: Any) -> tuple[Any, bool]:
    """Return an equal flat closed jaxpr without dead code, and whether any of it is more than what JAX removes."""
    base, further = c.open_jaxpr(closed), False
    while True:
        base, _ = c.dce(base)
        pruned = _pruned(base)
        if pruned is base:
            return c.close(base, c.jaxpr_consts(closed)), further
        base, further = pruned, True


def _pruned(jaxpr: Any) -> Any:
    """Return an open jaxpr with one round of its choices made and its barriers and loops cut; the same without any."""
    renamed: dict[Any, Any] = {}
    read = collections.Counter(v for eqn in jaxpr.eqns for v in set(_variables(eqn.invars)))
    read.update(set(_variables(jaxpr.outvars)))
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    eqns = []
    for eqn in jaxpr.eqns:
        if any(v in renamed for v in _variables(eqn.invars)):
            eqn = c.replace_eqn(eqn, invars=_renamed(eqn.invars, renamed))
        taken = _taken(eqn, makers)
        if taken is not None:
            renamed[eqn.outvars[0]] = taken
            continue
        used = [read[v] > 0 for v in eqn.outvars]
        if not all(used) and eqn.primitive is c.optimization_barrier_p:
            eqn = _lean_barrier(eqn, used, read)
        elif not all(used) and eqn.primitive.name == "while":
            eqn = _lean_while(eqn, used)
        eqns.append(c.map_bodies(eqn, _pruned_body) if _has_bodies(eqn) else eqn)
    if not renamed and all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True)):
        return jaxpr
    return c.rebuild(jaxpr, eqns=eqns, outvars=_renamed(jaxpr.outvars, renamed))


def _has_bodies(eqn: Any) -> bool:
    return eqn.primitive.name in ("scan", "while", "cond", "shard_map")


def _pruned_body(body: Any) -> Any:
    base = c.open_jaxpr(body)
    pruned = _pruned(base)
    if pruned is base:
        return body
    return c.close(pruned, c.jaxpr_consts(body)) if isinstance(body, c.ClosedJaxpr) else pruned


def _taken(eqn: Any, makers: dict[Any, Any]) -> Any | None:
    """Return what a choice with a known predicate takes, where it has the type of the result."""
    if eqn.primitive.name != "select_n" or not c.guardable(eqn.outvars[0]):
        return None
    which = _known(eqn.invars[0], makers)
    if which is None:
        return None
    case = eqn.invars[1 + which]
    return case if isinstance(case, c.Var) and case.aval == eqn.outvars[0].aval else None


def _known(atom: Any, makers: dict[Any, Any]) -> int | None:
    """Return the number that a predicate is everywhere, where it is written in the step."""
    if isinstance(atom, c.Literal):
        return int(atom.val) if np.ndim(atom.val) == 0 else None
    maker = makers.get(atom)
    return _known(maker.invars[0], makers) if maker is not None and maker.primitive.name == "broadcast_in_dim" else None


def _lean_barrier(eqn: Any, used: Sequence[bool], read: collections.Counter[Any]) -> Any:
    """Return a barrier without what it alone reads and nothing reads on; what others read it may be tied to."""
    kept = [u or isinstance(v, c.Literal) or read[v] > 1 for v, u in zip(eqn.invars, used, strict=True)]
    return eqn if all(kept) else c.replace_eqn(eqn, invars=_only(eqn.invars, kept), outvars=_only(eqn.outvars, kept))


def _lean_while(eqn: Any, used: Sequence[bool]) -> Any:
    """Return a `while` that carries only what is used, what its condition reads, and what these are made of."""
    p, count = eqn.params, len(eqn.outvars)
    tests, consts = p["cond_nconsts"], p["body_nconsts"]
    condition, asked = c.dce_inputs(p["cond_jaxpr"], [True])
    live = [a or b for a, b in zip(used, asked[tests:], strict=True)]
    while True:
        body, needed = c.dce_inputs(p["body_jaxpr"], live)
        wider = [a or b for a, b in zip(live, needed[consts:], strict=True)]
        if wider == live:
            break
        live = wider
    if all(live):
        return eqn
    body = _with_inputs(p["body_jaxpr"], body, needed, [*needed[:consts], *live])
    condition = _with_inputs(p["cond_jaxpr"], condition, asked, [*[True] * tests, *live])
    params = dict(p, cond_jaxpr=condition, body_jaxpr=body, body_nconsts=sum(needed[:consts]))
    given, init = eqn.invars[tests : tests + consts], eqn.invars[len(eqn.invars) - count :]
    invars = [*eqn.invars[:tests], *_only(given, needed[:consts]), *_only(init, live)]
    return c.replace_eqn(eqn, invars=invars, outvars=_only(eqn.outvars, live), params=params)


def _with_inputs(body: Any, lean: Any, has: Sequence[bool], wanted: Sequence[bool]) -> Any:
    """Return a lean body, closed as before, whose inputs are the wanted ones: some of which it may not read."""
    own = iter(lean.invars)
    invars = [next(own) if here else v for v, here in zip(c.open_jaxpr(body).invars, has, strict=True)]
    return c.close(c.rebuild(lean, invars=_only(invars, wanted)), c.jaxpr_consts(body))


def _only(items: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [item for item, is_wanted in zip(items, wanted, strict=True) if is_wanted]


def _renamed(atoms: Sequence[Any], renamed: dict[Any, Any]) -> list[Any]:
    return [v if isinstance(v, c.Literal) else renamed.get(v, v) for v in atoms]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, c.Literal)]
