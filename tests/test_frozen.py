"""Steps with frozen weights: what only their gradients would read is not kept, the plan says so, and results stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memopt
from memopt._contract import Context
from memopt._step import Step
from memopt._target import Target
from tests.eager import evaluate

pytestmark = pytest.mark.loose_promotion  # Optax promotes
LAYERS, BATCH, WIDTH, RANK = 3, 32, 32, 2
LABELS = {"base": "freeze", "lora": "train"}
TX = optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, LABELS)


def params():
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.1 * random.standard_normal((LAYERS, *shape)), "float32")

    base = {name: normal(WIDTH, WIDTH) for name in ("adapted", "plain", "out")}
    return {"base": base, "lora": {"a": normal(WIDTH, RANK), "b": normal(RANK, WIDTH)}}


X = jnp.linspace(-1.0, 1.0, BATCH * WIDTH, dtype="float32").reshape(BATCH, WIDTH)


def layer(x, weights):
    base, lora = weights
    h = jnp.tanh(x @ base["adapted"] + x @ lora["a"] @ lora["b"])
    return x + jnp.sin(h @ base["plain"]) @ base["out"], None


def scanned(p, x):
    return jnp.mean(jax.lax.scan(layer, x, (p["base"], p["lora"]))[0] ** 2)


def unrolled(p, x):
    for i in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], (p["base"], p["lora"])))
    return jnp.mean(x**2)


def rematted(p, x):
    return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, (p["base"], p["lora"]))[0] ** 2)


def descend(p, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, p, grads)


def adapters_alone(loss, p, x):
    grads = jax.grad(lambda lora: loss({**p, "lora": lora}, x))(p["lora"])
    return {**p, "lora": descend(p["lora"], grads)}


def stopped(loss, p, x):
    return descend(p, jax.grad(lambda p: loss({**p, "base": jax.lax.stop_gradient(p["base"])}, x))(p))


def set_to_zero(loss, p, x):
    return optax.apply_updates(p, TX.update(jax.grad(loss)(p, x), TX.init(p), p)[0])


def replaced_by_zeros(loss, p, x):
    grads = jax.grad(loss)(p, x)
    return descend(p, {name: jax.tree.map(lambda g, n=name: jnp.where(n == "lora", g, 0.0), grads[name]) for name in p})


def behind_a_barrier(loss, p, x):
    grads = jax.lax.optimization_barrier(jax.grad(loss)(p, x))
    return {**p, "lora": descend(p["lora"], grads["lora"])}


def where_finite(loss, p, x):
    grads = jax.grad(loss)(p, x)
    new = {**p, "lora": descend(p["lora"], grads["lora"])}
    finite = jnp.isfinite(jnp.sum(grads["lora"]["a"]))
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, p)


def updated_behind_a_barrier(loss, p, x):
    """Updates of all weights, those by zero too, pass one barrier with a gradient."""
    grads = jax.grad(loss)(p, x)
    new = optax.apply_updates(p, TX.update(grads, TX.init(p), p)[0])
    return jax.lax.optimization_barrier((new, grads["lora"]["a"]))[0]


DROPPING = [
    updated_behind_a_barrier,
    adapters_alone,
    stopped,
    set_to_zero,
    replaced_by_zeros,
    behind_a_barrier,
    where_finite,
]


def everything(loss, p, x):
    return descend(p, jax.grad(loss)(p, x))


def times_zero(loss, p, x):
    grads = jax.grad(loss)(p, x)
    return descend(p, {"base": jax.tree.map(lambda g: g * 0.0, grads["base"]), "lora": grads["lora"]})


def clipped(loss, p, x):
    """The norm over all gradients needs those of the frozen weights."""
    grads = jax.grad(loss)(p, x)
    scale = jax.lax.rsqrt(1.0 + optax.tree.norm(grads) ** 2)
    return {**p, "lora": descend(p["lora"], jax.tree.map(lambda g: g * scale, grads["lora"]))}


def raw(loss, p, x):
    """Gradients are returned as they are."""
    return jax.grad(loss)(p, x)


def surveyed(function, *args):
    """Return the plain jaxpr of a step, and the step as it is planned; nothing is searched."""
    closed = jax.make_jaxpr(function)(*args)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(args))
    target = Target.parse("cpu")
    context = Context(target, paths=paths)
    return closed, Step(closed, target, [memopt.passes.Remat()], None, None, context=context)


@pytest.mark.parametrize("loss", [scanned, unrolled, rematted])
@pytest.mark.parametrize("step", DROPPING)
def test_values_for_gradients_of_frozen_weights_are_not_kept_and_named(step, loss):
    """Of a layer `sin(h @ plain)` has no other reader; `h` has where it makes the gradient of tanh (JAX 0.10)."""
    closed, found = surveyed(lambda p, x: step(loss, p, x), params(), X)
    rows = [row for row in found.frozen.dropped if "sin" in row.name]
    others = {row.name.partition(".")[0] for row in found.frozen.dropped if row not in rows}
    assert rows and others <= ({"tanh"} if jax.__version_info__ >= (0, 11) else set())
    assert sum(row.value_bytes for row in rows) == LAYERS * BATCH * WIDTH * 4
    assert all("`[0]['base']['out']`" in row.reason and row.choice == "dropped" for row in rows)
    later = {found.survey.graph.values[v].op for v, _ in found.survey.needs()}
    assert not any(op.eqn.primitive.name == "sin" for op in later if op is not None)
    alone = jax.make_jaxpr(lambda p, x: adapters_alone(loss, p, x))(params(), X)
    assert memopt.matmul_flops(found.flat) <= memopt.matmul_flops(alone)
    leaves = jax.tree.leaves((params(), X))
    for ours, theirs in zip(evaluate(found.flat, *leaves), evaluate(closed, *leaves), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [scanned, unrolled])
@pytest.mark.parametrize("step", [everything, times_zero, clipped, raw])
def test_nothing_is_named_where_gradients_are_needed(step, loss):
    _, found = surveyed(lambda p, x: step(loss, p, x), params(), X)
    assert not found.frozen.dropped
    assert bool(found.frozen.left) == (step is times_zero)


@pytest.mark.parametrize("use", [descend, lambda p, grads: grads])
def test_weights_whose_gradient_reads_a_second_run_of_a_value_are_not_called_frozen(use):
    """Behind a barrier the second run is no value of the first one, so that dataflow alone shows no reader of that."""

    @jax.checkpoint
    def loss(p, x):
        return jnp.mean((jax.lax.optimization_barrier(jnp.sin(x)) @ p["out"]) ** 2)

    def step(p, x):
        value, grads = jax.value_and_grad(loss)(p, x)
        return value, use(p, grads)

    _, found = surveyed(step, {"out": params()["base"]["out"][0]}, X)
    assert not found.frozen.dropped


def test_a_gradient_times_zero_stays_what_it_is():
    """Zero times infinity is no zero, and nobody may make one of it."""
    _, found = surveyed(lambda p, x: times_zero(scanned, p, x)["base"]["out"], params(), X)
    (out,) = evaluate(found.flat, *jax.tree.leaves((params(), jnp.full_like(X, jnp.inf))))
    assert bool(jnp.isnan(out).all())


def accumulated(p, x, count):
    """A `while` loop over as many microbatches as there are, which JAX's removal of dead code left whole."""

    def body(state):
        i, grads = state
        return i + 1, jax.tree.map(jnp.add, grads, jax.grad(scanned)(p, x * i))

    _, grads = jax.lax.while_loop(lambda s: s[0] < count, body, (0.0, jax.tree.map(jnp.zeros_like, p)))
    return {**p, "lora": descend(p["lora"], grads["lora"])}


def test_accumulated_gradients_of_frozen_weights_are_not_carried():
    closed, found = surveyed(accumulated, params(), X, 2.0)
    loops = [eqn for eqn in found.flat.jaxpr.eqns if eqn.primitive.name == "while"]
    assert {v.aval.shape for eqn in loops for v in eqn.outvars} == {(LAYERS, WIDTH, RANK), (LAYERS, RANK, WIDTH), ()}
    leaves = jax.tree.leaves((params(), X, 2.0))
    for ours, theirs in zip(evaluate(found.flat, *leaves), evaluate(closed, *leaves), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_plans_and_explanations_say_it():
    def run(p, x):
        return set_to_zero(scanned, p, x)

    found = memopt.optimize(run, budget="100%", target="cpu", verify=False)
    plan = found.plan(params(), X)
    row = next(row for row in plan.dropped if "sin" in row.name)
    assert row.name not in {decision.name for decision in plan.decisions}
    assert plan.baseline_flops < memopt.matmul_flops(jax.make_jaxpr(run)(params(), X))  # XLA removes the rest, too
    told = f"Not kept: {row.name} (36.0 KiB); only the gradient of frozen `[0]['base']['out']` would read it"
    told = told.replace("36.0", f"{row.value_bytes / 1024:.1f}")
    assert told in " ".join(str(plan).split())
    assert memopt.Plan.from_json(plan.to_json()).dropped == plan.dropped
    explained = memopt.explain(run, params(), X, target="cpu")
    assert told in " ".join(str(explained).split())
    assert memopt.Explanation.from_json(explained.to_json()) == explained


def test_the_step_as_written_is_not_said_to_drop_what_xla_may_keep():
    """What stands behind a barrier goes where memopt rewrites the step, and in no other case."""
    found = memopt.optimize(
        lambda p, x: behind_a_barrier(scanned, p, x), budget="100%", target="cpu", verify=False
    ).plan(params(), X)
    assert found.predicted_peak_bytes == found.baseline_peak_bytes and not found.dropped


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.plain, self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.adapter = nnx.LoRA(WIDTH, RANK, WIDTH, base_module=self.plain, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.sin(self.adapter(x)))


def test_nnx_filters_freeze_weights():
    model = Adapted(nnx.Rngs(0))
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)

    def train(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(x) ** 2), argnums=wrt)(model))

    (row,) = memopt.explain(nnx.jit(train), model, optimizer, X, target="cpu").dropped
    assert "sin" in row.name and "gradient of frozen `[0]." in row.reason
