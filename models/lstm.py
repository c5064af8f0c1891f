"""The LSTM language model in Flax linen: a scan over time for each layer.

In come tokens, out go logits. Each layer is one `nn.RNN`, so its loop carries the hidden state from step to step and
stacks what the backward pass reads. The model saves no memory in any way, and imports neither memopt nor an optimizer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

Cell = nn.OptimizedLSTMCell


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """Sizes and dtypes of an LSTM language model.

    Args:
        vocabulary: number of tokens.
        length: sequence length of a training step; the parameters do not depend on it.
        layers: number of recurrent layers.
        width: features of the embedding and of each layer.
        dropout: rate before, between and after the layers; 0 needs no random key.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Source: Zaremba et al. 2014, "Recurrent neural network regularization", section 4.1: medium and large.
    """

    scan: ClassVar[bool] = True

    vocabulary: int = 10_000
    length: int = 35
    layers: int = 2
    width: int = 650
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


LSTM_MEDIUM = LSTMConfig()
LSTM_LARGE = LSTMConfig(width=1_500)
LSTM_SMALL_FORM = LSTMConfig(vocabulary=8_192, width=256)
LSTM_TINY = LSTMConfig(vocabulary=256, length=16, width=16)


class LSTM(nn.Module):
    """Predict the next token at each position from a recurrent state that starts at zero.

    Memory: naive; the gates and both states of every time step are kept for the backward pass.

    Args:
        config: the sizes.
        block: the class of the recurrent cell. A caller may pass a lifted one, such as `nn.remat(Cell)`.

    Call it with `tokens`, int32 `[batch, length]`; it returns logits `[batch, length, vocabulary]` in `config.dtype`.
    With dropout, pass `rngs={"dropout": key}` to `apply`.

    Example:
        >>> model = LSTM(LSTM_TINY)
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 8, 256)

    Source: Hochreiter and Schmidhuber 1997, "Long short-term memory"; Zaremba et al. 2014.
    """

    config: LSTMConfig
    block: type[Any] = Cell

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        x: Any = nn.Embed(config.vocabulary, config.width, name="embed", **dtypes)(tokens)
        for i in range(config.layers):
            cell = self.block(config.width, name=f"cell_{i}", **dtypes)
            x = nn.RNN(cell, name=f"layer_{i}")(self._dropout(x))
        return nn.Dense(config.vocabulary, name="head", **dtypes)(self._dropout(x))

    def _dropout(self, x: jax.Array) -> jax.Array:
        rate = self.config.dropout
        return nn.Dropout(rate, deterministic=False)(x) if rate else x
