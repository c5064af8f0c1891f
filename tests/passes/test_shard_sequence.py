"""Loops that cut parts of a sequence which devices split: it is brought together before the loop, not in every trip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt.models.steps import concrete, reference_step
from memopt.passes import Kernels, Shard
from tests.shard_steps import mesh_of

pytestmark = pytest.mark.loose_promotion

BATCH, LENGTH, WIDTH, WORDS, PART = 2, 64, 18, 48, 8


def make_step():
    """Return a step whose only loop reads, adds up and writes parts of a sequence; nothing in it splits features."""

    def parts_of(hidden, weight):
        def trip(carry, i):
            made, total = carry
            part = jax.lax.dynamic_slice_in_dim(hidden, i * PART, PART, 1)
            new = jnp.tanh(part @ weight) + jax.lax.dynamic_slice_in_dim(made, i * PART, PART, 1)
            return (jax.lax.dynamic_update_slice_in_dim(made, new, i * PART, 1), total + new.sum()), None

        return jax.lax.scan(trip, (jnp.zeros_like(hidden), 0.0), jnp.arange(LENGTH // PART))[0]

    def loss_of(params, tokens):
        hidden = params["embed"][tokens] * params["scale"]
        made, total = parts_of(hidden, params["weight"])
        return jnp.mean(jnp.square(made - hidden)) + 1e-3 * total

    def step(params, tokens):
        loss, grads = jax.value_and_grad(loss_of)(params, tokens)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    rng = np.random.default_rng(0)
    shapes = {"embed": (WORDS, WIDTH), "weight": (WIDTH, WIDTH), "scale": (WIDTH,)}
    params = {name: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32) for name, shape in shapes.items()}
    return step, (params, jnp.asarray(rng.integers(0, WORDS, (BATCH, LENGTH)), jnp.int32))


def in_loops(compiled, least):
    return [one for one in memopt.collectives(compiled) if one.times > 1 and one.whole_bytes >= least]


def test_no_trip_brings_a_sequence_together():
    fn, args = make_step()
    step = memopt.optimize(fn, passes=[Shard(mesh_of("tensor"), "tensor+sequence", least_elements=16)], verify=False)
    compiled = step.lower(*args).compile()
    assert not in_loops(compiled, 4 * BATCH * PART * WIDTH)
    whole = [one for one in memopt.collectives(compiled) if one.kind == "all-gather" and one.ways == 8]
    assert whole, "the sequence is not split at all"
    (ours, loss), (theirs, expected) = step(*args), jax.jit(fn)(*args)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def test_attention_whose_heads_do_not_divide_gathers_them_once_a_layer():
    fn, args, _ = reference_step("llama_1b", tiny=True, batch=2, length=512)
    passes = [Kernels(), Shard(mesh_of("tensor"), "tensor+sequence", least_elements=64)]
    step = memopt.optimize(fn, passes=passes, verify=False)
    compiled, plan = step.lower(*args).compile(), step.plan(*args)
    assert any("attention" in d.name and d.choice == "kernel" for d in plan.decisions)
    layers = 2
    assert all(one.times <= layers for one in in_loops(compiled, 1024))
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    predicted = sum(d.value_bytes for d in plan.decisions if d.name.removeprefix("shard/") in kinds)
    assert predicted > 0.5 * sum(one.sent_bytes for one in memopt.collectives(compiled))
    state, batch = concrete(args)
    loss = jax.jit(fn)(state, batch)[1]
    np.testing.assert_allclose(step(state, batch)[1], loss, rtol=1e-5)
