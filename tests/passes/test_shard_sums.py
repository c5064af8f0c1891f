"""Gradients that are added up whole: behind logits with many tokens, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt._timeline import simulate
from memopt.passes import Shard
from tests.shard_steps import mesh_of

LENGTH, WIDTH, WORDS = 16, 32, 128


def make_step(batch, loss="words"):
    """Return a step of two matmuls and a loss over words, or one that squares them, and its arguments."""

    def loss_of(params, batch):
        logits = jnp.tanh(batch["hidden"] @ params["first"]) @ params["head"]
        if loss == "squares":
            return jnp.mean((logits - batch["wanted"]) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1))

    def step(params, batch):
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "first": jax.random.normal(keys[0], (WIDTH, WIDTH)),
        "head": jax.random.normal(keys[1], (WIDTH, WORDS)) * 0.3,
    }
    data = {"hidden": jax.random.normal(keys[2], (batch, LENGTH, WIDTH))}
    if loss == "squares":
        data["wanted"] = jax.random.normal(keys[3], (batch, LENGTH, WORDS))
    else:
        data["labels"] = jax.random.randint(keys[4], (batch, LENGTH), 0, WORDS)
    return step, (params, data)


def constrained(planned, args, shape):
    """Return the specs that matmuls' results of a shape are brought to, of those that are brought to two in turn."""
    eqns = c.open_jaxpr(planned.trace(*args).jaxpr).eqns
    makers = {v: e for e in eqns for v in e.outvars}
    found = []
    for last in eqns:
        first = makers.get(last.invars[0]) if last.primitive.name == "sharding_constraint" else None
        if first is not None and first.primitive is last.primitive and last.outvars[0].aval.shape == shape:
            made = makers.get(first.invars[0])
            if made is not None and made.primitive.name in ("dot_general", "transpose"):
                found.append((first.params["sharding"].spec, last.params["sharding"].spec))
    return found


def sharded(step, strategy="zero3"):
    return memopt.optimize(step, passes=[Shard(mesh_of(strategy), strategy, least_elements=64)], verify=False)


@pytest.mark.parametrize("strategy", ["zero3", "zero2"])
def test_the_gradient_of_the_head_is_added_up_whole_where_tokens_are_many(strategy):
    step, args = make_step(batch=32)
    ((whole, stored),) = constrained(sharded(step, strategy), args, (WIDTH, WORDS))
    assert not any(whole) and any(stored)


def test_features_stay_split_while_it_is_added_up():
    step, args = make_step(batch=32)
    ((whole, stored),) = constrained(sharded(step, "zero3+tensor"), args, (WIDTH, WORDS))
    assert "model" in str(whole) and "data" not in str(whole) and "data" in str(stored)


@pytest.mark.parametrize("batch, loss", [(8, "words"), (32, "squares")])
def test_few_tokens_or_a_gradient_of_two_arrays_leave_it_to_xla(batch, loss):
    step, args = make_step(batch, loss)
    assert constrained(sharded(step), args, (WIDTH, WORDS)) == []


def test_other_weights_are_left_to_xla():
    step, args = make_step(batch=32)
    assert constrained(sharded(step), args, (WIDTH, WIDTH)) == []


def test_results_are_those_of_one_device():
    step, args = make_step(batch=32)
    ours, loss = sharded(step)(*args)
    theirs, plain = jax.jit(step)(*args)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("batch", [8, 32])
def test_what_is_added_up_is_predicted_to_be_in_memory(batch):
    """Each device's sum of the head's gradient is as large as the weight, which its argument is one part of."""
    step, args = make_step(batch)
    planned = sharded(step)
    program = planned._core.planned(*args)
    jaxpr = planned.trace(*args).jaxpr
    found = simulate(jaxpr, donated=program.donated, target="tpu:v5e:2x2", local=program.local)
    gradient = next(e for e in c.open_jaxpr(jaxpr).eqns if is_gradient(e))
    index = c.open_jaxpr(jaxpr).eqns.index(gradient)
    assert any(live.bytes == 4 * WIDTH * WORDS and "dot_general" in live.name for live in found.alive(index))


def is_gradient(eqn):
    return eqn.primitive.name == "dot_general" and sorted(eqn.outvars[0].aval.shape) == [WIDTH, WORDS]
