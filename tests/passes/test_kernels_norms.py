"""A norm is found however it is written, replaced with equal gradients, or left with a reason.

In: a table of norms of rows, scale and bias, amid a step whose rows have other readers too.
"""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memopt import _compat as c
from memopt import _inline
from memopt._contract import Context
from memopt._target import Target
from memopt.passes.kernels import Kernels
from tests import eager

ROWS, WIDTH = (2, 3), 16
FOUND = Kernels(norms=True)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A way to write a norm of `x` with `scale` and `bias`; `left` is a part of the reason why it stays."""

    name: str
    apply: Callable
    left: str | None = None


def _linen(module, x, scale, bias=None):
    params = {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
    return module.apply({"params": params}, x)


def _nnx(make, x, scale, bias=None):
    module = make(WIDTH, rngs=nnx.Rngs(0))
    module.scale[...] = scale
    if bias is not None:
        module.bias[...] = bias
    return module(x)


def _rms(x, scale, bias):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def _rms_divided(x, scale, bias):
    return scale * (x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5))


def _rms_power(x, scale, bias):
    return x * jnp.power(jnp.square(x).mean(-1, keepdims=True) + 1e-6, -0.5) * scale


def _rms_sum(x, scale, bias):
    return x * (jax.lax.rsqrt(jnp.sum(x * x, -1) / WIDTH + 1e-6))[..., None] * scale


def _gemma(x, scale, bias):
    return _rms(x, 1 + scale, bias)


def _llama_half(x, scale, bias):
    half = x.astype(jnp.bfloat16)
    wide = half.astype(jnp.float32)
    out = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)
    return (out * scale.astype(jnp.bfloat16)).astype(jnp.float32)


def _layer(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def _layer_divided(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def _layer_fast(x, scale, bias):
    mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
    return bias + scale * ((x - mean) / jnp.sqrt(square - mean * mean + 1e-5))


def _layer_folded(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * scale
    return x * factor + (bias - mean * factor)


def _residual(x, scale, bias):
    return x + _rms(x, scale, bias)


def _flat_rows(x, scale, bias):
    return _layer(x.reshape(-1, WIDTH), scale, bias).reshape(x.shape)


def _wrong_count(x, scale, bias):
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) / (WIDTH - 1) + 1e-6) * scale


def _sample_variance(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5) * scale


def _outside(x, scale, bias):
    return x / (jnp.sqrt((x * x).mean(-1, keepdims=True)) + 1e-3) * scale


def _stopped(x, scale, bias):
    return x * jax.lax.stop_gradient(jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)) * scale


def _columns(x, scale, bias):
    return x * jax.lax.rsqrt((x * x).mean(0, keepdims=True) + 1e-6) * scale


TABLE = [
    Pattern("linen LayerNorm", lambda x, s, b: _linen(nn.LayerNorm(), x, s, b)),
    Pattern("linen LayerNorm, two passes", lambda x, s, b: _linen(nn.LayerNorm(use_fast_variance=False), x, s, b)),
    Pattern("linen LayerNorm, no bias", lambda x, s, b: _linen(nn.LayerNorm(use_bias=False), x, s)),
    Pattern("linen RMSNorm", lambda x, s, b: _linen(nn.RMSNorm(), x, s)),
    Pattern("linen LayerNorm, half", lambda x, s, b: _linen(nn.LayerNorm(dtype=jnp.bfloat16), x, s, b)),
    Pattern("nnx LayerNorm", lambda x, s, b: _nnx(nnx.LayerNorm, x, s, b)),
    Pattern("nnx RMSNorm", lambda x, s, b: _nnx(nnx.RMSNorm, x, s)),
    Pattern("RMS", _rms),
    Pattern("RMS, bare", lambda x, s, b: _rms(x, jnp.float32(1.0), b)),
    Pattern("RMS, divided", _rms_divided),
    Pattern("RMS, a power", _rms_power),
    Pattern("RMS, a sum", _rms_sum),
    Pattern("RMS, one added to the scale", _gemma),
    Pattern("RMS, half", _llama_half),
    Pattern("RMS beside a residual", _residual),
    Pattern("RMS, checkpointed", jax.checkpoint(_rms)),
    Pattern("RMS, no epsilon", lambda x, s, b: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)) * s),
    Pattern("LayerNorm", _layer),
    Pattern("LayerNorm, divided", _layer_divided),
    Pattern("LayerNorm, fast variance", _layer_fast),
    Pattern("LayerNorm, flattened", _flat_rows),
    Pattern("LayerNorm, shift folded into the bias", _layer_folded),
    Pattern("jax.nn.standardize", lambda x, s, b: jax.nn.standardize(x, epsilon=1e-5) * s + b),
    Pattern("divided by one less", _wrong_count, "no value equals"),
    Pattern("sample variance", _sample_variance, "no value equals"),
    Pattern("epsilon outside of the root", _outside, "no value equals|nothing constant"),
    Pattern("root without a gradient", _stopped, "not its own|do not come together"),
    Pattern("along another axis", _columns, "no value equals"),
    Pattern("length of rows", lambda x, s, b: jnp.sqrt((x * x).sum(-1, keepdims=True)) * s, "no value equals|nothing"),
]


def _arguments():
    random = np.random.default_rng(0)
    shapes = (*ROWS, WIDTH), (WIDTH,), (WIDTH,)
    return [jnp.asarray(1 + random.normal(size=shape), jnp.float32) for shape in shapes]


def _step(apply):
    def loss(x, scale, bias):
        x = jnp.sin(x)
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))
        return (jnp.tanh(apply(x, scale, bias).astype(jnp.float32)) * weights).sum() + (x * weights).mean()

    return jax.value_and_grad(loss, (0, 1, 2))


def _flat(step, arguments):
    flat = _inline.inline(jax.make_jaxpr(step)(*arguments))
    return c.close(c.dce(flat)[0], c.jaxpr_consts(flat))


def _rewritten(before, target=None):
    result = FOUND.rewrite(before, Context(target=target))
    if result is None or not result.rows:
        return result, before
    flat = _inline.inline(result.closed)
    flat = c.close(c.dce(flat)[0], c.jaxpr_consts(flat))
    c.check(flat)
    return result, flat


def _equal(before, after, arguments, tolerance):
    leaves = jax.tree.leaves(arguments)
    for plain, kernel in zip(eager.evaluate(before, *leaves), eager.evaluate(after, *leaves), strict=True):
        plain, kernel = np.asarray(plain, np.float64), np.asarray(kernel, np.float64)
        assert np.abs(plain - kernel).max() <= tolerance * np.abs(plain).max()


def _primitives(jaxpr):
    for eqn in c.open_jaxpr(jaxpr).eqns:
        yield eqn.primitive.name
        for _, _, body in c.subjaxprs(eqn.params):
            yield from _primitives(body)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("pattern", TABLE, ids=lambda pattern: pattern.name)
def test_what_is_found_has_equal_gradients_and_what_is_left_a_reason(pattern):
    arguments = _arguments()
    before = _flat(_step(pattern.apply), arguments)
    result, after = _rewritten(before)
    if pattern.left is not None:
        assert result is not None and result.rows == ()
        assert re.search(pattern.left, result.left[0].why), result.left
        return
    assert result is not None and len(result.rows) == 1 and result.left == (), result and result.left
    assert "forward and backward" in result.rows[0].reason
    _equal(before, after, arguments, 2e-2 if "half" in pattern.name else 5e-6)


def test_the_table_is_long_enough():
    assert sum(p.left is None for p in TABLE) >= 20
    assert sum(p.left is not None for p in TABLE) >= 5


@pytest.mark.loose_promotion
@pytest.mark.parametrize("inside", [lambda f: f, jax.checkpoint], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("apply", [_rms, _layer], ids=["RMS", "LayerNorm"])
def test_a_pair_of_loops_stacks_rows_alone(apply, inside):
    def loss(x, scale, bias):
        layer = inside(lambda x, w: (x + jnp.sin(apply(x, *w)), None))
        return jnp.sin(jax.lax.scan(layer, x, (scale, bias))[0]).sum()

    x, scale, bias = _arguments()
    arguments = x, *(jnp.stack([a, 0.5 * a, 2 * a]) for a in (scale, bias))
    before = _flat(jax.value_and_grad(loss, (0, 1, 2)), arguments)
    result, after = _rewritten(before)
    assert [row.choice for row in result.rows] == ["kernel"], result.left
    _equal(before, after, arguments, 1e-5)


def test_a_forward_pass_alone_and_the_platform_decides_on_the_kernel():
    x = jax.ShapeDtypeStruct
    arguments = x((64, 256), jnp.float32), x((256,), jnp.float32), x((256,), jnp.float32)
    for target in ("tpu:v5e:1x1", "gpu:h100"):
        for step, count in ((_step(_layer_flat), 2), (_layer_flat, 1)):
            result, after = _rewritten(_flat(step, arguments), Target.parse(target))
            assert f"{target[:3]} kernel" in result.rows[0].reason
            assert list(_primitives(after)).count("pallas_call") == count


def _layer_flat(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * scale[None] + bias[None]
