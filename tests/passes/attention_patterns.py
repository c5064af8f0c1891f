"""Attention as people write it, and near misses: a table of functions of q, k, v (and more) for the pattern tests.

Each entry takes `x` `[batch, length, width]` and parameters, and returns an array; how it is written is the point. True
ones must be found, near misses must be left with a reason. Nothing here is a model: shapes are tiny.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BATCH, LENGTH, HEADS, DIM = 2, 7, 2, 4
WIDTH = HEADS * DIM


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A way to write attention: `apply(q, k, v)` of `[batch, length, heads, dim]`, and what must come of it.

    `left` is None for one that must be replaced, else a part of the reason why it stays; an empty string is one that is
    no candidate at all. `pads` gives the function a random padding mask `[batch, length]` as a fourth argument.
    """

    name: str
    apply: Callable
    left: str | None = None
    pads: bool = False
    kv_heads: int = HEADS


TABLE: list[Pattern] = []


def pattern(name: str, left: str | None = None, **settings):
    """Add a function to the table."""

    def add(function):
        TABLE.append(Pattern(name, function, left, **settings))
        return function

    return add


def causal(length: int = LENGTH) -> jax.Array:
    """Return the lower triangle."""
    return jnp.tril(jnp.ones((length, length), bool))


@pattern("einsum, scale after, where mask, jax.nn.softmax")
def einsum_where(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    weights = jax.nn.softmax(jnp.where(causal()[None, None], scores, -1e30))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pattern("scale on q, no mask")
def scaled_query(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q * DIM**-0.5, k), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pattern("heads first, matmul operators")
def heads_first(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    weights = jax.nn.softmax((q @ k.transpose(0, 1, 3, 2)) * 0.5, axis=-1)
    return (weights @ v).transpose(0, 2, 1, 3)


@pattern("batch and heads merged into one axis")
def merged(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(BATCH * HEADS, LENGTH, DIM) for x in (q, k, v))
    weights = jax.nn.softmax(jnp.matmul(q, k.swapaxes(1, 2)) / 2, axis=-1)
    return jnp.matmul(weights, v).reshape(BATCH, HEADS, LENGTH, DIM).transpose(0, 2, 1, 3)


@pattern("additive causal mask")
def additive(q, k, v):
    bias = jnp.where(causal(), 0.0, -1e9)[None, None]
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5 + bias)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pattern("mask of minus infinity, softmax by hand")
def by_hand(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
    scores = jnp.where(causal()[None, None], scores, -jnp.inf)
    exponentials = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return jnp.einsum("bhqk,bkhd->bqhd", exponentials / exponentials.sum(axis=-1, keepdims=True), v)


@pattern("softmax without the maximum")
def no_maximum(q, k, v):
    exponentials = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.1)
    return jnp.einsum("bhqk,bkhd->bqhd", exponentials / exponentials.sum(axis=-1, keepdims=True), v)


@pattern("queries last")
def queries_last(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhkq", q, k) * 0.5
    weights = jax.nn.softmax(scores, axis=2)
    return jnp.einsum("bhkq,bkhd->bqhd", weights, v)


@pattern("weights first in the second product")
def keys_first(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bkhd,bqhd->bhqk", k, q) * 0.5)
    return jnp.einsum("bkhd,bhqk->bqhd", v, weights)


@pattern("mask before the scale")
def mask_then_scale(q, k, v):
    scores = jnp.where(causal()[None, None], jnp.einsum("bqhd,bkhd->bhqk", q, k), -1e10)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores * 0.5), v)


@pattern("mask from indices, upside down")
def index_mask(q, k, v):
    rows, columns = jnp.arange(LENGTH)[:, None], jnp.arange(LENGTH)[None]
    scores = jnp.where((columns > rows)[None, None], -1e9, jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pattern("sliding window")
def window(q, k, v):
    distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None]
    keep = (distance >= 0) & (distance < 3)
    scores = jnp.where(keep[None, None], jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pattern("padding mask", pads=True)
def padding(q, k, v, valid):
    scores = jnp.where(valid[:, None, None], jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pattern("causal and padding, two masks", pads=True)
def two_masks(q, k, v, valid):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
    scores = jnp.where(causal()[None, None], scores, -1e9)
    scores = jnp.where(valid[:, None, None], scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pattern("padding as a bias", pads=True)
def padding_bias(q, k, v, valid):
    bias = (1.0 - valid[:, None, None].astype(jnp.float32)) * -1e9
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5 + bias), v)


@pattern("ALiBi")
def alibi(q, k, v):
    distance = (jnp.arange(LENGTH)[None] - jnp.arange(LENGTH)[:, None]).astype(jnp.float32)
    bias = jnp.array([0.5, 0.25]).reshape(1, HEADS, 1, 1) * distance[None, None]
    scores = jnp.where(causal()[None, None], jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5 + bias, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pattern("soft cap")
def soft_cap(q, k, v):
    scores = jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5 / 3.0) * 3.0
    scores = jnp.where(causal()[None, None], scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pattern("grouped heads by reshape", kv_heads=1)
def grouped(q, k, v):
    q = q.reshape(BATCH, LENGTH, 1, HEADS, DIM)
    scores = jnp.einsum("bqngd,bknd->bngqk", q, k) * 0.5
    weights = jax.nn.softmax(jnp.where(causal()[None, None, None], scores, -1e9))
    return jnp.einsum("bngqk,bknd->bqngd", weights, v).reshape(BATCH, LENGTH, HEADS, DIM)


@pattern("grouped heads by repeat", kv_heads=1)
def repeated(q, k, v):
    k, v = (jnp.repeat(x, HEADS, axis=2) for x in (k, v))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5), v)


@pattern("one head, two axes")
def one_head(q, k, v):
    weights = jax.nn.softmax(q[:, :, 0] @ k[:, :, 0].swapaxes(1, 2) * 0.5)
    return weights @ v[:, :, 0]


@pattern("vmap over batch and heads")
def mapped(q, k, v):
    def single(q, k, v):
        return jax.nn.softmax(jnp.where(causal(), q @ k.T * 0.5, -1e9)) @ v

    return jax.vmap(jax.vmap(single, in_axes=1, out_axes=1))(q, k, v)


@pattern("half precision with a wide softmax")
def half(q, k, v):
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * 0.5
    weights = jax.nn.softmax(scores).astype(jnp.bfloat16)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(jnp.float32)


@pattern("jax.nn.dot_product_attention")
def of_jax(q, k, v):
    return jax.nn.dot_product_attention(q, k, v)


@pattern("jax.nn.dot_product_attention, causal, grouped", kv_heads=1)
def of_jax_causal(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@pattern("jax.nn.dot_product_attention with a mask", pads=True)
def of_jax_masked(q, k, v, valid):
    return jax.nn.dot_product_attention(q, k, v, mask=valid[:, None, None])


@pattern("flax.linen.dot_product_attention, causal")
def of_linen(q, k, v):
    return nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(jnp.ones((BATCH, LENGTH))))


@pattern("flax.nnx.dot_product_attention, causal")
def of_nnx(q, k, v):
    return nnx.dot_product_attention(q, k, v, mask=nnx.make_causal_mask(jnp.ones((BATCH, LENGTH))), module=None)


@pattern("under jax.checkpoint")
@jax.checkpoint
def checkpointed(q, k, v):
    return einsum_where(q, k, v)


@pattern("cross attention, keys shorter")
def cross(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k[:, :5]) * 0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v[:, :5])


# Near misses.


@pattern("dropout", left="`mul`|product|select|recognised|read by")
def dropout(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5)
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, weights.shape)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(keep, weights / 0.9, 0), v)


@pattern("softmax over heads", left="softmax is not over|axes|differs|are not those")
def over_heads(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, axis=1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pattern("weights returned as well", left="multiplied with each other")
def returned(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v) + weights.sum()


@pattern("a gradient that is stopped halfway", left="recognised|differs|no constant")
def stopped(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5)
    half = weights * 0.5 + jax.lax.stop_gradient(weights) * 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", half, v)


@pattern("a fill that does not hide", left="does not make their weight 0")
def weak_fill(q, k, v):
    scores = jnp.where(causal()[None, None], jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, -1.0)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pattern("talking heads", left="dot_general|multiplied|recognised|candidate|read by|differs|axes")
def talking_heads(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
    mixed = jnp.einsum("bhqk,hg->bgqk", jax.nn.softmax(scores), jnp.asarray(np.eye(HEADS) + 0.1, jnp.float32))
    return jnp.einsum("bhqk,bkhd->bqhd", mixed, v)


@pattern("a softmax that is no attention", left="")
def classifier(q, k, v):
    return jax.nn.softmax(q @ jnp.ones((DIM, DIM))) + k + v
