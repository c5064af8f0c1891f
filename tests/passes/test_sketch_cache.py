"""Cached norms: gradients stay right in expectation whatever the cache holds, and are less noisy where it is right."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import _compat as c
from memopt.passes import CompressState, LowRankState, Remat, Sketch
from memopt.passes import _sketch_norms as ledger

BATCH, TOKENS, WIDTH, DEPTH, SAMPLES, DRAWS = 16, 8, 16, 2, 40, 150
CACHED = Sketch("wta", 0.25, samples=SAMPLES, ids="[3]")


def layer(h, w):
    return jnp.sin(h @ w)


def scanned(ws, x, y):
    h = jax.lax.scan(lambda h, w: (layer(h, w), None), x * jnp.sin(x), ws)[0]
    return jnp.sum(jnp.sum(h**2, (1, 2)) * y)


def unrolled(ws, x, y):
    h = functools.reduce(layer, list(ws), x * jnp.sin(x))
    return jnp.sum(jnp.sum(h**2, (1, 2)) * y)


def step_of(model):
    def step(ws, x, y, ids):
        loss, grads = jax.value_and_grad(model)(ws, x, y)
        return ws, loss, grads

    return step


def arguments():
    """Weights, tokens, weights of samples that differ a lot, and the samples' numbers."""
    rng = np.random.default_rng(0)
    ws, x = rng.standard_normal((DEPTH, WIDTH, WIDTH)) / 4, rng.standard_normal((BATCH, TOKENS, WIDTH))
    y, ids = np.exp(2 * rng.standard_normal(BATCH)), rng.permutation(SAMPLES)[:BATCH]
    return tuple(jnp.asarray(a, jnp.float32) for a in (ws, x, y)) + (jnp.asarray(ids, jnp.int32),)


@functools.cache
def optimized(model):
    """The step, its state before the first call and after it, and the exact results."""
    args = arguments()
    step = memopt.optimize(step_of(model), passes=[CACHED], verify=False)
    cold = step.compress(args[0], *args)
    return step, cold, step(cold, *args[1:])[0], jax.jit(step_of(model))(*args)


def with_norms(state, change):
    return dataclasses.replace(state, sketch_norms={k: change(v) for k, v in state.sketch_norms.items()})


def errors(model, state):
    """Errors of the gradients of so many steps from one cache, by layer."""
    step, _, _, exact = optimized(model)
    found = []
    for i in range(DRAWS):
        _, loss, grads = step(dataclasses.replace(state, sketch_count=jnp.uint32(i)), *arguments()[1:])
        found.append(np.asarray(grads, np.float64) - np.asarray(exact[2], np.float64))
    np.testing.assert_array_equal(loss, exact[1])
    return np.moveaxis(np.asarray(found), 1, 0)


@pytest.mark.parametrize("model", [scanned, unrolled])
def test_the_mean_is_exact_with_any_cache_and_a_right_one_lowers_the_noise(model):
    _, cold, right, _ = optimized(model)
    wrong = with_norms(right, lambda v: jnp.where(v > 0, 1 / jnp.maximum(v, 1e-9), v))
    hostile = with_norms(right, lambda v: jnp.where(v > jnp.mean(v, -1, keepdims=True), 0.0, v))
    noise = {}
    for name, state in {"cold": cold, "right": right, "wrong": wrong, "hostile": hostile}.items():
        found = errors(model, state)
        variance = np.sum(found**2, axis=(1, 2, 3)) / DRAWS
        assert np.all(np.linalg.norm(found.mean(1), axis=(1, 2)) <= 3 * np.sqrt(variance / DRAWS)), name
        noise[name] = variance
    assert np.all(noise["right"] < 0.4 * noise["cold"]) and np.all(noise["wrong"] > noise["cold"])


@functools.cache
def matrices():
    """Rows whose gradients differ a lot, by sample; the norms of samples."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((BATCH, TOKENS, 6)), rng.standard_normal((BATCH, TOKENS, 5)) + 0.5
    y *= np.exp(1.5 * rng.standard_normal((BATCH, 1, 1)))
    return x.astype(np.float32), y.astype(np.float32), np.sqrt(np.sum(y**2, (1, 2))).astype(np.float32)


@functools.cache
def drawn(right):
    """Gradients from so many samples by right norms, or by rows' own alone, and how they were drawn."""
    x, y, norms = matrices()
    rows = CACHED.rows(x.shape, x.dtype, (0, 1), 0, 1)

    def one(seed):
        kept, index = rows.kept(x, norms if right else jnp.zeros(BATCH), jax.random.key_data(jax.random.key(seed)))
        return kept.T @ rows.picked(y, (0, 1), index)

    return np.asarray(jax.vmap(one)(jnp.arange(2000)), np.float64), rows


def formula(right, rows):
    """The paper's variance (section 3) for chances that go by both norms, a tenth of them by the rows' own."""
    x, y, norms = (a.astype(np.float64) for a in matrices())
    x, y, norms = x.reshape(-1, 6), y.reshape(-1, 5), np.repeat(norms, TOKENS)
    own = np.linalg.norm(x, axis=1)
    chance = own / own.sum()
    if right:
        chance = 0.9 * own * norms / np.sum(own * norms) + 0.1 * chance
    order = np.argsort(-chance)
    before = np.concatenate([[0], np.cumsum(chance[order])])[: rows.rank]
    kept = int(np.argmin((1 - before) / (rows.rank - np.arange(rows.rank))))
    rest = order[kept:]
    squares = np.sum(x[rest] ** 2, 1) * np.sum(y[rest] ** 2, 1)
    drawn = (1 - before[kept]) * np.sum(squares / chance[rest]) - np.sum((x[rest].T @ y[rest]) ** 2)
    return drawn / (rows.rank - kept)


@pytest.mark.parametrize("right", [True, False])
def test_the_variance_is_the_papers(right):
    found, rows = drawn(right)
    x, y, _ = matrices()
    squares = np.sum((found - np.einsum("bti,bto->io", x, y)) ** 2, axis=(1, 2))
    within = 3 * squares.std() / np.sqrt(len(squares)) + 1e-3 * squares.mean()
    assert abs(squares.mean() - formula(right, rows)) <= within
    assert formula(True, rows) < 0.5 * formula(False, rows)


def test_no_row_that_matters_has_no_chance():
    x, _, norms = matrices()
    rows = CACHED.rows(x.shape, x.dtype, (0, 1), 0, 1)
    own = rows.norms(x)
    for cached in (norms, 0 * norms, np.where(np.arange(BATCH) == 3, norms, 0).astype(np.float32)):
        chances = np.asarray(rows.chances(x, cached))
        assert np.all(chances >= 0.099 * own / own.sum())


def test_norms_are_read_and_written_by_number():
    numbers = jnp.array([2, 0, -1, 9], jnp.int32)
    norms = jnp.array([[4.0, 1.0, ledger.UNSEEN], [jnp.nan, 1.0, 3.0]], jnp.float32)
    np.testing.assert_array_equal(ledger.read(norms, numbers), [[4, 4, 4, 4], [3, 3, 3, 3]])
    np.testing.assert_array_equal(ledger.read(ledger.fresh(3, None), numbers), np.ones(4))
    written = ledger.written(norms, numbers, jnp.full((2, 4), 25.0))
    np.testing.assert_array_equal(written, [[5, 1, 5], [5, 1, 5]])


@pytest.mark.parametrize("model", [scanned, unrolled])
def test_the_state_holds_the_norms_of_the_samples_that_were_seen(model):
    step, cold, after, exact = optimized(model)
    _, x, y, ids = arguments()
    assert all(np.all(v == ledger.UNSEEN) for v in cold.sketch_norms.values()) and after.sketch_count == 1
    layers = [np.asarray(v).reshape(-1, SAMPLES) for v in after.sketch_norms.values()]
    found = np.concatenate(layers)
    assert found.shape == (DEPTH, SAMPLES)
    seen = np.isin(np.arange(SAMPLES), ids)
    assert np.all(found[:, ~seen] == ledger.UNSEEN)
    ws = arguments()[0]

    def last(z, h):
        return jnp.sum(jnp.sum(jnp.sin(h + z) ** 2, (1, 2)) * y)

    h = functools.reduce(layer, list(ws[:-1]), x * jnp.sin(x)) @ ws[-1]
    want = np.sqrt(np.sum(np.asarray(jax.grad(last)(jnp.zeros_like(h), h)) ** 2, (1, 2)))
    np.testing.assert_allclose(found[-1][ids], want, 1e-4)
    np.testing.assert_array_equal(step.decompress(after), ws)


def test_a_state_is_a_plain_pytree_and_a_second_call_compiles_nothing():
    args = arguments()

    def train(ws, x, y, ids):
        loss, grads = jax.value_and_grad(scanned)(ws, x, y)
        return ws - 1e-4 * grads, loss

    step = memopt.optimize(train, passes=[CACHED, Remat()], donate_argnums=0)
    state = step.compress(args[0], *args)
    leaves, tree = jax.tree_util.tree_flatten(pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state))))
    state = jax.tree_util.tree_unflatten(tree, map(jnp.asarray, leaves))
    state, first = step(state, *args[1:])
    with _no_compilation():
        state, second = step(state, *args[1:])
    assert second < first and state.sketch_count == 2
    assert step.compress(state, state, *args[1:]) is state
    again, _ = step(jax.tree.map(jnp.array, state), *args[1:])
    same, _ = step(state, *args[1:])
    jax.tree.map(np.testing.assert_array_equal, again, same)


class _no_compilation:
    """Fails where something is compiled inside."""

    def __enter__(self):
        self.count = 0
        self.listen = lambda name, *_, **__: setattr(self, "count", self.count + ("backend_compile" in name))
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self.listen)
        assert not self.count


def test_rows_go_through_the_loops_and_their_value_does_not():
    step, cold, _, _ = optimized(scanned)
    eqns = c.open_jaxpr(step.trace(cold, *arguments()[1:]).jaxpr).eqns
    first, second = (e for e in eqns if e.primitive.name == "scan")
    stacks = {(v.aval.dtype.name, v.aval.size) for v in first.outvars if not isinstance(v, c.DropVar)}
    rank = BATCH * TOKENS // 4
    assert {("float32", DEPTH * rank * WIDTH), ("int32", DEPTH * rank)} <= stacks
    whole = [v for v in first.outvars if v.aval.shape == (DEPTH, BATCH, TOKENS, WIDTH) and v in second.invars]
    assert len(whole) == 1  # the derivative of the sine alone
    dots = [e for e in c.open_jaxpr(second.params["jaxpr"]).eqns if e.primitive.name == "dot_general"]
    assert any(e.invars[0].aval.shape == (rank, WIDTH) for e in dots)


def test_what_norms_cannot_be_kept_of_is_said_and_sketched_without():
    def accumulated(ws, x, y, ids):  # both passes in one loop
        def one(total, part):
            return total + jax.grad(unrolled)(ws, *part), None

        parts = (x.reshape(2, BATCH // 2, TOKENS, WIDTH), y.reshape(2, BATCH // 2))
        return ws, jax.lax.scan(one, jnp.zeros_like(ws), parts)[0]

    def two(ws, x, y, ids):  # one of two towers has other rows
        z = jnp.concatenate([x, x[:5]])

        def loss(w, v):
            return scanned(w, x, y) + unrolled(v, z, jnp.ones(len(z)))

        return ws, jax.grad(loss, argnums=(0, 1))(ws, ws)

    args = arguments()
    step = memopt.optimize(accumulated, passes=[CACHED], verify=False)
    with pytest.raises(ValueError, match="reads it back itself"):
        step.compress(args[0], *args)
    step = memopt.optimize(two, passes=[dataclasses.replace(CACHED, always=True)], verify=False)
    state = step.compress(args[0], *args)
    plan = step.plan(state, *args[1:])
    assert len(state.sketch_norms) == 1 and len(plan.stores) == DEPTH and set(plan.stores.values()) == {"wta"}
    assert any("as long as the batch of 16 samples" in note for note in plan.notes)


def test_mistakes_are_told():
    args = arguments()
    for wrong in (dict(kind="rmm", samples=4), dict(kind="wta", ids="*"), dict(kind="wta", samples=-1)):
        with pytest.raises(ValueError, match="which is above 0"):
            Sketch(**wrong)
    step = optimized(scanned)[0]
    with pytest.raises(ValueError, match=r"call step.compress\(state, \*args\)"):
        step.compress(args[0])
    with pytest.raises(TypeError, match="once before the loop"):
        step(*args)
    other = memopt.optimize(step_of(scanned), passes=[dataclasses.replace(CACHED, ids="*samples*")])
    with pytest.raises(ValueError, match=r"matches none of \[3\]"):
        other.compress(args[0], *args)
    lost = memopt.optimize(lambda ws, x, y, ids: jax.grad(scanned)(ws, x, y)[0], passes=[CACHED])
    with pytest.raises(ValueError, match="returns no new value"):
        lost(lost.compress(args[0], *args), *args[1:])


def test_places_in_the_batch_number_samples_where_no_argument_does():
    def step(ws, x, y):
        loss, grads = jax.value_and_grad(scanned)(ws, x, y)
        return ws - 0 * grads, loss

    args = arguments()[:3]
    planned = memopt.optimize(step, passes=[Sketch("wta", 0.25, samples=BATCH)], verify=False)
    state, _ = planned(planned.compress(args[0], *args), *args[1:])
    (norms,) = state.sketch_norms.values()
    assert norms.shape == (DEPTH, BATCH) and np.all(norms > 0)


def test_plans_that_repeat_draw_the_same_rows():
    args = arguments()
    step = memopt.optimize(step_of(scanned), passes=[CACHED, Remat()], budget="200%", verify=False)
    state = step.compress(args[0], *args)
    rungs = step.trace(state, *args[1:])._program.ladder.rungs[1:]
    leaves = jax.tree.leaves((state, *args[1:]))
    first, *others = (jax.jit(c.as_function(rung.closed))(*leaves) for rung in rungs)
    assert others and any(rung.choice.repeats for rung in rungs)
    for other in others:
        for one, two in zip(first, other, strict=True):
            np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-4 * np.abs(one).max())


@pytest.mark.loose_promotion
def test_other_forms_of_the_state_stand_beside_norms():
    optimizer = optax.sgd(1e-4, momentum=0.9)

    def train(ws, moments, x, y, ids):
        loss, grads = jax.value_and_grad(scanned)(ws, x, y)
        updates, moments = optimizer.update(grads, moments, ws)
        return optax.apply_updates(ws, updates), moments, loss

    ws, *data = arguments()
    cached = dataclasses.replace(CACHED, ids="[4]")
    for other, drawn in (
        (LowRankState(4, where="*.trace*"), True),
        (CompressState("int8", where="*sketch_norms*", min_size=1), False),
    ):
        step = memopt.optimize(train, passes=[other, cached], verify=False)
        moments = optimizer.init(ws)
        state = step.compress(moments, ws, moments, *data)
        plan = step.plan(ws, state, *data)
        assert any(d.choice == "wta" for d in plan.decisions) == drawn
        assert any("in a form of its own" in note for note in plan.notes) != drawn
        _, state, _ = step(ws, state, *data)
        assert step.decompress(state)[0].trace.shape == ws.shape
