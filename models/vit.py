"""The vision transformer in Flax linen, its layers unrolled or scanned.

In come images, out go logits of classes. The model saves no memory in any way: attention is two einsums and a float32
softmax. It imports neither memopt nor an optimizer; steps are made in `steps.py`.
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
class ViTConfig:
    """Sizes and dtypes of a vision transformer.

    Args:
        image: height and width of an image in pixels, a multiple of `patch`.
        patch: height and width of a patch in pixels.
        classes: number of classes.
        layers: number of blocks.
        width: features of the residual stream; the MLP has four times as many.
        heads: attention heads, a divisor of `width`.
        scan: run the blocks as one `nn.scan` over stacked parameters, else unrolled.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: `image` is not a multiple of `patch`, or `width` not one of `heads`.

    Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words", table 1.
    """

    image: int = 224
    patch: int = 16
    classes: int = 1_000
    layers: int = 12
    width: int = 768
    heads: int = 12
    scan: bool = False
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise ValueError(f"image {self.image} is not a multiple of patch {self.patch}: change one of them")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: change one of them")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return the shape of one image: height, width, channels."""
        return (self.image, self.image, 3)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Return the shape of one label: a class an image."""
        return ()


VIT_B16 = ViTConfig()
VIT_L16 = ViTConfig(layers=24, width=1_024, heads=16)
VIT_SMALL_FORM = ViTConfig(layers=4)
VIT_TINY = ViTConfig(image=16, patch=4, classes=10, layers=2, width=32, heads=4, dtype=jnp.float32)


class Attention(nn.Module):
    """Self-attention over all patches in einsum form: `[batch, patches, width]` to the same.

    Memory: scores and weights of `heads * patches**2` values an image, once in float32 and once in `dtype`.
    The values named `q`, `k`, `v` and `o` can be picked by a `jax.checkpoint` policy.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        heads = (*x.shape[:-1], config.heads, config.width // config.heads)
        q, k, v = (
            checkpoint_name(part.reshape(heads), name)
            for part, name in zip(jnp.split(_dense(config, 3 * config.width, "qkv")(x), 3, axis=-1), "qkv", strict=True)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        o = jnp.einsum("bhqk,bkhd->bqhd", attention_weights(scores, causal=False), v)
        return _dense(config, config.width, "out")(checkpoint_name(o.reshape(x.shape), "o"))


class MLP(nn.Module):
    """Two dense layers with an exact GELU between: `[batch, patches, width]` to the same."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(_dense(self.config, 4 * self.config.width, "up")(x), approximate=False)
        return _dense(self.config, self.config.width, "down")(hidden)


class Block(nn.Module):
    """One pre-norm layer; returns `(x, None)`, the form that `nn.scan` wants."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + Attention(self.config, name="attn")(_norm(self.config, "ln_1")(x))
        x = x + MLP(self.config, name="mlp")(_norm(self.config, "ln_2")(x))
        return x, None


class ViT(nn.Module):
    """Classify images from their patches and a class token.

    Memory: naive; every layer keeps all that its backward pass reads.

    Args:
        config: the sizes.
        block: the class of one layer. A caller may pass a lifted one, such as `nn.remat(Block)`.

    Call it with `images`, `[batch, height, width, 3]`; it returns logits `[batch, classes]` in `config.dtype`.

    Example:
        >>> model = ViT(VIT_TINY)
        >>> images = jnp.zeros((1, 16, 16, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> model.apply(variables, images).shape
        (1, 10)

    Source: Dosovitskiy et al. 2021, equations 1 to 4.
    """

    config: ViTConfig
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = self._embed(images)
        x = self._scanned(x) if self.config.scan else self._unrolled(x)
        return _dense(self.config, self.config.classes, "head")(_norm(self.config, "ln_f")(x[:, 0]))

    def _embed(self, images: jax.Array) -> jax.Array:
        """Cut images into patches, put the class token in front and add the positions."""
        config = self.config
        size = (config.patch, config.patch)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        patches = nn.Conv(config.width, size, strides=size, padding="VALID", name="patch", **dtypes)(images)
        patches = patches.reshape(images.shape[0], -1, config.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, config.width), config.param_dtype)
        token = jnp.broadcast_to(token.astype(config.dtype), (images.shape[0], 1, config.width))
        x = jnp.concatenate([token, patches], axis=1)
        init = nn.initializers.normal(0.02)
        return x + self.param("positions", init, (1, *x.shape[1:]), config.param_dtype).astype(config.dtype)

    def _scanned(self, x: jax.Array) -> jax.Array:
        rngs: dict[Any, bool] = {"params": True}
        layers = nn.scan(self.block, variable_axes={"params": 0}, split_rngs=rngs, length=self.config.layers)
        return layers(self.config, name="blocks")(x, None)[0]

    def _unrolled(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.layers):
            x, _ = self.block(self.config, name=f"block_{i}")(x)
        return x


def _dense(config: ViTConfig, features: int, name: str) -> nn.Dense:
    init = nn.initializers.xavier_uniform()
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)


def _norm(config: ViTConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype, param_dtype=config.param_dtype, name=name)
