"""The one room that touches `jax._src` and that knows JAX versions.

In: JAX's internals. Out: a small, stable vocabulary for jaxprs (types, constructors, scan layout, dead-code
elimination) that every other module of memopt uses. Nothing here knows about memory. Supported: JAX 0.10.2 (where
`ClosedJaxpr` wraps `Jaxpr`) to 0.12 (where they are one class and `scan` carries flat trees instead of counts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import core as _core
from jax._src import source_info_util as _siu
from jax._src.interpreters import partial_eval as _pe
from jax._src.lax import parallel as _parallel
from jax.extend import core as _xcore
from jax.extend.core import primitives

try:  # JAX >= 0.12: one class of flat trees describes a scan's operands
    from jax._src import flattree as _flattree
except ImportError:  # JAX 0.10
    _flattree = None

Var = _core.Var
Literal = _core.Literal
DropVar = _core.DropVar
Jaxpr = _core.Jaxpr
JaxprEqn = _core.JaxprEqn
ClosedJaxpr = _xcore.ClosedJaxpr
ShapedArray = _core.ShapedArray
Tracer = jax.core.Tracer
new_eqn = _core.new_jaxpr_eqn
no_effects = _core.no_effects
UNIFIED_JAXPR = Jaxpr is ClosedJaxpr or not hasattr(_core, "ClosedJaxpr")

optimization_barrier_p = jax.lax.optimization_barrier_p
closed_call_p = primitives.closed_call_p
#: Names of plain calls of a `call_jaxpr`; JAX 0.12 names `closed_call_p` anew, and binds it for `custom_vjp` too.
CLOSED_CALLS = ("closed_call", "core_closed_call", "eval_jaxpr")
#: Calls that XLA inlines: their equations run among the caller's own (so do those of a `shard_map`, on one part each).
INLINED_CALLS = frozenset(
    "jit pjit core_call call remat2 checkpoint remat custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_lin "
    "run_state".split()
).union(CLOSED_CALLS)
reduce_scatter_p = _parallel.reduce_scatter_p


def is_jaxpr(value: Any) -> bool:
    """Say whether a parameter value is a jaxpr, closed or open."""
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def open_jaxpr(value: Any) -> Any:
    """Return the open form (`constvars` and `eqns`) of a closed or open jaxpr."""
    return value.jaxpr if hasattr(value, "jaxpr") else value


def jaxpr_consts(value: Any) -> Sequence[Any]:
    """Return the constants closed over by a jaxpr; empty for an open one."""
    return getattr(value, "consts", ())


def close(jaxpr: Any, consts: Sequence[Any] = ()) -> Any:
    """Return a closed jaxpr from an open one and its constants."""
    return ClosedJaxpr(jaxpr, list(consts))


def rebuild(jaxpr: Any, *, constvars=None, invars=None, outvars=None, eqns=None) -> Any:
    """Return an open jaxpr with new parts, its effects computed again and debug names dropped where they do not fit."""
    base = open_jaxpr(jaxpr)
    eqns = list(base.eqns if eqns is None else eqns)
    invars = list(base.invars if invars is None else invars)
    outvars = list(base.outvars if outvars is None else outvars)
    constvars = list(base.constvars if constvars is None else constvars)
    debug = base.debug_info
    if len(invars) != len(base.invars) or len(outvars) != len(base.outvars):
        debug = debug.with_unknown_names()
    effects = _pe.make_jaxpr_effects(constvars, invars, outvars, eqns)
    return Jaxpr(constvars, invars, outvars, eqns, effects, debug)


def make_jaxpr_like(jaxpr: Any, constvars, invars, outvars, eqns) -> Any:
    """Return an open jaxpr of these parts with the debug information's function name of another one."""
    return rebuild(jaxpr, constvars=constvars, invars=invars, outvars=outvars, eqns=eqns)


def subjaxprs(params: dict[str, Any]) -> list[tuple[str, int | None, Any]]:
    """List the jaxprs in an equation's parameters as `(key, position in a tuple or None, jaxpr)`."""
    found = []
    for key, value in params.items():
        if is_jaxpr(value):
            found.append((key, None, value))
        elif isinstance(value, (tuple, list)):
            found.extend((key, i, item) for i, item in enumerate(value) if is_jaxpr(item))
    return found


def map_bodies(eqn: JaxprEqn, change: Callable[[Any], Any]) -> JaxprEqn:
    """Return the equation with `change` made to each jaxpr in its parameters; the very same where none changes."""
    bodies = [(key, place, body, change(body)) for key, place, body in subjaxprs(eqn.params)]
    if all(new is old for _, _, old, new in bodies):
        return eqn
    params = dict(eqn.params)
    for key, place, _, new in bodies:
        if place is None:
            params[key] = new
        else:
            params[key] = type(eqn.params[key])([*params[key][:place], new, *params[key][place + 1 :]])
    return replace_eqn(eqn, params=params)


def scan_layout(eqn: JaxprEqn) -> tuple[int, int]:
    """Return `(number of constants, number of carries)` of a `scan` equation."""
    if _flattree is None or "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_params(eqn: JaxprEqn, jaxpr: Any, num_consts: int, num_carry: int) -> dict[str, Any]:
    """Return the parameters of a `scan` like `eqn` over another body with this many constants and carries."""
    params = dict(eqn.params, jaxpr=jaxpr)
    if _flattree is None or "num_consts" in eqn.params:
        params.update(num_consts=num_consts, num_carry=num_carry)
        if "linear" in params:
            params["linear"] = (False,) * len(jaxpr.in_avals)
        return params
    nones = _flattree.nones
    xs = len(jaxpr.in_avals) - num_consts - num_carry
    ys = len(jaxpr.out_avals) - num_carry
    params["ft_in"] = _flattree.pack((nones(num_consts), nones(num_carry), nones(xs)))
    params["ft_out"] = _flattree.pack((nones(num_carry), nones(ys)))
    return params


def replace_eqn(eqn: JaxprEqn, *, invars=None, outvars=None, params=None, effects=None) -> JaxprEqn:
    """Return a copy of an equation with some parts exchanged; source information and context stay."""
    return eqn.replace(
        invars=eqn.invars if invars is None else list(invars),
        outvars=eqn.outvars if outvars is None else list(outvars),
        params=eqn.params if params is None else params,
        effects=eqn.effects if effects is None else effects,
    )


def called_from(eqn: JaxprEqn, call: Any) -> Any:
    """Return the source information of an equation inside a call whose own is `call`; None stands for no call.

    The call's name stack is put before the equation's own. JAX cuts the traceback of an equation at the `jit` around
    it, so where no line of it is the user's (the inside of `jax.nn.log_softmax`), the call's traceback stands in.
    """
    info = eqn.source_info
    if call is None:
        return info
    traceback = info.traceback if _is_users(info.traceback) else call.traceback
    return info.replace(name_stack=call.name_stack + info.name_stack, traceback=traceback)


def with_source(eqn: JaxprEqn, info: Any) -> JaxprEqn:
    """Return the equation with other source information."""
    return eqn.replace(source_info=info)


def _is_users(traceback: Any) -> bool:
    """Say whether a line of the user's code stands in a traceback."""
    return traceback is not None and any(_siu.is_user_filename(c.co_filename) for c in traceback.raw_frames()[0])


def with_name(eqn: JaxprEqn, prefix: Any) -> JaxprEqn:
    """Return the equation with another one's name stack put before its own; its source line stays."""
    info = eqn.source_info
    return eqn.replace(source_info=info.replace(name_stack=prefix + info.name_stack)) if prefix.stack else eqn


def name_stack(eqn: JaxprEqn) -> Any:
    """Return an equation's name stack object (prints as `a/b/c`)."""
    return eqn.source_info.name_stack


def transforms(eqn: JaxprEqn) -> list[str]:
    """Return the names of the transforms in an equation's name stack, outermost first: `jvp`, `transpose`, `vmap`."""
    return [part.name for part in name_stack(eqn).stack if isinstance(part, _siu.Transform)]


def is_transposed(names: Sequence[str]) -> bool:
    """Say whether transforms, outermost first, are those of a backward pass: `transpose` stands before `jvp`."""
    return next((name for name in names if name in ("jvp", "transpose")), None) == "transpose"


def user_source(eqn: JaxprEqn) -> str:
    """Return `file:line (function)` of the user's code that made an equation, or an empty string."""
    return _siu.summarize(eqn.source_info)


def guardable(var: Any) -> bool:
    """Say whether an `optimization_barrier` may take a variable: an array that is read, no reference or token."""
    return type(var.aval) is ShapedArray and not isinstance(var, (Literal, DropVar))


def vma(aval: Any) -> frozenset:
    """Return the mesh axes that a value of a `shard_map` body varies over; a barrier takes values of one such set."""
    manual = getattr(aval, "mat", None)
    return frozenset(getattr(aval, "vma", ())) if manual is None else frozenset(manual.varying)


def manual_axes(eqn: Any) -> tuple[str, ...]:
    """Return the mesh axes over which a `shard_map` splits, in the mesh's order."""
    found = eqn.params.get("manual_axes", eqn.params.get("newly_manual_axes", ()))
    return tuple(name for name in eqn.params["mesh"].axis_names if name in found)


def handing_spec(eqn: Any, aval: Any) -> Any:
    """Return the layout in which a `shard_map` hands out each device's own value, as JAX does for residuals."""
    checked = eqn.params["check_vma"]
    axes = tuple(name for name in manual_axes(eqn) if not checked or name in vma(aval))
    return jax.sharding.PartitionSpec(axes) if axes else jax.sharding.PartitionSpec()


def is_exact_spec(eqn: Any, spec: Any) -> bool:
    """Say whether a result of a `shard_map` in this layout is each device's own value, none of them dropped."""
    names = {n for part in spec if part is not None for n in (part if isinstance(part, tuple) else (part,))}
    return bool(eqn.params["check_vma"]) or names.issuperset(manual_axes(eqn))


def gathered_aval(eqn: Any, aval: Any) -> Any:
    """Return the type, outside a `shard_map`, of what it hands out of a value of its body."""
    return _core.unshard_aval(eqn.params["mesh"], eqn.params["check_vma"], handing_spec(eqn, aval), aval)


def is_local(aval: Any) -> bool:
    """Say whether a type tells of a mesh: it varies over axes, or its sharding is explicit or manual."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return bool(vma(aval)) or not (mesh is None or mesh.empty or mesh.are_all_axes_auto)


def barrier_eqn(invars: Sequence[Any], like: JaxprEqn) -> tuple[JaxprEqn, list[Var]]:
    """Return an `optimization_barrier` equation over the variables, and its fresh outputs in the same order."""
    outvars = [Var(v.aval) for v in invars]
    eqn = new_eqn(list(invars), outvars, optimization_barrier_p, {}, no_effects, like.source_info, like.ctx)
    return eqn, outvars


def stacked_aval(aval: Any, length: int) -> Any:
    """Return the abstract value of `length` of these along a new leading axis."""
    return _core.unmapped_aval(length, 0, aval)


def row_aval(aval: Any) -> Any:
    """Return the abstract value of one item along a leading axis."""
    return _core.mapped_aval(aval.shape[0], 0, aval)


def dce(jaxpr: Any, used: Sequence[bool] | None = None) -> tuple[Any, list[bool]]:
    """Drop what no used output and no effect needs, inside loops and calls too; inputs are reported, not dropped."""
    base = open_jaxpr(jaxpr)
    used = [True] * len(base.outvars) if used is None else list(used)
    return _pe.dce_jaxpr(base, used, instantiate=True)


def dce_inputs(jaxpr: Any, used: Sequence[bool]) -> tuple[Any, list[bool]]:
    """Drop what no used output and no effect needs, inputs too; return the rest and which inputs it has."""
    return _pe.dce_jaxpr(open_jaxpr(jaxpr), list(used))


def lowered(closed: Any) -> Any:
    """Return an equal closed jaxpr without what JAX 0.12 lowers itself before it compiles (`searchsorted` is such)."""
    base, lower = open_jaxpr(closed), getattr(_pe, "lower_jaxpr2", None)
    if lower is None or not getattr(base, "is_high", False):
        return closed
    return closed if any(v.aval.is_high for v in (*base.invars, *base.outvars)) else lower(closed)


def without_dead(jaxpr: Any) -> Any:
    """Return an open jaxpr without what no output and no effect needs, as `dce` does; quick where little is dead.

    Equations without bodies and effects are settled here, the others are handed to JAX one at a time.
    """
    base = open_jaxpr(jaxpr)
    rules, live, eqns = _pe.dce_rules, {v for v in base.outvars if type(v) is Var}, []
    for eqn in reversed(base.eqns):
        outvars = eqn.outvars
        if eqn.effects or eqn.primitive in rules:
            eqn = _without_dead_results(base, eqn, [v in live for v in outvars])
        elif not (outvars[0] in live if len(outvars) == 1 else any(v in live for v in outvars)):
            continue
        if eqn is not None:
            eqns.append(eqn)
            live.update([v for v in eqn.invars if type(v) is Var])
    eqns.reverse()
    return rebuild(base, eqns=eqns)


def _without_dead_results(base: Any, eqn: JaxprEqn, used: list[bool]) -> JaxprEqn | None:
    """Return what JAX leaves of one equation of a jaxpr when these of its results are used; None for nothing."""
    invars = list(dict.fromkeys(v for v in eqn.invars if type(v) is Var))
    alone, _ = dce(Jaxpr([], invars, eqn.outvars, [eqn], eqn.effects, base.debug_info.with_unknown_names()), used)
    return open_jaxpr(alone).eqns[0] if open_jaxpr(alone).eqns else None


def check(closed: Any) -> None:
    """Raise `TypeError` when a jaxpr is not well formed (used in tests and under `jax.enable_checks`)."""
    _core.check_jaxpr(open_jaxpr(closed))


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """Return a function of flat arrays that runs a closed jaxpr and returns a flat list."""
    return _xcore.jaxpr_as_fun(closed)
