"""Every form of the gated activation and MLP against its definition: values, gradients, special numbers, memory.

In: tables of shapes and settings. Kernels run in interpret mode, libtpu compiles them, and they are lowered for CUDA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt.pallas_kernels import gated_activation, gated_mlp
from memopt.pallas_kernels.gated_mlp import tpu
from memopt.pallas_kernels.gated_mlp.activations import NAMES

ERRORS = {"float32": 5e-6, "bfloat16": 2e-2}  # of the largest entry


@dataclasses.dataclass(frozen=True)
class Case:
    """An activation, and the shape: of gate and up, or `(tokens, dim, hidden, out)`."""

    name: str
    activation: str = "silu"
    shape: tuple[int, ...] = (40, 128, 256, 128)
    quick: bool = False


GATED = [
    *(Case(name, name, (40, 128), quick=name in ("silu", "gelu_exact")) for name in NAMES),
    Case("leading dimensions", "gelu", (2, 3, 5, 128)),
    Case("odd", "silu", (7, 50)),
    Case("one entry", "relu", (1,)),
]
MLPS = [
    *(Case(name, name, quick=name in ("silu", "gelu")) for name in NAMES),
    Case("one token", shape=(1, 128, 256, 128)),
    Case("another width out", "gelu", (32, 128, 384, 256)),
    Case("odd", "silu", (7, 10, 33, 12), quick=True),
]

GATED_ROWS = [
    pytest.param(form, case, marks=[] if case.quick else [pytest.mark.slow], id=f"{form}-{case.name}")
    for form in ("lean", "tpu", "gpu")
    for case in GATED
]


def _draw(shapes, dtype: str) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape) / np.sqrt(scale), dtype) for shape, scale in shapes]


def _compare(call, operands, cotangent, dtype: str, settings) -> None:
    results = []
    for form in (settings, {"implementation": "reference"}):
        out, pull = jax.vjp(jax.jit(functools.partial(call, **form)), *operands)
        results.append([np.asarray(value, np.float64) for value in (out, *pull(cotangent))])
    for ours, theirs in zip(*results, strict=True):
        assert np.abs(ours - theirs).max() <= ERRORS[dtype] * np.abs(theirs).max()


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize(("form", "case"), GATED_ROWS)
def test_a_form_of_the_activation_equals_the_reference(form, case, dtype):
    settings = {"lean": {}, "tpu": {"interpret": True, "blocks": (16, 128)}, "gpu": {"interpret": True, "blocks": 64}}
    gate, up, cotangent = _draw([(case.shape, 0.2)] * 3, dtype)
    call = functools.partial(gated_activation, activation=case.activation)
    if form == "tpu" and case.shape[-1] % 128:
        with pytest.raises(NotImplementedError, match="multiples of 128 are served"):
            call(gate, up, implementation=form)
        return
    if form == "gpu" and case.activation == "gelu_exact":
        with pytest.raises(NotImplementedError, match="does not lower the error function"):
            call(gate, up, implementation=form)
        return
    _compare(call, (gate, up), cotangent, dtype, {"implementation": form, **settings[form]})


def _mlp_operands(case: Case, dtype: str):
    tokens, dim, hidden, out = case.shape
    shapes = [((tokens, dim), 1), ((dim, hidden), dim / 4), ((dim, hidden), dim), ((hidden, out), hidden)]
    return _draw([*shapes, ((tokens, out), 1)], dtype)


ROWS = [
    pytest.param(form, case, marks=[] if case.quick else [pytest.mark.slow], id=f"{form}-{case.name}")
    for form in ("lean", "tpu", "tpu, two kernels")
    for case in MLPS
]


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize(("form", "case"), ROWS)
def test_a_form_of_the_mlp_equals_the_reference(form, case, dtype, monkeypatch):
    *operands, cotangent = _mlp_operands(case, dtype)
    call = functools.partial(gated_mlp, activation=case.activation)
    if form == "lean":
        _compare(call, operands, cotangent, dtype, {"implementation": "lean", "blocks": (0, 24)})
        return
    if case.shape[1] % 128:
        with pytest.raises(NotImplementedError, match="multiples of 128, up to 4,096, are served"):
            call(*operands, implementation="tpu")
        return
    if "two" in form:
        monkeypatch.setattr(tpu, "HELD_BYTES", 0)
    _compare(call, operands, cotangent, dtype, {"implementation": "tpu", "blocks": (16, 128), "interpret": True})


def test_a_wrong_activation_is_seen():
    *operands, _ = _mlp_operands(MLPS[1], "float32")
    right, wrong = (np.asarray(gated_mlp(*operands, activation=name)) for name in ("gelu", "gelu_exact"))
    assert np.abs(right - wrong).max() > ERRORS["float32"] * np.abs(right).max()


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("form", ["lean", "tpu", "gpu"])
def test_extreme_gates_nan_and_infinity(form, activation):
    if form == "gpu" and activation == "gelu_exact":
        pytest.skip("Pallas does not lower the error function for GPUs")
    gate = jnp.zeros((16, 128), jnp.float32).at[0, :8].set(jnp.asarray([3e4, -3e4, 1e3, -1e3, 88.0, -88.0, 1e-30, 0.0]))
    gate = gate.at[1, :2].set(jnp.asarray([jnp.nan, jnp.inf]))
    up, settings = jnp.full_like(gate, 0.5), {} if form == "lean" else {"interpret": True}
    made = []
    for kind in ({"implementation": form, **settings}, {"implementation": "reference"}):
        out, pull = jax.vjp(functools.partial(gated_activation, activation=activation, **kind), gate, up)
        made.append([out, *pull(jnp.ones_like(out))])
    for ours, theirs in zip(*made, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
        assert (np.isnan(ours[1, :1]) == np.isnan(theirs[1, :1])).all()
        assert np.isfinite(ours[2:]).all()


def test_nan_stays_in_its_row():
    *operands, cotangent = _mlp_operands(MLPS[0], "float32")
    operands[0] = operands[0].at[2, 1].set(jnp.nan)
    for form in ({"implementation": "lean"}, {"implementation": "tpu", "blocks": (16, 128), "interpret": True}):
        out, pull = jax.vjp(functools.partial(gated_mlp, **form), *operands)
        for x in (out, pull(cotangent)[0]):
            assert np.isnan(x).any(axis=1).tolist() == [i == 2 for i in range(40)]


def test_a_call_may_be_mapped_and_scanned():
    *operands, _ = _mlp_operands(MLPS[-1], "float32")
    x = jnp.stack([operands[0], 2 * operands[0]])
    whole = gated_mlp(x, *operands[1:])
    np.testing.assert_allclose(jax.vmap(lambda x: gated_mlp(x, *operands[1:]))(x), whole, rtol=1e-5, atol=1e-6)
    scanned = jax.lax.scan(lambda carry, x: (carry, gated_mlp(x, *operands[1:])), 0, x)[1]
    np.testing.assert_allclose(scanned, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gated_activation(jnp.ones(4), jnp.ones(3)), "give one shape"),
        (lambda: gated_activation(jnp.ones(4), jnp.ones(4), activation="tanh"), "silu, gelu"),
        (lambda: gated_activation(jnp.ones(4), jnp.ones(4, jnp.bfloat16)), "one floating dtype"),
        (lambda: gated_mlp(jnp.ones((2, 3)), *[jnp.ones((4, 5))] * 2, jnp.ones((5, 4))), "must agree"),
        (lambda: gated_mlp(jnp.ones((2, 3)), *[jnp.ones(4)] * 3), r"give \[..., dim\]"),
    ],
)
def test_what_does_not_belong_together_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The compilers. Llama 1B, whose gradients are made by one kernel at 2,048 tokens and by two at 4,096, and Gemma 2 2B.
AOT = [
    ("Llama 1B", (2048, 2048, 8192, 2048), "silu"),
    ("Llama 1B, 4,096 tokens", (4096, 2048, 8192, 2048), "silu"),
    ("Gemma 2 2B", (1000, 2304, 9216, 2304), "gelu"),
    ("Llama 8B", (2048, 4096, 14_336, 4096), "silu"),
]


def step_and_arguments(shape, activation: str, dtype=jnp.bfloat16):
    """Return a step that makes a gated MLP and its gradients, and the shapes of its arguments."""
    tokens, dim, hidden, out = shape

    def step(cotangent, *operands):
        result, pull = jax.vjp(functools.partial(gated_mlp, activation=activation), *operands)
        return result, pull(cotangent)

    shapes = (tokens, out), (tokens, dim), (dim, hidden), (dim, hidden), (hidden, out)
    return step, [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def gated_step(activation: str, shape, dtype=jnp.bfloat16):
    """Return a step that makes a gated activation and its gradients, and the shapes of its arguments."""

    def step(gate, up, cotangent):
        out, pull = jax.vjp(functools.partial(gated_activation, activation=activation), gate, up)
        return out, pull(cotangent)

    return step, [jax.ShapeDtypeStruct(shape, dtype)] * 3


def _targets():
    for target in ("tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1"):
        for row in AOT:
            slow = target != "tpu:v5e:1x1" or row[0] != "Llama 1B"
            marks = [pytest.mark.tpu_aot, *([pytest.mark.slow] if slow else [])]
            yield pytest.param(target, *row[1:], marks=marks, id=f"{target}-{row[0]}")


@pytest.mark.parametrize(("target", "shape", "activation"), list(_targets()))
def test_the_kernels_compile_for_tpus_with_no_hidden_activations(target, shape, activation):
    step, arguments = step_and_arguments(shape, activation)
    memory = memopt.measure(step, *arguments, target=target)
    assert memory.temp_bytes <= 2**20


@pytest.mark.tpu_aot
@pytest.mark.parametrize("activation", NAMES)
def test_the_activation_compiles_for_tpus(activation):
    step, arguments = gated_step(activation, (1000, 5632))
    for target in ("tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1"):
        assert memopt.measure(step, *arguments, target=target).temp_bytes <= 2**20


@pytest.mark.xfail(jax.__version_info__ >= (0, 11), reason="newer JAX lowers Triton beside a GPU alone", strict=True)
@pytest.mark.parametrize("activation", [name for name in NAMES if name != "gelu_exact"])
def test_the_activation_lowers_for_cuda(activation):
    step, arguments = gated_step(activation, (1000, 5632))
    text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


def test_the_lean_mlp_holds_no_hidden_activations():
    tokens, dim, hidden = 256, 64, 4096
    step, arguments = step_and_arguments((tokens, dim, hidden, dim), "silu", jnp.float32)
    lean = functools.partial(gated_mlp, implementation="lean", blocks=(0, 256))
    made = jax.grad(lambda *operands: lean(*operands).sum(), (0, 1, 2, 3))
    assert memopt.measure(made, *arguments[1:], target="cpu").temp_bytes < tokens * hidden * 4
