"""The JAX internals that the decorator stands on: a jitted function's options, and the trace context.

Jitted functions and tracing results come in, plain Python values go out. Nothing here plans, compiles or changes state,
and no other module of the decorator imports `jax._src`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src.lax import lax as _lax
from jax._src.sharding_impls import UnspecifiedValue as _UnspecifiedValue


def is_jitted(fn: Any) -> bool:
    """Whether `fn` was made by `jax.jit`, so that its options can be read."""
    return hasattr(fn, "_jit_info") and hasattr(fn, "_fun")


def jitted_function(jitted: Any) -> Callable[..., Any]:
    """Return the Python function inside a jitted one."""
    return jitted._fun


def jit_options(jitted: Any) -> dict[str, Any]:
    """Return the options that `jitted` was made with, names and numbers both resolved, as keywords of `jax.jit`."""
    info = jitted._jit_info
    options = {
        "donate_argnums": info.donate_argnums or None,
        "donate_argnames": info.donate_argnames or None,
        "static_argnums": info.static_argnums or None,
        "static_argnames": info.static_argnames or None,
        "in_shardings": _sharding_tree(info.in_shardings_treedef, info.in_shardings_leaves),
        "out_shardings": _sharding_tree(info.out_shardings_treedef, info.out_shardings_leaves),
        "compiler_options": dict(info.compiler_options_kvs) or None,
        "keep_unused": info.keep_unused or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _sharding_tree(treedef: Any, leaves: Sequence[Any]) -> Any:
    """Rebuild the shardings as the user gave them; None where all of them are unspecified."""
    known = [None if isinstance(leaf, _UnspecifiedValue) else leaf for leaf in leaves]
    return None if all(leaf is None for leaf in known) else jax.tree_util.tree_unflatten(treedef, known)


def closed_over(traced: Any) -> tuple[Any, ...]:
    """Return the outer tracers that a traced function closes over: its jaxpr takes them before the arguments."""
    return tuple(getattr(traced, "_consts", ()))


def trace_context() -> Any:
    """Return the settings that a trace depends on (precision, x64, mesh, named axes): hashable, cheap to make."""
    return _config.trace_context()


def is_top_level() -> bool:
    """Whether no transformation is running, so that a call computes values."""
    return _core.trace_state_clean()


def with_weak_type(value: Any, aval: Any) -> Any:
    """Give a value the weak type that the plain step's output has; evaluating a jaxpr loses it for literals."""
    weak_type = getattr(aval, "weak_type", False)
    if getattr(jax.typeof(value), "weak_type", False) == weak_type:
        return value
    return _lax._convert_element_type(value, aval.dtype, weak_type=weak_type)
