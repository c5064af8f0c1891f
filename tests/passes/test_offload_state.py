"""Tests of state in the host's memory: in come small steps, out go the same values, where they lie, and bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import _compat as c
from memopt._sizes import is_on_host
from memopt._target import Target
from memopt.passes import FuseUpdate, Offload

pytestmark = pytest.mark.loose_promotion  # Optax itself multiplies arrays by scalars of another dtype
WIDTH = 64
AWAY = {"state": "*opt_state*", "least_bytes": 1024}


def step_with(optimizer):
    def loss_of(params, x):
        for w in params.values():
            x = x + jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def step(state, x):
        loss, grads = jax.value_and_grad(loss_of)(state["params"], x)
        updates, moments = optimizer.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": moments}, loss

    return step


def start(optimizer, layers=3, width=WIDTH):
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((width, width)) * 0.1, jnp.float32) for i in range(layers)}
    return {"params": params, "opt_state": optimizer.init(params)}, jnp.ones((8, width))


class Anywhere(FuseUpdate):
    """The pass as it is for a TPU, so that the CPU can run what it makes."""

    def rewrite(self, closed, context):
        return super().rewrite(closed, dataclasses.replace(context, target=Target.parse("tpu:v5e:1x1")))


def scanned_step(optimizer):
    def loss_of(w, x):
        return jnp.mean(jax.lax.scan(lambda h, one: (h + jnp.tanh(h @ one), None), x, w)[0] ** 2)

    def step(state, x):
        loss, grads = jax.value_and_grad(loss_of)(state["w"], x)
        updates, moments = optimizer.update(grads, state["opt_state"], state["w"])
        return {"w": optax.apply_updates(state["w"], updates), "opt_state": moments}, loss

    return step


def scanned_start(optimizer, width=WIDTH, layers=4):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((layers, width, width)) * 0.1, jnp.float32)
    return {"w": w, "opt_state": optimizer.init(w)}, jnp.ones((8, width))


def on_the_host(step, state, x):
    """Return for each loop how many of its operands and results lie on the host."""
    loops = [e for e in c.open_jaxpr(step.trace(state, x).jaxpr).eqns if e.primitive.name == "scan"]
    return [tuple(sum(is_on_host(v.aval) for v in vs) for vs in (e.invars, e.outvars)) for e in loops]


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_moments_lie_on_the_host_between_steps_and_the_values_stay():
    optimizer = optax.adamw(1e-2)
    step, (state, x) = step_with(optimizer), start(optimizer)
    away, traces = memopt.optimize(step, passes=[Offload(**AWAY)]), []
    counted = memopt.optimize(lambda *args: (traces.append(1), step(*args))[1], passes=[Offload(**AWAY)])
    got, want = counted.compress(state), state
    assert kinds(got["opt_state"]) == {"pinned_host"} and kinds(got["params"]) == {"device"}
    for _ in range(3):
        got, loss = counted(got, x)
        want, wanted = jax.jit(step)(want, x)
        assert kinds(got["opt_state"]) == {"pinned_host"} and kinds(got["params"]) == {"device"}
    assert len(traces) == 1
    back = away.decompress(got)
    assert kinds(back) == {"device"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), (back, loss), (want, wanted))


def test_parameters_can_be_there_and_leaves_come_in_turn():
    optimizer = optax.sgd(0.1, momentum=0.9)
    step, (state, x) = step_with(optimizer), start(optimizer)
    away = memopt.optimize(step, target="cpu", passes=[Offload(state=("*params*", "*trace*"), least_bytes=1024)])
    stored = away.compress(state)
    assert kinds(stored) == {"pinned_host"}
    plan = away.plan(stored, x)
    assert [row.choice for row in plan.decisions].count("offload") == 6
    moments = memopt.optimize(step, target="cpu", passes=[Offload(state="*trace*", least_bytes=1024)])
    eqns = c.open_jaxpr(moments.trace(moments.compress(state), x).jaxpr).eqns
    assert sum(e.primitive is c.optimization_barrier_p for e in eqns) == 2  # between three moments
    plain = memopt.optimize(step, target="cpu", budget="1GiB", passes=[memopt.passes.Remat()])
    assert plan.predicted_peak_bytes < plain.plan(state, x).predicted_peak_bytes


def test_a_state_on_the_device_is_told_the_remedy_and_residuals_alone_store_nothing():
    optimizer = optax.adam(1e-2)
    step, (state, x) = step_with(optimizer), start(optimizer)
    with pytest.raises(TypeError, match="Call state = step.compress"):
        memopt.optimize(step, passes=[Offload(**AWAY)])(state, x)
    with pytest.raises(ValueError, match="matches no leaf that it can store"):
        memopt.optimize(step, passes=[Offload(state="*.momentum*")]).compress(state)
    residuals = memopt.optimize(step, passes=[Offload()])
    assert residuals.compress(state) is state
    assert np.isfinite(residuals(state, x)[1])


def test_sharded_moments_keep_their_layout():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    state, _ = start(optax.sgd(0.1, momentum=0.9))
    state = jax.tree.map(lambda a: jax.device_put(a, rows), state)
    away = memopt.optimize(step_with(optax.sgd(0.1)), passes=[Offload(state="*trace*", least_bytes=1024)])
    stored = away.compress(state)
    leaf = stored["opt_state"][0].trace["w0"]
    assert (leaf.sharding.spec, leaf.sharding.memory_kind) == (rows.spec, "pinned_host")


def test_rows_are_fetched_where_a_loop_alone_uses_a_stack():
    optimizer = optax.adamw(1e-2)
    step, (state, x) = scanned_step(optimizer), scanned_start(optimizer)
    away = memopt.optimize(step, passes=[Offload(state="*", least_bytes=4096), Anywhere()])
    stored = away.compress(state)
    assert on_the_host(away, stored, x) == [(1, 0), (3, 3)]  # parameters; parameters and both moments
    want = state
    for _ in range(3):
        (stored, loss), (want, wanted) = away(stored, x), jax.jit(step)(want, x)
    got = away.decompress(stored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), (got, loss), (want, wanted))


def test_a_stack_that_other_operations_read_is_fetched_whole():
    optimizer = optax.adamw(1e-2)
    step, (state, x) = scanned_step(optimizer), scanned_start(optimizer)
    away = memopt.optimize(step, passes=[Offload(state="*opt_state*", least_bytes=4096)])
    assert on_the_host(away, away.compress(state), x) == [(0, 0), (0, 0)]


@pytest.mark.tpu_aot
def test_the_peak_falls_by_all_moments_but_a_few_layers_when_compiled_for_a_tpu():
    optimizer = optax.adam(1e-2)
    step = scanned_step(optimizer)
    state, x = jax.eval_shape(lambda: scanned_start(optimizer, width=512, layers=16))
    options = {"target": "tpu:v5e:1x1", "donate_argnums": 0}
    plain = memopt.optimize(step, passes=[FuseUpdate()], **options).measure(state, x)
    away = memopt.optimize(step, passes=[FuseUpdate(), Offload(**AWAY)], **options)
    memory = away.measure(away.compress(state), x)
    moments = 2 * 16 * 512 * 512 * 4
    assert plain.peak_bytes - memory.peak_bytes >= 0.7 * moments


@pytest.mark.tpu_aot
def test_argument_bytes_move_to_the_host_when_compiled_for_a_tpu():
    optimizer = optax.adam(1e-2)
    step = step_with(optimizer)
    state, x = jax.eval_shape(lambda: start(optimizer, width=512))
    options = {"target": "tpu:v5e:1x1", "donate_argnums": 0}
    plain = memopt.measure(step, state, x, **options)
    away = memopt.optimize(step, passes=[Offload(**AWAY)], **options)
    memory = away.measure(away.compress(state), x)
    moments = 6 * 512 * 512 * 4
    assert plain.argument_bytes - memory.argument_bytes >= 0.99 * moments
    assert plain.alias_bytes - memory.alias_bytes >= 0.99 * moments
