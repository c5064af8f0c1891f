"""Sketches: residuals that only a weight's gradient reads, kept as random combinations or as a sample of their rows.

In: a survey of the step. Out: a `Store` for each forward value whose later readers are contractions for weight
gradients alone, found by dataflow. A gradient made from a sketch is random, and right in expectation; nothing else of
the backward pass, and nothing of the forward pass, reads it. Which are taken is the planner's choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _forms
from memopt import _graph as g
from memopt._contract import Left, Store
from memopt._survey import Survey
from memopt.passes import _residuals

_KINDS = ("rmm", "rmm-gaussian", "wta")
_CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Let the planner keep what only weight gradients read as a sketch of its rows (tokens).

    A linear layer's input `X` of `[rows, features]` is read once more, for `X.T @ dY`. Kept instead are

    - `"rmm"`: `S.T @ X` with a random `S` of `[rows, rank]` with signs as entries, made again where it is read, so that
      the gradient is that of `S @ S.T @ X / rank`; with `"rmm-gaussian"` entries are Gaussian. The gradient's variance
      (the expected squared Frobenius norm of its error) is `(|X|^2 |dY|^2 + |X.T @ dY|^2) / rank` for Gaussian
      entries, and less by `2 / rank * sum_i |x_i|^2 |dy_i|^2` for signs;
    - `"wta"`: `rank` whole rows with their numbers: the rows of the largest norms as they are, and a sample of the
      rest, drawn in proportion to their norms and scaled by one over their probability. How many are taken as they
      are is what makes the variance smallest.

    Memory of such a value falls to about `ratio`; the cost is two matmuls of `2 * rows * rank * features` FLOPs (rmm),
    or a sort of the rows' norms and a scatter (wta). Gradients of weights are unbiased and noisy, all else is exact.

    Args:
      kind: one of these.
      ratio: `rank / rows`, above 0 and below 1.
      where: `fnmatch` patterns on module paths, a string or a tuple; empty for everything.
      seed: of the random numbers; each value's own come from it and a hash of the value's bits.

    Example:
      >>> import memopt
      >>> memopt.passes.Sketch("wta", ratio=0.3)
      Sketch(kind='wta', ratio=0.3, where=(), seed=0)

    Raises:
      ValueError: an unknown kind, a ratio outside its range, or a pattern that matches no module path.

    Source: Bershatsky et al., "Memory-Efficient Backpropagation through Large Linear Layers", 2022 (arXiv 2201.13195);
    Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model", NeurIPS 2023
    (arXiv 2305.15265), section 3.

    Limits: the sample's probabilities go by the rows' own norms; the cache of gradient norms from earlier steps that
    WTA-CRS multiplies them with is not built. Values that anything else reads later, gradients of convolutions, and
    what is inside a `shard_map` stay as they are. A value that is not finite makes the whole gradient not finite.
    """

    kind: str = "rmm"
    ratio: float = 0.1
    where: str | tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "where", (self.where,) if isinstance(self.where, str) else tuple(self.where))
        if self.kind not in _KINDS:
            raise ValueError(f"A sketch is one of {', '.join(_KINDS)}, not {self.kind!r}.")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"The ratio of rank to rows is above 0 and below 1, not {self.ratio}.")

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "sketch"

    def propose(self, survey: Survey) -> Iterator[Store | Left]:
        """Yield a `Store` for each forward value that weight gradients alone read later."""
        marks = _forms.Marks(survey.graph)
        for one in _residuals.chosen(survey, self.where):
            readers = frozenset(o for o in one.readers if marks.is_backward(survey.graph.ops[o]))
            axes = _rows_of(survey.graph, one.value, len(one.aval.shape), readers, marks)
            if (
                axes is None
                or _residuals.is_view(survey.graph, one.value)
                or not jnp.issubdtype(one.aval.dtype, jnp.floating)
            ):
                continue
            form = self.form(one.aval.shape, one.aval.dtype, axes)
            leaves = jax.eval_shape(form.encode, jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype))
            size = sum(survey.bytes_of(leaf) for leaf in leaves)
            if size < one.bytes:
                seconds = _residuals.move_seconds(survey, size, 2 * one.bytes) + form.seconds(survey.spec)
                yield Store(
                    one.value,
                    seconds,
                    size,
                    form.encode,
                    form.decode,
                    error=form.error,
                    name=self.kind,
                    readers=readers,
                )

    def form(self, shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...]) -> Combined | Sampled:
        """Return the sketch of arrays of this shape and dtype, whose rows are along `axes`."""
        rows = math.prod(shape[a] for a in axes)
        common = dict(shape=tuple(shape), dtype=np.dtype(dtype).name, axes=tuple(axes), seed=self.seed)
        common["rank"] = max(1, min(rows - 1, round(self.ratio * rows)))
        return Sampled(**common) if self.kind == "wta" else Combined(**common, gaussian=self.kind == "rmm-gaussian")


def _rows_of(
    graph: g.Graph, value: int, rank: int, readers: frozenset[int], marks: _forms.Marks
) -> tuple[int, ...] | None:
    """Return the axes that weight gradients contract, where the backward pass reads a value for nothing but those."""
    found = set()
    for reader in (graph.ops[o] for o in readers):
        if reader.eqn.primitive.name != "dot_general":
            return None
        contracting, batches = reader.eqn.params["dimension_numbers"]
        sides = [i for i, v in enumerate(reader.inputs) if v == value]
        if len(sides) != 1 or any(batches) or _feeds_gradients(graph, reader, marks):
            return None
        found.add(tuple(contracting[sides[0]]))
    axes = found.pop() if len(found) == 1 else None
    return axes if axes and len(axes) < rank else None


def _feeds_gradients(graph: g.Graph, op: g.Op, marks: _forms.Marks) -> bool:
    """Say whether another contraction of the backward pass reads what is made from an operation's result."""
    made = set(op.outputs)
    for other in graph.regions[op.region].ops[op.index + 1 :]:
        if made.isdisjoint(v for v in other.inputs if v is not None):
            continue
        if other.eqn.primitive.name in _CONTRACTIONS or other.bodies:
            return True
        if marks.is_backward(other):
            made.update(other.outputs)
    return False


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What both sketches have in common: the array as a matrix `[rows, features]`, and a key of its own."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...]
    rank: int
    seed: int

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def features(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.shape) // self.rows

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.axes, *(a for a in range(len(self.shape)) if a not in self.axes))

    def _matrix(self, x: Any) -> Any:
        return jnp.transpose(x, self._order).reshape(self.rows, self.features)

    def _array(self, matrix: Any) -> Any:
        array = matrix.reshape(tuple(self.shape[a] for a in self._order))
        return jnp.transpose(array, tuple(int(i) for i in np.argsort(self._order)))

    def _hash(self, x: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        return jnp.sum(bits, dtype=jnp.uint32)

    def _key(self, hashed: Any) -> Any:
        return jax.random.fold_in(jax.random.key(self.seed), hashed)


@dataclasses.dataclass(frozen=True)
class Combined(_Rows):
    """A matrix `X` as `S.T @ X / sqrt(rank)`: `decode` gives `S @ S.T @ X / rank`, whose expectation is `X`.

    The leaves are the combinations, `[rank, features]` of the array's dtype, and a hash from which `S` is made again.
    """

    gaussian: bool = False

    @property
    def error(self) -> float:
        """Expected error relative to the norm of the array, of a decoded array; that of the gradient is smaller."""
        return math.sqrt(self.rows / self.rank)

    def seconds(self, spec: Any) -> float:
        """Return the predicted seconds of both matmuls."""
        return 2 * 2.0 * self.rows * self.rank * self.features / spec.matmul_rate(self.dtype)

    def _random(self, hashed: Any) -> Any:
        make = jax.random.normal if self.gaussian else jax.random.rademacher
        return make(self._key(hashed), (self.rows, self.rank), self.dtype)

    def encode(self, x: Any) -> tuple[Any, Any]:
        """Return the combinations and the hash."""
        hashed = self._hash(x)
        product = jnp.matmul(self._random(hashed).T, self._matrix(x), preferred_element_type=jnp.float32)
        return (product * np.float32(1 / math.sqrt(self.rank))).astype(self.dtype), hashed

    def decode(self, leaves: tuple[Any, Any]) -> Any:
        """Return an array whose expectation is the one that was encoded."""
        product = jnp.matmul(self._random(leaves[1]), leaves[0], preferred_element_type=jnp.float32)
        return self._array((product * np.float32(1 / math.sqrt(self.rank))).astype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Sampled(_Rows):
    """A matrix as `rank` of its rows: the largest as they are, others drawn at random and scaled.

    The leaves are the rows, `[rank, features]` of the array's dtype, and their numbers, `int32 [rank]`. `decode` adds
    them up in an array of zeros, whose expectation is the one that was encoded.
    """

    @property
    def error(self) -> float:
        """Expected error relative to the norm of the array, at most, of a decoded array."""
        return math.sqrt(self.rows / self.rank)

    def seconds(self, spec: Any) -> float:
        """Return the predicted seconds of sorting the norms."""
        return self.rows * math.log2(max(2, self.rows)) ** 2 / spec.vector_flops_per_second

    def encode(self, x: Any) -> tuple[Any, Any]:
        """Return the rows and their numbers."""
        matrix = self._matrix(x)
        index, weight = self.sample(jnp.sum(matrix.astype(jnp.float32) ** 2, axis=1), self._key(self._hash(x)))
        return (matrix[index].astype(jnp.float32) * weight[:, None]).astype(self.dtype), index

    def sample(self, squares: Any, key: Any) -> tuple[Any, Any]:
        """Return numbers and weights of `rank` rows whose squared norms are given; the largest come first."""
        norms = jnp.sqrt(squares) + np.float32(jnp.finfo(jnp.float32).tiny)
        order = jnp.argsort(-norms).astype(jnp.int32)
        chance = norms[order] / jnp.sum(norms)
        reached = jnp.cumsum(chance)
        slots = jnp.arange(self.rank, dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros(1, jnp.float32), reached])[: self.rank]
        left = jnp.maximum(1 - before, 0)
        kept = jnp.argmin(left / (self.rank - slots).astype(jnp.float32)).astype(jnp.int32)
        rest = left[kept]
        drawn = before[kept] + jax.random.uniform(key, (self.rank,), jnp.float32) * rest
        # A comparison of all with all, which fuses: JAX 0.12's searchsorted cannot be lowered from within a jaxpr.
        drawn = jnp.sum(reached[:, None] <= drawn[None], axis=0, dtype=jnp.int32)
        place = jnp.where(slots < kept, slots, jnp.clip(drawn, kept, self.rows - 1))
        scaled = rest / ((self.rank - kept).astype(jnp.float32) * chance[place])
        return order[place], jnp.where(slots < kept, jnp.float32(1), scaled)

    def decode(self, leaves: tuple[Any, Any]) -> Any:
        """Return an array whose expectation is the one that was encoded."""
        empty = jnp.zeros((self.rows, self.features), self.dtype)
        return self._array(empty.at[leaves[1]].add(leaves[0], mode="promise_in_bounds"))
