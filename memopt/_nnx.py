"""Flax nnx: steps that take modules, optimizers and RNG streams and change them, and name scopes for nnx modules.

An nnx step comes in; a pure step over pytrees goes to the core, through the very protocol of `nnx.jit` (joint split,
write-back of updates, counts and new attributes), so that what holds for `nnx.jit` holds here. flax.nnx is imported
only where the user did so before. Nothing here plans.
"""

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from memopt import _compat_frontend as compat


def _nnx() -> Any:
    """Return flax.nnx where the user has imported it, else None."""
    return sys.modules.get("flax.nnx")


def has_objects(tree: Any) -> bool:
    """Whether a pytree holds nnx modules, optimizers, RNGs or variables; an `nnx.State` is plain data."""
    nnx = _nnx()
    if nnx is None:
        return False
    objects, stops = (nnx.Pytree, nnx.Variable), (nnx.Pytree, nnx.Variable, nnx.State, nnx.GraphDef)
    leaves = jax.tree_util.tree_leaves(tree, is_leaf=lambda x: isinstance(x, stops))
    return any(isinstance(leaf, objects) for leaf in leaves)


def is_nnx_jitted(fn: Any) -> bool:
    """Whether `fn` was made by `nnx.jit`."""
    return compat.is_jitted(getattr(fn, "jitted_fn", None)) and callable(getattr(fn, "fun", None))


def jit_arguments(wrapped: Any) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
    """Return the function inside an `nnx.jit`, its options of `jax.jit`, and its mode (graph or tree)."""
    options = compat.jit_options(wrapped.jitted_fn)
    statics = options.get("static_argnums", ())
    given = {"in_shardings": wrapped.in_shardings, "out_shardings": wrapped.out_shardings}
    if isinstance(given["in_shardings"], tuple) and statics:  # nnx.jit put None in the places of static arguments
        given["in_shardings"] = tuple(s for i, s in enumerate(given["in_shardings"]) if i not in statics)
    options = {name: value for name, value in options.items() if name not in given}
    options |= {name: value for name, value in given.items() if value is not None}
    graph = getattr(wrapped, "graph", True)
    return wrapped.fun, options, {"graph": graph, "graph_updates": graph and not hasattr(wrapped, "graph")}


class NnxStep:
    """A step over nnx objects: `nnx.jit` outside, the core where `nnx.jit` has `jax.jit`.

    Args:
        fn: the user's function.
        options: options of `jax.jit`; `compiler_options` and `keep_unused` go to the core alone.
        mode: `graph` and `graph_updates` of `nnx.jit`, none for its defaults.
        make_core: makes the core from the pure function, jitted.
    """

    def __init__(self, fn: Callable, options: dict[str, Any], mode: dict[str, Any], make_core: Callable[[Any], Any]):
        known = {name: value for name, value in options.items() if name not in ("compiler_options", "keep_unused")}
        self.wrapped = _nnx().jit(fn, **known, **mode)
        self.core = make_core(self.wrapped.jitted_fn)
        self.port = _Port(self.core)
        self.wrapped.jitted_fn = self.port

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def ask(self, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Call `method(core, *args, **kwargs)` with the pure arguments; the nnx objects stay as they are."""
        with self.port.answering(method):
            self.wrapped.trace(*args, **kwargs)
            return self.port.local.answer


class _Port:
    """Stands where `nnx.jit` has its jitted function: calls run the core, `.trace` asks it something."""

    def __init__(self, core: Any):
        self.core = core
        self.local = threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.core(*args, **kwargs)

    @contextlib.contextmanager
    def answering(self, method: Callable[..., Any]) -> Iterator[None]:
        self.local.method = method
        try:
            yield
        finally:
            self.local.__dict__.clear()

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        self.local.answer = self.local.method(self.core, *args, **kwargs)
        return self.local.answer


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Turn flax's error about a changed object from outside the step into one that names the remedy."""
    errors = sys.modules.get("flax.errors")
    try:
        yield
    except getattr(errors, "TraceContextError", ()) as error:
        raise ValueError(
            "The step changes an nnx object that it closes over; the change would be lost after the first call. "
            f"Pass the object as an argument of the step. (flax: {error})"
        ) from error


_lock = threading.Lock()
_originals: list[tuple[type, str, Callable[..., Any]]] = []
_users = 0
_local = threading.local()


@contextlib.contextmanager
def module_scopes() -> Iterator[None]:
    """Give nnx modules name scopes by attribute path while the block runs in this thread.

    nnx sets no name scopes. For as long as a step is traced, the methods of nnx module classes are wrapped: the
    outermost module that is called is the root, and what it calls runs under `jax.named_scope("blocks/0/mlp")`. The
    wrappers do nothing in other threads, and the last tracing to end takes them off. A module that a transformation
    (`nnx.scan`) has rebuilt is known by its class, where that class stands at one path only: in a scan, one path for
    all layers. A root that is no argument's attribute has the empty path.
    """
    nnx = _nnx()
    if nnx is None:
        yield
        return
    outer = getattr(_local, "stack", None)
    _local.stack = []
    _install(nnx)
    try:
        yield
    finally:
        _uninstall()
        _local.stack = outer


def _install(nnx: Any) -> None:
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        for cls in _subclasses(nnx.Module):
            for name, method in list(vars(cls).items()):
                if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                    _originals.append((cls, name, method))
                    setattr(cls, name, _scoped(method))


def _uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        while not _users and _originals:
            cls, name, method = _originals.pop()
            setattr(cls, name, method)


def _subclasses(cls: type) -> set[type]:
    below = set(cls.__subclasses__())
    return below.union(*map(_subclasses, below))


def _scoped(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def scoped(self: Any, *args: Any, **kwargs: Any) -> Any:
        stack = getattr(_local, "stack", None)
        if stack is None:
            return method(self, *args, **kwargs)
        frame, path, name = _enter(stack, self)
        stack.append((frame, path))
        try:
            with jax.named_scope(name) if name else contextlib.nullcontext():
                return method(self, *args, **kwargs)
        finally:
            stack.pop()

    return scoped


class _Frame:
    """The paths of a module and of all modules below it."""

    def __init__(self, root: Any, prefix: str):
        found = {prefix: root} | {_join(prefix, path): module for path, module in _nnx().iter_modules(root)}
        self.modules = list(found.values())  # held, so that their ids stay theirs
        self.paths = {id(module): path for path, module in found.items()}
        self.by_class: dict[type, list[str]] = {}
        for path, module in found.items():
            self.by_class.setdefault(type(module), []).append(path)

    def path_of(self, module: Any) -> str | None:
        return self.paths.get(id(module))

    def path_of_class(self, cls: type) -> str | None:
        paths = self.by_class.get(cls, [])
        return paths[0] if len(paths) == 1 else None


def _join(prefix: str, path: tuple) -> str:
    return "/".join([part for part in (prefix, *map(str, path)) if part])


def _enter(stack: list, module: Any) -> tuple[_Frame, str, str]:
    """Return the frame, the path and the name scope to open for a module that is called."""
    if not stack:
        return _Frame(module, ""), "", ""
    frame, current = stack[-1]
    path = frame.path_of(module)
    if path is None:
        guess = frame.path_of_class(type(module))
        path = current if guess is None else guess
        frame = _Frame(module, path)
    inside = path == current or not current or path.startswith(current + "/")
    return frame, path, path[len(current) :].strip("/") if inside else path
