"""Tests of transposes folded into matmuls: in come products in all forms, out go equal ones with fewer transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memopt import _compat as c
from memopt._transposes import fold


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def gradient(w, x):
    return jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w)


def batched(a, b):
    return jnp.einsum("bij,bkj->bki", a, b)


def two_free(a, b):
    return lax.transpose(lax.dot_general(a, b, (((1,), (0,)), ((), ()))), (2, 0, 1))


def twice(a, b):
    return (a @ b).T.T


def read_twice(a, b):
    product = a @ b
    return product.T, jnp.sum(product)


def precise(a, b):
    return lax.dot(a, b, precision=(lax.Precision.HIGHEST, lax.Precision.DEFAULT)).T


def in_a_loop(a, b):
    return lax.scan(lambda x, _: ((x @ b).T, None), a, length=3)[0]


def another_order(a, b):
    return jnp.transpose(jnp.einsum("ij,kjl->ikl", a, b), (0, 2, 1))


def returned(a, b):
    product = (a @ b).T
    return product, product.T


CASES = [
    (gradient, (5, 7), (3, 5), 0),
    (batched, (2, 3, 4), (2, 5, 4), 0),
    (two_free, (3, 4, 5), (4, 2), None),
    (twice, (3, 4), (4, 5), 0),
    (read_twice, (3, 4), (4, 5), 1),
    (precise, (3, 4), (4, 5), 0),
    (in_a_loop, (4, 4), (4, 4), 0),
    (another_order, (3, 4), (5, 4, 6), None),
    (returned, (3, 4), (4, 5), None),
]


def count(jaxpr):
    eqns = c.open_jaxpr(jaxpr).eqns
    inner = sum(count(body) for e in eqns for _, _, body in c.subjaxprs(e.params))
    return inner + sum(e.primitive.name == "transpose" for e in eqns)


@pytest.mark.parametrize(("fn", "left", "right", "transposes"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_results_are_equal(fn, left, right, transposes):
    args = draw(*left), draw(*right)
    closed = jax.make_jaxpr(fn)(*args)
    new = fold(closed)
    c.check(new)
    assert count(new) <= count(closed)
    assert transposes is None or count(new) == transposes
    for got, want in zip(c.as_function(new)(*args), c.as_function(closed)(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_has_no_transpose_stays():
    closed = jax.make_jaxpr(lambda a, b: a @ b)(draw(3, 4), draw(4, 5))
    assert fold(closed) is closed


def test_an_algorithm_with_two_sides_is_not_exchanged():
    algorithm = lax.DotAlgorithm(np.float32, np.float32, np.float32)
    closed = jax.make_jaxpr(lambda a, b: lax.dot(a, b, precision=algorithm).T)(draw(3, 4), draw(4, 5))
    assert fold(closed) is closed
