"""The stored form of low-rank moments: what a leaf becomes, which leaves do, and the way there and back.

In: a state and the settings of the projection. Out: the state with a `LowRank` in the place of each moment of a
gradient that is a matrix (or a batch of them, as a scan over layers stacks it). The bases of a gradient are kept with
the first of its moments. Nothing here sees a step, and projections are those of `memopt.optim`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt.optim import _projection as projection
from memopt.optim._galore import Settings
from memopt.optim._leaves import VECTOR_NAMES, Leaf, leaf_key, zeros_beside


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["low", "basis", "count"],
    meta_fields=["leaf", "holder", "first", "total", "settings"],
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A moment in the projected shape.

    Attributes:
      low: the moment, `[..., rank, n]` or `[..., m, rank]`, in its own dtype.
      basis: the bases of the gradient, `[..., m, rank]` or `[..., n, rank]`; None where another moment holds them.
      count: int32 scalar, the number of updates so far; None where another moment holds the bases.
      leaf: the plain leaf (static): its place in tree order beside its siblings, its path, its shape and dtype.
      holder: the path of the moment that holds the bases; None as long as that is not known (static).
      first: the number of its first matrix among all that are projected (static).
      total: the number of those (static).
      settings: how it is projected (static).
    """

    low: Any
    basis: Any
    count: Any
    leaf: Leaf
    holder: str | None
    first: int
    total: int
    settings: Settings

    @property
    def offsets(self) -> np.ndarray:
        """The update within a period at which each matrix gets a new basis, as `memopt.optim` spreads them."""
        every = self.settings.refresh_every
        return (((self.first + np.arange(self.leaf.count)) * every) // max(1, self.total)).astype(np.int32)


def is_low_rank(node: Any) -> bool:
    """Say whether a node of a pytree is a moment in this form."""
    return isinstance(node, LowRank)


@dataclasses.dataclass(frozen=True)
class Moment:
    """A leaf that may be stored: its number among the leaves of the state, and what is kept of it beside its values."""

    number: int
    leaf: Leaf
    tail: str


def moments_of(nodes: Sequence[tuple[tuple, Any]], stores: Callable[[tuple, Any], bool]) -> list[Moment]:
    """Return the leaves of a state that may be stored, in tree order.

    Args:
      nodes: paths and leaves of a state.
      stores: says of a path and a leaf whether it may be.
    """
    siblings: dict[str, int] = {}
    found = []
    for number, (path, leaf) in enumerate(nodes):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            continue
        path = tuple(key for key in path if getattr(key, "name", None) not in ("value", "raw_value"))
        parent, tail = _split(path)
        index = siblings[parent] = siblings.get(parent, -1) + 1
        words = tuple(w for key in path if isinstance(w := getattr(key, "key", getattr(key, "name", None)), str))
        if words[-1:] not in [(name,) for name in VECTOR_NAMES] and stores(path, leaf):
            whole = jax.tree_util.keystr(path)
            found.append(Moment(number, Leaf(index, whole, words, tuple(leaf.shape), np.dtype(leaf.dtype)), tail))
    return found


def _split(path: tuple) -> tuple[str, str]:
    """Cut the path of a moment into that of its tree, which ends with a field such as `.mu`, and the parameter's."""
    fields = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
    cut = fields[-1] + 1 if fields else max(0, len(path) - 1)
    return jax.tree_util.keystr(path[:cut]), jax.tree_util.keystr(path[cut:])


def by_path(moments: Iterable[Moment]) -> dict[int, str]:
    """Say which moment holds the bases of each: the first of those of the same parameter and shape, by their paths."""
    holders: dict[tuple, str] = {}
    return {m.number: holders.setdefault((m.tail, m.leaf.shape), m.leaf.path) for m in moments}


def stored(values: Sequence[Any], moments: Sequence[Moment], holders: dict[int, str | None], settings: Settings) -> Any:
    """Return the stored form of leaves, by their numbers.

    Moments that are zero stay so, and their bases are made at the first update. Others are projected onto directions
    found in the holder: exact for what lies in them and lost beside them. Moments without a negative value are taken
    for squares, and projected with the bases' squares, as variances are.

    Args:
      values: all leaves of the state, or shapes.
      moments: those to store.
      holders: by number, the path of the moment that holds the bases; None where that is not known yet.
      settings: how they are projected.
    """
    counts = [m.leaf.count if holders[m.number] in (m.leaf.path, None) else 0 for m in moments]
    total = sum(counts)
    firsts = {m.leaf.path: sum(counts[:i]) for i, m in enumerate(moments)}
    made: dict[int, LowRank] = {}
    bases: dict[str, Any] = {}
    for m in sorted(moments, key=lambda m: holders[m.number] not in (m.leaf.path, None)):
        holder, value = holders[m.number], values[m.number]
        alone = holder in (m.leaf.path, None)
        if alone:
            bases[m.leaf.path] = _of(functools.partial(_basis, m.leaf, settings), value)
        basis, count = bases[m.leaf.path if holder is None else holder]
        low = _of(functools.partial(_project, m.leaf, settings), value, basis)
        first = firsts[holder or m.leaf.path]
        own = (basis, count) if alone else (None, None)
        made[m.number] = LowRank(low, *own, m.leaf, holder, first, total, settings)
    return made


def _of(make: Callable[..., Any], *values: Any) -> Any:
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree_util.tree_leaves(values))
    return jax.eval_shape(make, *values) if shapes else make(*values)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer) and not bool(jnp.any(value != 0))


def _basis(leaf: Leaf, settings: Settings, value: Any) -> tuple[Any, Any]:
    """Return the bases that go with a moment, and how often they were made."""
    zeros = zeros_beside(value, settings.basis_shape(leaf), leaf.dtype)
    if _is_zero(value):
        return zeros, jnp.zeros([], jnp.int32)
    matrices, key = projection.as_batch(value), leaf_key(settings.seed, leaf, 0)
    new = jax.lax.map(lambda i: settings.new_basis(matrices[i], i, key), jnp.arange(leaf.count, dtype=jnp.int32))
    return new.reshape(zeros.shape).astype(zeros.dtype), jnp.any(value != 0).astype(jnp.int32)


def _project(leaf: Leaf, settings: Settings, value: Any, basis: Any) -> Any:
    zeros = zeros_beside(value, projection.low_shape(leaf.shape, settings.rank, settings.side), leaf.dtype)
    if _is_zero(value):
        return zeros
    low, squares = (projection.project(value, b, settings.side) for b in (basis, jnp.square(basis)))
    return jnp.where(jnp.all(value >= 0), squares, low).astype(leaf.dtype)


def plain(node: LowRank, basis: Any) -> Any:
    """Return a moment in its full shape: projected back, with the bases' squares where it has no negative value."""

    def back(low, basis):
        full = [
            projection.project_back(low, b, node.leaf.shape, node.settings.side) for b in (basis, jnp.square(basis))
        ]
        return jnp.where(jnp.all(low >= 0), full[1], full[0]).astype(node.leaf.dtype)

    return _of(back, node.low, basis)
