"""Every form of the quantized matmul against its definition: products, gradients, special numbers, compiled memory.

In: a table of shapes and settings. The kernels run in interpret mode, and libtpu compiles them ahead of time.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt.pallas_kernels import dequantize, quantize_weight, quantized_dot_general, quantized_matmul
from memopt.pallas_kernels.quantized_matmul import weight as weights

ERRORS = {"float32": 3e-6, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape `(tokens, rows, columns)`, how the weight is quantized, and whether activations are too."""

    name: str
    bits: int = 8
    group: Any = None
    activations: str | None = None
    shape: tuple[int, int, int] = (40, 256, 256)
    quick: bool = False


CASES = [
    Case("int8"),
    Case("int8 groups", group=128, quick=True),
    Case("int8 small groups", group=32),
    Case("int4 groups", 4, 64, quick=True),
    Case("int4 columns", 4),
    Case("int4 wide groups", 4, 256, shape=(40, 512, 128)),
    Case("adaptive", 4, "adaptive"),
    Case("int8 by int8", activations="int8"),
    Case("int8 by int8 groups", group=128, activations="int8", quick=True),
    Case("int8 by int4 small groups", 4, 32, "int8"),
    Case("odd", 4, 10, shape=(7, 50, 33)),
    Case("one token", group=128, shape=(1, 384, 128)),
]
ROWS = [
    pytest.param(form, case, marks=[] if case.quick else [pytest.mark.slow], id=f"{form}-{case.name}")
    for form in ("lean", "tpu")
    for case in CASES
]


def _value_and_gradient(case: Case, dtype: str, **form) -> list[np.ndarray]:
    (tokens, rows, columns), random = case.shape, np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(tokens, rows)), dtype)
    weight = random.normal(size=(rows, columns)) * np.exp(random.normal(size=(rows, 1)))
    weight = quantize_weight(jnp.asarray(weight, jnp.float32), case.bits, case.group)
    cotangent = jnp.asarray(random.normal(size=(tokens, columns)), dtype)

    def call(x):
        return quantized_matmul(x, weight, activations=case.activations, **form)

    out, pull = jax.vjp(jax.jit(call), x)
    return [np.asarray(value, np.float64) for value in (out, *pull(cotangent))]


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize(("form", "case"), ROWS)
def test_a_form_equals_the_reference(form, case, dtype):
    settings = {"tpu": {"blocks": (32, 128, 128), "interpret": True}, "lean": {"blocks": (0, 0, 96)}}[form]
    if form == "tpu" and case.group in (256, None) and case.bits == 4:
        settings["blocks"] = (32, 256, 128)  # whole units of packed rows
    try:
        got = _value_and_gradient(case, dtype, implementation=form, **settings)
    except NotImplementedError as error:
        assert case.name in ("odd", "adaptive"), error  # what is no multiple of 128, or packed by less than 16
        pytest.skip(str(error))
    for ours, theirs in zip(got, _value_and_gradient(case, dtype, implementation="reference"), strict=True):
        assert np.abs(ours - theirs).max() <= ERRORS[dtype] * np.abs(theirs).max()


def test_a_wrong_product_is_seen():
    right = _value_and_gradient(CASES[1], "float32", implementation="reference")
    wrong = _value_and_gradient(dataclasses.replace(CASES[1], activations="int8"), "float32", implementation="lean")
    assert np.abs(right[0] - wrong[0]).max() > ERRORS["float32"] * np.abs(right[0]).max()


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 16), (4, 64)])
def test_an_entry_is_off_by_half_its_scale_at_most(bits, group):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(64, 24)), jnp.float32)
    quantized = quantize_weight(weight, bits, group)
    scales = np.repeat(np.asarray(quantized.scales), quantized.group, axis=0)
    assert (np.abs(dequantize(quantized) - weight) <= scales * 0.5001).all()
    assert quantized.codes.nbytes == weight.size * bits // 8
    assert quantized.shape == weight.shape


def test_packing_keeps_every_code():
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (64, 5)), jnp.int8)
    for unit in (2, 16, 64):
        np.testing.assert_array_equal(weights.unpack(weights.pack(codes, unit), unit), codes)


def test_adaptive_groups_are_small_where_ranges_differ():
    even = jnp.asarray(np.random.default_rng(0).uniform(0.9, 1.0, (256, 8)), jnp.float32)
    steep = even * jnp.where(jnp.arange(256) < 128, 1.0, 0.01)[:, None]
    assert quantize_weight(even, 4, "adaptive").group == 256
    assert quantize_weight(steep, 4, "adaptive").group == 128
    errors = [float(jnp.abs(dequantize(quantize_weight(steep, 4, g)) - steep)[128:].max()) for g in (None, "adaptive")]
    assert errors[1] < 0.1 * errors[0]


def test_zeros_nan_and_infinity():
    weight = quantize_weight(jnp.zeros((8, 4)).at[0, 0].set(1.0))
    x = jnp.ones((3, 8)).at[1, 0].set(jnp.nan).at[2, 0].set(jnp.inf)
    out = np.asarray(quantized_matmul(x, weight, implementation="lean"))
    assert out[0].tolist() == [1, 0, 0, 0]
    assert np.isnan(out[1]).all() and not np.isfinite(out[2]).any()


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("form", ["lean", "tpu"])
def test_special_rows_reach_no_other_and_extreme_ones_keep_their_precision(form, activations):
    random = np.random.default_rng(0)
    factors = np.ones((40, 1))
    factors[:4, 0] = np.nan, np.inf, 1e30, 1e-30
    x = jnp.asarray(random.normal(size=(40, 256)) * factors, jnp.float32).at[5].set(0)
    weight = quantize_weight(jnp.asarray(random.normal(size=(256, 128)), jnp.float32), 8, 128)
    call = functools.partial(quantized_matmul, weight=weight, activations=activations)
    out = call(x, implementation=form, blocks=(32, 128, 128), interpret=form == "tpu")
    want = call(x, implementation="reference")
    assert not np.isfinite(out[:2]).any() and np.isfinite(out[2:]).all()
    assert not out[5].any()
    errors = np.abs(out - want)[2:].max(axis=1)
    assert (errors <= 2 * ERRORS["float32"] * np.abs(want)[2:].max(axis=1)).all()


def test_a_frozen_weight_has_no_gradient_and_a_step_may_be_mapped_and_scanned():
    weight = quantize_weight(jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32))
    x = jnp.ones((2, 3, 8))
    loss = lambda scales: quantized_matmul(x, dataclasses.replace(weight, scales=scales)).sum()  # noqa: E731
    assert not np.asarray(jax.grad(loss)(weight.scales)).any()
    mapped = jax.vmap(lambda x: quantized_matmul(x, weight))(x)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, quantized_matmul(x, weight)), 0, x)
    np.testing.assert_allclose(mapped, quantized_matmul(x, weight), rtol=1e-6)
    np.testing.assert_allclose(scanned, mapped, rtol=1e-6)


# In Flax layers.


def test_a_layer_takes_the_rounded_weight_and_passes_gradients_straight_through():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 16)), jnp.float32)
    layer = nn.Dense(8, dot_general=quantized_dot_general(bits=4, group=8))
    params = layer.init(jax.random.key(0), x)
    rounded = {"params": {**params["params"], "kernel": dequantize(quantize_weight(params["params"]["kernel"], 4, 8))}}

    def loss(layer):
        return lambda params, x: (layer.apply(params, x) ** 2).sum()

    got = jax.value_and_grad(loss(layer), (0, 1))(params, x)
    want = jax.value_and_grad(loss(nn.Dense(8)), (0, 1))(rounded, x)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_products_with_batch_dimensions_are_left_as_they_are(caplog):
    a, b = jnp.ones((2, 3, 4)), jnp.full((2, 4, 5), 0.3)
    numbers = (((2,), (1,)), ((0,), (0,)))
    with caplog.at_level("INFO", "memopt.pallas_kernels"):
        out = quantized_dot_general()(a, b, numbers)
    np.testing.assert_array_equal(out, jax.lax.dot_general(a, b, numbers))
    assert "is not quantized" in caplog.text


# The interface.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_weight(jnp.ones((4, 4)), bits=3), "8 and 4 are served"),
        (lambda: quantize_weight(jnp.ones((4, 4)), group=3), "must divide 4 rows"),
        (lambda: quantize_weight(jnp.ones((3, 4)), bits=4), "be even for 4 bits"),
        (lambda: quantize_weight(jnp.ones((3, 4), jnp.int32)), "a floating matrix"),
        (lambda: quantized_matmul(jnp.ones((2, 3)), quantize_weight(jnp.ones((4, 4)))), "give floats"),
        (lambda: quantized_matmul(jnp.ones((2, 4)), quantize_weight(jnp.ones((4, 4))), activations="int4"), "'int8'"),
    ],
)
def test_what_does_not_belong_together_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_that_cannot_serve_says_why_and_the_default_still_runs():
    weight = quantize_weight(jnp.ones((8, 8)))
    with pytest.raises(NotImplementedError, match="multiples of 128 are served"):
        quantized_matmul(jnp.ones((2, 8)), weight, implementation="tpu")
    assert quantized_matmul(jnp.ones((2, 8)), weight).shape == (2, 8)


# The compilers.


def test_the_lean_form_holds_no_whole_weight():
    weight = jax.eval_shape(lambda: quantize_weight(jnp.zeros((512, 4096))))
    step = jax.grad(lambda x, w: quantized_matmul(x, w, blocks=(0, 0, 256)).sum())
    memory = memopt.measure(step, jax.ShapeDtypeStruct((8, 512), jnp.float32), weight, target="cpu")
    assert memory.temp_bytes < 512 * 4096 * 4 / 2


# Rows and columns of the projections of Llama 1B and 8B, and of GPT-2's.
AOT = [
    ("Llama 8B, up", (2048, 4096, 14_336), 8, None, None),
    ("Llama 8B, down, groups", (2048, 14_336, 4096), 8, 128, None),
    ("Llama 1B, int4", (2048, 2048, 8192), 4, 128, None),
    ("Llama 1B, int4, small groups", (2048, 8192, 2048), 4, 32, None),
    ("GPT-2, int8 by int8", (1024, 768, 3072), 8, None, "int8"),
    ("GPT-2, int8 by int4", (8, 768, 2304), 4, 64, "int8"),
]


def _targets():
    for target in ("tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1"):
        for row in AOT:
            slow = target != "tpu:v5e:1x1" or row[0] != "Llama 1B, int4"
            marks = [pytest.mark.tpu_aot, *([pytest.mark.slow] if slow else [])]
            yield pytest.param(target, *row[1:], marks=marks, id=f"{target}-{row[0]}")


@pytest.mark.parametrize(("target", "shape", "bits", "group", "activations"), list(_targets()))
def test_the_kernels_compile_for_tpus_with_no_weight_in_floats(target, shape, bits, group, activations):
    tokens, rows, columns = shape
    weight = jax.eval_shape(lambda: quantize_weight(jnp.zeros((rows, columns)), bits, group))
    x = jax.ShapeDtypeStruct((tokens, rows), jnp.bfloat16)

    def step(x, weight):
        out, pull = jax.vjp(lambda x: quantized_matmul(x, weight, activations=activations), x)
        return out, pull(out)

    memory = memopt.measure(step, x, weight, target=target)
    assert memory.temp_bytes <= 2 * tokens * rows + 2**20
    assert memory.argument_bytes <= 2 * tokens * rows + rows * columns * bits // 8 + 8 * weight.scales.size + 2**16
