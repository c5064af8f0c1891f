"""Scopes: how a user points at a part of the model, by decorator or by module path.

Functions, methods and Flax module classes come in and go out marked by a name scope that the planner reads from an
equation's name stack; patterns (`where=`) are matched with module paths here as well. Nothing here traces or plans.
"""

import difflib
import fnmatch
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from memopt import _codecs
from memopt import _compat as c

T = TypeVar("T", bound=Callable[..., Any])

#: What a decorator asks for, and the name scope that says so in a name stack.
MARKERS = {"keep": "memopt.keep", "recompute": "memopt.recompute", "offload": "memopt.offload"}
#: What the scope of a codec begins with; the codec's name follows.
COMPRESS = "memopt.compress."
#: The scope of a local derivative that a rewrite made, and of one that may be rounded to 0 or 1.
DERIVATIVE, MASK = "memopt.derivative", "memopt.derivative.mask"
#: The scope of what a rewrite keeps in the place of a value: rows of it.
SKETCH = "memopt.sketch"
#: The scope of first rows of a product, whose other rows the backward pass makes again.
ROWS = "memopt.rows"
_MADE = {DERIVATIVE: "derivative", MASK: "derivative.mask", SKETCH: "sketch", ROWS: "rows"}
_ASKS = {marker: ask for ask, marker in MARKERS.items()} | _MADE
#: Marks that some decorator of this process has made and that need a pass of their own.
USED: set[str] = set()
_TRANSFORM = re.compile(r"(?:jvp|transpose|vmap)\(([^()]*)\)")


def keep(target: T) -> T:
    """Keep every value that is made inside: nothing of it is repeated in the backward pass.

    Costs the memory of those values, saves the time of repeating them. An inner mark wins over an outer one.

    Args:
        target: a function, a method, or a Flax module class (linen or nnx), of which `__call__` is marked.

    Returns:
        The same function, marked; of a class, a subclass of the same name, so that a library's class stays unmarked
        for everybody else. Parameters and their names do not change.

    Raises:
        TypeError: the target is none of these.

    Example:
        >>> import jax.numpy as jnp, memopt
        >>> memopt.keep(jnp.tanh)(0.0).item()
        0.0
    """
    return _mark(target, MARKERS["keep"])


def recompute(target: T) -> T:
    """Repeat in the backward pass whatever is made inside, rather than keep it.

    Frees the memory of those values, costs the time of running the operations again. An inner mark wins over an outer.

    Args:
        target: a function, a method, or a Flax module class (linen or nnx), of which `__call__` is marked.

    Returns:
        The same function, marked; of a class, a subclass of the same name.

    Raises:
        TypeError: the target is none of these.

    Example:
        >>> import jax.numpy as jnp, memopt
        >>> memopt.recompute(jnp.tanh)(0.0).item()
        0.0

    Limits: effects (callbacks, prints) and values that the step returns are never repeated.
    """
    return _mark(target, MARKERS["recompute"])


def offload(target: T) -> T:
    """Keep every value that is made inside in the host's memory until the backward pass reads it, in every plan.

    Frees the device memory of those values, costs their transfer to the host and back; results do not change. Values
    that `memopt.passes.Offload` would leave (small ones, arguments) stay. An inner mark wins over an outer one.

    Args:
        target: a function, a method, or a Flax module class (linen or nnx), of which `__call__` is marked.

    Returns:
        The same function, marked; of a class, a subclass of the same name.

    Raises:
        TypeError: the target is none of these.

    Example:
        >>> import jax.numpy as jnp, memopt
        >>> memopt.offload(jnp.tanh)(0.0).item()
        0.0

    Limits: a step that fits its budget as written runs as written. A list in `passes=` means exactly what it holds: it
    needs a `memopt.passes.Offload()` of its own.
    """
    USED.add("offload")
    return _mark(target, MARKERS["offload"])


def compress(codec: str) -> Callable[[T], T]:
    """Keep every value of floats that is made inside in a codec's form until the backward pass reads it, in every plan.

    Frees the difference in bytes, costs an encoding and a decoding of each value. Gradients carry the codec's error,
    forward results do not. An inner mark wins over an outer one.

    Args:
        codec: a name such as `"int8"`, as `memopt.passes.Compress` takes it.

    Returns:
        A decorator for a function, a method, or a Flax module class, as `memopt.offload`.

    Raises:
        ValueError: there is no such codec.
        TypeError: what is decorated is none of these.

    Example:
        >>> import jax.numpy as jnp, memopt
        >>> memopt.compress("int8")(jnp.tanh)(0.0).item()
        0.0

    Limits: a step that fits its budget as written runs as written. A list in `passes=` means exactly what it holds: it
    needs a `memopt.passes.Compress` of this codec.
    """
    if not isinstance(codec, str):
        raise TypeError(f"@memopt.compress takes a codec's name, as in @memopt.compress('int8'); got {codec!r}.")
    name = _codecs.codec(codec).name
    USED.add(f"compress.{name}")
    return lambda target: _mark(target, COMPRESS + name)


def _mark(target: Any, marker: str) -> Any:
    if inspect.isclass(target):
        return _mark_class(target, marker)
    if not callable(target):
        raise TypeError(f"@{marker} marks functions, methods and Flax module classes; got {target!r}.")
    return _mark_function(target, marker)


def _mark_function(function: Callable[..., Any], marker: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(marker):
            return function(*args, **kwargs)

    return marked


def _mark_class(cls: type, marker: str) -> type:
    call = inspect.getattr_static(cls, "__call__", None)
    if not inspect.isfunction(call):
        raise TypeError(f"@{marker} on a class marks its __call__ method, but {cls.__name__} has none. Mark a method.")
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    marked = type(cls)(cls.__name__, (cls,), names)
    # Set afterwards: a linen class would wrap it once more when it is made.
    marked.__call__ = _mark_function(call, marker)  # type: ignore[attr-defined]
    return marked


def mark_of(name_stack: str) -> str | None:
    """Return what the innermost mark of a name stack asks for; None without a mark.

    That is `"keep"`, `"recompute"`, `"offload"` or, for a codec, such as `"compress.int8"`.

    Example:
        >>> mark_of("jvp(memopt.keep)/Block_0/memopt.recompute/Dense_0")
        'recompute'
    """
    return next((ask for ask in map(_asks, reversed(_parts(name_stack))) if ask), None)


def _asks(part: str) -> str | None:
    return part.removeprefix("memopt.") if part.startswith(COMPRESS) else _ASKS.get(part)


def marks_in(jaxpr: Any) -> set[str]:
    """Return what the marks in a jaxpr, and in all jaxprs inside it, ask for."""
    bodies, stacks = [c.open_jaxpr(jaxpr)], set()
    while bodies:
        for eqn in bodies.pop().eqns:
            stacks.add(str(c.name_stack(eqn)))
            bodies += [c.open_jaxpr(body) for _, _, body in c.subjaxprs(eqn.params)]
    return {ask for stack in stacks for ask in map(_asks, _parts(stack)) if ask}


def module_path(name_stack: str) -> str:
    """Return the module path of a name stack: `jvp(...)`, `transpose(...)`, `vmap(...)` and marks taken off.

    Example:
        >>> module_path("transpose(jvp(GPT))/blocks/0/mlp")
        'GPT/blocks/0/mlp'
    """
    return "/".join(part for part in _parts(name_stack) if not _asks(part))


def _parts(name_stack: str) -> list[str]:
    count = 1
    while count:
        name_stack, count = _TRANSFORM.subn(r"\1", name_stack)
    return [part for part in name_stack.split("/") if part]


def match_path(pattern: str, path: str) -> bool:
    """Whether a `where=` pattern matches a module path.

    Args:
        pattern: as for `fnmatch`, case-sensitive; `*` also crosses `/`.
        path: a name stack or a module path.

    Example:
        >>> match_path("*/mlp", "jvp(GPT)/blocks/0/mlp")
        True
    """
    return fnmatch.fnmatchcase(module_path(path), pattern)


def check_patterns(patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Make sure that each pattern matches a module path.

    Args:
        patterns: `where=` patterns.
        paths: the module paths or name stacks of the step.

    Raises:
        ValueError: a pattern matches nothing; the message names it and the paths that come nearest.
    """
    known = sorted({module_path(path) for path in paths} - {""})
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in known):
            near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.0)
            listed = ", ".join(repr(path) for path in near) or "none: the step sets no name scopes"
            raise ValueError(f"The pattern {pattern!r} matches no module path of this step. The nearest are: {listed}.")
