"""MeZO against its published algorithm in NumPy: directions from seeds, moments from slopes, masks and blocks.

In comes a small loss, out go parameters after a few steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memopt.optim import mezo
from memopt.optim._leaves import describe
from memopt.optim._mezo import direction

TARGET = np.float32([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def loss(params, scale=1.0):
    """Return a quadratic with its minimum at TARGET and zero."""
    return scale * (jnp.sum((params["w"] - TARGET) ** 2) + jnp.sum(params["b"] ** 2))


def start():
    """Return fresh parameters."""
    return {"b": jnp.ones(4), "w": jnp.zeros((2, 3))}


def directions(params, count, seed=0):
    """Return this step's direction of every leaf."""
    leaves, _, treedef = describe(params)
    return treedef.unflatten([np.asarray(direction(leaf, seed, count), np.float64) for leaf in leaves])


def average(rate, parts):
    """Average the newest first, by an exponential window with its bias corrected."""
    return sum((1 - rate) * rate**k * part for k, part in enumerate(parts)) / (1 - rate ** len(parts))


def reference(params, steps, rate, method="sgd", history=16, eps=1e-3, b1=0.9, b2=0.999):
    """Malladi et al. 2023, algorithm 1, with moments replayed over a window."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    slopes = []
    for count in range(steps):
        z = directions(params, count)
        values = [float(loss(jax.tree.map(lambda p, d, s=s: p + s * eps * d, params, z))) for s in (1, -1)]
        slopes.insert(0, (values[0] - values[1]) / (2 * eps))
        window = slopes[:history] if method != "sgd" else slopes[:1]
        past = [jax.tree.map(lambda d, s=s: s * d, directions(params, count - k)) for k, s in enumerate(window)]
        if method == "sgd":
            step = past[0]
        else:
            step = jax.tree.map(lambda *parts: average(b1, parts), *past)
        if method == "adam":
            nu = jax.tree.map(lambda *parts: average(b2, [part**2 for part in parts]), *past)
            step = jax.tree.map(lambda m, v: m / (np.sqrt(v) + 1e-8), step, nu)
        params = jax.tree.map(lambda p, d: p - rate * d, params, step)
    return params


@pytest.mark.parametrize("method", ["sgd", "momentum", "adam"])
def test_steps_are_the_published_ones(method):
    step = mezo(loss, 0.01, method=method, history=3)
    run, state = jax.jit(step), step.init(start())
    for _ in range(5):
        state, value = run(state)
    expected = reference(start(), 5, 0.01, method, history=3)
    assert int(state.count) == 5 and float(value) > 0 and run._cache_size() == 1
    for name in expected:
        np.testing.assert_allclose(state.params[name], expected[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_converges(method):
    step = mezo(loss, optax.linear_schedule(0.03, 0.0, 400), method=method)

    def body(state, scale):
        return step(state, scale)

    state, values = jax.jit(lambda state: jax.lax.scan(body, state, jnp.ones(400)))(step.init(start()))
    assert float(values[-20:].mean()) < 0.1 * float(values[0])


def test_a_sparse_mask_keeps_the_large_elements():
    params = {"b": jnp.array([0.1, 5.0, -0.2, -6.0]), "w": jnp.asarray(TARGET)}
    step = mezo(loss, 0.01, sparsity=0.5)
    state = step.init(params)
    state, _ = jax.jit(step)(state)
    moved = np.asarray(state.params["b"] != params["b"])
    np.testing.assert_allclose(state.params["b"][jnp.array([1, 3])], [5.0, -6.0])
    assert moved[[0, 2]].all()


def test_one_block_moves_at_a_time():
    step = mezo(loss, 0.01, blocks=2)
    first, _ = jax.jit(step)(step.init(start()))
    second, _ = jax.jit(step)(first)
    assert not np.allclose(first.params["b"], 1.0) and np.allclose(first.params["w"], 0.0)
    assert np.allclose(first.params["b"], second.params["b"]) and not np.allclose(second.params["w"], 0.0)


def test_bfloat16_stays_and_the_parameters_are_updated_in_place():
    params = {"w": jnp.zeros((256, 256), jnp.bfloat16), "v": jnp.zeros((256, 256), jnp.bfloat16)}
    step = mezo(
        lambda params: jnp.mean(params["w"].astype(jnp.float32) ** 2) + jnp.mean(params["v"].astype(jnp.float32) ** 2),
        0.01,
    )
    state = jax.eval_shape(step.init, params)
    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
    after = jax.eval_shape(step, state)[0]
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * 2 * 256 * 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sgdm"}, "method='sgdm' is unknown"),
        ({"history": 0}, "history=0 is too small"),
        ({"blocks": 0}, "blocks=0 is too small"),
        ({"sparsity": 1.0}, "sparsity=1.0 is no share"),
        ({"epsilon": 0.0}, "epsilon=0.0 is too small"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        mezo(loss, 0.1, **settings)
