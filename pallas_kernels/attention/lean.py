"""Attention in pure JAX with memory linear in the length: the form for CPUs, and what every kernel falls back to.

In: q, k, v and the settings. Out: the output and, for the backward pass, the log-sum-exp of each row. One `scan` walks
the list of blocks that hold an allowed pair; its trip count is static, so FLOPs can be counted. No Pallas stands here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memopt.pallas_kernels._dtypes import wide as wide_dtype

from . import tiles
from .spec import LOWEST, Extras, Spec, lean_blocks, visits


class _Problem(NamedTuple):
    """The operands by heads, padded to whole blocks: `k` and `v` are `[batch, kv_heads, keys, head_dim]`."""

    q: jax.Array  # [batch, kv_heads, group, queries, head_dim]
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None  # [batch, kv_heads, group, queries, keys], any of them 1
    extras: Extras  # the mask has the bias's rank, slopes are [1, kv_heads, group, 1, 1]
    keys: int  # without padding
    blocks: tuple[int, int]


def forward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    extras: Extras,
    blocks: tuple[int, int] | None = None,
    *,
    wide: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Compute attention block by block.

    Memory: the output in float32 and a few tiles of `batch * heads * block_q * block_k` float32 values.

    Args:
        spec, q, k, v, bias, extras: as in `reference.attention`.
        blocks: `(block_q, block_k)`, None to choose by shape.
        wide: return the output in float32 or wider, as parts of one that are still to be merged want it.

    Returns:
        The output, `[batch, queries, heads, value_dim]`, and the log-sum-exp of each row in two parts, `[batch, heads,
        2, queries]`, float32 or wider: the row's maximum, and the logarithm of the sum of exponentials relative to it.
        Their sum would lose the second part where scores are large. For a row with no allowed key the second part is
        infinite; for sigmoid attention both are zero.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021,
    "Self-attention does not need O(n^2) memory"; Dao 2023, "FlashAttention-2".
    """
    p = _problem(spec, q, k, v, bias, extras, blocks)
    dtype = wide_dtype(q.dtype)
    made = dtype if wide else q.dtype
    lead = p.q.shape[:4]
    start = (
        jnp.full(lead, LOWEST, dtype),
        jnp.zeros(lead, dtype),
        jnp.zeros((*lead, v.shape[-1]), dtype),
    )

    def step(carry, block):
        return _forward_block(spec, p, carry, block), None

    (top, total, acc), _ = lax.scan(step, start, _list(spec, p, q.shape[1]))
    if spec.kind == "sigmoid":
        return _by_rows(acc, q.shape[1]).astype(made), jnp.zeros((q.shape[0], q.shape[2], 2, q.shape[1]), dtype)
    empty = total == 0
    out = acc / jnp.where(empty, 1, total)[..., None]
    rest = jnp.where(empty, jnp.inf, jnp.log(jnp.where(empty, 1, total)))
    lse = jnp.stack([top, rest], axis=3)
    lse = lse.reshape(lse.shape[0], -1, 2, lse.shape[4])[..., : q.shape[1]]
    return _by_rows(out, q.shape[1]).astype(made), lse


def backward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    extras: Extras,
    out: jax.Array,
    lse: jax.Array,
    cotangent: jax.Array,
    blocks: tuple[int, int] | None = None,
    *,
    wide: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v from the output and the log-sum-exp, repeating the scores block by block.

    Args:
        spec, q, k, v, bias, extras, blocks: as in `forward`.
        wide: return gradients in float32 or wider, as parts of sums want it.
        out, lse: what `forward` returned.
        cotangent: of the output.

    Returns:
        Gradients shaped like q, k and v, and typed like them or wide.

    Source: Dao 2023, "FlashAttention-2", algorithm 2.
    """
    p = _problem(spec, q, k, v, bias, extras, blocks)
    dtype = wide_dtype(q.dtype)
    saved = _saved(p, out, lse, cotangent)
    start = tuple(jnp.zeros(x.shape, dtype) for x in (p.q, p.k, p.v))

    def step(carry, block):
        return _backward_block(spec, p, saved, carry, block), None

    (dq, dk, dv), _ = lax.scan(step, start, _list(spec, p, q.shape[1]))
    dk, dv = (x.swapaxes(1, 2)[:, : k.shape[1]] for x in (dk, dv))
    grads = _by_rows(dq * spec.scale, q.shape[1]), dk * spec.scale, dv
    return grads if wide else tuple(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))


def bias_gradient(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    extras: Extras,
    out: jax.Array,
    lse: jax.Array,
    cotangent: jax.Array,
    blocks: tuple[int, int] | None = None,
) -> jax.Array:
    """Compute the gradient of the bias alone, in the bias's own shape and dtype; arguments as in `backward`.

    It stands apart so that a step which never reads this gradient does not compute it: the loop is then dead code.
    """
    p = _problem(spec, q, k, v, bias, extras, blocks)
    saved = _saved(p, out, lse, cotangent)
    wide = wide_dtype(q.dtype)

    def step(carry, block):
        i, j = block
        ds = _gradient_tile(spec, p, saved, i, j)[2]
        summed = tuple(axis for axis in range(5) if p.bias.shape[axis] == 1)
        ds = ds.sum(axis=summed, keepdims=True)
        row = i * p.blocks[0] if p.bias.shape[3] > 1 else jnp.int32(0)
        column = j * p.blocks[1] if p.bias.shape[4] > 1 else jnp.int32(0)
        start = (*[jnp.int32(0)] * 3, row, column)
        old = lax.dynamic_slice(carry, start, ds.shape)
        return lax.dynamic_update_slice(carry, old + ds, start), None

    grad, _ = lax.scan(step, jnp.zeros(p.bias.shape, wide), _list(spec, p, q.shape[1]))
    grad = grad.reshape(grad.shape[0], -1, *grad.shape[3:])
    return grad[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)


# One block.


def _forward_block(spec: Spec, p: _Problem, carry, block):
    (i, j), (top, total, acc) = block, carry
    scores, _, _, v = _scores(spec, p, i, j)
    start = i * p.blocks[0]
    old_acc = lax.dynamic_slice_in_dim(acc, start, p.blocks[0], 3)
    if spec.kind == "sigmoid":
        weights = tiles.sigmoid(spec, scores) * _factors(spec, p, i, j, scores.dtype)
        return top, total, lax.dynamic_update_slice_in_dim(acc, old_acc + _weigh(weights, v), start, 3)
    old_top = lax.dynamic_slice_in_dim(top, start, p.blocks[0], 3)
    old_total = lax.dynamic_slice_in_dim(total, start, p.blocks[0], 3)
    new_top = jnp.maximum(old_top, scores.max(axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    shrink = jnp.exp(old_top - new_top)
    new_total = old_total * shrink + weights.sum(axis=-1)
    weights = weights * _factors(spec, p, i, j, scores.dtype)
    new_acc = old_acc * shrink[..., None] + _weigh(weights, v)
    return (
        lax.dynamic_update_slice_in_dim(top, new_top, start, 3),
        lax.dynamic_update_slice_in_dim(total, new_total, start, 3),
        lax.dynamic_update_slice_in_dim(acc, new_acc, start, 3),
    )


def _backward_block(spec: Spec, p: _Problem, saved, carry, block):
    (i, j), (dq, dk, dv) = block, carry
    q, k, ds, slope, weights, cotangent = _gradient_tile(spec, p, saved, i, j)
    ds = ds if slope is None else ds * slope
    row, column = i * p.blocks[0], j * p.blocks[1]
    wide = ds.dtype
    ds = ds.astype(q.dtype)
    more_q = jnp.einsum("bkgqs,bksd->bkgqd", ds, k, preferred_element_type=wide)
    more_k = jnp.einsum("bkgqs,bkgqd->bksd", ds, q, preferred_element_type=wide)
    more_v = jnp.einsum("bkgqs,bkgqd->bksd", weights.astype(cotangent.dtype), cotangent, preferred_element_type=wide)
    return _add(dq, more_q, row, 3), _add(dk, more_k, column, 2), _add(dv, more_v, column, 2)


def _gradient_tile(spec: Spec, p: _Problem, saved, i, j):
    """Return q's and k's blocks, the gradient of the scores, the cap's slope, the weights and the cotangent's block."""
    delta, top, rest, cotangent = saved
    scores, slope, q, v = _scores(spec, p, i, j)
    top, rest, delta, cotangent = (
        lax.dynamic_slice_in_dim(x, i * p.blocks[0], p.blocks[0], 3) for x in (top, rest, delta, cotangent)
    )
    factors = _factors(spec, p, i, j, scores.dtype)
    dweights = jnp.einsum("bkgqd,bksd->bkgqs", cotangent, v, preferred_element_type=scores.dtype) * factors
    if spec.kind == "sigmoid":
        weights = tiles.sigmoid(spec, scores)
        ds = weights * (1 - weights) * dweights
    else:
        weights = jnp.exp(scores - top[..., None] - rest[..., None])
        ds = weights * (dweights - delta[..., None])
    k = lax.dynamic_slice_in_dim(p.k, j * p.blocks[1], p.blocks[1], 2)
    return q, k, ds, slope, weights * factors, cotangent


def _scores(spec: Spec, p: _Problem, i, j):
    """Return the masked scores of a block, the derivative of the cap, and the blocks of q and v."""
    block_q, block_k = p.blocks
    q = lax.dynamic_slice_in_dim(p.q, i * block_q, block_q, 3)
    k, v = (lax.dynamic_slice_in_dim(x, j * block_k, block_k, 2) for x in (p.k, p.v))
    wide = wide_dtype(q.dtype)
    products = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=wide)
    scores, slope = tiles.capped(spec, products)
    rows, columns = _positions(p, i, j)
    if p.bias is not None:
        scores = scores + _tile(p.bias, p, i, j).astype(wide)
    if p.extras.slopes is not None:
        scores = scores + p.extras.slopes.astype(wide) * (columns - rows).astype(wide)
    return tiles.hide(scores, _keep(spec, p, i, j, rows, columns)), slope, q, v


def _keep(spec: Spec, p: _Problem, i, j, rows, columns):
    keep = tiles.allowed(spec, rows, columns)
    if p.k.shape[2] != p.keys:
        keep = tiles.both(keep, columns < p.keys)
    if (cells := spec.block_mask) is not None:
        size = spec.blocks[0]
        row = jnp.minimum(rows // size, cells.shape[0] - 1)
        keep = tiles.both(keep, jnp.asarray(cells)[row, jnp.minimum(columns // size, cells.shape[1] - 1)])
    if p.extras.q_segments is not None:
        keep = tiles.both(keep, _tile(p.extras.q_segments, p, i, j) == _tile(p.extras.kv_segments, p, i, j))
    return keep if p.extras.mask is None else tiles.both(keep, _tile(p.extras.mask, p, i, j))


def _factors(spec: Spec, p: _Problem, i, j, dtype):
    if not spec.dropout:
        return jnp.ones((), dtype)
    heads = jnp.arange(np.prod(p.q.shape[:3]), dtype=jnp.int32).reshape(*p.q.shape[:3], 1, 1)
    return tiles.kept(spec, p.extras.seed, heads, *_positions(p, i, j)).astype(dtype)


def _positions(p: _Problem, i, j):
    rows = i * p.blocks[0] + jnp.arange(p.blocks[0], dtype=jnp.int32)
    columns = j * p.blocks[1] + jnp.arange(p.blocks[1], dtype=jnp.int32)
    return rows.reshape(1, 1, 1, -1, 1), columns.reshape(1, 1, 1, 1, -1)


def _weigh(weights, v):
    return jnp.einsum("bkgqs,bksd->bkgqd", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)


def _add(whole, part, start, axis: int):
    old = lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(whole, old + part, start, axis)


def _tile(x, p: _Problem, i, j):
    """Slice a block of a `[batch, kv_heads, group, queries, keys]` array, where a size of 1 broadcasts."""
    for axis, index, size in ((3, i, p.blocks[0]), (4, j, p.blocks[1])):
        x = lax.dynamic_slice_in_dim(x, index * size, size, axis) if x.shape[axis] > 1 else x
    return x


# Layout.


def _problem(spec: Spec, q, k, v, bias, extras: Extras, blocks) -> _Problem:
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    blocks = blocks or lean_blocks(batch * heads, queries, keys, spec)
    pad_q, pad_k = -queries % blocks[0], -keys % blocks[1]
    q = _pad(q.transpose(0, 2, 1, 3), 2, pad_q).reshape(batch, kv_heads, heads // kv_heads, queries + pad_q, -1)
    k, v = (_pad(x.transpose(0, 2, 1, 3), 2, pad_k) for x in (k, v))
    extras = extras._replace(
        mask=_five(extras.mask, kv_heads, pad_q, pad_k),
        q_segments=_five(_four(extras.q_segments, 3), kv_heads, pad_q, 0),
        kv_segments=_five(_four(extras.kv_segments, 2), kv_heads, 0, pad_k),
        slopes=None if extras.slopes is None else extras.slopes.reshape(1, kv_heads, -1, 1, 1),
    )
    return _Problem(q, k, v, _five(bias, kv_heads, pad_q, pad_k), extras, keys, blocks)


def _saved(p: _Problem, out, lse, cotangent):
    """Lay out what the backward pass reads: row sums of output times cotangent, the log-sum-exp, the cotangent."""
    pad = p.q.shape[3] - out.shape[1]
    wide = lse.dtype
    delta = jnp.einsum("bqhd,bqhd->bhq", out, cotangent, preferred_element_type=wide)
    delta = _pad(delta, 2, pad).reshape(p.q.shape[:4])
    top = _pad(lse[:, :, 0], 2, pad).reshape(p.q.shape[:4])
    rest = _pad(lse[:, :, 1], 2, pad, jnp.inf).reshape(p.q.shape[:4])  # the weights of padded rows are 0
    cotangent = _pad(cotangent.transpose(0, 2, 1, 3), 2, pad)
    return delta, top, rest, cotangent.reshape(*p.q.shape[:4], cotangent.shape[-1])


def _by_rows(x, queries: int):
    """`[batch, kv_heads, group, padded queries, dim]` to `[batch, queries, heads, dim]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)[:, :queries]


def _list(spec: Spec, p: _Problem, queries: int):
    walk = visits(spec, queries, p.keys, *p.blocks)
    return jnp.asarray(walk.rows), jnp.asarray(walk.columns)


def _four(x, axis: int):
    """`[batch, length]` to `[batch, 1, length, 1]` or `[batch, 1, 1, length]`."""
    return None if x is None else x.reshape(x.shape[0], 1, *((-1, 1) if axis == 3 else (1, -1)))


def _five(x, kv_heads: int, pad_q: int, pad_k: int):
    """`[batch, heads, queries, keys]`, any of them 1, to five axes, padded to whole blocks where they are not 1."""
    if x is None:
        return None
    if x.shape[2] > 1:
        x = _pad(x, 2, pad_q)
    if x.shape[3] > 1:
        x = _pad(x, 3, pad_k)
    heads = (kv_heads, x.shape[1] // kv_heads) if x.shape[1] > 1 else (1, 1)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _pad(x, axis: int, count: int, value: float = 0):
    if not count:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths, constant_values=value)
