"""Block-wise codes and Adam on them: every form against the table, and against the codes that `memopt.optim` stores.

In: a table of shapes and kinds of values. The kernels run in interpret mode, and libtpu compiles them ahead of time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt._codecs_maps import Dynamic, dynamic_values
from memopt.optim import scale_by_adam_8bit
from memopt.pallas_kernels import adam_8bit_update, dequantize_blocks, quantize_blocks
from memopt.pallas_kernels.blockwise import codes as maps

FORMS = {"reference": {}, "lean": {}, "tpu": {"interpret": True}}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, a block, and what values are drawn."""

    name: str
    shape: tuple[int, ...] = (40, 512)
    block: int = 128
    values: str = "spread"
    quick: bool = False


CASES = [
    Case("blocks", quick=True),
    Case("a short last block", (40, 300), quick=True),
    Case("whole rows", (16, 200), 2048),
    Case("a batch", (2, 3, 8, 256)),
    Case("many rows", (300, 256)),
    Case("a vector", (1000,)),
    Case("zeros", values="zeros"),
    Case("extremes", values="extremes"),
    Case("not finite", (40, 300), values="special", quick=True),
]
ROWS = [
    pytest.param(form, case, marks=[] if case.quick else [pytest.mark.slow], id=f"{form}-{case.name}")
    for form in FORMS
    for case in CASES
]


def _draw(case: Case, seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    x = random.normal(size=case.shape) * np.exp(3 * random.normal(size=case.shape))
    if case.values == "zeros":
        x = 0 * x
    if case.values == "extremes":
        x = np.sign(x) * 10.0 ** random.uniform(-44, 38, case.shape)
    if case.values == "special":
        x[1, 3], x[2, 200], x[3, 0], x[4, :] = np.nan, np.inf, -np.inf, np.nan
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("form", "case"), ROWS)
def test_a_form_writes_the_codes_of_the_optimizers(form, case, signed):
    if form == "tpu" and len(case.shape) == 1:
        with pytest.raises(NotImplementedError, match="1 rows: 8 or more are served"):
            quantize_blocks(_draw(case), block=case.block, implementation=form)
        return
    x = _draw(case)
    codec = Dynamic(8, signed, case.block)
    encoded = jax.jit(codec.encode)(x)
    settings = {"block": case.block, "signed": signed, "implementation": form, **FORMS[form]}
    code, scale = jax.jit(functools.partial(quantize_blocks, **settings))(x)
    np.testing.assert_array_equal(scale, encoded.scales[0])
    differ = np.asarray(code, np.int32) - np.asarray(encoded.codes, np.int32)
    # The table's borders and the computed ones are the same numbers up to a rounding.
    assert np.abs(differ).max() <= (form == "reference") and (differ != 0).mean() <= 2e-3
    again = jax.jit(functools.partial(dequantize_blocks, **settings))(encoded.codes, scale)
    np.testing.assert_allclose(again, jax.jit(codec.decode)(encoded), rtol=2e-6, atol=1e-37)


def test_the_map_is_that_of_the_codec_and_a_wrong_code_is_seen():
    for signed in (True, False):
        np.testing.assert_allclose(maps.values(signed), dynamic_values(8, signed), rtol=1e-12)
    x = _draw(CASES[0])
    right, wrong = (quantize_blocks(x * factor, block=128)[0] for factor in (1, jnp.linspace(1.0, 1.02, 512)[None]))
    assert (right != wrong).mean() > 2e-3


def _steps(case: Case, dtype: str, **form):
    mu, nu = (quantize_blocks(jnp.zeros(case.shape), block=case.block, signed=signed) for signed in (True, False))
    update = jax.jit(functools.partial(adam_8bit_update, b1=0.8, b2=0.95, block=case.block, **form))
    for count in (1, 2, 3):
        new, mu, nu = update(_draw(case, count).astype(dtype), mu, nu, count)
        yield new, *mu, *nu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_an_adam_step_is_that_of_the_optimizer(form, dtype):
    case = Case("a short last block", (40, 300))
    optimizer = scale_by_adam_8bit(0.8, 0.95, block=case.block, min_size=1)
    state, step = optimizer.init(jnp.zeros(case.shape, dtype)), jax.jit(optimizer.update)
    for count, ours in enumerate(_steps(case, dtype, implementation=form, **FORMS[form]), 1):
        update, state = step(_draw(case, count).astype(dtype), state)
        (moments,) = state.leaves.values()
        theirs = update, moments.mu.codes, *moments.mu.scales, moments.nu.codes, *moments.nu.scales
        for got, want in zip(ours, theirs, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
            if got.dtype == np.uint8:
                assert np.abs(got - want).max() <= 1 and (got != want).mean() <= 5e-3
            else:
                # A code beside the border of its cell moves its own element alone, by a cell at most.
                far = np.abs(got - want) > (1e-5 if dtype == "float32" else 1e-2) * np.abs(want).max()
                assert far.mean() <= 5e-3


def test_a_nan_stays_in_its_element_and_its_moments():
    for form, settings in FORMS.items():
        zero = jnp.zeros((8, 256))
        mu, nu = quantize_blocks(zero, block=128), quantize_blocks(zero, block=128, signed=False)
        gradient = zero.at[1, 2].set(jnp.nan).at[1, 3].set(0.5)
        step = jax.jit(functools.partial(adam_8bit_update, block=128, implementation=form, **settings))
        update, mu, _ = step(gradient, mu, nu, 1)
        assert np.argwhere(~np.isfinite(update)).tolist() == [[1, 2]]
        assert np.argwhere(~np.isfinite(dequantize_blocks(*mu, block=128))).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_blocks(jnp.ones((2, 3), jnp.int32)), "give float32"),
        (lambda: quantize_blocks(jnp.ones(())), r"give \[..., width\]"),
        (lambda: quantize_blocks(jnp.ones((2, 3)), block=0), "blocks of one"),
        (lambda: dequantize_blocks(jnp.ones((2, 3), jnp.uint8), jnp.ones(3)), "2 scales in float32"),
        (lambda: adam_8bit_update(jnp.ones((2, 3)), *[(jnp.ones((2, 4), jnp.uint8), jnp.ones(2))] * 2, 1), "mu has"),
    ],
)
def test_what_does_not_belong_together_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The compilers: stacked and single weights of Llama 1B, GPT-2's table, whose rows no tile divides, and a short block.
AOT = [
    ("Llama 1B, up", (2048, 8192), 2048),
    ("Llama 1B, stacked", (16, 2048, 2048), 2048),
    ("GPT-2, embedding", (50_257, 768), 2048),
    ("a short last block", (1000, 5000), 1024),
]


def adam_step(shape: tuple[int, ...], block: int, implementation=None):
    """Return an Adam step, and the shapes of its arguments."""
    x = jax.ShapeDtypeStruct
    mu, nu = (
        jax.eval_shape(functools.partial(quantize_blocks, block=block, signed=signed), x(shape, jnp.float32))
        for signed in (True, False)
    )
    step = functools.partial(adam_8bit_update, block=block, implementation=implementation)
    return step, (x(shape, jnp.bfloat16), mu, nu, x((), jnp.int32))


def round_trip(shape: tuple[int, ...], block: int):
    """Return a step that quantizes and dequantizes, and the shapes of its arguments."""

    def step(x):
        code, scale = quantize_blocks(x, block=block)
        return code, scale, dequantize_blocks(code, scale, block=block)

    return step, (jax.ShapeDtypeStruct(shape, jnp.bfloat16),)


def _targets():
    for target in ("tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1"):
        for row in AOT:
            slow = target != "tpu:v5e:1x1" or row[0] != "Llama 1B, up"
            marks = [pytest.mark.tpu_aot, *([pytest.mark.slow] if slow else [])]
            yield pytest.param(target, *row[1:], marks=marks, id=f"{target}-{row[0]}")


@pytest.mark.parametrize(("target", "shape", "block"), list(_targets()))
def test_the_kernels_compile_for_tpus_and_write_moments_in_place(target, shape, block):
    size = int(np.prod(shape))
    step, arguments = adam_step(shape, block)
    memory = memopt.measure(step, *arguments, target=target, donate_argnums=(1, 2))
    assert memory.alias_bytes >= 2 * size
    # Scales, which are laid out anew, and codes of rows that a tile of 32 does not divide.
    assert memory.temp_bytes <= 0.05 * size + (2 * size + 2**20 if shape[-2] % 32 else 2**16)
    step, arguments = round_trip(shape, block)
    memory = memopt.measure(step, *arguments, target=target)
    assert memory.temp_bytes <= 0.05 * size + (size + 2**20 if shape[-2] % 32 else 2**16)
