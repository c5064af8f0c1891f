"""The partition wall: how many devices each value of a sharded step is split over, and what one device then holds.

In: the closed jaxpr of a step and the shardings of its arguments. Out: a `Local`, which knows the spec of every
variable, bodies included, and makes the step's twin, the same jaxpr with the shapes that one device sees, on which
bytes and seconds are counted as ever. Shardings travel along the factors of `_local_rules` in the order of XLA's
partitioner (Shardy): through element-wise operations and loops first, both ways, then through all others, out of a
broadcast's operand last. What they do not reach is read from the plain step's compiled program (`_local_hlo`) or taken
as unsharded, with a sentence in `notes`. It changes no program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from memopt import _compat as c
from memopt import _inline, _local_hlo, _local_rules
from memopt._errors import format_bytes
from memopt._local_twin import Twins
from memopt._sizes import aval_bytes

Spec = tuple[tuple[str, ...], ...]  # for each dimension the mesh axes that cut it

#: Values of unknown sharding smaller than this share of the arguments change no plan, and nothing is compiled for them.
_NEGLIGIBLE = 0.01
_MOST_SWEEPS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Shardings:
    """What is known of a step's shardings before planning.

    Attributes:
      arguments: a sharding or None for each input of the jaxpr; None and single-device ones leave it to XLA.
      outputs: the same for each output; None where XLA chooses all of them.
      compiled_text: compiles the plain step and returns its optimized HLO (None where it is out of memory); called at
        most once, where a large value's sharding cannot be known without it. None forbids that.
    """

    arguments: tuple[Any, ...]
    outputs: tuple[Any, ...] | None = None
    compiled_text: Callable[[], str | None] | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether an argument lies on more than one device."""
        return any(s is not None and len(s.device_set) > 1 for s in self.arguments)


class Local:
    """The specs of a step's variables on a mesh.

    Args:
      sizes: mesh axis -> number of devices along it.
      specs: variable -> the mesh axes that cut each of its dimensions.
      notes: sentences for the user about values whose sharding was not known.
    """

    def __init__(self, sizes: Mapping[str, int], specs: dict[Any, Spec], notes: tuple[str, ...] = ()):
        self.sizes, self.specs, self.notes = dict(sizes), specs, notes
        self.origins: dict[int, tuple[Any, list[Spec]]] = {}  # of an unknown operation: its parameters, its results
        self._twins = Twins(self)

    def divisors(self, var: Any) -> tuple[int, ...]:
        """Return over how many devices each dimension of a variable is split."""
        return tuple(self._count(axes) for axes in self.specs.get(var, _open(var)))

    def aval(self, var: Any) -> Any:
        """Return the abstract value that one device holds of a variable."""
        return self.cut(var.aval, self.specs.get(var, ()))

    def cut(self, aval: Any, spec: Spec) -> Any:
        """Return the abstract value of one device's part, rounded up where the division leaves a rest."""
        if not isinstance(aval, c.ShapedArray) or not any(spec):
            return aval
        shape = tuple(-(-size // self._count(axes)) for size, axes in zip(aval.shape, spec, strict=True))
        return c.ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)

    def twin(self, closed: Any) -> Any:
        """Return the jaxpr as one device sees it: equation for equation, with the shapes of one device.

        Variables of a rewritten step that the plain one does not have take the specs of what they are made of. An
        operation whose operands have to be gathered first, or whose partial result is scattered after it, becomes a
        call that holds the collectives too. The twin is for counting; it cannot be run.
        """
        flat = _inline.inline(closed, respect_checkpoint=True)
        if flat is not closed:
            flat = c.close(c.dce(flat)[0], c.jaxpr_consts(flat))
        Spread(self.sizes, self.specs, set(self.specs), self.origins).run(c.open_jaxpr(flat))
        return self._twins.closed(flat)

    def equation(self, eqn: Any) -> Any:
        """Return one equation as one device sees it, with its collectives."""
        return self._twins.equation(eqn, {})

    def _count(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.sizes[a] for a in axes)


def local_shapes(closed: Any, shardings: Shardings) -> Local | None:
    """Return what each device holds of a step's values; None where no argument is sharded.

    Args:
      closed: closed jaxpr, plain or inlined.
      shardings: those of its inputs, and of its outputs where they are asked for.

    Returns:
      The specs of all its variables, with sentences about those that had to be looked up or assumed.
    """
    sizes = _mesh_sizes(shardings)
    if not sizes:
        return None
    jaxpr = c.open_jaxpr(closed)
    specs: dict[Any, Spec] = {}
    for var, sharding in zip(jaxpr.invars, shardings.arguments, strict=True):
        _fix(specs, var, sharding, sizes)
    for var, sharding in zip(jaxpr.outvars, shardings.outputs or (), strict=bool(shardings.outputs)):
        if not isinstance(var, c.Literal):
            _fix(specs, var, sharding, sizes)
    spread = Spread(sizes, specs, set(specs))
    spread.run(jaxpr)
    local = Local(sizes, specs)
    _look_up(local, spread, jaxpr, shardings)
    return local


def _mesh_sizes(shardings: Shardings) -> dict[str, int]:
    if not shardings.is_sharded:
        return {}
    found: dict[str, int] = {}
    for s in (*shardings.arguments, *(shardings.outputs or ())):
        if isinstance(s, NamedSharding):
            found.update(s.mesh.shape)
    return found or {"devices": max(len(s.device_set) for s in shardings.arguments if s is not None)}


def _fix(specs: dict, var: Any, sharding: Any, sizes: Mapping[str, int]) -> None:
    if isinstance(sharding, NamedSharding):
        specs[var] = spec_of(sharding.spec, len(getattr(var.aval, "shape", ())))
    elif sharding is not None and len(sharding.device_set) > 1:
        shape = var.aval.shape
        specs[var] = spec_of_shape(shape, sharding.shard_shape(shape), sizes) or ((),) * len(shape)


def spec_of(spec: Any, rank: int) -> Spec:
    """Return a `PartitionSpec` as a tuple of axis names for each dimension."""
    entries = [() if e is None or e is PartitionSpec.UNCONSTRAINED else e for e in spec][:rank]
    named = [tuple(e) if isinstance(e, tuple) else ((e,) if e else ()) for e in entries]
    return (*named, *((),) * (rank - len(named)))


def spec_of_shape(
    shape: Sequence[int], local: Sequence[int], sizes: Mapping[str, int], prefer: Sequence[str] = ()
) -> Spec | None:
    """Return mesh axes that cut `shape` into `local`, the preferred ones first; None where there are none."""
    if len(shape) != len(local):
        return None
    free = [*prefer, *(a for a in sizes if a not in prefer)]
    spec: list[tuple[str, ...]] = []
    for size, part in zip(shape, local, strict=True):
        axes: list[str] = []
        for axis in list(free):
            if -(-size // math.prod(sizes[a] for a in axes)) > part and -(-size // part) % sizes[axis] == 0:
                axes.append(axis)
                free.remove(axis)
        if -(-size // math.prod(sizes[a] for a in axes)) != part:
            return None
        spec.append(tuple(axes))
    return tuple(spec)


def _open(var: Any) -> Spec:
    return ((),) * len(getattr(var.aval, "shape", ()))


class Spread:
    """One run of propagation.

    Args:
      sizes: mesh axis -> devices.
      specs: what is known already; filled further.
      fixed: variables whose spec may not change.
      origins: known results of operations without a rule, by their parameters.
    """

    def __init__(self, sizes: Mapping[str, int], specs: dict, fixed: set, origins: Mapping[int, Any] | None = None):
        self.sizes, self.specs, self.fixed = sizes, specs, fixed
        self.origins = origins or {}
        self.factors: list[_local_rules.Factor] = []
        self.unknown: list[tuple[Any, str]] = []  # equations without a rule, with their full name stacks
        self.seen: list[Any] = []

    def run(self, jaxpr: Any) -> None:
        """Spread what is known over a jaxpr and the bodies in it, until nothing changes."""
        self._collect(jaxpr, "")
        for phase in (_local_rules.EARLY, _local_rules.LATER, _local_rules.LAST):
            active = [f for f in self.factors if f.phase <= phase]
            for _ in range(_MOST_SWEEPS):
                changed = [self._pass_on(f, phase) for f in active]
                changed += [self._pass_on(f, phase) for f in reversed(active)]
                if not any(changed):
                    break
        for var in self.seen:
            self.specs.setdefault(var, _open(var))

    def _collect(self, jaxpr: Any, stack: str) -> None:
        self.seen += [*jaxpr.constvars, *jaxpr.invars]
        for eqn in jaxpr.eqns:
            atoms = (*eqn.invars, *eqn.outvars)
            if all(isinstance(v, c.Literal) or v in self.fixed for v in atoms) and not c.subjaxprs(eqn.params):
                continue
            self.seen += eqn.outvars
            self._fix_results(eqn)
            here = "/".join(part for part in (stack, str(c.name_stack(eqn))) if part)
            tied = _local_rules.ties(eqn)
            if tied is not None:
                for body, factors in tied:
                    self._add(factors)
                    self._collect(body, here)
                    self._add(factors)
                continue
            factors = _local_rules.factors_of(eqn)
            if factors is None:
                self.unknown.append((eqn, here))
            self._add(factors or ())

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

    def _pass_on(self, factor: _local_rules.Factor, phase: int) -> bool:
        """Give the longest list of axes in a factor to all its places that can take it."""
        specs, changed = self.specs, False
        axes: tuple[str, ...] = ()
        for var, dim in factor.places:
            spec = specs.get(var)
            if spec is not None and len(spec[dim]) > len(axes):
                axes = spec[dim]
        if not axes:
            return False
        every = factor.receives is None or phase == _local_rules.LAST
        takers = factor.places if every else factor.places[: factor.receives]
        for var, dim in takers:
            if var not in self.fixed and self._can_take(var, dim, axes):
                spec = specs.get(var) or _open(var)
                specs[var] = (*spec[:dim], axes, *spec[dim + 1 :])
                changed = True
        return changed

    def _can_take(self, var: Any, dim: int, axes: tuple[str, ...]) -> bool:
        spec = self.specs.get(var)
        if var.aval.shape[dim] < math.prod(self.sizes[a] for a in axes):
            return False
        if spec is None:
            return True
        if spec[dim] == axes or spec[dim] != axes[: len(spec[dim])]:
            return False
        return not any(a in other for i, other in enumerate(spec) if i != dim for a in axes)


def _look_up(local: Local, spread: Spread, jaxpr: Any, shardings: Shardings) -> None:
    """Read the results of operations without a rule from the compiled program, and spread them on."""
    least = _NEGLIGIBLE * sum(aval_bytes(v.aval) for v in jaxpr.invars)
    asked = [(eqn, stack) for eqn, stack in spread.unknown if _is_open(local, eqn)]
    if sum(aval_bytes(v.aval) for eqn, _ in asked for v in eqn.outvars) <= least:
        return
    text = None if shardings.compiled_text is None else shardings.compiled_text()
    found, missed = [], []
    parts = {} if text is None else _local_hlo.parts(text)
    for eqn, stack in asked:
        specs = _specs_of_parts(local, eqn, stack, parts)
        if specs is None:
            missed.append(eqn)
            continue
        found.append(eqn)
        local.origins[id(eqn.params)] = (eqn.params, specs)
    if found:
        specs = {v: s for v, s in local.specs.items() if v in spread.fixed}
        Spread(local.sizes, specs, spread.fixed, local.origins).run(jaxpr)
        local.specs.update(specs)
    local.notes = tuple(_notes(found, missed, text is None))


def _is_open(local: Local, eqn: Any) -> bool:
    cut = any(any(local.specs.get(v, ())) for v in eqn.invars if not isinstance(v, c.Literal))
    return cut and not any(any(local.specs.get(v, ())) for v in eqn.outvars)


def _specs_of_parts(local: Local, eqn: Any, stack: str, parts: Any) -> list[Spec] | None:
    shapes = _local_hlo.find(parts, stack, eqn.primitive.name, [tuple(v.aval.shape) for v in eqn.outvars])
    if shapes is None:
        return None
    prefer = [a for v in eqn.invars if not isinstance(v, c.Literal) for e in local.specs.get(v, ()) for a in e]
    pairs = zip(eqn.outvars, shapes, strict=True)
    specs = [spec_of_shape(v.aval.shape, shape, local.sizes, tuple(dict.fromkeys(prefer))) for v, shape in pairs]
    return None if any(s is None for s in specs) else [s for s in specs if s is not None]


def _notes(found: Sequence[Any], missed: Sequence[Any], uncompiled: bool):
    if found:
        yield (
            f"The sharding of {_named(found)} is not known from the arguments' shardings and was taken from the plain "
            "step's compiled program."
        )
    if missed:
        why = "the plain step was not compiled" if uncompiled else "the plain step's compiled program does not tell it"
        yield f"The sharding of {_named(missed)} is not known, and {why}: counted as unsharded."


def _named(eqns: Sequence[Any]) -> str:
    size = sum(aval_bytes(v.aval) for eqn in eqns for v in eqn.outvars)
    names = ", ".join(dict.fromkeys(eqn.primitive.name for eqn in eqns))
    return f"{len(eqns)} value{'s' if len(eqns) > 1 else ''} ({names}; {format_bytes(size)} on all devices)"


def leaf_shardings(tree: Any, prefix: Any) -> list[Any]:
    """Return the sharding of each leaf of a tree, from a tree prefix as `jax.jit` takes it."""
    treedef = jax.tree_util.tree_structure(tree)
    is_leaf = lambda x: x is None or isinstance(x, (jax.sharding.Sharding, PartitionSpec))  # noqa: E731
    spread = jax.tree_util.tree_map(
        lambda s, part: jax.tree_util.tree_map(lambda _: _Leaf(s), part), prefix, tree, is_leaf=is_leaf
    )
    return [leaf.value for leaf in treedef.flatten_up_to(spread)]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    value: Any
