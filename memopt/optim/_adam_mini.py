"""Adam-mini: Adam with one second moment for a block of parameters whose curvature is alike.

In come the usual settings and the numbers of attention heads, out come optax transformations. What a block is follows
from a leaf's name and axes alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memopt.optim._leaves import (
    Leaf,
    Moments,
    Where,
    adam_direction,
    decay,
    describe,
    finish,
    is_matrix,
    per_leaf,
    wide,
    zeros_beside,
)
from memopt.optim._rounding import stochastic_rounding as round_stochastically


def block_means(squares: jax.Array, kind: str | int) -> jax.Array:
    """Average squares over blocks, with axes of length one in place of those averaged.

    Args:
      squares: of a leaf's gradient.
      kind: as `block_kind` returns it; with a number of heads the last axis becomes as long as that.
    """
    if isinstance(kind, int):
        squares = squares.reshape(*squares.shape[:-1], kind, squares.shape[-1] // kind)
        return jnp.mean(squares, axis=(-3, -1))[..., None, :]
    axes = {"row": (-1,), "column": (-2,), "vector": (-1,), "whole": tuple(range(squares.ndim))}
    return jnp.mean(squares, axis=axes[kind], keepdims=True)


def block_kind(leaf: Leaf, value: Any, heads: Mapping[str, int], where: Where | None) -> str | int:
    """Return what a leaf's blocks are: "row", "column", "vector", "whole", or a number of heads.

    Source: Zhang et al. 2024, "Adam-mini", algorithms 2 and 3, for kernels whose first axis is the input.
    """
    for pattern, count in heads.items():
        if fnmatch.fnmatchcase(leaf.path, pattern):
            return int(count)
    if is_matrix(leaf, value, where):
        return "row" if leaf.named_table else "column"
    return "vector" if len(leaf.shape) >= 2 else "whole"


def _zeros(leaf: Leaf, value: Any, kind: str | int) -> jax.Array:
    dtype = wide(leaf.dtype)
    shape = jax.eval_shape(lambda: block_means(jnp.zeros(leaf.shape, dtype), kind)).shape
    return zeros_beside(value, shape, dtype)


def _check_heads(params: Any, heads: Mapping[str, int]) -> None:
    leaves = describe(params)[0]
    for pattern, count in heads.items():
        matched = [leaf for leaf in leaves if fnmatch.fnmatchcase(leaf.path, pattern)]
        if not matched:
            known = ", ".join(leaf.path for leaf in leaves)
            raise ValueError(f"heads names {pattern!r}, which no parameter matches: choose among {known}")
        for leaf in matched:
            if len(leaf.shape) < 2 or leaf.shape[-1] % count:
                raise ValueError(f"{leaf.path} of shape {leaf.shape} has no {count} equal heads in its last axis")


def scale_by_adam_mini(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    heads: Mapping[str, int] | None = None,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by Adam with one second moment a block.

    Memory: one moment a parameter in place of two, and one number a block. Cost: slightly less than Adam's.

    Blocks are: a row of an embedding or an output head (by their names), an output of every other kernel, a head of the
    kernels named in `heads`, each vector of stacked vectors, and any other leaf as a whole.

    Args:
      b1, b2, eps: of Adam.
      heads: `fnmatch` patterns of `keystr` paths of query and key kernels, and the number of heads in their last axis.
        Without it each of their outputs is a block: finer than the paper's, and still few numbers.
      where: as in `scale_by_galore`.

    Returns:
      An optax transformation.

    Raises:
      ValueError: a pattern matches no parameter, or one whose last axis has no such number of heads (in `init`).

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import scale_by_adam_mini
      >>> params = {"q": jnp.zeros((8, 16)), "up": jnp.zeros((8, 32))}
      >>> state = scale_by_adam_mini(heads={"*q*": 4}).init(params)
      >>> state.leaves["['q']"].nu.shape, state.leaves["['up']"].nu.shape
      ((1, 4), (1, 32))

    Source: Zhang et al. 2024, "Adam-mini: Use fewer learning rates to gain more".

    Limits: a fused query-key-value kernel has one block an output.
    """
    heads = dict(heads or {})

    def init_leaf(leaf, value):
        kind = block_kind(leaf, value, heads, where)
        return Moments(zeros_beside(value, leaf.shape, leaf.dtype), _zeros(leaf, value, kind))

    def update_leaf(leaf, gradient, state, count):
        kind = block_kind(leaf, gradient, heads, where)
        gradient = gradient.astype(wide(leaf.dtype))
        mu = decay(state.mu.astype(gradient.dtype), gradient, b1)
        nu = decay(state.nu, block_means(jnp.square(gradient), kind), b2)
        spread = jnp.repeat(nu, leaf.shape[-1] // kind, axis=-1) if isinstance(kind, int) else nu
        return adam_direction(mu, spread, count, b1, b2, eps), Moments(mu.astype(state.mu.dtype), nu)

    made = per_leaf(init_leaf, update_leaf)

    def init(params):
        _check_heads(params, heads)
        return made.init(params)

    return optax.GradientTransformationExtraArgs(init, made.update)


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    heads: Mapping[str, int] | None = None,
    weight_decay: Any = 0.0,
    mask: Any = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make Adam-mini with a learning rate: `scale_by_adam_mini`, decoupled weight decay, descent.

    Memory and cost: those of `scale_by_adam_mini`.

    Args:
      learning_rate: a number or an optax schedule; AdamW's carries over.
      b1, b2, eps, heads, where: as in `scale_by_adam_mini`.
      weight_decay: decoupled; 0 leaves it out.
      mask: as in `optax.add_decayed_weights`.
      stochastic_rounding: round bfloat16 parameters at random.
      seed: seeds the rounding.

    Returns:
      An optax transformation.

    Raises:
      ValueError: as `scale_by_adam_mini`.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import adam_mini
      >>> optimizer = adam_mini(1e-2)
      >>> params = {"kernel": jnp.ones((16, 32))}
      >>> optimizer.update(params, optimizer.init(params), params)[0]["kernel"].shape
      (16, 32)

    Source: Zhang et al. 2024, "Adam-mini: Use fewer learning rates to gain more".
    """
    core = scale_by_adam_mini(b1, b2, eps, heads=heads, where=where)
    last = [round_stochastically(seed)] if stochastic_rounding else []
    return finish(core, learning_rate, weight_decay, mask, *last)
