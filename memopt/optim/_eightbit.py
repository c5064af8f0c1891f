"""8-bit optimizers: Adam, momentum and Lion with moments in block-wise dynamic codes.

In come the usual settings, out come optax transformations. The codec is `Dynamic(8)` of the framework, the arithmetic
that of `_encoded`; only names, defaults and documentation are here.
"""

from __future__ import annotations

from typing import Any

import optax

from memopt._codecs_maps import Dynamic
from memopt.optim._encoded import Stores, scale_by_encoded_adam, scale_by_encoded_lion, scale_by_encoded_momentum
from memopt.optim._leaves import finish, static_int
from memopt.optim._rounding import stochastic_rounding as round_stochastically


def _stores(block: Any, min_size: Any, stable_embedding: bool) -> Stores:
    block, min_size = static_int("block", block), static_int("min_size", min_size)
    return Stores(Dynamic(8, True, block, down=True), Dynamic(8, False, block, down=True), min_size, stable_embedding)


def scale_by_adam_8bit(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    block: int = 2048,
    min_size: int = 4096,
    stable_embedding: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by Adam, its moments stored in 8 bits each.

    Memory: 2 bytes a parameter and 4 bytes of scale a block for each moment, in place of 8 (float32). A row of the last
    axis is a block where it is no longer than one: 2.02 bytes a parameter at 512 columns. Longer rows have blocks down
    the second last axis where it divides into tiles of 32. XLA:TPU then holds no moment in full precision: new ones are
    made twice, for their scales and for their codes; an update in the gradient's dtype is held.
    Cost: decoding twice and encoding, about 100 element-wise operations a parameter, fused by XLA.

    Args:
      b1, b2, eps: as in `optax.scale_by_adam`.
      block: elements that share a scale, at most.
      min_size: leaves with fewer elements keep plain float32 moments.
      stable_embedding: keep plain float32 moments of leaves named as embeddings or output heads.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` the integers belong into `static_args`.

    Raises:
      TypeError: an integer setting is traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from memopt.optim import scale_by_adam_8bit
      >>> state = jax.eval_shape(scale_by_adam_8bit().init, jnp.zeros((2048, 2048)))
      >>> sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.leaves)) / 2048**2
      2.00390625

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", sections 2.1 to 2.3.

    Limits: the normalised embedding layer of that paper is the model's to have; `stable_embedding` is its 32-bit state.
    The kernel `memopt.pallas_kernels.adam_8bit_update` takes the same state of leaves whose rows are no longer than a
    block, and is not used here: XLA:TPU refuses to
    partition a step that calls one, and a transformation cannot tell whether its step will be sharded; nor could
    `FuseUpdate` take it apart by layer. Its codes differ by one where a value lies at the border of a cell, and it has
    `1 - b2` from float32 (for 0.999 off by 5e-5 of itself). Who writes an unsharded step can call it on a leaf.
    """
    return scale_by_encoded_adam(_stores(block, min_size, stable_embedding), b1, b2, eps)


def scale_by_momentum_8bit(
    momentum: Any = 0.9,
    nesterov: bool = False,
    *,
    block: int = 2048,
    min_size: int = 4096,
    stable_embedding: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Accumulate gradients by heavy-ball momentum, the trace stored in 8 bits.

    Memory: 1 byte a parameter and 4 a block, in place of 4. Cost: as `scale_by_adam_8bit`, for one moment.

    Args:
      momentum: factor of the old trace.
      nesterov: look one step ahead.
      block, min_size, stable_embedding: as in `scale_by_adam_8bit`.

    Returns:
      An optax transformation.

    Raises:
      TypeError: an integer setting is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_momentum_8bit
      >>> optimizer = scale_by_momentum_8bit(0.5)
      >>> gradient = jnp.ones((64, 64))
      >>> _, state = optimizer.update(gradient, optimizer.init(gradient))
      >>> float(optimizer.update(gradient, state)[0][0, 0])
      1.5

    Source: Dettmers et al. 2022, section 2.1.
    """
    return scale_by_encoded_momentum(_stores(block, min_size, stable_embedding), momentum, nesterov)


def scale_by_lion_8bit(
    b1: Any = 0.9,
    b2: Any = 0.99,
    *,
    block: int = 2048,
    min_size: int = 4096,
    stable_embedding: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by Lion, its momentum stored in 8 bits.

    Memory: 1 byte a parameter and 4 a block, in place of 4. Cost: as `scale_by_adam_8bit`, for one moment.

    Args:
      b1, b2: as in `optax.scale_by_lion`.
      block, min_size, stable_embedding: as in `scale_by_adam_8bit`.

    Returns:
      An optax transformation.

    Raises:
      TypeError: an integer setting is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_lion_8bit
      >>> optimizer = scale_by_lion_8bit()
      >>> gradient = jnp.full((64, 64), -3.0)
      >>> float(optimizer.update(gradient, optimizer.init(gradient))[0][0, 0])
      -1.0

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", program 1; the codes as
    `scale_by_adam_8bit`.
    """
    return scale_by_encoded_lion(_stores(block, min_size, stable_embedding), b1, b2)


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    block: int = 2048,
    min_size: int = 4096,
    stable_embedding: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make AdamW with 8-bit moments; settings of `optax.adamw` carry over unchanged.

    Memory and cost: those of `scale_by_adam_8bit`.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps, block, min_size, stable_embedding: as in `scale_by_adam_8bit`.
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
      >>> from memopt.optim import adamw_8bit
      >>> optimizer = adamw_8bit(0.5)
      >>> params = jnp.ones((64, 64))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> round(float(optax.apply_updates(params, updates)[0, 0]), 3)
      0.5

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization".
    """
    core = scale_by_adam_8bit(b1, b2, eps, block=block, min_size=min_size, stable_embedding=stable_embedding)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)


def adam_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    *,
    block: int = 2048,
    min_size: int = 4096,
    stable_embedding: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make Adam with 8-bit moments; settings of `optax.adam` carry over unchanged.

    Memory and cost: those of `scale_by_adam_8bit`.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps, block, min_size, stable_embedding: as in `scale_by_adam_8bit`.
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
      >>> from memopt.optim import adam_8bit
      >>> optimizer = adam_8bit(0.5)
      >>> params = jnp.ones((64, 64))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> round(float(optax.apply_updates(params, updates)[0, 0]), 3)
      0.5

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization".
    """
    core = scale_by_adam_8bit(b1, b2, eps, block=block, min_size=min_size, stable_embedding=stable_embedding)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)


def momentum_8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.9,
    nesterov: Any = False,
    weight_decay: Any = 0.0,
    mask: Any = None,
    *,
    block: int = 2048,
    min_size: int = 4096,
    stable_embedding: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make gradient descent with an 8-bit momentum.

    Memory and cost: those of `scale_by_momentum_8bit`.

    Args:
      learning_rate: a number or an optax schedule.
      momentum, nesterov, block, min_size, stable_embedding: as in `scale_by_momentum_8bit`.
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
      >>> from memopt.optim import momentum_8bit
      >>> optimizer = momentum_8bit(0.5)
      >>> params = jnp.ones((64, 64))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> round(float(optax.apply_updates(params, updates)[0, 0]), 3)
      0.5

    Source: Dettmers et al. 2022, section 2.1.
    """
    core = scale_by_momentum_8bit(momentum, nesterov, block=block, min_size=min_size, stable_embedding=stable_embedding)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)


def lion_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 1e-3,
    mask: Any = None,
    *,
    block: int = 2048,
    min_size: int = 4096,
    stable_embedding: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make Lion with an 8-bit momentum; settings of `optax.lion` carry over unchanged.

    Memory and cost: those of `scale_by_lion_8bit`.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, block, min_size, stable_embedding: as in `scale_by_lion_8bit`.
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
      >>> from memopt.optim import lion_8bit
      >>> optimizer = lion_8bit(0.5, weight_decay=0.0)
      >>> params = jnp.ones((64, 64))
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> round(float(optax.apply_updates(params, updates)[0, 0]), 3)
      0.5

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms".
    """
    core = scale_by_lion_8bit(b1, b2, block=block, min_size=min_size, stable_embedding=stable_embedding)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
