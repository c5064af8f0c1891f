"""The entrance hall: one flat, uniform jaxpr for everything behind it.

In: the closed jaxpr of a traced step. Out: an equivalent closed jaxpr in which `jit`, `remat2` and plain calls are
inlined, at the top level and inside loop, branch and `shard_map` bodies; a call gives its name stack to the equations
inside it, and its source line to those that name none of the user's. A user's `jax.checkpoint` becomes ordinary
equations here, so that the planner sees its region as part of the whole. It may not change what is computed, and it
leaves atomic what carries a meaning of its own: calls with shardings, donation or compiler options, undifferentiated
`custom_jvp` and `custom_vjp` calls, kernels.
"""

from __future__ import annotations

from typing import Any

from memopt import _compat as c

_BODY_KEYS = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "shard_map": ("jaxpr",),
}


def inline(closed: Any, *, respect_checkpoint: bool = False) -> Any:
    """Return an equivalent closed jaxpr without plain calls.

    Args:
      closed: a closed jaxpr.
      respect_checkpoint: leave `jax.checkpoint` regions (`remat2` equations) as they are.

    Returns:
      A closed jaxpr with the same inputs and outputs; constants of inlined calls are appended to its own.
    """
    return _Inliner(respect_checkpoint, {}).closed(c.lowered(closed))


def _plain_jit(params: dict[str, Any]) -> bool:
    shardings = (*params["in_shardings"], *params["out_shardings"])
    unspecified = all(type(s).__name__ == "UnspecifiedValue" for s in shardings)
    layouts = any(x is not None for x in (*params["in_layouts"], *params["out_layouts"]))
    return unspecified and not layouts and not any(params["donated_invars"]) and not params["compiler_options_kvs"]


class _Inliner:
    def __init__(self, respect_checkpoint: bool, cache: dict[int, Any]):
        self.respect_checkpoint = respect_checkpoint
        self.cache = cache  # id of a body -> (the body, so that the id stays its own; its inlined form)

    def closed(self, closed: Any) -> Any:
        hit = self.cache.get(id(closed))
        if hit is not None:
            return hit[1]
        base = c.open_jaxpr(closed)
        constvars, consts = list(base.constvars), list(c.jaxpr_consts(closed))
        env: dict[Any, Any] = {}
        eqns: list[Any] = []
        self._emit(base.eqns, env, eqns, constvars, consts, call=None)
        outvars = [_read(env, v) for v in base.outvars]
        changed = len(eqns) != len(base.eqns) or any(a is not b for a, b in zip(eqns, base.eqns, strict=True))
        out = (
            closed if not changed else c.close(c.rebuild(base, constvars=constvars, outvars=outvars, eqns=eqns), consts)
        )
        self.cache[id(closed)] = (closed, out)
        return out

    def _inner(self, eqn: Any) -> Any | None:
        """Return the jaxpr to inline in place of this equation, if it is a plain call."""
        name = eqn.primitive.name
        if name in ("jit", "pjit"):
            return eqn.params["jaxpr"] if _plain_jit(eqn.params) else None
        if name in ("remat2", "checkpoint", "remat"):
            return None if self.respect_checkpoint else eqn.params["jaxpr"]
        if name in c.CLOSED_CALLS:
            return eqn.params["call_jaxpr"]
        return None

    def _emit(self, source, env, eqns, constvars, consts, call) -> None:
        for eqn in source:
            inner = self._inner(eqn)
            if inner is None:
                eqns.append(self._copied(eqn, env, call, constvars, consts))
                continue
            base = c.open_jaxpr(inner)
            local = {v: _read(env, a) for v, a in zip(base.invars, eqn.invars, strict=True)}
            for var, value in zip(base.constvars, c.jaxpr_consts(inner), strict=True):
                local[var] = _const(constvars, consts, var, value)
            self._emit(base.eqns, local, eqns, constvars, consts, c.called_from(eqn, call))
            for outer, atom in zip(eqn.outvars, base.outvars, strict=True):
                env[outer] = _read(local, atom)

    def _copied(self, eqn: Any, env: dict, call: Any, constvars: list, consts: list) -> Any:
        params = self._bodies(eqn)
        if eqn.primitive.name == "scan" and c.jaxpr_consts(params["jaxpr"]):
            eqn, params = _hoisted(eqn, params, constvars, consts)
        if call is None and params is eqn.params and not any(_hit(env, v) for v in eqn.invars):
            return eqn
        outvars = list(eqn.outvars)
        if call is not None:  # inlined: the same inner jaxpr may come more than once, so its variables are made anew
            outvars = [v if isinstance(v, c.DropVar) else c.Var(v.aval) for v in eqn.outvars]
            env.update((a, b) for a, b in zip(eqn.outvars, outvars, strict=True) if a is not b)
        out = c.replace_eqn(eqn, invars=[_read(env, v) for v in eqn.invars], outvars=outvars, params=params)
        return out if call is None else c.with_source(out, c.called_from(eqn, call))

    def _bodies(self, eqn: Any) -> dict[str, Any]:
        keys = _BODY_KEYS.get(eqn.primitive.name)
        if keys is None:
            return eqn.params
        new = {k: self._body(eqn.params[k]) for k in keys}
        if all(new[k] is eqn.params[k] for k in keys):
            return eqn.params
        return dict(eqn.params, **new)

    def _body(self, body: Any) -> Any:
        if isinstance(body, tuple):
            out = tuple(self._body(b) for b in body)
            return body if all(a is b for a, b in zip(out, body, strict=True)) else out
        if isinstance(body, c.ClosedJaxpr):
            out = self.closed(body)
            return body if out is body else out
        out = self.closed(c.close(body))  # an open body (shard_map in JAX 0.10) can hold no new constants
        return body if c.jaxpr_consts(out) or c.open_jaxpr(out) is body else c.open_jaxpr(out)


def _hoisted(eqn: Any, params: dict, constvars: list, consts: list) -> tuple[Any, dict]:
    """Turn the constants closed over by a loop's body into ordinary loop constants."""
    body = params["jaxpr"]
    base = c.open_jaxpr(body)
    outer = [_const(constvars, consts, var, value) for var, value in zip(base.constvars, body.consts, strict=True)]
    flat = c.close(c.rebuild(base, constvars=[], invars=[*base.constvars, *base.invars]))
    num_consts, num_carry = c.scan_layout(eqn)
    params = c.scan_params(c.replace_eqn(eqn, params=params), flat, num_consts + len(outer), num_carry)
    return c.replace_eqn(eqn, invars=[*outer, *eqn.invars], params=params), params


def _hit(env: dict, atom: Any) -> bool:
    return not isinstance(atom, c.Literal) and atom in env


def _read(env: dict, atom: Any) -> Any:
    return atom if isinstance(atom, c.Literal) else env.get(atom, atom)


def _const(constvars: list, consts: list, var: Any, value: Any) -> Any:
    for known, have in zip(constvars, consts, strict=True):
        if have is value:
            return known
    fresh = c.Var(var.aval)
    constvars.append(fresh)
    consts.append(value)
    return fresh
