"""The dispatch desk: equations with bodies, rebuilt so that more goes into their bodies and more comes out.

In: an operation with bodies (a loop, a `cond`, a `shard_map`), its bodies as they were built anew, and the variables of
these bodies that later bodies want to read. Out: the equation with these operands and results. A loop hands a value out
as a stack of its slices; a branch as it is, the other branches then filling in zeros; a `shard_map` as one array of all
devices' values. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _paired, _pairs

_EVERYWHERE = jax.sharding.PartitionSpec()


def slices(eqn: Any) -> bool:
    """Say whether what an equation's body hands out is read back slice by slice."""
    return eqn.primitive.name == "scan"


def sliced(eqn: Any) -> range:
    """Return the operands that an equation's body reads slice by slice."""
    return range(sum(c.scan_layout(eqn)), len(eqn.invars)) if slices(eqn) else range(0)


def layout(eqn: Any, operand: int | None, aval: Any) -> Any | None:
    """Return how an operand of a `shard_map`, or a value that it hands out, is spread over the mesh; else None."""
    if eqn.primitive.name != "shard_map":
        return None
    return c.handing_spec(eqn, aval) if operand is None else eqn.params["in_specs"][operand]


def hands_out(eqn: Any, position: int, aval: Any) -> bool:
    """Say whether an equation's result is there to be read, as each body's own value."""
    if isinstance(eqn.outvars[position], c.DropVar):
        return False
    return eqn.primitive.name != "shard_map" or eqn.params["out_specs"][position] == c.handing_spec(eqn, aval)


def handed_aval(eqn: Any, aval: Any) -> Any:
    """Return the type of what hands a value of a body out."""
    if eqn.primitive.name == "shard_map":
        return c.gathered_aval(eqn, brought_aval(eqn, aval))
    return c.stacked_aval(aval, eqn.params["length"]) if slices(eqn) else aval


def brought_aval(eqn: Any, aval: Any) -> Any:
    """Return the type in which a value that is handed out comes into another body: a `shard_map` has no scalars."""
    scalar = eqn.primitive.name == "shard_map" and not aval.shape and c.handing_spec(eqn, aval) != _EVERYWHERE
    return c.stacked_aval(aval, 1) if scalar else aval


def constants_end(eqn: Any) -> int:
    """Return where further constants go among an equation's operands."""
    return c.scan_layout(eqn)[0] if slices(eqn) else len(eqn.invars)


def operands(op: Any, invars: Sequence[Any], consts: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
    """Return all operands: the old ones that are still read as such, and the new ones."""
    kept = [(i, v) for i, v in enumerate(invars) if i not in op.mapped]
    end = constants_end(op.eqn)
    return [*(v for i, v in kept if i < end), *consts, *(v for i, v in kept if i >= end), *xs]


def rebuild(eqn: Any, op: Any, inner: Sequence[Any], extra: Sequence[tuple[int, Any, Any]]) -> Any:
    """Return an equation over its new bodies.

    Args:
      eqn: the equation, with its new operands.
      op: the operation as it was.
      inner: its bodies as they were built.
      extra: `(region of a body, variable in it, the variable that hands it out)`; two bodies may hold one variable.
    """
    if slices(eqn):
        return _loop(eqn, op, inner[0], extra)
    if eqn.primitive.name == "shard_map":
        return _shard_map(eqn, op, inner[0], extra)
    shift = _paired.first_operand(op.eqn)
    new = []
    for old, body in zip(_paired.bodies(op.eqn), inner, strict=True):
        kept = [v for i, v in enumerate(c.open_jaxpr(old).invars) if i + shift not in op.mapped]
        come = [v if one is body else c.Var(v.aval) for one in inner for v, _ in one.new_consts]
        fills, outs = _outs(body, op, extra)
        new.append(_closed_like(old, [*fills, *body.eqns], body.outs + outs, kept + come))
    key = _paired.BODIES[op.eqn.primitive.name]
    params = dict(op.eqn.params, **{key: tuple(new) if isinstance(op.eqn.params[key], tuple) else new[0]})
    return c.replace_eqn(eqn, outvars=[*eqn.outvars, *(out for _, _, out in extra)], params=params)


def _shard_map(eqn: Any, op: Any, inner: Any, extra: Sequence[tuple[int, Any, Any]]) -> Any:
    old = list(enumerate(c.open_jaxpr(op.bodies[0].jaxpr).invars))
    kept = [(i, v) for i, v in old if i not in op.mapped]
    new = [v for v, _ in inner.new_consts]
    in_specs = [op.eqn.params["in_specs"][i] for i, _ in kept] + [inner.specs[v] for v in new]
    out_specs = [*op.eqn.params["out_specs"], *(c.handing_spec(op.eqn, var.aval) for _, var, _ in extra)]
    outs, eqns = list(inner.outs), list(inner.eqns)
    for _, var, _ in extra:
        out = c.Var(brought_aval(op.eqn, var.aval))
        if out.aval.shape != var.aval.shape:
            eqns.append(_pairs.reshape(var, out, op.eqn))
        outs.append(out if out.aval.shape != var.aval.shape else var)
    jaxpr = _closed_like(op.bodies[0].jaxpr, eqns, outs, [v for _, v in kept] + new)
    params = dict(op.eqn.params, jaxpr=jaxpr, in_specs=tuple(in_specs), out_specs=tuple(out_specs))
    return c.replace_eqn(eqn, outvars=[*eqn.outvars, *(out for _, _, out in extra)], params=params)


def _outs(body: Any, op: Any, extra: Sequence[tuple[int, Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Return what a body hands out beyond its own results, and the equations that fill in for other bodies' values."""
    fills, outs = [], []
    for region, var, _ in extra:
        if region == body.region.id:
            outs.append(var)
            continue
        zero = c.Literal(np.zeros((), var.aval.dtype), c.ShapedArray((), var.aval.dtype))
        if var.aval.shape == ():
            outs.append(zero)
            continue
        params = {"shape": var.aval.shape, "broadcast_dimensions": (), "sharding": None}
        out = c.Var(c.ShapedArray(var.aval.shape, var.aval.dtype))
        primitive = jax.lax.broadcast_in_dim_p
        fills.append(c.new_eqn([zero], [out], primitive, params, c.no_effects, op.eqn.source_info, op.eqn.ctx))
        outs.append(out)
    return fills, outs


def _loop(eqn: Any, op: Any, inner: Any, extra: Sequence[tuple[int, Any, Any]]) -> Any:
    num_consts, num_carry = c.scan_layout(op.eqn)
    old = list(enumerate(c.open_jaxpr(op.bodies[0].jaxpr).invars))
    kept = [(i, v) for i, v in old if i not in op.mapped]
    consts = [v for i, v in kept if i < num_consts] + [v for v, _ in inner.new_consts]
    rest = [v for i, v in kept if i >= num_consts] + [v for v, _ in inner.new_xs]
    jaxpr = _closed_like(op.bodies[0].jaxpr, inner.eqns, inner.outs + [var for _, var, _ in extra], consts + rest)
    params = c.scan_params(op.eqn, jaxpr, len(consts), num_carry)
    return c.replace_eqn(eqn, outvars=[*eqn.outvars, *(out for _, _, out in extra)], params=params)


def _closed_like(old: Any, eqns: list[Any], outs: list[Any], invars: list[Any]) -> Any:
    jaxpr = c.rebuild(c.open_jaxpr(old), invars=invars, outvars=outs, eqns=eqns)
    return c.close(jaxpr, c.jaxpr_consts(old)) if isinstance(old, c.ClosedJaxpr) else jaxpr
