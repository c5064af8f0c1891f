"""Tests of updates inside the backward loop: in come small scanned steps, out go structure, results and bytes."""

import dataclasses
import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import _compat as c
from memopt import _inline
from memopt._target import Target
from memopt.models.steps import concrete, reference_step
from memopt.passes.fuse_update import fuse

LAYERS, WIDTH = 3, 8
TPU = Target.parse("tpu:v5e:1x1")


def is_stack(path, leaf):
    """Say whether a leaf is a stack of matrices."""
    return leaf.ndim == 3


NOT_MATRICES = functools.partial(jax.tree.map, lambda x: x.ndim > 2)
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9),
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.0, 1e-2, 5), weight_decay=0.1),
    "adamw_mask": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=NOT_MATRICES),
    "lion": lambda: optax.lion(1e-2, weight_decay=0.1),
    "galore": lambda: memopt.optim.galore(0.1, rank=2, refresh_every=2, weight_decay=0.1, where=is_stack),
    "galore_left": lambda: memopt.optim.galore(0.1, optax.scale_by_lion(), rank=2, side="left", where=is_stack),
    "dct_low_rank": lambda: memopt.optim.dct_low_rank(0.1, rank=2, refresh_every=2, weight_decay=0.1, where=is_stack),
    "muon": lambda: memopt.optim.muon(1e-2, where=is_stack),
    "per_layer_norm": lambda: optax.chain(optax.scale_by_adam(), optax.scale(-1e-2)),
}


class Anywhere(memopt.passes.FuseUpdate):
    """The pass as it is for a TPU, so that the CPU can run what it makes."""

    def rewrite(self, closed, context):
        return super().rewrite(closed, dataclasses.replace(context, target=TPU))


def loss_of(params, batch):
    """The loss of a small scanned network with a table and a head that are no stacks."""

    def layer(h, p):
        return h + jnp.tanh(h @ p["w"] + p["b"][None]), None

    h, _ = jax.lax.scan(layer, batch @ params["table"], params["layers"])
    return jnp.mean((h @ params["head"]) ** 2)


def step_with(optimizer, log_norm=False):
    def step(state, batch):
        params, moments = state
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        metrics = (loss, optax.tree.norm(grads)) if log_norm else loss
        return (optax.apply_updates(params, updates), moments), metrics

    return step


def start(optimizer, dtype=jnp.float64, width=WIDTH, layers=LAYERS):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.3, dtype)

    stack = {"w": draw(layers, width, width), "b": draw(layers, width)}
    params = {"table": draw(4, width), "layers": stack, "head": draw(width, 2)}
    return (params, optimizer.init(params)), draw(5, 4)


def flat(step, *args):
    closed = _inline.inline(jax.jit(step).trace(*args).jaxpr)
    return c.close(c.dce(closed)[0], c.jaxpr_consts(closed))


def run(step, state, batch, count=3):
    out = None
    for _ in range(count):
        state, out = step(state, batch)
    return state, out


def stacked_results(closed):
    """Return the shapes of what the top-level loops stack."""
    loops = [e for e in c.open_jaxpr(closed).eqns if e.primitive.name == "scan"]
    return [v.aval.shape for e in loops for v in e.outvars[c.scan_layout(e)[1] :]]


def assert_close(got, want, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-30)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.loose_promotion
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_move_into_the_loop_and_change_nothing(name, x64):
    optimizer = OPTIMIZERS[name]()
    step, (state, batch) = step_with(optimizer), start(optimizer)
    new, moved, left = fuse(flat(step, state, batch))
    c.check(new)
    assert (LAYERS, WIDTH, WIDTH) not in stacked_results(new)
    assert [len(avals) for _, avals in moved] == [2] and not left
    fused = memopt.optimize(step, passes=[Anywhere()])
    assert_close(run(fused, state, batch), run(jax.jit(step), state, batch))


@pytest.mark.loose_promotion
def test_moments_at_a_low_rank_are_fused_too(x64):
    """The step is an optax one; `LowRankState` projects what `FuseUpdate` then moves."""
    low = memopt.passes.LowRankState(rank=2, where=["*mu*'w'*", "*nu*'w'*"], refresh_every=2)
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    step, (state, batch) = step_with(optimizer), start(optimizer)
    plain, fused = (memopt.optimize(step, passes=passes) for passes in ([low], [low, Anywhere()]))
    state = plain.compress(state, state, batch)
    assert fused.plan(state, batch).rewrites == ("fuse_update",) and not fused.plan(state, batch).notes
    got, want = run(fused, state, batch), run(plain, state, batch)
    assert got[0][1][0].mu["layers"]["w"].low.shape == (LAYERS, WIDTH, 2)
    assert_close(fused.decompress(got[0]), plain.decompress(want[0]))
    loops = [v.aval.shape for e in loops_of(fused, state, batch) for v in e.outvars[c.scan_layout(e)[1] :]]
    assert loops and (LAYERS, WIDTH, WIDTH) not in loops


def loops_of(step, *args):
    return [e for e in c.open_jaxpr(step.trace(*args).jaxpr).eqns if e.primitive.name == "scan"]


@pytest.mark.loose_promotion
def test_clipping_by_the_global_norm_stays_with_the_reason(x64):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    step, (state, batch) = step_with(optimizer), start(optimizer)
    fused = memopt.optimize(step, passes=[Anywhere()])
    plan = fused.plan(state, batch)
    assert any("a norm over all of them" in note and "f64[3,8,8]" in note for note in plan.notes)
    assert not plan.rewrites
    assert_close(run(fused, state, batch), run(jax.jit(step), state, batch))


@pytest.mark.loose_promotion
def test_a_norm_that_is_only_reported_is_gathered_layer_by_layer(x64):
    optimizer = optax.adamw(1e-2)
    step, (state, batch) = step_with(optimizer, log_norm=True), start(optimizer)
    new, _, left = fuse(flat(step, state, batch))
    assert (LAYERS, WIDTH, WIDTH) not in stacked_results(new) and not left
    fused = memopt.optimize(step, passes=[Anywhere()])
    assert_close(run(fused, state, batch), run(jax.jit(step), state, batch))


def test_a_gradient_that_the_step_returns_stays():
    def step(params, batch):
        grads = jax.grad(loss_of)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), grads["layers"]["w"]

    (state, _), batch = start(optax.sgd(0.1), jnp.float32)
    _, moved, left = fuse(flat(step, state, batch))
    assert [len(avals) for _, avals in moved] == [1]
    assert [one.why for one in left] == ["the step returns it"]


@pytest.mark.loose_promotion
def test_a_training_loop_around_the_step_is_fused_inside(x64):
    optimizer = optax.adamw(1e-2)
    step, (state, batch) = step_with(optimizer), start(optimizer)

    def epoch(state, batches):
        return jax.lax.scan(step, state, batches)

    batches = jnp.stack([batch, 2 * batch])
    _, moved, _ = fuse(flat(epoch, state, batches))
    assert len(moved) == 1
    fused = memopt.optimize(epoch, passes=[Anywhere()])
    assert_close(fused(state, batches), jax.jit(epoch)(state, batches))


@pytest.mark.loose_promotion
def test_encoded_leaves_whose_scales_wait_are_fused():
    optimizer = memopt.optim.adamw_8bit(0.1, min_size=4)
    step, (state, batch) = step_with(optimizer), start(optimizer, jnp.float32, width=128)
    new, moved, _ = fuse(flat(step, state, batch))
    c.check(new)
    barriers = [e for e in c.open_jaxpr(new).eqns if e.primitive is c.optimization_barrier_p]
    assert [len(avals) for _, avals in moved] == [2]
    assert barriers and all(v.aval.shape[:1] != (LAYERS,) for e in barriers for v in e.invars)
    fused = memopt.optimize(step, passes=[Anywhere()])
    assert_close(run(fused, state, batch, 1)[1], run(jax.jit(step), state, batch, 1)[1], 1e-5)


@pytest.mark.loose_promotion
def test_bases_in_four_bits_are_refreshed_layer_by_layer():
    optimizer = memopt.optim.q_galore(0.1, optax.scale_by_adam(), rank=128, refresh_every=2, where=is_stack)
    step, (state, batch) = step_with(optimizer), start(optimizer, jnp.float32, width=144)
    new, moved, left = fuse(flat(step, state, batch))
    c.check(new)
    assert (LAYERS, 144, 144) not in stacked_results(new)
    assert [len(avals) for _, avals in moved] == [2] and not left
    fused = memopt.optimize(step, passes=[Anywhere()])
    got, want = run(fused, state, batch, 5), run(jax.jit(step), state, batch, 5)
    assert_close(got[1], want[1], 1e-5)
    assert_close(got[0][0], want[0][0], 1e-3)


@pytest.mark.loose_promotion
def test_a_cosine_basis_is_made_for_one_layer_at_a_time(x64):
    optimizer = OPTIMIZERS["dct_low_rank"]()
    step, (state, batch) = step_with(optimizer), start(optimizer)
    new, _, _ = fuse(flat(step, state, batch))
    read = [v.aval for e in c.open_jaxpr(new).eqns if e.primitive.name == "scan" for v in e.invars]
    assert not [aval for aval in read if aval.dtype == np.int32 and aval.shape == (LAYERS, WIDTH, 2)]


def test_a_step_without_loops_says_so():
    def step(w, x):
        return w - jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)

    plan = memopt.optimize(step, passes=[Anywhere()]).plan(jnp.ones((4, 4)), jnp.ones((2, 4)))
    assert any("no stacked gradient" in note for note in plan.notes)


def test_a_mask_that_is_not_made_again_stays_one_for_all_layers():
    """Made inside the forward loop and kept for the backward one, it would be one for each layer."""

    def step(state, x):
        def layer(h, w):
            scores = jnp.where(jnp.tril(jnp.ones((64, 64), bool)), h @ w, 0.0)
            return h + jnp.tanh(scores), None

        grads = jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2))(state)
        return state - 0.1 * grads

    args = jnp.ones((3, 64, 64)), jnp.ones((64, 64))
    found = memopt.optimize(step, target="tpu:v5e:1x1", donate_argnums=0, passes=[memopt.passes.FuseUpdate()])
    jaxpr = found.trace(*args).jaxpr
    stacks = [v.aval for eqn in c.open_jaxpr(jaxpr).eqns if eqn.primitive.name == "scan" for v in eqn.outvars]
    assert stacks
    assert not [aval for aval in stacks if aval.dtype == bool]


@pytest.mark.tpu_aot
@pytest.mark.loose_promotion
@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(1e-2), pytest.param(memopt.optim.galore(1e-2, rank=64), marks=pytest.mark.slow)],
    ids=["adam", "galore"],
)
def test_gradients_are_gone_from_the_compiled_temporaries(optimizer):
    step = step_with(optimizer)
    shapes = jax.eval_shape(lambda: start(optimizer, jnp.float32, width=2048, layers=12))
    options = {"target": "tpu:v5e:1x1", "donate_argnums": 0}
    plain = memopt.measure(step, *shapes, **options)
    fused = memopt.optimize(step, passes=[memopt.passes.FuseUpdate()], **options).measure(*shapes)
    assert plain.temp_bytes - fused.temp_bytes >= 0.8 * 12 * 2048 * 2048 * 4
    assert fused.alias_bytes == plain.alias_bytes


def test_the_cpu_is_left_with_the_reason():
    step, (state, batch) = step_with(optax.sgd(0.1)), start(optax.sgd(0.1), jnp.float32)
    plan = memopt.optimize(step, target="cpu", passes=[memopt.passes.FuseUpdate()]).plan(state, batch)
    assert not plan.rewrites and any("copies whole stacks" in note for note in plan.notes)


@pytest.mark.loose_promotion
def test_an_nnx_step_is_updated_in_place():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, h):
            return h + jnp.tanh(self.linear(h))

    class Net(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda rngs: Layer(rngs), in_axes=0, out_axes=0)
            self.layers = make(nnx.Rngs(0).split(LAYERS))

        def __call__(self, h):
            return nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(h, self.layers)

    def step(net, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean(net(x) ** 2))(net)
        optimizer.update(net, grads)
        return loss

    def train(wrap):
        net = Net()
        optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
        wrapped = wrap(step)
        losses = [wrapped(net, optimizer, jnp.ones((2, WIDTH))) for _ in range(3)]
        return wrapped, net, optimizer, losses

    fused, net, optimizer, losses = train(lambda f: memopt.optimize(f, passes=[Anywhere()]))
    _, plain_net, _, plain_losses = train(nnx.jit)
    assert fused.plan(net, optimizer, jnp.ones((2, WIDTH))).rewrites == ("fuse_update",)
    assert_close(nnx.state(net, nnx.Param), nnx.state(plain_net, nnx.Param), 1e-5)
    assert_close(losses, plain_losses, 1e-5)


@pytest.mark.slow
@pytest.mark.loose_promotion
@pytest.mark.parametrize("model", ["llama_1b", "gpt2"])
def test_the_zoo_trains_the_same(model, x64):
    kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    step, shapes, _ = reference_step(model, layers="scan", tiny=True, optimizer=optax.adamw(1e-3), **kinds)
    state, batch = concrete(shapes)
    fused = memopt.optimize(step, passes=[Anywhere()])
    got, want = run(fused, state, batch), run(jax.jit(step), state, batch)
    assert_close(got[0].params, want[0].params)
    assert fused.plan(state, batch).rewrites == ("fuse_update",)
