"""Hold a rewritten program against the original: in come a function, its arguments and a rewrite; out go complaints.

Used by the random programs and by the corners. It compares types, values, a second call, and on request gradients and
``vmap``. It raises nothing of its own: what the rewrite or the rewritten program raises passes through.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from tests import eager

Rewrite = Callable[[jex.ClosedJaxpr], jex.ClosedJaxpr]

FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_allow_excess_precision": False,
}
"""Compiler options for programs that run once: code generation is most of their cost."""
EXACT = {"xla_allow_excess_precision": False}
"""Compiler options of the optimised runs: a rounding to bf16 that the program asks for is done."""
TOLERANCE = {
    "float64": 1e-12,
    "complex128": 1e-12,
    "float32": 1e-5,
    "complex64": 1e-5,
    "bfloat16": 1e-2,
    "float16": 2e-3,
}
"""Largest difference of a leaf, as a fraction of its norm."""
AMPLIFIED = {"bfloat16": 3e-2, "float16": 6e-3, "float32": 1e-4}
"""The tolerances of gradients: these programs hold gradients already, and a second derivative amplifies rounding."""
FLOOR = 1e-2
"""Norms below this are taken as this: what cancels to nothing has no relative accuracy."""


def check(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rewrite: Rewrite,
    *,
    compiled: bool = True,
    optimised: bool = False,
    gradient: bool = False,
    batched: bool = False,
    loose: bool = False,
) -> list[str]:
    """Return what differs between ``fn`` and its rewritten program.

    Args:
      fn: a function of pytrees.
      args: its arguments, not donated.
      rewrite: closed jaxpr to closed jaxpr, the same arguments and results in the same order.
      compiled: compile both as one program with few optimisations, and call it twice; else evaluate one primitive at a
        time (``eager``), some ten times faster.
      optimised: compile the two apart, with all of XLA's optimisations.
      gradient: compare the gradient of the sum of the float results too.
      batched: compare under ``vmap`` too.
      loose: the program holds bf16 values, so an optimised run may round otherwise.

    Returns:
      One line for each difference; empty when there is none, and for what JAX itself cannot run (`can_run`).
    """
    closed = jax.make_jaxpr(fn)(*args)
    if not can_run(closed):
        return []
    new = rewrite(closed)
    leaves = jax.tree_util.tree_leaves(args)
    wrong = type_differences(closed, new)
    if wrong:
        return wrong
    wide = 2e-2 if loose and optimised else 0.0
    if compiled or optimised:
        wrong += _compare_runs("value", jex.jaxpr_as_fun(closed), jex.jaxpr_as_fun(new), leaves, optimised, wide)
    else:
        wrong += _compare_eager(closed, new, leaves)
    if gradient:
        rounded = 2.0**-8 if loose else 0.0  # cotangents are summed in bf16, in another order: one rounding
        wrong += _compare_runs(
            "gradient", _gradient(closed), _gradient(new), leaves, optimised, max(20 * wide, rounded)
        )
    if batched:
        wrong += _compare_runs("vmap", _batched(closed), _batched(new), leaves, optimised, wide)
    return wrong


def can_run(closed: jex.ClosedJaxpr) -> bool:
    """Return whether JAX itself can lower a program: not so where a `custom_vjp` was differentiated forward."""
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    return not _holds(getattr(live, "jaxpr", live), "custom_lin")


def _holds(jaxpr: jex.Jaxpr, name: str) -> bool:
    inside = (body for eqn in jaxpr.eqns for body in jex.jaxprs_in_params(eqn.params))
    return any(eqn.primitive.name == name for eqn in jaxpr.eqns) or any(_holds(body, name) for body in inside)


def type_differences(closed: jex.ClosedJaxpr, new: jex.ClosedJaxpr) -> list[str]:
    """Return the differences of argument and result types, weak types included, after checking the new jaxpr itself."""
    jex.check_jaxpr(new.jaxpr)
    wrong = []
    sides = (("argument", closed.in_avals, new.in_avals), ("result", closed.out_avals, new.out_avals))
    for what, old_avals, new_avals in sides:
        if len(old_avals) != len(new_avals):
            wrong.append(f"{what}s: {len(new_avals)} instead of {len(old_avals)}")
        for number, (a, b) in enumerate(zip(old_avals, new_avals, strict=False)):
            if a != b or getattr(a, "weak_type", False) != getattr(b, "weak_type", False):
                wrong.append(f"{what} {number}: {b.str_short()} instead of {a.str_short()}, or its weak type")
    return wrong


def _compare_runs(what: str, old: Callable, new: Callable, leaves: list, optimised: bool, wide: float) -> list[str]:
    if optimised:
        first, second = jax.jit(old).lower(*leaves).compile(EXACT), jax.jit(new).lower(*leaves).compile(EXACT)
        expected, got, again = first(*leaves), second(*leaves), second(*leaves)
    else:
        both = jax.jit(lambda *xs: (old(*xs), new(*xs))).lower(*leaves).compile(FAST)
        (expected, got), (_, again) = both(*leaves), both(*leaves)
    return _differences(what, expected, got, wide) + _repeated(what, got, again)


def _compare_eager(closed: jex.ClosedJaxpr, new: jex.ClosedJaxpr, leaves: list) -> list[str]:
    got = eager.evaluate(new, *leaves)
    return _differences("value", eager.evaluate(closed, *leaves), got, 0.0)


def _differences(what: str, expected: Sequence[Any], got: Sequence[Any], wide: float) -> list[str]:
    amplified = AMPLIFIED if what == "gradient" else {}
    pairs = [(a, b, amplified.get(str(a.dtype), 0.0)) for a, b in zip(expected, got, strict=True)]
    lines = [difference(a, b, max(wide, least)) for a, b, least in pairs]
    return [f"{what} {i}: {line}" for i, line in enumerate(lines) if line]


def _repeated(what: str, got: Sequence[Any], again: Sequence[Any]) -> list[str]:
    same = [np.array_equal(_plain(a), _plain(b), equal_nan=_is_float(a)) for a, b in zip(got, again, strict=True)]
    return [] if all(same) else [f"{what}: the second call differs"]


def difference(expected: Any, got: Any, wide: float = 0.0) -> str:
    """Return how two leaves differ beyond their dtype's tolerance (or ``wide``, if larger); empty when they do not."""
    a, b = _plain(expected), _plain(got)
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{b.dtype}{b.shape} instead of {a.dtype}{a.shape}"
    if not _is_float(expected):
        return "" if np.array_equal(a, b) else f"{np.sum(a != b)} of {a.size} elements differ"
    tolerance = max(TOLERANCE[str(a.dtype)], wide)
    kind = np.complex128 if np.issubdtype(a.dtype, np.complexfloating) else np.float64
    a, b = a.astype(kind), b.astype(kind)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "its values that are not finite differ"
    error, norm = np.linalg.norm((a - b)[finite]), np.linalg.norm(a[finite])
    if error <= tolerance * max(norm, FLOOR):
        return ""
    return f"error {error:.3g} at norm {norm:.3g}, tolerance {tolerance:.0e}"


def _plain(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _gradient(closed: jex.ClosedJaxpr) -> Callable[..., Any]:
    floats = [i for i, aval in enumerate(closed.in_avals) if jnp.issubdtype(aval.dtype, jnp.floating)]
    return jax.grad(_total(closed), argnums=tuple(floats)) if floats else lambda *xs: ()


def _total(closed: jex.ClosedJaxpr) -> Callable[..., Any]:
    def total(*xs):
        results = jex.jaxpr_as_fun(closed)(*xs)
        floats = [y for y in results if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum((jnp.sum(jnp.sin(jnp.asarray(y).astype(jnp.float32))) for y in floats), jnp.float32(0))

    return total


def _batched(closed: jex.ClosedJaxpr) -> Callable[..., Any]:
    axes = [0 if jnp.issubdtype(aval.dtype, jnp.floating) else None for aval in closed.in_avals]

    def batched(*xs):
        pairs = [
            jnp.stack([jnp.asarray(x), 0.5 * jnp.asarray(x)]) if axis == 0 else x
            for x, axis in zip(xs, axes, strict=True)
        ]
        return jax.vmap(jex.jaxpr_as_fun(closed), in_axes=axes)(*pairs)

    return batched if 0 in axes else jex.jaxpr_as_fun(closed)
