"""A matmul into a cross-entropy is found however it is written, replaced with equal gradients, or left with a reason.

In: a table of losses of hidden states, weight and labels. After the rewrite no array is as large as the logits.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memopt import _compat as c
from memopt import _inline
from memopt._contract import Context
from memopt._target import Target
from memopt.passes.kernels import Kernels
from tests import eager

TOKENS, DIM, VOCAB = (2, 3), 8, 20
integer_loss = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A way to write a loss of `hidden`, `weight` and `labels`; `left` is a part of the reason why it stays."""

    name: str
    loss: Callable
    left: str | None = None


def _by_hand(h, w, y):
    logits = (h @ w).astype(jnp.float32)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    lse = jnp.log(jnp.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return (lse - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]).mean()


def _half(h, w, y):
    logits = h.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    return integer_loss(logits.astype(jnp.float32), y).mean()


def _metric(h, w, y):
    logits = h @ w
    return integer_loss(logits, y).mean() + jax.lax.stop_gradient((logits.argmax(-1) == y).mean())


def _z_loss(h, w, y):
    logits = h @ w
    return integer_loss(logits, y).mean() + 1e-2 * (jax.nn.logsumexp(logits, axis=-1) ** 2).mean()


def _one_sequence(h, w, y):
    """Return the loss of a batch of one: JAX gathers along an axis of size 1 in another way."""
    return integer_loss(h.reshape(1, 6, DIM) @ w, y.reshape(1, 6)).mean()


TABLE = [
    Pattern("optax, integer labels, mean", lambda h, w, y: integer_loss(h @ w, y).mean()),
    Pattern("optax, integer labels, sum", lambda h, w, y: integer_loss(h @ w, y).sum()),
    Pattern("optax, one-hot", lambda h, w, y: optax.softmax_cross_entropy(h @ w, jax.nn.one_hot(y, VOCAB)).mean()),
    Pattern("one sum", lambda h, w, y: -(jax.nn.one_hot(y, VOCAB) * jax.nn.log_softmax(h @ w)).sum() / 6),
    Pattern(
        "log_softmax and take_along_axis",
        lambda h, w, y: -jnp.take_along_axis(jax.nn.log_softmax(h @ w), y[..., None], axis=-1).mean(),
    ),
    Pattern("log-sum-exp by hand", _by_hand),
    Pattern("half precision", _half),
    Pattern("tokens flattened", lambda h, w, y: integer_loss(h.reshape(6, DIM) @ w, y.reshape(6)).mean()),
    Pattern("a batch of one", _one_sequence),
    Pattern("tied embedding", lambda h, w, y: integer_loss(h @ w.reshape(VOCAB, DIM).T, y).mean()),
    Pattern("masked tokens", lambda h, w, y: ((y > 9) * integer_loss(h @ w, y)).sum() / (y > 9).sum()),
    Pattern("weighted tokens", lambda h, w, y: (integer_loss(h @ w, y) * jnp.cos(y)).mean()),
    Pattern("a loss of the losses", lambda h, w, y: jnp.tanh(integer_loss(h @ w, y)).mean()),
    Pattern("einsum", lambda h, w, y: integer_loss(jnp.einsum("btd,dv->btv", h, w), y).mean()),
    Pattern("accuracy as well", _metric, left="read by `argmax`"),
    Pattern("z-loss as well", _z_loss, left="no value equals"),
    Pattern("a bias", lambda h, w, y: integer_loss(h @ w + jnp.sin(w[0]), y).mean(), left="something|a result"),
    Pattern(
        "smoothed labels",
        lambda h, w, y: optax.softmax_cross_entropy(h @ w, optax.smooth_labels(jax.nn.one_hot(y, VOCAB), 0.1)).mean(),
        left="no value",
    ),
    Pattern(
        "half of the gradient stopped",
        lambda h, w, y: integer_loss(0.5 * (h @ w) + 0.5 * jax.lax.stop_gradient(h @ w), y).mean(),
        left="no value|multiplied",
    ),
]


def _flat(step, arguments):
    flat = _inline.inline(jax.make_jaxpr(step)(*arguments))
    return c.close(c.dce(flat)[0], c.jaxpr_consts(flat))


def _arguments():
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(*TOKENS, DIM)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(DIM, VOCAB)), jnp.float32)
    return hidden, weight, jnp.asarray(random.integers(0, VOCAB, TOKENS), jnp.int32)


def _rewritten(before, target=None):
    result = Kernels().rewrite(before, Context(target=target))
    if result is None or not result.rows:
        return result, before
    flat = _inline.inline(result.closed)
    flat = c.close(c.dce(flat)[0], c.jaxpr_consts(flat))
    c.check(flat)
    return result, flat


@pytest.mark.loose_promotion
@pytest.mark.parametrize("pattern", TABLE, ids=lambda pattern: pattern.name)
def test_what_is_found_has_equal_gradients_and_what_is_left_a_reason(pattern):
    arguments = _arguments()
    before = _flat(jax.value_and_grad(pattern.loss, (0, 1)), arguments)
    result, after = _rewritten(before)
    if pattern.left is not None:
        assert result is not None and result.rows == ()
        assert re.search(pattern.left, result.left[0].why), result.left
        return
    assert result is not None and len(result.rows) == 1 and result.left == (), result and result.left
    tolerance = 2e-2 if "half" in pattern.name else 5e-6
    for plain, kernel in zip(eager.evaluate(before, *arguments), eager.evaluate(after, *arguments), strict=True):
        plain, kernel = np.asarray(plain, np.float64), np.asarray(kernel, np.float64)
        assert np.abs(plain - kernel).max() <= tolerance * np.abs(plain).max()


def test_logits_are_gone_and_the_tpu_gets_its_kernels():
    x = jax.ShapeDtypeStruct
    arguments = x((256, 128), jnp.bfloat16), x((128, 1024), jnp.bfloat16), x((256,), jnp.int32)

    def loss(h, w, y):
        return integer_loss(jnp.dot(h, w, preferred_element_type=jnp.float32), y).mean()

    result, after = _rewritten(_flat(jax.value_and_grad(loss, (0, 1)), arguments), Target.parse("tpu:v5e:1x1"))
    assert "tpu kernel" in result.rows[0].reason
    eqns = c.open_jaxpr(after).eqns
    assert sum(eqn.primitive.name == "pallas_call" for eqn in eqns) == 2
    assert all(v.aval.shape != (256, 1024) for eqn in eqns for v in eqn.outvars)


def test_the_table_is_long_enough():
    assert sum(p.left is None for p in TABLE) >= 10
    assert sum(p.left is not None for p in TABLE) >= 3
