"""Lossless, Compress, Offload: what they offer, that results are exact or within their error, and what is compiled."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _apply, _bounds, _forms
from memopt import _compat as c
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes import Compress, Lossless, Offload, Remat, default
from tests import eager, forced

CPU = Target.parse("cpu")
ROWS, WIDTH, DEPTH = 512, 128, 4


def relu(h, w):
    return jax.nn.relu(h @ w) * 1.5


def clipped(h, w):
    return jnp.minimum(jnp.maximum(h @ w, 0.0), 6.0)


def dropped(h, w):
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, h.shape)
    return jnp.where(keep, jnp.sin(h @ w) / 0.9, 0.0)


def gelu(h, w):
    return h + jax.nn.gelu(h @ w)


def picked(h, w):
    """Gathers along an axis by the place of each row's largest value: an index whose range is known."""
    y = h @ w
    best = jnp.broadcast_to(jnp.argmax(y, axis=-1)[:, None], y.shape)
    return jnp.tanh(h + jnp.take_along_axis(y * jnp.sin(y), best, axis=-1))


def pooled(x, w):
    """A max-pooling of what a convolution makes; nothing else reads that later."""
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(jax.lax.reduce_window(y, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") ** 2)


def scanned(layer):
    return lambda ws, x: jnp.sum(jax.lax.scan(lambda h, w: (layer(h, w), None), x, ws)[0] ** 2)


def unrolled(layer):
    return lambda ws, x: jnp.sum(functools.reduce(layer, list(ws), x) ** 2)


def arguments():
    rng = np.random.default_rng(0)
    ws = rng.standard_normal((DEPTH, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return ws.astype(np.float32), rng.standard_normal((ROWS, WIDTH)).astype(np.float32)


def images():
    rng = np.random.default_rng(0)
    return rng.standard_normal((8, 16, 16, 16)).astype(np.float32), rng.standard_normal((3, 3, 16, 32)).astype(
        np.float32
    )


def trace(fn, args):
    return jax.make_jaxpr(jax.value_and_grad(fn))(*args)


def run(closed, args):
    return jax.jit(c.as_function(closed))(*args)


def stored(closed, one):
    """All of a pass's forms applied at once, as no price would; with their names."""
    survey = forced.survey_of(closed)
    proposals = [p for p in one.propose(survey) if hasattr(p, "encode") and not _forms.refusal(survey.graph, p)]
    stores = {p.value: p for p in proposals}
    new, _ = _apply.apply(survey.graph, {}, stores)
    c.check(new)
    return new, {p.name for p in stores.values()}, stores


def temporaries(closed, args):
    return jax.jit(c.as_function(closed)).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("layer", "form"), [(relu, "bits"), (clipped, "2-bit of 3 numbers"), (dropped, "bits"), (picked, "8-bit")]
)
@pytest.mark.parametrize("loop", [scanned, unrolled])
def test_lossless_forms_change_no_bit(layer, form, loop):
    closed = trace(loop(layer), arguments())
    new, names, _ = stored(closed, Lossless())
    assert form in names
    for want, got in zip(eager.evaluate(closed, *arguments()), eager.evaluate(new, *arguments()), strict=True):
        np.testing.assert_array_equal(got, want)
    loss, gradient = zip(run(closed, arguments()), run(new, arguments()), strict=True)
    np.testing.assert_allclose(*loss, rtol=1e-5)  # XLA may sum a loss in another order when its neighbours change
    np.testing.assert_allclose(*gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient[0]).max())


@pytest.mark.parametrize("kind", ["normal", "equal", "nan"])
def test_a_pooling_gradient_needs_bits_alone(kind):
    x, w = images()
    if kind == "equal":
        x = np.round(x)
        w = np.round(w)
    if kind == "nan":
        x[0, 3, 4, 5] = np.nan
    closed = jax.make_jaxpr(jax.grad(pooled, argnums=(0, 1)))(x, w)
    new, names, _ = stored(closed, Lossless())
    assert "pooled bits" in names
    for want, got in zip(run(closed, (x, w)), run(new, (x, w)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_pooled_value_that_something_else_reads_is_kept_for_it():
    def both(x, w):
        y = jnp.sin(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        out = jax.lax.reduce_window(y, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.sum(out**2) + jnp.sum(jnp.sin(y * y))

    closed = trace(both, images())
    new, names, _ = stored(closed, Lossless())
    for want, got in zip(run(closed, images()), run(new, images()), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layer", [relu, clipped])
def test_lossless_compiles_to_less(layer):
    closed = trace(scanned(layer), arguments())
    ladder = make_ladder(closed, donated=[False] * 2, target=CPU, passes=[Lossless()])
    assert ladder.rungs[-1].choice.stores
    peaks = [rung.predicted_peak_bytes for rung in ladder.rungs]
    assert peaks[-1] < peaks[0]
    assert temporaries(ladder.rungs[-1].closed, arguments()) < temporaries(closed, arguments())


def test_the_default_passes_are_exact():
    assert all(p.name in ("remat", "lossless", "Kernels") for p in default())


@pytest.mark.parametrize("codec", ["int8", "int4-asymmetric-stochastic", "fp8-e4m3"])
@pytest.mark.parametrize("loop", [scanned, unrolled])
def test_compress_leaves_the_loss_as_it_is(codec, loop):
    closed = trace(loop(gelu), arguments())
    new, names, _ = stored(closed, Compress(codec))
    assert names == {codec}
    want, got = run(closed, arguments()), run(new, arguments())
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    error = np.linalg.norm(got[1] - want[1]) / np.linalg.norm(want[1])
    assert 1e-6 < error < {"int8": 0.01, "fp8-e4m3": 0.05}.get(codec, 0.2)


def test_a_stack_is_stored_encoded_and_no_copy_survives():
    closed = trace(scanned(gelu), arguments())
    ladder = make_ladder(closed, donated=[False] * 2, target=CPU, passes=[Compress("int8")])
    last = ladder.rungs[-1]
    loops = [eqn for eqn in c.open_jaxpr(last.closed).eqns if eqn.primitive.name == "scan"]
    stacks = [v.aval for v in loops[0].outvars if not isinstance(v, c.DropVar) and v.aval.shape[:1] == (DEPTH,)]
    full = [a for a in stacks if a.dtype == np.float32 and a.size >= DEPTH * ROWS * WIDTH]
    assert any(a.dtype == np.uint8 for a in stacks) and not full
    assert temporaries(last.closed, arguments()) < 0.75 * temporaries(closed, arguments())


def test_compress_takes_what_where_names():
    def layer(h, w):
        with jax.named_scope("first"):
            h = jnp.sin(h @ w)
        with jax.named_scope("second"):
            return jnp.sin(h @ w)

    survey = forced.survey_of(trace(unrolled(layer), arguments()))
    every, some = (list(p.propose(survey)) for p in (Compress(), Compress(where="*first*")))
    assert 0 < len(some) < len(every)
    with pytest.raises(ValueError, match="matches no module path"):
        list(Compress(where="third").propose(survey))
    with pytest.raises(ValueError, match="the smallest is 0.0714"):
        Compress("int4", error=1e-3)
    assert Compress(("int8", "int4"), error=0.01).codecs == Compress("int8").codecs


def test_always_keeps_in_the_codec_whatever_a_plan_keeps():
    closed = trace(scanned(gelu), arguments())
    ladder = make_ladder(closed, donated=[False] * 2, target=CPU, passes=[Remat(), Compress("int8", always=True)])
    assert len(ladder.rungs) > 1
    for rung in ladder.rungs[1:]:
        first = next(e for e in c.open_jaxpr(rung.closed).eqns if e.primitive.name == "scan")
        stacks = [v.aval for v in first.outvars if not isinstance(v, c.DropVar) and v.aval.shape[:1] == (DEPTH,)]
        assert not [a for a in stacks if a.dtype == np.float32 and a.size >= DEPTH * ROWS * WIDTH]
        assert all(store.name == "int8" for store in rung.choice.stores.values())
    with pytest.raises(ValueError, match="not in several"):
        Compress(("int8", "int4"), always=True)


def test_integers_and_forward_values_are_left_alone():
    survey = forced.survey_of(trace(scanned(picked), arguments()))
    stored_dtypes = {survey.graph.values[p.value].aval.dtype for p in Compress().propose(survey)}
    assert stored_dtypes == {np.dtype("float32")}


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("loop", [scanned, unrolled])
def test_offload_changes_no_bit(fraction, loop):
    closed = trace(loop(gelu), arguments())
    new, names, stores = stored(closed, Offload(least_bytes=1 << 12, fraction=fraction))
    assert names == {"host"} and all(s.error == 0.0 for s in stores.values())
    for want, got in zip(run(closed, arguments()), run(new, arguments()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    puts = [eqn for eqn in everything(new) if eqn.primitive.name == "device_put"]
    assert len(puts) >= 2


@pytest.mark.parametrize("loop", [scanned, unrolled])
def test_a_transfer_costs_what_the_forward_pass_does_not_hide(loop):
    survey = forced.survey_of(trace(loop(gelu), arguments()))
    link = survey.spec.host_bytes_per_second
    whole = {p.value: p.seconds for p in Offload(least_bytes=1 << 12, hidden=0).propose(survey)}
    found = {p.value: p.seconds for p in Offload(least_bytes=1 << 12).propose(survey)}
    assert found.keys() == whole.keys()
    regions = collections.defaultdict(list)
    for value in found:
        regions[survey.graph.values[value].region].append(value)
    marks = _forms.Marks(survey.graph)
    for region, values in regions.items():
        sent = sum(survey.bytes_of_value(v) for v in values) / link
        ops = [op for op in survey.graph.regions[region].ops if not marks.is_backward(op)]
        computed = sum(survey.seconds[op.id] for op in ops)
        assert len(ops) < len(survey.graph.ops)
        for v in values:
            np.testing.assert_allclose(found[v], whole[v] * max(0, 1 - computed / sent), rtol=1e-6)
    assert any(0 < found[v] < whole[v] for v in found)


def test_what_the_forward_pass_hides_in_full_costs_nothing():
    def layer(h, w):  # much arithmetic on few bytes
        return jnp.tanh(functools.reduce(lambda y, _: y @ w, range(64), h))

    survey = forced.survey_of(trace(scanned(layer), arguments()))
    survey.spec = dataclasses.replace(survey.spec, host_bytes_per_second=survey.spec.memory_bytes_per_second)
    found = list(Offload(least_bytes=1 << 12).propose(survey))
    assert found and min(p.seconds for p in found) == 0


def everything(closed):
    for eqn in c.open_jaxpr(closed).eqns:
        yield eqn
        for _, _, body in c.subjaxprs(eqn.params):
            yield from everything(body)


def test_settings_that_make_no_sense_are_refused():
    for make in (
        lambda: Offload(fraction=0.0),
        lambda: Offload(fraction=1.5),
        lambda: Offload(hidden=2.0),
        lambda: Offload(hidden="all"),
    ):
        with pytest.raises(ValueError, match="not"):
            make()
    with pytest.raises(ValueError, match="no codec"):
        Compress("int9")
    for one in (Compress("int8", where="a"), Offload(where="a"), Lossless()):
        assert hash(one) == hash(dataclasses.replace(one))


def test_bounds_hold_for_what_is_made():
    def made(x):
        i = jax.lax.iota(jnp.int32, 100)
        k = jnp.argmax(x, axis=0)
        few = jnp.where(x > 0, jnp.float32(0.5), jnp.float32(-1.0)) * jnp.where(x > 1, jnp.float32(2), jnp.float32(0))
        return (
            i,
            i * 3 - 7,
            jax.lax.rem(i, np.int32(10)),
            k,
            k + 1000,
            jnp.clip(k, 3, 5),
            few,
            i * i * i * i * i * i,
            (x > 0).astype(jnp.int8),
        )

    x = np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)
    graph = forced.survey_of(jax.make_jaxpr(made)(x)).graph
    bounds = _bounds.Bounds(graph)
    known = [bounds.of(v) for v in graph.top.outs]
    intervals = [(k.low, k.high) if k and k.low is not None else None for k in known]
    want = [(0, 99), (-7, 290), (0, 9), (0, 99), (1000, 1099), (3, 5), None, None, (0, 1)]
    assert intervals == want
    assert len(known[6].numbers) == 4  # 0, -0, 1, -2
    for k, got in zip(known, made(x), strict=True):
        if k is not None and k.low is not None:
            assert k.low <= np.min(got) and np.max(got) <= k.high


def headed(ws, x, head, targets):
    """A scanned model with a matmul and a cross-entropy after the loop: logits are read again at once."""
    h = jax.lax.scan(lambda h, w: (gelu(h, w), None), x, ws)[0]
    logits = h @ head
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1, keepdims=True) - picked)


def test_what_gradients_need_at_once_is_left_alone():
    head = np.zeros((WIDTH, 512), np.float32)
    targets = np.zeros(ROWS, np.int32)
    survey = forced.survey_of(trace(headed, (*arguments(), head, targets)))
    shapes = {survey.graph.values[p.value].aval.shape for p in Compress().propose(survey)}
    assert (ROWS, WIDTH) in shapes and (ROWS, 512) not in shapes


def test_updates_and_cast_parameters_are_left_alone():
    def step(w, m, x):
        half, gradient = jax.value_and_grad(lambda w: jnp.sum(gelu(x, w.astype(jnp.bfloat16)) ** 2))(w)
        m = 0.9 * m + gradient
        return half, w - 0.1 * m / (jnp.sqrt(m * m) + 1e-8), m

    w, x = jnp.zeros((256, 256)), jnp.zeros((ROWS, 256), jnp.bfloat16)
    survey = forced.survey_of(jax.make_jaxpr(step)(w, w, x))
    shapes = {survey.graph.values[p.value].aval.shape for p in Compress().propose(survey)}
    assert shapes <= {(ROWS, 256)}


def attention(h, w):
    q = (h @ w).reshape(4, ROWS // 4, WIDTH)
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, jnp.sin(q)))
    return h + jnp.einsum("bqk,bkd->bqd", weights, q).reshape(h.shape)


def test_scores_share_a_scale_by_rows():
    survey = forced.survey_of(trace(scanned(attention), arguments()))
    forms = {survey.graph.values[p.value].aval.shape: p.encode.__self__.name for p in Compress().propose(survey)}
    assert forms[4, ROWS // 4, ROWS // 4] == "int8-token"
    assert forms[ROWS, WIDTH] == "int8-down"


@pytest.mark.parametrize(("keys", "times"), [(ROWS, 2), (WIDTH // 2, 1)])  # scores larger than queries, or not
def test_a_value_is_read_back_again_rather_than_held_beside_what_is_larger(keys, times):
    def layer(h, w):
        scores = (h @ w) @ jnp.sin(h[:keys]).T
        return h + jnp.exp(scores) @ h[:keys] / ROWS

    closed = trace(scanned(layer), arguments())
    survey = forced.survey_of(closed)
    forward = next(r for r in survey.graph.regions if r.trips > 1)
    queries = next(op for op in forward.ops if op.eqn.primitive.name == "dot_general").outputs[0]
    scores = {op.id for op in forward.ops if op.eqn.outvars[0].aval.shape == (ROWS, keys)}
    repeats = {p: frozenset(scores & set(ops)) for p, ops in forced.repeatable(survey).items()}
    store = next(p for p in Compress().propose(survey) if p.value == queries)
    found = {}
    for again in (None, store.again_seconds):
        decodings = {}
        stores = {queries: dataclasses.replace(store, again_seconds=again)}
        new, _ = _apply.apply(survey.graph, repeats, stores, decodings=decodings)
        c.check(new)
        found[again] = decodings[queries], eager.evaluate(new, *arguments())
    assert (found[None][0], found[store.again_seconds][0]) == (1, times)
    guarded = [v.aval for eqn in everything(new) if eqn.primitive.name == "optimization_barrier" for v in eqn.invars]
    scales = [aval for aval in guarded if aval.shape == store.encode(jnp.ones((ROWS, WIDTH))).scales[0].shape]
    assert len(scales) == times - 1 and not [aval for aval in guarded if aval.dtype == np.uint8]  # slices of the stack
    for want, got in zip(found[None][1], found[store.again_seconds][1], strict=True):
        np.testing.assert_array_equal(got, want)


def normed(h, w):
    y = h @ w
    y = (y - jnp.mean(y, axis=-1, keepdims=True)) * jax.lax.rsqrt(jnp.var(y, axis=-1, keepdims=True) + 1e-5)
    return h + y * jnp.exp(y) / jnp.broadcast_to(jnp.sum(jnp.exp(y), axis=-1, keepdims=True), y.shape)


def test_pooled_values_are_no_statistics():
    def loss(x, ws):
        def layer(h, w):
            y = jnp.sin(jax.lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
            small = jax.lax.reduce_window(y, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            return h + jnp.repeat(jnp.repeat(jnp.sin(small), 2, axis=1), 2, axis=2), None

        return jnp.sum(jax.lax.scan(layer, x, ws)[0])

    closed = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((8, 16, 16, 16)), jnp.zeros((3, 3, 3, 16, 16)))
    survey = forced.survey_of(closed)
    assert (8, 8, 8, 16) in {survey.graph.values[p.value].aval.shape for p in Compress().propose(survey)}


def test_statistics_of_rows_are_left_alone():
    survey = forced.survey_of(trace(scanned(normed), arguments()))
    proposals = list(Compress("int2").propose(survey))
    names = {survey.graph.values[p.value].op.eqn.primitive.name for p in proposals if survey.graph.values[p.value].op}
    shapes = {survey.graph.values[p.value].aval.shape for p in proposals}
    assert shapes == {(ROWS, WIDTH)} and "broadcast_in_dim" not in names and names
    new, _, _ = stored(trace(scanned(normed), arguments()), Compress("int2"))
    assert np.isfinite(run(new, arguments())[1]).all()
