"""One `attention` for all platforms: checks the call, chooses a form by platform, dtype and shape, and differentiates.

In: arrays as users hold them. Out: the output; the backward pass keeps it and the log-sum-exp of each row, named
`attention_out` and `attention_lse` for `jax.checkpoint` policies. A form that cannot serve a call is passed over with a
logged sentence; the pure-JAX form serves every call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from memopt.pallas_kernels._device import default_device
from memopt.pallas_kernels._dtypes import wide as wide_dtype

from . import gpu, lean, reference, tpu, tpu_backward
from .spec import Extras, Spec

Implementation = Literal["reference", "lean", "tpu", "gpu"]
_log = logging.getLogger("memopt.pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way to compute attention.

    Attributes:
        name: which code.
        blocks: block sizes, None: chosen by shape.
        interpret: whether kernels are emulated.
        device: the kind of device that TPU kernels are laid out for, None: JAX's default one. All compute the same.
    """

    name: Implementation
    blocks: tuple[int, int] | None = None
    interpret: bool = False
    device: str | None = None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int = 0,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    block_mask: Any = None,
    block_mask_size: int = 128,
    kind: Literal["softmax", "sigmoid"] = "softmax",
    sigmoid_bias: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    masked_rows: Literal["zero", "mean"] = "zero",
    implementation: Implementation | None = None,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute exact attention with memory linear in the length, forward and backward.

    Memory: the output and two float32 a row and head (its log-sum-exp, in two parts) are kept for the backward pass;
    scores exist one tile at a time. Cost: the backward pass computes the scores again. Blocks that `is_causal`,
    `local_window_size` or `block_mask` hide are skipped.

    The arguments are those of `jax.nn.dot_product_attention`, and more. A pair of query row `r` and key column `c` has
    the score `scale * q[r] . k[c]`, then soft-capped, then plus `bias` and ALiBi term; it counts where every mask
    allows it.

    Args:
        q: `[batch, queries, heads, head_dim]`, bfloat16, float16, float32 or float64.
        k: `[batch, keys, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        v: `[batch, keys, kv_heads, value_dim]`.
        bias: added to the scores; broadcastable to `[batch, heads, queries, keys]`, four axes; has a gradient.
        mask: bool, shaped like `bias`; True allows.
        scale: None for `1 / sqrt(head_dim)`.
        is_causal: allow `c <= r + causal_offset` alone.
        causal_offset: shifts the diagonal right; `keys - queries` aligns the ends.
        query_seq_lengths, key_value_seq_lengths: int32 `[batch]`, numbers of valid tokens.
        local_window_size: `(left, right)` or one number for both: allow `r - left <= c <= r + right`; None is no bound.
        q_segment_ids, kv_segment_ids: int32 `[batch, length]`, not negative; only pairs of equal ids are allowed.
            `kv_segment_ids` may be left out where the lengths are equal.
        soft_cap: `cap` in `cap * tanh(score / cap)`.
        alibi_slopes: float32 `[heads]`; `slope * (c - r)` is added. A constant: it has no gradient.
        block_mask: bool, numpy, `[queries / size, keys / size]` rounded up: which blocks of pairs exist at all.
        block_mask_size: the size of its blocks.
        kind: `"softmax"` or `"sigmoid"`, where each weight is `sigmoid(score + sigmoid_bias)`.
        sigmoid_bias: see `kind`; usually `-log(keys)`.
        dropout_rate: share of the weights that is dropped; needs `dropout_key`.
        dropout_key: a JAX key. The same key drops the same pairs on every platform.
        masked_rows: what a row with no allowed key returns: zeros, or the mean of all values, which is what a softmax
            over equal large negative scores gives.
        implementation: None to choose; or "reference", "lean", "tpu", "gpu".
        blocks: `(block_q, block_k)`, None to choose by shape.
        interpret: run the kernels' bodies in JAX, on any platform (slow; for tests).

    Returns:
        `[batch, queries, heads, value_dim]` in `q`'s dtype.

    Raises:
        ValueError: shapes or settings do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> q = k = v = jnp.ones((1, 8, 2, 16))
        >>> attention(q, k, v, is_causal=True).shape
        (1, 8, 2, 16)

    Source: Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2".

    Limits: scores below -1.5e38 count as hidden. First derivatives in reverse mode only, but for "reference".
    """
    _check(q, k, v)
    spec = Spec(
        scale=reference.default_scale(q.shape[-1]) if scale is None else float(scale),
        causal=is_causal,
        offset=causal_offset if is_causal else 0,
        window=_window(local_window_size),
        soft_cap=soft_cap,
        kind=kind,
        sigmoid_bias=sigmoid_bias,
        dropout=float(dropout_rate),
        blocks=_blocks(block_mask, block_mask_size, q.shape[1], k.shape[1]),
    )
    if not 0 <= spec.dropout < 1 or (spec.dropout and dropout_key is None):
        raise ValueError(f"{dropout_rate=} must be in [0, 1), and needs a dropout_key above 0")
    segments = _segments(q, k, q_segment_ids, kv_segment_ids, query_seq_lengths, key_value_seq_lengths)
    extras = Extras(
        mask=_four(mask, "mask", q, k),
        q_segments=segments[0],
        kv_segments=segments[1],
        slopes=None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes),
        seed=jax.random.bits(dropout_key, (2,), jnp.uint32) if spec.dropout else None,
    )
    bias = _four(bias, "bias", q, k)
    out = _dispatch(spec, implementation, blocks, interpret, (q, k, v, bias, extras))
    return out if masked_rows == "zero" else mean_where_masked(spec, out, v, extras)


def problem(form: Form, spec: Spec, q: Any, k: Any, v: Any, bias: Any, extras: Extras) -> str | None:
    """Say why a form cannot serve a call, or None where it can; shapes and dtypes of the arguments are enough.

    Example:
        >>> x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.float64)
        >>> problem(Form(name="tpu"), Spec(scale=1.0), x, x, x, None, Extras())
        'float64 operands: the kernel computes in bfloat16 or float32'
    """
    if form.name == "tpu":
        return tpu.problem(spec, q, k, v, bias, extras, form.blocks)
    if form.name == "gpu":
        return gpu.problem(spec, q, k, v, bias, extras, form.blocks)
    return None


# Differentiation.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(form: Form, spec: Spec, q, k, v, bias, extras: Extras):
    """Compute attention in one form; `bias` may be None. See `reference.attention` for the arguments."""
    return forward(form, spec, q, k, v, bias, extras)[0]


def forward(form: Form, spec: Spec, q, k, v, bias, extras: Extras) -> tuple[jax.Array, jax.Array]:
    """Return the output and the log-sum-exp of each row in two parts, see `lean.forward`."""
    if form.name == "tpu":
        device = form.device or default_device()
        return tpu.forward(spec, q, k, v, bias, extras, form.blocks, form.interpret, device)
    if form.name == "gpu":
        return gpu.forward(spec, q, k, v, bias, extras, form.blocks, form.interpret)
    return lean.forward(spec, q, k, v, bias, extras, form.blocks)


def backward(form: Form, spec: Spec, q, k, v, bias, extras: Extras, out, lse, cotangent):
    """Return the gradients of q, k, v and bias (None without one) from what `forward` returned."""
    operands = (q, k, v, bias, extras, out, lse, cotangent)
    if form.name == "tpu":
        device = form.device or default_device()
        grads = tpu_backward.backward(spec, *operands, form.blocks, form.interpret, device)
    elif form.name == "gpu":
        grads = gpu.backward(spec, *operands, form.blocks, form.interpret)
    else:
        grads = lean.backward(spec, *operands, form.blocks)
    blocks = form.blocks if form.name == "lean" else None
    if bias is None:
        return *grads, None
    lse = lse * tpu.LN2 if form.name == "tpu" else lse  # the pure-JAX form counts in units of 1
    return *grads, lean.bias_gradient(spec, q, k, v, bias, extras, out, lse, cotangent, blocks)


def _run_forward(form: Form, spec: Spec, q, k, v, bias, extras: Extras):
    out, lse = forward(form, spec, q, k, v, bias, extras)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, bias, extras, out, lse)


def _run_backward(form: Form, spec: Spec, saved, cotangent):
    return *backward(form, spec, *saved, cotangent), None


run.defvjp(_run_forward, _run_backward)


# Dispatch.


def _dispatch(spec: Spec, implementation: Implementation | None, blocks, interpret: bool, operands) -> jax.Array:
    if implementation == "reference":
        return reference.attention(spec, *operands)
    if implementation is not None:
        form = Form(name=implementation, blocks=blocks, interpret=interpret)
        if why := problem(form, spec, *operands):
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
        return run(form, spec, *operands)
    plain = functools.partial(run, Form(name="lean", blocks=blocks), spec)
    choices = {"tpu": _served("tpu", spec, operands), "cuda": _served("gpu", spec, operands)}
    choices = {platform: functools.partial(run, form, spec) for platform, form in choices.items() if form}
    return jax.lax.platform_dependent(*operands, default=plain, **choices) if choices else plain(*operands)


def _served(name: Implementation, spec: Spec, operands) -> Form | None:
    form = Form(name=name)
    why = problem(form, spec, *operands)
    if why:
        _log.info("attention on %s falls back to pure JAX: %s", name, why)
    return None if why else form


def mean_where_masked(spec: Spec, out, v, extras: Extras):
    """Return the output with the mean of all values in the rows that have no allowed key."""
    keep = reference.mask(spec, extras, out.shape[1], v.shape[1])
    if keep is None:
        return out
    some = keep.any(axis=-1)  # [batch or 1, heads or 1, queries or 1]
    wide = wide_dtype(v.dtype)
    mean = v.mean(axis=1, keepdims=True, dtype=wide).astype(out.dtype)
    mean = jnp.repeat(mean, out.shape[2] // v.shape[2], axis=2)
    return jnp.where(some.swapaxes(1, 2)[..., None], out, mean)


# The call.


def _check(q, k, v) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes}: each must be [batch, length, heads, head_dim]")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: batch must agree, k and v in length and heads, q and k in head_dim")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: the heads of q must be a multiple of those of k")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one floating dtype")


def _four(x, name: str, q, k):
    if x is None:
        return None
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if x.ndim != 4 or any(have not in (1, want) for have, want in zip(x.shape, full, strict=True)):
        raise ValueError(f"{name} {x.shape} does not broadcast to [batch, heads, queries, keys] = {full}")
    if name == "mask" and x.dtype != jnp.bool_:
        raise ValueError(f"mask has dtype {x.dtype}: give a bool mask, or add it as bias")
    return x


def _window(size) -> tuple[int | None, int | None] | None:
    if size is None:
        return None
    return tuple(size) if isinstance(size, Sequence) else (int(size), int(size))


def _blocks(mask, size: int, queries: int, keys: int):
    if mask is None:
        return None
    mask = np.asarray(mask, bool)
    expected = (-(-queries // size), -(-keys // size))
    if mask.shape != expected:
        raise ValueError(f"block_mask {mask.shape} must be {expected} for blocks of {size}: [queries, keys] rounded up")
    return size, *mask.shape, mask.tobytes()


def _segments(q, k, q_ids, kv_ids, q_lengths, kv_lengths):
    """Return segment ids of queries and keys, with those past a sequence's end in segments of their own."""
    if q_ids is not None and kv_ids is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"kv_segment_ids is needed: {q.shape[1]} queries, {k.shape[1]} keys")
        kv_ids = q_ids
    if kv_ids is not None and q_ids is None:
        raise ValueError("kv_segment_ids was given without q_segment_ids")
    if q_ids is None and q_lengths is None and kv_lengths is None:
        return None, None
    return _ended(q, q_ids, q_lengths, -1), _ended(k, kv_ids, kv_lengths, -2)


def _ended(x, ids, lengths, outside: int):
    ids = jnp.zeros(x.shape[:2], jnp.int32) if ids is None else ids.astype(jnp.int32)
    if lengths is None:
        return ids
    return jnp.where(jnp.arange(x.shape[1])[None] < lengths[:, None], ids, outside)
