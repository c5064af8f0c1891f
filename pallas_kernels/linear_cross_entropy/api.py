"""One `linear_cross_entropy` for all platforms: checks the call, chooses a form, and differentiates.

In: arrays as users hold them. Out: a loss per token; the backward pass keeps the log-sum-exp of each token, named
`linear_cross_entropy_lse` for `jax.checkpoint` policies. A form that cannot serve a call is passed over with a logged
sentence; the pure-JAX form serves every call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from . import lean, reference, tpu
from .reference import Spec

Implementation = Literal["reference", "lean", "tpu"]
_log = logging.getLogger("memopt.pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way to compute the loss: which code, tile sizes (None: chosen by shape), and whether kernels are emulated.

    `parts` are those of the vocabulary that "lean" walks side by side, each slice one of every part: where devices
    split the vocabulary. "lean" takes tokens of more than one dimension.
    """

    name: Implementation
    blocks: tuple[int, int] | None = None
    interpret: bool = False
    parts: int = 1


def linear_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    vocab_axis: int = 1,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    implementation: Implementation | None = None,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute the cross-entropy of `hidden @ weight` without ever holding the logits.

    Memory: one float32 a token is kept for the backward pass; logits exist one tile at a time. Cost: the backward pass
    computes the logits again, once in the pure-JAX form, once or twice in the kernels (`tpu.backward`).

    Args:
        hidden: `[tokens, dim]`, bfloat16, float32 or float64.
        weight: `[dim, vocab]`, any floating dtype; cast to `hidden`'s, tile by tile.
        labels: int32 `[tokens]`, each in `[0, vocab)` or `ignore_index`.
        vocab_axis: 0 for a weight `[vocab, dim]`, such as a tied embedding.
        ignore_index: tokens with this label have loss zero and no gradient.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp, added to the loss.
        soft_cap: `cap` in `cap * tanh(logit / cap)`.
        implementation: None to choose; or "reference", "lean", "tpu".
        blocks: `(tokens, vocabulary entries)` of a tile, None to choose by shape; "lean" reads the second alone.
        interpret: run the kernels' bodies in JAX, on any platform (slow; for tests).

    Returns:
        `[tokens]`, float32 (float64 for float64 operands), in nats.

    Raises:
        ValueError: shapes or settings do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> hidden, weight = jnp.zeros((2, 4)), jnp.zeros((4, 8))
        >>> linear_cross_entropy(hidden, weight, jnp.array([1, 7])).round(4).tolist()
        [2.0794, 2.0794]

    Source: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models". Tiles whose softmax vanishes are
    not skipped: the result is exact.

    Limits: first derivatives in reverse mode only, but for "reference".
    """
    spec = Spec(
        vocab_axis=vocab_axis,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        soft_cap=soft_cap,
    )
    _check(spec, hidden, weight, labels)
    labels = labels.astype(jnp.int32)
    if implementation == "reference":
        return reference.linear_cross_entropy(spec, hidden, weight, labels)
    if implementation is not None:
        form = Form(name=implementation, blocks=blocks, interpret=interpret)
        if why := problem(form, spec, hidden, weight, labels):
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
        return run(form, spec, hidden, weight, labels)
    plain = functools.partial(run, Form(name="lean", blocks=blocks), spec)
    why = tpu.problem(spec, hidden, weight, labels, None)
    if why:
        _log.info("linear cross-entropy on tpu falls back to pure JAX: %s", why)
        return plain(hidden, weight, labels)
    kernel = functools.partial(run, Form(name="tpu"), spec)
    return jax.lax.platform_dependent(hidden, weight, labels, default=plain, tpu=kernel)


def contrastive_loss(first: jax.Array, second: jax.Array, *, scale: Any = 1.0, **settings: Any) -> jax.Array:
    """Compute the symmetric contrastive (InfoNCE) loss of pairs without the matrix of similarities.

    Memory and cost are those of two `linear_cross_entropy` calls with a vocabulary of as many entries as pairs.

    Args:
        first, second: `[pairs, dim]`; row `i` of one belongs to row `i` of the other.
        scale: factor of the similarities, a number or a scalar array (its gradient flows).
        **settings: settings of `linear_cross_entropy`, `vocab_axis` apart.

    Returns:
        `[pairs]`, the mean of both directions for each pair.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> contrastive_loss(jnp.eye(2), jnp.eye(2), scale=100.0).tolist()
        [0.0, 0.0]

    Source: Cheng et al. 2024, "Breaking the memory barrier: near infinite batch size scaling for contrastive loss".
    """
    if first.shape != second.shape:
        raise ValueError(f"first {first.shape} and second {second.shape} must be equal: one row a pair")
    labels = jnp.arange(first.shape[0], dtype=jnp.int32)
    scale = jnp.asarray(scale, first.dtype)
    losses = [
        linear_cross_entropy(a * scale, b, labels, vocab_axis=0, **settings)
        for a, b in ((first, second), (second, first))
    ]
    return (losses[0] + losses[1]) * 0.5


def problem(form: Form, spec: Spec, hidden: Any, weight: Any, labels: Any) -> str | None:
    """Say why a form cannot serve a call, or None where it can; shapes and dtypes of the arguments are enough."""
    return tpu.problem(spec, hidden, weight, labels, form.blocks) if form.name == "tpu" else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(form: Form, spec: Spec, hidden, weight, labels):
    """Compute the losses in one form."""
    return forward(form, spec, hidden, weight, labels)[0]


def forward(form: Form, spec: Spec, hidden, weight, labels) -> tuple[jax.Array, jax.Array]:
    """Return the losses and the log-sum-exps."""
    if form.name == "tpu":
        return tpu.forward(spec, hidden, weight, labels, form.blocks, form.interpret)
    return lean.forward(spec, hidden, weight, labels, form.blocks and form.blocks[1], form.parts)


def backward(form: Form, spec: Spec, hidden, weight, labels, lse, cotangent) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of hidden states and weight from the log-sum-exps that `forward` returned."""
    operands = (hidden, weight, labels, lse, cotangent)
    if form.name == "tpu":
        return tpu.backward(spec, *operands, form.blocks, form.interpret)
    return lean.backward(spec, *operands, form.blocks and form.blocks[1], form.parts)


def _run_forward(form: Form, spec: Spec, hidden, weight, labels):
    loss, lse = forward(form, spec, hidden, weight, labels)
    return loss, (hidden, weight, labels, checkpoint_name(lse, "linear_cross_entropy_lse"))


def _run_backward(form: Form, spec: Spec, saved, cotangent):
    return *backward(form, spec, *saved, cotangent), None


run.defvjp(_run_forward, _run_backward)


def _check(spec: Spec, hidden, weight, labels) -> None:
    shapes = f"hidden {hidden.shape}, weight {weight.shape}, labels {labels.shape}"
    if hidden.ndim != 2 or weight.ndim != 2 or labels.ndim != 1 or spec.vocab_axis not in (0, 1):
        raise ValueError(f"{shapes}: give [tokens, dim], [dim, vocab] (vocab_axis=1) and [tokens]")
    if hidden.shape[1] != weight.shape[1 - spec.vocab_axis] or hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"{shapes}, vocab_axis={spec.vocab_axis}: dim and tokens must agree")
    if not jnp.issubdtype(hidden.dtype, jnp.floating) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"hidden {hidden.dtype}, labels {labels.dtype}: give floating hidden states, integer labels")
