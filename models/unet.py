"""The U-Net for two and three dimensions in Flax linen.

In come images or volumes, out go logits for each pixel or voxel. Its skip connections live from the first layers to the
last. The model saves no memory in any way, and imports neither memopt nor an optimizer; steps are made in `steps.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes and dtypes of a U-Net.

    Args:
        spatial: height and width, or depth, height and width; each a multiple of `2 ** (levels - 1)`.
        channels: channels of the input.
        classes: number of classes.
        levels: resolutions, the full one included.
        width: channels of the first level; each further one has twice as many.
        norm: batch normalization after each convolution, and the channels doubled before each pooling, as in 3-D.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: a spatial size cannot be halved `levels - 1` times.

    Source: Ronneberger et al. 2015, "U-Net", figure 1; Çiçek et al. 2016, "3D U-Net", figure 2.
    Limits: convolutions are padded to keep the size, where the papers let the borders go; the parameters are the same.
    """

    spatial: tuple[int, ...] = (512, 512)
    channels: int = 1
    classes: int = 2
    levels: int = 5
    width: int = 64
    norm: bool = False
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if any(size % 2 ** (self.levels - 1) for size in self.spatial):
            step = 2 ** (self.levels - 1)
            raise ValueError(f"spatial {self.spatial} holds a size that is no multiple of {step}: change it or levels")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return the shape of one image or volume: the spatial sizes, then the channels."""
        return (*self.spatial, self.channels)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Return the shape of one label: a class a pixel or voxel."""
        return self.spatial


UNET_2D = UNetConfig()
UNET_3D = UNetConfig(spatial=(64, 128, 128), channels=3, classes=3, levels=4, norm=True)
UNET_2D_SMALL_FORM = UNetConfig(spatial=(128, 128), levels=4, width=32)
UNET_3D_SMALL_FORM = UNetConfig(spatial=(32, 32, 32), channels=3, classes=3, levels=3, width=16, norm=True)
UNET_2D_TINY = UNetConfig(spatial=(16, 16), levels=3, width=4, dtype=jnp.float32)
UNET_3D_TINY = UNetConfig(spatial=(8, 8, 8), levels=3, width=4, norm=True, dtype=jnp.float32)


class ConvPair(nn.Module):
    """Two 3-wide convolutions with ReLU, and batch normalization between where the configuration asks for it.

    Args:
        config: the sizes of the network.
        channels: channels after each of the two convolutions.
        train: normalize by the batch and update the statistics, else by the running ones.
    """

    config: UNetConfig
    channels: tuple[int, int]
    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        kernel, init = (3,) * len(config.spatial), nn.initializers.he_normal()
        for i, channels in enumerate(self.channels):
            x = nn.Conv(channels, kernel, kernel_init=init, name=f"conv_{i}", **dtypes)(x)
            if config.norm:
                x = nn.BatchNorm(not self.train, momentum=0.9, epsilon=1e-5, name=f"norm_{i}", **dtypes)(x)
            x = nn.relu(x)
        return x


class UNet(nn.Module):
    """Classify each pixel or voxel: down through the levels, up again, with a skip connection at each.

    Memory: naive; the skip connections of the first levels are the largest values and live the longest.

    Args:
        config: the sizes; the number of spatial dimensions is that of `config.spatial`.
        block: the class of a pair of convolutions. A caller may pass a lifted one, such as `nn.remat(ConvPair)`.
        train: normalize by the batch, else by the running statistics. Without `config.norm` it has no effect.

    Call it with `images`, `[batch, *spatial, channels]`; it returns logits `[batch, *spatial, classes]` in
    `config.dtype`. With `config.norm` and `train`, apply it with `mutable=["batch_stats"]`.

    Example:
        >>> model = UNet(UNET_2D_TINY)
        >>> images = jnp.zeros((1, 16, 16, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> model.apply(variables, images).shape
        (1, 16, 16, 2)

    Source: Ronneberger et al. 2015; Çiçek et al. 2016.
    """

    config: UNetConfig
    block: type[nn.Module] = ConvPair
    train: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        two = (2,) * len(config.spatial)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        x, skips = images, []
        for level in range(config.levels):
            x = nn.max_pool(x, two, two) if level else x
            x = self.block(config, self._down_channels(level), self.train, name=f"down_{level}")(x)
            skips.append(x)
        for level in reversed(range(config.levels - 1)):
            channels = x.shape[-1] if config.norm else x.shape[-1] // 2
            up = nn.ConvTranspose(channels, two, two, use_bias=not config.norm, name=f"widen_{level}", **dtypes)(x)
            x = jnp.concatenate([skips[level], up], axis=-1)
            x = self.block(config, (config.width * 2**level,) * 2, self.train, name=f"up_{level}")(x)
        return nn.Conv(config.classes, (1,) * len(two), name="head", **dtypes)(x)

    def _down_channels(self, level: int) -> tuple[int, int]:
        """Return the channels after each convolution of a level on the way down."""
        channels = self.config.width * 2**level
        return (channels // 2, channels) if self.config.norm else (channels, channels)
