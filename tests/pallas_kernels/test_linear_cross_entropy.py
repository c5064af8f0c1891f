"""Every form of the linear cross-entropy against its definition: values, gradients, special numbers, compiled memory.

In: a table of shapes and settings. The kernels run in interpret mode, and libtpu compiles them ahead of time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.pallas_kernels import contrastive_loss, linear_cross_entropy
from memopt.pallas_kernels.linear_cross_entropy import lean, reference, tpu
from memopt.pallas_kernels.linear_cross_entropy.reference import Spec

ERRORS = {"float64": 1e-13, "float32": 3e-6, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape `(tokens, dim, vocab)`, the settings, and whether it runs in CI."""

    name: str
    shape: tuple[int, int, int] = (200, 128, 300)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: float = 1.0
    quick: bool = False


CASES = [
    Case("plain", quick=True),
    Case("even", (128, 128, 256)),
    Case("embedding", settings={"vocab_axis": 0}),
    Case("ignored", settings={"ignore_index": -100}),
    Case("everything", settings={"vocab_axis": 0, "label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 3.0}, quick=True),
    Case("extreme logits", scale=1e4),
    Case("few tokens", (3, 128, 130), quick=True),
]
ROWS = [
    pytest.param(
        form, case, marks=[] if case.quick and form == "lean" else [pytest.mark.slow], id=f"{form}-{case.name}"
    )
    for form in ("lean", "tpu")
    for case in CASES
]


def _value_and_gradients(case: Case, dtype: str, **form) -> list[np.ndarray]:
    (tokens, dim, vocab), random = case.shape, np.random.default_rng(0)
    axis = case.settings.get("vocab_axis", 1)
    hidden = jnp.asarray(random.normal(size=(tokens, dim)) * case.scale, dtype)
    weight = jnp.asarray(random.normal(size=(dim, vocab) if axis else (vocab, dim)) * 0.3, dtype)
    labels = random.integers(0, vocab, tokens)
    if "ignore_index" in case.settings:
        labels[::3] = case.settings["ignore_index"]
    cotangent = jnp.asarray(random.normal(size=tokens), "float64" if dtype == "float64" else "float32")

    def weighted(hidden, weight):
        loss = linear_cross_entropy(hidden, weight, jnp.asarray(labels, jnp.int32), **case.settings, **form)
        return (loss * cotangent).sum(), loss

    (_, loss), grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(hidden, weight)
    return [np.asarray(x, np.float64) for x in (loss, *grads)]


def _assert_close(case: Case, dtype: str, form: str) -> None:
    got = _value_and_gradients(case, dtype, implementation=form, blocks=(128, 128), interpret=form == "tpu")
    wide = "float32" if dtype == "bfloat16" else dtype
    for ours, theirs in zip(got, _value_and_gradients(case, wide, implementation="reference"), strict=True):
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() <= ERRORS[dtype] * np.abs(theirs).max()


@pytest.mark.parametrize(("form", "case"), ROWS)
def test_a_form_equals_the_reference_in_float32(form, case):
    _assert_close(case, "float32", form)


@pytest.mark.parametrize("form", ["lean", pytest.param("tpu", marks=pytest.mark.slow)])
def test_a_form_equals_the_float32_reference_in_bfloat16(form):
    _assert_close(CASES[0], "bfloat16", form)


def test_the_kernels_equal_the_reference_on_ragged_blocks():
    _assert_close(Case("ragged", (130, 128, 140), {"vocab_axis": 0, "label_smoothing": 0.1}), "float32", "tpu")


@pytest.mark.parametrize("vocab_axis", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kernel_for_each_gradient_equals_the_reference_where_one_cannot_hold_both(vocab_axis, monkeypatch):
    monkeypatch.setattr(tpu, "HELD_BYTES", 0)
    jax.clear_caches()
    _assert_close(Case("each", (130, 128, 256), {"vocab_axis": vocab_axis}), "float32", "tpu")


def test_logits_are_counted_once_forward_and_once_backward():
    x = jax.ShapeDtypeStruct
    arguments = x((1024, 128), jnp.bfloat16), x((1000, 128), jnp.bfloat16), x((1024,), jnp.int32)

    def step(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, vocab_axis=0, implementation="tpu").sum()

    product = 2 * 1024 * 1024 * 128  # blocks of 512 round the vocabulary up
    assert memopt.matmul_flops(jax.make_jaxpr(jax.grad(step, (0, 1)))(*arguments)) == 4 * product


@pytest.mark.slow
def test_the_lean_form_is_exact_in_float64():
    with jax.enable_x64(True):
        _assert_close(CASES[4], "float64", "lean")


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("parts, chunk", [(2, 3), (5, 8), (4, 100)])
def test_parts_of_the_vocabulary_side_by_side_are_exact(vocab_axis, parts, chunk):
    spec = Spec(vocab_axis=vocab_axis, ignore_index=3, label_smoothing=0.1, z_loss=0.01, soft_cap=3.0)
    random, tokens = np.random.default_rng(0), (2, 3)
    with jax.enable_x64(True):
        hidden, cotangent = (jnp.asarray(random.normal(size=shape)) for shape in ((*tokens, 8), tokens))
        weight = jnp.asarray(random.normal(size=(8, 40) if vocab_axis else (40, 8)))
        labels = jnp.asarray(random.integers(0, 40, tokens), jnp.int32)

        def plain(hidden, weight):
            return reference.linear_cross_entropy(spec, hidden.reshape(6, 8), weight, labels.reshape(6))

        expected, pull = jax.vjp(plain, hidden, weight)
        loss, lse = lean.forward(spec, hidden, weight, labels, chunk, parts)
        got = loss.reshape(6), *lean.backward(spec, hidden, weight, labels, lse, cotangent, chunk, parts)
        for ours, theirs in zip(got, (expected, *pull(cotangent.reshape(6))), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13 * np.abs(theirs).max())


def test_a_wrong_gradient_is_seen():
    right = _value_and_gradients(CASES[0], "float32", implementation="reference")
    wrong = _value_and_gradients(CASES[0], "float32", implementation="lean", z_loss=1e-4)
    assert np.abs(right[1] - wrong[1]).max() > ERRORS["float32"] * np.abs(right[1]).max()


def test_equal_to_optax():
    random = np.random.default_rng(1)
    hidden, weight = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((12, 8), (8, 20)))
    labels = jnp.arange(12, dtype=jnp.int32)
    theirs = optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels)
    np.testing.assert_allclose(linear_cross_entropy(hidden, weight, labels), theirs, rtol=2e-6)


def test_contrastive_loss_is_the_mean_of_both_directions():
    random = np.random.default_rng(1)
    first, second = (jnp.asarray(random.normal(size=(9, 4)), jnp.float32) for _ in range(2))
    logits = first @ second.T * 2
    both = [optax.softmax_cross_entropy_with_integer_labels(x, jnp.arange(9)) for x in (logits, logits.T)]
    np.testing.assert_allclose(contrastive_loss(first, second, scale=2.0), (both[0] + both[1]) / 2, rtol=2e-6)


@pytest.mark.parametrize("form", ["lean", "tpu"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_reach_their_token_and_no_other(form, value):
    hidden = jnp.ones((6, 128)).at[2, 0].set(value)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(128, 200)), jnp.float32)
    how = {"implementation": form, "blocks": (128, 128), "interpret": form == "tpu"}

    def losses(hidden):
        return linear_cross_entropy(hidden, weight, jnp.zeros(6, jnp.int32), **how)

    loss, pull = jax.vjp(losses, hidden)
    for rows in (loss[:, None], pull(jnp.ones(6))[0]):
        assert np.isfinite(np.asarray(rows)).all(axis=1).tolist() == [token != 2 for token in range(6)]


@pytest.mark.parametrize("form", ["lean", "tpu"])
def test_where_all_tokens_are_ignored_loss_and_gradients_are_zero(form):
    random = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((20, 128), (128, 200)))
    how = {"implementation": form, "blocks": (128, 128), "interpret": form == "tpu"}
    settings = {"ignore_index": -1, "label_smoothing": 0.1, "z_loss": 0.01}

    def losses(hidden, weight):
        return linear_cross_entropy(hidden, weight, jnp.full(20, -1, jnp.int32), **settings, **how)

    loss, pull = jax.vjp(losses, hidden, weight)
    assert not any(np.asarray(x).any() for x in (loss, *pull(jnp.ones(20))))


H = np.zeros((4, 8), np.float32)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((H[None], H.T, np.zeros(4, int)), {}, r"give \[tokens, dim\]"),
        ((H, H, np.zeros(4, int)), {}, "dim and tokens must agree"),
        ((H, H.T, np.zeros(4)), {}, "integer labels"),
    ],
)
def test_what_does_not_belong_together_is_named(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **settings)


def test_a_kernel_that_cannot_serve_says_why_and_the_default_still_runs():
    with pytest.raises(NotImplementedError, match="a width of 8"):
        linear_cross_entropy(H, H.T, np.zeros(4, int), implementation="tpu")
    assert linear_cross_entropy(H, H.T, np.zeros(4, int)).shape == (4,)


# What the compilers make of it.


def _measure(tokens, dim, vocab, target, dtype=jnp.bfloat16, **settings):
    x = jax.ShapeDtypeStruct
    shape = (dim, vocab) if settings.get("vocab_axis", 1) else (vocab, dim)
    arguments = x((tokens, dim), dtype), x(shape, dtype), x((tokens,), jnp.int32)

    def mean(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, **settings).mean()

    return memopt.measure(jax.value_and_grad(mean, (0, 1)), *arguments, target=target)


def test_the_lean_form_holds_no_logits():
    memory = _measure(512, 32, 8192, "cpu", jnp.float32, implementation="lean", blocks=(512, 256))
    assert memory.temp_bytes < 512 * 8192 * 4 / 4


@pytest.mark.tpu_aot
def test_the_kernels_compile_for_v5e_with_no_temporaries():
    memory = _measure(300, 256, 1000, "tpu:v5e:1x1", vocab_axis=0, soft_cap=30.0, label_smoothing=0.1, z_loss=1e-4)
    assert memory.temp_bytes <= 2**20


# Heads of Gemma 2 2B, GPT-2 and Llama 1B: tokens, width, vocabulary.
AOT = [(8192, 2304, 256_000), (8192, 768, 50_257), (4096, 2048, 128_256)]


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("target", ["tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1"])
@pytest.mark.parametrize("shape", AOT)
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_the_kernels_compile_at_published_shapes(target, shape, vocab_axis):
    memory = _measure(*shape, target, vocab_axis=vocab_axis)
    assert memory.peak_bytes <= memory.argument_bytes + memory.output_bytes + 64 * 2**20
