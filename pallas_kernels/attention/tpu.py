"""Attention for TPUs: the forward kernel (Mosaic), and what it shares with the backward ones in `tpu_backward`.

In: q, k, v and the settings. Out: the output and the log-sum-exp of each row. Tiles of scores are held as keys x
queries: maxima and sums then run over sublanes, the statistics of a row are lanes that broadcast for free, and no tile
is ever transposed for a matmul. The grid walks a list of blocks that hold an allowed pair (`spec.visits`, prefetched
as scalars), so hidden blocks cost nothing, and blocks with no hidden pair skip the masks; of a block that the diagonal
or the edge of a window cuts, the keys are taken in parts, each with the queries that see it. No fallback stands here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tiles
from .spec import LOWEST, Extras, Spec, visits
from .tpu_parts import (
    FIRST,
    LANES,
    LAST,
    Kind,
    Layout,
    Part,
    Tiling,
    cost,
    counted,
    flags_of,
    for_each_kind,
    forward_parts,
    kinds,
    tiling,
)

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
VMEM_BYTES = 100 * 2**20  # what a kernel may take of the 128 MiB of v5e, v5p and v6e


def block_sizes(queries: int, keys: int, head_dim: int, spec: Spec, backward: bool = True) -> tuple[int, int]:
    """Choose the blocks of the kernels: a pure function of shape; in what parts a device takes them says `tiling`.

    Args:
        queries, keys: lengths.
        head_dim: the larger of both head sizes.
        spec: the settings; a block mask fixes the size. Where nothing is hidden, the forward kernel takes twice as many
            queries at once, unless that would pad them more.
        backward: whether it is for the backward kernels.

    Returns:
        `(block_q, block_k)`, multiples of 128.

    Example:
        >>> block_sizes(1000, 4096, 64, Spec(scale=1.0))
        (1024, 1024)
    """
    if spec.blocks:
        return spec.blocks[0], spec.blocks[0]
    limit = 1024 if head_dim <= 128 else 512
    more = 1 if backward or spec.hides or -(-queries // limit) % 2 else 2
    sizes = zip((more * limit, limit), (queries, keys), strict=True)
    return tuple(min(size, -(-length // LANES) * LANES) for size, length in sizes)


def layout(q: jax.Array, k: jax.Array, blocks: tuple[int, int]) -> Layout:
    """Return the layout of a call with q and k as users give them."""
    return Layout(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], *blocks)


def forward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    extras: Extras,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
    device: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute attention in one kernel; arguments and results as in `lean.forward`, `interpret` runs it on a CPU.

    `device` is the kind of device that it is made for, see `tiling`: another one computes the same.

    Both parts of the log-sum-exp are in units of log 2 here, the units of the scores inside the kernels.

    Source: Dao 2023, "FlashAttention-2", algorithm 1.
    """
    width = max(q.shape[3], v.shape[3])
    blocks = blocks or block_sizes(q.shape[1], k.shape[1], width, spec, backward=False)
    lay, how = layout(q, k, blocks), tiling(width, device)
    walk = visits(spec, lay.queries, lay.keys, lay.block_q, lay.block_k)
    q, k, v = (by_heads(x, size) for x, size in ((q, lay.block_q), (k, lay.block_k), (v, lay.block_k)))
    operands, specs, names = extra_operands(spec, lay, bias, extras)
    shapes = (
        jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
        jax.ShapeDtypeStruct((lay.batch, lay.heads, 2, q.shape[2]), jnp.float32),
    )
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(lay.batch, lay.heads, len(walk.rows)),
        in_specs=[
            pl.BlockSpec((1, 1, lay.block_q, q.shape[3]), lambda b, h, t, i, j, f: (b, h, i[t], 0)),
            pl.BlockSpec((1, 1, lay.block_k, k.shape[3]), lambda b, h, t, i, j, f: (b, h // lay.group, j[t], 0)),
            pl.BlockSpec((1, 1, lay.block_k, v.shape[3]), lambda b, h, t, i, j, f: (b, h // lay.group, j[t], 0)),
            *specs,
        ],
        out_specs=[
            pl.BlockSpec((1, 1, lay.block_q, v.shape[3]), lambda b, h, t, i, j, f: (b, h, i[t], 0)),
            pl.BlockSpec((1, 1, 2, lay.block_q), lambda b, h, t, i, j, f: (b, h, 0, i[t])),
        ],
        scratch_shapes=[
            pltpu.VMEM((1, lay.block_q), jnp.float32),
            pltpu.VMEM((1, lay.block_q), jnp.float32),
            pltpu.VMEM((v.shape[3], lay.block_q), jnp.float32),
        ],
    )
    call = pl.pallas_call(
        functools.partial(_kernel, spec, lay, how, names, kinds(spec, lay, walk, names)),
        grid_spec=grid,
        out_shape=shapes,
        compiler_params=compiler_params(),
        cost_estimate=cost(
            lay,
            q.shape[3] + v.shape[3],
            [(n, forward_parts(spec, lay, kind, how)) for kind, n in counted(spec, lay, walk, names)],
            (q, k, v, *operands, *shapes),
        ),
        interpret=interpret,
        name="memopt_attention_forward",
    )
    flags = flags_of(spec, walk, walk.rows, lay, names)
    out, lse = call(jnp.asarray(walk.rows), jnp.asarray(walk.columns), jnp.asarray(flags), q, k, v, *operands)
    return out[:, :, : lay.queries].swapaxes(1, 2), lse[..., : lay.queries]


def _kernel(
    spec: Spec, lay: Layout, how: Tiling, names, shown, rows_ref, columns_ref, flags_ref, q_ref, k_ref, v_ref, *refs
):
    extra_refs, (out_ref, lse_ref, top_ref, total_ref, acc_ref) = refs[: len(names)], refs[len(names) :]
    step, head = pl.program_id(2), pl.program_id(0) * lay.heads + pl.program_id(1)
    flags = flags_ref[step]

    @pl.when(flags & FIRST != 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def scored(kind: Kind, part: Part):
        extra = dict(zip(names, extra_refs, strict=True))
        tile = Tile(spec, lay, extra, rows_ref[step], columns_ref[step], part)
        return tile, tile.scores(q_ref[0, 0, part.queries], k_ref[0, 0, part.keys], kind.masked)[0]

    def update(kind: Kind):
        taken, ahead = forward_parts(spec, lay, kind, how), how.ahead
        made = [scored(kind, part) for part in taken[:ahead]]
        for place, part in enumerate(taken):
            next_one = taken[place + ahead : place + ahead + 1]  # runs beside this part's exponentials
            made += [scored(kind, one) for one in next_one]
            tile, scores = made[place]
            running = (ref.at[:, part.queries] for ref in (top_ref, total_ref, acc_ref))
            _accumulate(spec, scores, tile.factors(head), v_ref[0, 0, part.keys], *running)

    for_each_kind(shown, flags, update)

    @pl.when(flags & LAST != 0)
    def _():
        total, out = total_ref[...], acc_ref[...]
        if spec.kind == "softmax":
            empty = total == 0
            out = out * (1 / jnp.where(empty, 1, total))
            lse_ref[0, 0, :1] = top_ref[...]
            lse_ref[0, 0, 1:] = jnp.where(empty, jnp.inf, jnp.log2(jnp.where(empty, 1, total)))
        else:
            lse_ref[0, 0] = jnp.zeros_like(lse_ref[0, 0])
        out_ref[0, 0] = out.T.astype(out_ref.dtype)


def _accumulate(spec: Spec, scores, factors, v, top_ref, total_ref, acc_ref):
    """Take a tile of scores (keys x queries, in units of log 2) into the running output (head_dim x queries)."""
    if spec.kind == "sigmoid":
        weights = tiles.sigmoid(spec, scores * (1 / LOG2E))
        shrink = None
    else:
        top = top_ref[...]
        new_top = jnp.maximum(top, scores.max(axis=0, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        shrink = jnp.exp2(top - new_top)
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * shrink + weights.sum(axis=0, keepdims=True)
    if factors is not None:
        weights = weights * factors
    more = dot(v, weights.astype(v.dtype), 0, 0)
    acc_ref[...] = more + (acc_ref[...] if shrink is None else acc_ref[...] * shrink)


class Tile:
    """A part of a tile of scores, keys x queries, as the kernels see it: its position and what hides pairs of it."""

    def __init__(self, spec: Spec, lay: Layout, refs: dict, row, column, part: Part):
        self.spec, self.lay, self.refs, self.part = spec, lay, refs, part
        shape = (part.keys.stop - part.keys.start, part.queries.stop - part.queries.start)
        self.rows = row * lay.block_q + part.queries.start + lax.broadcasted_iota(jnp.int32, shape, 1)
        self.columns = column * lay.block_k + part.keys.start + lax.broadcasted_iota(jnp.int32, shape, 0)

    def scores(self, q, k, masked: bool):
        """Return the masked scores in units of log 2, and the derivative of the cap or None."""
        products, keep = dot(k, q, 1, 1), self._keep() if masked else None
        if self.spec.soft_cap is None and not {"bias", "slopes"} & set(self.refs):
            return tiles.hide(products * (self.spec.scale * LOG2E), keep), None
        scores, slope = tiles.capped(self.spec, products)
        if "bias" in self.refs:
            scores = scores + self._plane("bias")
        if "slopes" in self.refs:
            scores = scores + self.refs["slopes"][0][:, :1] * (self.columns - self.rows).astype(jnp.float32)
        return tiles.hide(scores * LOG2E, keep), slope

    def _plane(self, name: str):
        """Return this part of a `[queries, keys]` operand, either of which may be 1, as keys x queries in float32."""
        ref = self.refs[name]
        rows, columns = (one if size > 1 else slice(0, 1) for one, size in zip(self.part, ref.shape[2:], strict=True))
        return _transposed(ref[0, 0, rows, columns].astype(jnp.float32))

    def _keep(self):
        keep = tiles.allowed(self.spec, self.rows, self.columns)
        if self.lay.keys % self.lay.block_k:
            keep = tiles.both(keep, self.columns < self.lay.keys)
        if "q_segments" in self.refs:
            queries = self.refs["q_segments"][0, :, self.part.queries]
            same = queries == _transposed(self.refs["kv_segments"][0, :, self.part.keys])
            keep = tiles.both(keep, same)
        if "mask" in self.refs:
            keep = tiles.both(keep, self._plane("mask") != 0)
        return keep

    def factors(self, head):
        """Return the dropout factors of the tile, or None without dropout."""
        if not self.spec.dropout:
            return None
        seed = (self.refs["seed"][0], self.refs["seed"][1])
        return tiles.kept(self.spec, seed, head, self.rows, self.columns)


def _transposed(x):
    """Transpose a tile of 32-bit values; a single row or column is first made as large as a register."""
    if x.shape[0] == 1:
        return jnp.broadcast_to(x, (LANES, x.shape[1])).T[:, :1]
    if x.shape[1] == 1:
        return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]
    return x.T


def dot(a, b, a_axis: int, b_axis: int):
    """Contract one axis of each of two matrices into float32; float32 operands are multiplied in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


# Operands.


def extra_operands(spec: Spec, lay: Layout, bias, extras: Extras):
    """Return the optional operands, their block specs (over batch, query head, step, lists) and their names."""
    found = []
    for name, x in (("bias", bias), ("mask", None if extras.mask is None else extras.mask.astype(jnp.int8))):
        if x is not None:
            found.append((name, *_plane(lay, x)))
    if extras.q_segments is not None:
        q_segments, kv_segments = extras.q_segments[:, None], extras.kv_segments[:, None]
        q_spec = pl.BlockSpec((1, 1, lay.block_q), lambda b, h, t, i, j, f: (b, 0, i[t]))
        k_spec = pl.BlockSpec((1, 1, lay.block_k), lambda b, h, t, i, j, f: (b, 0, j[t]))
        found.append(("q_segments", _pad(q_segments, 2, lay.block_q), q_spec))
        found.append(("kv_segments", _pad(kv_segments, 2, lay.block_k), k_spec))
    if extras.slopes is not None:
        slopes = extras.slopes.astype(jnp.float32).reshape(-1, 1, 1)
        slopes = jnp.broadcast_to(slopes, (slopes.shape[0], 1, LANES))
        block = pl.BlockSpec((1, 1, LANES), lambda b, h, t, i, j, f: (h, 0, 0))
        found.append(("slopes", slopes, block))
    if spec.dropout:
        found.append(("seed", extras.seed, pl.BlockSpec(memory_space=pltpu.SMEM)))
    names, operands, specs = zip(*found, strict=True) if found else ((), (), ())
    return operands, specs, names


def _plane(lay: Layout, x):
    """Return a `[batch, heads, queries, keys]` operand, any of them 1, padded, and its block spec."""
    by = tuple(size > 1 for size in x.shape)
    block = (1, 1, lay.block_q if by[2] else 1, lay.block_k if by[3] else 1)

    def index(b, h, t, i, j, f):
        indices = (b, h, i[t], j[t])
        return tuple(index if varies else 0 for index, varies in zip(indices, by, strict=True))

    return _pad(_pad(x, 2, block[2]), 3, block[3]), pl.BlockSpec(block, index)


def by_heads(x, block: int):
    """`[batch, length, heads, head_dim]` to `[batch, heads, padded length, head_dim]`."""
    return _pad(x.swapaxes(1, 2), 2, block)


def _pad(x, axis: int, block: int):
    if not (count := -x.shape[axis] % block):
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths)


def compiler_params():
    """Return what the kernels ask of Mosaic: the last grid axis runs in order."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)


def problem(spec: Spec, q, k, v, bias, extras: Extras, blocks: tuple[int, int] | None) -> str | None:
    """Say why these kernels cannot serve a call, or None where they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype} operands: the kernel computes in bfloat16 or float32"
    for size in (q.shape[3], v.shape[3]):
        if not 64 <= size <= 256 or size % 16:
            return f"a head size of {size}: multiples of 16 from 64 to 256 are served"
    if min(q.shape[1], k.shape[1]) < 8:
        return f"{q.shape[1]} queries and {k.shape[1]} keys: fewer than 8 are no work for a matmul unit"
    block_q, block_k = blocks or block_sizes(q.shape[1], k.shape[1], max(q.shape[3], v.shape[3]), spec)
    if block_q % LANES or block_k % LANES:
        return f"blocks of {block_q} x {block_k}: multiples of {LANES} are needed"
    if spec.blocks and (block_q, block_k) != (spec.blocks[0],) * 2:
        return f"blocks of {block_q} x {block_k} with a block mask of size {spec.blocks[0]}: they must be equal"
    if bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float32):
        return f"a bias of dtype {bias.dtype}"
    steps = -(-q.shape[1] // block_q) * -(-k.shape[1] // block_k) * (q.shape[2] // k.shape[2])
    if steps > 16_384:
        return f"{steps} blocks: their list must fit the scalar memory, 16,384 do"
    return None
