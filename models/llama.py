"""Llama 3 in Flax linen: grouped-query attention, rotary positions, SwiGLU, RMSNorm; scanned or unrolled.

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

from .common import attention_weights, wide

Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and dtypes of a Llama.

    Args:
        vocabulary: number of tokens.
        length: sequence length of a training step; the parameters do not depend on it.
        layers: number of blocks.
        width: features of the residual stream.
        heads: query heads, a divisor of `width`.
        kv_heads: key and value heads, a divisor of `heads`.
        hidden: features inside the MLP.
        tied: use the token embedding as the head too.
        rope_base: base of the rotary frequencies.
        scan: run the blocks as one `nn.scan` over stacked parameters, else unrolled.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: `width` is not a multiple of `heads`, or `heads` not one of `kv_heads`.

    Source: Dubey et al. 2024, "The Llama 3 herd of models", table 3; the 1B sizes are those of Llama 3.2.
    Limits: the published models stretch their low frequencies for long contexts, which changes no shape; not done here.
    """

    vocabulary: int = 128_256
    length: int = 2_048
    layers: int = 16
    width: int = 2_048
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 8_192
    tied: bool = False
    rope_base: float = 500_000.0
    scan: bool = True
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: change one of them")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: change one of them")


LLAMA_1B = LlamaConfig(tied=True)
LLAMA_1B_UNTIED = LlamaConfig()
LLAMA_4_LAYERS = LlamaConfig(vocabulary=32_000, layers=4, scan=False)
LLAMA_8B = LlamaConfig(layers=32, width=4_096, hidden=14_336)
LLAMA_70B = LlamaConfig(layers=80, width=8_192, heads=64, hidden=28_672)
LLAMA_SMALL_FORM = LlamaConfig(vocabulary=8_192, layers=4)
LLAMA_TINY = LlamaConfig(
    vocabulary=256,
    length=32,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    hidden=96,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
)


def rotation_table(length: int, head_dim: int, base: float, dtype: jax.typing.DTypeLike) -> Rotation:
    """Make the cosines and sines of the rotary positions.

    Args:
        length: number of positions.
        head_dim: features of one head, even.
        base: slowest wavelength over 2 pi.
        dtype: dtype of the tables.

    Returns:
        Cosines and sines, each `[length, head_dim // 2]`.

    Example:
        >>> cos, sin = rotation_table(4, 8, 10_000.0, jnp.float32)
        >>> cos.shape, float(cos[0, 0]), float(sin[0, 0])
        ((4, 4), 1.0, 0.0)

    Source: Su et al. 2021, "RoFormer", section 3.2.2.
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    angles = jnp.outer(jnp.arange(length, dtype=dtype), frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: Rotation) -> jax.Array:
    """Turn each pair of features by its position's angle, in float32.

    Args:
        x: `[batch, length, heads, head_dim]`; feature `i` is paired with `i + head_dim // 2`.
        table: from `rotation_table`.

    Returns:
        An array like `x`.

    Example:
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> bool((rotate(x, rotation_table(4, 8, 10_000.0, jnp.float32))[0, 0] == x[0, 0]).all())
        True
    """
    cos, sin = (part[None, :, None, :] for part in table)
    left, right = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention in einsum form: `[batch, length, width]` to the same.

    Memory: scores and weights of `heads * length**2` values a sequence, once in float32 and once in `dtype`.
    The values named `q`, `k` (both rotated), `v` and `o` can be picked by a `jax.checkpoint` policy.

    Source: Ainslie et al. 2023, "GQA".
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, table: Rotation) -> jax.Array:
        config = self.config
        size = config.width // config.heads
        q, k, v = (
            _dense(config, n * size, name)(x).reshape(*x.shape[:-1], n, size)
            for name, n in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
        )
        q, k = checkpoint_name(rotate(q, table), "q"), checkpoint_name(rotate(k, table), "k")
        v = checkpoint_name(v, "v")
        q = q.reshape(*x.shape[:-1], config.kv_heads, config.heads // config.kv_heads, size)
        scores = jnp.einsum("bqngd,bknd->bngqk", q, k) * size**-0.5
        o = jnp.einsum("bngqk,bknd->bqngd", attention_weights(scores, causal=True), v)
        o = checkpoint_name(o.reshape(x.shape), "o")
        return _dense(config, config.width, "o")(o)


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`, `[batch, length, width]` to the same.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        gate = nn.silu(_dense(config, config.hidden, "gate")(x))
        return _dense(config, config.width, "down")(gate * _dense(config, config.hidden, "up")(x))


class Block(nn.Module):
    """One pre-norm layer; returns `(x, None)`, the form that `nn.scan` wants."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, table: Rotation) -> tuple[jax.Array, None]:
        x = x + Attention(self.config, name="attn")(_norm(self.config, "norm_1")(x), table)
        x = x + MLP(self.config, name="mlp")(_norm(self.config, "norm_2")(x))
        return x, None


class Llama(nn.Module):
    """Predict the next token at each position.

    Memory: naive; at one sequence of 2,048 tokens an untied 1B step needs 29.8 GiB under XLA:TPU.

    Args:
        config: the sizes.
        block: the class of one layer. A caller may pass a lifted one, such as `nn.remat(Block)`.

    Call it with `tokens`, int32 `[batch, length]`; it returns logits `[batch, length, vocabulary]` in `config.dtype`.

    Example:
        >>> model = Llama(LLAMA_TINY)
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 8, 256)

    Source: Touvron et al. 2023, "LLaMA"; Dubey et al. 2024, "The Llama 3 herd of models".
    """

    config: LlamaConfig
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(config.vocabulary, config.width, embedding_init=init, name="embed", **dtypes)
        size = config.width // config.heads
        table = rotation_table(tokens.shape[-1], size, config.rope_base, wide(config.dtype))
        x = self._scanned(embed(tokens), table) if config.scan else self._unrolled(embed(tokens), table)
        x = _norm(config, "norm_f")(x)
        return embed.attend(x) if config.tied else _dense(config, config.vocabulary, "head")(x)

    def _scanned(self, x: jax.Array, table: Rotation) -> jax.Array:
        shared: Any = nn.broadcast
        layers = nn.scan(
            self.block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=shared,
            length=self.config.layers,
        )
        return layers(self.config, name="blocks")(x, table)[0]

    def _unrolled(self, x: jax.Array, table: Rotation) -> jax.Array:
        for i in range(self.config.layers):
            x, _ = self.block(self.config, name=f"block_{i}")(x, table)
        return x


def _dense(config: LlamaConfig, features: int, name: str) -> nn.Dense:
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.normal(0.02), name=name, **dtypes)


def _norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-5, dtype=config.dtype, param_dtype=config.param_dtype, name=name)
