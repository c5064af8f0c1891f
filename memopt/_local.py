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
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from memopt import _compat as c
from memopt import _inline, _local_hlo
from memopt._errors import format_bytes
from memopt._local_spread import Spec, Spread, operation_key, spec_of, uncut
from memopt._local_twin import Twins
from memopt._sizes import aval_bytes

#: Values of unknown sharding smaller than this share of the arguments change no plan, and nothing is compiled for them.
_NEGLIGIBLE = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Shardings:
    """What is known of a step's shardings before planning.

    Attributes:
      arguments: a sharding or None for each input of the jaxpr; None and single-device ones leave it to XLA.
      outputs: the same for each output; None where XLA chooses all of them.
      compiled: compiles the plain step and returns it (None where it is out of memory); called at most once, where a
        large value's sharding cannot be known without it. None forbids that.
    """

    arguments: tuple[Any, ...]
    outputs: tuple[Any, ...] | None = None
    compiled: Callable[[], Any] | None = None

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
        self.copied: dict[Any, tuple[Any, list[Spec]]] = {}  # the same of every operation, by `operation_key`
        self.compile_seconds = 0.0  # spent on the plain step's compiled program
        self._twins = Twins(self)

    def divisors(self, var: Any) -> tuple[int, ...]:
        """Return over how many devices each dimension of a variable is split."""
        return tuple(self._count(axes) for axes in self.specs.get(var, uncut(var)))

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
        Spread(self.sizes, self.specs, set(self.specs), self.origins, self.copied).run(c.open_jaxpr(flat))
        return self._twins.closed(flat)

    def describe(self, closed: Any) -> str:
        """Return the mesh and over how many devices each argument is split, as text."""
        parts = ["x".join(map(str, self.divisors(v))) for v in c.open_jaxpr(closed).invars]
        sizes = {axis: size for axis, size in self.sizes.items() if ":" not in axis}
        return f"{sizes} {' '.join(parts)}"

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
    for eqn, _ in spread.made:
        local.copied[operation_key(eqn, local.specs)] = eqn.params, [local.specs.get(v, uncut(v)) for v in eqn.outvars]
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


def spec_of_shape(
    shape: Sequence[int], local: Sequence[int], sizes: dict[str, int], prefer: Sequence[str] = ()
) -> Spec | None:
    """Return mesh axes that cut `shape` into `local`, the preferred ones first; None where there are none.

    XLA may cut a dimension by a part of an axis: such a part becomes an axis of its own in `sizes`.
    """
    if len(shape) != len(local):
        return None
    free = [*prefer, *(a for a in sizes if a not in prefer and ":" not in a)]
    spec = [_axes_of(size, part, sizes, free) for size, part in zip(shape, local, strict=True)]
    return None if any(axes is None for axes in spec) else tuple(axes for axes in spec if axes is not None)


def _axes_of(size: int, part: int, sizes: dict[str, int], free: list[str]) -> tuple[str, ...] | None:
    """Take axes out of `free` that cut a dimension of this size into such parts."""
    axes: list[str] = []
    ways = 1
    for axis in list(free):
        if -(-size // (ways * sizes[axis])) >= part and -(-size // ways) > part:
            ways *= sizes[axis]
            axes.append(axis)
            free.remove(axis)
    if -(-size // ways) == part:
        return tuple(axes)
    rest = -(-size // part) // ways
    whole = next((a for a in free if rest and sizes[a] % rest == 0), None)
    if whole is None or -(-size // (ways * rest)) != part:
        return None
    sizes[f"{whole}:{rest}"] = rest
    return (*axes, f"{whole}:{rest}")


def _look_up(local: Local, spread: Spread, jaxpr: Any, shardings: Shardings) -> None:
    """Correct the specs by the compiled program, where large values' shardings are unknown or in conflict."""
    least = _NEGLIGIBLE * sum(aval_bytes(v.aval) for v in jaxpr.invars)
    unknown = {v for eqn in spread.unknown if _is_open(local, eqn) for v in eqn.outvars}
    doubtful = [v for v in dict.fromkeys((*unknown, *spread.refused)) if aval_bytes(v.aval) > least]
    if not doubtful:
        return
    start = time.perf_counter()
    compiled = None if shardings.compiled is None else shardings.compiled()
    local.compile_seconds = time.perf_counter() - start
    told = _told(local, spread.made, {} if compiled is None else _local_hlo.parts(compiled.as_text()))
    if told:
        fixed = {v: s for v, s in local.specs.items() if v in spread.fixed}
        for var, sharding in zip(jaxpr.outvars, jax.tree_util.tree_leaves(compiled.output_shardings), strict=True):
            if not isinstance(var, c.Literal) and var not in fixed:
                _fix(fixed, var, sharding, local.sizes)
        again = Spread(local.sizes, {**told, **fixed}, {*told, *fixed})
        again.run(jaxpr)
        local.specs.update(again.specs)
        for eqn in spread.unknown:
            if any(v in told for v in eqn.outvars):
                local.origins[id(eqn.params)] = (eqn.params, [local.specs[v] for v in eqn.outvars])
    missed = [v for v in doubtful if v in unknown and v not in told]
    local.notes = tuple(_notes([v for v in doubtful if v not in missed], missed, compiled is None))


def _is_open(local: Local, eqn: Any) -> bool:
    cut = any(any(local.specs.get(v, ())) for v in eqn.invars if not isinstance(v, c.Literal))
    return cut and not any(any(local.specs.get(v, ())) for v in eqn.outvars)


def _told(local: Local, made: Sequence[tuple[Any, tuple]], parts: Any) -> dict[Any, Spec]:
    """Return the specs that the compiled program tells, of variables that are not fixed otherwise."""
    told: dict[Any, Spec] = {}
    for eqn, stacks in made if parts else ():
        stack = "/".join(part for part in map(str, stacks) if part)
        shapes = _local_hlo.find(parts, stack, eqn.primitive.name, [tuple(_shape(v)) for v in eqn.outvars])
        for var, shape in zip(eqn.outvars, shapes or (), strict=False):
            near = [v for v in (var, *eqn.invars) if not isinstance(v, c.Literal)]
            prefer = dict.fromkeys(a for v in near for axes in local.specs.get(v, ()) for a in axes)
            spec = spec_of_shape(_shape(var), shape, local.sizes, tuple(prefer))
            if spec is not None:
                told[var] = spec
    return told


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def _notes(found: Sequence[Any], missed: Sequence[Any], uncompiled: bool):
    if found and not uncompiled:
        yield (
            f"The sharding of {_counted(found)} does not follow from the arguments' shardings alone and was taken from "
            "the plain step's compiled program."
        )
    if found and uncompiled:
        yield f"The sharding of {_counted(found)} does not follow from the arguments' shardings alone: it is assumed."
    if missed:
        why = "the plain step was not compiled" if uncompiled else "the plain step's compiled program does not tell it"
        yield f"The sharding of {_counted(missed)} is not known, and {why}: counted as unsharded."


def _counted(variables: Sequence[Any]) -> str:
    size = format_bytes(sum(aval_bytes(v.aval) for v in variables))
    return f"{len(variables)} value{'s' if len(variables) > 1 else ''} ({size} on all devices)"


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
