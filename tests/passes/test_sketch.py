"""Sketch: gradients are right in expectation, with the variance that is promised, and only those of weights differ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _apply, _forms
from memopt import _compat as c
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes import Sketch
from tests import forced

ROWS, FEATURES, OUT, DRAWS = 48, 6, 5, 2000


def operands():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((ROWS, FEATURES)), rng.standard_normal((ROWS, OUT)) + 0.5
    x *= np.exp(rng.standard_normal((ROWS, 1)))  # rows of unlike norms, as tokens have
    return x.astype(np.float32), y.astype(np.float32)


@functools.cache
def draws(kind, ratio=0.25):
    """The gradient `X.T @ Y` made from so many sketches, each from a seed of its own, and the form."""
    x, y = operands()
    form = Sketch(kind, ratio=ratio).form(x.shape, x.dtype, (0,))

    def one(seed):
        seeded = dataclasses.replace(form, seed=seed)
        return seeded.decode(seeded.encode(x)).T @ y

    return np.asarray(jax.vmap(one)(jnp.arange(DRAWS)), np.float64), form


def expected_variance(kind, form):
    x, y = (a.astype(np.float64) for a in operands())
    rows = np.sum(x**2, 1) * np.sum(y**2, 1)
    if kind != "wta":
        total = np.sum(x**2) * np.sum(y**2) + np.sum((x.T @ y) ** 2)
        return (total - (0 if kind == "rmm-gaussian" else 2 * np.sum(rows))) / form.rank
    norms = np.sqrt(np.sum(x**2, 1))
    order = np.argsort(-norms)
    chance = norms[order] / norms.sum()
    before = np.concatenate([[0], np.cumsum(chance)])[: form.rank]
    kept = int(np.argmin((1 - before) / (form.rank - np.arange(form.rank))))
    rest = order[kept:]
    outer = x[rest].T @ y[rest]
    return ((1 - before[kept]) * np.sum(rows[rest] / chance[kept:]) - np.sum(outer**2)) / (form.rank - kept)


@pytest.mark.parametrize("kind", ["rmm", "rmm-gaussian", "wta"])
def test_the_mean_is_the_exact_gradient_and_the_variance_the_formula(kind):
    found, form = draws(kind)
    x, y = operands()
    exact = x.T.astype(np.float64) @ y
    error = found - exact
    variance = np.sum(error**2, axis=(1, 2))
    assert np.linalg.norm(error.mean(0)) <= 3 * np.sqrt(variance.mean() / DRAWS)
    within = np.abs(error.mean(0)) <= 3 * error.std(0) / np.sqrt(DRAWS)
    assert within.mean() >= 0.96
    spread = 3 * variance.std() / np.sqrt(DRAWS)
    assert abs(variance.mean() - expected_variance(kind, form)) <= spread + 1e-3 * variance.mean()


def test_more_rows_mean_less_noise_and_large_rows_are_kept_as_they_are():
    x, y = operands()
    noise = [np.mean((draws("wta", ratio)[0] - x.T @ y) ** 2) for ratio in (0.15, 0.6)]
    assert noise == sorted(noise, reverse=True)
    x[7] *= 1000
    form = Sketch("wta", ratio=0.25).form(x.shape, x.dtype, (0,))
    rows, index = form.encode(x)
    assert index[0] == 7
    np.testing.assert_array_equal(rows[0], x[7])


@pytest.mark.parametrize("kind", ["rmm", "wta"])
@pytest.mark.parametrize(("shape", "axes"), [((3, 5, 8), (0, 2))])
def test_a_decoded_array_has_its_axes_where_they_were(kind, shape, axes):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    form = Sketch(kind, ratio=0.5).form(shape, x.dtype, axes)
    seeds = jnp.arange(2000)
    mean = jax.vmap(lambda s: (f := dataclasses.replace(form, seed=s)).decode(f.encode(x)))(seeds).mean(0)
    assert mean.shape == shape and np.corrcoef(np.ravel(mean), np.ravel(x))[0, 1] > 0.98


def layer(h, w):
    return jnp.sin(h @ w)


def scanned(ws, x):
    return jnp.sum(jax.lax.scan(lambda h, w: (layer(h, w), None), x, ws)[0] ** 2)


def unrolled(ws, x):
    return jnp.sum(functools.reduce(layer, list(ws), x) ** 2)


def arguments(depth=4, rows=256, width=64):
    rng = np.random.default_rng(0)
    ws = rng.standard_normal((depth, width, width)) / np.sqrt(width)
    return ws.astype(np.float32), rng.standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("kind", ["rmm", "wta"])
@pytest.mark.parametrize("model", [scanned, unrolled])
def test_only_gradients_of_weights_are_noisy(kind, model):
    closed = jax.make_jaxpr(jax.value_and_grad(model, argnums=(0, 1)))(*arguments())
    graph = (survey := forced.survey_of(closed)).graph
    stores = {s.value: s for s in Sketch(kind, 0.5).propose(survey) if not _forms.refusal(graph, s)}
    assert stores and all(len(s.readers) == 1 for s in stores.values())
    new, _ = _apply.apply(graph, {}, stores)
    c.check(new)
    want, got = (jax.jit(c.as_function(j))(*arguments()) for j in (closed, new))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5, atol=1e-6)
    error = np.linalg.norm(got[1] - want[1]) / np.linalg.norm(want[1])
    assert 0.05 < error < 3
    assert error != 0


def test_what_something_else_reads_is_left_alone():
    def both(ws, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (h * jnp.sin(h @ w), None), x, ws)[0] ** 2)

    survey = forced.survey_of(jax.make_jaxpr(jax.grad(both))(*arguments()))
    assert not list(Sketch().propose(survey))


def test_the_planner_takes_sketches_and_says_so():
    closed = jax.make_jaxpr(jax.grad(scanned))(*arguments(depth=8, rows=4096))
    ladder = make_ladder(closed, donated=[False] * 2, target=Target.parse("cpu"), passes=[Sketch("wta", 0.1)])
    assert any(s.name == "wta" for rung in ladder.rungs for s in rung.choice.stores.values())
    least = ladder.plan(len(ladder.rungs) - 1)
    assert any(d.choice == "wta" and "relative error" in d.reason for d in least.decisions)


def test_settings_that_make_no_sense_are_refused():
    for make in (lambda: Sketch("count"), lambda: Sketch(ratio=0.0), lambda: Sketch(ratio=1.0)):
        with pytest.raises(ValueError, match="not"):
            make()


def from_data(ws, x):
    """A loss whose first layer reads what no parameter changes."""
    return unrolled(ws, x * jnp.sin(x))


@pytest.mark.parametrize("kind", ["rmm", "wta"])
def test_every_update_brings_new_random_numbers_also_for_the_same_data(kind):
    ws, x = arguments(depth=3, rows=128, width=16)
    exact = jax.jit(jax.grad(from_data))
    grad = memopt.optimize(jax.grad(from_data), passes=[Sketch(kind, 0.25, always=True)], verify=False)
    assert len(grad.plan(ws, x).stores) == 3
    errors = []
    for _ in range(200):
        step = grad(ws, x)
        errors.append(np.asarray(step, np.float64) - exact(ws, x))
        ws = ws - 1e-6 * step
    np.testing.assert_array_equal(grad(ws, x), grad(ws, x))
    for layer in np.moveaxis(np.asarray(errors), 1, 0):
        mean, variance = np.linalg.norm(layer.mean(0)), np.sum(layer**2) / len(layer)
        assert variance > 0.01 and mean <= 3 * np.sqrt(variance / len(layer))


def test_a_hash_tells_numbers_of_16_bits_apart():
    values = jax.random.normal(jax.random.key(0), (20_000, 2, 4), jnp.bfloat16)
    form = Sketch().form((2, 4), values.dtype, (0,))
    hashes = np.asarray(jax.vmap(lambda x: form._hash(x, ()))(values))
    assert len(set(hashes.tolist())) >= 0.999 * len(hashes)


@pytest.mark.parametrize("kind", ["rmm", "wta"])
def test_always_keeps_a_sketch_without_a_budget_and_where_it_saves_nothing(kind):
    def stored(**settings):
        step = memopt.optimize(jax.grad(scanned), passes=[Sketch(kind, **settings)], target="cpu", verify=False)
        return step.plan(*arguments(rows=64)).stores

    assert not stored(ratio=0.9) and set(stored(ratio=0.9, always=True).values()) == {kind}


def test_values_that_are_split_over_devices_are_left_and_the_plan_says_so():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    ws, x = arguments()
    x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("d")))
    step = memopt.optimize(jax.grad(scanned), passes=[Sketch("wta", 0.5, always=True)], verify=False)
    plan = step.plan(ws, x)
    assert not plan.stores and any("split over devices" in note for note in plan.notes)
    np.testing.assert_allclose(step(ws, x), jax.grad(scanned)(ws, x), rtol=1e-4, atol=1e-5)
