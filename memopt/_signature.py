"""Signatures: what makes two calls of a step the same program, found in microseconds.

Arguments come in; a `Signature` (tree, shapes, dtypes, shardings, static values, trace context) goes out, with a quick
comparison for the call after the first, which mostly sees the very same objects again. The options of `jax.jit` live
here as well. Nothing here traces or compiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from memopt import _compat_frontend as compat


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
        arrays = {kind for kind in types if issubclass(kind, jax.Array) and not issubclass(kind, jax.core.Tracer)}
        if len(arrays) == len(types):
            avals = [leaf.aval for leaf in leaves]
            shardings = [leaf.sharding for leaf in leaves]
        else:
            avals = [leaf.aval if type(leaf) in arrays else _abstract(leaf) for leaf in leaves]
            shardings = [leaf.sharding if type(leaf) in arrays else _sharding(leaf) for leaf in leaves]
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

    def without_leaves(self) -> "Signature":
        """Return this signature with no hold on the arrays."""
        return replace(self, leaves=[])

    @property
    def inside_transform(self) -> bool:
        """Whether the call happens under `vmap`, `grad`, `scan` or an outer `jit`."""
        return not compat.is_top_level() or any(issubclass(kind, jax.core.Tracer) for kind in self.types)


def _abstract(leaf: Any) -> Any:
    try:
        return jax.typeof(leaf)
    except TypeError:  # no JAX type: the trace that follows says so in JAX's own words
        return type(leaf)


def _sharding(leaf: Any) -> Any:
    return None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
