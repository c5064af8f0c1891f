"""Tests of stored state: in come small steps of several optimizers, out go forms, structure, results and errors."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import _compat as c
from memopt._codec import Encoded
from memopt.passes import CompressState

WIDTH = 64
OPTIMIZERS = {
    "momentum": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-2),
}


def loss_of(params, x):
    for w in params.values():
        x = x + jnp.tanh(x @ w)
    return jnp.mean(x**2)


def step_with(optimizer):
    def step(state, x):
        loss, grads = jax.value_and_grad(loss_of)(state["params"], x)
        updates, moments = optimizer.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": moments}, loss

    return step


def start(optimizer, layers=3, width=WIDTH):
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((width, width)) * 0.1, jnp.float32) for i in range(layers)}
    x = jnp.asarray(rng.standard_normal((8, width)), jnp.float32)
    return {"params": params, "opt_state": optimizer.init(params)}, x


def run(step, state, x, count=3):
    loss = None
    for _ in range(count):
        state, loss = step(state, x)
    return state, loss


def by_hand(step, pass_, state, x, count=3):
    """Train plainly, with the state rounded by the codec between steps."""
    loss = None
    stored = memopt.optimize(step, passes=[pass_])
    for _ in range(count):
        state = stored.decompress(stored.compress(state))
        state, loss = jax.jit(step)(state, x)
    return stored.decompress(stored.compress(state)), loss


def leaves_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-30)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_rounds_the_state_and_nothing_else(name):
    optimizer, pass_ = OPTIMIZERS[name](), CompressState("int8", where="*opt_state*", min_size=1)
    step, (state, x) = step_with(optimizer), start(optimizer)
    stored = memopt.optimize(step, passes=[pass_], donate_argnums=0)
    got = run(stored, stored.compress(state), x)
    kinds = jax.tree.leaves(got[0], is_leaf=lambda n: isinstance(n, Encoded))
    assert sum(isinstance(n, Encoded) for n in kinds) == (6 if name == "adamw" else 3)
    want = by_hand(step, pass_, start(optimizer)[0], x)
    leaves_close((stored.decompress(got[0]), got[1]), want, 1e-2)
    for a, b in zip(jax.tree.leaves(got[0]["params"]), jax.tree.leaves(want[0]["params"]), strict=True):
        # two programs may round one number in many the other way, and a second moment of 0 or 1 unit is far apart
        assert np.mean(np.abs(a - b) > 1e-4 * np.std(b)) <= 1e-3


@pytest.mark.loose_promotion
def test_leaves_go_through_the_step_in_turn():
    optimizer = optax.adam(1e-2)
    step, (state, x) = step_with(optimizer), start(optimizer)
    stored = memopt.optimize(step, target="cpu", passes=[CompressState("int8", min_size=1)])
    plan = stored.plan(stored.compress(state), x)
    assert [row.choice for row in plan.decisions].count("compress_state") == 6
    barriers = [e for e in c.open_jaxpr(stored.trace(stored.compress(state), x).jaxpr).eqns]
    barriers = [e for e in barriers if e.primitive is c.optimization_barrier_p]
    assert len(barriers) == 2  # between three parameters, each with both of its moments
    assert all(len(e.invars) == 5 + 4 for e in barriers)  # p, and codes and scales of both moments; the next one's


@pytest.mark.loose_promotion
def test_a_plain_state_is_told_the_remedy():
    optimizer = optax.adam(1e-2)
    step, (state, x) = step_with(optimizer), start(optimizer)
    stored = memopt.optimize(step, passes=[CompressState("int8", min_size=1)])
    with pytest.raises(TypeError, match=r"args\[0\]\['opt_state'\].*Call state = step.compress\(state\) once"):
        stored(state, x)


@pytest.mark.loose_promotion
def test_a_pattern_that_matches_nothing_is_an_error():
    optimizer = optax.adam(1e-2)
    step, (state, x) = step_with(optimizer), start(optimizer)
    stored = memopt.optimize(step, passes=[CompressState("int8", where="*.momentum*")])
    with pytest.raises(ValueError, match="matches no leaf that it can store"):
        stored.compress(state)
    with pytest.raises(ValueError, match="matches no leaf that it can store"):
        stored(state, x)


def test_an_unknown_codec_is_an_error():
    with pytest.raises(ValueError, match="no codec 'int9'"):
        CompressState("int9")


def test_frozen_weights_are_read_and_stay_as_they_are():
    def step(frozen, adapter, x):
        loss, grads = jax.value_and_grad(lambda a: jnp.mean(jnp.tanh(x @ frozen["base"] + x @ a) ** 2))(adapter)
        return frozen, adapter - 0.1 * grads, loss

    rng = np.random.default_rng(0)
    base = jnp.asarray(rng.standard_normal((WIDTH, WIDTH)), jnp.float32)
    stored = memopt.optimize(step, passes=[CompressState("int8", where="*base*", min_size=1)])
    frozen = stored.compress({"base": base})
    once, adapter, _ = stored(frozen, jnp.zeros((WIDTH, WIDTH)), jnp.ones((2, WIDTH)))
    assert isinstance(once["base"], Encoded)
    np.testing.assert_array_equal(once["base"].codes, frozen["base"].codes)
    want = jax.jit(step)(stored.decompress(frozen), jnp.zeros((WIDTH, WIDTH)), jnp.ones((2, WIDTH)))[1]
    np.testing.assert_allclose(adapter, want, rtol=1e-5, atol=1e-6)


def adapted_loss(adapter, base, x):
    def layer(h, p):
        w, (down, up) = p
        return h + jnp.tanh(h @ w + (h @ down) @ up), None

    return jnp.mean(jax.lax.scan(layer, x, (base, adapter))[0] ** 2)


def adapted(loss=adapted_loss, layers=3, width=256):
    """Return a step over an adapter of frozen scanned layers, and its arguments."""

    def step(frozen, adapter, x):
        value, grads = jax.value_and_grad(loss)(adapter, frozen["base"], x)
        return frozen, jax.tree.map(lambda p, g: p - 0.1 * g, adapter, grads), value

    rng = np.random.default_rng(0)
    shapes = (layers, width, width), (layers, width, 4), (layers, 4, width), (8, width)
    base, down, up, x = (jnp.asarray(rng.standard_normal(shape) * 0.05, jnp.float32) for shape in shapes)
    return step, ({"base": base}, (down, up), x)


def whole_stacks(closed, size):
    """Return how many values of a size or more a step makes at its top level, and how many loops read one as slices."""
    eqns = c.open_jaxpr(closed).eqns
    made = [v for e in eqns for v in e.outvars if v.aval.size >= size and v.aval.dtype != np.uint8]
    loops = [v for e in eqns if e.primitive.name == "scan" for v in e.invars if v in made]
    return len(made), len(loops)


@pytest.mark.parametrize("codec", ["int8", "int4", "dynamic8"])
def test_frozen_layers_are_decoded_one_at_a_time_inside_their_loops(codec):
    step, (frozen, adapter, x) = adapted()
    stored = memopt.optimize(step, passes=[CompressState(codec, where="*base*")])
    frozen = stored.compress(frozen)
    closed = stored.trace(frozen, adapter, x).jaxpr
    c.check(closed)
    assert whole_stacks(closed, 3 * 256 * 256) == (0, 0)  # nor does one loop hand constants on to the other
    assert "optimization_barrier" in {e.primitive.name for e in loops_of(closed)[0].eqns}
    got, want = stored(frozen, adapter, x), jax.jit(step)(stored.decompress(frozen), adapter, x)
    leaves_close(got[1:], want[1:], 1e-5)


@pytest.mark.tpu_aot
def test_frozen_layers_take_less_memory_when_compiled_for_a_tpu():
    step, _ = adapted()
    shapes = (16, 1024, 1024), (16, 1024, 4), (16, 4, 1024), (512, 1024)
    base, down, up, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    frozen, rest = {"base": base}, ((down, up), x)
    settings = {"target": "tpu:v5e:1x1", "donate_argnums": (0, 1)}
    plain = memopt.measure(step, frozen, *rest, **settings)
    stored = memopt.optimize(step, passes=[CompressState("int8", where="*base*")], **settings)
    memory = stored.measure(stored.compress(frozen), *rest)
    print(f"frozen int8: {plain.peak_bytes / 2**20:.1f} -> {memory.peak_bytes / 2**20:.1f} MiB")
    base_bytes = 2 * 16 * 1024 * 1024
    assert plain.argument_bytes - memory.argument_bytes > 0.45 * base_bytes
    assert plain.peak_bytes - memory.peak_bytes > 0.45 * base_bytes - 3 * 4 * 1024 * 1024  # some decoded layers


def loops_of(closed):
    """Return the bodies of the loops at the top level."""
    eqns = c.open_jaxpr(closed).eqns
    return [c.open_jaxpr(e.params["jaxpr"]) for e in eqns if e.primitive.name == "scan"]


def test_a_frozen_stack_that_is_read_whole_is_decoded_whole():
    def loss(adapter, base, x):
        return adapted_loss(adapter, base, x) + 0.1 * jnp.mean(base) * jnp.mean(adapter[0])

    step, (frozen, adapter, x) = adapted(loss)
    stored = memopt.optimize(step, passes=[CompressState("int8", where="*base*")])
    frozen = stored.compress(frozen)
    made, read = whole_stacks(stored.trace(frozen, adapter, x).jaxpr, 3 * 256 * 256)
    assert made and read == 2
    leaves_close(stored(frozen, adapter, x)[1:], jax.jit(step)(stored.decompress(frozen), adapter, x)[1:], 1e-5)


@pytest.mark.loose_promotion
def test_shapes_are_enough_and_bytes_fall():
    optimizer = optax.adamw(1e-3)
    step = step_with(optimizer)
    state, x = jax.eval_shape(lambda: start(optimizer, width=256))
    plain = memopt.measure(step, state, x, target="cpu", donate_argnums=0)
    stored = memopt.optimize(step, target="cpu", passes=[CompressState("int8")], donate_argnums=0)
    memory = stored.measure(stored.compress(state), x)
    moments = 6 * 256 * 256 * 4
    assert memory.argument_bytes <= plain.argument_bytes - 0.7 * moments
    assert memory.alias_bytes >= memory.argument_bytes - x.size * 4
    assert jax.tree.map(lambda a: a.shape, stored.decompress(stored.compress(state))) == jax.tree.map(
        lambda a: a.shape, state
    )


@pytest.mark.loose_promotion
def test_a_second_call_does_not_compile_again():
    optimizer = optax.adam(1e-2)
    step, (state, x) = step_with(optimizer), start(optimizer)
    traces = []
    stored = memopt.optimize(lambda *args: (traces.append(1), step(*args))[1], passes=[CompressState("int8")])
    run(stored, stored.compress(state), x)
    assert len(traces) == 1


@pytest.mark.loose_promotion
def test_checkpoints_of_both_forms_load(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    optimizer = optax.adamw(1e-2)
    step, (state, x) = step_with(optimizer), start(optimizer)
    stored = memopt.optimize(step, passes=[CompressState("int8", min_size=1)])
    state, _ = stored(stored.compress(state), x)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "stored", state)
        saver.save(tmp_path / "plain", stored.decompress(state))
        saver.wait_until_finished()
        shapes = jax.tree.map(jnp.zeros_like, state)
        again = saver.restore(tmp_path / "stored", shapes)
        plain = saver.restore(tmp_path / "plain", stored.decompress(shapes))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    leaves_close(stored(stored.compress(plain), x)[0]["params"], stored(again, x)[0]["params"], 1e-5)


@pytest.mark.loose_promotion
def test_an_nnx_optimizer_is_stored():
    def step(net, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean(net(x) ** 2))(net)
        optimizer.update(net, grads)
        return loss

    net = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    stored = memopt.optimize(step, passes=[CompressState("int8", where="*opt_state*")])
    optimizer = stored.compress(optimizer)
    losses = [float(stored(net, optimizer, jnp.ones((2, WIDTH)))) for _ in range(3)]
    assert losses[2] < losses[0]
    stored_leaves = jax.tree.leaves(optimizer, is_leaf=lambda n: isinstance(n, Encoded))
    assert sum(isinstance(n, Encoded) for n in stored_leaves) == 2
