"""Tests of the decorator: whatever `jax.jit` runs, the optimized step runs too, with the same results and costs.

The planner is replaced by a ladder of two rungs, the plain step and one with a barrier on every input (`fake_ladder`),
so that it shows that a rewritten step is what runs.
"""

import contextlib
import functools
import logging
import time
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt.passes
from memopt import _program
from memopt._errors import TargetError
from memopt._optimize import BoundOptimized, FrontierPoint, Optimized, optimize
from memopt._signature import Signature
from tests.fake_ladder import BUDGET, W, X, assert_same, check, count_eqns, is_rewritten, sgd
from tests.fake_ladder import ladder as ladder


@pytest.fixture
def compilations():
    """Counts the backend's compilations."""
    count = SimpleNamespace(value=0)

    def listen(name, duration, **_):
        count.value += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def test_second_call_neither_retraces_nor_recompiles(compilations):
    traces = []

    @optimize(budget=BUDGET, donate_argnums=0)
    def step(w, x):
        traces.append(1)
        return sgd(w, x)

    w, x = W + 0, X + 0
    before = compilations.value
    w, _ = step(w, x)
    assert compilations.value - before == 1
    for _ in range(3):
        w, _ = step(w, x)
    assert (len(traces), compilations.value - before) == (1, 1)
    step(w, jnp.ones((2, 8)))
    step.plan(w, x)
    step.trace(w, x)
    step(W + 0, x)
    assert len(traces) == 2
    assert isinstance(step, Optimized)
    assert step.__name__ == "step"


def test_shapes_first_then_one_compilation(compilations):
    traces = []

    def counted(w, x):
        traces.append(1)
        return sgd(w, x)

    step = optimize(counted, budget=BUDGET)
    w, x = W + 0, X + 0
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (w, x))
    before = compilations.value
    step.plan(*shapes)
    assert compilations.value == before
    compiled = step.lower(*shapes).compile()
    assert_same(step(w, x), compiled(w, x))
    assert step.measure(*shapes).peak_bytes > 0
    assert (len(traces), compilations.value - before) == (1, 1)


def test_results_of_every_kind_of_leaf():
    def fn(x, n, key, old, empty, flag):
        noise = jax.random.normal(key, x.shape) + jax.random.uniform(old, x.shape)
        return {"x": x * n + noise, "one": 1.0, "n": n, "key": key, "empty": empty * 2, "flag": ~flag, "none": None}

    args = (X, 2.0, jax.random.key(3), jax.random.PRNGKey(4), jnp.zeros((0, 3)), jnp.array(True))
    step = check(fn, *args, calls=1)
    assert_same(step(np.asarray(X), np.float32(2), *args[2:])["x"], step(X, jnp.float32(2), *args[2:])["x"])


def test_closed_over_constants_and_inputs_passed_through():
    table = jnp.arange(1000.0)
    check(lambda i, x: (table[i], x, x), jnp.arange(4), X)
    assert_same(optimize(lambda: table.sum(), budget=BUDGET)(), table.sum())


def test_keywords_and_keyword_only_arguments(compilations):
    def fn(x, /, y, *rest, scale, **others):
        return x + y * scale + sum(rest) + others["z"]

    step = optimize(fn, budget=BUDGET)
    args, kwargs = (X, X * 2, X * 3), {"scale": jnp.float32(2), "z": X}
    before = compilations.value
    assert_same(step(*args, **kwargs), jax.jit(fn)(*args, **kwargs))
    count = compilations.value - before
    step(*args, z=X, scale=jnp.float32(2))
    assert compilations.value - before == count
    assert len(step.trace(*args, **kwargs).jaxpr.in_avals) == 5


def test_static_arguments_by_number_and_name():
    traces = []

    def fn(x, n, *, mode="a"):
        traces.append((n, mode))
        return x * n if mode == "a" else x - n

    step = optimize(fn, budget=BUDGET, static_argnums=1, static_argnames="mode")
    for _ in range(2):
        assert step(jnp.ones(2), 3)[0] == 3
        assert step(jnp.ones(2), 4)[0] == 4
        assert step(jnp.ones(2), 4, mode="b")[0] == -3
    assert traces == [(3, "a"), (4, "a"), (4, "b")]
    assert is_rewritten(step, jnp.ones(2), 4, mode="b")
    with pytest.raises(ValueError, match="hashable"):
        step(jnp.ones(2), [1])


def test_donation_by_number_and_name():
    for options in ({"donate_argnums": 0}, {"donate_argnames": "w"}):
        step = optimize(sgd, budget=BUDGET, **options)
        w = W + 0
        assert step.measure(w, X).alias_bytes == w.nbytes
        step(w, X)
        assert w.is_deleted()
        for arguments in ({"args": (w, X)}, {"args": (), "kwargs": {"w": w, "x": X}}):
            name = r"args\[0\]" if arguments["args"] else r"kwargs\['w'\]"
            with pytest.raises((RuntimeError, ValueError), match=rf"{name} of sgd, .*is deleted: it was donated"):
                step(*arguments["args"], **arguments.get("kwargs", {}))
    w = W + 0
    optimize(sgd, budget=BUDGET)(w, X)
    assert not w.is_deleted()


def test_jitted_functions_bring_their_options():
    jitted = jax.jit(lambda w, x, n: (w * n, x), donate_argnums=0, static_argnames="n")
    step = optimize(jitted, budget=BUDGET)
    w = W + 0
    assert_same(step(w, X, n=2), (W * 2, X))
    assert w.is_deleted()
    undonated = optimize(jitted, budget=BUDGET, donate_argnums=())
    w = W + 0
    undonated(w, X, n=2)
    assert not w.is_deleted()


def test_compiler_options_reach_the_compiler():
    step = optimize(sgd, budget=BUDGET, compiler_options={"no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        step(W, X)


def test_errors_are_those_of_jit():
    with pytest.raises(TypeError, match="not a valid JAX type"):
        optimize(lambda x: "text", budget=BUDGET)(X)
    with pytest.raises(TypeError, match="type <class 'str'> and was passed to the function at path x"):
        optimize(lambda x: x, budget=BUDGET)("text")
    with pytest.raises(TypeError, match="positional argument"):
        optimize(lambda x: x, budget=BUDGET)()
    with pytest.raises(jax.errors.TracerBoolConversionError):
        optimize(lambda x: x if x.sum() > 0 else -x, budget=BUDGET)(X)


def test_settings_are_checked_at_once():
    with pytest.raises(ValueError, match="Unreadable budget 'lots'"):
        optimize(sgd, budget="lots")
    with pytest.raises(TargetError, match="Unknown target 'abacus'"):
        optimize(sgd, target="abacus")
    with pytest.raises(TypeError, match="takes a function, got 3"):
        optimize(3)
    for passes in ("remat", [3], memopt.passes.Remat()):
        with pytest.raises(TypeError, match="passes takes a list of passes"):
            optimize(sgd, passes=passes)
    with pytest.raises(TypeError, match="plan takes a memopt.Plan, got 'plan.json'"):
        optimize(sgd, plan="plan.json")
    with pytest.raises(TypeError, match="overrides takes a mapping"):
        optimize(sgd, overrides=["tanh.0"])
    with pytest.raises(TypeError, match="optimized already"):
        optimize(optimize(sgd, budget=BUDGET))


class Trainer:
    def __init__(self, rate):
        self.rate = rate

    @optimize(budget=BUDGET, donate_argnums=1)
    def step(self, w, x):
        """Docs."""
        return w - self.rate * x.mean()

    @functools.partial(optimize, budget=BUDGET, static_argnums=0)
    def static(self, w):
        return w * self.rate


def test_methods_of_plain_objects():
    one, two = Trainer(1.0), Trainer(2.0)
    w = W + 0
    result = one.step(w, X)
    assert w.is_deleted()
    np.testing.assert_allclose(result, W - X.mean())
    np.testing.assert_allclose(two.step(W + 0, X), W - 2 * X.mean())
    assert isinstance(one.step, BoundOptimized)
    assert is_rewritten(one.step, W, X)
    assert one.step.measure(W, X).alias_bytes == W.nbytes
    assert one.step.plan(W, X).index == 1
    assert (two.static(W) == W * 2).all()
    assert is_rewritten(two.static, W)
    assert Trainer.step.__doc__ == "Docs."


class Params(flax.struct.PyTreeNode):
    w: jax.Array

    @optimize(budget=BUDGET)
    def grow(self, x):
        return self.replace(w=self.w + x)


def test_methods_of_pytrees_take_self_as_an_argument():
    params = Params(jnp.zeros(3))
    for _ in range(3):
        params = params.grow(jnp.ones(3))
    assert (params.w == 3).all()
    assert len(params.grow.trace(jnp.ones(3)).jaxpr.in_avals) == 2


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f, in_axes=(None, 0)),
        lambda f: jax.jit(lambda w, x: f(w, x[0])),
        lambda f: lambda w, x: jax.lax.scan(f, w, x),
        lambda f: jax.grad(lambda w, x: f(w, x[0])[1]),
        lambda f: lambda w, x: jax.jvp(lambda w: f(w, x[0]), (w,), (w,)),
        lambda f: jax.jit(jax.vmap(jax.grad(lambda w, x: f(w, x)[1]), in_axes=(None, 0))),
        lambda f: jax.checkpoint(lambda w, x: f(w, x[0])),
    ],
)
def test_transformations_of_the_step(transform):
    traces = []

    def counted(w, x):
        traces.append(1)
        return sgd(w, x)

    step, x = optimize(counted, budget=BUDGET), jnp.stack([X, X * 2])
    ours, plain = transform(step)(W, x), transform(sgd)(W, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, plain)
    assert count_eqns(jax.make_jaxpr(transform(step))(W, x), "optimization_barrier") > 0
    assert len(traces) <= 2


def test_under_transformations_nothing_is_compiled(compilations):
    step = optimize(sgd, budget=BUDGET)
    before = compilations.value
    jax.make_jaxpr(jax.vmap(step, in_axes=(None, 0)))(W, jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))
    jax.eval_shape(step, W, X)
    assert compilations.value == before


def test_named_axes_and_outer_tracers():
    step = optimize(lambda x: x / jax.lax.psum(x, "i"), budget=BUDGET)
    np.testing.assert_allclose(jax.vmap(step, axis_name="i")(jnp.ones(4)), np.full(4, 0.25))

    @jax.jit
    def outer(x, y):
        return optimize(lambda x: x * y, budget=BUDGET)(x)

    for value in (2.0, 3.0):
        assert outer(jnp.ones(()), jnp.float32(value)) == value


def test_optimized_inside_optimized():
    inner = optimize(lambda x: jnp.sin(x), budget=BUDGET)
    check(lambda x: inner(x) * 2, X)


def test_disabled_runs_plain_jit(monkeypatch):
    calls = []
    monkeypatch.setattr(_program, "make_ladder", lambda *_: calls.append(1))
    monkeypatch.setenv("MEMOPT_DISABLE", "1")
    assert_same(optimize(sgd, budget=1)(W, X), jax.jit(sgd)(W, X))
    assert not calls


def test_no_budget_on_the_cpu_plans_nothing_and_says_so_once(caplog, monkeypatch, compilations):
    monkeypatch.setattr(_program, "make_ladder", lambda *_: pytest.fail("planned"))
    step = optimize(sgd)
    with caplog.at_level(logging.INFO, "memopt"):
        assert_same(step(W, X), jax.jit(sgd)(W, X))
        step(W, X[:2])
        step(W, X)
    assert [record.getMessage() for record in caplog.records] == [
        "sgd: no budget, and cpu has no limit: nothing is planned, the step runs plain"
    ]
    assert not is_rewritten(step, W, X)
    assert_same(jax.vmap(step, in_axes=(None, 0))(W, X[None])[1], jax.vmap(sgd, in_axes=(None, 0))(W, X[None])[1])


def test_without_verification_nothing_is_compiled_beforehand(compilations):
    step = optimize(sgd, budget=BUDGET, verify=False)
    w, x = W + 0, X + 0
    before = compilations.value
    assert_same(step(w, x), step(w, x))
    assert compilations.value - before == 1


def test_a_target_that_is_not_attached_cannot_be_called():
    step = optimize(sgd, target="tpu:v5e:1x1")
    with pytest.raises(TargetError, match="'tpu:v5e:1x1' is not attached, so the step cannot run"):
        step(W, X)
    assert is_rewritten(step, W, X)
    assert step.plan(W, X).budget_bytes == int(15.75 * 2**30)


@pytest.mark.tpu_aot
def test_compiles_ahead_of_time_for_a_tpu():
    step = optimize(sgd, target="tpu:v5e:1x1", donate_argnums=0)
    compiled = step.lower(W, X).compile()
    assert "opt-barrier" in compiled.as_text() or compiled.memory_analysis().alias_size_in_bytes > 0
    assert step.measure(W, X).fits


def test_what_a_step_answers():
    step = optimize(sgd, budget=BUDGET)
    assert step.frontier(W, X) == [FrontierPoint(2**40, 0.0, 0.0), FrontierPoint(1, 8.0, 2.0)]
    assert step.trace(W, X).out_info[1].shape == ()
    assert "optimization_barrier" in step.trace(W, X).lower().as_text()
    assert step.compress(W) is W
    assert step.decompress(W) is W
    assert str(step.target) == "cpu"


def test_unused_arguments_stay_in_the_jaxpr():
    step = optimize(lambda a, unused: a * 2, budget=BUDGET)
    assert len(step.trace(W, {"b": X, "a": X}).jaxpr.in_avals) == 3
    assert_same(step(W, {"b": X, "a": X}), W * 2)


def test_settings_of_jax_are_respected():
    step = optimize(sgd, budget=BUDGET)
    step(W, X)
    with jax.default_matmul_precision("highest"):
        text = step.lower(W, X).as_text()
    assert "HIGHEST" in text
    assert "HIGHEST" not in step.lower(W, X).as_text()
    with jax.disable_jit():
        assert_same(step(W, X), jax.jit(sgd)(W, X))


def test_no_arrays_are_kept_alive():
    step = optimize(sgd, budget=BUDGET)
    step(W, X)
    step(W, X)
    program = step._core._latest
    assert program.signature.leaves == []
    trainer = Trainer(1.0)
    trainer.step(W + 0, X)
    bound = Trainer.step._bound
    assert trainer in bound
    del trainer
    import gc

    gc.collect()
    assert len(bound) == 0 or all(isinstance(key, Trainer) for key in bound)


@pytest.mark.slow  # a timing: true on a quiet machine alone
def test_dispatch_costs_less_than_another_jit():
    tree = {str(i): jnp.ones(4) for i in range(300)}
    fn = functools.partial(jax.tree.map, lambda x: x + 1)
    plain, step = jax.jit(fn), optimize(fn, budget=BUDGET)
    ours, base = [], []
    with contextlib.ExitStack():
        one, two = plain(plain(tree)), step(step(tree))
        for _ in range(30):
            base.append(timed(plain, one))
            ours.append(timed(step, two))
    assert min(ours) < 2 * min(base)
    signature = Signature.of((two,), {})
    assert signature.same_program(step._core._latest.signature)


def timed(fn, tree):
    start = time.perf_counter()
    jax.block_until_ready(fn(tree))
    return time.perf_counter() - start
