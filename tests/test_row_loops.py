"""Tests of loops taken apart for one layer: in come small loops over stacks, out go their results row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _compat as c
from memopt import _inline, _row_loops

LAYERS = 4
NEW = jnp.arange(24.0).reshape(LAYERS, 2, 3)
OLD = -jnp.ones((LAYERS, 2, 3))


def loop_of(function, *args):
    """Return the last loop of a function's jaxpr, the makers of its variables, and what is read."""
    jaxpr = c.open_jaxpr(_inline.inline(jax.make_jaxpr(function)(*args)))
    jaxpr = c.dce(jaxpr)[0]
    eqn = [e for e in jaxpr.eqns if e.primitive.name in ("scan", "while")][-1]
    read = {v for e in jaxpr.eqns for v in e.invars if not isinstance(v, c.Literal)} | set(jaxpr.outvars)
    return jaxpr, eqn, {v: e for e in jaxpr.eqns for v in e.outvars}, read


def row_of(function, *args):
    """Return the jaxpr, its last loop, and what that is for one layer, the first argument being a stack."""
    jaxpr, eqn, makers, read = loop_of(function, *args)
    dependent = [v is jaxpr.invars[0] for v in eqn.invars]
    return jaxpr, eqn, _row_loops.row(eqn, dependent, LAYERS, makers, read.__contains__)


def row_by_row(function, *args):
    """Return what a function that is one loop gives, made one layer at a time."""
    jaxpr, eqn, (stacked, row) = row_of(function, *args)
    before = c.rebuild(jaxpr, eqns=jaxpr.eqns[:-1], outvars=[v for v in eqn.invars if not isinstance(v, c.Literal)])
    values = iter(c.as_function(c.close(before))(*args))
    operands = [v.val if isinstance(v, c.Literal) else next(values) for v in eqn.invars]
    parts = []
    for layer in range(LAYERS):
        own = [value[layer] if s else value for value, s in zip(operands, stacked, strict=True)]
        outs = c.as_function(c.close(row.inner))(np.int32(layer), *own)
        parts.append([o for o, v in zip(outs, eqn.outvars, strict=True) if v in jaxpr.outvars])
    return [jnp.stack(values) for values in zip(*parts, strict=True)]


def ranged(first, last, *, low=0, high=LAYERS, read=lambda i: i, write=lambda i: i):
    """Return a loop that makes rows of one stack from rows of another and their numbers."""

    def function(new, old, factor):
        def one(i, old):
            row = jax.lax.dynamic_index_in_dim(new, read(i), keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(old, row * factor + i.astype(row.dtype), write(i), 0)

        bounds = jnp.maximum(first + factor.astype(int) * 0, low), jnp.minimum(last + factor.astype(int) * 0, high)
        return jax.lax.fori_loop(*(b.astype(np.int32) for b in bounds), one, old)

    return function


FACTOR = jnp.float32(2.0)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (1, 3), (2, 2), (3, 1), (-2, 9)])
def test_a_range_of_rows_is_rewritten_row_by_row(first, last):
    function = ranged(first, last)
    (got,) = row_by_row(function, NEW, OLD, FACTOR)
    np.testing.assert_array_equal(got, jax.jit(function)(NEW, OLD, FACTOR))


def test_a_map_over_rows_is_its_body():
    def function(new, old):
        return jax.lax.map(lambda pair: pair[0] @ pair[1].T, (new, old))

    (got,) = row_by_row(function, NEW, OLD)
    np.testing.assert_allclose(got, function(NEW, OLD))


def carried(new, old, factor):
    return jax.lax.scan(lambda carry, row: (carry * factor, row + carry), factor, new)[1] + old


def own_row(new, old, i):
    return jax.lax.dynamic_index_in_dim(new, i, keepdims=False)


def last_row(new, old, i):
    return jax.lax.dynamic_index_in_dim(old, jnp.maximum(i - 1, 0), keepdims=False)


def in_range(carry):
    return carry[0] < LAYERS


def counted(row=own_row, test=in_range, result=lambda i, old: old):
    """Return a loop over rows with its own row and test, and what is made of its last carry."""

    def function(new, old, factor):
        def one(carry):
            i, old = carry
            return i + 1, jax.lax.dynamic_update_index_in_dim(old, row(new, old, i) * factor, i, 0)

        return result(*jax.lax.while_loop(test, one, (jnp.int32(0), old)))

    return function


def test_a_loop_is_taken_apart_where_its_counter_is_not_read():
    assert row_of(counted(), NEW, OLD, FACTOR)[2] is not None


REFUSED = {
    "another row is read": ranged(0, 4, read=lambda i: i + 1),
    "another row is read once": ranged(0, 4, read=lambda i: jnp.where(i == 2, 0, i)),
    "another row is written": ranged(0, 2, write=lambda i: 2 * i),
    "it may start before the stack": ranged(0, 4, low=-1),
    "it may end after the stack": ranged(0, 4, high=LAYERS + 1),
    "the whole stack is read": counted(lambda new, old, i: jnp.sum(old, 0)),
    "a row that was written is read": counted(last_row),
    "rows are carried on": carried,
    "the counter is read": counted(result=lambda i, old: old + i.astype(old.dtype)),
    "its end depends on rows": counted(test=lambda carry: carry[1][0, 0, 0] < 0),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
@pytest.mark.loose_promotion
def test_rows_that_depend_on_each_other_are_refused(function):
    assert row_of(function, NEW, OLD, FACTOR)[2] is None


@pytest.mark.loose_promotion
def test_a_stack_that_is_shared_as_a_whole_is_refused_where_it_has_to_be_a_stack():
    def function(new, old):
        return jax.lax.map(lambda row: row + jnp.sum(new), old)

    assert row_of(function, NEW, OLD)[2] is None


def test_intervals():
    def function(x, y):
        one = jnp.minimum(jnp.maximum(x, 0), 4)
        two = jnp.where(x > y, one, 7)
        return one, two, jnp.maximum(x, 2), x + y, jax.lax.clamp(1, x, 3)

    jaxpr, *_ = c.dce(_inline.inline(jax.make_jaxpr(function)(1, 2)))
    makers = {v: e for e in jaxpr.eqns for v in e.outvars}
    found = [_row_loops.interval(v, makers) for v in jaxpr.outvars]
    assert found == [(0, 4), (0, 7), (2, np.inf), (-np.inf, np.inf), (1, 3)]
