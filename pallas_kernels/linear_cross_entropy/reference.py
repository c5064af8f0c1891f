"""The cross-entropy of a linear head as its definition: all logits at once. Every other form has to equal it.

In: hidden states, weight, labels and the settings. Out: a loss per token, which JAX differentiates. It saves no memory:
several arrays of `tokens * vocabulary` float32 values.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from memopt.pallas_kernels._dtypes import wide as wide_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Static settings of the loss.

    Args:
        vocab_axis: axis of the weight that is the vocabulary: 1 for `[dim, vocab]`, 0 for an embedding `[vocab, dim]`.
        ignore_index: tokens with this label have loss zero and no gradient; None for no such label.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        z_loss: weight of the square of the log-sum-exp, added to the loss.
        soft_cap: `cap` in `cap * tanh(logit / cap)`, None for none.

    Example:
        >>> Spec().vocab_axis
        1
    """

    vocab_axis: int = 1
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None


def linear_cross_entropy(spec: Spec, hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the loss of each token with all logits in memory.

    Args:
        spec: the settings.
        hidden: `[tokens, dim]`.
        weight: `[dim, vocab]` (or `[vocab, dim]`, see `spec`); cast to `hidden`'s dtype for the product.
        labels: int32 `[tokens]`, each in `[0, vocab)` or the ignored one.

    Returns:
        `[tokens]`, float32 or wider, in nats.

    Example:
        >>> linear_cross_entropy(Spec(), jnp.zeros((2, 4)), jnp.zeros((4, 8)), jnp.array([1, 7])).round(4).tolist()
        [2.0794, 2.0794]

    Source: Szegedy et al. 2016, section 7 (smoothing); de Brebisson and Vincent 2016, "The Z-loss".
    """
    wide = wide_dtype(hidden.dtype)
    weight = weight.astype(hidden.dtype)
    logits = jax.lax.dot_general(
        hidden, weight, (((1,), (1 - spec.vocab_axis,)), ((), ())), preferred_element_type=wide
    )
    logits = capped(spec, logits)[0]
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return combine(spec, lse, picked, logits.sum(axis=-1), logits.shape[1], labels)


def capped(spec: Spec, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Soft-cap logits; return them and the derivative of the cap, None without one."""
    if spec.soft_cap is None:
        return logits, None
    bent = jnp.tanh(logits * (1 / spec.soft_cap))
    return bent * spec.soft_cap, 1 - bent * bent


def combine(spec: Spec, lse, picked, total, vocab: int, labels) -> jax.Array:
    """Return the losses from each token's log-sum-exp, its label's logit and the sum of all its logits."""
    loss = lse - (1 - spec.label_smoothing) * picked
    if spec.label_smoothing:
        loss = loss - spec.label_smoothing / vocab * total
    if spec.z_loss:
        loss = loss + spec.z_loss * lse * lse
    return loss if spec.ignore_index is None else jnp.where(labels == spec.ignore_index, 0, loss)


def coefficients(spec: Spec, lse, cotangent, labels) -> tuple[jax.Array, jax.Array]:
    """Return `(a, c)` per token: the gradient of its logits is `a * softmax - c * target`, target being smoothed."""
    c = cotangent.astype(lse.dtype)
    if spec.ignore_index is not None:
        c = jnp.where(labels == spec.ignore_index, 0, c)
    return c * (1 + 2 * spec.z_loss * lse) if spec.z_loss else c, c
