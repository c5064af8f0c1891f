"""Programs: one step for one signature, from its plain jaxpr to the functions that run each rung of its ladder.

A traced step and the settings come in; jitted functions with the same pytrees and the same options go out, one a rung,
made when asked for. Which rung runs is decided in `_verify.py`; nothing here compiles.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from memopt import _compat_frontend as compat
from memopt import _hosted, _planner, _rewrite, _searching
from memopt._budget import Budget
from memopt._compat import open_jaxpr
from memopt._contract import Context
from memopt._local import Shardings, leaf_shardings
from memopt._plans import Plans
from memopt._scopes import MARKERS, USED, marks_in
from memopt._signature import JitOptions, Signature, Statics
from memopt._target import Target


@dataclass(frozen=True, eq=False)
class Settings:
    """What `memopt.optimize` was told, read and checked."""

    budget: Budget
    target: Target
    passes: Sequence[Any] | None = None
    verify: bool = True
    reserve_bytes: int = 0
    plan: Any = None
    overrides: Mapping[str, str] | None = None

    def __post_init__(self):
        if self.plan is not None:
            Plans.of(self.plan)
            if self.overrides:
                raise ValueError(
                    "plan= is applied as it was saved, overrides= change how a plan is made: give one of them."
                )
        if self.overrides is not None and not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides takes a mapping such as {{'tanh.0': 'keep'}}, got {self.overrides!r}.")

    @property
    def always_rewrites(self) -> bool:
        """Whether a pass rewrites the step whatever the budget, also where there is none."""
        return self.passes is not None and _rewrite.is_required(self.passes)

    @property
    def is_plain(self) -> bool:
        """Whether plain `jax.jit` is asked for: no passes, no saved plan and no budget to keep."""
        return self.passes == () and self.plan is None and self.budget == Budget()


def make_ladder(
    closed_jaxpr: Any, donated: Sequence[bool], settings: Settings, shardings: Any = None, context: Any = None
) -> Any:
    """Ask the planner for the ladder of a step, or for the one rung of a saved plan."""
    common = {"donated": donated, "target": settings.target, "scopes": MARKERS, "shardings": shardings}
    passes = passes_of(closed_jaxpr, settings)
    if settings.plan is not None:
        passes = _searching.saved_choice(closed_jaxpr, settings.plan, passes)
        context = _searching.context_for(passes, context)
        return _planner.ladder_of_plan(closed_jaxpr, settings.plan, passes=passes, context=context, **common)
    make = functools.partial(_planner.make_ladder, closed_jaxpr, overrides=settings.overrides, **common)
    if _searching.searching(passes) is None:
        return make(passes=passes, context=context)
    return _searching.best_ladder(closed_jaxpr, context, passes, settings, make)


def passes_of(closed_jaxpr: Any, settings: Settings) -> Sequence[Any]:
    """Return the passes that a step is planned with."""
    return default_passes(closed_jaxpr) if settings.passes is None else settings.passes


def read_passes(passes: Any) -> tuple[Any, ...] | None:
    """Return the passes that a user gave, as a tuple.

    Raises:
        TypeError: not a list of passes.
    """
    if passes is None:
        return None
    found = tuple(passes) if isinstance(passes, Iterable) else (None,)
    if not all(any(callable(getattr(one, name, None)) for name in ("propose", "rewrite")) for one in found):
        raise TypeError(f"passes takes a list of passes such as [memopt.passes.Remat()], got {passes!r}.")
    return found


def default_passes(closed_jaxpr: Any = None) -> Sequence[Any]:
    """Return `memopt.passes.default()`, and the passes that scopes inside a step ask for."""
    from memopt import passes

    asked = USED and closed_jaxpr is not None and USED & marks_in(closed_jaxpr)
    return passes.default() + (passes.asked_for(asked) if asked else [])


@dataclass(eq=False)
class Program:
    """One step for one signature.

    Args:
        plain: the step, jitted as the user would have done it.
        fn: the Python function in it.
        options: the options of `jax.jit`.
        settings: what was asked for.
        signature: that of the latest call; holds no arrays.
        traced: JAX's `Traced` of the plain step.
    """

    plain: Any
    fn: Callable[..., Any]
    options: JitOptions
    settings: Settings
    signature: Signature
    traced: Any
    budget_bytes: int | None = None
    index: int | None = None
    measured: dict[int, int] = field(default_factory=dict)
    memory: Any = None
    out_shardings: Any = None  # those of the plain compiled step, where XLA chose them
    plain_compiled: Any = None  # of a sharded step: the plain one, compiled, and its figures, once asked for
    compile_plain: Callable[[], Any] | None = None  # does that; None where it is out of memory
    run: Any = None  # the jitted function that calls go to, once the plan is settled
    tries: int = 0  # how many choices of a searching pass compiled over the budget
    _rungs: dict[int, Any] = field(default_factory=dict)

    @property
    def closed_jaxpr(self) -> Any:
        """The plain closed jaxpr; outer tracers that the step closes over come first among its inputs."""
        return self.traced.jaxpr

    @property
    def passes(self) -> Sequence[Any]:
        """The passes that it is planned with."""
        return passes_of(self.closed_jaxpr, self.settings)

    @functools.cached_property
    def closed_over(self) -> tuple:
        """Outer tracers that the step closes over."""
        return compat.closed_over(self.traced)

    @functools.cached_property
    def donated(self) -> tuple[bool, ...]:
        """A flag for each input of the jaxpr."""
        leaves = jax.tree_util.tree_leaves(self.traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
        return (False,) * len(self.closed_over) + tuple(leaf.donated for leaf in leaves)

    @functools.cached_property
    def ladder(self) -> Any:
        """The plans of this step, made once."""
        sharded = {"shardings": self.shardings} if self.shardings.is_sharded else {}
        return make_ladder(self.closed_jaxpr, self.donated, self.settings, context=self.context, **sharded)

    def take_runner_up(self) -> bool:
        """Go on to the next choice of a pass that searches, this one being over the budget; say if one is left."""
        following = _searching.following(self.ladder) if self.tries < _searching.RUNNERS_UP else None
        if following is None:
            return False
        self.tries += 1
        self.ladder, self.index, self.budget_bytes, self.run = following, None, None, None
        self.measured, self._rungs = {}, {}
        return True

    @property
    def context(self) -> Context:
        """What passes that rewrite the step may know of it."""
        closed_over = ("",) * len(self.closed_over)
        inputs = jax.tree_util.tree_leaves_with_path(self.traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
        outputs = jax.tree_util.tree_leaves_with_path(
            jax.tree_util.tree_unflatten(self.traced.out_tree, self.closed_jaxpr.out_avals)
        )
        return Context(
            target=self.settings.target,
            paths=(*closed_over, *(jax.tree_util.keystr(path[1:]) for path, _ in inputs)),
            out_paths=tuple(jax.tree_util.keystr(path) for path, _ in outputs),
            donated=self.donated,
            shardings=self.shardings if self.shardings.is_sharded else None,
            partitioned=_rewrite.partitions(self.settings.passes or ()) or int(self.shardings.is_sharded),
            feature_parts=_rewrite.feature_parts(self.settings.passes or ()),
        )

    @property
    def local(self) -> Any:
        """What one device holds of a sharded step's values, as the ladder was planned with; None for another step."""
        return getattr(getattr(self.ladder, "step", None), "local", None)

    @property
    def placed(self) -> Shardings | None:
        """The shardings that the arguments and results have to have, where a pass decides them: those of the rung."""
        if not self.settings.always_rewrites:
            return None
        step = getattr(self.ladder, "step", None) if self.index is None else self.rung.step
        return getattr(getattr(step, "outcome", None), "shardings", None)

    def place(self, args: tuple, kwargs: Mapping[str, Any], move: Callable[[Any, Any], Any]) -> tuple[tuple, dict]:
        """Return a call's arguments with `move(leaf, sharding)` in place of each leaf that has to have a sharding."""
        if self.placed is None or self.index is None:
            return args, dict(kwargs)
        dynamic, named, fixed = Statics(self.plain).split(args, dict(kwargs))
        leaves, tree = jax.tree_util.tree_flatten((dynamic, named))
        wanted = self.placed.arguments[len(self.closed_over) :]
        moved = [leaf if s is None else move(leaf, s) for leaf, s in zip(leaves, wanted, strict=True)]
        dynamic, named = jax.tree_util.tree_unflatten(tree, moved)
        kept = {place: value for place, _, value in fixed}
        rest = iter(dynamic)
        every = tuple(kept[i] if i in kept else next(rest) for i in range(len(args)))
        return every, {**named, **{name: value for name, value in kept.items() if isinstance(name, str)}}

    @property
    def caller(self) -> Callable[..., Any]:
        """The function that calls go to, of the chosen rung."""
        return self.jitted(self.index) if self.placed is None else self.run_placed

    def takes(self, signature: Signature) -> bool:
        """Whether a call differs from this program's at most by arrays that lie already where they have to be put."""
        mine = self.signature
        if self.placed is None or mine.tree != signature.tree:
            return False
        if not all(map(_same_type, mine.avals, signature.avals)):
            return False
        if mine.statics != signature.statics or mine.context != signature.context:
            return False
        wanted = self.placed.arguments[len(self.closed_over) :]
        return all(map(_is_placed, signature.shardings, wanted, signature.avals))

    def run_placed(self, *args: Any, **kwargs: Any) -> Any:
        """Call the chosen rung, with arguments that are not where they have to be put there first."""
        args, kwargs = self.place(args, kwargs, _put)
        return self.jitted(self.index)(*args, **kwargs)

    @property
    def argument_avals(self) -> list[Any]:
        """The abstract value of each input, on one device."""
        avals, local = self.closed_jaxpr.in_avals, self.local
        return list(avals) if local is None else list(map(local.aval, open_jaxpr(self.closed_jaxpr).invars))

    @functools.cached_property
    def shardings(self) -> Shardings:
        """What is known of the step's shardings: those of the options, else of the arguments."""
        arguments, outputs = self.signature.shardings, None
        if self.options.in_shardings is not None:
            args, kwargs = jax.tree_util.tree_unflatten(self.signature.tree, self.signature.avals)
            arguments = leaf_shardings(args, self.options.in_shardings)
            arguments += [None] * len(jax.tree_util.tree_leaves(kwargs))
        if self.options.out_shardings is not None:
            results = jax.tree_util.tree_unflatten(self.traced.out_tree, self.closed_jaxpr.out_avals)
            outputs = tuple(leaf_shardings(results, self.options.out_shardings))
        before = (None,) * len(self.closed_over)
        return Shardings((*before, *arguments), outputs, self.compile_plain)

    @property
    def rung(self) -> Any:
        """The chosen rung."""
        return self.ladder.rung(self.index)

    @property
    def jaxpr(self) -> Any:
        """The rewritten closed jaxpr; the plain one where nothing is planned."""
        return self.closed_jaxpr if self.index is None else self.rung.jaxpr()

    @property
    def transfers(self) -> tuple[str, bool]:
        """What became of transfers to the host when the chosen rung was compiled, and whether any was dropped."""
        target = self.settings.target
        if target.platform == "cpu" or self.memory is None or self.runs_plain:
            return "", False  # on the CPU the host's memory is the device's own
        return _hosted.report(_hosted.sent_bytes(self.jaxpr, target.platform), self.memory)

    def evaluate(self, leaves: Sequence[Any], jaxpr: Any) -> Any:
        """Run a rewritten jaxpr on the leaves of a call and rebuild the outputs."""
        outputs = jaxpr_as_fun(jaxpr)(*self.closed_over, *leaves)
        typed = map(compat.with_weak_type, outputs, self.closed_jaxpr.out_avals)
        return jax.tree_util.tree_unflatten(self.traced.out_tree, typed)

    def jitted(self, index: int | None) -> Any:
        """Return the jitted function of a rung; the plain one where the rung changes nothing."""
        if index is None:
            return self.plain
        if index not in self._rungs:
            jaxpr = self.ladder.rung(index).jaxpr()
            self._rungs[index] = self.plain if jaxpr is self.closed_jaxpr else self._jit_rung(jaxpr)
        return self._rungs[index]

    def _jit_rung(self, jaxpr: Any) -> Any:
        statics = Statics(self.plain)

        @functools.wraps(self.fn, updated=())  # its signature resolves the options' names
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs, _ = statics.split(args, kwargs)
            return self.evaluate(jax.tree_util.tree_leaves((args, kwargs)), jaxpr)

        return JitOptions(out_shardings=self._result_shardings).over(self.options).jit(run)

    @property
    def _result_shardings(self) -> Any:
        """The shardings of the results, as the rewrite wants them, or as the plain compiled step has them."""
        if self.placed is None or self.placed.outputs is None or self.options.out_shardings is not None:
            return self.out_shardings
        return jax.tree_util.tree_unflatten(self.traced.out_tree, self.placed.outputs)

    @property
    def runs_plain(self) -> bool:
        """Whether the chosen rung is the plain step."""
        return self.index is None or self.rung.jaxpr() is self.closed_jaxpr

    @property
    def leaves_shardings_open(self) -> bool:
        """Whether arguments are sharded, but it is left to XLA how the outputs are: a rewrite could change that."""
        return self.options.out_shardings is None and self.shardings.is_sharded and self.placed is None

    def describe(self) -> str:
        """Return the step's name and its arguments in a few words: how many arrays, and the largest."""
        avals = [aval for aval in self.signature.avals if hasattr(aval, "dtype")]
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        if not avals:
            return f"{name}()"
        largest = max(avals, key=operator.attrgetter("size"))
        return f"{name}({len(avals)} arrays, the largest {largest.str_short(short_dtypes=True)})"


def as_shape(leaf: Any, sharding: Any) -> Any:
    """Return a leaf's shape with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False))


def _put(leaf: Any, sharding: Any) -> Any:
    """Return an array on the devices where it has to be, itself where it is there already."""
    there = getattr(leaf, "sharding", None)
    if there is sharding or (there is not None and there.is_equivalent_to(sharding, leaf.ndim)):
        return leaf
    return jax.device_put(leaf, sharding)


def _is_placed(there: Any, wanted: Any, aval: Any) -> bool:
    """Whether an array is on one device, and so can be put anywhere, or where it has to be."""
    if there is None or len(there.device_set) == 1:
        return True
    return wanted is not None and there.is_equivalent_to(wanted, len(aval.shape))


def _same_type(one: Any, two: Any) -> bool:
    """Whether two abstract values differ at most by what they say of a mesh."""
    if not hasattr(one, "shape") or not hasattr(two, "shape"):
        return one == two
    return (one.shape, one.dtype, one.weak_type) == (two.shape, two.dtype, two.weak_type)
