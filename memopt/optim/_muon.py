"""Muon: orthogonalised momentum for matrices, AdamW for the rest; the momentum plain or in 8 bits.

In come gradients and one momentum a matrix, out goes the nearest semi-orthogonal matrix by a Newton-Schulz iteration.
Matrices of a batch are orthogonalised one after the other, so that the transients are those of one matrix.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt._codecs_linear import Integer
from memopt._codecs_maps import Dynamic
from memopt.optim import _projection as projection
from memopt.optim._encoded import EncodedMoments, Stores, encoded_adam_leaf, load, save
from memopt.optim._leaves import (
    Leaf,
    Where,
    adam_init,
    adam_leaf,
    decay,
    finish,
    is_matrix,
    per_leaf,
    static_int,
    wide,
    zeros_beside,
)
from memopt.optim._rounding import stochastic_rounding as round_stochastically

#: Keller Jordan's quintic, whose slope at zero is steep: singular values end between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonLeaf(NamedTuple):
    """State of one batch of matrices: its momentum, in the matrix's shape, plain or encoded."""

    mu: Any


def newton_schulz(matrix: jax.Array, steps: int = 5) -> jax.Array:
    """Move the singular values of a matrix towards one.

    Cost: `steps` times three products with the shorter axis.

    Args:
      matrix: `[m, n]`, float32 or wider.
      steps: iterations.

    Returns:
      A matrix of the same shape; zero stays zero.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if turned else matrix
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x))) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = jnp.dot(x, x.T)
        x = a * x + jnp.dot(b * gram + c * jnp.dot(gram, gram), x)
    return x.T if turned else x


def orthogonalize(batch: jax.Array, steps: int) -> jax.Array:
    """Orthogonalise each matrix of `[..., m, n]`, one after the other."""
    flat = projection.as_batch(batch)
    if flat.shape[0] == 1:
        return newton_schulz(flat[0], steps).reshape(batch.shape)
    return jax.lax.map(lambda matrix: newton_schulz(matrix, steps), flat).reshape(batch.shape)


def _is_muon(leaf: Leaf, value: Any, where: Where | None) -> bool:
    """Say whether a leaf is orthogonalised: by default matrices that are no embedding and no output head."""
    return is_matrix(leaf, value, where) and (where is not None or not leaf.named_table) and leaf.size > 0


def scale_by_muon(
    momentum: Any = 0.95,
    *,
    nesterov: bool = True,
    steps: int = 5,
    consistent_rms: float | None = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalise the momentum of matrices, and rescale all other leaves by Adam.

    Memory: one moment a matrix in place of two. Leaves with more axes are batches of matrices. Cost: `3 * steps`
    products a matrix with its shorter axis, one matrix at a time.

    Args:
      momentum: decay of the momentum, an exponential moving average.
      nesterov: look one step ahead.
      steps: Newton-Schulz iterations.
      consistent_rms: scale each update by this times the root of the longer axis, so that it is as large as Adam's and
        the two share a learning rate and a weight decay. None scales by `sqrt(max(1, n / m))` for a kernel `[m, n]`.
      b1, b2, eps: of Adam, for the rest.
      where: called with a leaf's `keystr` path and the leaf; says whether it is orthogonalised. None takes leaves with
        two axes or more that are not named `bias` or `scale` and are no embedding or output head by their names.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` `steps` belongs into `static_args`.

    Raises:
      TypeError: `steps` is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_muon
      >>> optimizer = scale_by_muon(consistent_rms=None)
      >>> gradient = {"kernel": 100 * jnp.eye(4)}
      >>> update, _ = optimizer.update(gradient, optimizer.init(gradient))
      >>> 0.6 < float(update["kernel"][0, 0]) < 1.3
      True

    Source: Jordan et al. 2024, "Muon"; the scale of updates from Liu et al. 2025, "Muon is scalable for LLM training",
    section 2.2.
    """
    steps = static_int("steps", steps)

    def init_leaf(leaf, value):
        if not _is_muon(leaf, value, where):
            return adam_init(leaf, value)
        return MuonLeaf(zeros_beside(value, leaf.shape, leaf.dtype))

    def update_leaf(leaf, gradient, state, count):
        if not isinstance(state, MuonLeaf):
            return adam_leaf(gradient, state, count, b1, b2, eps)
        return _muon_leaf(leaf, gradient, state, momentum, nesterov, steps, consistent_rms)

    return per_leaf(init_leaf, update_leaf)


def _muon_leaf(leaf, gradient, state, momentum, nesterov, steps, consistent_rms) -> tuple[jax.Array, MuonLeaf]:
    gradient = gradient.astype(wide(leaf.dtype))
    mu = decay(load(state.mu, gradient.dtype), gradient, momentum)
    update = orthogonalize(decay(mu, gradient, momentum) if nesterov else mu, steps)
    rows, columns = leaf.shape[-2:]
    factor = max(1, columns / rows) ** 0.5 if consistent_rms is None else consistent_rms * max(rows, columns) ** 0.5
    return factor * update, MuonLeaf(save(mu, state.mu))


def scale_by_muon_8bit(
    momentum: Any = 0.95,
    *,
    nesterov: bool = True,
    steps: int = 5,
    consistent_rms: float | None = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    codes: Literal["dynamic", "linear"] = "dynamic",
    block: int = 2048,
    min_size: int = 4096,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run Muon with its momentum, and Adam's moments for the rest, stored in 8 bits.

    Memory: 1 byte an element of a matrix and 2 an element of the rest, and 4 a block. Cost: as `scale_by_muon`, and a
    decoding and an encoding.

    Args:
      momentum, nesterov, steps, consistent_rms, b1, b2, eps, where: as in `scale_by_muon`.
      codes: "dynamic" for the dynamic map, "linear" for evenly spaced codes, of the matrices' momentum.
      block, min_size: as in `scale_by_adam_8bit`.

    Returns:
      An optax transformation. Under `optax.inject_hyperparams` the integers belong into `static_args`.

    Raises:
      TypeError: an integer setting is traced.
      ValueError: the codes are unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_muon_8bit
      >>> scale_by_muon_8bit().init({"kernel": jnp.zeros((64, 64))}).leaves["['kernel']"].mu.codes.dtype
      dtype('uint8')

    Source: Gupta et al. 2025, "Effective quantization of Muon optimizer states".
    """
    if codes not in ("dynamic", "linear"):
        raise ValueError(f"codes={codes!r} are unknown: choose 'dynamic' or 'linear'")
    steps, block, min_size = static_int("steps", steps), static_int("block", block), static_int("min_size", min_size)
    stores = Stores(Dynamic(8, True, block, down=True), Dynamic(8, False, block, down=True), min_size, False)
    of_matrices = stores.mu if codes == "dynamic" else Integer(8, block, down=True)

    def init_leaf(leaf, value):
        if _is_muon(leaf, value, where):
            return MuonLeaf(stores.init(leaf, value, of_matrices))
        return EncodedMoments(stores.init(leaf, value, stores.mu), stores.init(leaf, value, stores.nu))

    def update_leaf(leaf, gradient, state, count):
        if isinstance(state, MuonLeaf):
            return _muon_leaf(leaf, gradient, state, momentum, nesterov, steps, consistent_rms)
        return encoded_adam_leaf(leaf, gradient, state, count, b1, b2, eps)

    return per_leaf(init_leaf, update_leaf)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.95,
    *,
    nesterov: bool = True,
    steps: int = 5,
    consistent_rms: float | None = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make Muon with AdamW for the rest: `scale_by_muon`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_muon`.

    Args:
      learning_rate: a number or an optax schedule, for both.
      momentum, nesterov, steps, consistent_rms, b1, b2, eps, where: as in `scale_by_muon`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.
      seed: seeds the rounding.

    Returns:
      An optax transformation.

    Raises:
      TypeError: `steps` is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import muon
      >>> optimizer = muon(1e-2)
      >>> params = {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (16, 32)

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    core = scale_by_muon(
        momentum,
        nesterov=nesterov,
        steps=steps,
        consistent_rms=consistent_rms,
        b1=b1,
        b2=b2,
        eps=eps,
        where=where,
    )
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)


def muon_8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.95,
    *,
    nesterov: bool = True,
    steps: int = 5,
    consistent_rms: float | None = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    codes: Literal["dynamic", "linear"] = "dynamic",
    block: int = 2048,
    min_size: int = 4096,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make 8-bit Muon with 8-bit AdamW for the rest: `scale_by_muon_8bit`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_muon_8bit`.

    Args:
      learning_rate: a number or an optax schedule, for both.
      momentum, nesterov, steps, consistent_rms, b1, b2, eps, codes, block, min_size, where: as in
        `scale_by_muon_8bit`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.
      seed: seeds the rounding.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as `scale_by_muon_8bit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import muon_8bit
      >>> optimizer = muon_8bit(1e-2)
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (64, 64)

    Source: Gupta et al. 2025, "Effective quantization of Muon optimizer states".
    """
    core = scale_by_muon_8bit(
        momentum,
        nesterov=nesterov,
        steps=steps,
        consistent_rms=consistent_rms,
        b1=b1,
        b2=b2,
        eps=eps,
        codes=codes,
        block=block,
        min_size=min_size,
        where=where,
    )
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
