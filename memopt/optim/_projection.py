"""Projections of a matrix onto few dimensions: which side, which basis, and when it is made anew.

In come matrices of gradients and random keys, out go orthonormal bases and projected matrices. There is no singular
value decomposition: a randomised range finder and Gram-Schmidt compile in seconds for a TPU where an SVD takes minutes.
It knows no optimizer, and keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from memopt.optim._leaves import Leaf, Where, is_matrix, wide

Side = Literal["auto", "left", "right"]

#: Of the sketches that find a basis: three passes of bfloat16 on a TPU, some 20 bits. Six compile four times as long.
#: What they are made of needs one pass alone: its rounding is as random as the first test matrix, and far smaller.
HIGH = jax.lax.Precision.HIGH


def side_of(shape: Sequence[int], side: Side) -> Literal["left", "right"]:
    """Return the side from which a matrix `[m, n]` is projected: with "auto" the one that makes its shorter axis short.

    "left" gives `[rank, n]`, "right" gives `[m, rank]`; a square matrix is projected from the right, as published.

    Raises:
      ValueError: the side is none of the three.
    """
    if side not in ("auto", "left", "right"):
        raise ValueError(f"side={side!r} is unknown: choose 'auto', 'left' or 'right'")
    if side != "auto":
        return side
    return "left" if shape[-2] < shape[-1] else "right"


def is_projected(leaf: Leaf, value: Any, rank: int, where: Where | None) -> bool:
    """Say whether a leaf is a batch of matrices both of whose axes are longer than the rank."""
    return is_matrix(leaf, value, where) and min(leaf.shape[-2:]) > rank


def basis_shape(shape: Sequence[int], rank: int, side: Side) -> tuple[int, ...]:
    """Return the shape of the bases of a batch of matrices: `[..., m, rank]` from the left, `[..., n, rank]` else."""
    axis = -2 if side_of(shape, side) == "left" else -1
    return (*shape[:-2], shape[axis], rank)


def low_shape(shape: Sequence[int], rank: int, side: Side) -> tuple[int, ...]:
    """Return the shape of a batch of matrices after its projection."""
    left = side_of(shape, side) == "left"
    return (*shape[:-2], rank, shape[-1]) if left else (*shape[:-1], rank)


def project(matrix: jax.Array, basis: jax.Array, side: Side) -> jax.Array:
    """Project a batch of matrices, accumulating in wide precision; the basis may lack the batch axes.

    Source: Zhao et al. 2024, equation 10: `P^T G` from the left, `G Q` from the right.
    """
    rule = "...mr,...mn->...rn" if side_of(matrix.shape, side) == "left" else "...mn,...nr->...mr"
    operands = (basis, matrix) if side_of(matrix.shape, side) == "left" else (matrix, basis)
    return _einsum(rule, *operands)


def project_back(low: jax.Array, basis: jax.Array, shape: Sequence[int], side: Side) -> jax.Array:
    """Return a projected batch of matrices to its full shape (Zhao et al. 2024, equation 11)."""
    if side_of(shape, side) == "left":
        return _einsum("...mr,...rn->...mn", basis, low)
    return _einsum("...mr,...nr->...mn", low, basis)


def _einsum(rule: str, first: jax.Array, second: jax.Array) -> jax.Array:
    dtype = wide(second.dtype if first.dtype != jnp.float64 else first.dtype)
    if first.dtype != second.dtype:
        first, second = first.astype(dtype), second.astype(dtype)
    return jnp.einsum(rule, first, second, preferred_element_type=dtype)


def range_basis(matrix: jax.Array, rank: int, key: jax.Array, side: Side, power_iterations: int) -> jax.Array:
    """Find an orthonormal basis of the dominant directions of one matrix, without a singular value decomposition.

    Cost: `4 + 4 * power_iterations` products of `m * n * rank`, the last two for nothing (one loop of two products is
    what a TPU's compiler is quick with), and `orthonormal` of `[m, rank]` (or `[n, rank]`).

    Args:
      matrix: `[m, n]`, any floating dtype.
      rank: number of directions, below `m` and `n`.
      key: seeds the test matrix.
      side: "left" for directions among the rows' axis (`[m, rank]`), "right" among the columns' (`[n, rank]`).
      power_iterations: each one raises the singular values to two more powers, so that the small ones count less.

    Returns:
      Orthonormal columns in float32 (float64 for float64), the most dominant first; unit vectors for a zero matrix.

    Source: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithms 4.1 and 4.3.
    """
    left, dtype = side_of(matrix.shape, side) == "left", wide(matrix.dtype)
    rows, columns = matrix.shape if left else matrix.shape[::-1]

    def iterate(_, pair):
        wider = matrix.astype(dtype)  # here and not before the loop, where all of it would be held
        sketch = jnp.einsum("mn,nr->mr" if left else "nm,nr->mr", wider, pair[1], precision=HIGH)
        sketch = sketch / jnp.maximum(jnp.max(jnp.abs(sketch)), jnp.finfo(dtype).tiny)
        return sketch, jnp.einsum("mn,mr->nr" if left else "nm,mr->nr", wider, sketch)  # tests of the next sketch

    start = jnp.zeros((rows, rank), dtype), jax.random.normal(key, (columns, rank), dtype)
    return orthonormal(jax.lax.fori_loop(0, 1 + power_iterations, iterate, start)[0])


def orthonormal(columns: jax.Array) -> jax.Array:
    """Make columns orthonormal one after the other, each from what those before it leave of it.

    It is `jnp.linalg.qr(columns)[0]` up to signs, by Gram-Schmidt with every column projected again: a loop that a
    TPU's compiler takes less than a second for (2048 x 512; 13 for its QR). A column that depends on those before it,
    to rounding, is exchanged for the unit vector that they cover least.

    Args:
      columns: `[m, rank]`, `rank <= m`, float32 or float64.

    Returns:
      `[m, rank]` in the same dtype: the first `j` span what the first `j` given ones do, where these are independent.

    Source: Giraud, Langou and Rozloznik 2005, "The loss of orthogonality in the Gram-Schmidt orthogonalization
    process": twice is enough.
    """
    rows, tiny = columns.shape[0], jnp.finfo(columns.dtype)

    def left(basis, column):  # sums of products, since a TPU's matmul of float32 is not one of float32
        return column - jnp.sum(basis * jnp.sum(basis * column[:, None], 0)[None], 1)

    def size(column):
        return jnp.sqrt(jnp.sum(jnp.square(column)))

    def one(index, basis):
        column = jax.lax.dynamic_index_in_dim(columns, index, 1, keepdims=False)
        rest = left(basis, column)
        least = jnp.argmin(jnp.sum(jnp.square(basis), 1))
        unit = (jnp.arange(rows) == least).astype(columns.dtype)
        rest = jnp.where(size(rest) > 8 * tiny.eps * size(column), rest, unit)
        rest = left(basis, left(basis, rest / size(rest)))
        return jax.lax.dynamic_update_index_in_dim(basis, rest / size(rest), index, 1)

    return jax.lax.fori_loop(0, columns.shape[1], one, jnp.zeros_like(columns))


def refresh_offsets(leaves: Sequence[Leaf], projected: Sequence[bool], every: int) -> list[np.ndarray]:
    """Spread the refreshes of all matrices of a tree evenly over a period.

    Args:
      leaves: the tree's leaves.
      projected: which of them are projected.
      every: the period, in updates.

    Returns:
      For each leaf the update within the period, 0 to `every - 1`, at which each of its matrices is refreshed: int32,
      rising; empty where the leaf is not projected.
    """
    counts = [leaf.count if chosen else 0 for leaf, chosen in zip(leaves, projected, strict=True)]
    total = max(1, sum(counts))
    starts = np.cumsum([0, *counts[:-1]]) if counts else []
    numbers = [start + np.arange(count) for start, count in zip(starts, counts, strict=True)]
    return [((number * every) // total).astype(np.int32) for number in numbers]


def due_range(offsets: np.ndarray, count: jax.Array, every: int) -> tuple[jax.Array, jax.Array]:
    """Return the matrices of one leaf to refresh now, as a range; at the first update (count 0) that is all of them."""
    now = count % every
    first = jnp.searchsorted(jnp.asarray(offsets), now, side="left").astype(jnp.int32)
    last = jnp.searchsorted(jnp.asarray(offsets), now, side="right").astype(jnp.int32)
    start = count == 0
    first, last = jnp.where(start, 0, first), jnp.where(start, len(offsets), last)
    return jnp.maximum(first, 0), jnp.minimum(last, len(offsets))  # changes nothing, but a pass can see the range


def as_batch(values: jax.Array) -> jax.Array:
    """Merge all axes before the last two into one."""
    return values.reshape(math.prod(values.shape[:-2]), *values.shape[-2:])
