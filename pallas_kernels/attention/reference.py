"""Attention as its definition: all scores at once. It is what every other form has to equal, values and gradients.

In: q, k, v and the settings. Out: the output. It saves no memory: three tiles of `heads * queries * keys` values.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from memopt.pallas_kernels._dtypes import wide as wide_dtype

from . import tiles
from .spec import LOWEST, Extras, Spec


def attention(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, extras: Extras | None = None
) -> jax.Array:
    """Compute attention with all scores in memory; JAX differentiates it.

    Args:
        spec: the settings.
        q: `[batch, queries, heads, head_dim]`, bfloat16, float32 or float64.
        k: `[batch, keys, kv_heads, head_dim]`, with `heads` a multiple of `kv_heads`.
        v: `[batch, keys, kv_heads, value_dim]`.
        bias: broadcastable to `[batch, heads, queries, keys]`, of the same rank.
        extras: masks, segments, slopes and seed.

    Returns:
        `[batch, queries, heads, value_dim]` in `q`'s dtype. Rows with no allowed key are zero, and so are their
        gradients.

    Example:
        >>> q = jnp.ones((1, 2, 1, 4))
        >>> attention(Spec(scale=0.5, causal=True), q, q, q).shape
        (1, 2, 1, 4)

    Source: Vaswani et al. 2017, equation 1; Ramapuram et al. 2024, "Theory, analysis, and best practices for sigmoid
    self-attention", for `kind="sigmoid"`.
    """
    extras = extras or Extras()
    group = q.shape[2] // k.shape[2]
    wide = wide_dtype(q.dtype)
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
    scores, _ = tiles.capped(spec, scores)
    rows, columns = positions(q.shape[1], k.shape[1])
    if bias is not None:
        scores = scores + bias.astype(wide)
    if extras.slopes is not None:
        scores = scores + extras.slopes.astype(wide).reshape(1, -1, 1, 1) * (columns - rows).astype(wide)
    keep = mask(spec, extras, q.shape[1], k.shape[1])
    weights = _weights(spec, tiles.hide(scores, keep))
    if spec.dropout:
        heads = jnp.arange(q.shape[0] * q.shape[2], dtype=jnp.int32).reshape(q.shape[0], q.shape[2], 1, 1)
        weights = weights * tiles.kept(spec, extras.seed, heads, rows, columns).astype(wide)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=wide).astype(q.dtype)


def positions(queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Return the rows `[1, 1, queries, 1]` and columns `[1, 1, 1, keys]` of the scores, int32."""
    return jnp.arange(queries)[None, None, :, None], jnp.arange(keys)[None, None, None]


def mask(spec: Spec, extras: Extras, queries: int, keys: int) -> jax.Array | None:
    """Return all masks in one, broadcastable to `[batch, heads, queries, keys]`, or None where nothing is hidden."""
    keep = tiles.allowed(spec, *positions(queries, keys))
    if (cells := spec.block_mask) is not None:
        whole = jnp.asarray(cells).repeat(spec.blocks[0], axis=0).repeat(spec.blocks[0], axis=1)
        keep = tiles.both(keep, whole[None, None, :queries, :keys])
    if extras.q_segments is not None:
        keep = tiles.both(keep, extras.q_segments[:, None, :, None] == extras.kv_segments[:, None, None, :])
    return tiles.both(keep, extras.mask)


def _weights(spec: Spec, scores: jax.Array) -> jax.Array:
    if spec.kind == "sigmoid":
        return tiles.sigmoid(spec, scores)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), LOWEST))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def default_scale(head_dim: int) -> float:
    """Return `1 / sqrt(head_dim)`."""
    return 1 / math.sqrt(head_dim)
