"""The residual network for images in Flax linen, with batch normalization.

In come images, out go logits of classes and, through the `batch_stats` collection, new running statistics. The model
saves no memory in any way. It imports neither memopt nor an optimizer; steps are made in `steps.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes and dtypes of a residual network.

    Args:
        image: height and width of an image in pixels.
        classes: number of classes.
        stages: number of blocks of each stage; a stage halves the image and doubles the channels.
        width: channels of the first stage.
        bottleneck: blocks of three convolutions with four times the channels at their ends, else of two.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Source: He et al. 2016, "Deep residual learning for image recognition", table 1.
    """

    image: int = 224
    classes: int = 1_000
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    bottleneck: bool = True
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return the shape of one image: height, width, channels."""
        return (self.image, self.image, 3)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Return the shape of one label: a class an image."""
        return ()


RESNET18 = ResNetConfig(stages=(2, 2, 2, 2), bottleneck=False)
RESNET50 = ResNetConfig()
RESNET_TINY = ResNetConfig(image=16, classes=10, stages=(1, 1), width=8, dtype=jnp.float32)


class Block(nn.Module):
    """One residual block of two or three convolutions; its shortcut is a projection where the shape changes.

    Args:
        config: the sizes of the network.
        channels: channels inside the block; a bottleneck gives out four times as many.
        stride: 2 to halve height and width, else 1. In a bottleneck the middle convolution has it.
        train: normalize by the batch and update the statistics, else by the running ones.
    """

    config: ResNetConfig
    channels: int
    stride: int = 1
    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = ((1, 1), (3, self.stride), (1, 1)) if self.config.bottleneck else ((3, self.stride), (3, 1))
        out = self.channels * (4 if self.config.bottleneck else 1)
        y = x
        for i, (kernel, stride) in enumerate(sizes[:-1]):
            y = nn.relu(self._conv_norm(y, self.channels, kernel, stride, str(i)))
        y = self._conv_norm(y, out, *sizes[-1], str(len(sizes) - 1))
        if x.shape != y.shape:
            x = self._conv_norm(x, out, 1, self.stride, "shortcut")
        return nn.relu(x + y)

    def _conv_norm(self, x: jax.Array, channels: int, kernel: int, stride: int, name: str) -> jax.Array:
        x = _conv(self.config, channels, kernel, stride, f"conv_{name}")(x)
        return _norm(self.config, self.train, f"norm_{name}")(x)


class ResNet(nn.Module):
    """Classify images with a stack of residual blocks.

    Memory: naive; each convolution, normalization and ReLU keeps its input.

    Args:
        config: the sizes.
        block: the class of one block. A caller may pass a lifted one, such as `nn.remat(Block)`.
        train: normalize by the batch, else by the running statistics.

    Call it with `images`, `[batch, height, width, 3]`; it returns logits `[batch, classes]` in `config.dtype`. With
    `train`, apply it with `mutable=["batch_stats"]`.

    Example:
        >>> model = ResNet(RESNET_TINY)
        >>> images = jnp.zeros((1, 16, 16, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> model.apply(variables, images, mutable=["batch_stats"])[0].shape
        (1, 10)

    Source: He et al. 2016; batch normalization is of Ioffe and Szegedy 2015.
    """

    config: ResNetConfig
    block: type[nn.Module] = Block
    train: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        x = _conv(config, config.width, 7, 2, "conv_stem")(images)
        x = nn.relu(_norm(config, self.train, "norm_stem")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(config.stages):
            for i in range(blocks):
                stride, name = 2 if stage and not i else 1, f"stage_{stage}_block_{i}"
                x = self.block(config, config.width * 2**stage, stride, self.train, name=name)(x)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        return nn.Dense(config.classes, name="head", **dtypes)(x.mean(axis=(1, 2)))


def _conv(config: ResNetConfig, channels: int, kernel: int, stride: int, name: str) -> nn.Conv:
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    init = nn.initializers.he_normal()
    return nn.Conv(channels, (kernel,) * 2, stride, use_bias=False, kernel_init=init, name=name, **dtypes)


def _norm(config: ResNetConfig, train: bool, name: str) -> nn.BatchNorm:
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name, **dtypes)
