"""The predicted timeline: named facts about lifetimes and heaps, and predictions against compiled programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import memopt
from memopt._timeline import simulate
from memopt._timeline_heap import Buffer, expected_heap_bytes, heap_bytes, live_bytes, without_fast_memory

NO_LIBRARY_KERNELS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def buffers(*spans):
    return [Buffer(size, start, end, end) for size, start, end in spans]


def test_a_buffer_goes_into_the_smallest_hole_that_holds_it():
    # 40 and 30 leave holes of their sizes below 10; 30 fits the second exactly, and 40 the first.
    found = buffers((40, 0, 2), (10, 0, 9), (30, 1, 3), (10, 1, 9), (30, 4, 9), (40, 5, 9))
    assert heap_bytes(found, share=0) == 90 == max(live_bytes(found, 9))


def test_a_hole_between_two_long_lived_buffers_counts():
    found = buffers((40, 0, 1), (10, 1, 9), (41, 2, 9))
    assert max(live_bytes(found, 9)) == 51
    assert heap_bytes(found, share=0) == 40 + 10 + 41


def test_of_what_one_kernel_makes_the_largest_is_placed_first():
    assert heap_bytes(buffers((10, 0, 9), (40, 0, 1), (41, 2, 9)), share=0) == 50 + 41


def test_the_expected_heap_is_the_mean_of_layouts_that_leave_a_hole_or_none():
    many = [(1000, 4 * i, 4 * i + 1) for i in range(50)]
    found = buffers(*many, (1010, 203, 260), (900, 100, 260))
    alive = max(live_bytes(found, 260))
    expected = expected_heap_bytes(found, 260)
    assert alive < expected < 2 * alive
    assert expected == expected_heap_bytes(found, 260)


def test_the_expected_heap_of_a_few_small_buffers_is_what_they_hold():
    assert expected_heap_bytes([], 5) == 0
    found = buffers((10, 0, 1), (20, 2, 3))
    assert expected_heap_bytes(found, 3, share=1) == max(live_bytes(found, 3)) == 20


def test_short_lived_buffers_stay_in_the_fast_memory():
    found = buffers((10, 0, 1), (10, 0, 400), (100, 0, 1))
    assert [b.end for b in without_fast_memory(found, 400, 40)] == [1, 400]


def test_donated_arguments_are_their_outputs():
    closed = jax.make_jaxpr(lambda w, x: w - x)(*[jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 2)
    plain, donated = (simulate(closed, donated=flags, target="tpu:v5e") for flags in ((False,), (True,)))
    assert plain.peak_bytes - donated.peak_bytes == donated.alias_bytes == 256 * 256 * 4


def scanned(dtype, layers=6, width=256, batch=2048):
    """Return a gradient step through scanned layers, and its shapes."""

    def step(w, x):
        def layer(x, w):
            return lax.tanh(lax.dot(x, w.astype(dtype))), None

        return jax.grad(lambda w: lax.scan(layer, x, w)[0].astype(jnp.float32).sum())(w)

    shapes = jax.ShapeDtypeStruct((layers, width, width), jnp.float32), jax.ShapeDtypeStruct((batch, width), dtype)
    return step, shapes


NARROW = pytest.mark.xfail(
    jax.__version_info__ >= (0, 11), reason="newer XLA:CPU keeps half precision in loops", strict=True
)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=NARROW)])
def test_a_scanned_step_is_predicted_on_the_cpu(dtype):
    step, shapes = scanned(dtype)
    compiled = memopt.measure(step, *shapes, target="cpu", compiler_options=NO_LIBRARY_KERNELS)
    found = simulate(jax.make_jaxpr(step)(*shapes), target="cpu")
    assert found.peak_bytes == pytest.approx(compiled.peak_bytes, rel=0.15)


@pytest.mark.parametrize("target, wide", [("cpu", True), ("tpu:v5e", False)])
def test_the_cpu_holds_stacks_in_half_precision_wide_while_a_loop_reads_them(target, wide):
    temporaries = []
    for dtype in (jnp.bfloat16, jnp.float32):
        step, shapes = scanned(dtype, width=1024, batch=16_384)
        temporaries.append(simulate(jax.make_jaxpr(step)(*shapes), target=target).temp_bytes)
    assert (temporaries[0] > 0.9 * temporaries[1]) == wide


def test_the_cpu_copies_operands_that_are_not_in_a_matmuls_layout():
    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32)

    def step(contracting):
        return lambda x: lax.dot_general(x, x, ((contracting, (0,)), ((), ())))

    plain, turned = (simulate(jax.make_jaxpr(step(c))(shape), target="cpu") for c in ((1,), (0,)))
    assert turned.temp_bytes - plain.temp_bytes == 512 * 512 * 4


@pytest.mark.tpu_aot
def test_a_scanned_step_is_predicted_on_a_tpu():
    step, shapes = scanned(jnp.bfloat16, width=1024, batch=16_384)
    compiled = memopt.measure(step, *shapes, target="tpu:v5e")
    found = simulate(jax.make_jaxpr(step)(*shapes), target="tpu:v5e")
    assert found.peak_bytes == pytest.approx(compiled.peak_bytes, rel=0.15)


def attention_backward(mask, known):
    """Softmax attention over 1,024 keys and its gradients, written out; `known` takes the rows' statistics as given."""

    def step(q, k, v, g, bias, top, total):  # divisions as a rematerialized step has them, one for each reader
        scores = jnp.einsum("bqd,bkd->bqk", q, k).astype(jnp.float32)
        if mask == "where":
            scores = jnp.where(jnp.tril(jnp.ones(bias.shape, bool)), scores, -1e30)
        elif mask == "add":
            scores = scores + bias.astype(jnp.float32)
        top = top if known else scores.max(-1, keepdims=True)
        exp = jnp.exp(scores - top)
        total = total if known else exp.sum(-1, keepdims=True)
        low = (exp / total).astype(q.dtype)
        g = g * jnp.einsum("bqk,bkd->bqd", low, v)
        dv = jnp.einsum("bqk,bqd->bkd", low, g)
        d_weights = jnp.einsum("bqd,bkd->bqk", g, v).astype(jnp.float32)
        d_scores = exp / total * (d_weights - (d_weights * (exp / total)).sum(-1, keepdims=True))
        d_scores = d_scores.astype(q.dtype)
        return jnp.einsum("bqk,bkd->bqd", d_scores, k), jnp.einsum("bqk,bqd->bkd", d_scores, q), dv

    x = jax.ShapeDtypeStruct((96, 1024, 64), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((96, 1024, 1), jnp.float32)
    return step, (x, x, x, x, jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16), row, row)


def attention_again(keeps, known, q, k, v, g):
    """Causal attention and its gradients, as a plan has it that runs the softmax again, and the scores unless kept."""

    def masked(scores):
        return jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores.astype(jnp.float32), -1e30)

    def softmax(scores, top=None, total=None):
        x = masked(scores)
        top = x.max(-1, keepdims=True) if top is None else top
        exp = jnp.exp(x - top)
        total = exp.sum(-1, keepdims=True) if total is None else total
        return exp / total, top, total

    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    weights, *statistics = softmax(scores)
    g = g * jnp.einsum("bqk,bkd->bqd", weights.astype(q.dtype), v)
    if keeps:
        scores, g = lax.optimization_barrier((scores, g))
    else:
        q, k, g = lax.optimization_barrier((q, k, g))
        scores = jnp.einsum("bqd,bkd->bqk", q, k)
    weights = softmax(scores, *(statistics if known else ()))[0]
    dv = jnp.einsum("bqk,bqd->bkd", weights.astype(q.dtype), g)
    d_weights = jnp.einsum("bqd,bkd->bqk", g, v).astype(jnp.float32)
    d_scores = (weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))).astype(q.dtype)
    return jnp.einsum("bqk,bkd->bqd", d_scores, k), jnp.einsum("bqk,bqd->bkd", d_scores, q), dv


@pytest.mark.tpu_aot
@pytest.mark.loose_promotion
@pytest.mark.parametrize(
    "keeps, known, most", [(False, False, 1.2), (False, True, 1.2), (True, False, 1.21), (True, True, 1.2)]
)
def test_what_a_softmax_that_runs_again_holds_on_a_tpu(keeps, known, most):
    """`x - max` in float32 only where nothing else reads the maximum: with known statistics, nowhere."""
    step = functools.partial(attention_again, keeps, known)
    shapes = (jax.ShapeDtypeStruct((96, 1024, 64), jnp.bfloat16),) * 4
    found = simulate(jax.make_jaxpr(step)(*shapes), target="tpu:v5e")
    compiled = memopt.measure(step, *shapes, target="tpu:v5e")
    assert 0.95 * compiled.temp_bytes <= found.temp_bytes <= most * compiled.temp_bytes


@pytest.mark.tpu_aot
@pytest.mark.loose_promotion
@pytest.mark.parametrize(
    "kind, mask, known, held",
    [("v5e", None, False, 2), ("v5e", "where", False, 4), ("v5e", "add", False, 4), ("v6e", None, True, 2)],
)
def test_what_a_softmax_and_its_gradient_hold_on_a_tpu(kind, mask, known, held):
    """Scores in bfloat16 and their gradient, which is written over one of them; under a mask `x - max` in float32."""
    step, shapes = attention_backward(mask, known)
    found = simulate(jax.make_jaxpr(step)(*shapes), target=f"tpu:{kind}")
    scores = 96 * 1024 * 1024 * 2
    assert found.temp_bytes == pytest.approx(held * scores, rel=0.05)
    compiled = memopt.measure(step, *shapes, target=f"tpu:{kind}")
    assert compiled.temp_bytes == pytest.approx(held * scores, rel=0.05)


@pytest.mark.parametrize("target", ["cpu", "tpu:v5e"])
@pytest.mark.parametrize("loop", ["while", "scan"])
def test_a_body_may_begin_with_what_nothing_uses(target, loop):
    """A user's dead statement stays in the jaxpr of a loop's body: what comes first there has no place in time."""

    def body(dead, carry, _=None):
        i, x, y = carry
        if dead:
            jnp.exp(y).sum()
        return i + 1, y, x @ y

    def step(dead, x):
        start = (jnp.int32(0), x, x + 1.0)
        if loop == "while":
            return lax.while_loop(lambda carry: carry[0] < 3, lambda carry: body(dead, carry), start)
        return lax.scan(lambda carry, _: (body(dead, carry), carry[1]), start, length=3)

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    clean, dead = (simulate(jax.make_jaxpr(lambda x, d=d: step(d, x))(shape), target=target) for d in (False, True))
    assert dead.peak_bytes == pytest.approx(clean.peak_bytes, rel=0.01)
