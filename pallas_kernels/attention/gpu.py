"""Attention for GPUs through Pallas and Triton: forward, and two backward kernels.

In: q, k, v and the settings. Out: output and log-sum-exp, or gradients. One program holds a block of rows (or of keys)
and loops over the blocks on the other side that causality and window leave. These kernels are lowered for CUDA and
emulated in tests; nothing of them was timed on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from . import tiles
from .spec import LOWEST, Extras, Spec, visits


def problem(spec: Spec, q, k, v, bias, extras: Extras, blocks: tuple[int, int] | None) -> str | None:
    """Say why these kernels cannot serve a call, or None where they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{q.dtype} operands: the kernel computes in bfloat16, float16 or float32"
    if not 16 <= min(q.shape[3], v.shape[3]) <= max(q.shape[3], v.shape[3]) <= 256:
        return f"head sizes of {q.shape[3]} and {v.shape[3]}: 16 to 256 are served"
    if spec.blocks is not None:
        return "block masks are not written for GPUs"
    if min(q.shape[1], k.shape[1]) < 16:
        return f"{q.shape[1]} queries and {k.shape[1]} keys: fewer than 16 are no work for a matmul unit"
    return None


def block_sizes(head_dim: int, dtype, device: str = "gpu") -> tuple[int, int]:
    """Choose `(block_q, block_k)` by head size and dtype; all GPUs are treated alike.

    Example:
        >>> block_sizes(64, jnp.bfloat16)
        (64, 64)
    """
    wide = head_dim * jnp.dtype(dtype).itemsize
    return (64, 64) if wide <= 256 else (32, 32)


def forward(
    spec: Spec, q, k, v, bias, extras: Extras, blocks: tuple[int, int] | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Compute attention in one kernel; arguments and results as in `lean.forward`, `interpret` runs it on a CPU."""
    block_q, block_k = blocks or block_sizes(max(q.shape[3], v.shape[3]), q.dtype)
    batch, queries, heads, _ = q.shape
    keys, value_dim, group = k.shape[1], v.shape[3], heads // k.shape[2]
    q, (k, v) = _laid(q, block_q), (_laid(x, block_k) for x in (k, v))
    operands, specs, names = _extras(spec, extras, bias, block_q, block_k, heads)
    call = pl.pallas_call(
        functools.partial(_forward_kernel, spec, (heads, keys, block_q, block_k), names),
        grid=(batch, heads, q.shape[2] // block_q),
        in_specs=[
            pl.BlockSpec((None, None, block_q, q.shape[3]), lambda b, h, i: (b, h, i, 0)),
            pl.BlockSpec((None, None, *k.shape[2:]), lambda b, h, i: (b, h // group, 0, 0)),
            pl.BlockSpec((None, None, *v.shape[2:]), lambda b, h, i: (b, h // group, 0, 0)),
            *(spec(lambda b, h, i: (b, h)) for spec in specs),
        ],
        out_specs=[
            pl.BlockSpec((None, None, block_q, v.shape[3]), lambda b, h, i: (b, h, i, 0)),
            pl.BlockSpec((None, None, 2, block_q), lambda b, h, i: (b, h, 0, i)),
        ],
        out_shape=(
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:2], 2, q.shape[2]), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=_cost(spec, q, queries, keys, (block_q, block_k), q.shape[3] + v.shape[3]),
        interpret=interpret,
        name="memopt_attention_forward",
    )
    out, lse = call(q, k, v, *operands)
    return out[:, :, :queries, :value_dim].swapaxes(1, 2), lse[..., :queries]


def _cost(spec: Spec, q, queries: int, keys: int, blocks: tuple[int, int], width: int) -> pl.CostEstimate:
    """Return what a kernel costs: loops inside it visit as many tiles as hold an allowed pair.

    Args:
        spec: the settings.
        q: the queries, `[batch, heads, length, head_dim]`.
        queries, keys: lengths.
        blocks: sizes of a tile.
        width: sum of the head sizes over the products of a tile.
    """
    pairs = q.shape[0] * q.shape[1] * len(visits(spec, queries, keys, *blocks).rows) * blocks[0] * blocks[1]
    return pl.CostEstimate(flops=2 * pairs * width, transcendentals=pairs, bytes_accessed=0)


def backward(
    spec: Spec, q, k, v, bias, extras: Extras, out, lse, cotangent, blocks=None, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v in two kernels; arguments and results as in `lean.backward`."""
    block_q, block_k = blocks or block_sizes(max(q.shape[3], v.shape[3]), q.dtype)
    shapes = (q.shape, k.shape, v.shape)
    sizes = (q.shape[2], k.shape[1], block_q, block_k)
    delta = jnp.einsum("bqhd,bqhd->bhq", out, cotangent, preferred_element_type=jnp.float32)
    fill = ((0, 0), (0, 0), (0, -q.shape[1] % block_q))
    lse, delta = jnp.pad(lse, ((0, 0), *fill), constant_values=jnp.inf), jnp.pad(delta, fill)
    operands = (_laid(q, block_q), *(_laid(x, block_k) for x in (k, v)), _laid(cotangent, block_q), lse, delta)
    extra = _extras(spec, extras, bias, block_q, block_k, q.shape[2])
    dq = _query_gradient(spec, sizes, operands, extra, interpret)
    dk, dv = _key_gradients(spec, sizes, operands, extra, interpret)
    return tuple(x.swapaxes(1, 2)[:, : s[1], :, : s[3]] for x, s in zip((dq, dk, dv), shapes, strict=True))


def _query_gradient(spec: Spec, sizes, operands, extra, interpret: bool):
    q, k, v = operands[:3]
    group, block_q = q.shape[1] // k.shape[1], sizes[2]
    rows = [pl.BlockSpec((None, None, block_q, x.shape[3]), lambda b, h, i: (b, h, i, 0)) for x in (q, v)]
    columns = [pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, h // group, 0, 0)) for x in (k, v)]
    statistics = [
        pl.BlockSpec((None, None, 2, block_q), lambda b, h, i: (b, h, 0, i)),
        pl.BlockSpec((None, None, block_q), lambda b, h, i: (b, h, i)),
    ]
    call = pl.pallas_call(
        functools.partial(_query_kernel, spec, sizes, extra[2]),
        grid=(*q.shape[:2], q.shape[2] // block_q),
        in_specs=[rows[0], *columns, rows[1], *statistics, *(s(lambda b, h, i: (b, h)) for s in extra[1])],
        out_specs=rows[0],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=_cost(spec, q, q.shape[2], sizes[1], sizes[2:], 2 * q.shape[3] + v.shape[3]),
        interpret=interpret,
        name="memopt_attention_dq",
    )
    return call(*operands, *extra[0])


def _key_gradients(spec: Spec, sizes, operands, extra, interpret: bool):
    """One program for each query head and block of keys; the heads of a group are added up afterwards."""
    q, k, v = operands[:3]
    group, block_k = q.shape[1] // k.shape[1], sizes[3]
    rows = [pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, j: (b, h, 0, 0)) for x in (q, operands[3])]
    columns = [pl.BlockSpec((None, None, block_k, x.shape[3]), lambda b, h, j: (b, h // group, j, 0)) for x in (k, v)]
    statistics = [
        pl.BlockSpec((None, None, 2, q.shape[2]), lambda b, h, j: (b, h, 0, 0)),
        pl.BlockSpec((None, None, q.shape[2]), lambda b, h, j: (b, h, 0)),
    ]
    dtypes = [x.dtype if group == 1 else jnp.float32 for x in (k, v)]
    shapes = [(q.shape[0], q.shape[1], *x.shape[2:]) for x in (k, v)]
    call = pl.pallas_call(
        functools.partial(_key_kernel, spec, sizes, extra[2]),
        grid=(*q.shape[:2], k.shape[2] // block_k),
        in_specs=[rows[0], *columns, rows[1], *statistics, *(s(lambda b, h, j: (b, h)) for s in extra[1])],
        out_specs=[pl.BlockSpec((None, None, block_k, x.shape[3]), lambda b, h, j: (b, h, j, 0)) for x in (k, v)],
        out_shape=tuple(map(jax.ShapeDtypeStruct, shapes, dtypes)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        cost_estimate=_cost(spec, q, q.shape[2], sizes[1], sizes[2:], 2 * (q.shape[3] + v.shape[3])),
        interpret=interpret,
        name="memopt_attention_dkv",
    )
    grads = call(*operands, *extra[0])
    if group == 1:
        return grads
    return tuple(x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(axis=2).astype(k.dtype) for x in grads)


# Kernels.


def _forward_kernel(spec: Spec, sizes, names, q_ref, k_ref, v_ref, *refs):
    extra_refs, (out_ref, lse_ref) = refs[: len(names)], refs[len(names) :]
    tile = _Tile(spec, sizes, dict(zip(names, extra_refs, strict=True)))
    q, i = q_ref[...], pl.program_id(2)
    start = (
        jnp.full((tile.block_q,), LOWEST, jnp.float32),
        jnp.zeros((tile.block_q,), jnp.float32),
        jnp.zeros((tile.block_q, v_ref.shape[1]), jnp.float32),
    )

    def step(j, carry):
        top, total, acc = carry
        span = pl.ds(pl.multiple_of(j * tile.block_k, tile.block_k), tile.block_k)
        scores, _ = tile.scores(q, k_ref[span, :], i, j)
        factors = tile.factors(i, j)
        if spec.kind == "sigmoid":
            weights, shrink = tiles.sigmoid(spec, scores), jnp.ones_like(top)
        else:
            new_top = jnp.maximum(top, scores.max(axis=1))
            weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
            top, total = new_top, total * shrink + weights.sum(axis=1)
        weights = weights if factors is None else weights * factors
        return top, total, acc * shrink[:, None] + _dot(weights.astype(v_ref.dtype), v_ref[span, :])

    top, total, acc = lax.fori_loop(*tile.key_blocks(i), step, start)
    if spec.kind == "sigmoid":
        out_ref[...], lse_ref[0, :], lse_ref[1, :] = acc.astype(out_ref.dtype), total, total
        return
    safe = jnp.where(total == 0, 1.0, total)
    out_ref[...] = (acc / safe[:, None]).astype(out_ref.dtype)
    lse_ref[0, :] = top
    lse_ref[1, :] = jnp.where(total == 0, jnp.inf, jnp.log(safe))


def _query_kernel(spec: Spec, sizes, names, q_ref, k_ref, v_ref, cotangent_ref, lse_ref, delta_ref, *refs):
    tile = _Tile(spec, sizes, dict(zip(names, refs[:-1], strict=True)))
    row = (q_ref[...], cotangent_ref[...], lse_ref[0, :], lse_ref[1, :], delta_ref[...])
    i = pl.program_id(2)

    def step(j, acc):
        span = pl.ds(pl.multiple_of(j * tile.block_k, tile.block_k), tile.block_k)
        k = k_ref[span, :]
        _, ds = tile.gradients(row, k, v_ref[span, :], i, j)
        return acc + _dot(ds.astype(k.dtype), k)

    acc = lax.fori_loop(*tile.key_blocks(i), step, jnp.zeros(q_ref.shape, jnp.float32))
    refs[-1][...] = (acc * spec.scale).astype(refs[-1].dtype)


def _key_kernel(spec: Spec, sizes, names, q_ref, k_ref, v_ref, cotangent_ref, lse_ref, delta_ref, *refs):
    dk_ref, dv_ref = refs[-2:]
    tile = _Tile(spec, sizes, dict(zip(names, refs[:-2], strict=True)))
    k, v, j = k_ref[...], v_ref[...], pl.program_id(2)

    def step(i, carry):
        span = pl.ds(pl.multiple_of(i * tile.block_q, tile.block_q), tile.block_q)
        row = (q_ref[span, :], cotangent_ref[span, :], lse_ref[0, span], lse_ref[1, span], delta_ref[span])
        weights, ds = tile.gradients(row, k, v, i, j)
        dk = carry[0] + _dot(ds.T.astype(k.dtype), row[0])
        return dk, carry[1] + _dot(weights.T.astype(v.dtype), row[1])

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    dk, dv = lax.fori_loop(*tile.query_blocks(j, q_ref.shape[0]), step, start)
    dk_ref[...] = (dk * spec.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


class _Tile:
    """Tiles of scores, queries x keys, as the kernels see them, and which of them are walked."""

    def __init__(self, spec: Spec, sizes, refs: dict):
        self.spec, self.refs = spec, refs
        heads, self.keys, self.block_q, self.block_k = sizes
        self.head = jnp.asarray(pl.program_id(0) * heads + pl.program_id(1), jnp.int32)

    def positions(self, i, j):
        rows = i * self.block_q + lax.broadcasted_iota(jnp.int32, (self.block_q, self.block_k), 0)
        return rows, j * self.block_k + lax.broadcasted_iota(jnp.int32, (self.block_q, self.block_k), 1)

    def scores(self, q, k, i, j):
        """Return the masked scores and the derivative of the cap, or None."""
        scores, slope = tiles.capped(self.spec, _dot(q, k.T))
        rows, columns = self.positions(i, j)
        if "bias" in self.refs:
            scores = scores + self._plane("bias", i, j).astype(jnp.float32)
        if "slopes" in self.refs:
            scores = scores + self.refs["slopes"][...] * (columns - rows).astype(jnp.float32)
        keep = tiles.both(tiles.allowed(self.spec, rows, columns), columns < self.keys)
        if "q_segments" in self.refs:
            q_ids = self.refs["q_segments"][pl.ds(i * self.block_q, self.block_q)]
            kv_ids = self.refs["kv_segments"][pl.ds(j * self.block_k, self.block_k)]
            keep = tiles.both(keep, q_ids[:, None] == kv_ids[None, :])
        if "mask" in self.refs:
            keep = tiles.both(keep, self._plane("mask", i, j) != 0)
        return tiles.hide(scores, keep), slope

    def _plane(self, name: str, i, j):
        ref = self.refs[name]
        starts, sizes = (i, j), (self.block_q, self.block_k)
        spans = [pl.ds(0, 1) if n == 1 else pl.ds(a * s, s) for n, a, s in zip(ref.shape, starts, sizes, strict=True)]
        return ref[spans[0], spans[1]]

    def factors(self, i, j):
        """Return the dropout factors, or None without dropout."""
        if not self.spec.dropout:
            return None
        seed = (self.refs["seed_0"][...], self.refs["seed_1"][...])
        return tiles.kept(self.spec, seed, self.head, *self.positions(i, j))

    def gradients(self, row, k, v, i, j):
        """Return the weights after dropout and the gradient of the unscaled scores."""
        q, cotangent, top, rest, delta = row
        scores, slope = self.scores(q, k, i, j)
        dweights = _dot(cotangent, v.T)
        factors = self.factors(i, j)
        dweights = dweights if factors is None else dweights * factors
        if self.spec.kind == "sigmoid":
            weights = tiles.sigmoid(self.spec, scores)
            ds = weights * (1 - weights) * dweights
        else:
            weights = jnp.exp(scores - top[:, None] - rest[:, None])
            ds = weights * (dweights - delta[:, None])
        return weights if factors is None else weights * factors, ds if slope is None else ds * slope

    def key_blocks(self, i):
        """Return the range of key blocks that row block `i` reads."""
        left, right = self._reach()
        first, last = i * self.block_q, (i + 1) * self.block_q - 1
        count = pl.cdiv(self.keys, self.block_k)
        low = 0 if left is None else jnp.clip((first - left) // self.block_k, 0, count)
        return low, count if right is None else jnp.clip((last + right) // self.block_k + 1, low, count)

    def query_blocks(self, j, padded: int):
        """Return the range of row blocks that read key block `j`."""
        left, right = self._reach()
        first, last = j * self.block_k, (j + 1) * self.block_k - 1
        count = padded // self.block_q
        low = 0 if right is None else jnp.clip((first - right) // self.block_q, 0, count)
        return low, count if left is None else jnp.clip((last + left) // self.block_q + 1, low, count)

    def _reach(self):
        left, right = self.spec.window or (None, None)
        if self.spec.causal:
            right = self.spec.offset if right is None else min(right, self.spec.offset)
        return left, right


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


# Operands.


def _extras(spec: Spec, extras: Extras, bias, block_q: int, block_k: int, heads: int):
    """Return the optional operands, a maker of each one's block spec from an index of batch and head, their names."""
    found = []
    mask = None if extras.mask is None else extras.mask.astype(jnp.int8)
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            x = _padded(_padded(x, 2, block_q if x.shape[2] > 1 else 1), 3, block_k if x.shape[3] > 1 else 1)
            found.append((name, x, functools.partial(_whole, x.shape, (None, None, *x.shape[2:]))))
    if extras.q_segments is not None:
        for name, ids, block in (("q", extras.q_segments, block_q), ("kv", extras.kv_segments, block_k)):
            ids = _padded(ids[:, None], 2, block)
            found.append((f"{name}_segments", ids, functools.partial(_whole, ids.shape, (None, None, ids.shape[2]))))
    if extras.slopes is not None:
        slopes = extras.slopes.astype(jnp.float32).reshape(1, heads)
        found.append(("slopes", slopes, functools.partial(_whole, slopes.shape, (None, None))))
    if spec.dropout:
        for n in range(2):
            seed = extras.seed[n].reshape(1, 1)
            found.append((f"seed_{n}", seed, functools.partial(_whole, seed.shape, (None, None))))
    names, operands, specs = zip(*found, strict=True) if found else ((), (), ())
    return operands, specs, names


def _whole(shape, block, index):
    """Return the spec of an operand whose batch and head `index` picks, where they are not 1, and all of the rest."""

    def pick(*grid):
        chosen = (at if size > 1 else 0 for at, size in zip(index(*grid), shape, strict=False))
        return (*chosen, *[0] * (len(shape) - 2))

    return pl.BlockSpec(block, pick)


def _laid(x, block: int):
    """`[batch, length, heads, dim]` to `[batch, heads, padded length, dim rounded up to a power of two]`."""
    x = _padded(x.swapaxes(1, 2), 2, block)
    return _padded(x, 3, max(16, 1 << (x.shape[3] - 1).bit_length()))


def _padded(x, axis: int, block: int):
    if not (count := -x.shape[axis] % block):
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths)
