"""GPT-2 in Flax nnx, equal to the linen one, and the step that mutates its model and optimizer.

In come tokens, out go logits; the step takes the objects and a batch and returns the loss alone. The model saves no
memory in any way. memopt is not imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from .common import attention_weights, mean_cross_entropy
from .gpt2 import GPT2_SMALL_FORM, GPT2_TINY, GPT2Config
from .states import adamw
from .steps import FAMILIES

NNXStep = Callable[[Any, Any, Any], jax.Array]


class Attention(nnx.Module):
    """Causal self-attention in einsum form: `[batch, length, width]` to the same; values named as in linen."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = _linear(config, config.width, 3 * config.width, rngs)
        self.out = _linear(config, config.width, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (checkpoint_name(part.reshape(shape), name) for part, name in zip(parts, "qkv", strict=True))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        o = jnp.einsum("bhqk,bkhd->bqhd", attention_weights(scores, causal=True), v)
        return self.out(checkpoint_name(o.reshape(x.shape), "o"))


class MLP(nnx.Module):
    """Two linear layers with a tanh GELU between: `[batch, length, width]` to the same."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.up = _linear(config, config.width, 4 * config.width, rngs)
        self.down = _linear(config, 4 * config.width, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """One pre-norm layer: `[batch, length, width]` to the same."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.ln_1, self.ln_2 = _norm(config, rngs), _norm(config, rngs)
        self.attn, self.mlp = Attention(config, rngs=rngs), MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + _drop(self.dropout, self.attn(self.ln_1(x)))
        return x + _drop(self.dropout, self.mlp(self.ln_2(x)))


class GPT2(nnx.Module):
    """Predict the next token at each position; the parameters are named as in the linen GPT-2.

    Memory: naive, as the linen one. The blocks are unrolled, in `blocks[i]`; `config.scan` is not read.

    Args:
        config: the sizes.
        rngs: streams `params`, and `dropout` where the configuration has any.

    Call it with `tokens`, int32 `[batch, length]`; it returns logits `[batch, length, vocabulary]` in `config.dtype`.

    Example:
        >>> model = GPT2(GPT2_TINY, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 256)

    Source: Radford et al. 2019.
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.wte, self.wpe = _embed(config, config.vocabulary, rngs), _embed(config, config.length, rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.ln_f = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = _drop(self.dropout, self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[-1])[None]))
        for block in self.blocks:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


def from_linen(config: GPT2Config, params: Mapping[str, Any]) -> GPT2:
    """Make the nnx model with the parameters of an unrolled linen one.

    Args:
        config: the sizes of both.
        params: the `params` collection; that of a scanned model goes through `common.unstack_layers` first.

    Returns:
        A model that computes the same logits.

    Example:
        >>> from memopt.models import gpt2
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> unrolled = GPT2Config(**{**vars(GPT2_TINY), "scan": False})
        >>> params = gpt2.GPT2(unrolled).init(jax.random.key(0), tokens)["params"]
        >>> bool((from_linen(GPT2_TINY, params).wte.embedding[...] == params["wte"]["embedding"]).all())
        True
    """
    model = GPT2(config, rngs=nnx.Rngs(0))
    blocks = {i: params[f"block_{i}"] for i in range(config.layers)}
    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    nnx.update(model, nnx.State(rest | {"blocks": blocks}))
    return model


def train_step(model: GPT2, optimizer: nnx.Optimizer, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Take one step on `{"tokens", "labels"}`, changing `model` and `optimizer` in place; return the mean loss."""
    loss, grads = nnx.value_and_grad(_loss)(model, batch)
    optimizer.update(model, grads)
    return loss


def nnx_step(
    *,
    small: bool = False,
    tiny: bool = False,
    batch: int | None = None,
    seed: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    **overrides: Any,
) -> tuple[NNXStep, tuple[GPT2, nnx.Optimizer, dict[str, Any]], dict[str, Any]]:
    """Build the nnx twin of `reference_step("gpt2")`.

    Args:
        small: the small form, 4 layers and 8,192 tokens of vocabulary.
        tiny: a form for tests that run; wins over `small`.
        batch: number of sequences; None for 8, or 2 for the tiny form.
        seed: None for shapes alone; a number makes real arrays from that seed.
        optimizer: an optax transformation; None for `adamw()`.
        **overrides: fields of `GPT2Config`, such as `dropout=0.1`; `depth` sets its `layers`.

    Returns:
        `(step, args, options)`: `step(model, optimizer, batch)` changes its first two arguments and returns the loss;
        the leaves of `args` are `jax.ShapeDtypeStruct`, or arrays with `seed`; `options` donates model and optimizer.

    Raises:
        TypeError: an override is no field of `GPT2Config`.

    Example:
        >>> step, args, options = nnx_step(tiny=True, seed=0)
        >>> step(*args).shape, int(args[1].step[...])
        ((), 1)
    """
    form = GPT2_TINY if tiny else GPT2_SMALL_FORM if small else FAMILIES["gpt2"].full
    changes = {"layers" if field == "depth" else field: value for field, value in overrides.items()}
    config = GPT2Config(**{**vars(form), **changes})
    make = functools.partial(_objects, config, optimizer or adamw(), seed or 0)
    model, state = nnx.eval_shape(make) if seed is None else make()
    shape = (batch or (2 if tiny else 8), config.length)
    return train_step, (model, state, _tokens(shape, seed)), {"donate_argnums": (0, 1)}


def _objects(config: GPT2Config, optimizer: optax.GradientTransformation, seed: int) -> tuple[GPT2, nnx.Optimizer]:
    model = GPT2(config, rngs=nnx.Rngs(seed, dropout=seed + 1))
    return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)


def _tokens(shape: tuple[int, int], seed: int | None) -> dict[str, Any]:
    if seed is None:
        spec = jax.ShapeDtypeStruct(shape, jnp.int32)
        return {"tokens": spec, "labels": spec}
    tokens = np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "labels": jnp.asarray(np.roll(tokens, -1, axis=-1))}


def _loss(model: GPT2, batch: Mapping[str, jax.Array]) -> jax.Array:
    return mean_cross_entropy(model(batch["tokens"]), batch["labels"])


def _drop(dropout: nnx.Dropout | None, x: jax.Array) -> jax.Array:
    return x if dropout is None else dropout(x)


def _linear(config: GPT2Config, before: int, after: int, rngs: nnx.Rngs) -> nnx.Linear:
    init, dtypes = nnx.initializers.normal(0.02), {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nnx.Linear(before, after, kernel_init=init, rngs=rngs, **dtypes)


def _norm(config: GPT2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nnx.LayerNorm(config.width, epsilon=1e-5, rngs=rngs, **dtypes)


def _embed(config: GPT2Config, entries: int, rngs: nnx.Rngs) -> nnx.Embed:
    init, dtypes = nnx.initializers.normal(0.02), {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nnx.Embed(entries, config.width, embedding_init=init, rngs=rngs, **dtypes)
