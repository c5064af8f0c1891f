"""Tests of low-rank state: in come steps of many optimizers, out go trajectories like GaLore's, forms and reasons."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.models.steps import concrete, reference_step
from memopt.optim import scale_by_galore
from memopt.passes import CompressState, LowRankState
from memopt.passes._low_rank_form import LowRank

pytestmark = pytest.mark.loose_promotion  # Optax itself multiplies arrays by scalars of another dtype
LAYERS, WIDTH, RANK = 2, 8, 2
SETTINGS = {"rank": RANK, "refresh_every": 3, "scale": 0.5}
#: What an optimizer does between the gradient and the update.
INNER = {
    "adam": optax.scale_by_adam,
    "rmsprop": optax.scale_by_rms,
    "momentum": lambda: optax.trace(0.9),
    "nesterov": lambda: optax.trace(0.9, nesterov=True),
    "lion": optax.scale_by_lion,
    "amsgrad": optax.scale_by_amsgrad,
    "adan": optax.scale_by_adan,
    "sign": lambda: optax.chain(optax.scale_by_sign(), optax.trace(0.9)),
    "rmsprop_momentum": lambda: optax.chain(optax.scale_by_rms(), optax.trace(0.9)),
}
BEFORE = optax.clip_by_global_norm(0.5)
AFTER = (optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.01, 10)))


def loss_of(params, batch):
    """The loss of a small scanned network with a head, and biases that a scan has stacked to matrices."""

    def layer(h, p):
        return h + jnp.tanh(h @ p["w"] + p["bias"][None]), None

    h, _ = jax.lax.scan(layer, batch, params["layers"])
    return jnp.mean((h @ params["head"]) ** 2)


def step_with(optimizer):
    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, moments = optimizer.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": moments}, loss

    return step


def start(optimizer, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.3, dtype)

    stack = {"w": draw(LAYERS, WIDTH, WIDTH), "bias": draw(LAYERS, WIDTH)}
    params = {"layers": stack, "head": draw(WIDTH, 6)}
    return {"params": params, "opt_state": optimizer.init(params)}, draw(5, WIDTH)


def run(step, state, batch, count=7):
    loss = None
    for _ in range(count):
        state, loss = step(state, batch)
    return state, loss


def low_of(step, optimizer, settings=None, **options):
    return memopt.optimize(step_with(optimizer), passes=[LowRankState(**(settings or SETTINGS))], **options)


def stored_leaves(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, LowRank))
    return [leaf for leaf in leaves if isinstance(leaf, LowRank)]


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.linalg.norm(np.asarray(a - b, np.float64)) <= tolerance * np.linalg.norm(np.asarray(b, np.float64))


QUICK = ("adam", "lion", "rmsprop_momentum")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in INNER])
def test_the_trajectory_is_that_of_galore(name):
    inner = INNER[name]()
    optimizer = optax.chain(BEFORE, inner, *AFTER)
    galore = optax.chain(BEFORE, scale_by_galore(inner, **SETTINGS), *AFTER)
    (state, batch), (other, _) = start(optimizer), start(galore)
    low = low_of(step_with, optimizer, donate_argnums=0)
    got, loss = run(low, low.compress(state, state, batch), batch)
    want, wanted = run(jax.jit(step_with(galore)), other, batch)
    assert_close((got["params"], loss), (want["params"], wanted))
    full = run(jax.jit(step_with(optimizer)), start(optimizer)[0], batch)[1]
    assert abs(full - wanted) > 1e-2 * abs(wanted)  # so that a step left as it is would not pass
    assert {node.low.size for node in stored_leaves(got)} == {WIDTH * RANK, LAYERS * WIDTH * RANK}


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_both_sides_and_bfloat16_follow_galore(side):
    settings = {**SETTINGS, "side": side, "seed": 3, "power_iterations": 2}
    inner = optax.scale_by_adam()
    optimizer, galore = (optax.chain(t, optax.scale(-0.05)) for t in (inner, scale_by_galore(inner, **settings)))
    (state, batch), (other, _) = start(optimizer, jnp.bfloat16), start(galore, jnp.bfloat16)
    low = low_of(step_with, optimizer, settings)
    got = run(low, low.compress(state), batch)
    want = run(jax.jit(step_with(galore)), other, batch)
    assert_close((got[0]["params"], got[1]), (want[0]["params"], want[1]), 2**-5)
    assert {node.low.dtype for node in stored_leaves(got[0])} == {jnp.dtype(jnp.bfloat16)}


def test_paths_and_the_step_choose_alike_and_every_byte_counts():
    optimizer = optax.adamw(0.1)
    state, batch = start(optimizer)
    low = low_of(step_with, optimizer)
    by_path, by_step = low.compress(state), low.compress(state, state, batch)
    assert jax.tree.structure(by_path) == jax.tree.structure(by_step)
    nodes = stored_leaves(by_step)
    assert [node.leaf.words[-2:] for node in nodes[:3]] == [("mu", "head"), ("layers", "w"), ("nu", "head")]
    assert [node.basis is None for node in nodes] == [False] * 2 + [True] * 2  # one basis a gradient
    assert by_step["opt_state"][0].mu["layers"]["bias"].shape == (LAYERS, WIDTH)
    shapes = low.compress(jax.eval_shape(lambda: state))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), by_path)
    memory = low.measure(shapes, batch)
    plain = memopt.measure(step_with(optimizer), state, batch)
    saved = sum(x.nbytes for x in jax.tree.leaves(state)) - sum(x.nbytes for x in jax.tree.leaves(by_step))
    assert plain.argument_bytes - memory.argument_bytes == saved > 0


def test_a_second_call_neither_traces_nor_compiles_again():
    optimizer, traces = optax.adamw(0.1), []
    state, batch = start(optimizer)

    def step(*args):
        traces.append(1)
        return step_with(optimizer)(*args)

    low = memopt.optimize(step, passes=[LowRankState(**SETTINGS)])
    state = low.compress(state)
    state, _ = low(state, batch)
    with jax.log_compiles(), jax.checking_leaks():
        before = len(traces)
        run(low, state, batch)
    assert len(traces) == before == 1


def test_a_plain_state_is_told_the_remedy():
    optimizer = optax.adam(0.1)
    state, batch = start(optimizer)
    with pytest.raises(TypeError, match=r"args\[0\]\['opt_state'\].*Call state = step.compress\(state\) once"):
        low_of(step_with, optimizer)(state, batch)


REFUSED = {
    "factored": (lambda: optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9), "depends on other state"),
    "branch": (lambda: optax.MultiSteps(optax.adam(0.1), 2), r"not made of it element by element \(cond\)"),
    "trust_ratio": (lambda: optax.lamb(0.1), "2 values of its update are read by other operations"),
    "norm": (lambda: optax.novograd(0.1), r"\(cond\)"),
    "shared_gradient": (lambda: optax.chain(factored_beside(), optax.scale(-0.1)), "not element by element"),
}


def factored_beside():
    """Momentum over a gradient of which a factored second moment is made too: the gradient has another reader."""

    def init(params):
        rows = jax.tree.map(lambda p: jnp.zeros(p.shape[:-1]), params)
        return {"m": jax.tree.map(jnp.zeros_like, params), "rows": rows}

    def update(grads, state, params=None):
        m = jax.tree.map(lambda m, g: 0.9 * m + g, state["m"], grads)
        rows = jax.tree.map(lambda r, g: 0.9 * r + jnp.mean(g**2, -1), state["rows"], grads)
        return jax.tree.map(lambda m, r: m / jnp.sqrt(r + 1e-8)[..., None], m, rows), {"m": m, "rows": rows}

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_region_stays_with_the_reason(name):
    make, why = REFUSED[name]
    optimizer = make()
    state, batch = start(optimizer)
    low = low_of(step_with, optimizer, target="cpu")
    with pytest.raises(ValueError, match=why):
        low.compress(state, state, batch)
    with pytest.raises(ValueError, match="finds no moment that it can store"):
        low.plan(state, batch)


def test_one_moment_with_a_region_is_stored_beside_one_without():
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale(-0.1))
    state, batch = start(optimizer)
    low = low_of(step_with, optimizer, target="cpu")
    with pytest.raises(ValueError, match="more than moments, scalars and one gradient.*look at the step"):
        low.plan(low.compress(state), batch)
    stored = low.compress(state, state, batch)
    assert len(stored_leaves(stored)) == 4
    notes = [note for note in low.plan(stored, batch).notes if ".trace['head']" in note]
    assert len(notes) == 1 and "was left as it was" in notes[0]


def test_moments_that_share_no_bases_are_told_apart():
    optimizer = INNER["rmsprop_momentum"]()
    state, batch = start(optax.chain(optimizer, optax.scale(-0.1)))
    low = low_of(step_with, optax.chain(optimizer, optax.scale(-0.1)), {**SETTINGS, "where": "*.nu*"})
    state = low.compress(state)
    assert len(stored_leaves(state)) == 2
    low = low_of(step_with, optax.chain(optimizer, optax.scale(-0.1)), {**SETTINGS, "where": "*opt_state*"})
    with pytest.raises(TypeError, match=r"\.trace.* is plain"):
        low(state, batch)


def test_a_pattern_that_matches_nothing_is_an_error():
    state, batch = start(optax.adam(0.1))
    low = low_of(step_with, optax.adam(0.1), {**SETTINGS, "where": "*.momentum*"})
    with pytest.raises(ValueError, match="matches no leaf that it can store"):
        low.compress(state)
    with pytest.raises(ValueError, match="do not hold the state"):
        low_of(step_with, optax.adam(0.1)).compress(state, dict(state), batch)
    with pytest.raises(ValueError, match="rank=0 is too small"):
        LowRankState(rank=0)


def test_plain_moments_come_back_where_the_bases_reach():
    optimizer = optax.adam(0.1)
    state, batch = start(optimizer)
    state = run(jax.jit(step_with(optimizer)), state, batch)[0]
    low = low_of(step_with, optimizer, {**SETTINGS, "rank": 4, "power_iterations": 4})
    stored = low.compress(state)
    back = low.decompress(stored)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), back) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    mu, again = (s["opt_state"][0].mu["head"] for s in (state, back))
    left, _, right = np.linalg.svd(np.asarray(mu))
    best = np.linalg.norm(mu - left[:, :4] @ left[:, :4].T @ mu)
    assert np.linalg.norm(mu - again) <= 1.1 * best < 0.5 * np.linalg.norm(mu)
    assert float(back["opt_state"][0].nu["head"].min()) >= 0.0
    once = run(low, stored, batch, 1)[0]
    assert [int(node.count) for node in stored_leaves(once) if node.count is not None] == [2, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(once))


def test_moments_can_be_compressed_as_well():
    optimizer = optax.adam(0.05)
    state, batch = start(optimizer)
    codec = CompressState("dynamic8", where="*.mu*.low", min_size=1)
    both = memopt.optimize(step_with(optimizer), passes=[codec, LowRankState(**SETTINGS)])
    alone = low_of(step_with, optimizer)
    got, loss = run(both, both.compress(state), batch)
    _, wanted = run(alone, alone.compress(state), batch)
    assert got["opt_state"][0].mu["head"].low.codes.dtype == jnp.uint8
    assert abs(loss - wanted) < 0.05 * abs(wanted)


def test_a_training_loop_and_checkpoints_take_the_stored_form(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    optimizer = optax.adamw(0.1)
    state, batch = start(optimizer)
    low = low_of(step_with, optimizer)
    state = low.compress(state)
    want = run(low, state, batch, 2)[0]
    looped = jax.jit(lambda s: jax.lax.scan(lambda s, _: low(s, batch), s, None, length=2)[0])(state)
    assert_close(looped["params"], want["params"])
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "stored", want)
        saver.save(tmp_path / "plain", low.decompress(want))
        saver.wait_until_finished()
        again = saver.restore(tmp_path / "stored", jax.tree.map(jnp.zeros_like, want))
        plain = saver.restore(tmp_path / "plain", low.decompress(jax.tree.map(jnp.zeros_like, want)))
    jax.tree.map(np.testing.assert_array_equal, again, want)
    assert np.isfinite(low(low.compress(plain), batch)[1])


@pytest.mark.slow
def test_a_linen_step_over_scanned_layers():
    optimizer = optax.adamw(1e-2)
    step, shapes, options = reference_step("gpt2", layers="scan", tiny=True, optimizer=optimizer)
    state, batch = concrete(shapes)
    low = memopt.optimize(step, passes=[LowRankState(rank=4)], **options)
    stored = low.compress(state, state, batch)
    assert any(node.low.ndim == 3 for node in stored_leaves(stored))
    stored, losses = stored, []
    for _ in range(4):
        stored, loss = low(stored, batch)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_an_nnx_optimizer():
    def step(net, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean(net(x) ** 2))(net)
        optimizer.update(net, grads)
        return loss

    def fresh(transform):
        net = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        return net, nnx.Optimizer(net, transform, wrt=nnx.Param)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, WIDTH)), jnp.float32)
    low = memopt.optimize(step, passes=[LowRankState(**SETTINGS)])
    net, optimizer = fresh(optax.adam(1e-2))
    optimizer = low.compress(optimizer, net, optimizer, x)
    other, reference = fresh(optax.chain(scale_by_galore(**SETTINGS), optax.scale(-1e-2)))
    got = [float(low(net, optimizer, x)) for _ in range(5)]
    want = [float(nnx.jit(step)(other, reference, x)) for _ in range(5)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert len(stored_leaves(optimizer)) == 2


def test_sharded_moments_stay_sharded():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer = optax.adam(0.1)
    state, batch = start(optimizer)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda a: jax.device_put(a, rows if a.shape == (WIDTH, 6) else whole), state)
    low = low_of(step_with, optimizer)
    stored = low.compress(placed)
    assert stored["opt_state"][0].mu["head"].low.sharding.spec == jax.sharding.PartitionSpec(None, None)
    got = run(low, stored, jax.device_put(batch, whole), 2)[0]
    want = run(low, low.compress(state), batch, 2)[0]
    assert_close(got["params"], want["params"])
