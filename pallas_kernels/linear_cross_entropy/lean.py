"""The cross-entropy of a linear head in pure JAX, a slice of the vocabulary at a time: logits never exist whole.

In: hidden states, weight, labels and the settings. Out: losses and log-sum-exps, or gradients. A `scan` walks slices of
the vocabulary; what is left over at the end is a last slice of its own, so that the weight is never padded or copied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from memopt.pallas_kernels._dtypes import wide as wide_dtype

from .reference import Spec, capped, coefficients, combine


def chunk_size(tokens: int, vocab: int, tile_bytes: int = 16 * 2**20) -> int:
    """Choose how many logits per token exist at a time: `tile_bytes` of float32 in all where that is 128 or more.

    Example:
        >>> chunk_size(8192, 256_000)
        512
    """
    columns = tile_bytes // (4 * tokens)
    return min(vocab, max(128, 1 << max(columns.bit_length() - 1, 0)))


def forward(
    spec: Spec, hidden: jax.Array, weight: jax.Array, labels: jax.Array, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute the losses slice by slice.

    Memory: one tile of `tokens * chunk` float32 logits (a few where XLA keeps more than one form of it).

    Args:
        spec, hidden, weight, labels: as in `reference.linear_cross_entropy`.
        chunk: logits per token and slice, None to choose by shape.

    Returns:
        The losses and the log-sum-exps, `[tokens]`, float32 or wider.

    Source: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", algorithm 2.
    """
    vocab = weight.shape[spec.vocab_axis]
    wide = wide_dtype(hidden.dtype)
    start = (jnp.full(labels.shape, -jnp.inf, wide), *(jnp.zeros(labels.shape, wide) for _ in range(3)))

    def step(carry, first, size):
        logits, _ = _logits(spec, hidden, _slice(spec, weight, first, size))
        return _merge(carry, logits, labels - first)

    top, rest, picked, total = _walk(step, start, vocab, chunk or chunk_size(hidden.shape[0], vocab))
    lse = top + jnp.log(rest)
    return combine(spec, lse, picked, total, vocab, labels), lse


def backward(
    spec: Spec,
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    lse: jax.Array,
    cotangent: jax.Array,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of hidden states and weight, repeating the logits slice by slice.

    Memory: a tile of logits, and the gradient of `hidden` in float32; each slice of the weight's gradient is final when
    it is made, so none of it exists in a wider dtype.

    Args:
        spec, hidden, weight, labels, chunk: as in `forward`.
        lse: what `forward` returned.
        cotangent: `[tokens]`, of the losses.

    Returns:
        Gradients shaped and typed like `hidden` and `weight`.

    Source: Wijmans et al. 2024, algorithm 3.
    """
    vocab = weight.shape[spec.vocab_axis]
    wide = lse.dtype
    scale, target = coefficients(spec, lse, cotangent, labels)
    start = (jnp.zeros(hidden.shape, wide), jnp.zeros(weight.shape, weight.dtype))

    def step(carry, first, size):
        part = _slice(spec, weight, first, size).astype(hidden.dtype)
        logits, slope = _logits(spec, hidden, part)
        grad = scale[:, None] * jnp.exp(logits - lse[:, None])
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == (labels - first)[:, None]
        grad = grad - jnp.where(hit, (1 - spec.label_smoothing) * target[:, None], jnp.zeros_like(grad))
        if spec.label_smoothing:
            grad = grad - (spec.label_smoothing / vocab) * target[:, None]
        grad = (grad if slope is None else grad * slope).astype(hidden.dtype)
        return _accumulate(spec, carry, grad, hidden, part, first)

    dhidden, dweight = _walk(step, start, vocab, chunk or chunk_size(hidden.shape[0], vocab))
    return dhidden.astype(hidden.dtype), dweight


def _walk(step, carry, vocab: int, chunk: int):
    """Run `step(carry, first, size)` over all slices of the vocabulary."""
    count, tail = divmod(vocab, chunk)
    if count:
        firsts = jnp.arange(0, count * chunk, chunk, dtype=jnp.int32)
        carry, _ = lax.scan(lambda carry, first: (step(carry, first, chunk), None), carry, firsts)
    return step(carry, jnp.int32(count * chunk), tail) if tail else carry


def _slice(spec: Spec, weight, first, size: int):
    return lax.dynamic_slice_in_dim(weight, first, size, spec.vocab_axis)


def _logits(spec: Spec, hidden, part):
    wide = wide_dtype(hidden.dtype)
    contract = (((1,), (1 - spec.vocab_axis,)), ((), ()))
    return capped(spec, lax.dot_general(hidden, part.astype(hidden.dtype), contract, preferred_element_type=wide))


def _merge(carry, logits, labels):
    """Take a slice of logits into the running maximum, sum of exponentials, label's logit and sum of logits."""
    top, rest, picked, total = carry
    new_top = jnp.maximum(top, logits.max(axis=1))
    safe = jnp.where(new_top == -jnp.inf, 0, new_top)  # all logits so far are -inf
    rest = rest * jnp.exp(top - safe) + jnp.exp(logits - safe[:, None]).sum(axis=1)
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]
    picked = picked + jnp.where(hit, logits, jnp.zeros_like(logits)).sum(axis=1)
    return new_top, rest, picked, total + logits.sum(axis=1)


def _accumulate(spec: Spec, carry, grad, hidden, part, first):
    dhidden, dweight = carry
    wide = dhidden.dtype
    contract = (((1,), (spec.vocab_axis,)), ((), ()))
    dhidden = dhidden + lax.dot_general(grad, part, contract, preferred_element_type=wide)
    pair = (hidden, grad) if spec.vocab_axis else (grad, hidden)
    new = lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=wide).astype(dweight.dtype)
    return dhidden, lax.dynamic_update_slice_in_dim(dweight, new, first, spec.vocab_axis)
