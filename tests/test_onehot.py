"""Tests of scatters that become comparisons: in come gradients of gathers, out go equal ones without a scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from memopt import _compat as c
from memopt import _inline
from memopt._onehot import onehot


def flat(fn, *args):
    closed = _inline.inline(jax.make_jaxpr(fn)(*args))
    return c.close(c.dce(closed)[0], c.jaxpr_consts(closed))


def count(jaxpr, name="scatter-add"):
    eqns = c.open_jaxpr(jaxpr).eqns
    inner = sum(count(body, name) for e in eqns for _, _, body in c.subjaxprs(e.params))
    return inner + sum(e.primitive.name == name for e in eqns)


def take_last(x, labels):
    return jnp.take_along_axis(x, labels[..., None], axis=-1)[..., 0]


def take_first(x, labels):
    return jnp.take_along_axis(x, labels[None], axis=0)


def cross_entropy(x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def vmapped(x, labels):
    return jax.vmap(lambda row, label: row[label])(x.reshape(-1, x.shape[-1]), labels.reshape(-1))


CASES = [
    (take_last, (4, 6, 9), (4, 6)),
    (take_last, (7, 2), (7,)),
    (take_first, (5, 3), (3,)),
    (cross_entropy, (2, 5, 11), (2, 5)),
    (cross_entropy, (8, 3), (8,)),
    (vmapped, (2, 5, 7), (2, 5)),
]


@pytest.mark.loose_promotion  # optax mixes ranks
@pytest.mark.parametrize("beyond", [False, True], ids=["within", "out of bounds"])
@pytest.mark.parametrize(("fn", "shape", "labels"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_gradients_are_equal_to_the_last_bit(fn, shape, labels, beyond):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    size = max(shape)
    index = jnp.asarray(rng.integers(-2 * size if beyond else 0, 2 * size if beyond else min(shape), labels), jnp.int32)
    weights = jnp.asarray(rng.standard_normal(jax.eval_shape(fn, x, index).shape), jnp.float32)
    closed = flat(jax.grad(lambda x: jnp.sum(weights * fn(x, index))), x)
    new = onehot(closed)
    c.check(new)
    np.testing.assert_array_equal(c.as_function(new)(x)[0], c.as_function(closed)(x)[0])
    assert count(new) < count(closed)


def test_a_loss_in_a_loop_is_found():
    def loss(x, labels):
        step = lambda total, row: (total + jnp.sum(cross_entropy(*row)), None)  # noqa: E731
        return lax.scan(step, jnp.float32(0), (x, labels))[0]

    x, labels = jnp.ones((3, 4, 5)), jnp.ones((3, 4), jnp.int32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        closed = flat(jax.grad(loss), x, labels)
    new = onehot(closed)
    np.testing.assert_array_equal(c.as_function(new)(x, labels)[0], c.as_function(closed)(x, labels)[0])
    assert count(new) < count(closed)


def rows_twice(x, labels):
    return x[labels.reshape(-1)]  # an embedding: one row may be read many times


def two_of_a_row(x, labels):
    return jnp.take_along_axis(x, labels.reshape(x.shape[0], -1), axis=-1)


@pytest.mark.parametrize(("fn", "shape", "labels"), [(rows_twice, (5, 3), (8,)), (two_of_a_row, (4, 6), (4, 2))])
def test_what_may_add_twice_stays_a_scatter(fn, shape, labels):
    x, index = jnp.ones(shape), jnp.zeros(labels, jnp.int32)
    closed = flat(jax.grad(lambda x: jnp.sum(fn(x, index))), x)
    assert onehot(closed) is closed


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_indices_that_an_iota_of_their_dtype_could_not_follow_stay(dtype):
    numbers = lax.ScatterDimensionNumbers((), (0,), (0,))

    def fn(index, update):
        place = lambda z, i, u: lax.scatter_add(z, i[None], u, numbers)  # noqa: E731
        return jax.vmap(place)(jnp.zeros((4, 300)), index, update)

    index, update = jnp.asarray([0, 3, 44, 120], dtype), jnp.arange(1.0, 5.0)
    closed = flat(fn, index, update)
    assert onehot(closed) is closed
    wide = flat(fn, index.astype(jnp.int32), update)
    new = onehot(wide)
    assert new is not wide
    got, want = (c.as_function(one)(index.astype(jnp.int32), update)[0] for one in (new, wide))
    np.testing.assert_array_equal(got, want)


def test_a_scatter_into_other_values_stays():
    def fn(x, index):
        return x.at[jnp.arange(4), index].add(1.0)

    closed = flat(fn, jnp.ones((4, 3)), jnp.zeros(4, jnp.int32))
    assert onehot(closed) is closed
