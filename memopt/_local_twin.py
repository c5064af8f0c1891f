"""The scale model: a step's jaxpr as one device sees it.

In: a jaxpr and the specs of its variables. Out: a jaxpr with the same equations in the same places, over the shapes of
one device. Each mesh axis can cut an operation along one factor alone; operands that are cut otherwise are gathered
first, and results that come out larger than they are kept are scattered after. Operation and collectives then stand in
one call, so that positions stay those of the step; a gathered operand is shared by the operations of one body, as XLA
shares it. The model is for counting, and may not be run.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.extend.core import primitives

from memopt import _compat as c
from memopt import _fusion, _local_rules
from memopt._sizes import aval_bytes


class Twins:
    """Twins of jaxprs and equations; whatever is made once is made once for all rewrites of a step.

    Args:
      local: the specs of the variables (`memopt._local.Local`).
    """

    def __init__(self, local: Any):
        self.local = local
        self._vars: dict[Any, Any] = {}
        self._bodies: dict[int, tuple[Any, Any]] = {}  # id -> the jaxpr, so that the id stays its own; its twin
        self._eqns: dict[int, tuple[Any, Any]] = {}
        self._alone = True  # the equation in hand has no gathered operand
        self._runs: dict[Any, tuple[Any, list | None]] = {}  # what copies of an operation share -> how it runs

    def closed(self, closed: Any) -> Any:
        """Return the twin of a closed or open jaxpr."""
        if id(closed) not in self._bodies:
            base = c.open_jaxpr(closed)
            gathered: dict[Any, Any] = {}
            eqns = [self.equation(eqn, gathered) for eqn in base.eqns]
            parts = {k: [self._var(v) for v in getattr(base, k)] for k in ("constvars", "invars", "outvars")}
            out = c.rebuild(base, eqns=eqns, **parts)
            out = c.close(out, c.jaxpr_consts(closed)) if isinstance(closed, c.ClosedJaxpr) else out
            self._bodies[id(closed)] = (closed, out)
        return self._bodies[id(closed)][1]

    def _var(self, atom: Any) -> Any:
        if isinstance(atom, c.Literal):
            return atom
        if atom not in self._vars:
            aval = self.local.aval(atom)
            self._vars[atom] = c.DropVar(aval) if isinstance(atom, c.DropVar) else c.Var(aval)
        return self._vars[atom]

    def equation(self, eqn: Any, gathered: dict) -> Any:
        """Return the twin of an equation: itself over local shapes, its bodies' twins, or a call with collectives.

        Args:
          eqn: the equation.
          gathered: the operands that were gathered before in this body; filled further.
        """
        known = self._eqns.get(id(eqn))
        if known is None:
            self._alone = True
            twin = self._equation(eqn, gathered)
            if not self._alone:
                return twin  # it gathers, or reads what another one gathered
            known = self._eqns[id(eqn)] = (eqn, twin)
        return known[1]

    def _equation(self, eqn: Any, gathered: dict) -> Any:
        params = eqn.params
        if _local_rules.ties(eqn) is not None:
            params = {k: self._param(v) for k, v in params.items()}
        elif eqn.primitive.name == "sharding_constraint":
            source, target = (self._var(v) for v in (eqn.invars[0], eqn.outvars[0]))
            if source.aval.shape != target.aval.shape:
                return self._move(eqn, source, target)
        elif eqn.primitive.name not in _KEPT:
            run = self._run(eqn)
            if run is not None:
                return self._partitioned(eqn, run, gathered)
        invars = [self._var(v) for v in eqn.invars]
        return c.replace_eqn(eqn, invars=invars, outvars=[self._var(v) for v in eqn.outvars], params=params)

    def _param(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)) and any(map(c.is_jaxpr, value)):
            return tuple(self.closed(v) for v in value)
        return self.closed(value) if c.is_jaxpr(value) else value

    def _run(self, eqn: Any) -> dict[Any, tuple] | None:
        """Return how each operand and result is cut while the operation runs; None where nothing is known of it.

        Copies of an operation share its parameters; over values that are cut alike they run alike.
        """
        atoms = [v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, c.Literal)]
        key = id(eqn.params), *((getattr(v.aval, "shape", ()), self._spec(v)) for v in atoms)
        if key not in self._runs:
            factors = _local_rules.factors_of(eqn)
            run = self._running_specs(eqn, factors) if factors else None
            self._runs[key] = eqn.params, None if run is None else [run[v] for v in atoms]
        known = self._runs[key][1]
        return None if known is None else dict(zip(atoms, known, strict=True))

    def _partitioned(self, eqn: Any, run: dict[Any, tuple], gathered: dict) -> Any:
        moves: list[Any] = []
        made: list[Any] = []
        invars = []
        for v in eqn.invars:
            if isinstance(v, c.Literal) or self._spec(v) == run[v]:
                invars.append(self._var(v))
                continue
            key, self._alone = (v, run[v]), False
            if key not in gathered:
                gathered[key] = var = c.Var(self.local.cut(v.aval, run[v]))
                moves.append(self._move(eqn, self._var(v), var))
                if aval_bytes(var.aval) > aval_bytes(self._var(v).aval):
                    made.append(var)
                else:
                    del gathered[key]
                invars.append(var)
            else:
                invars.append(gathered[key])
        outvars = [self._var(v) for v in eqn.outvars]
        results = [
            o if self._fits(v, run) else c.Var(self.local.cut(v.aval, run[v]))
            for v, o in zip(eqn.outvars, outvars, strict=True)
        ]
        after = []
        for i, (v, o) in enumerate(zip(eqn.outvars, outvars, strict=True)):
            if _is_partial(eqn, v, run):
                results[i] = c.Var(results[i].aval)
                after.append(self._sum(eqn, results[i], o))
            elif results[i] is not o:
                after.append(self._move(eqn, results[i], o))
        main = c.replace_eqn(eqn, invars=invars, outvars=results)
        if not moves and not after:
            return main
        return self._call(eqn, [*moves, main, *after], outvars, made)

    def _fits(self, var: Any, run: dict) -> bool:
        """Say whether a result is kept as it comes out: cut alike, or larger, for then its readers gather it."""
        if isinstance(var, c.DropVar) or self._spec(var) == run[var]:
            return True
        return aval_bytes(self.local.cut(var.aval, run[var])) <= aval_bytes(self.local.aval(var))

    def _spec(self, var: Any) -> tuple:
        return self.local.specs.get(var, ((),) * len(getattr(var.aval, "shape", ())))

    def _running_specs(self, eqn: Any, factors: list) -> dict[Any, tuple]:
        """Return how each operand and result is cut while the operation runs."""
        weight: dict[str, dict[int, int]] = {}
        for i, factor in enumerate(factors):
            for var, dim in factor.places:
                for axis in self._spec(var)[dim]:
                    scores = weight.setdefault(axis, {})
                    scores[i] = scores.get(i, 0) + aval_bytes(var.aval)
        axes: dict[int, tuple[str, ...]] = {}
        for axis, scores in weight.items():
            best = max(scores, key=lambda i: (scores[i], -i))
            axes[best] = (*axes.get(best, ()), axis)
        specs = {
            v: [()] * len(getattr(v.aval, "shape", ()))
            for v in (*eqn.invars, *eqn.outvars)
            if not isinstance(v, c.Literal)
        }
        for i, cut in axes.items():
            ways = math.prod(self.local.sizes[a] for a in cut)
            for var, dim in factors[i].places:
                if var in specs and var.aval.shape[dim] >= ways:
                    specs[var][dim] = cut
        return {v: tuple(s) for v, s in specs.items()}

    def _move(self, eqn: Any, source: Any, target: Any) -> Any:
        """Return the equation that brings a value from one cut to another: a gather, or a slice of what is there."""
        before, after = aval_bytes(source.aval), aval_bytes(target.aval)
        params: dict[str, Any] = {}
        if after > before:
            primitive, params = primitives.all_gather_p, {"axis_size": max(2, after // max(1, before))}
        elif source.aval.shape == target.aval.shape:
            primitive = primitives.copy_p
        else:
            primitive = primitives.slice_p
        return c.new_eqn([source], [target], primitive, params, c.no_effects, eqn.source_info, eqn.ctx)

    def _sum(self, eqn: Any, source: Any, target: Any) -> Any:
        """Return the equation that adds up what the devices hold: its operand is in memory, and so no fused value.

        It takes no seconds here: those of a layout's sums are counted by the pass that chose it.
        """
        primitive, params = c.reduce_scatter_p, {"axis_size": 1}
        if source.aval.shape == target.aval.shape:  # in place
            primitive, params = c.optimization_barrier_p, {}
        return c.new_eqn([source], [target], primitive, params, c.no_effects, eqn.source_info, eqn.ctx)

    def _call(self, eqn: Any, eqns: list, outvars: list, made: list) -> Any:
        """Return one call of these equations; gathered operands that others may read come out too."""
        inputs = list(
            dict.fromkeys(
                v
                for e in eqns
                for v in e.invars
                if not isinstance(v, c.Literal) and not any(v is o for e2 in eqns for o in e2.outvars)
            )
        )
        inside = {v: c.Var(v.aval) for v in (*inputs, *outvars, *made) if not isinstance(v, c.DropVar)}
        eqns = [
            c.replace_eqn(
                e,
                invars=[v if isinstance(v, c.Literal) else inside.get(v, v) for v in e.invars],
                outvars=[inside.get(v, v) for v in e.outvars],
            )
            for e in eqns
        ]
        real = [v for v in (*outvars, *made) if not isinstance(v, c.DropVar)]
        parts = {"invars": [inside[v] for v in inputs], "outvars": [inside[v] for v in real], "eqns": eqns}
        params = {"call_jaxpr": c.close(c.rebuild(_empty(), **parts))}
        return c.new_eqn(inputs, real, c.closed_call_p, params, eqn.effects, eqn.source_info, eqn.ctx)


def _is_partial(eqn: Any, var: Any, run: dict[Any, tuple]) -> bool:
    """Say whether each device has a part of a matmul's sums: they split what it is summed over."""
    if eqn.primitive.name not in _fusion.MATMULS or isinstance(var, c.DropVar):
        return False
    split = {a for v in eqn.invars if not isinstance(v, c.Literal) for axes in run[v] for a in axes}
    return not split.issubset(a for axes in run[var] for a in axes)


@functools.cache
def _empty() -> Any:
    return c.open_jaxpr(jax.make_jaxpr(lambda: ())())


_KEPT = frozenset({"shard_map", "sharding_constraint", "reshard", "optimization_barrier", "pallas_call"})
