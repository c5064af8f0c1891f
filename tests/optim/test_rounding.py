"""Weights in few bits: rounding is right on average, and updates below the spacing are not lost.

In come weights and small updates, out go the weights after many of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memopt.optim import int8_apply_updates, int8_decode, int8_weights, stochastic_rounding
from memopt.optim._rounding import round_to_bfloat16


def test_rounding_is_unbiased_and_goes_to_neighbours():
    for value in (1.001, -3.1415926, 1e-30, 65000.3):
        rounded = np.asarray(round_to_bfloat16(jnp.full(20_000, value), jax.random.key(0)).astype(jnp.float32))
        assert len(np.unique(rounded)) == 2
        spacing = np.ptp(rounded)
        assert rounded.min() < np.float32(value) < rounded.max()
        assert abs(rounded.mean(dtype=np.float64) - value) < 4 * spacing / 20_000**0.5


def test_what_is_exact_or_not_finite_stays():
    values = jnp.array([1.0, -0.5, 0.0, jnp.inf, -jnp.inf, jnp.nan, 3.0])
    rounded = round_to_bfloat16(values, jax.random.key(1)).astype(jnp.float32)
    np.testing.assert_array_equal(rounded, values)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("rounds", [True, False], ids=["stochastic", "nearest"])
def test_small_updates_move_bfloat16_weights(rounds):
    optimizer = optax.chain(optax.scale(-1.0), *([stochastic_rounding()] if rounds else []))
    params = {"w": jnp.full(4096, 1.0, jnp.bfloat16), "f": jnp.full(8, 1.0)}
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(100):
        params, state = step(params, state)
    moved = float(params["w"].astype(jnp.float32).mean())
    assert abs(moved - 0.99) < 5e-4 if rounds else moved == 1.0
    np.testing.assert_allclose(params["f"], 0.99, rtol=1e-5)


def test_stochastic_rounding_asks_for_parameters():
    optimizer = stochastic_rounding()
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)))


def test_int8_weights_move_on_average():
    weights = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jnp.zeros(64)}
    stored = int8_weights(weights, block=64)
    assert stored["kernel"].codes.dtype == jnp.uint8 and stored["bias"].dtype == jnp.float32
    start = int8_decode(stored)["kernel"]
    assert float(jnp.max(jnp.abs(start - weights["kernel"]))) < 0.02
    apply = jax.jit(int8_apply_updates)
    for count in range(50):
        updates = {"kernel": jnp.full((64, 64), -1e-3), "bias": jnp.full(64, -1e-3)}
        stored = apply(stored, updates, jax.random.key(count))
    moved = int8_decode(stored)["kernel"] - start
    assert abs(float(moved.mean()) + 0.05) < 0.005
    np.testing.assert_allclose(int8_decode(stored)["bias"], -0.05, rtol=1e-4)
