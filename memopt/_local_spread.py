"""The spreading table: shardings passed along the factors of operations, from what is known to all that follows.

In: a jaxpr, the specs of some of its variables, which of these are fixed. Out: the specs of all of them, in the order
of XLA's partitioner (`_local_rules`). It reads no compiled program and makes no other jaxpr.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from memopt import _compat as c
from memopt import _local_rules

Spec = tuple[tuple[str, ...], ...]  # for each dimension the mesh axes that cut it

_MOST_SWEEPS = 8


def spec_of(spec: Any, rank: int) -> Spec:
    """Return a `PartitionSpec` as a tuple of axis names for each dimension."""
    entries = [() if e is None or e is PartitionSpec.UNCONSTRAINED else e for e in spec][:rank]
    named = [tuple(e) if isinstance(e, tuple) else ((e,) if e else ()) for e in entries]
    return (*named, *((),) * (rank - len(named)))


def uncut(var: Any) -> Spec:
    """Return the spec of a variable that is whole on every device."""
    return ((),) * len(getattr(var.aval, "shape", ()))


def operation_key(eqn: Any, specs: Mapping[Any, Spec]) -> Any:
    """Return what an operation and its copies over values cut alike have in common: copies share the parameters."""
    operands = (None if isinstance(v, c.Literal) else (_shape_of(v), specs.get(v)) for v in eqn.invars)
    return id(eqn.params), *operands


class Spread:
    """One run of propagation.

    Args:
      sizes: mesh axis -> devices.
      specs: what is known already; filled further.
      fixed: variables whose spec may not change.
      origins: known results of operations without a rule, by their parameters.
      copied: known results of operations by `operation_key`: a copy of one over values cut alike has results cut alike.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        specs: dict,
        fixed: set,
        origins: Mapping[int, Any] | None = None,
        copied: Mapping[Any, Any] | None = None,
    ):
        self.sizes, self.specs, self.fixed = sizes, specs, fixed
        self.origins, self.copied = origins or {}, copied or {}
        self.factors: list[_local_rules.Factor] = []
        self.unknown: list[Any] = []  # equations without a rule
        self.seen: list[Any] = []
        self.made: list[tuple[Any, tuple]] = []  # equations without bodies, with all their name stacks
        self.refused: dict[Any, None] = {}  # variables that two operations want cut along one axis in two ways

    def run(self, jaxpr: Any) -> None:
        """Spread what is known over a jaxpr and the bodies in it, until nothing changes."""
        self._collect(jaxpr, ())
        touching: dict[Any, list[int]] = {}
        for i, factor in enumerate(self.factors):
            for var, _ in factor.places:
                touching.setdefault(var, []).append(i)
        waiting: set[int] = set()  # factors with a place whose spec changed since they were last passed on
        for phase in (_local_rules.EARLY, _local_rules.LATER, _local_rules.LAST):
            active = [i for i, f in enumerate(self.factors) if f.phase <= phase]
            waiting.update(i for i in active if self._is_new(self.factors[i], phase))
            for _ in range(_MOST_SWEEPS):
                for i in (*active, *reversed(active)):
                    if i in waiting:
                        waiting.discard(i)
                        waiting.update(j for var in self._pass_on(self.factors[i], phase) for j in touching[var])
                if waiting.isdisjoint(active):
                    break
        for var in self.seen:
            self.specs.setdefault(var, uncut(var))

    def _is_new(self, factor: _local_rules.Factor, phase: int) -> bool:
        """Say whether a factor does in this phase what it did not before."""
        return factor.phase == phase or (phase == _local_rules.LAST and factor.receives is not None)

    def _collect(self, jaxpr: Any, stacks: tuple) -> None:
        self.seen += [*jaxpr.constvars, *jaxpr.invars]
        for eqn in jaxpr.eqns:
            atoms = (*eqn.invars, *eqn.outvars)
            if all(isinstance(v, c.Literal) or v in self.fixed for v in atoms) and not c.subjaxprs(eqn.params):
                continue
            self.seen += eqn.outvars
            if self._is_copy(eqn):
                continue
            self._fix_results(eqn)
            here = (*stacks, c.name_stack(eqn))
            tied = _local_rules.ties(eqn)
            if tied is not None:
                for body, factors in tied:
                    self._enter(factors)
                    self._add(factors)
                    self._collect(body, here)
                    self._add(factors)
                continue
            self.made.append((eqn, here))
            factors = _local_rules.factors_of(eqn)
            if factors is None:
                self.unknown.append(eqn)
            self._add(factors or ())

    def _is_copy(self, eqn: Any) -> bool:
        """Fix the results of a barrier or a known operation's copy, where all operands are fixed; say if it is one.

        What is made of nothing is cut as its readers are.
        """
        operands = [v for v in eqn.invars if not isinstance(v, c.Literal)]
        if not self.copied or not operands or not all(v in self.fixed for v in operands):
            return False
        if eqn.primitive.name == "optimization_barrier":
            found = [self.specs[v] for v in operands]
        else:
            found = self.copied.get(operation_key(eqn, self.specs), (None, ()))[1]
        if len(found) != len(eqn.outvars):
            return False
        for var, spec in zip(eqn.outvars, found, strict=True):
            if var not in self.fixed:
                self.specs[var] = spec
                self.fixed.add(var)
        return True

    def _enter(self, factors: Any) -> None:
        """Fix what a loop's body in a copy is given from fixed values outside."""
        found: dict[Any, dict[int, tuple[str, ...]]] = {}
        for one in factors if self.copied else ():
            if len(one.places) == 2 and one.places[0][0] in self.fixed and one.places[1][0] not in self.fixed:
                (outer, dim), (inner, inner_dim) = one.places
                found.setdefault(inner, {})[inner_dim] = self.specs[outer][dim]
        for inner, dims in found.items():
            if len(dims) == len(_shape_of(inner)):
                self.specs[inner] = tuple(dims[d] for d in range(len(dims)))
                self.fixed.add(inner)

    def _add(self, factors: Any) -> None:
        self.factors += [f for f in factors if len(f.places) > 1 and any(v not in self.fixed for v, _ in f.places)]

    def _fix_results(self, eqn: Any) -> None:
        """Fix what an equation itself says about its results' shardings."""
        name, params = eqn.primitive.name, eqn.params
        said: list[Any] = []
        if name == "sharding_constraint":
            said = [getattr(params["sharding"], "spec", None)]
        elif name == "shard_map":
            said = list(params.get("out_specs", ()))
        elif id(params) in self.origins:
            said = [PartitionSpec(*(axes or None for axes in s)) for s in self.origins[id(params)][1]]
        else:
            said = [getattr(getattr(v.aval, "sharding", None), "spec", None) for v in eqn.outvars]
            said = [s if s is not None and any(e is not None for e in s) else None for s in said]
        for var, spec in zip(eqn.outvars, said, strict=False):
            if spec is not None and var not in self.fixed:
                self.specs[var] = spec_of(spec, len(getattr(var.aval, "shape", ())))
                self.fixed.add(var)

    def _pass_on(self, factor: _local_rules.Factor, phase: int) -> list[Any]:
        """Give the longest list of axes in a factor to all its places that can take it; return whose spec changed."""
        specs, changed = self.specs, []
        axes: tuple[str, ...] = ()
        for var, dim in factor.places:
            spec = specs.get(var)
            if spec is not None and len(spec[dim]) > len(axes):
                axes = spec[dim]
        if not axes:
            return changed
        every = factor.receives is None or phase == _local_rules.LAST
        takers = factor.places if every else factor.places[: factor.receives]
        for var, dim in takers:
            if var not in self.fixed and self._can_take(var, dim, axes):
                spec = specs.get(var) or uncut(var)
                specs[var] = (*spec[:dim], axes, *spec[dim + 1 :])
                changed.append(var)
        return changed

    def _can_take(self, var: Any, dim: int, axes: tuple[str, ...]) -> bool:
        spec = self.specs.get(var)
        if var.aval.shape[dim] < math.prod(self.sizes[a] for a in axes):
            return False
        if spec is None:
            return True
        if spec[dim] == axes or spec[dim] != axes[: len(spec[dim])]:
            return False
        if any(a in other for i, other in enumerate(spec) if i != dim for a in axes):
            self.refused[var] = None
            return False
        return True


def _shape_of(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))
