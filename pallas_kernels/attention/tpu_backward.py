"""The backward kernels of attention for TPUs: one for all gradients, or one for q's and one for those of k and v.

In: the operands of the forward pass, its output and log-sum-exp, and the output's cotangent. Out: gradients. Tiles are
keys x queries, as in `tpu`, whose pieces these kernels are built from; the scores are computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tiles
from .spec import Extras, Spec, Visits, visits
from .tpu import (
    LOG2E,
    Layout,
    Tile,
    block_sizes,
    by_heads,
    compiler_params,
    dot,
    extra_operands,
    layout,
)
from .tpu_parts import (
    FIRST,
    HEAD_SHIFT,
    KEYS_AT_ONCE,
    LAST,
    Kind,
    Part,
    Tiling,
    cost,
    counted,
    flags_of,
    for_each_kind,
    kinds,
    parts,
    tiling,
)

HELD_BYTES = 32 * 2**20  # the float32 gradient of a group's queries that one kernel holds in VMEM
HELD_VISITS = 8_192  # the visits whose four lists it keeps in scalar memory
OUT_HEAD_SHIFT, OUT_ROWS = 18, 0xFFFF  # where a visit's list says which block of q's gradient is finished next


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
    interpret: bool = False,
    device: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v; arguments and results as in `lean.backward`.

    One kernel makes all three where VMEM holds the gradient of all queries of a group of heads (`HELD_BYTES`); else
    there are two, which make scores and weights twice, so that nothing is accumulated in HBM.

    Source: Dao 2023, "FlashAttention-2", algorithm 2.
    """
    width = max(q.shape[3], v.shape[3])
    lay, how = layout(q, k, blocks or block_sizes(q.shape[1], k.shape[1], width, spec)), tiling(width, device)
    walk = visits(spec, lay.queries, lay.keys, lay.block_q, lay.block_k)
    delta = jnp.einsum("bqhd,bqhd->bhq", out, cotangent, preferred_element_type=jnp.float32)
    fill = (-lay.queries) % lay.block_q
    rows = ((0, 0), (0, 0), (0, fill))
    lse = jnp.pad(lse, ((0, 0), *rows), constant_values=jnp.inf)  # the weights of padded rows are 0
    delta = jnp.pad(delta, rows)[:, :, None]
    q, cotangent = (by_heads(x, lay.block_q) for x in (q, cotangent))
    k, v = (by_heads(x, lay.block_k) for x in (k, v))
    operands = (q, k, v, cotangent, lse, delta)
    columns = walk.by_column()
    if _is_held(lay, q.shape[2], q.shape[3], len(walk.rows)):
        dq, dk, dv = _key_gradients(spec, lay, how, columns, operands, bias, extras, interpret, with_queries=True)
    else:
        dq = _query_gradient(spec, lay, how, walk, operands, bias, extras, interpret)
        dk, dv = _key_gradients(spec, lay, how, columns, operands, bias, extras, interpret)
    dq, dk, dv = (x.swapaxes(1, 2) for x in (dq, dk, dv))
    return dq[:, : lay.queries], dk[:, : lay.keys], dv[:, : lay.keys]


def _is_held(lay: Layout, queries: int, head_dim: int, visits: int) -> bool:
    """Whether one kernel holds the gradient of a group's queries, and scalar memory a fourth list of visits."""
    return lay.group * queries * head_dim * 4 <= HELD_BYTES and visits * lay.group <= HELD_VISITS


def _query_gradient(spec: Spec, lay: Layout, how: Tiling, walk: Visits, operands, bias, extras, interpret: bool):
    q, k, v = operands[:3]
    extra, extra_specs, names = extra_operands(spec, lay, bias, extras)
    q_block = pl.BlockSpec((1, 1, lay.block_q, q.shape[3]), lambda b, h, t, i, j, f: (b, h, i[t], 0))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(lay.batch, lay.heads, len(walk.rows)),
        in_specs=[
            q_block,
            pl.BlockSpec((1, 1, lay.block_k, k.shape[3]), lambda b, h, t, i, j, f: (b, h // lay.group, j[t], 0)),
            pl.BlockSpec((1, 1, lay.block_k, v.shape[3]), lambda b, h, t, i, j, f: (b, h // lay.group, j[t], 0)),
            pl.BlockSpec((1, 1, lay.block_q, v.shape[3]), lambda b, h, t, i, j, f: (b, h, i[t], 0)),
            *[pl.BlockSpec((1, 1, n, lay.block_q), lambda b, h, t, i, j, f: (b, h, 0, i[t])) for n in (2, 1)],
            *extra_specs,
        ],
        out_specs=q_block,
        scratch_shapes=[pltpu.VMEM((q.shape[3], lay.block_q), jnp.float32)],
    )
    call = pl.pallas_call(
        functools.partial(_query_kernel, spec, lay, how, names, kinds(spec, lay, walk, names)),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=compiler_params(),
        cost_estimate=_cost(spec, lay, how, walk, names, 2 * q.shape[3] + v.shape[3], (*operands, *extra, q)),
        interpret=interpret,
        name="memopt_attention_dq",
    )
    flags = flags_of(spec, walk, walk.rows, lay, names)
    return call(jnp.asarray(walk.rows), jnp.asarray(walk.columns), jnp.asarray(flags), *operands, *extra)


def _query_kernel(spec: Spec, lay: Layout, how: Tiling, names, shown, rows_ref, columns_ref, flags_ref, *refs):
    ins, extra_refs, (dq_ref, acc_ref) = refs[:6], refs[6:-2], refs[-2:]
    step, head = pl.program_id(2), pl.program_id(0) * lay.heads + pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def update(kind: Kind):
        extra = dict(zip(names, extra_refs, strict=True))
        for part in _parts(spec, lay, kind, how):
            tile = Tile(spec, lay, extra, rows_ref[step], columns_ref[step], part)
            _, ds = _gradients(spec, tile, head, ins, kind.masked)
            k = ins[1][0, 0, part.keys]
            acc_ref[:, part.queries] += dot(k, ds.astype(k.dtype), 0, 0)

    for_each_kind(shown, flags, update)

    @pl.when(flags & LAST != 0)
    def _():
        dq_ref[0, 0] = (acc_ref[...] * spec.scale).T.astype(dq_ref.dtype)


def _key_gradients(
    spec: Spec,
    lay: Layout,
    how: Tiling,
    walk: Visits,
    operands,
    bias,
    extras: Extras,
    interpret: bool,
    with_queries: bool = False,
):
    q, k, v = operands[:3]
    ungrouped, (walk, member) = walk, _for_group(walk, lay.group)

    # The head within its group shares the third prefetched list with the flags: bits from HEAD_SHIFT up.
    def head(b, h, t, f):
        return h * lay.group + (f[t] >> HEAD_SHIFT)

    def rows_block(shape, axis):
        def index(b, h, t, i, j, f, *_):
            place = [b, head(b, h, t, f), 0, 0]
            place[axis] = i[t]
            return tuple(place)

        return pl.BlockSpec(shape, index)

    extra, extra_specs, names = extra_operands(spec, lay, bias, extras)
    extra_specs = [_regrouped(block, head) for block in extra_specs]
    k_spec, v_spec = (
        pl.BlockSpec((1, 1, lay.block_k, x.shape[3]), lambda b, h, t, i, j, *_: (b, h, j[t], 0)) for x in (k, v)
    )
    flags = flags_of(spec, walk, walk.columns, lay, names) + (member << HEAD_SHIFT)
    lists = [walk.rows, walk.columns, flags]
    out_specs, scratch = [k_spec, v_spec], [(lay.block_k, k.shape[3]), (lay.block_k, v.shape[3])]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    if with_queries:
        blocks = q.shape[2] // lay.block_q
        lists.append(_ends(walk, member))
        q_out = pl.BlockSpec(
            (1, 1, lay.block_q, q.shape[3]),
            lambda b, h, t, i, j, f, e: (b, h * lay.group + (e[t] >> OUT_HEAD_SHIFT), (e[t] >> 2) & OUT_ROWS, 0),
        )
        out_specs, out_shape = [q_out, *out_specs], [jax.ShapeDtypeStruct(q.shape, q.dtype), *out_shape]
        held = (lay.block_q, q.shape[3]) if how.by_rows else (q.shape[3], lay.block_q)
        scratch.append((lay.group * blocks, *held))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(lists),
        grid=(lay.batch, lay.kv_heads, len(walk.rows)),
        in_specs=[
            rows_block((1, 1, lay.block_q, q.shape[3]), 2),
            k_spec,
            v_spec,
            rows_block((1, 1, lay.block_q, v.shape[3]), 2),
            *[rows_block((1, 1, n, lay.block_q), 3) for n in (2, 1)],
            *extra_specs,
        ],
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    width = (3 if with_queries else 2) * q.shape[3] + 2 * v.shape[3]
    call = pl.pallas_call(
        functools.partial(_key_kernel, spec, lay, how, names, kinds(spec, lay, walk, names), len(lists)),
        grid_spec=grid,
        out_shape=tuple(out_shape),
        compiler_params=compiler_params(),
        cost_estimate=_cost(spec, lay, how, ungrouped, names, width, (*operands, *extra, *out_shape)),
        interpret=interpret,
        name="memopt_attention_gradients" if with_queries else "memopt_attention_dkv",
    )
    return call(*(jnp.asarray(x) for x in lists), *operands, *extra)


def _ends(walk: Visits, member: np.ndarray) -> np.ndarray:
    """Return for each visit whether it is its query block's first and last, and which block is finished next.

    A block of q's gradient is the kernel's output from the visit after the one that finished the block before it until
    its own last visit; so every block is written once. The bits: FIRST, LAST, its row, its head from OUT_HEAD_SHIFT.
    """
    key = member.astype(np.int64) * (walk.rows.max() + 1) + walk.rows
    _, first = np.unique(key, return_index=True)
    _, last = np.unique(key[::-1], return_index=True)
    last = np.sort(len(key) - 1 - last)
    bits = np.zeros(len(key), np.int32)
    bits[first] |= FIRST
    bits[last] |= LAST
    following = last[np.searchsorted(last, np.arange(len(key)))]
    return bits | (walk.rows[following] << 2) | (member[following] << OUT_HEAD_SHIFT)


def _for_group(walk: Visits, group: int) -> tuple[Visits, np.ndarray]:
    """Repeat the visits of each column for every query head of a group; return them and the head of each."""
    member = np.repeat(np.arange(group, dtype=np.int32), len(walk.rows))
    rows, columns, kinds = (np.tile(x, group) for x in walk)
    order = np.lexsort((rows, member, columns))
    return Visits(rows[order], columns[order], kinds[order]), member[order]


def _regrouped(block, head):
    """Return a block spec over query heads as one over key heads, whose query head `head` finds by the flags."""
    if block.index_map is None:
        return block
    index = block.index_map
    return pl.BlockSpec(block.block_shape, lambda b, h, t, i, j, f, *_: index(b, head(b, h, t, f), t, i, j, f))


def _key_kernel(spec: Spec, lay: Layout, how: Tiling, names, shown, lists, rows_ref, columns_ref, flags_ref, *refs):
    ends_ref = refs[0] if lists == 4 else None
    refs = refs[lists - 3 :]
    ins, extra_refs, outs = refs[:6], refs[6 : 6 + len(names)], refs[6 + len(names) :]
    dq_ref, dk_ref, dv_ref, dk_acc, dv_acc, dq_acc = outs if ends_ref is not None else (None, *outs, None)
    step = pl.program_id(2)
    flags, row = flags_ref[step], rows_ref[step]
    member = flags >> HEAD_SHIFT
    head = pl.program_id(0) * lay.heads + pl.program_id(1) * lay.group + member
    held = member * -(-lay.queries // lay.block_q) + row

    @pl.when(flags & FIRST != 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    if ends_ref is not None:

        @pl.when(ends_ref[step] & FIRST != 0)
        def _():
            dq_acc[held] = jnp.zeros(dq_acc.shape[1:], dq_acc.dtype)

    def update(kind: Kind):
        extra = dict(zip(names, extra_refs, strict=True))
        for part in _parts(spec, lay, kind, how):
            tile = Tile(spec, lay, extra, row, columns_ref[step], part)
            weights, ds = _gradients(spec, tile, head, ins, kind.masked)
            q, k, cotangent = ins[0][0, 0, part.queries], ins[1][0, 0, part.keys], ins[3][0, 0, part.queries]
            dv_acc[part.keys] += dot(weights.astype(cotangent.dtype), cotangent, 1, 0)
            dk_acc[part.keys] += dot(ds.astype(q.dtype), q, 1, 0)
            if dq_acc is not None and how.by_rows:
                dq_acc[held, part.queries] += dot(ds.astype(k.dtype), k, 0, 0)
            elif dq_acc is not None:
                dq_acc[held, :, part.queries] += dot(k, ds.astype(k.dtype), 0, 0)

    for_each_kind(shown, flags, update)

    @pl.when(flags & LAST != 0)
    def _():
        dk_ref[0, 0] = (dk_acc[...] * spec.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)

    if ends_ref is not None:

        @pl.when(ends_ref[step] & LAST != 0)
        def _():
            dq = dq_acc[held] * spec.scale
            dq_ref[0, 0] = (dq if how.by_rows else dq.T).astype(dq_ref.dtype)


def _parts(spec: Spec, lay: Layout, kind: Kind, how: Tiling) -> list[Part]:
    """Return the parts of a block: many where some of it is hidden; else few, whose matmuls are longer."""
    return parts(spec, lay, kind, KEYS_AT_ONCE if kind.distance is not None else how.back_keys)


def _cost(
    spec: Spec, lay: Layout, how: Tiling, walk: Visits, names: tuple[str, ...], width: int, arrays: Sequence[Any]
) -> pl.CostEstimate:
    """Return what a kernel costs: `width` is the sum of the head sizes over the products of a tile."""
    taken = [(n, _parts(spec, lay, kind, how)) for kind, n in counted(spec, lay, walk, names)]
    return cost(lay, width, taken, arrays)


def _gradients(spec: Spec, tile: Tile, head, ins, masked: bool):
    """Return the weights after dropout and the gradient of the unscaled scores, both keys x queries, float32."""
    queries, keys = tile.part
    q, k, v, cotangent = (ref[0, 0, at] for ref, at in zip(ins[:4], (queries, keys, keys, queries), strict=True))
    lse, delta = ins[4][0, 0, :, queries], ins[5][0, 0, :, queries]
    scores, slope = tile.scores(q, k, masked)
    dweights = dot(v, cotangent, 1, 1)
    factors = tile.factors(head)
    if factors is not None:
        dweights = dweights * factors
    if spec.kind == "sigmoid":
        weights = tiles.sigmoid(spec, scores * (1 / LOG2E))
        ds = weights * (1 - weights) * dweights
    else:
        weights = jnp.exp2(scores - lse[:1] - lse[1:])
        ds = weights * (dweights - delta)
    ds = ds if slope is None else ds * slope
    return weights if factors is None else weights * factors, ds
