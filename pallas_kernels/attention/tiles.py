"""The arithmetic of one tile of scores, written once for all forms: which pairs are hidden, the cap, what is dropped.

In: positions and operands that broadcast to a tile in any orientation (the TPU kernels hold tiles as keys x queries).
Out: tiles. Only elementwise operations stand here, so that everything also lowers inside a Pallas kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .spec import MASKED, Spec


def allowed(spec: Spec, rows: jax.Array, columns: jax.Array) -> jax.Array | None:
    """Return which pairs `causal` and `window` allow, or None where they hide nothing; block masks stand elsewhere.

    Args:
        spec: the settings.
        rows, columns: int32 positions, of shapes that broadcast to the tile.
    """
    bounds = [(None, spec.offset)] if spec.causal else []
    bounds += [spec.window] if spec.window is not None else []
    keep = None
    distance = columns - rows
    for left, right in bounds:
        if right is not None:
            keep = both(keep, distance <= right)
        if left is not None:
            keep = both(keep, distance >= -left)
    return keep


def both(first: jax.Array | None, second: jax.Array | None) -> jax.Array | None:
    """Return the conjunction of two masks, of which either may be None for "all"."""
    if first is None or second is None:
        return second if first is None else first
    return jnp.logical_and(first, second)


def capped(spec: Spec, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scale and soft-cap a tile of products.

    Returns:
        The scores, and the derivative of the cap, None without one.
    """
    if spec.soft_cap is None:
        return products * spec.scale, None
    bent = jnp.tanh(products * (spec.scale / spec.soft_cap))
    return bent * spec.soft_cap, 1 - bent * bent


def hide(scores: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Return the scores with those of hidden pairs replaced."""
    return scores if keep is None else jnp.where(keep, scores, jnp.full_like(scores, MASKED))


def kept(spec: Spec, seed: jax.Array, head: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Return the tile of dropout factors: 0, or `1 / (1 - rate)`, from a hash of the seed and the position.

    Every form computes the same factors for the same pair, whatever its block sizes.

    Args:
        spec: the settings; `dropout` is read.
        seed: uint32 `[2]`.
        head: int32, `sequence * heads + head`, broadcastable to the tile.
        rows, columns: int32 positions, broadcastable to the tile.

    Source: the mixing function is Wellons 2018, "Prospecting for hash functions" (lowbias32).
    """
    high, low = _mix(seed[0] ^ _mix(head.astype(jnp.uint32))), seed[1]
    bits = _mix(_mix(_mix(rows.astype(jnp.uint32)) ^ high) + columns.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) ^ low)
    # The top 24 bits as a float32 are exact, and every backend can compare them.
    uniform = (bits >> jnp.uint32(8)).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)
    return jnp.where(uniform >= spec.dropout, jnp.float32(1 / (1 - spec.dropout)), jnp.float32(0))


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def sigmoid(spec: Spec, scores: jax.Array) -> jax.Array:
    """Return the weights of sigmoid attention; those of hidden pairs are 0."""
    return lax.logistic(scores + spec.sigmoid_bias)
