"""Signatures: what makes two calls of a step the same program, found in microseconds.

Arguments come in; a `Signature` (tree, shapes, dtypes, shardings, static values, trace context) goes out, with a quick
comparison for the call after the first, which mostly sees the very same objects again. The options of `jax.jit` live
here as well. Nothing here traces or compiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from memopt import _compat_frontend as compat
from memopt._target import Target, devices


@dataclass(frozen=True, eq=False)
class JitOptions:
    """The options of `jax.jit`, None where not given."""

    donate_argnums: Any = None
    donate_argnames: Any = None
    static_argnums: Any = None
    static_argnames: Any = None
    in_shardings: Any = None
    out_shardings: Any = None
    compiler_options: Any = None
    keep_unused: Any = None

    def keywords(self) -> dict[str, Any]:
        """Return those that are given, as keywords of `jax.jit`."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    def jit(self, fn: Callable[..., Any]) -> Any:
        """Return `jax.jit(fn)` with these options."""
        return jax.jit(fn, **self.keywords())

    def over(self, base: "JitOptions") -> "JitOptions":
        """Return these options, completed by those of `base`; a given pair (numbers, names) replaces the whole pair."""
        given = self.keywords()
        for pair in (("donate_argnums", "donate_argnames"), ("static_argnums", "static_argnames")):
            if any(name in given for name in pair):
                base = replace(base, **dict.fromkeys(pair))
        return replace(base, **given)


class Statics:
    """Takes the static arguments out of a call, as `jax.jit` numbers and names them."""

    def __init__(self, jitted: Any):
        options = compat.jit_options(jitted)
        self.argnums = tuple(options.get("static_argnums", ()))
        self.argnames = frozenset(options.get("static_argnames", ()))

    def split(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, tuple]:
        """Return the arguments that are traced, and the static ones with their places and types."""
        if not self.argnums and not self.argnames:
            return args, kwargs, ()
        places = {number % len(args) for number in self.argnums if -len(args) <= number < len(args)}
        dynamic = tuple(arg for place, arg in enumerate(args) if place not in places)
        named = sorted(self.argnames & kwargs.keys())
        values = [(place, type(args[place]), args[place]) for place in sorted(places)]
        values += [(name, type(kwargs[name]), kwargs[name]) for name in named]
        rest = {name: value for name, value in kwargs.items() if name not in self.argnames}
        return dynamic, rest, tuple(values)


@dataclass(slots=True)
class Signature:
    """One call's tree, leaves and surroundings.

    `avals` and `shardings` are lists of the very objects that the leaves hold, so that comparing two of them is mostly
    a comparison of identities.
    """

    leaves: list[Any]
    tree: Any
    statics: tuple
    context: Any
    types: frozenset[type]
    avals: list[Any]
    shardings: list[Any]

    @classmethod
    def of(cls, args: tuple, kwargs: dict, statics: tuple = ()) -> "Signature":
        """Read the signature of traced arguments."""
        leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
        types = frozenset(map(type, leaves))
        try:
            avals = [leaf.aval for leaf in leaves]
            shardings = [leaf.sharding for leaf in leaves]
        except AttributeError:
            avals = [_abstract(leaf) for leaf in leaves]
            shardings = [_sharding(leaf) for leaf in leaves]
        return cls(leaves, tree, statics, compat.trace_context(), types, avals, shardings)

    def same_program(self, other: "Signature") -> bool:
        """Whether both calls run the same program; true soonest where the leaves share their avals and shardings."""
        return (
            self.avals == other.avals
            and self.shardings == other.shardings
            and self.context == other.context
            and self.statics == other.statics
            and self.tree == other.tree
        )

    def key(self) -> tuple:
        """Return what a dictionary of programs is keyed by; single-device shardings count as none."""
        shardings = tuple(None if isinstance(s, SingleDeviceSharding) else s for s in self.shardings)
        return self.tree, self.statics, self.context, tuple(self.avals), shardings

    @property
    def inside_transform(self) -> bool:
        """Whether the call happens under `vmap`, `grad`, `scan` or an outer `jit`."""
        return not compat.is_top_level() or any(issubclass(kind, jax.core.Tracer) for kind in self.types)


def _abstract(leaf: Any) -> Any:
    try:
        return compat.abstract_value(leaf)
    except TypeError:  # no JAX type: the trace that follows says so in JAX's own words
        return type(leaf)


def _sharding(leaf: Any) -> Any:
    return None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)


def place(args: tuple, kwargs: dict, target: Target, in_shardings: Any = None) -> tuple[tuple, dict]:
    """Turn arguments into shapes that compile for a target that is not attached.

    Args:
        args: positional arguments, static ones included as they are; arrays, scalars or `jax.ShapeDtypeStruct`s.
        kwargs: named arguments.
        target: the target; arguments without a sharding on its devices go to its first device, or, where others are
            sharded over its mesh, to every device of that mesh.
        in_shardings: those of the options; where given, they settle the devices and nothing is added.

    Returns:
        The arguments with every array leaf as a `jax.ShapeDtypeStruct`.
    """
    if target.attached:
        return args, kwargs
    found = frozenset(devices(target))
    leaves = jax.tree_util.tree_leaves((args, kwargs))
    meshes = [s.mesh for s in map(_sharding, leaves) if isinstance(s, NamedSharding) and s.device_set <= found]
    default = NamedSharding(meshes[0], PartitionSpec()) if meshes else SingleDeviceSharding(devices(target)[0])
    default = None if in_shardings is not None else default
    return jax.tree_util.tree_map(lambda leaf: _placed(leaf, found, default), (args, kwargs))


def _placed(leaf: Any, found: frozenset, default: Any) -> Any:
    aval = _abstract(leaf)
    if isinstance(aval, type):
        return leaf
    own = _sharding(leaf)
    sharding = own if own is not None and own.device_set <= found else default
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding)
