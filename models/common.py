"""Shared pieces of the models: causal scores, the loss, stacked layers and parameter counts.

In come arrays and parameter trees, out go arrays and trees. Nothing here knows a particular model, an optimizer or
memopt itself, and nothing here saves memory: the models are written the way the papers are, and memopt makes them fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Mapping[str, Any]


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype for softmax and loss: float32, or float64 where the model computes in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def attention_weights(scores: jax.Array, *, causal: bool) -> jax.Array:
    """Turn attention scores into weights, with the softmax in float32.

    Memory: the scores are held whole, in float32, `length**2` values a head; that is what makes the models naive.

    Args:
        scores: `[..., queries, keys]`, already scaled, any floating dtype.
        causal: hide the keys that come after the query.

    Returns:
        The weights, same shape and dtype as `scores`.

    Example:
        >>> attention_weights(jnp.zeros((1, 2, 2)), causal=True)[0].tolist()
        [[1.0, 0.0], [0.5, 0.5]]

    Source: Vaswani et al. 2017, "Attention is all you need", equation 1.
    """
    wide_scores = scores.astype(wide(scores.dtype))
    if causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        mask = mask.reshape((1,) * (scores.ndim - 2) + mask.shape)
        wide_scores = jnp.where(mask, wide_scores, jnp.finfo(wide_scores.dtype).min)
    return jax.nn.softmax(wide_scores, axis=-1).astype(scores.dtype)


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Average the cross-entropy of integer labels over all positions, in float32.

    Memory: a float32 copy of the logits and their cotangent, usually the largest transient of a language model.

    Args:
        logits: `[..., classes]`, any floating dtype.
        labels: `[...]`, int32, each in `[0, classes)`; for a language model the next token of each position.

    Returns:
        A scalar in float32 (float64 for float64 logits), in nats.

    Example:
        >>> float(mean_cross_entropy(jnp.zeros((3, 2)), jnp.zeros(3, jnp.int32))).__round__(4)
        0.6931
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(wide(logits.dtype)), labels)
    return losses.mean()


def parameter_count(tree: Any) -> int:
    """Count the elements of all leaves of a tree; shapes are enough, nothing is allocated.

    Example:
        >>> parameter_count({"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)})
        12
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def stack_layers(params: Params) -> dict[str, Any]:
    """Turn the parameters of an unrolled model (`block_0`, `block_1`, ...) into those of the scanned one (`blocks`).

    Args:
        params: the `params` collection of a model made with `scan=False`.

    Returns:
        The same parameters with the layers stacked along a new first axis.

    Raises:
        ValueError: there is no `block_0`.

    Example:
        >>> stack_layers({"block_0": jnp.ones(2), "block_1": jnp.ones(2)})["blocks"].shape
        (2, 2)
    """
    names = sorted((n for n in params if re.fullmatch(r"block_\d+", n)), key=lambda n: int(n.removeprefix("block_")))
    if not names:
        raise ValueError(f"no block_0 among {sorted(params)}: pass the parameters of a model made with scan=False")
    rest = {name: value for name, value in params.items() if name not in names}
    layers = [params[name] for name in names]
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> dict[str, Any]:
    """Turn the parameters of a scanned model (`blocks`) into those of the unrolled one (`block_0`, ...).

    Args:
        params: the `params` collection of a model made with `scan=True`.

    Returns:
        The same parameters, one entry a layer.

    Raises:
        ValueError: there is no `blocks`.

    Example:
        >>> sorted(unstack_layers({"blocks": jnp.ones((2, 3))}))
        ['block_0', 'block_1']
    """
    if "blocks" not in params:
        raise ValueError(f"no blocks among {sorted(params)}: pass the parameters of a model made with scan=True")
    stacked = params["blocks"]
    layers = jax.tree.leaves(stacked)[0].shape[0]
    rest = {name: value for name, value in params.items() if name != "blocks"}
    return rest | {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(layers)}
