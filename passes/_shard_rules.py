"""The sharding pass's rule book: a strategy on a mesh, as mesh axes for each kind of value.

In: a mesh and a strategy's name or mapping; a step's groups and roles. Out: a `Layout` (which axes split the batch, the
parameters, the gradients, the moments, features, the sequence) and `Rules`, which give the spec of any value. Every
error of the user's about axes and sizes is raised here. No jaxpr is changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from memopt import _cost, _local_rules
from memopt.passes._shard_flow import Flow, Groups, shape_of
from memopt.passes._shard_roles import BATCH, MOMENT, PARAMETER, Roles

Spec = tuple[tuple[str, ...], ...]

#: Which of parameters, gradients and moments each strategy splits over the data axes.
_ZERO = {
    "data": "",
    "zero1": "m",
    "zero2": "gm",
    "zero3": "pgm",
    "hierarchical": "pgm",
}
_ALIASES = {"fsdp": "zero3", "dp": "data", "tp": "tensor", "sp": "sequence", "cp": "context"}
PARTS = (*_ZERO, "tensor", "sequence", "context")
_STATE = ("parameters", "gradients", "moments")
#: Mesh axes by the names that people give them; any other axis is one for data.
_MODEL = frozenset("model tensor tp mp".split())
_CONTEXT = frozenset("context cp seq sequence sp".split())


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes for each kind of value.

    Attributes:
      batch: axes that split the batch.
      parameters, gradients, moments: axes that split these for storage, beside those that split features.
      tensor: axes that split features.
      sequence: axes that split the sequence where no feature is split over them.
      context: axes that split the sequence everywhere.
    """

    batch: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    context: tuple[str, ...] = ()


def layout(mesh: Any, strategy: str | Mapping[str, Any]) -> Layout:
    """Read a strategy.

    Args:
      mesh: a `jax.sharding.Mesh`.
      strategy: parts joined by `+`, as `"zero3+tensor"`, or a mapping of parts (and of `"parameters"`, `"gradients"`,
        `"moments"`, `"batch"`) to the names of their mesh axes.

    Raises:
      ValueError: an unknown part or axis, or a mesh with too few axes for the parts.
    """
    if isinstance(strategy, str):
        return _nested(_layout_of_parts(mesh, _parts(strategy), strategy))
    return _nested(_layout_of_mapping(mesh, strategy))


def _nested(one: Layout) -> Layout:
    """Return a layout whose smaller parts lie inside the larger ones: the update then cuts a gradient where it lies."""
    gradients = tuple(sorted(one.gradients, key=lambda a: a not in one.parameters))
    moments = tuple(sorted(one.moments, key=lambda a: (a not in one.parameters, a not in gradients)))
    return dataclasses.replace(one, gradients=gradients, moments=moments)


def _parts(strategy: str) -> list[str]:
    parts = [_ALIASES.get(part, part) for part in strategy.lower().replace(" ", "").split("+")]
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"Unknown sharding strategy {part!r}. Join some of {', '.join(PARTS)} by '+', or 'auto'.")
    zero = [part for part in parts if part in _ZERO and part != "data"]
    if len(zero) > 1:
        raise ValueError(f"Strategy {strategy!r} splits the state in two ways, {' and '.join(zero)}: keep one of them.")
    return parts


def _layout_of_parts(mesh: Any, parts: Sequence[str], text: str) -> Layout:
    names = tuple(mesh.axis_names)
    model = tuple(a for a in names if a in _MODEL) if {"tensor", "sequence"} & set(parts) else ()
    context = tuple(a for a in names if a in _CONTEXT) if "context" in parts else ()
    needs = [part for part, axes in (("tensor", model), ("context", context)) if _asks(part, parts) and not axes]
    free = [a for a in names if a not in (*model, *context)]
    others = any(part in _ZERO for part in parts) and "context" not in parts
    if len(free) < len(needs) + others:
        shape = dict(mesh.shape)
        raise ValueError(
            f"Strategy {text!r} needs {len(needs) + others + bool(model) + bool(context)} mesh axes, the mesh is "
            f"{shape}. Give it one for each, as memopt.mesh(target, {_halves(mesh.size)}, ('data', 'model'))."
        )
    for part in reversed(needs):
        if part == "tensor":
            model = (free.pop(),)
        else:
            context = (free.pop(),)
    data = tuple(free)
    zero = next((_ZERO[part] for part in parts if _ZERO.get(part)), "")
    every = (*data, *context)  # each part of a sequence uses all weights, as each part of a batch does
    axes = {key: every if key[0] in zero else () for key in _STATE}
    if "hierarchical" in parts:
        axes.update(parameters=every[-1:], gradients=every[-1:])
    tensor = model if "tensor" in parts else ()
    return Layout(data, tensor=tensor, sequence=model if "sequence" in parts else (), context=context, **axes)


def _asks(part: str, parts: Sequence[str]) -> bool:
    return part in parts or (part == "tensor" and "sequence" in parts)


def _halves(size: int) -> tuple[int, int]:
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return size // small, small


def _layout_of_mapping(mesh: Any, strategy: Mapping[str, Any]) -> Layout:
    axes: dict[str, tuple[str, ...]] = {}
    for key, value in strategy.items():
        part = _ALIASES.get(key, key)
        named = () if value is None else (value,) if isinstance(value, str) else tuple(value)
        for axis in named:
            if axis not in mesh.axis_names:
                raise ValueError(f"Strategy part {key!r} names axis {axis!r}; the mesh has {mesh.axis_names}.")
        if part in _ZERO:
            for state in _STATE:
                if state[0] in _ZERO[part]:
                    axes.setdefault(state, named)
            axes.setdefault("batch", named)
        elif part in ("tensor", "sequence", "context", "batch", *_STATE):
            axes[part] = named
        else:
            raise ValueError(f"Unknown strategy part {key!r}. Known: {', '.join((*PARTS, *_STATE, 'batch'))}.")
    if "batch" not in axes:
        taken = {a for key in ("tensor", "context") for a in axes.get(key, ())}
        axes["batch"] = tuple(a for a in mesh.axis_names if a not in taken)
    return Layout(**axes)


class Rules:
    """The spec of every value of one step under one layout.

    Args:
      flow, groups, roles: what the step is.
      sizes: mesh axis -> devices along it.
      layout: the axes.
      platform: the target's, for tile padding.
      fixed: axes that the user's own shardings give to groups.
      least_elements: smaller leaves are not split for storage.
    """

    def __init__(
        self,
        flow: Flow,
        groups: Groups,
        roles: Roles,
        sizes: Mapping[str, int],
        layout: Layout,
        platform: str = "tpu",
        fixed: Mapping[int, tuple[str, ...]] | None = None,
        least_elements: int = 0,
    ):
        self.flow, self.groups, self.roles, self.sizes, self.layout = flow, groups, roles, dict(sizes), layout
        self.platform, self.least_elements = platform, least_elements
        self.batch_groups = self._input_groups(0)
        self.sequence_groups = self._input_groups(1) - self.batch_groups
        self.taken_apart = self._taken_apart()
        self.tensor: dict[int, tuple[str, ...]] = dict(fixed or {})
        self._check_batch()
        self._check_sequence()

    def count(self, axes: Sequence[str]) -> int:
        """Return over how many devices these axes split."""
        return math.prod(self.sizes[a] for a in axes)

    def _input_groups(self, dim: int) -> set[int]:
        """Return the groups of a dimension of the batch's inputs; of a sequence's, for whole numbers of rank two."""
        found = set()
        for var, kind in zip(self.flow.jaxpr.invars, self.roles.kinds, strict=True):
            if kind == BATCH and len(shape_of(var)) > dim and (dim == 0 or self._is_tokens(var)):
                found.add(self.groups.of(var, dim))
        return found - {None}

    def _taken_apart(self) -> set[int]:
        """Return the groups of rows that are looked up by index, or sliced one part after another.

        A table is better split along its features, and so is a head whose words a loop takes in parts.
        """
        found = set()
        for body in self.flow.bodies:
            for eqn in body.eqns:
                name = eqn.primitive.name
                if name == "gather":
                    gone = eqn.params["dimension_numbers"].collapsed_slice_dims
                    found |= {self.groups.of(eqn.invars[0], d) for d in gone}
                elif name in ("dynamic_slice", "dynamic_update_slice"):
                    part = eqn.outvars[0] if name == "dynamic_slice" else eqn.invars[1]
                    pairs = enumerate(zip(shape_of(eqn.invars[0]), shape_of(part), strict=True))
                    found |= {self.groups.of(eqn.invars[0], d) for d, (size, some) in pairs if size != some}
        for eqn in (eqn for body in self.flow.bodies for eqn in body.eqns if eqn.primitive.name == "reshape"):
            before, after = eqn.invars[0], eqn.outvars[0]
            for whole, parts in _local_rules.reshape_groups(shape_of(before), shape_of(after)):
                if len(whole) == 1 and any(self.groups.of(after, d) in found for d in parts):
                    found.add(self.groups.of(before, whole[0]))
        return found - {None}

    def _is_tokens(self, var: Any) -> bool:
        return len(shape_of(var)) == 2 and var.aval.dtype.kind in "iu"

    def _check_batch(self) -> None:
        ways = self.count(self.layout.batch)
        for var, kind in zip(self.flow.jaxpr.invars, self.roles.kinds, strict=True):
            if kind == BATCH and shape_of(var)[0] % ways:
                size = shape_of(var)[0]
                near = max(d for d in range(1, min(size, ways) + 1) if size % d == 0)
                raise ValueError(
                    f"A batch of {size} ({var.aval.str_short()}) does not divide over {ways} devices "
                    f"(axes {self.layout.batch}). Nearest: a batch of {-(-size // ways) * ways}, or {near} devices."
                )

    def _check_sequence(self) -> None:
        for part in ("sequence", "context"):
            axes = getattr(self.layout, part)
            if not axes:
                continue
            if not self.sequence_groups:
                kinds = zip(self.flow.jaxpr.invars, self.roles.kinds, strict=True)
                shapes = [var.aval.str_short() for var, kind in kinds if kind == BATCH]
                raise ValueError(
                    f"Strategy {part!r} splits a sequence, and the batch has no token input [batch, length]: it is "
                    f"{', '.join(shapes) or 'empty'}. Nearest: 'zero3', or 'zero3+tensor'."
                )
            for group in self.sequence_groups:
                size, ways = self.groups.divisor(group), self.count(axes)
                if size % ways:
                    raise ValueError(
                        f"A sequence whose lengths share the divisor {size} does not divide over {ways} devices (axes "
                        f"{axes}). Nearest: {math.gcd(size, ways)} devices."
                    )

    def value(self, var: Any) -> Spec:
        """Return how a value is split while it is computed: features first, then batch, then sequence."""
        shape, groups = shape_of(var), self.groups.all_of(var)
        spec: list[tuple[str, ...]] = [()] * len(shape)
        used: set[str] = set()

        def give(dim: int, axes: tuple[str, ...]) -> None:
            axes = tuple(a for a in axes if a not in used)
            if axes and not spec[dim] and shape[dim] % self.count(axes) == 0:
                spec[dim] = axes
                used.update(axes)

        for dim, group in enumerate(groups):
            give(dim, self.tensor.get(group, ()))
        for dim, group in enumerate(groups):
            if group in self.batch_groups:
                give(dim, self.layout.batch)
        for dim, group in enumerate(groups):
            if group in self.sequence_groups:
                give(dim, (*self.layout.context, *self.layout.sequence))
        return tuple(spec)

    def features(self, var: Any) -> Spec:
        """Return how a parameter is split while it is used: over the axes of features alone."""
        spec: list[tuple[str, ...]] = []
        for dim, group in enumerate(self.groups.all_of(var)):
            axes = self.tensor.get(group, ())
            taken = any(set(axes) & set(s) for s in spec)
            spec.append(axes if axes and not taken and shape_of(var)[dim] % self.count(axes) == 0 else ())
        return tuple(spec)

    def stored(self, var: Any, axes: tuple[str, ...]) -> Spec:
        """Return how a leaf is split for storage: as it is used, and over `axes` along one more dimension.

        Axes of features that do not split this leaf's features count among `axes`, where there are any.
        The dimension is the one that wastes fewest bytes to tile padding, never one that a loop slices if another one
        divides. Where none divides by all axes, as many as possible are taken, the inner ones first.
        """
        spec = self.features(var)
        if var.aval.size < self.least_elements or not shape_of(var):
            return spec
        every = (*axes, *(a for a in self.layout.tensor if axes and a not in axes))
        free = tuple(a for a in every if not any(a in s for s in spec))
        for first in range(len(free)):
            best = self._best_dim(var, spec, free[first:])
            if best is not None:
                return (*spec[:best], (*spec[best], *free[first:]), *spec[best + 1 :])
        return spec

    def _best_dim(self, var: Any, spec: Spec, axes: tuple[str, ...]) -> int | None:
        shape, sliced = shape_of(var), self._sliced(var)
        ways = [self.count(s) for s in spec]
        more = self.count(axes)
        dims = [d for d in range(len(shape)) if shape[d] % (ways[d] * more) == 0 and (d or not sliced)]
        local = [size // way for size, way in zip(shape, ways, strict=True)]

        def waste(dim: int) -> tuple:
            cut = [size // more if d == dim else size for d, size in enumerate(local)]
            aval = var.aval.update(shape=tuple(cut), sharding=None) if hasattr(var.aval, "update") else var.aval
            apart = self.groups.of(var, dim) in self.taken_apart
            return apart, _cost.padded_bytes(aval, self.platform), -shape[dim], dim

        return min(dims, key=waste, default=None)

    def _sliced(self, var: Any) -> bool:
        """Say whether a loop takes slices of a leaf along its first dimension."""
        if not hasattr(self, "_sliced_leaves"):
            found = {x.outer for ins, outs in self.flow.inner.values() for x in (*ins, *outs) if x.sliced}
            self._sliced_leaves = {leaf for leaf in self.flow.jaxpr.invars if leaf in found} | self._alike(found)
        return var in self._sliced_leaves

    def _alike(self, found: set[Any]) -> set[Any]:
        """Return the leaves, moments above all, that share the groups of a sliced one."""
        keys = {(shape_of(v), self.groups.all_of(v)) for v in found}
        leaves = [v for v, k in zip(self.flow.jaxpr.invars, self.roles.kinds, strict=True) if k in (PARAMETER, MOMENT)]
        return {v for v in leaves if (shape_of(v), self.groups.all_of(v)) in keys}

    def leaf(self, index: int) -> Spec:
        """Return how an input is stored."""
        var, kind = self.flow.jaxpr.invars[index], self.roles.kinds[index]
        if kind == BATCH:
            return self.value(var)
        if kind == PARAMETER:
            return self.stored(var, self.layout.parameters)
        if kind == MOMENT:
            return self.stored(var, self.layout.moments)
        return ((),) * len(shape_of(var))

    def why_whole(self, index: int) -> str:
        """Say why every device holds an input whole."""
        var, kind = self.flow.jaxpr.invars[index], self.roles.kinds[index]
        axes = {PARAMETER: self.layout.parameters, MOMENT: self.layout.moments, BATCH: self.layout.batch}.get(kind, ())
        if kind not in (PARAMETER, MOMENT, BATCH):
            return "neither a parameter, a moment nor a part of the batch"
        if not axes:
            return f"this strategy splits no {kind}" + (" but along its features" if self.layout.tensor else "")
        if var.aval.size < self.least_elements:
            return f"fewer than {self.least_elements} elements"
        return f"no dimension divides over {', '.join(axes)}"
