"""A step with its element-wise regions at the projected shape.

In: a flat closed jaxpr, its regions, and the stored moments of each. Out: a closed jaxpr that takes and returns the
projected moments with their bases and counts: the gradient is projected where it is made, the region's equations run on
the projected shape, and what leaves it is projected back. All other equations stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from memopt import _compat as c
from memopt import _forms
from memopt.optim import _projection as projection
from memopt.optim._galore import PlainProjector
from memopt.passes._low_rank_form import LowRank
from memopt.passes._low_rank_region import Region


@dataclasses.dataclass(frozen=True)
class Stored:
    """A moment of a step: the numbers of its input and output, and its stored form, of which the shapes are read."""

    place: int
    out: int
    node: LowRank


def build(closed: Any, regions: Sequence[tuple[Region, Sequence[Stored]]], scale: float) -> Any:
    """Return the step with these regions at the projected shape.

    Its inputs and outputs are those that came in, with `low` in the place of each stored moment, and behind it the
    basis and the count where the moment holds them.

    Args:
      closed: closed jaxpr, flat, without dead code.
      regions: each with its moments.
      scale: factor of the projected updates.
    """
    builder = _Builder(c.open_jaxpr(closed), scale)
    for region, moments in regions:
        builder.add(region, moments)
    base = builder.build()
    return c.close(c.dce(base)[0], c.jaxpr_consts(closed))


class _Low:
    """One region while it is built: its variables at the projected shape."""

    def __init__(self, region: Region, moments: Sequence[Stored], scale: float):
        self.region, self.moments, self.scale = region, moments, scale
        self.holder = next(m.node for m in moments if m.node.basis is not None)
        self.shape = tuple(moments[0].node.low.shape)
        self.basis, self.count = (c.Var(_aval(v)) for v in (self.holder.basis, self.holder.count))
        self.env: dict[Any, Any] = {}

    def begin(self) -> list[Any]:
        """Return the equations that bring the bases up to date and project the gradient."""
        node, settings = self.holder, self.holder.settings

        def project(gradient, basis, count):
            basis = PlainProjector().refresh(node.leaf, gradient, basis, count, node.offsets, settings)
            low = projection.project(gradient, basis, settings.side).astype(gradient.dtype)
            return low, basis, optax.safe_increment(count)

        gradient = self.region.gradient
        eqns, outs = _traced(project, [gradient, self.basis, self.count])
        self.env[gradient], self.basis, self.count = outs
        return eqns

    def member(self, eqn: Any) -> list[Any]:
        """Return an equation of the region at the projected shape, after those of the scalars that it spreads."""
        made: list[Any] = []
        invars = [self._operand(v, made) for v in eqn.invars]
        out = self.env[eqn.outvars[0]] = c.Var(eqn.outvars[0].aval.update(shape=self.shape))
        return [*made, c.replace_eqn(eqn, invars=invars, outvars=[out])]

    def _operand(self, atom: Any, made: list[Any]) -> Any:
        if isinstance(atom, c.Literal) or atom.aval.shape == ():
            return atom
        if atom not in self.env:
            eqn = self.region.constants[atom]
            invars = [self._operand(v, made) for v in eqn.invars]
            params = eqn.params if "shape" not in eqn.params else dict(eqn.params, shape=self.shape)
            self.env[atom] = c.Var(atom.aval.update(shape=self.shape))
            made.append(c.replace_eqn(eqn, invars=invars, outvars=[self.env[atom]], params=params))
        return self.env[atom]

    def end(self) -> list[Any]:
        """Return the equations that project the update back, into the variable that the step reads."""
        update, settings, node = self.region.update, self.holder.settings, self.holder

        def back(low, basis):
            full = projection.project_back(low, basis, node.leaf.shape, settings.side)
            return (self.scale * full).astype(update.aval.dtype)

        eqns, (out,) = _traced(back, [self.env[update], self.basis])
        last = eqns[-1]
        outvars = [update if v is out else v for v in last.outvars]
        return [*eqns[:-1], c.replace_eqn(last, outvars=outvars)]


class _Builder:
    def __init__(self, jaxpr: Any, scale: float):
        self.jaxpr, self.scale = jaxpr, scale
        self.lows: list[_Low] = []
        self.inputs: dict[int, list[Any]] = {}

    def add(self, region: Region, moments: Sequence[Stored]) -> None:
        """Take in a region."""
        low = _Low(region, moments, self.scale)
        self.lows.append(low)
        for m in moments:
            var = low.env[self.jaxpr.invars[m.place]] = c.Var(_aval(m.node.low))
            self.inputs[m.place] = [var, low.basis, low.count] if m.node is low.holder else [var]

    def build(self) -> Any:
        """Return the open jaxpr."""
        owner = {number: low for low in self.lows for number in low.region.members}
        begins = {low.region.gradient: low for low in self.lows}
        ends = {low.region.update: low for low in self.lows}
        eqns: list[Any] = []
        for v in (*self.jaxpr.constvars, *self.jaxpr.invars):
            if v in begins:
                eqns += begins[v].begin()
        for eqn in self.jaxpr.eqns:
            low = owner.get(id(eqn))
            keep = low is None or eqn.outvars[0] is not low.region.update
            eqns += low.member(eqn) if low is not None else []
            eqns += [eqn] if keep else []
            eqns += [e for v in eqn.outvars if v in ends for e in ends[v].end()]
            eqns += [e for v in eqn.outvars if v in begins for e in begins[v].begin()]
        invars = [v for i, old in enumerate(self.jaxpr.invars) for v in self.inputs.get(i, [old])]
        outs = self._outputs()
        outvars = [v for i, old in enumerate(self.jaxpr.outvars) for v in outs.get(i, [old])]
        return c.rebuild(self.jaxpr, invars=invars, outvars=outvars, eqns=eqns)

    def _outputs(self) -> dict[int, list[Any]]:
        """Return what stands in the place of outputs: new moments as they are stored."""
        found = {}
        for low in self.lows:
            for m in low.moments:
                new = low.env[self.jaxpr.outvars[m.out]]
                found[m.out] = [new, low.basis, low.count] if m.node is low.holder else [new]
        return found


def _traced(function: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the equations of a function of variables, and its results."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands]
    return _forms.emit(_forms.flat(jax.make_jaxpr(function)(*shapes)), operands, None)


def _aval(value: Any) -> Any:
    return c.ShapedArray(tuple(value.shape), np.dtype(value.dtype))


def low_outputs(stored: Mapping[int, LowRank], leaves: Sequence[Any]) -> list[Any]:
    """Return the results of a step, with stored moments put together from the flat ones that `build` returns.

    Args:
      stored: output number of the plain step -> a node like the moment there.
      leaves: the results, flat.
    """
    flat, found, number = iter(leaves), [], 0
    for leaf in flat:
        node = stored.get(number)
        if node is not None:
            rest = (None, None) if node.basis is None else (next(flat), next(flat))
            leaf = dataclasses.replace(node, low=leaf, basis=rest[0], count=rest[1])
        found.append(leaf)
        number += 1
    return found
