"""A gated MLP is found however it is written, replaced with equal gradients, or left with a reason.

In: a table of MLPs of rows and three weights. After the rewrite no array is as large as the hidden activations.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memopt import _compat as c
from memopt import _inline, _rewrite
from memopt._contract import Context
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes.kernels import Kernels
from memopt.passes.remat import Remat
from tests import eager

TOKENS, DIM, HIDDEN = (2, 3), 4, 96
FOUND = Kernels(gated_mlps=True)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A way to write an MLP of `x`, `gate`, `up`, `down`; `left` is a part of the reason why it stays, "" for none."""

    name: str
    apply: Callable
    left: str | None = None


def _swish(z):
    return z / (1 + jnp.exp(-z))


def _gelu_by_hand(z):
    return 0.5 * z * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (nn.Dense(HIDDEN, use_bias=False, name=name) for name in ("gate", "up"))
        return nn.Dense(DIM, use_bias=False, name="down")(nn.silu(gate(x)) * up(x))


def _linen(x, gate, up, down):
    kernels = {name: {"kernel": w} for name, w in (("gate", gate), ("up", up), ("down", down))}
    return _Linen().apply({"params": kernels}, x)


class _Nnx(nnx.Module):
    def __init__(self, gate, up, down):
        self.layers = nnx.List(nnx.Linear(*w.shape, use_bias=False, rngs=nnx.Rngs(0)) for w in (gate, up, down))
        for layer, w in zip(self.layers, (gate, up, down), strict=True):
            layer.kernel = nnx.Param(w)

    def __call__(self, x):
        gate, up, down = self.layers
        return down(nnx.gelu(gate(x)) * up(x))


def _flat_tokens(x, gate, up, down):
    rows = x.reshape(-1, DIM)
    return ((jax.nn.silu(rows @ gate) * (rows @ up)) @ down).reshape(x.shape)


def _turned(x, gate, up, down):
    gate, up, down = (w.reshape(w.shape[::-1]) for w in (gate, up, down))
    return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _half(x, *weights):
    gate, up, down = (w.astype(jnp.bfloat16) for w in weights)
    x = x.astype(jnp.bfloat16)
    return ((jax.nn.silu(x @ gate) * (x @ up)) @ down).astype(jnp.float32)


def _float_activation(x, gate, up, down):
    x, gate, up, down = (a.astype(jnp.bfloat16) for a in (x, gate, up, down))
    hidden = jax.nn.gelu((x @ gate).astype(jnp.float32)) * (x @ up).astype(jnp.float32)
    return (hidden.astype(jnp.bfloat16) @ down).astype(jnp.float32)


def _named(x, gate, up, down):
    hidden = jax.ad_checkpoint.checkpoint_name(jax.nn.silu(x @ gate), "gate") * (x @ up)
    return jax.ad_checkpoint.checkpoint_name(hidden, "hidden") @ down


def _dropout(x, gate, up, down):
    hidden = jax.nn.silu(x @ gate) * (x @ up)
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, hidden.shape), hidden, 0.0) @ down


def _sparse(x, gate, up, down):
    hidden = jax.nn.relu(x @ gate) * (x @ up)
    return hidden @ down + jnp.abs(hidden).mean()


def _fused(x, gate, up, down):
    z, u = jnp.split(x @ jnp.concatenate([gate, up], axis=1), 2, axis=-1)
    return (jax.nn.silu(z) * u) @ down


def _mlp(activation, x, gate, up, down):
    return (activation(x @ gate) * (x @ up)) @ down


def _swapped(x, gate, up, down):
    return ((x @ up) * jax.nn.gelu(x @ gate)) @ down


def _sigmoid_apart(x, gate, up, down):
    z = x @ gate
    return (z * ((x @ up) * jax.nn.sigmoid(z))) @ down


TABLE = [
    Pattern("SwiGLU", functools.partial(_mlp, jax.nn.silu)),
    Pattern("GeGLU", functools.partial(_mlp, jax.nn.gelu)),
    Pattern("exact GeGLU", functools.partial(_mlp, functools.partial(jax.nn.gelu, approximate=False))),
    Pattern("ReGLU", functools.partial(_mlp, jax.nn.relu)),
    Pattern("ReGLU by maximum", functools.partial(_mlp, lambda z: jnp.maximum(z, 0))),
    Pattern("swish by hand", functools.partial(_mlp, _swish)),
    Pattern("sigmoid apart", _sigmoid_apart),
    Pattern("GELU by hand", functools.partial(_mlp, _gelu_by_hand)),
    Pattern("up first", _swapped),
    Pattern(
        "einsum", lambda x, g, u, d: jnp.einsum("btf,fd->btd", nn.silu(jnp.einsum("btd,df->btf", x, g)) * (x @ u), d)
    ),
    Pattern("linen", _linen),
    Pattern("nnx", lambda x, g, u, d: _Nnx(g, u, d)(x)),
    Pattern("flattened", _flat_tokens),
    Pattern("weights turned", _turned),
    Pattern("half precision", _half),
    Pattern("half precision, activation in float32", _float_activation),
    Pattern("named", _named),
    Pattern("checkpointed", jax.checkpoint(functools.partial(_mlp, jax.nn.silu))),
    Pattern("beside a residual", lambda x, g, u, d: x + _mlp(jax.nn.silu, x, g, u, d)),
    Pattern("twice scaled", lambda x, g, u, d: 0.5 * _mlp(jax.nn.silu, 2 * x, g, u, d)),
    Pattern(
        "a bias", lambda x, g, u, d: (jax.nn.silu(x @ g + 0.1 * g[0]) * (x @ u)) @ d, "reads something else|read by"
    ),
    Pattern("dropout", _dropout, "not made of its rows"),
    Pattern("another activation", functools.partial(_mlp, jnp.tanh), "not those of a gated MLP"),
    Pattern("another slope", functools.partial(_mlp, lambda z: z * jax.nn.sigmoid(1.5 * z)), "not those of"),
    Pattern("activations penalised", _sparse, "read by `reduce_sum`"),
    Pattern(
        "half of a gradient stopped",
        functools.partial(_mlp, lambda z: 0.5 * jax.nn.silu(z) + 0.5 * jax.lax.stop_gradient(jax.nn.silu(z))),
        "gradients are not",
    ),
    Pattern("gate and up of one product", _fused, ""),
    Pattern("no gate", lambda x, g, u, d: jax.nn.silu(x @ g) @ d + 0 * (x @ u) @ d, ""),
]


def _arguments():
    random = np.random.default_rng(0)
    shapes = (*TOKENS, DIM), (DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def _step(apply):
    def loss(x, *weights):
        out = apply(jnp.sin(x), *weights)
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))).sum()

    return jax.value_and_grad(loss, (0, 1, 2, 3))


def _flat(step, arguments):
    flat = _inline.inline(jax.make_jaxpr(step)(*arguments))
    return c.close(c.dce(flat)[0], c.jaxpr_consts(flat))


def _rewritten(before, target=None, kernels=FOUND):
    result = kernels.rewrite(before, Context(target=target))
    if result is None or not result.rows:
        return result, before
    flat = _inline.inline(result.closed)
    flat = c.close(c.dce(flat)[0], c.jaxpr_consts(flat))
    c.check(flat)
    return result, flat


def _equal(before, after, arguments, tolerance=5e-6):
    leaves = jax.tree.leaves(arguments)
    for plain, kernel in zip(eager.evaluate(before, *leaves), eager.evaluate(after, *leaves), strict=True):
        plain, kernel = np.asarray(plain, np.float64), np.asarray(kernel, np.float64)
        assert np.abs(plain - kernel).max() <= tolerance * np.abs(plain).max()


def _equations(jaxpr):
    for eqn in c.open_jaxpr(jaxpr).eqns:
        yield eqn
        for _, _, body in c.subjaxprs(eqn.params):
            yield from _equations(body)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("pattern", TABLE, ids=lambda pattern: pattern.name)
def test_what_is_found_has_equal_gradients_and_what_is_left_a_reason(pattern):
    arguments = _arguments()
    before = _flat(_step(pattern.apply), arguments)
    result, after = _rewritten(before)
    if "exact" in pattern.name and any(eqn.primitive.name == "custom_jvp_call" for eqn in _equations(before)):
        # Newer releases of JAX take the slope from bits of the gate, in a call that is not looked into.
        assert result.rows == () and "read by `custom_jvp_call`" in result.left[0].why
    elif pattern.left == "":
        assert result is None
    elif pattern.left is not None:
        assert result is not None and result.rows == ()
        assert re.search(pattern.left, result.left[0].why), result.left
    else:
        assert result is not None and len(result.rows) == 1 and result.left == (), result and result.left
        _equal(before, after, arguments, 2e-2 if "half" in pattern.name else 5e-6)


def test_the_table_is_long_enough():
    assert sum(p.left is None for p in TABLE) >= 18
    assert sum(p.left is not None for p in TABLE) >= 6


@pytest.mark.parametrize("inside", [lambda f: f, jax.checkpoint], ids=["plain", "checkpointed"])
def test_a_pair_of_loops_stacks_rows_in_place_of_hidden_activations(inside):
    def loss(x, *weights):
        layer = inside(functools.partial(_mlp, jax.nn.silu))
        return jnp.sin(jax.lax.scan(lambda x, w: (x + layer(jnp.cos(x), *w), None), x, weights)[0]).sum()

    x, *weights = _arguments()
    arguments = x, *(jnp.stack([w, 0.5 * w, 2 * w]) for w in weights)
    before = _flat(jax.value_and_grad(loss, (0, 1, 2, 3)), arguments)
    result, after = _rewritten(before)
    assert [row.choice for row in result.rows] == ["kernel"] and "forward and backward" in result.rows[0].reason
    scans = [eqn for eqn in c.open_jaxpr(after).eqns if eqn.primitive.name == "scan"]
    assert not [v for eqn in scans for v in eqn.outvars if v.aval.shape == (3, *TOKENS, HIDDEN)]
    _equal(before, after, arguments)


def test_frozen_weights_and_a_forward_pass_alone():
    arguments = _arguments()
    loss = lambda x, *weights: jnp.sin(_mlp(jax.nn.silu, jnp.sin(x), *weights)).sum()  # noqa: E731
    for step, passes in ((jax.value_and_grad(loss), "forward and backward"), (loss, "forward,")):
        before = _flat(step, arguments)
        result, after = _rewritten(before)
        assert passes in result.rows[0].reason
        _equal(before, after, arguments)


def test_hidden_activations_are_gone_and_the_tpu_gets_its_kernels():
    x = jax.ShapeDtypeStruct
    shapes = (512, 128), (128, 1024), (128, 1024), (1024, 128)
    arguments = [x(shape, jnp.bfloat16) for shape in shapes]
    loss = lambda *arguments: _mlp(jax.nn.silu, *arguments).astype(jnp.float32).sum()  # noqa: E731
    result, after = _rewritten(_flat(jax.value_and_grad(loss, (0, 1, 2, 3)), arguments), Target.parse("tpu:v5e:1x1"))
    assert "tpu kernel" in result.rows[0].reason
    eqns = list(_equations(after))
    assert sum(eqn.primitive.name == "pallas_call" for eqn in eqns) == 2
    assert all(v.aval.shape != (512, 1024) for eqn in eqns for v in eqn.outvars)


def _large_step():
    def loss(weights, x):
        layer = lambda x, w: (x + _mlp(jax.nn.silu, jnp.sin(x), *w), None)  # noqa: E731
        return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

    def step(weights, x):
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights, x))

    x = jax.ShapeDtypeStruct
    shapes = (4, 512, 2048), (4, 512, 2048), (4, 2048, 512)
    return step, [[x(shape, jnp.bfloat16) for shape in shapes], x((8192, 512), jnp.bfloat16)]


@pytest.mark.loose_promotion
def test_the_planner_takes_large_ones_for_memory_and_passes_small_ones_over():
    step, arguments = _large_step()
    closed = jax.jit(step).trace(*arguments).jaxpr
    ladder = make_ladder(
        closed, donated=[True] * 3 + [False], target=Target.parse("tpu:v5e:1x1"), passes=[Remat(), Kernels()]
    )
    roomy, tight = (ladder.plan(i) for i in (1, len(ladder.rungs) - 1))
    assert roomy.rewrites == () and tight.rewrites == ("Kernels: gated MLPs",)
    small = _flat(_step(functools.partial(_mlp, jax.nn.silu)), _arguments())
    assert Kernels().rewrite(small, Context(target=None)) is None
    outcome = _rewrite.apply(small, _rewrite.rewriters([FOUND]), Context(target=None))
    assert outcome.applied == ("Kernels: gated MLPs",)
