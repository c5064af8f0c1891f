"""Tests of results that are finished before a backward loop: in come small training steps, out go equal ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from memopt import _compat as c
from memopt import _eager, _inline

DEPTH, WIDTH, ROWS, VOCABULARY = 3, 64, 128, 8192


def parameters():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"blocks": draw(DEPTH, WIDTH, WIDTH), "head": draw(WIDTH, VOCABULARY)}


def inputs():
    return jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, WIDTH)), jnp.float32)


def loss(weights, x):
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights["blocks"])[0]
    return jnp.mean(jax.nn.logsumexp(x @ weights["head"], axis=-1))


def updated(weights, x):
    value, grads = jax.value_and_grad(loss)(weights, x)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), value


def clipped(weights, x):
    grads = jax.grad(loss)(weights, x)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda w, g: w - 0.1 * g / (1 + norm), weights, grads)


def flat(fn):
    closed = _inline.inline(jax.make_jaxpr(fn)(parameters(), inputs()))
    return c.close(c.dce(closed)[0], c.jaxpr_consts(closed))


def names(closed):
    return [eqn.primitive.name for eqn in c.open_jaxpr(closed).eqns]


def run(closed):
    return c.as_function(closed)(*jax.tree.leaves((parameters(), inputs())))


@pytest.mark.parametrize("fn", [updated, clipped])
def test_results_are_equal(fn):
    closed = flat(fn)
    new = _eager.eager(closed)
    assert new is not closed
    c.check(new)
    for got, want in zip(run(new), run(closed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
    assert sorted(names(new)) == sorted([*names(closed), "optimization_barrier"])


def test_an_update_that_needs_no_loop_comes_before_it():
    new = c.open_jaxpr(_eager.eager(flat(updated)))
    at = [i for i, eqn in enumerate(new.eqns) if eqn.primitive.name == "scan"][-1]
    barrier = new.eqns[at - 1]
    assert barrier.primitive.name == "optimization_barrier"
    assert (WIDTH, VOCABULARY) in [v.aval.shape for v in barrier.outvars]
    assert set(barrier.outvars) & set(new.eqns[at].invars)
    assert set(barrier.outvars) & set(new.outvars)
    makers = {v: eqn.primitive.name for eqn in new.eqns for v in eqn.outvars}
    assert "sub" in [makers[v] for v in barrier.invars]


def test_a_loss_that_reads_logits_comes_before_the_loop():
    def cross_entropy(weights, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights["blocks"])[0]
        logits = x @ weights["head"]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0])

    closed = flat(jax.value_and_grad(cross_entropy))
    new = c.open_jaxpr(_eager.eager(closed))
    at = [i for i, eqn in enumerate(new.eqns) if eqn.primitive.name == "scan"][-1]
    assert new.outvars[0].aval.shape == () and new.outvars[0] in new.eqns[at - 1].outvars
    for got, want in zip(run(_eager.eager(closed)), run(closed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_a_gradient_that_waits_for_a_norm_is_still_made_before_the_loop():
    new = c.open_jaxpr(_eager.eager(flat(clipped)))
    at = [i for i, eqn in enumerate(new.eqns) if eqn.primitive.name == "scan"][-1]
    makers = {v: eqn.primitive.name for eqn in new.eqns for v in eqn.outvars}
    tied = [makers[v] for v in new.eqns[at - 1].invars if v.aval.size == WIDTH * VOCABULARY]
    assert tied == ["dot_general"]


def test_what_is_small_or_reads_no_other_loop_waits_for_nobody():
    def one_loop(weights, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights["blocks"])[0], weights["head"] * 2.0

    def small(weights, x):
        value, grads = jax.value_and_grad(lambda w: loss({**weights, "head": w[:, :256]}, x))(weights["head"])
        return value, jnp.sum(grads)

    for fn in (one_loop, small):
        closed = flat(fn)
        assert _eager.eager(closed) is closed


def test_effects_are_not_moved():
    def told(weights, x):
        new, value = updated(weights, x)
        jax.debug.print("{}", new["head"][0, 0])
        return {**new, "head": new["head"] + 1.0}, value

    closed = flat(told)
    order = [n for n in names(_eager.eager(closed)) if n in ("scan", "debug_print", "debug_callback")]
    assert order == [n for n in names(closed) if n in ("scan", "debug_print", "debug_callback")]


def test_what_an_effect_has_a_part_in_waits_for_its_turn():
    def told(weights, x):
        new, value = updated(weights, x)
        scale = io_callback(lambda: np.float32(2.0), jax.ShapeDtypeStruct((), jnp.float32))
        return {**new, "head": new["head"] * scale}, value

    new = c.open_jaxpr(_eager.eager(flat(told)))
    order = [eqn.primitive.name for eqn in new.eqns if eqn.primitive.name in ("scan", "io_callback")]
    assert order == ["scan", "scan", "io_callback"]
    makers = {v: eqn.primitive.name for eqn in new.eqns for v in eqn.outvars}
    assert [makers[v] for v in new.outvars if v.aval.size == WIDTH * VOCABULARY] == ["mul"]


def test_a_view_of_the_second_of_two_results_is_left():
    def ranked(weights, x):
        view = lax.top_k(x, 4)[1].reshape(-1)
        new, value = updated(weights, x)
        return new, value * view.astype(jnp.float32)

    closed = flat(ranked)
    new = _eager.eager(closed)
    c.check(new)
    for got, want in zip(run(new), run(closed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
