"""4-bit AdamW: two codes a byte for each moment.

In come the usual settings, out come optax transformations. First moments take the framework's `Dynamic(4)` codes in
blocks of 128, second moments its `RankOne(4)` codes; only names, defaults and documentation are here.
"""

from __future__ import annotations

from typing import Any

import optax

from memopt._codecs_maps import Dynamic, RankOne
from memopt.optim._encoded import Stores, scale_by_encoded_adam
from memopt.optim._leaves import finish, static_int
from memopt.optim._rounding import stochastic_rounding as round_stochastically


def scale_by_adam_4bit(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    block: int = 128,
    min_size: int = 4096,
    stable_embedding: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by Adam, its moments stored in 4 bits each.

    Memory: 1 byte a parameter for both moments, 4 a block of the first, and 4 a row and a column of the second: about
    1.03 bytes in place of 8 (float32). Cost: decoding, encoding and packing, fused by XLA.

    The second moment has no code for zero, so no update divides by nothing. Its scale is the smaller of the largest
    value of a row and of a column, so that an outlier spoils neither.

    Args:
      b1, b2, eps: as in `optax.scale_by_adam`.
      block: elements of the first moment that share a scale: of a column of the last two axes, or of a row where rows
        are no longer than a block or no multiple of 32.
      min_size: leaves with fewer elements keep plain float32 moments.
      stable_embedding: keep plain float32 moments of leaves named as embeddings or output heads.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` the integers belong into `static_args`.

    Raises:
      TypeError: an integer setting is traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from memopt.optim import scale_by_adam_4bit
      >>> state = jax.eval_shape(scale_by_adam_4bit().init, jnp.zeros((2048, 2048)))
      >>> bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.leaves))
      >>> round(bytes_ / 2048**2, 3)
      1.035

    Source: Li et al. 2023, "Memory efficient optimizers with 4-bit states", sections 3 and 4.

    Limits: a second moment far below its row's and its column's is rounded up to a sixteenth of their smaller maximum.
    """
    block, min_size = static_int("block", block), static_int("min_size", min_size)
    stores = Stores(Dynamic(4, True, block, down=True), RankOne(4), min_size, stable_embedding)
    return scale_by_encoded_adam(stores, b1, b2, eps)


def adamw_4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    block: int = 128,
    min_size: int = 4096,
    stable_embedding: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make AdamW with 4-bit moments; settings of `optax.adamw` carry over unchanged.

    Memory and cost: those of `scale_by_adam_4bit`.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps, block, min_size, stable_embedding: as in `scale_by_adam_4bit`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random, in place of a float32 copy.
      seed: seeds the rounding.

    Returns:
      An optax transformation.

    Raises:
      TypeError: an integer setting is traced.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from memopt.optim import adamw_4bit
      >>> optimizer = adamw_4bit(0.5)
      >>> params = jnp.ones((64, 64))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> round(float(optax.apply_updates(params, updates)[0, 0]), 3)
      0.5

    Source: Li et al. 2023, "Memory efficient optimizers with 4-bit states".
    """
    core = scale_by_adam_4bit(b1, b2, eps, block=block, min_size=min_size, stable_embedding=stable_embedding)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
