"""The decorator: `optimize` and the step that it makes, with everything that a user can ask the step.

A function and settings come in; a callable like `jax.jit`'s (or `nnx.jit`'s) goes out. This module reads the settings,
binds methods, and turns answers of the core into what users see. The work is done in `_dispatch.py` and below.
"""

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from memopt import _compat_frontend as compat
from memopt import _nnx, _stored
from memopt._budget import parse_budget, parse_reserve
from memopt._dispatch import Core, NeedsNnx
from memopt._fingerprint import arguments
from memopt._measure import Memory
from memopt._program import Settings, read_passes
from memopt._signature import JitOptions
from memopt._target import Target

logger = logging.getLogger("memopt")


class FrontierPoint(NamedTuple):
    """One plan of a step: its predicted peak, the FLOPs that it repeats, and the seconds that it adds to a step."""

    peak_bytes: int
    recompute_flops: float
    seconds: float


def optimize(
    fn: Callable[..., Any] | None = None,
    *,
    budget: int | str | None = None,
    target: str | Target | None = None,
    passes: Sequence[Any] | None = None,
    verify: bool = True,
    reserve: int | str = 0,
    plan: Any = None,
    overrides: Mapping[str, str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Any:
    """Make a training step fit a memory budget; use it where `jax.jit` would stand.

    The step is traced once per signature, planned (under a second for scanned models), compiled once in the common
    case, and then called at the cost of `jax.jit` plus a comparison of the leaves. Its peak is at most the budget; what
    is repeated for that costs time, which `.plan` shows beforehand.

    Args:
        fn: the step: a function over pytrees, a method, one over Flax nnx objects (they are updated as by `nnx.jit`),
            or one that `jax.jit` or `nnx.jit` has wrapped already (it brings its options). None to use as a decorator
            with settings.
        budget: the compiled peak allowed on one device: bytes, `"14GiB"`, `"60%"` of the plain step's peak, or None
            for what the device has left. On the CPU None plans nothing.
        target: None for the attached device, else `platform[:kind[:topology]]`, as `"tpu:v5e:2x2"`; a step for a
            target that is not attached can be planned, lowered and measured, but not called.
        passes: None for `memopt.passes.default()`; a list means exactly what it holds, `[]` is plain `jax.jit`.
        verify: compare the compiled peak with the budget before the first call, and plan again where it is over.
        reserve: bytes of the device's limit to leave free, where `budget` is None.
        plan: a saved `memopt.Plan`, or `memopt.Plans` of several signatures, to apply without planning.
        overrides: decisions settled by hand, `{name: "keep"}`.
        donate_argnums, donate_argnames, static_argnums, static_argnames, in_shardings, out_shardings,
            compiler_options: as in `jax.jit`. Nothing is donated unless asked.

    Returns:
        The step: callable, with `.plan`, `.lower`, `.trace`, `.measure`, `.explain`, `.frontier`, `.plans`,
        `.compress`, `.decompress` and `.shardings`. Where `fn` is None, a decorator.

    Raises:
        ValueError: an unreadable budget or reserve.
        TargetError: an unknown target.
        TypeError: `fn` is not callable, or is optimized already; passes, plan or overrides of another kind.
        BudgetError: raised by a call: no plan fits.

    Example:
        >>> import jax.numpy as jnp, memopt
        >>> step = memopt.optimize(lambda x: (x * 2).sum(), budget="1MiB")
        >>> float(step(jnp.ones(3)))
        6.0

    Limits: `MEMOPT_DISABLE=1` in the environment runs plain `jax.jit`. Under `vmap`, `grad`, `scan` or an outer `jit`
    the rewritten step becomes a part of the outer program, planned from its own shapes and not verified.
    """
    settings = Settings(
        budget=parse_budget(budget),
        target=Target.parse(target),
        passes=read_passes(passes),
        verify=verify,
        reserve_bytes=parse_reserve(reserve),
        plan=plan,
        overrides=overrides,
    )
    options = JitOptions(
        donate_argnums=donate_argnums,
        donate_argnames=donate_argnames,
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        compiler_options=compiler_options,
    )
    make = functools.partial(_make, options=options, settings=settings)
    return make if fn is None else make(fn)


def _make(fn: Callable[..., Any], options: JitOptions, settings: Settings) -> "Optimized":
    """Make the step out of a function, a jitted function or an nnx-jitted one."""
    if isinstance(fn, (Optimized, BoundOptimized)):
        raise TypeError(f"{fn!r} is optimized already. Give all settings to one memopt.optimize.")
    if not callable(fn):
        raise TypeError(f"memopt.optimize takes a function, got {fn!r}. Name the settings: optimize(budget=...).")
    if _nnx.is_nnx_jitted(fn):
        inner, own, mode = _nnx.jit_arguments(fn)
        return Optimized(inner, options.over(JitOptions(**own)), settings, nnx_mode=mode)
    if not compat.is_jitted(fn):
        return Optimized(fn, options, settings)
    merged = options.over(JitOptions(**compat.jit_options(fn)))
    return Optimized(compat.jitted_function(fn), merged, settings, plain=None if options.keywords() else fn)


class Optimized:
    """A step made by `memopt.optimize`; see there.

    Args:
        fn: the user's function.
        options: the options of `jax.jit`.
        settings: what to plan for.
        plain: the jitted function that the user brought, if any.
        nnx_mode: the mode of the `nnx.jit` that the user brought, if any.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        options: JitOptions,
        settings: Settings,
        *,
        plain: Any = None,
        nnx_mode: dict[str, Any] | None = None,
    ):
        functools.update_wrapper(self, fn, updated=())
        self._fn, self._options, self._settings, self._nnx_mode = fn, options, settings, nnx_mode
        self._forms = _stored.forms_of(settings.passes)
        self._core: Any = None
        if nnx_mode is None:
            given = options.jit(_stored.over_stored(fn, self._forms)) if plain is None or self._forms else plain
            self._core = Core(given, options, settings)
        self._nnx = None if nnx_mode is None else self._make_nnx(nnx_mode)
        self._bound: weakref.WeakKeyDictionary[Any, Optimized] = weakref.WeakKeyDictionary()

    def _make_nnx(self, mode: dict[str, Any]) -> _nnx.NnxStep:
        return _nnx.NnxStep(self._fn, self._options.keywords(), mode, self._make_pure_core)

    def _make_pure_core(self, jitted: Any) -> Core:
        own = JitOptions(**compat.jit_options(jitted))
        extra = JitOptions(compiler_options=self._options.compiler_options, keep_unused=self._options.keep_unused)
        options = extra.over(own)
        again = extra.keywords() or self._forms
        plain = options.jit(_stored.over_stored(compat.jitted_function(jitted), self._forms)) if again else jitted
        return Core(plain, options, self._settings, pure=True)

    @property
    def target(self) -> Target:
        """The target that the step is planned for."""
        return self._settings.target

    def __repr__(self) -> str:
        return f"<memopt.optimize of {getattr(self._fn, '__qualname__', self._fn)!s} for {self.target}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        nnx_step = self._nnx
        if nnx_step is None:
            try:
                return self._core(*args, **kwargs)
            except NeedsNnx:
                nnx_step = self._nnx = self._make_nnx({})
        return nnx_step(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else BoundOptimized(self, instance)

    def _ask(self, method: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Call a method of the core with the pure arguments."""
        nnx_step = self._nnx
        if nnx_step is None:
            try:
                return method(self._core, *args, **kwargs)
            except NeedsNnx:
                nnx_step = self._nnx = self._make_nnx({})
        return nnx_step.ask(method, args, kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        """Trace and plan for these arguments or shapes, and return the `memopt.Plan`; nothing is compiled or run.

        Raises:
            BudgetError: no plan is predicted to fit.
        """
        program = self._ask(Core.planned, args, kwargs)
        index = 0 if program.index is None else program.index
        plan = program.ladder.plan(index, budget_bytes=program.budget_bytes)
        sent, _ = program.transfers
        return dataclasses.replace(plan, notes=(*plan.notes, sent)) if sent else plan

    def asked_for(self, *args: Any, **kwargs: Any) -> tuple[str, str]:
        """Return what tells saved plans of several signatures apart: the types of the arguments, and the target."""
        return arguments(self._ask(Core.unplanned, args, kwargs).closed_jaxpr), str(self.target)

    def frontier(self, *args: Any, **kwargs: Any) -> list[FrontierPoint]:
        """Return memory against time: all plans of this step, the plain one first; nothing is compiled."""
        program = self._ask(Core.unplanned, args, kwargs)
        return [FrontierPoint(r.predicted_peak_bytes, r.recompute_flops, r.seconds) for r in program.ladder.rungs]

    def plans(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the `memopt.Plan` of each point of the frontier, in its order; nothing is compiled.

        Each can be applied by `memopt.optimize(plan=...)`, for one that is chosen by more than its peak, such as the
        bytes of residuals, or the error of the gradients that is predicted of it (`Plan.predicted_error`).
        """
        ladder = self._ask(Core.unplanned, args, kwargs).ladder
        return [ladder.plan(index) for index in range(len(ladder.rungs))]

    def trace(self, *args: Any, **kwargs: Any) -> "OptimizedTraced":
        """Trace and plan, and return an object like JAX's `Traced`, of the rewritten step."""
        return OptimizedTraced(self, self._ask(Core.planned, args, kwargs), args, kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> "OptimizedLowered":
        """Trace, plan and lower, and return an object like JAX's `Lowered`; its `.compile()` verifies the budget.

        With sharded arguments and no `out_shardings`, the plain step is compiled once to keep its outputs' shardings.
        """
        return OptimizedLowered(self, self._ask(Core.lowered, args, kwargs), args, kwargs)

    def measure(self, *args: Any, **kwargs: Any) -> Memory:
        """Compile the rewritten step and return the compiler's `memopt.Memory`; nothing is run."""
        return self._ask(Core.measured, args, kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Any:
        """Return the `memopt.Explanation` of the plain step: what is alive at its peak, and what would help."""
        from memopt import _explain

        return _explain.explain_program(self._ask(Core.unplanned, args, kwargs))

    def compress(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a state, or shapes of one, in the form in which the step takes and returns it.

        Call it once before the loop. Where no pass changes that form, the state comes back as it is.

        Args:
            state: the state, plain.
            args, kwargs: the arguments of a call, or shapes of them, with this very state among them: passes that store
                what they find in the step (`memopt.passes.LowRankState`) look at it then, and go by paths without them.

        Raises:
            ValueError: a pass that stores state finds no leaf to store, or the state is not among the arguments.
        """
        if not self._forms:
            logger.info("%r: no pass changes the form of the state; compress returns it as it is", self)
        return _stored.compress(state, self._forms, self._asker(state, args, kwargs) if args or kwargs else None)

    def _asker(self, state: Any, args: tuple, kwargs: dict) -> Callable[[Any, Any], None]:
        """Return a function of a form and a state for the given one: traces the step over the forms up to that one."""
        if not any(a is state for a in (*args, *kwargs.values())):
            raise ValueError("The arguments given to compress do not hold the state: pass the same object among them.")

        def ask(form: Any, instead: Any) -> None:
            before = self._forms[: self._forms.index(form) + 1]  # the state is in the form of those already
            settings = dataclasses.replace(self._settings, passes=before)
            step = Optimized(self._fn, self._options, settings, nnx_mode=self._nnx_mode)
            given = [instead if a is state else a for a in args]
            named = {name: instead if a is state else a for name, a in kwargs.items()}
            step._ask(Core.unplanned, tuple(given), named)

        return ask

    def decompress(self, state: Any) -> Any:
        """Return a state, or shapes of one, in its plain form, for evaluation and checkpoints."""
        return _stored.decompress(state, self._forms)

    def shardings(self, *args: Any, **kwargs: Any) -> Any:
        """Return the sharding of each array in `(args, kwargs)` as the step takes it, None where it has none.

        Where a pass decides them (`memopt.passes.Shard`), these are the shardings to place the data with, as in
        `jax.device_put((args, kwargs), step.shardings(*args))`; arrays that are elsewhere are put there by each call.
        For nnx arguments the tree is that of the split state. Traces and plans; compiles nothing.
        """
        if not self._settings.always_rewrites:
            return jax.tree_util.tree_map(lambda leaf: getattr(leaf, "sharding", None), (args, kwargs))
        program = self._ask(Core.planned, args, kwargs)
        signature = program.signature
        arguments = signature.shardings if program.placed is None else program.placed.arguments
        return jax.tree_util.tree_unflatten(signature.tree, arguments[-len(signature.avals) :])

    def for_instance(self, instance: Any) -> tuple["Optimized", tuple]:
        """Return the step and the leading arguments that stand for a method's `self`.

        An instance that is a pytree (or an nnx module, or static by the options) is an ordinary first argument; any
        other is closed over, once per instance.
        """
        if _is_argument(instance) or _takes_static_first(self._options, self._fn):
            return self, (instance,)
        step = self._bound.get(instance)
        if step is None:
            bound = functools.partial(_call_weakly, weakref.ref(instance), self._fn)
            functools.update_wrapper(bound, self._fn.__get__(instance))
            step = self._bound[instance] = Optimized(bound, _without_first(self._options), self._settings)
        return step, ()


class BoundOptimized:
    """A method made by `memopt.optimize`, bound to its object; everything that `Optimized` can do, without `self`."""

    def __init__(self, step: Optimized, instance: Any):
        self._step, self._instance = step, instance
        self.__self__, self.__func__ = instance, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, first = self._step.for_instance(self._instance)
        return step(*first, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        step, first = self._step.for_instance(self._instance)
        value = getattr(step, name)
        return functools.partial(value, *first) if name in _WITH_ARGUMENTS else value

    def __repr__(self) -> str:
        return f"{self._step!r} bound to {self._instance!r}"


_WITH_ARGUMENTS = frozenset("plan asked_for frontier plans trace lower measure explain shardings".split())


def _is_argument(instance: Any) -> bool:
    """Whether JAX takes the object as an argument: an array or a registered pytree."""
    return _nnx.has_objects(instance) or not jax.tree_util.all_leaves([instance]) or isinstance(instance, jax.Array)


def _takes_static_first(options: JitOptions, fn: Callable[..., Any]) -> bool:
    static = compat.jit_options(options.jit(fn)).get("static_argnums", ())
    return 0 in static


def _without_first(options: JitOptions) -> JitOptions:
    """Shift numbered options by the first argument, which is closed over."""
    shifted = {}
    for name in ("donate_argnums", "static_argnums"):
        numbers = getattr(options, name)
        if numbers is not None:
            numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
            shifted[name] = tuple(number - 1 if number > 0 else number for number in numbers if number != 0)
    return JitOptions(**shifted).over(options)


def _call_weakly(reference: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method's function with an object that its programs must not keep alive."""
    return fn(reference(), *args, **kwargs)


class OptimizedTraced:
    """Like JAX's `Traced`, of the rewritten step: `.jaxpr` takes the leaves of the arguments in tree order."""

    def __init__(self, step: Optimized, program: Any, args: tuple, kwargs: dict):
        self._step, self._program, self._args, self._kwargs = step, program, args, kwargs

    @property
    def jaxpr(self) -> Any:
        """The rewritten closed jaxpr over the leaves of args and kwargs without static ones, unused ones kept."""
        return self._program.jaxpr

    def lower(self) -> "OptimizedLowered":
        """Lower the rewritten step for its target."""
        return self._step.lower(*self._args, **self._kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._program.traced, name)


class OptimizedLowered:
    """Like JAX's `Lowered`, of the rewritten step; `.compile()` verifies the budget, and may plan again."""

    def __init__(self, step: Optimized, lowered: Any, args: tuple, kwargs: dict):
        self._step, self._lowered, self._args, self._kwargs = step, lowered, args, kwargs

    def compile(self) -> jax.stages.Compiled:
        """Compile, verify and return JAX's `Compiled`.

        Raises:
            BudgetError: no plan tried compiles within the budget.
        """
        return self._step._ask(Core.compiled, self._args, self._kwargs)[1]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._lowered, name)
