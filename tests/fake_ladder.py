"""A planner's stand-in for tests of the decorator: in comes any step, out come two rungs, and checks of what ran.

The one rung is the step as written, too large for every budget; the other holds a barrier over the inputs, so that a
test sees which of them ran. Test modules import the fixture `ladder` to put it in the planner's place.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from memopt import _program
from memopt._optimize import optimize

BUDGET = "1GiB"


class Ladder:
    """The plain step, too large for any budget, and the step with barriers."""

    def __init__(self, closed):
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in closed.in_avals]
        fn = jaxpr_as_fun(closed)
        guarded = jax.make_jaxpr(lambda *xs: fn(*(jax.lax.optimization_barrier(list(xs)) if xs else xs)))
        rewritten = guarded(*avals)
        self.rungs, self.spares = [rung(closed, 2**40, 0.0), rung(rewritten, 1, 8.0)], []

    def rung(self, index):
        return self.rungs[index]

    def choose(self, budget_bytes, measured):
        peaks = [measured.get(i, r.predicted_peak_bytes) for i, r in enumerate(self.rungs)]
        return next((i for i, peak in enumerate(peaks) if peak <= budget_bytes), None)

    def plan(self, index, *, budget_bytes):
        return SimpleNamespace(index=index, budget_bytes=budget_bytes)


def rung(closed, peak_bytes, flops):
    return SimpleNamespace(
        jaxpr=lambda: closed,
        predicted_peak_bytes=peak_bytes,
        packed_peak_bytes=peak_bytes,
        recompute_flops=flops,
        seconds=flops / 4,
    )


@pytest.fixture(autouse=True)
def ladder(monkeypatch):
    monkeypatch.setattr(_program, "make_ladder", lambda closed, donated, settings, **_: Ladder(closed))


def count_eqns(jaxpr, name):
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total += eqn.primitive.name == name
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    total += count_eqns(inner, name)
    return total


def is_rewritten(step, *args, **kwargs):
    return count_eqns(step.trace(*args, **kwargs).jaxpr, "optimization_barrier") > 0


def assert_same(ours, plain):
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        assert getattr(one, "weak_type", False) == getattr(two, "weak_type", False)  # keys have none
        assert one.sharding.is_equivalent_to(two.sharding, one.ndim)
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        np.testing.assert_allclose(one, two, rtol=1e-6)


def check(fn, *args, calls=2, **options):
    """Run a step twice, optimized and plain, each from its own copies of the arguments."""
    step, plain = optimize(fn, budget=BUDGET, **options), jax.jit(fn, **options)
    for _ in range(calls):
        assert_same(step(*copied(args)), plain(*copied(args)))
    assert is_rewritten(step, *args)
    return step


def copied(tree):
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def sgd(w, x):
    loss, grad = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
    return w - 0.1 * grad, loss


W, X = jnp.full((8, 8), 0.1, jnp.float32), jnp.arange(32.0).reshape(4, 8) / 32
