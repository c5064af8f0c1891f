"""Sketches: residuals that only a weight's gradient reads, kept as random combinations or as a sample of their rows.

In: a survey of the step. Out: a `Store` for each forward value whose later readers are contractions for weight
gradients alone, found by dataflow. A gradient made from a sketch is random, and right in expectation; nothing else of
the backward pass, and nothing of the forward pass, reads it. Which are taken is the planner's choice; but where the
state holds gradient norms of samples, the step is rewritten to use and renew them (`_sketch_cache`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _forms
from memopt import _graph as g
from memopt._contract import Context, Left, Rewritten, Store
from memopt._survey import Survey
from memopt.passes import _residuals, _sketch_cache, _sketch_state
from memopt.passes._sketch_form import Combined, Sampled
from memopt.passes._sketch_norms import Rows
from memopt.passes._sketch_sites import CONTRACTIONS, weight_gradients

_KINDS = ("rmm", "rmm-gaussian", "wta")
#: Values that are looked at to find what a weight is made of.
_FEW = 32


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

    The variance of `"wta"` is smallest where rows are drawn by `|x_i| |dy_i|`, and `dY` is not known yet. With
    `samples`, the state holds for each such value the norm of every sample's `dY` when it was last seen (float32
    `[samples]`, times layers in a scanned stack), written by each step; rows are drawn by their own norms times those.
    It is then done in every plan. The weight's gradient is made from the kept rows alone, `ratio` of its FLOPs.

    Args:
      kind: one of these.
      ratio: `rank / rows`, above 0 and below 1.
      where: `fnmatch` patterns on module paths, a string or a tuple; empty for everything.
      seed: of the random numbers. Each value's own come from it and a hash of the bits of the value and of the weights
        that it is multiplied with, which every update changes: no step draws those of another one, also where it sees
        the same data. With `samples` they come from the number of the step, which the state counts.
      always: keep as a sketch whatever is kept of these values, also without a budget, rather than where the predicted
        peak falls.
      samples: how many samples the data set has; 0 keeps no norms. For `"wta"`.
      ids: a pattern of the `jax.tree_util.keystr` path of the argument that numbers the batch's samples, int32
        `[batch]` from 0 up to `samples`. Empty where a sample's place in the batch is its number.

    Example:
      >>> import jax, jax.numpy as jnp, memopt
      >>> memopt.passes.Sketch("wta", ratio=0.3)
      Sketch(kind='wta', ratio=0.3, where=(), seed=0, always=False, samples=0, ids='')
      >>> def step(ws, x, ids):
      ...     grads = jax.grad(lambda ws: jnp.sum(jnp.sin(x * jnp.sin(x) @ ws[0]) @ ws[1]))(ws)
      ...     return jax.tree.map(lambda w, g: w - 0.1 * g, ws, grads)
      >>> step = memopt.optimize(step, passes=[memopt.passes.Sketch("wta", 0.3, samples=1000, ids="[2]")])
      >>> ws, x, ids = [jnp.ones((16, 16)), jnp.ones((16, 4))], jnp.ones((128, 16)), jnp.arange(128)
      >>> state = step.compress(ws, ws, x, ids)
      >>> state = step(state, x, ids)
      >>> {name: norms.shape for name, norms in state[0].sketch_norms.items()}, step.decompress(state)[0].shape
      ({'step': (1000,), 'step#2': (1000,)}, (16, 16))

    Raises:
      ValueError: an unknown kind, a ratio outside its range, or a pattern that matches no module path; `samples` or
        `ids` without the other things that they need; `.compress` raises it where there is nothing to keep norms of.
      TypeError: raised by the step: no argument holds the norms.

    Source: Bershatsky et al., "Memory-Efficient Backpropagation through Large Linear Layers", 2022 (arXiv 2201.13195);
    Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model", NeurIPS 2023
    (arXiv 2305.15265), section 3, and algorithm 1 of its appendix for the cache. Unlike there, several weights that
    read one value share its rows and its norms; a sample not seen yet counts as the mean of the batch's others; and a
    tenth of the chances goes by the rows' own norms, so that no row that matters has none, whatever the cache holds.
    Norms are those of samples, whose tokens share them; the authors' code keeps one of each token.

    Limits: values that anything else reads later, gradients of convolutions, and what is inside a `shard_map` or split
    over devices stay as they are. A value that is not finite makes the whole gradient not finite.
    `step.compress(state, *args)` needs the arguments of a call. Norms are kept in pairs of loops and at the top level:
    not where one loop holds both passes (accumulated gradients), nor in sharded steps, nor where another pass stores
    the norms in a form of its own; the plan says so, and rows are then drawn by their own norms.
    """

    kind: str = "rmm"
    ratio: float = 0.1
    where: str | tuple[str, ...] = ()
    seed: int = 0
    always: bool = False
    samples: int = 0
    ids: str = ""
    stage: ClassVar[int] = 5

    def __post_init__(self):
        object.__setattr__(self, "where", (self.where,) if isinstance(self.where, str) else tuple(self.where))
        if self.kind not in _KINDS:
            raise ValueError(f"A sketch is one of {', '.join(_KINDS)}, not {self.kind!r}.")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"The ratio of rank to rows is above 0 and below 1, not {self.ratio}.")
        if self.samples < 0 or (self.samples and self.kind != "wta") or (self.ids and not self.samples):
            raise ValueError(
                f"Norms are kept of samples={self.samples} by ids={self.ids!r} and kind={self.kind!r}: they are for "
                "'wta', of as many samples as the data has, which is above 0."
            )

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "sketch"

    def propose(self, survey: Survey) -> Iterator[Store | Left]:
        """Yield a `Store` for each forward value that weight gradients alone read later."""
        marks = _forms.Marks(survey.graph)
        for one in _residuals.chosen(survey, self.where):
            readers = frozenset(o for o in one.readers if marks.is_backward(survey.graph.ops[o]))
            axes = weight_gradients(survey.graph, one.value, len(one.aval.shape), readers, marks)
            if (
                axes is None
                or one.mark == "sketch"  # rows of a value that a rewrite keeps already
                or _residuals.is_view(survey.graph, one.value)
                or not jnp.issubdtype(one.aval.dtype, jnp.floating)
            ):
                continue
            if one.aval.shape != survey.graph.values[one.value].aval.shape:
                yield Left(f"The sketch of a value in {one.module or 'the step'}", "it is split over devices")
                continue
            form = self.form(one.aval.shape, one.aval.dtype, axes)
            leaves = jax.eval_shape(form.encode, jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype))
            reads = _weights(survey.graph, one.value)
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
                    asked=self.always,
                    reads=reads,
                )

    @property
    def stores_state(self) -> bool:
        """Whether the step's state holds gradient norms of samples."""
        return self.samples > 0

    @property
    def optional(self) -> bool:
        """Whether the budget decides: where the state holds norms, rows are kept whatever the budget."""
        return not self.stores_state

    @property
    def asks(self) -> bool:
        """Whether the step is looked at to know what there are norms of."""
        return self.stores_state

    def compress(self, state: Any, ask: Callable[[Any], None] | None = None) -> Any:
        """Return a state, or shapes of one, with norms of no sample seen yet beside its first array.

        Args:
          state: a plain state, or one that has norms already.
          ask: traces the step with a state in the place of the given one.

        Raises:
          ValueError: there is nothing to keep norms of, or the step was not given to look at.
        """
        return _sketch_state.compress(self, state, ask)

    def decompress(self, state: Any) -> Any:
        """Return a state, or shapes of one, without norms."""
        return _sketch_state.decompress(state)

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step over a state with norms; called with a plain one it raises a TypeError with the remedy."""
        return _sketch_state.over(self, fn)

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with rows kept by the norms in its state; None where it has none."""
        return _sketch_cache.rewritten(self, closed, context) if self.stores_state else None

    def rows(self, shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...], sample_axis: int, group: int) -> Rows:
        """Return how rows of arrays of this shape and dtype are drawn by cached norms; see `Rows`."""
        return Rows(**self._common(shape, dtype, axes), sample_axis=sample_axis, group=group)

    def form(self, shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...]) -> Combined | Sampled:
        """Return the sketch of arrays of this shape and dtype, whose rows are along `axes`."""
        common = self._common(shape, dtype, axes)
        return Sampled(**common) if self.kind == "wta" else Combined(**common, gaussian=self.kind == "rmm-gaussian")

    def _common(self, shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...]) -> dict[str, Any]:
        rows = math.prod(shape[a] for a in axes)
        rank = max(1, min(rows - 1, round(self.ratio * rows)))
        return dict(shape=tuple(shape), dtype=np.dtype(dtype).name, axes=tuple(axes), rank=rank, seed=self.seed)


def _weights(graph: g.Graph, value: int) -> tuple[int, ...]:
    """Return what is there from the start of a value's region, and multiplied with it: weights, mostly.

    Where a weight is made of others (cast, or a sum with an adapter's), those.
    """
    region, found = graph.values[value].region, {}
    stack = [
        v
        for op in graph.regions[region].ops
        if op.eqn.primitive.name in CONTRACTIONS and value in op.inputs
        for v in op.inputs
        if v is not None and v != value
    ]
    seen = set(stack)
    while stack and len(seen) < _FEW:
        item = graph.values[stack.pop()]
        if item.region == region and item.op is None and jnp.issubdtype(item.aval.dtype, jnp.floating):
            found[item.id] = None
        made_of = {v for v in item.op.inputs if v is not None} - seen if item.op is not None else set()
        seen |= made_of
        stack += sorted(made_of)
    return tuple(sorted(found))
