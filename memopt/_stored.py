"""The cloakroom: state that a step takes and returns in another form than its author wrote it for.

In: a step, and passes that store leaves in another form (`StateForm` in `_contract`). Out: a step over the stored form,
which decodes leaves, calls the author's, and encodes their new values; and the way there and back for whole states.
What the author's function sees is plain. Nothing here traces, plans or knows a codec.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from memopt._codec import Encoded
from memopt._contract import StateForm


def forms_of(passes: Sequence[Any] | None) -> tuple[StateForm, ...]:
    """Return the passes that store state in another form, in the order of their stages."""
    found = [p for p in passes or () if isinstance(p, StateForm) and p.stores_state]
    return tuple(sorted(found, key=lambda p: getattr(p, "stage", 0)))


def matches(path: str, where: str | Sequence[str]) -> bool:
    """Say whether a `keystr` path matches a pattern; `*` and `?` alone are special, brackets are not."""
    patterns = (where,) if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(path, pattern.replace("[", "[[]")) for pattern in patterns)


def compress(state: Any, forms: Sequence[StateForm], ask: Callable[[StateForm, Any], None] | None = None) -> Any:
    """Return a state, or shapes of one, in the stored form; leaves that are stored already stay.

    Args:
      state: the state.
      forms: the passes that store it.
      ask: traces the step over the forms up to one, with a state in the place of the given one; for passes that look at
        the step.
    """
    for form in forms:
        asks = ask is not None and getattr(form, "asks", False)
        state = form.compress(state, functools.partial(ask, form)) if asks else form.compress(state)
    return state


def decompress(state: Any, forms: Sequence[StateForm]) -> Any:
    """Return a state, or shapes of one, in its plain form; plain leaves stay."""
    for form in reversed(forms):
        state = form.decompress(state)
    return state


def over_stored(fn: Callable[..., Any], forms: Sequence[StateForm]) -> Callable[..., Any]:
    """Return a step over the stored form of all passes."""
    for form in forms:
        fn = form.over(fn)
    return fn


class LeafForm:
    """What is common to passes that store each leaf by itself: they say which, and how it is encoded and decoded."""

    stores_state = True

    def stores(self, path: str, leaf: Any) -> bool:
        """Say whether the pass stores a plain leaf (an array, a tracer or a shape) at this `keystr` path."""
        raise NotImplementedError

    def is_stored(self, node: Any) -> bool:
        """Say whether a node of a pytree is a leaf in this form."""
        raise NotImplementedError

    def encode(self, leaf: Any) -> Any:
        """Return a leaf in this form."""
        raise NotImplementedError

    def decode(self, node: Any) -> Any:
        """Return the plain leaf."""
        raise NotImplementedError

    def compress(self, state: Any) -> Any:
        """Return a state, or shapes of one, with its leaves stored.

        Raises:
          ValueError: there is no leaf to store.
        """
        nodes, tree = flatten(state, self.is_stored)
        chosen = [self.is_stored(node) or stored_at(self, path, node) for path, node in nodes]
        if not any(chosen):
            raise ValueError(nothing_matches(self, [path for path, _ in nodes]))
        return tree.unflatten([self._encoded(n) if yes else n for (_, n), yes in zip(nodes, chosen, strict=True)])

    def _encoded(self, node: Any) -> Any:
        if self.is_stored(node):
            return node
        return jax.eval_shape(self.encode, node) if is_shape(node) else self.encode(node)

    def decompress(self, state: Any) -> Any:
        """Return a state, or shapes of one, with its leaves plain."""
        nodes, tree = flatten(state, self.is_stored)
        return tree.unflatten([self._decoded(node) if self.is_stored(node) else node for _, node in nodes])

    def _decoded(self, node: Any) -> Any:
        shapes = any(is_shape(leaf) for leaf in jax.tree_util.tree_leaves(node))
        return jax.eval_shape(self.decode, node) if shapes else self.decode(node)

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step that decodes leaves, calls `fn` on plain ones, and encodes their new values.

        The new value of a leaf is the result with its shape and dtype whose path ends most like the leaf's own. A leaf
        that `fn` returns as it is stays stored as it is; one that it does not return is only read.

        Raises (when called):
          TypeError: a leaf that the pass stores comes in plain.
          ValueError: there is no leaf to store.
        """

        @functools.wraps(fn, updated=())
        def step(*args: Any, **kwargs: Any) -> Any:
            nodes, tree = flatten((args, kwargs), self.is_stored)
            check_stored(fn, self, nodes)
            plain = [self.decode(node) if self.is_stored(node) else node for _, node in nodes]
            plain_args, plain_kwargs = with_leaves((args, kwargs), tree, plain, self.is_stored)
            stored = [(path, node, new) for (path, node), new in zip(nodes, plain, strict=True) if new is not node]
            results, out_tree = jax.tree_util.tree_flatten_with_path(fn(*plain_args, **plain_kwargs))
            leaves = [leaf for _, leaf in results]
            for i, k in new_values([(path, old) for path, _, old in stored], results).items():
                _, node, old = stored[i]
                leaves[k] = node if leaves[k] is old else self.encode(leaves[k])
            return out_tree.unflatten(leaves)

        return step


def flatten(tree: Any, is_stored: Callable[[Any], bool]) -> tuple[list[tuple[tuple, Any]], Any]:
    """Return the leaves of a tree with their paths, and its structure; what any pass has stored is one leaf."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: isinstance(n, Encoded) or is_stored(n))


def is_shape(leaf: Any) -> bool:
    """Say whether a leaf stands for an array without being one."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def stored_at(form: Any, path: tuple, leaf: Any) -> bool:
    """Say whether a pass stores the leaf at a path, spelt with or without its first entry."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return False
    spellings = [path[i:] for i in range(min(len(path), 2))] or [path]
    return any(form.stores(jax.tree_util.keystr(p), leaf) for p in spellings)


def nothing_matches(form: Any, paths: Sequence[tuple]) -> str:
    """Return the sentence that a pass found no leaf, with a few of the paths that there are."""
    shown = ", ".join(map(jax.tree_util.keystr, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return (
        f"{form!r} matches no leaf that it can store, of {shown or 'no leaves'}. Give where= a pattern of their paths."
    )


def check_stored(fn: Callable[..., Any], form: Any, nodes: Sequence[tuple[tuple, Any]]) -> None:
    """Check that the leaves of `(args, kwargs)` that a pass stores are stored.

    Raises:
      TypeError: one is plain.
      ValueError: there is none.
    """
    name = getattr(fn, "__name__", "step")
    for path, node in nodes:
        if not form.is_stored(node) and stored_at(form, path[1:], node):
            spelling = ("args" if path[0].idx == 0 else "kwargs") + jax.tree_util.keystr(path[1:])
            raise TypeError(
                f"{spelling} of {name} is plain, but {form!r} stores it in another form. Call state = "
                f"{name}.compress(state) once before the loop; {name}.decompress(state) gives the plain state again."
            )
    if not any(form.is_stored(node) for _, node in nodes):
        raise ValueError(nothing_matches(form, [path[1:] for path, _ in nodes]))


def with_leaves(given: tuple, tree: Any, leaves: Sequence[Any], is_stored: Callable[[Any], bool]) -> tuple[Any, Any]:
    """Return `(args, kwargs)` with other leaves; arguments that hold nothing stored stay the objects that they are."""
    args, kwargs = given
    new_args, new_kwargs = tree.unflatten(leaves)
    args = tuple(new if _holds(old, is_stored) else old for old, new in zip(args, new_args, strict=True))
    return args, {name: new_kwargs[name] if _holds(old, is_stored) else old for name, old in kwargs.items()}


def _holds(tree: Any, is_stored: Callable[[Any], bool]) -> bool:
    return any(is_stored(node) for node in jax.tree_util.tree_leaves(tree, is_leaf=is_stored))


def new_values(old: Sequence[tuple[tuple, Any]], results: Sequence[tuple[tuple, Any]]) -> dict[int, int]:
    """Return for each old leaf the number of the result that is its new value, where there is one.

    Args:
      old: path and leaf of each.
      results: path and leaf of each result.
    """
    ranked = [
        (-_common(path, out_path), i, k)
        for i, (path, leaf) in enumerate(old)
        for k, (out_path, new) in enumerate(results)
        if _alike(leaf, new) and _common(path, out_path)
    ]
    found: dict[int, int] = {}
    taken: set[int] = set()
    for _, i, k in sorted(ranked):
        if i not in found and k not in taken:
            found[i] = k
            taken.add(k)
    return found


def _alike(old: Any, new: Any) -> bool:
    return getattr(new, "shape", None) == old.shape and getattr(new, "dtype", None) == old.dtype


def _common(path: tuple, other: tuple) -> int:
    """Return how many entries two paths end with alike."""
    count = 0
    for a, b in zip(reversed(path), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
