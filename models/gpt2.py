"""GPT-2 in Flax linen, its layers scanned or unrolled.

In come tokens, out go logits. The model saves no memory in any way: attention is two einsums and a float32 softmax,
every layer keeps what `jax.grad` keeps. It imports neither memopt nor an optimizer; steps are made in `steps.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .common import attention_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Sizes and dtypes of a GPT-2.

    Args:
        vocabulary: number of tokens.
        length: longest sequence, the number of learned positions.
        layers: number of blocks.
        width: features of the residual stream; the MLP has four times as many.
        heads: attention heads, a divisor of `width`.
        dropout: rate after the embedding and after both branches of a block; 0 needs no random key.
        scan: run the blocks as one `nn.scan` over stacked parameters, else unrolled.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: `width` is not a multiple of `heads`.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", table 2.
    """

    vocabulary: int = 50_257
    length: int = 1_024
    layers: int = 12
    width: int = 768
    heads: int = 12
    dropout: float = 0.0
    scan: bool = True
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: change one of them")


GPT2_124M = GPT2Config()
GPT2_355M = GPT2Config(layers=24, width=1_024, heads=16)
GPT2_774M = GPT2Config(layers=36, width=1_280, heads=20)
GPT2_1558M = GPT2Config(layers=48, width=1_600, heads=25)
GPT2_SMALL_FORM = GPT2Config(vocabulary=8_192, layers=4)
GPT2_TINY = GPT2Config(vocabulary=256, length=32, layers=2, width=32, heads=4, dtype=jnp.float32)
GPT_BYTES = GPT2Config(vocabulary=256, length=256, layers=8, width=256, heads=8, dtype=jnp.float32)


class Attention(nn.Module):
    """Causal self-attention in einsum form: `[batch, length, width]` to the same.

    Memory: scores and weights of `heads * length**2` values a sequence, once in float32 and once in `dtype`.
    The values named `q`, `k`, `v` and `o` can be picked by a `jax.checkpoint` policy.
    """

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        qkv = _dense(config, 3 * config.width, "qkv")(x)
        q, k, v = (_heads(part, config.heads) for part in jnp.split(qkv, 3, axis=-1))
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        o = jnp.einsum("bhqk,bkhd->bqhd", attention_weights(scores, causal=True), v)
        o = checkpoint_name(o.reshape(x.shape), "o")
        return _dense(config, config.width, "out", branch=True)(o)


class MLP(nn.Module):
    """Two dense layers with a tanh GELU between: `[batch, length, width]` to the same."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(_dense(self.config, 4 * self.config.width, "up")(x))
        return _dense(self.config, self.config.width, "down", branch=True)(hidden)


class Block(nn.Module):
    """One pre-norm layer; returns `(x, None)`, the form that `nn.scan` wants."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + _dropout(self.config, Attention(self.config, name="attn")(_norm(self.config, "ln_1")(x)))
        x = x + _dropout(self.config, MLP(self.config, name="mlp")(_norm(self.config, "ln_2")(x)))
        return x, None


class GPT2(nn.Module):
    """Predict the next token at each position.

    Memory: naive; at 8 sequences of 1,024 tokens a 124M step needs 19 GiB under XLA:TPU.

    Args:
        config: the sizes.
        block: the class of one layer. A caller may pass a lifted one, such as `nn.remat(Block)`.

    Call it with `tokens`, int32 `[batch, length]`; it returns logits `[batch, length, vocabulary]` in `config.dtype`.
    With dropout, pass `rngs={"dropout": key}` to `apply`. The head is tied to the token embedding.

    Example:
        >>> model = GPT2(GPT2_TINY)
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 8, 256)

    Source: Radford et al. 2019; the layer is that of Vaswani et al. 2017 with the norms moved in front.
    """

    config: GPT2Config
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        embed = _embed(config, config.vocabulary, 0.02, "wte")
        positions = _embed(config, config.length, 0.01, "wpe")(jnp.arange(tokens.shape[-1])[None])
        x = _dropout(config, embed(tokens) + positions)
        x = self._scanned(x) if config.scan else self._unrolled(x)
        return embed.attend(_norm(config, "ln_f")(x))

    def _scanned(self, x: jax.Array) -> jax.Array:
        rngs: dict[Any, bool] = {"params": True, "dropout": True}
        layers = nn.scan(self.block, variable_axes={"params": 0}, split_rngs=rngs, length=self.config.layers)
        return layers(self.config, name="blocks")(x, None)[0]

    def _unrolled(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.layers):
            x, _ = self.block(self.config, name=f"block_{i}")(x)
        return x


def _heads(x: jax.Array, heads: int) -> jax.Array:
    """Split the features: `[batch, length, width]` to `[batch, length, heads, width // heads]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _dense(config: GPT2Config, features: int, name: str, *, branch: bool = False) -> nn.Dense:
    """Make a dense layer; the last one of a branch starts smaller by the root of the number of branches."""
    init = nn.initializers.normal(0.02 * (2 * config.layers) ** -0.5 if branch else 0.02)
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)


def _norm(config: GPT2Config, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _embed(config: GPT2Config, entries: int, scale: float, name: str) -> nn.Embed:
    init = nn.initializers.normal(scale)
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nn.Embed(entries, config.width, embedding_init=init, name=name, **dtypes)


def _dropout(config: GPT2Config, x: jax.Array) -> jax.Array:
    return nn.Dropout(config.dropout, deterministic=False)(x) if config.dropout else x
