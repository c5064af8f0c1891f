"""A fraction of the tokens: products of which some rows are sent and the others made again, with the same results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt import _cost, _inline, _pairs, _prune, _specs
from memopt._contract import Context
from memopt._target import Target
from memopt.passes import Offload, Remat, _offload_rows, _row_cuts
from tests.eager import evaluate

LAYERS, BATCH, LENGTH, WIDTH, HEADS = 3, 2, 24, 16, 2
CONTEXT = Context(Target.parse("tpu:v5e:1x1"))


def norm(x):
    return (x - jnp.mean(x, axis=-1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-6)


def layer(x, w):
    """Causal attention and a gated MLP, each behind a norm."""
    q, k, v = jnp.split((norm(x) @ w["qkv"]).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ w["out"]
    up, gate = norm(x) @ w["up"], jax.nn.silu(norm(x) @ w["gate"])
    return x + (up * gate) @ w["down"]


def moments(x, w):
    """Running sums over the tokens stand between two products: the rows of the second are no rows of the first."""
    return x + jnp.tanh(jnp.cumsum(jnp.sin(x @ w["up"]), axis=1)) @ w["down"]


def weights():
    random = np.random.default_rng(0)
    shapes = {"qkv": 3 * WIDTH, "out": WIDTH, "up": 2 * WIDTH, "gate": 2 * WIDTH}
    made = {name: random.standard_normal((LAYERS, WIDTH, size)) for name, size in shapes.items()}
    made["down"] = random.standard_normal((LAYERS, 2 * WIDTH, WIDTH))
    return {name: jnp.asarray(0.3 * value, jnp.float32) for name, value in made.items()}


X = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32)


def scanned(one):
    return lambda w, x: jnp.mean(jax.lax.scan(lambda x, w: (one(x, w), None), x, w)[0] ** 2)


def unrolled(one):
    def loss(w, x):
        x = jnp.take(x, jnp.arange(LENGTH), axis=1)  # as an embedding: no argument in another form
        for i in range(LAYERS):
            x = one(x, jax.tree.map(lambda leaf, i=i: leaf[i], w))
        return jnp.mean(x**2)

    return loss


def flat(loss):
    return _prune.prune(_inline.inline(jax.make_jaxpr(jax.value_and_grad(loss))(weights(), X)))[0]


def cut(closed, fraction):
    found = _offload_rows.Rows(fraction, least_bytes=1024).rewrite(closed, CONTEXT)
    base, _ = c.dce(found.closed)
    new = c.close(base, c.jaxpr_consts(found.closed))
    c.check(new)
    return new, found


def stacks(closed):
    """Return the types that a forward loop hands to the backward one, one trip of each."""
    base = c.open_jaxpr(closed)
    pair = next(pair for i in range(len(base.eqns)) if (pair := _pairs.find(base, i)))
    loop = _pairs.Loop(base.eqns[pair.index])
    return [loop.ys[i].aval.shape[1:] for i in pair.residuals]


@pytest.mark.parametrize("fraction", [0.5, 0.25])
@pytest.mark.parametrize("form", [scanned, unrolled])
@pytest.mark.parametrize("one", [layer, moments])
def test_results_stay_and_repeated_products_are_those_of_the_other_rows(one, form, fraction):
    closed = flat(form(one))
    new, found = cut(closed, fraction)
    (row,) = found.rows
    assert f"{round(fraction * LENGTH)} of {LENGTH} rows (axis 1)" in row.reason
    half, _ = cut(closed, 0.5)
    added = memopt.matmul_flops(new) - memopt.matmul_flops(closed)
    assert 0 < added == (1 - fraction) / 0.5 * (memopt.matmul_flops(half) - memopt.matmul_flops(closed))
    leaves = jax.tree.leaves((weights(), X))
    for ours, theirs in zip(evaluate(new, *leaves), evaluate(closed, *leaves), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6 * float(np.abs(theirs).max()))


def test_the_forward_loop_hands_on_first_rows_of_products_and_the_rest_is_never_kept():
    closed = flat(scanned(layer))
    new, _ = cut(closed, 0.25)
    before, after = stacks(closed), stacks(new)
    whole = {(BATCH, LENGTH, 2 * WIDTH), (BATCH, HEADS, LENGTH, LENGTH)}
    assert whole <= set(before) and whole.isdisjoint(after)
    assert {(BATCH, LENGTH // 4, 2 * WIDTH), (BATCH, HEADS, LENGTH // 4, LENGTH)} <= set(after)
    assert sum(map(np.prod, after)) < 0.5 * sum(map(np.prod, before))


def test_rows_are_not_made_again_from_the_rows_of_layers_before():
    """Sums of two branches stay whole: of each layer the products before its two last ones are made again, once."""
    closed = flat(unrolled(layer))
    new, _ = cut(closed, 0.5)
    dense = 2 * BATCH * LENGTH * WIDTH * (3 + 2 + 2) * WIDTH  # qkv, up and gate
    attention = 2 * 2 * BATCH * LENGTH * LENGTH * WIDTH
    assert memopt.matmul_flops(new) - memopt.matmul_flops(closed) == 0.5 * LAYERS * (dense + attention)


def test_what_is_made_again_waits_for_a_gradient():
    """Else XLA would make it in the forward pass at once, and keep it."""
    base = c.open_jaxpr(cut(flat(unrolled(layer)), 0.5)[0])
    maker = {v: eqn for eqn in base.eqns for v in eqn.outvars}

    @functools.cache
    def behind(var):
        """Say whether a barrier that a gradient passes as well stands before a variable."""
        eqn = maker.get(var)
        if eqn is None:
            return False  # an argument
        read = [v for v in eqn.invars if not isinstance(v, c.Literal)]
        if eqn.primitive.name == "optimization_barrier":
            return any(c.is_transposed(c.transforms(maker[v])) for v in read if v in maker)
        return any(map(behind, read))

    again = [
        eqn for eqn in base.eqns if eqn.primitive.name == "dot_general" and LENGTH // 2 in eqn.outvars[0].aval.shape
    ]
    assert len(again) >= 3 * LAYERS
    assert all(behind(eqn.invars[0]) for eqn in again)


def test_a_value_that_no_row_rule_knows_is_handed_on_whole():
    (row,) = cut(flat(scanned(moments)), 0.5)[1].rows
    new, _ = cut(flat(scanned(moments)), 0.5)
    assert (BATCH, LENGTH, 2 * WIDTH) in stacks(new)  # running sums, or what they are made of
    assert "of 1 products" in row.reason


def by_hand(closed):
    """Return MEMO's fraction: what the link sends while a layer is computed, less what goes whole, of the products."""
    trial = _offload_rows.Rows(0.5, least_bytes=1024)
    base = c.open_jaxpr(closed)
    pair = next(pair for i in range(len(base.eqns)) if (pair := _pairs.find(base, i)))
    found = _offload_rows._InLoops(trial, base, pair, count=LENGTH // 2)
    spec = _specs.spec_for(CONTEXT.target)
    seconds = sum(_cost.eqn_seconds(eqn, spec) for eqn in c.open_jaxpr(base.eqns[pair.index].params["jaxpr"]).eqns)
    products = sum(_cost.aval_bytes(v.aval) for v in found.heads)
    whole = sum(_cost.aval_bytes(v.aval) for v in found.whole())
    return (seconds, whole, products), spec


@pytest.mark.parametrize("wanted", [0.0, 0.25, 0.75, 1.0])
def test_auto_sends_what_the_link_sends_while_a_layer_is_computed(wanted, monkeypatch):
    closed = flat(scanned(layer))
    (seconds, whole, products), spec = by_hand(closed)
    link = (whole + wanted * products) / seconds * (1.0 if wanted < 1.0 else 1.1) * (1.0 if wanted else 0.9)
    slower = dataclasses.replace(spec, host_bytes_per_second=link)
    monkeypatch.setattr(_offload_rows._specs, "spec_for", lambda target: slower)
    found = _offload_rows.Rows("auto", least_bytes=1024).rewrite(closed, CONTEXT)
    if wanted in (0.0, 1.0):
        assert not found.rows and ("no row" if wanted == 0.0 else "every row") in found.left[0].why
    else:
        assert f"{round(wanted * LENGTH)} of {LENGTH} rows" in found.rows[0].reason


def perceptron(x, w):
    return x + jnp.sin(x @ w["up"]) @ w["down"]


def test_plans_send_first_rows_and_come_back_from_a_file():
    def step(w, x):
        return jax.grad(scanned(perceptron))(w, x)

    x = jnp.tile(X, (4, 1, 1))
    options = dict(target="cpu", passes=[Offload(fraction=0.5, least_bytes=1024)], verify=False)
    points = memopt.optimize(step, budget="100%", **options).frontier(weights(), x)
    budget = min(point.peak_bytes for point in points if point.recompute_flops > 0)
    planned = memopt.optimize(step, budget=budget, **options)
    plan = planned.plan(weights(), x)
    assert plan.rewrites == ("offload-rows",) and plan.recompute_flops > 0
    sent = [d for d in plan.decisions if d.choice == "host"]
    assert any("slice" in d.name for d in sent) and all(d.stored_bytes == 0 for d in sent)
    again = memopt.optimize(step, plan=memopt.Plan.from_json(plan.to_json()), **options)
    for ours, theirs in zip(
        jax.tree.leaves((planned(weights(), x), again(weights(), x))),
        jax.tree.leaves((step(weights(), x),) * 2),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_repeats_are_chosen_beside_it():
    def step(w, x):
        return jax.grad(scanned(perceptron))(w, x)

    passes = [Remat(), Offload(fraction=0.5, least_bytes=1024)]
    points = memopt.optimize(step, budget="100%", target="cpu", passes=passes, verify=False).frontier(weights(), X)
    alone = memopt.optimize(step, budget="100%", target="cpu", passes=[Remat()], verify=False).frontier(weights(), X)
    assert min(point.peak_bytes for point in points) <= min(point.peak_bytes for point in alone)


A, B, C = (jnp.asarray(np.random.default_rng(i).standard_normal((4, 6, 5)), jnp.float32) for i in range(3))
CASES = [
    (1, lambda a, b, m: jnp.where(a > 0, a * b, 1.0)),
    (1, lambda a, b, m: a + m[0][None, None]),
    (1, lambda a, b, m: jnp.sum(a, axis=-1)),
    (1, lambda a, b, m: jnp.argmax(a, axis=2)),
    (2, lambda a, b, m: jnp.max(a, axis=0)[None]),
    (0, lambda a, b, m: jnp.transpose(a, (1, 2, 0))),
    (1, lambda a, b, m: jnp.reshape(a, (4, 6, 5, 1))),
    (1, lambda a, b, m: jnp.broadcast_to(a[:, :, :1], (4, 6, 7))),
    (1, lambda a, b, m: jnp.einsum("btd,df->btf", a, m)),
    (2, lambda a, b, m: jnp.einsum("btd,bsd->bst", a, b)),
    (1, lambda a, b, m: jnp.einsum("btd,btf->btdf", a, b)),
    (1, lambda a, b, m: jnp.concatenate([a, b], axis=2)),
    (1, lambda a, b, m: jnp.split(a, [2], axis=2)[1]),
    (1, lambda a, b, m: a[:, :, 1:3]),
    (1, lambda a, b, m: jnp.pad(a, ((0, 0), (0, 0), (1, 2)))),
    (1, lambda a, b, m: jnp.flip(a, axis=2)),
    (1, lambda a, b, m: jnp.cumsum(a, axis=2)),
    (1, lambda a, b, m: jax.lax.broadcasted_iota(jnp.int32, (4, 6, 5), 2)),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_an_operation_on_some_rows_makes_those_rows(number):
    """Each equation of each case, for each axis of its result along which it can be cut."""
    _, function = CASES[number]
    m = C[0, :5]
    closed = _inline.inline(jax.make_jaxpr(function)(A, B, m))
    env = dict(zip(c.open_jaxpr(closed).invars, (A, B, m), strict=True))
    env.update(zip(c.open_jaxpr(closed).constvars, c.jaxpr_consts(closed), strict=True))
    checked = 0
    for eqn in c.open_jaxpr(closed).eqns:
        operands = [np.asarray(v.val, v.aval.dtype) if isinstance(v, c.Literal) else env[v] for v in eqn.invars]
        results = eqn.primitive.bind(*operands, **eqn.params)
        results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))
        for axis, size in enumerate(results[0].shape):
            rows = (size + 1) // 2
            found = _row_cuts.cut(eqn, axis, rows)
            if found is None or size < 2:
                continue
            pairs = zip(operands, found.operands, strict=True)
            few = [x if a is None else jax.lax.slice_in_dim(x, 0, rows, axis=a) for x, a in pairs]
            ours = eqn.primitive.bind(*few, **found.params)
            for mine, whole in zip(ours if eqn.primitive.multiple_results else [ours], results, strict=True):
                np.testing.assert_allclose(mine, jax.lax.slice_in_dim(whole, 0, rows, axis=axis), rtol=1e-5, atol=1e-6)
                checked += 1
    assert checked


@pytest.mark.parametrize(
    "function",
    [
        lambda a: jnp.sum(a, axis=1), lambda a: jnp.cumsum(a, axis=1), lambda a: jnp.flip(a, axis=1),
        lambda a: jnp.sort(a, axis=1), lambda a: a[:, 1:], lambda a: jnp.reshape(a, (24, 5)),
        lambda a: jnp.reshape(a, (6, 4, 5)),
    ],
)  # fmt: skip
def test_rows_that_depend_on_each_other_are_no_rows(function):
    """Of the middle axis; the first one may well be cut."""
    (eqn,) = [e for e in c.open_jaxpr(_inline.inline(jax.make_jaxpr(function)(A))).eqns][-1:]
    assert _row_cuts.axis_of(eqn, [1]) is None


def test_settings():
    for wrong in ("half", 0.0, 1.5):
        with pytest.raises(ValueError, match="fraction that goes to the host"):
            Offload(fraction=wrong)
    with pytest.raises(ValueError, match="leave only_marked out"):
        Offload(fraction=0.5, only_marked=True)
    assert [one.name for one in Offload(fraction="auto").parts()] == ["offload", "offload-rows"]
    assert Offload().parts() == (Offload(),)
