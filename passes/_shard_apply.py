"""The sharding pass's hand: sharding constraints put into a jaxpr, where values are made and where weights are used.

In: a flat jaxpr, the mesh, the specs of values, and the specs of operands at their uses. Out: the jaxpr with
`sharding_constraint` equations, bodies of loops and branches included; nothing else changes, and what it computes stays
the same. Which values get which spec is decided in `_shard_places.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memopt import _compat as c
from memopt import _local_rules
from memopt.passes._shard_flow import is_var

Spec = tuple[tuple[str, ...], ...]
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def named(mesh: Mesh, spec: Spec) -> NamedSharding:
    """Return a spec as a sharding on a mesh."""
    return NamedSharding(mesh, PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in spec)))


def constrain(
    closed: Any,
    mesh: Mesh,
    made: Mapping[Any, tuple[Spec, ...]],
    used: Mapping[tuple[int, int], tuple[Spec, ...]],
    results: Mapping[int, tuple[Spec, ...]],
) -> Any:
    """Return a jaxpr with sharding constraints.

    Args:
      closed: a flat closed jaxpr.
      mesh: the mesh.
      made: variable -> the specs that it is brought to, one after the other, right after it is made.
      used: (id of an equation, operand) -> the specs that the operand is brought to, one after the other, just before,
        for this one reader.
      results: output -> the specs that it is brought to last.
    """
    hand = _Hand(mesh, made, used)
    base = c.open_jaxpr(closed)
    env: dict[Any, Any] = {}
    eqns: list[Any] = []
    for var in base.invars:
        hand.bring(var, made.get(var, ()), env, eqns, base.eqns)
    hand.run(base, env, eqns)
    outvars = [env.get(v, v) if is_var(v) else v for v in base.outvars]
    for i, specs in results.items():
        for spec in specs:
            if is_var(outvars[i]):
                outvars[i] = hand.emit(outvars[i], spec, eqns, eqns[-1])
    return c.close(c.rebuild(base, eqns=eqns, outvars=outvars), c.jaxpr_consts(closed))


class _Hand:
    def __init__(self, mesh: Mesh, made: Mapping, used: Mapping):
        self.mesh, self.made, self.used = mesh, made, used
        self._bodies: dict[int, tuple[Any, Any]] = {}

    def run(self, base: Any, env: dict[Any, Any], eqns: list[Any]) -> None:
        """Copy the equations of one body, with constraints between them."""
        gathered: dict[tuple[Any, Spec], Any] = {}
        for eqn in base.eqns:
            invars = [env.get(v, v) if is_var(v) else v for v in eqn.invars]
            for i, v in enumerate(eqn.invars):
                for spec in self.used.get((id(eqn), i), ()) if is_var(v) else ():
                    key = (invars[i], spec)
                    if key not in gathered:
                        gathered[key] = self.emit(invars[i], spec, eqns, eqn)
                    invars[i] = gathered[key]
            params = self._params(eqn)
            same = params is eqn.params and all(a is b for a, b in zip(invars, eqn.invars, strict=True))
            eqns.append(eqn if same else c.replace_eqn(eqn, invars=invars, params=params))
            for v in eqn.outvars:
                self.bring(v, self.made.get(v, ()) if is_var(v) else (), env, eqns, [eqn])

    def bring(self, var: Any, specs: tuple[Spec, ...], env: dict, eqns: list, like: list) -> None:
        """Put constraints behind a variable, and let all later readers read what comes out."""
        for spec in specs:
            if like:
                env[var] = self.emit(env.get(var, var), spec, eqns, like[0])

    def emit(self, var: Any, spec: Spec, eqns: list[Any], like: Any) -> Any:
        """Append one constraint and return its result."""
        pattern = _pattern(var.aval, named(self.mesh, spec))
        out = c.Var(var.aval)
        eqns.append(
            c.new_eqn([var], [out], pattern.primitive, pattern.params, pattern.effects, like.source_info, like.ctx)
        )
        return out

    def _params(self, eqn: Any) -> dict[str, Any]:
        keys = _BODIES.get(eqn.primitive.name)
        if keys is None or _local_rules.ties(eqn) is None:
            return eqn.params
        new = {k: self._body(eqn.params[k]) for k in keys}
        if all(new[k] is eqn.params[k] for k in keys):
            return eqn.params
        return dict(eqn.params, **new)

    def _body(self, body: Any) -> Any:
        if isinstance(body, tuple):
            out = tuple(self._body(b) for b in body)
            return body if all(a is b for a, b in zip(out, body, strict=True)) else out
        if id(body) not in self._bodies:
            self._bodies[id(body)] = (body, self._constrained(body))
        return self._bodies[id(body)][1]

    def _constrained(self, body: Any) -> Any:
        base = c.open_jaxpr(body)
        env: dict[Any, Any] = {}
        eqns: list[Any] = []
        for var in base.invars:
            self.bring(var, self.made.get(var, ()), env, eqns, base.eqns)
        self.run(base, env, eqns)
        if len(eqns) == len(base.eqns) and all(a is b for a, b in zip(eqns, base.eqns, strict=True)):
            return body
        outvars = [env.get(v, v) if is_var(v) else v for v in base.outvars]
        out = c.rebuild(base, eqns=eqns, outvars=outvars)
        return c.close(out, c.jaxpr_consts(body)) if isinstance(body, c.ClosedJaxpr) else out


@functools.lru_cache(maxsize=4096)
def _pattern(aval: Any, sharding: NamedSharding) -> Any:
    """Return the equation that JAX makes of a constraint of this type."""
    shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
    traced = jax.make_jaxpr(lambda x: jax.lax.with_sharding_constraint(x, sharding))(shape)
    return c.open_jaxpr(traced).eqns[0]
