"""Projections that forward and backward attention read: by names of their own, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from memopt import _apart, _inline
from memopt import _compat as c


def attention(weights, x):
    qkv = x @ weights + 0.1
    q, k, v = (part.reshape(2, 8, 2, 4) for part in jnp.split(qkv, 3, axis=-1))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.sum(jnp.einsum("bhqk,bkhd->bqhd", weights, v) ** 2)


ARGS = jnp.linspace(-1.0, 1.0, 8 * 24).reshape(8, 24), jnp.linspace(0.0, 1.0, 2 * 8 * 8).reshape(2, 8, 8)


def flat(function):
    return _inline.inline(jax.make_jaxpr(function)(*ARGS))


def barriers(closed):
    return [eqn for eqn in c.open_jaxpr(closed).eqns if eqn.primitive.name == "optimization_barrier"]


def test_backward_matmuls_read_one_projection_behind_one_barrier():
    closed = flat(jax.grad(attention))
    found = _apart.apart(closed)
    (barrier,) = barriers(found)
    assert barrier.outvars[0].aval.shape == (2, 8, 24)
    made = [eqn for eqn in c.open_jaxpr(found).eqns if eqn.primitive.name == "add" and barrier.invars[0] in eqn.outvars]
    assert made
    for ours, plain in zip(jaxpr_as_fun(found)(*ARGS), jaxpr_as_fun(closed)(*ARGS), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
    "bias", [lambda y: 1.0 + y, lambda y: y + jnp.ones((2, 8, 24)), lambda y: jnp.ones((2, 8, 24)) + y]
)
def test_a_bias_may_stand_on_either_side(bias):
    def step(weights, x):
        q = bias(x @ weights).reshape(2, 8, 2, 12)
        return jnp.sum(jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q, q)))

    closed = flat(jax.grad(step))
    found = _apart.apart(closed)
    assert len(barriers(found)) == 1
    for ours, plain in zip(jaxpr_as_fun(found)(*ARGS), jaxpr_as_fun(closed)(*ARGS), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_forward_passes_and_other_operands_are_left():
    assert _apart.apart(closed := flat(attention)) is closed

    def turned(weights, x):
        return attention(weights, jnp.sin(x))  # the projection alone is read behind a barrier, x is not

    assert len(barriers(_apart.apart(flat(jax.grad(turned))))) == 1

    def rotated(weights, x):
        q = jnp.sin(x @ weights).reshape(2, 8, 6, 4)
        return jnp.sum(jnp.einsum("bqhd,bkhd->bhqk", q, q) ** 2)

    assert _apart.apart(closed := flat(jax.grad(rotated))) is closed
