"""What JAX's removal of dead code leaves: loop state, operands of barriers, choices already made; results stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _compat as c
from memopt import _cost, _inline, _prune
from tests.eager import evaluate

X = jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)


def counted(closed, name):
    """Count the primitives of a name, in bodies too."""
    base = c.open_jaxpr(closed)
    inner = sum(counted(body, name) for eqn in base.eqns for _, _, body in c.subjaxprs(eqn.params))
    return inner + sum(eqn.primitive.name == name for eqn in base.eqns)


def loop(x):
    """One of three carries is read, and the condition reads another one."""

    def body(state):
        i, read, dead = state
        return i + 1, jnp.tanh(read @ x), dead + jnp.sin(read @ dead)

    return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x, x))[1]


def fed(x):
    """The carry that is read is made of the one that nothing reads after the loop."""
    return jax.lax.while_loop(
        lambda s: jnp.sum(s[0]) < 5.0, lambda s: (s[0] + s[1] ** 2 + 0.5, jnp.cos(s[1]), s[2] @ x), (x, x, x)
    )[0]


def barrier(x):
    return jax.lax.optimization_barrier((jnp.sin(x), x @ jnp.cos(x)))[0]


def chosen(x):
    return jnp.where(False, x @ jnp.sin(x), jnp.cos(x))


def chosen_inside(x):
    def body(carry, row):
        return carry + row, jnp.where(jnp.zeros((4,), bool), jnp.sin(row) @ x, jnp.tanh(row))

    return jax.lax.scan(body, x[0], x)


def condition_on_constants(x):
    limit = jnp.sum(jnp.cos(x))
    return jax.lax.while_loop(lambda s: s[0] < limit, lambda s: (s[0] + 1.0, s[1] @ x, jnp.tanh(s[2])), (0.0, x, x))[2]


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        (loop, ["sin"]),
        (fed, ["dot_general"]),
        (barrier, ["cos", "dot_general"]),
        (chosen, ["sin", "dot_general", "select_n"]),
        (chosen_inside, ["sin", "dot_general", "select_n"]),
        (condition_on_constants, ["dot_general"]),
    ],
)
def test_what_nothing_reads_goes_and_results_stay(function, gone):
    flat = _inline.inline(jax.make_jaxpr(function)(X))
    found, further = _prune.prune(flat)
    by_jax = c.close(c.dce(c.open_jaxpr(flat))[0], c.jaxpr_consts(flat))
    assert further == any(counted(by_jax, name) for name in gone)
    assert further or jax.__version_info__ >= (0, 11)  # which takes dead carries out of `while` by itself
    c.check(found)
    assert all(counted(flat, name) for name in gone)
    assert {name: counted(found, name) for name in gone} == dict.fromkeys(gone, 0)
    for ours, plain in zip(evaluate(found, X), evaluate(flat, X), strict=True):
        np.testing.assert_array_equal(ours, plain)


def tied(x):
    """What stands in a barrier for its order alone is read elsewhere, too."""
    first = jnp.sin(x)
    _, second = jax.lax.optimization_barrier((first, x))
    return first, second


def unknown(x):
    return jnp.where(x[0, 0] > 0, x @ x, jnp.cos(x))


@pytest.mark.parametrize("function", [tied, unknown])
def test_what_has_a_use_stays(function):
    flat = _inline.inline(jax.make_jaxpr(function)(X))
    found, further = _prune.prune(flat)
    assert not further
    for name in ("optimization_barrier", "select_n", "dot_general", "sin"):
        assert counted(found, name) == counted(flat, name)
    assert [len(eqn.invars) for eqn in c.open_jaxpr(found).eqns] == [len(eqn.invars) for eqn in c.open_jaxpr(flat).eqns]


def test_a_loop_with_an_effect_keeps_what_that_reads():
    def body(state):
        i, seen, dead = state
        jax.debug.print("{}", seen[0, 0])
        return i + 1, jnp.tanh(seen), dead @ dead

    flat = _inline.inline(jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x, x))[0])(X))
    found, _ = _prune.prune(flat)
    assert counted(found, "tanh") == 1 and _cost.matmul_flops(found) == 0.0 < _cost.matmul_flops(flat)
