"""The cross-entropy of a linear head for TPUs (Mosaic): a forward kernel, and one for both gradients or for each.

In: hidden states, weight, labels and the settings. Out: losses and log-sum-exps, or gradients. Logits exist one tile at
a time, tokens x vocabulary. Each of the 128 lanes keeps an online softmax of its own, and the lanes are merged once at
the end of the vocabulary. Gradients are summed in float32 in VMEM, so no temporary in HBM grows with either size.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .reference import Spec, capped, coefficients, combine

LANES = 128
HIDDEN = -3e38  # the logit of a column past the end of the vocabulary
LOWEST = -1.5e38  # where a running maximum starts
VMEM_BYTES = 100 * 2**20
HELD_BYTES = 64 * 2**20  # the float32 gradient of the hidden states that one kernel for both gradients holds in VMEM


def block_sizes(tokens: int, dim: int, vocab: int, device: str = "tpu") -> tuple[int, int]:
    """Choose `(tokens, vocabulary entries)` of a tile: a pure function of shape and device.

    512 tokens reuse each byte of the weight 512 times, twice what v5e needs to be bound by its matrix units.

    Args:
        tokens, dim, vocab: shape of the call.
        device: kind of device; all TPUs from v5e on are treated alike.

    Example:
        >>> block_sizes(8192, 2304, 256_000)
        (512, 512)
    """
    limit = 512 if dim <= 4096 else 256 if dim <= 8192 else 128
    return tuple(min(limit, -(-size // LANES) * LANES) for size in (tokens, vocab))


def problem(spec: Spec, hidden, weight, labels, blocks: tuple[int, int] | None) -> str | None:
    """Say why these kernels cannot serve a call, or None where they can."""
    allowed = (jnp.bfloat16, jnp.float32)
    if hidden.dtype not in allowed or weight.dtype not in allowed:
        return f"{hidden.dtype} hidden states and {weight.dtype} weights: bfloat16 and float32 are served"
    if hidden.shape[1] % LANES or hidden.shape[1] > 16_384:
        return f"a width of {hidden.shape[1]}: multiples of {LANES} up to 16,384 are served"
    if blocks and any(size % LANES for size in blocks):
        return f"blocks of {blocks}: multiples of {LANES} are needed"
    return None


def forward(
    spec: Spec, hidden, weight, labels, blocks: tuple[int, int] | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Compute the losses in one kernel; arguments and results as in `lean.forward`, `interpret` runs it on a CPU."""
    spec, weight = _as_laid_out(spec, weight)
    tokens, dim = hidden.shape
    vocab = weight.shape[spec.vocab_axis]
    block = blocks or block_sizes(tokens, dim, vocab)
    row = pl.BlockSpec((1, block[0]), lambda i, j: (0, i))
    call = pl.pallas_call(
        functools.partial(_forward_kernel, spec, vocab),
        grid=(pl.cdiv(tokens, block[0]), pl.cdiv(vocab, block[1])),
        in_specs=[row, pl.BlockSpec((block[0], dim), lambda i, j: (i, 0)), _weight_spec(spec, dim, block[1], 1)],
        out_specs=[row] * 3,
        out_shape=[jax.ShapeDtypeStruct((1, tokens), jnp.float32)] * 3,
        scratch_shapes=[pltpu.VMEM((block[0], LANES), dtype) for dtype in [jnp.int32] + [jnp.float32] * 4],
        compiler_params=_params(),
        interpret=interpret,
        name="memopt_linear_cross_entropy_forward",
    )
    lse, picked, total = (x[0] for x in call(labels[None], hidden, weight))
    return combine(spec, lse, picked, total, vocab, labels), lse


def backward(
    spec: Spec, hidden, weight, labels, lse, cotangent, blocks: tuple[int, int] | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Compute both gradients; arguments and results as in `lean.backward`.

    Where VMEM holds the gradient of all hidden states (`HELD_BYTES` of float32: 8,192 tokens of a width of 2,048), one
    kernel makes both and the logits once more; else there is a kernel for each, and the logits are made twice more.
    """
    if weight is not (turned := _as_laid_out(spec, weight))[1]:
        dhidden, dweight = backward(turned[0], hidden, turned[1], labels, lse, cotangent, blocks, interpret)
        return dhidden, dweight.T
    (tokens, dim), vocab = hidden.shape, weight.shape[spec.vocab_axis]
    block = blocks or block_sizes(tokens, dim, vocab)
    scale, target = coefficients(spec, lse, cotangent, labels)
    operands = (*(x[None] for x in (labels, lse, scale, target)), hidden, weight)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (hidden, weight)]
    grid = pl.cdiv(tokens, block[0]), pl.cdiv(vocab, block[1])
    both = grid[0] * block[0] * dim * 4 <= HELD_BYTES
    make = _both_gradients if both else _each_gradient
    return make(spec, tokens, vocab, dim, block, grid, operands, shapes, interpret)


def _as_laid_out(spec: Spec, weight) -> tuple[Spec, jax.Array]:
    """Turn a weight `[dim, vocab]` whose rows are ragged: XLA lays it out with `dim` last, a kernel would copy it."""
    if spec.vocab_axis == 0 or weight.shape[1] % LANES == 0:
        return spec, weight
    return dataclasses.replace(spec, vocab_axis=0), weight.T


def _both_gradients(spec: Spec, tokens, vocab, dim, block, grid, operands, shapes, interpret):
    """Compute both gradients in one kernel, which holds that of all hidden states: the logits are made once."""
    last = grid[1] - 1
    return pl.pallas_call(
        functools.partial(_both_kernel, spec, vocab, tokens),
        grid=grid[::-1],
        in_specs=_gradient_specs(spec, dim, block, 1),
        # The first block stays in place until the last slice of the vocabulary, which finishes one after another.
        out_specs=[
            pl.BlockSpec((block[0], dim), lambda j, i: (jnp.where(j == last, i, 0), 0)),
            _weight_spec(spec, dim, block[1], 0),
        ],
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM((grid[0], block[0], dim), jnp.float32),
            pltpu.VMEM(_part(spec, dim, block[1]), jnp.float32),
        ],
        compiler_params=_params("arbitrary"),
        interpret=interpret,
        name="memopt_linear_cross_entropy_gradients",
    )(*operands)


def _each_gradient(spec: Spec, tokens, vocab, dim, block, grid, operands, shapes, interpret):
    """Compute both gradients, each in a kernel of its own that makes the logits again."""
    shared = {"compiler_params": _params(), "interpret": interpret}
    dhidden = pl.pallas_call(
        functools.partial(_hidden_kernel, spec, vocab),
        grid=grid,
        in_specs=_gradient_specs(spec, dim, block, 0),
        out_specs=pl.BlockSpec((block[0], dim), lambda i, j: (i, 0)),
        out_shape=shapes[0],
        scratch_shapes=[pltpu.VMEM((block[0], dim), jnp.float32)],
        name="memopt_linear_cross_entropy_dhidden",
        **shared,
    )(*operands)
    dweight = pl.pallas_call(
        functools.partial(_weight_kernel, spec, vocab, tokens),
        grid=grid[::-1],
        in_specs=_gradient_specs(spec, dim, block, 1),
        out_specs=_weight_spec(spec, dim, block[1], 0),
        out_shape=shapes[1],
        scratch_shapes=[pltpu.VMEM(_part(spec, dim, block[1]), jnp.float32)],
        name="memopt_linear_cross_entropy_dweight",
        **shared,
    )(*operands)
    return dhidden, dweight


def _part(spec: Spec, dim: int, block: int) -> tuple[int, int]:
    return (dim, block) if spec.vocab_axis else (block, dim)


def _gradient_specs(spec: Spec, dim: int, block: tuple[int, int], token_axis: int):
    """Return the specs of `(labels, lse, scale, target, hidden, weight)`; `token_axis` of the grid walks the tokens."""
    row = pl.BlockSpec((1, block[0]), lambda *grid: (0, grid[token_axis]))
    hidden = pl.BlockSpec((block[0], dim), lambda *grid: (grid[token_axis], 0))
    return [row] * 4 + [hidden, _weight_spec(spec, dim, block[1], 1 - token_axis)]


def _weight_spec(spec: Spec, dim: int, block: int, grid_axis: int):
    if spec.vocab_axis:
        return pl.BlockSpec((dim, block), lambda *grid: (0, grid[grid_axis]))
    return pl.BlockSpec((block, dim), lambda *grid: (grid[grid_axis], 0))


def _params(outer: str = "parallel"):
    return pltpu.CompilerParams(dimension_semantics=(outer, "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


# Kernels.


def _forward_kernel(
    spec, vocab, labels_ref, hidden_ref, weight_ref, lse_ref, picked_ref, total_ref, label_ref, top, rest, picked, total
):
    j, steps = pl.program_id(1), pl.num_programs(1)

    @pl.when(j == 0)
    def _():
        label_ref[...] = _as_lanes(labels_ref[...])
        top[...] = jnp.full_like(top, LOWEST)
        for ref in (rest, picked, total):
            ref[...] = jnp.zeros_like(ref)

    def update(ragged: bool):
        logits, _ = _tile(spec, hidden_ref, _weight(spec, weight_ref, vocab, j, ragged))
        columns = j * logits.shape[1] + lax.broadcasted_iota(jnp.int32, (logits.shape[0], LANES), 1)
        _merge(logits, columns, vocab if ragged else None, label_ref[...], (top, rest, picked, total))

    _for_ragged(vocab, weight_ref.shape[spec.vocab_axis], j, steps, update)

    @pl.when(j == steps - 1)
    def _():
        peak = top[...].max(axis=1, keepdims=True)
        spread = (rest[...] * jnp.exp(top[...] - peak)).sum(axis=1, keepdims=True)
        lse_ref[...] = _as_row(peak + jnp.log(spread))
        picked_ref[...] = _as_row(picked[...].sum(axis=1, keepdims=True))
        total_ref[...] = _as_row(total[...].sum(axis=1, keepdims=True))


def _merge(logits, columns, vocab, labels, refs):
    """Take a tile into the running statistics of each lane: maximum, sum of exponentials, label's logit, sum."""
    top_ref, rest_ref, picked_ref, total_ref = refs
    top, picked, total = top_ref[...], picked_ref[...], total_ref[...]
    slices = []
    for start in range(0, logits.shape[1], LANES):
        part, column = logits[:, start : start + LANES], columns + start
        total = total + (part if vocab is None else jnp.where(column < vocab, part, jnp.zeros_like(part)))
        part = part if vocab is None else jnp.where(column < vocab, part, jnp.full_like(part, HIDDEN))
        picked = picked + jnp.where(column == labels, part, jnp.zeros_like(part))
        slices.append(part)
    new_top = functools.reduce(jnp.maximum, slices, top)
    rest = rest_ref[...] * jnp.exp(top - new_top)
    for part in slices:
        rest = rest + jnp.exp(part - new_top)
    top_ref[...], rest_ref[...], picked_ref[...], total_ref[...] = new_top, rest, picked, total


def _hidden_kernel(spec, vocab, labels_ref, lse_ref, scale_ref, target_ref, hidden_ref, weight_ref, out_ref, acc):
    j, steps = pl.program_id(1), pl.num_programs(1)

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def update(ragged: bool):
        weight = _weight(spec, weight_ref, vocab, j, ragged)
        rows = (labels_ref, lse_ref, scale_ref, target_ref)
        grad = _gradient(spec, vocab, j, ragged, rows, hidden_ref, weight)
        acc[...] += _dot(grad, weight, 1, spec.vocab_axis)

    _for_ragged(vocab, weight_ref.shape[spec.vocab_axis], j, steps, update)

    @pl.when(j == steps - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)


def _weight_kernel(
    spec, vocab, tokens, labels_ref, lse_ref, scale_ref, target_ref, hidden_ref, weight_ref, out_ref, acc
):
    i, steps, j = pl.program_id(1), pl.num_programs(1), pl.program_id(0)

    @pl.when(i == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def update(ragged: bool):
        # Columns past the end of the vocabulary reach no output, so the weight needs no mask here.
        weight = weight_ref[...].astype(hidden_ref.dtype)
        rows = (labels_ref, lse_ref, scale_ref, target_ref)
        grad, hidden = _gradient(spec, vocab, j, False, rows, hidden_ref, weight), hidden_ref[...]
        if ragged:
            grad, hidden = (_first_rows(x, tokens - i * hidden.shape[0]) for x in (grad, hidden))
        acc[...] += _dot(hidden, grad, 0, 0) if spec.vocab_axis else _dot(grad, hidden, 0, 0)

    _for_ragged(tokens, hidden_ref.shape[0], i, steps, update)

    @pl.when(i == steps - 1)
    def _():
        out_ref[...] = acc[...].astype(out_ref.dtype)


def _both_kernel(
    spec, vocab, tokens, labels_ref, lse_ref, scale_ref, target_ref, hidden_ref, weight_ref, dhidden_ref, dweight_ref,
    held, acc
):  # fmt: skip
    j, i, vocab_steps, token_steps = pl.program_id(0), pl.program_id(1), pl.num_programs(0), pl.num_programs(1)

    @pl.when(j == 0)
    def _():
        held[i] = jnp.zeros(held.shape[1:], held.dtype)

    @pl.when(i == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    rows = (labels_ref, lse_ref, scale_ref, target_ref)

    def update(ragged_vocab: bool, ragged_tokens: bool):
        weight = _weight(spec, weight_ref, vocab, j, ragged_vocab).astype(hidden_ref.dtype)
        grad, hidden = _gradient(spec, vocab, j, ragged_vocab, rows, hidden_ref, weight), hidden_ref[...]
        held[i] += _dot(grad, weight, 1, spec.vocab_axis)
        if ragged_tokens:
            grad, hidden = (_first_rows(x, tokens - i * hidden_ref.shape[0]) for x in (grad, hidden))
        acc[...] += _dot(hidden, grad, 0, 0) if spec.vocab_axis else _dot(grad, hidden, 0, 0)

    def by_tokens(ragged_vocab: bool):
        inner = functools.partial(update, ragged_vocab)
        _for_ragged(tokens, hidden_ref.shape[0], i, token_steps, inner)

    _for_ragged(vocab, weight_ref.shape[spec.vocab_axis], j, vocab_steps, by_tokens)

    @pl.when(i == token_steps - 1)
    def _():
        dweight_ref[...] = acc[...].astype(dweight_ref.dtype)

    @pl.when(j == vocab_steps - 1)
    def _():
        dhidden_ref[...] = held[i].astype(dhidden_ref.dtype)


def _first_rows(x, count):
    """Return a block with the rows from `count` on, which lie past the end of the array, set to zero."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < count, x, jnp.zeros_like(x))


def _gradient(spec: Spec, vocab: int, j, ragged: bool, rows, hidden_ref, weight):
    """Return the gradient of a tile of logits before the cap, in the dtype of the product."""
    labels, lse, scale, target = (_as_lanes(ref[...])[:, :1] for ref in rows)
    logits, slope = _tile(spec, hidden_ref, weight)
    columns = j * logits.shape[1] + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    grad = scale * jnp.exp(logits - lse)
    grad = grad - jnp.where(columns == labels, (1 - spec.label_smoothing) * target, jnp.zeros_like(grad))
    if spec.label_smoothing:
        grad = grad - (spec.label_smoothing / vocab) * target
    grad = grad if slope is None else grad * slope
    if ragged:
        grad = jnp.where(columns < vocab, grad, jnp.zeros_like(grad))
    return grad.astype(hidden_ref.dtype)


def _for_ragged(size: int, block: int, index, steps, update) -> None:
    """Run `update(ragged)`: the last block along an axis that no block divides is ragged, all others are whole."""
    if size % block == 0:
        update(False)
    else:
        lax.cond(index == steps - 1, functools.partial(update, True), functools.partial(update, False))


def _tile(spec: Spec, hidden_ref, weight):
    return capped(spec, _dot(hidden_ref[...], weight, 1, 1 - spec.vocab_axis))


def _weight(spec: Spec, weight_ref, vocab: int, j, ragged: bool):
    """Return the block of the weight in the dtype of the product, zero past the end of the vocabulary."""
    weight = weight_ref[...]
    if ragged:
        axis = spec.vocab_axis
        index = j * weight.shape[axis] + lax.broadcasted_iota(jnp.int32, weight.shape, axis)
        weight = jnp.where(index < vocab, weight, jnp.zeros_like(weight))
    return weight


def _as_lanes(row):
    """`[1, tokens]` to `[tokens, 128]`, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _as_row(column):
    """`[tokens, 1]` to `[1, tokens]`."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _dot(a, b, a_axis: int, b_axis: int):
    b = b.astype(a.dtype)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
