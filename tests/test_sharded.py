"""Tests of sharded steps under `memopt.optimize`: data parallel and FSDP, scanned and unrolled, run and for TPUs."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import memopt
from memopt.models.steps import reference_step
from memopt.passes.remat import Remat

pytestmark = pytest.mark.loose_promotion
P = PartitionSpec


def spec_of(leaf, kind):
    """Replicate, or (FSDP) cut the first dimension that eight devices divide."""
    dims = [d for d, size in enumerate(leaf.shape) if size % 8 == 0] if kind == "fsdp" else []
    return P(*(None,) * dims[0], "data") if dims else P()


def shaped(tree, mesh, spec):
    def one(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(leaf)))

    return jax.tree.map(one, tree)


def filled(shapes):
    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype) + (leaf.ndim > 1), leaf.sharding)
        values = jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype) * 0.02
        return jax.device_put(jnp.abs(values), leaf.sharding)

    return jax.tree.map(one, shapes)


def gpt(kind, layers, mesh, **sizes):
    sizes = {"length": 32, "width": 32, "batch": 16, "depth": 2, "vocabulary": 64, **sizes}
    step, (state, batch), options = reference_step("gpt2", layers=layers, tiny=True, **sizes)
    state = shaped(state, mesh, lambda leaf: spec_of(leaf, kind))
    return step, state, shaped(batch, mesh, lambda _: P("data")), options


def mlp(kind, layers, mesh, rows=1024, width=64):
    def layer(h, w):
        return jnp.tanh(jnp.tanh(h @ w) * h), None

    def loss_of(w, x):
        if layers == "scan":
            return jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)
        for i in range(w.shape[0]):
            x, _ = layer(x, w[i])
        return jnp.mean(x**2)

    def step(w, x):
        loss, grad = jax.value_and_grad(loss_of)(w, x)
        return w - 0.1 * grad, loss

    w = jax.ShapeDtypeStruct((6, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    return step, shaped(w, mesh, lambda leaf: spec_of(leaf, kind)), shaped(x, mesh, lambda _: P("data")), {}


CASES = [
    (mlp, "data", "scan"),
    (mlp, "fsdp", "scan"),
    (mlp, "data", "unrolled"),
    (mlp, "fsdp", "unrolled"),
    pytest.param(gpt, "data", "scan", marks=pytest.mark.slow),  # minutes on two cores
    pytest.param(gpt, "fsdp", "scan", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


@pytest.mark.parametrize("make, kind, layers", CASES)
def test_same_step_in_less_memory(make, kind, layers, mesh, caplog):
    fn, state, batch, options = make(kind, layers, mesh)
    compiled = jax.jit(fn, **options).lower(state, batch).compile()
    plain = memopt.measure(fn, state, batch, **options)
    scanned = layers == "scan"  # on the CPU the temporaries of unrolled steps follow no plan: nothing to verify there
    budget = plain.argument_bytes + plain.output_bytes - plain.alias_bytes + int(0.8 * plain.temp_bytes)
    if not scanned:
        frontier = memopt.optimize(fn, passes=[Remat()], **options).frontier(state, batch)
        budget = min(point.peak_bytes for point in frontier)
    step = memopt.optimize(fn, budget=budget, passes=[Remat()], verify=scanned, **options)
    with caplog.at_level(logging.INFO, logger="memopt"):
        ours, plains = filled(state), filled(state)
        data = filled(batch)
        for _ in range(2):
            ours, loss = step(ours, data)
            plains, expected = compiled(plains, data)
            np.testing.assert_allclose(loss, expected, rtol=1e-5)
    planned = [r for r in caplog.records if "plan predicted" in r.message]
    assert len(planned) == (1 if scanned else 0)  # no second plan, no second compile
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(plains), strict=True):
        assert one.sharding.is_equivalent_to(two.sharding, one.ndim)
    plan = step.plan(state, batch)
    if scanned:
        memory = step.measure(state, batch)
        assert memory.peak_bytes <= budget
        assert plan.baseline_peak_bytes == pytest.approx(plain.peak_bytes, rel=0.2)
        assert plan.predicted_peak_bytes == pytest.approx(memory.peak_bytes, rel=0.3)


def test_plan_says_what_was_taken_from_the_compiled_program(mesh):
    fn, state, batch, options = mlp("fsdp", "scan", mesh)
    plan = memopt.optimize(fn, budget="90%", **options).plan(state, batch)
    assert any("was taken from the plain step's compiled program" in note for note in plan.notes)
    fn, state, batch, options = mlp("data", "scan", mesh)
    assert not any("compiled" in n for n in memopt.optimize(fn, budget="90%", **options).plan(state, batch).notes)


def test_shardings_of_the_options(mesh):
    fn, w, x, _ = mlp("fsdp", "scan", mesh)
    bare = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (w, x)]
    step = memopt.optimize(fn, budget="80%", in_shardings=(w.sharding, x.sharding))
    sharded = memopt.optimize(fn, budget="80%").plan(w, x)
    assert step.plan(*bare).baseline_peak_bytes == pytest.approx(sharded.baseline_peak_bytes, rel=1e-3)


def test_saved_plan_is_for_one_sharding(mesh):
    fn, w, x, _ = mlp("fsdp", "scan", mesh)
    plan = memopt.optimize(fn, budget="80%").plan(w, x)
    other = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="its shardings is"):
        memopt.optimize(fn, plan=plan, budget=plan.budget_bytes).plan(other, x)
    again = memopt.optimize(fn, plan=plan, budget=plan.budget_bytes).plan(w, x)
    assert again.predicted_peak_bytes == plan.predicted_peak_bytes


def test_explain_tells_bytes_of_one_device(mesh):
    fn, w, x, _ = mlp("fsdp", "scan", mesh)
    plain = memopt.measure(fn, w, x)
    assert memopt.explain(fn, w, x).argument_bytes == plain.argument_bytes
    assert memopt.optimize(fn).explain(w, x).peak_bytes == pytest.approx(plain.peak_bytes, rel=0.2)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("kind", ["data", "fsdp"])
def test_ahead_of_time_for_a_tpu(kind):
    mesh = memopt.mesh("tpu:v5e:2x2", (4,), ("data",))
    fn, state, batch, options = mlp(kind, "scan", mesh, 2**18, 256)
    plain = memopt.measure(fn, state, batch, target="tpu:v5e:2x2", **options)
    step = memopt.optimize(fn, budget=int(0.8 * plain.peak_bytes), target="tpu:v5e:2x2", passes=[Remat()], **options)
    plan, memory = step.plan(state, batch), step.measure(state, batch)
    assert memory.peak_bytes <= plan.budget_bytes
    assert plan.baseline_peak_bytes == pytest.approx(plain.peak_bytes, rel=0.15)
