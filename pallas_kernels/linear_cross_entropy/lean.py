"""The cross-entropy of a linear head in pure JAX, a slice of the vocabulary at a time: logits never exist whole.

In: hidden states, weight, labels and the settings. Out: losses and log-sum-exps, or gradients. A `scan` walks slices of
the vocabulary; what is left over at the end is a last slice of its own, so that the weight is never padded or copied.

Where devices split the vocabulary, one slice of the whole of it lies on one of them, and XLA brings the weight together
for each. So the vocabulary may be looked at in `parts`, one after another in memory: each slice is then one of every
part, and what is summed over the vocabulary is summed within each part, and over the parts once, after the loop.
"""

from __future__ import annotations

import math

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
    spec: Spec, hidden: jax.Array, weight: jax.Array, labels: jax.Array, chunk: int | None = None, parts: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Compute the losses slice by slice.

    Memory: one tile of `tokens * chunk * parts` float32 logits (a few where XLA keeps more than one form of it).

    Args:
        spec, hidden, weight, labels: as in `reference.linear_cross_entropy`; tokens may be more than one dimension.
        chunk: logits per token, slice and part, None to choose by shape.
        parts: parts of the vocabulary that are walked side by side; they have to divide it.

    Returns:
        The losses and the log-sum-exps, shaped like `labels`, float32 or wider.

    Source: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", algorithm 2.
    """
    vocab = weight.shape[spec.vocab_axis]
    wide = wide_dtype(hidden.dtype)
    walk = _Walk(spec, hidden, weight, chunk, parts)
    each = (*labels.shape, *walk.lead)
    start = (jnp.full(each, -jnp.inf, wide), *(jnp.zeros(each, wide) for _ in range(3)))

    def step(carry, first, size):
        logits, _ = walk.logits(hidden, walk.slice(first, size))
        return _merge(carry, logits, walk.hits(labels, logits, first))

    carry = walk.run(step, start)
    top, rest, picked, total = _joined(carry) if walk.lead else carry
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
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of hidden states and weight, repeating the logits slice by slice.

    Memory: a tile of logits, and the gradient of `hidden` in float32 for each part; each slice of the weight's gradient
    is final when it is made, so none of it exists in a wider dtype.

    Args:
        spec, hidden, weight, labels, chunk, parts: as in `forward`.
        lse: what `forward` returned.
        cotangent: of the losses, shaped like `labels`.

    Returns:
        Gradients shaped and typed like `hidden` and `weight`.

    Source: Wijmans et al. 2024, algorithm 3.
    """
    vocab = weight.shape[spec.vocab_axis]
    wide = lse.dtype
    walk = _Walk(spec, hidden, weight, chunk, parts)
    scale, target = coefficients(spec, lse, cotangent, labels)
    start = (jnp.zeros((*walk.lead, *hidden.shape), wide), jnp.zeros(walk.weight.shape, weight.dtype))

    def step(carry, first, size):
        part = walk.slice(first, size).astype(hidden.dtype)
        logits, slope = walk.logits(hidden, part)
        grad = walk.spread(scale) * jnp.exp(logits - walk.spread(lse))
        hit = walk.hits(labels, logits, first)
        grad = grad - jnp.where(hit, (1 - spec.label_smoothing) * walk.spread(target), jnp.zeros_like(grad))
        if spec.label_smoothing:
            grad = grad - (spec.label_smoothing / vocab) * walk.spread(target)
        grad = (grad if slope is None else grad * slope).astype(hidden.dtype)
        return walk.accumulate(carry, grad, hidden, part, first)

    dhidden, dweight = walk.run(step, start)
    dhidden = dhidden.sum(axis=0) if walk.lead else dhidden
    return dhidden.astype(hidden.dtype), dweight.reshape(weight.shape)


class _Walk:
    """The weight as a walk over slices sees it: `[dim, vocab]`, or `[dim, parts, vocab / parts]` in parts."""

    def __init__(self, spec: Spec, hidden: jax.Array, weight: jax.Array, chunk: int | None, parts: int):
        shape, axis = list(weight.shape), spec.vocab_axis
        self.spec, self.vocab = spec, shape[axis] // parts
        self.lead = () if parts == 1 else (parts,)
        shape[axis : axis + 1] = [*self.lead, self.vocab]
        self.weight = weight.reshape(shape) if self.lead else weight
        self.axis = axis + len(self.lead)
        self.chunk = chunk or chunk_size(math.prod(hidden.shape[:-1]) * parts, self.vocab)

    def run(self, step, carry):
        """Run `step(carry, first, size)` over all slices of each part of the vocabulary."""
        count, tail = divmod(self.vocab, self.chunk)
        if count:
            firsts = jnp.arange(0, count * self.chunk, self.chunk, dtype=jnp.int32)
            carry, _ = lax.scan(lambda carry, first: (step(carry, first, self.chunk), None), carry, firsts)
        return step(carry, jnp.int32(count * self.chunk), tail) if tail else carry

    def slice(self, first, size: int):
        return lax.dynamic_slice_in_dim(self.weight, first, size, self.axis)

    def spread(self, tokens):
        """Return one number a token as it meets logits, `[*tokens, 1]`, or `[*tokens, 1, 1]` in parts."""
        return tokens[(..., None, *(None for _ in self.lead))]

    def logits(self, hidden, part):
        """Return `[*tokens, chunk]`, or `[*tokens, parts, chunk]`, and the derivative of the cap."""
        wide = wide_dtype(hidden.dtype)
        contract = (((hidden.ndim - 1,), (0 if self.spec.vocab_axis else self.axis + 1,)), ((), ()))
        product = lax.dot_general(hidden, part.astype(hidden.dtype), contract, preferred_element_type=wide)
        return capped(self.spec, product)

    def hits(self, labels, logits, first):
        """Say where logits are those of their token's label."""
        place = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        if self.lead:
            place = place + self.vocab * lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 2)
        return place == self.spread(labels - first)

    def accumulate(self, carry, grad, hidden, part, first):
        """Add a slice's share of the gradient of hidden states, and put its own gradient into its place."""
        dhidden, dweight = carry
        wide, tokens = dhidden.dtype, tuple(range(hidden.ndim - 1))
        batch = ((len(tokens),), (self.axis - 1,)) if self.lead else ((), ())
        contract = (((grad.ndim - 1,), (self.axis,)), batch)
        dhidden = dhidden + lax.dot_general(grad, part, contract, preferred_element_type=wide)
        pair = (hidden, grad) if self.spec.vocab_axis else (grad, hidden)
        new = lax.dot_general(*pair, ((tokens, tokens), ((), ())), preferred_element_type=wide).astype(dweight.dtype)
        return dhidden, lax.dynamic_update_slice_in_dim(dweight, new, first, self.axis)


def _merge(carry, logits, hit):
    """Take a slice of logits into the running maximum, sum of exponentials, label's logit and sum of logits."""
    top, rest, picked, total = carry
    new_top = jnp.maximum(top, logits.max(axis=-1))
    safe = jnp.where(new_top == -jnp.inf, 0, new_top)  # all logits so far are -inf
    rest = rest * jnp.exp(top - safe) + jnp.exp(logits - safe[..., None]).sum(axis=-1)
    picked = picked + jnp.where(hit, logits, jnp.zeros_like(logits)).sum(axis=-1)
    return new_top, rest, picked, total + logits.sum(axis=-1)


def _joined(carry):
    """Join what was found in each part of the vocabulary, `[*tokens, parts]`."""
    top, rest, picked, total = carry
    most = top.max(axis=-1)
    safe = jnp.where(most == -jnp.inf, 0, most)
    rest = (rest * jnp.exp(top - safe[..., None])).sum(axis=-1)
    return most, rest, picked.sum(axis=-1), total.sum(axis=-1)
