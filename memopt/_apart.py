"""The two ends of a corridor: forward and backward batched matmuls read a projection by names of their own.

In: a flat closed jaxpr. Out: an equal one in which what batched matmuls of the backward pass read of a forward
projection (queries, keys and values of attention: views of a matmul's result) are views of that result behind a
barrier. XLA:TPU gives such operands a layout of the kernel's own; where forward and backward matmuls read one value it
makes that copy once and keeps it between them, beside the value itself (ViT-B on 128 images: 1.7 GiB of 7.7). The
barrier stands on the result and not on the view, whose layout it would fix. A stacked residual is never shared so:
loops are left alone.
"""

from __future__ import annotations

from typing import Any

from memopt import _compat as c

_VIEWS = frozenset({"reshape", "split", "slice", "squeeze", "transpose", "convert_element_type", "name"})
_LONGEST = 8  # views between a projection and what reads it


def apart(closed: Any) -> Any:
    """Return an equal closed jaxpr whose backward batched matmuls read forward projections behind barriers."""
    base = c.open_jaxpr(closed)
    makers = {var: eqn for eqn in base.eqns for var in eqn.outvars}
    forward: set[Any] = set()
    renamed: dict[Any, Any] = {}
    eqns: list[Any] = []
    for eqn in base.eqns:
        if is_batched(eqn):
            operands = [v for v in eqn.invars if not isinstance(v, c.Literal)]
            if not c.is_transposed(c.transforms(eqn)):
                forward.update(operands)
            else:
                for var in operands:
                    views = _views(var, makers) if var in forward and var not in renamed else None
                    if views is not None:
                        eqns += _again(views, renamed, eqn)
                operands = [v if isinstance(v, c.Literal) else renamed.get(v, v) for v in eqn.invars]
                eqn = c.replace_eqn(eqn, invars=operands)
        eqns.append(eqn)
    return c.close(c.rebuild(base, eqns=eqns), c.jaxpr_consts(closed)) if renamed else closed


def is_batched(eqn: Any) -> bool:
    """Whether an equation is a matmul with batch dimensions, as attention's are."""
    return eqn.primitive.name == "dot_general" and bool(eqn.params["dimension_numbers"][1][0])


def _views(var: Any, makers: dict[Any, Any]) -> list[Any] | None:
    """Return the views, first to last, that make a value of the result of an unbatched matmul; None for others."""
    found: list[Any] = []
    while (made := _maker(var, makers)) is not None and made.primitive.name in _VIEWS and len(found) < _LONGEST:
        found.append(made)
        var = made.invars[0]
    if made is not None and made.primitive.name == "add":  # a bias, on either side
        made = next((m for m in (_maker(v, makers) for v in made.invars) if m is not None and _is_projection(m)), None)
    return found[::-1] if found and made is not None and _is_projection(made) else None


def _maker(var: Any, makers: dict[Any, Any]) -> Any:
    return None if isinstance(var, c.Literal) else makers.get(var)


def _is_projection(eqn: Any) -> bool:
    return eqn.primitive.name == "dot_general" and not is_batched(eqn)


def _again(views: list[Any], renamed: dict[Any, Any], like: Any) -> list[Any]:
    """Return equations that make the views again behind a barrier, and note the new names."""
    eqns = []
    source = views[0].invars[0]
    if source not in renamed:
        barrier, (renamed[source],) = c.barrier_eqn([source], like)
        eqns.append(barrier)
    for view in views:
        if view.outvars[0] not in renamed:
            renamed |= {var: c.Var(var.aval) for var in view.outvars}
            outvars = [renamed[var] for var in view.outvars]
            eqns.append(c.replace_eqn(view, invars=[renamed[view.invars[0]], *view.invars[1:]], outvars=outvars))
    return eqns
