"""Low-rank state: the element-wise part of any optimizer, run on gradients projected to few dimensions.

In: a step as its author wrote it, and a rank. Out: a step whose moments have the projected shape between calls. The
region from a gradient through its moments to the update is found by dataflow (`_low_rank_region`), traced again at the
projected shape (`_low_rank_build`), and its state stored in another form (`_low_rank_form`). No optimizer is known by
name. Projections and their random numbers are those of `memopt.optim.galore`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from memopt import _compat as c
from memopt import _inline, _stored
from memopt._contract import Context, Left, Rewritten
from memopt._plan import Decision
from memopt.optim._galore import make_settings
from memopt.optim._projection import Side
from memopt.passes import _low_rank_build as build
from memopt.passes import _low_rank_form as form
from memopt.passes import _low_rank_region as regions

logger = logging.getLogger("memopt")


@dataclasses.dataclass(frozen=True)
class LowRankState:
    """Run an optimizer's element-wise part in a low-rank subspace of each gradient: GaLore, for the step as it is.

    Memory: each moment of a matrix `[m, n]`, `m <= n`, falls from `m n` to `r n` elements, and a gradient has one basis
    of `r m` beside its moments. Leaves with more axes are batches of matrices, as a scan over layers stacks them. Cost:
    two products of `m n r` a gradient; one refresh a matrix in `refresh_every` updates, spread so that they never come
    together but at the first. Not exact: an update of at most this rank takes the full one's place.

    What is element-wise between a gradient and the update runs on the projected shape: moments, bias corrections,
    signs. What scales a value at either end (a learning rate, clipping by a norm) and what reads parameters (decoupled
    weight decay) stays outside, on full shapes. Where there is no such region (a factored second moment, a moment that
    reads parameters), the plan says why.

    Args:
      rank: dimensions of the subspace. Matrices with an axis of this length or shorter stay as they are.
      where: a pattern of `jax.tree_util.keystr` paths of the optimizer's state, or several; `*` and `?` are special. A
        path may be written with or without the number of the argument. Leaves named `bias` or `scale` stay as they are.
      scale: factor of the projected updates, the paper's alpha.
      refresh_every: updates between two bases of a matrix.
      side: "auto" projects the shorter axis, "left" the rows' axis, "right" the columns'.
      power_iterations: of the range finder; more are closer to the singular vectors.
      seed: seeds the range finder.

    Raises:
      ValueError: a setting is out of range; `.compress` and the step raise it where no leaf matches, and the step where
        a leaf is stored that has no region.
      TypeError: raised by the step: a moment that should be stored comes in plain.

    Example:
      >>> import jax, jax.numpy as jnp, memopt, optax
      >>> optimizer = optax.sgd(0.1, momentum=0.9)
      >>> def step(params, moments, x):
      ...     grads = jax.grad(lambda p: jnp.mean((x @ p) ** 2))(params)
      ...     updates, moments = optimizer.update(grads, moments, params)
      ...     return optax.apply_updates(params, updates), moments
      >>> low_rank = memopt.passes.LowRankState(rank=4, where="*.trace*")
      >>> step = memopt.optimize(step, passes=[low_rank])
      >>> params, x = jnp.ones((64, 128)), jnp.ones((4, 64))
      >>> moments = optimizer.init(params)
      >>> moments = step.compress(moments, params, moments, x)
      >>> params, moments = step(params, moments, x)
      >>> moments[0].trace.low.shape, moments[0].trace.basis.shape, step.decompress(moments)[0].trace.shape
      ((4, 128), (64, 4), (64, 128))

    Source: Zhao et al. 2024, "GaLore: Memory-efficient LLM training by gradient low-rank projection", algorithm 2, with
    a randomised range finder in place of its SVD; here after differentiation.

    Limits: `step.compress(state)` goes by paths alone, and moments of one parameter have to have equal paths below the
    optimizer's field (`.mu['w']`, `.nu['w']`); `step.compress(state, *args, **kwargs)`, with the arguments of a call,
    looks at the step and stores what has a region. Moments are not turned when a basis changes, as published. The
    update has to stand at the step's top level, not in a loop or a branch (`optax.MultiSteps`). A plain state with
    moments that are not zero keeps of them what lies in the directions of the first.
    """

    rank: int = 128
    where: str | Sequence[str] = "*opt_state*"
    scale: float = 0.25
    refresh_every: int = 200
    side: Side = "auto"
    power_iterations: int = 1
    seed: int = 0
    stage: ClassVar[int] = 20
    optional: ClassVar[bool] = False
    stores_state: ClassVar[bool] = True
    asks: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.where, str):
            object.__setattr__(self, "where", tuple(self.where))
        self.settings  # noqa: B018 (raises where they are out of range)

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "low_rank_state"

    @property
    def settings(self) -> Any:
        """How matrices are projected."""
        return make_settings(self.rank, self.side, self.refresh_every, self.power_iterations, self.seed, None)

    def stores(self, path: str, leaf: Any) -> bool:
        """Say whether a plain leaf may be a moment that is stored: floats, matrices, at a path that matches."""
        big = len(leaf.shape) >= 2 and min(leaf.shape[-2:]) > self.rank
        return big and jax.dtypes.issubdtype(leaf.dtype, np.floating) and _stored.matches(path, self.where)

    def _moments(self, nodes: Sequence[tuple[tuple, Any]]) -> list[form.Moment]:
        return form.moments_of(nodes, lambda path, leaf: _stored.stored_at(self, path, leaf))

    def compress(self, state: Any, ask: Callable[[Any], Any] | None = None) -> Any:
        """Return a state, or shapes of one, with its moments stored.

        Args:
          state: a plain state, or one that is stored already.
          ask: a function of shapes of the state, with the forms of moments that might be stored in it: runs the step's
            trace, up to this pass's `Answer`. None goes by paths alone.

        Raises:
          ValueError: there is no moment to store.
        """
        nodes, tree = _stored.flatten(state, form.is_low_rank)
        values = [node for _, node in nodes]
        if any(map(form.is_low_rank, values)):
            return state
        moments = self._moments(nodes)
        holders = form.by_path(moments)
        why: dict[str, str] = {}
        if ask is not None and moments:
            moments, holders, why = self._asked(tree, values, moments, ask)
        if not moments:
            raise ValueError(_nothing(self, [path for path, _ in nodes], why))
        made = form.stored(values, moments, holders, self.settings)
        return tree.unflatten([made.get(i, value) for i, value in enumerate(values)])

    def _asked(self, tree: Any, values: list[Any], moments: list[form.Moment], ask: Any) -> tuple:
        """Return the moments that have a region of the step, the holder of each, and why others have none."""
        shapes = {m.number: jax.ShapeDtypeStruct(m.leaf.shape, m.leaf.dtype) for m in moments}
        whole = [shapes.get(i, value) for i, value in enumerate(values)]
        made = form.stored(whole, moments, dict.fromkeys(shapes), self.settings)
        groups: dict[str, str] = {}
        why: dict[str, str] = {}
        try:
            ask(tree.unflatten([made.get(i, value) for i, value in enumerate(values)]))
        except Answer as answer:
            groups, why = answer.groups, answer.why
        for path, reason in why.items():
            logger.info("%s: %s stays plain: %s", self.name, path, reason)
        kept = [m for m in moments if m.leaf.path in groups]
        return kept, {m.number: groups[m.leaf.path] for m in kept}, why

    def decompress(self, state: Any) -> Any:
        """Return a state, or shapes of one, with its moments in their full shapes."""
        nodes, tree = _stored.flatten(state, form.is_low_rank)
        found = [node for _, node in nodes if form.is_low_rank(node)]
        bases = {node.leaf.path: node.basis for node in found if node.basis is not None}
        return tree.unflatten([form.plain(n, bases[n.holder]) if form.is_low_rank(n) else n for _, n in nodes])

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step over projected moments.

        Raises (when called):
          TypeError: a moment that has a region comes in plain.
          ValueError: one is stored and has none, or its bases are not with a moment of the same gradient.
        """

        @functools.wraps(fn, updated=())
        def step(*args: Any, **kwargs: Any) -> Any:
            call = _Call(self, fn, args, kwargs)
            call.check()
            return call.run()

        return step

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return rows and sentences; the step has the projected form since it was traced."""
        rows = tuple(self._row(path, aval) for path, aval in zip(context.paths, closed.in_avals, strict=True))
        return Rewritten(closed, tuple(r for r in rows if r is not None), tuple(self._left(closed, context)))

    def _row(self, path: str, aval: Any) -> Decision | None:
        if not path.endswith(".low"):
            return None
        size = int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize
        return Decision(path[:-4], "", "", size, self.name, f"updated at rank {self.rank}, on a projected gradient")

    def _left(self, closed: Any, context: Context) -> list[Left]:
        """Say of each moment that is stored plain why it has no region."""
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
        base = c.open_jaxpr(closed)
        spelt = [(path, path[path.find("]") + 1 :]) for path in context.paths]
        named = [i for i, paths in enumerate(spelt) if any(_stored.matches(p, self.where) for p in paths)]
        state = [(i, _new_value(i, context, closed)) for i in named if shapes[i].shape]
        maybe = [(i, k) for i, k in state if k is not None and any(self.stores(p, shapes[i]) for p in spelt[i])]
        moments, others = ([(base.invars[i], k) for i, k in pairs] for pairs in (maybe, state))
        _, why = regions.find(base, moments, others)
        return [Left(context.paths[maybe[n][0]], reason) for n, reason in sorted(why.items())]


def _new_value(number: int, context: Context, closed: Any) -> int | None:
    """Return the output of an input's type whose path ends most like its own; None where there is none."""
    path, aval = context.paths[number], closed.in_avals[number]
    alike = [k for k, a in enumerate(closed.out_avals) if (a.shape, a.dtype) == (aval.shape, aval.dtype)]
    ends = {k: len(os.path.commonprefix([path[::-1], context.out_paths[k][::-1]])) for k in alike}
    return max(ends, key=ends.__getitem__) if any(ends.values()) else None


class Answer(Exception):
    """What a step answers when it is asked which moments it has regions for.

    Attributes:
      groups: path of a moment -> path of the one that holds its bases.
      why: path of any other -> why it has no region.
    """

    def __init__(self, groups: dict[str, str], why: dict[str, str]):
        super().__init__("the step was only asked for its regions")
        self.groups, self.why = groups, why


class _Call:
    """One trace of a step: its plain jaxpr, and the regions of its moments."""

    def __init__(self, pass_: LowRankState, fn: Any, args: tuple, kwargs: dict):
        self.pass_, self.fn = pass_, fn
        self.nodes, self.tree = _stored.flatten((args, kwargs), form.is_low_rank)
        self.values = [node for _, node in self.nodes]
        arrays = [i for i, v in enumerate(self.values) if form.is_low_rank(v) or isinstance(v, jax.Array)]
        self.named = [i for i in arrays if self._matches(i)]
        self.traced = self.named or arrays  # in an nnx step paths tell nothing
        self.plain = [_shape(self.values[i]) for i in self.traced]
        closed, shapes = jax.make_jaxpr(self._flat, return_shape=True)(*self.plain)
        flat = _inline.inline(closed, respect_checkpoint=True)
        self.closed = c.close(c.dce(flat)[0], c.jaxpr_consts(flat))
        self.results, self.out_tree = jax.tree_util.tree_flatten_with_path(shapes)
        self._find()

    def _flat(self, *leaves: Any) -> Any:
        values = list(self.values)
        for i, leaf in zip(self.traced, leaves, strict=True):
            values[i] = leaf
        args, kwargs = self.tree.unflatten(values)
        return self.fn(*args, **kwargs)

    def _matches(self, number: int) -> bool:
        path = self.nodes[number][0][1:]
        return any(_stored.matches(jax.tree_util.keystr(p), self.pass_.where) for p in (path, path[1:]))

    def _find(self) -> None:
        """Find the regions of what is stored and of what may be."""
        maybe = {m.number for m in self.pass_._moments([(path[1:], node) for path, node in self.nodes])}
        wanted = [k for k, i in enumerate(self.traced) if form.is_low_rank(self.values[i]) or i in maybe]
        olds = [(self.nodes[i][0], shape) for i, shape in zip(self.traced, self.plain, strict=True)]
        news = _stored.new_values(olds, self.results)
        base = c.open_jaxpr(self.closed)
        self.moments = [(k, news[k]) for k in wanted if k in news]
        found, why = regions.find(base, [(base.invars[k], o) for k, o in self.moments], self._state(news))
        self.regions = [(r, [self.moments[n] for n in r.moments]) for r in found]
        self.why = {k: "the step returns no new value of it" for k in wanted if k not in news}
        self.why |= {self.moments[n][0]: reason for n, reason in why.items()}

    def _state(self, news: dict[int, int]) -> list[tuple[Any, int | None]]:
        """Return the optimizer's state, without scalars; where paths tell nothing, all that no other result reads."""
        base = c.open_jaxpr(self.closed)
        held = [(k, news.get(k)) for k, shape in enumerate(self.plain) if shape.shape]
        if not self.named:
            rest = [v for o, v in enumerate(base.outvars) if o not in set(news.values())]
            read = regions.ancestors(base, rest)  # a loss is made of parameters, and of nothing that optimizers keep
            held = [(k, o) for k, o in held if o is not None and base.invars[k] not in read]
        return [(base.invars[k], o) for k, o in held]

    def check(self) -> None:
        """Check that what is stored and what has a region are the same; answer instead, where that is asked."""
        inside = {k for _, moments in self.regions for k, _ in moments}
        stored = {k for k, i in enumerate(self.traced) if form.is_low_rank(self.values[i])}
        if any(self.values[self.traced[k]].holder is None for k in stored):
            raise self._answer()
        name = getattr(self.fn, "__name__", "step")
        if missing := sorted(inside - stored):
            raise TypeError(
                f"{self._path(missing[0])} of {name} is plain, but {self.pass_!r} stores it in another form. Call "
                f"state = {name}.compress(state) once before the loop; {name}.decompress(state) gives the plain state "
                "again."
            )
        if not stored:
            whys = {self._path(k): why for k, why in self.why.items()}
            raise ValueError(_nothing(self.pass_, [path[1:] for path, _ in self.nodes], whys))
        for k in sorted(stored - inside):
            raise ValueError(f"{self._path(k)} of {name} is stored at a low rank, but {self.why[k]}. {_REMEDY}")
        for _, moments in self.regions:
            nodes = [self.values[self.traced[k]] for k, _ in moments]
            paths = [n.leaf.path for n in nodes if n.basis is not None]
            if len(paths) != 1 or any(n.holder != paths[0] for n in nodes):
                raise ValueError(
                    f"The moments {', '.join(n.leaf.path for n in nodes)} of {name} are of one gradient, but do not "
                    f"share their bases. {_REMEDY}"
                )

    def _answer(self) -> Answer:
        paths = {k: self.values[i].leaf.path for k, i in enumerate(self.traced) if form.is_low_rank(self.values[i])}
        order = {k: place for place, k in enumerate(paths)}
        groups = {}
        for _, moments in self.regions:
            mine = sorted((k for k, _ in moments if k in paths), key=order.__getitem__)
            groups.update({paths[k]: paths[mine[0]] for k in mine})
        return Answer(groups, {paths[k]: why for k, why in self.why.items() if k in paths})

    def _path(self, k: int) -> str:
        path = self.nodes[self.traced[k]][0]
        return ("args" if path[0].idx == 0 else "kwargs") + jax.tree_util.keystr(path[1:])

    def run(self) -> Any:
        """Return the results of the step over projected moments."""
        nodes = {k: self.values[i] for k, i in enumerate(self.traced) if form.is_low_rank(self.values[i])}
        found = [(r, [build.Stored(k, o, nodes[k]) for k, o in moments]) for r, moments in self.regions]
        low = build.build(self.closed, found, self.pass_.scale)
        leaves = jax.tree_util.tree_leaves([self.values[i] for i in self.traced])
        results = {m.out: m.node for _, moments in found for m in moments}
        return self.out_tree.unflatten(build.low_outputs(results, c.as_function(low)(*leaves)))


_REMEDY = "Name it out with where=, or let step.compress(state, *args, **kwargs) look at the step."


def _nothing(pass_: LowRankState, paths: Sequence[tuple], why: dict[str, str]) -> str:
    """Return the sentence that there is no moment to store, with the reasons of some."""
    if not why:
        return _stored.nothing_matches(pass_, paths)
    return f"{pass_!r} finds no moment that it can store: " + "; ".join(f"{p}: {w}" for p, w in list(why.items())[:3])


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    if form.is_low_rank(value):
        return jax.ShapeDtypeStruct(value.leaf.shape, value.leaf.dtype)
    return jax.ShapeDtypeStruct(value.shape, value.dtype, weak_type=jax.typeof(value).weak_type)
