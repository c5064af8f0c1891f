"""The sketches themselves: a matrix as random combinations of its rows, or as a sample of them.

In: an array and which of its axes are rows. Out: its leaves, much smaller, and back an array whose expectation it is.
Random numbers come from a seed and a hash of bits, so that nothing else has to be kept. Nothing here knows a step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What both sketches have in common: the array as a matrix `[rows, features]`, and a key of its own."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...]
    rank: int
    seed: int

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def features(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.shape) // self.rows

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.axes, *(a for a in range(len(self.shape)) if a not in self.axes))

    def _matrix(self, x: Any) -> Any:
        return jnp.transpose(x, self._order).reshape(self.rows, self.features)

    def _array(self, matrix: Any) -> Any:
        array = matrix.reshape(tuple(self.shape[a] for a in self._order))
        return jnp.transpose(array, tuple(int(i) for i in np.argsort(self._order)))

    def _hash(self, x: Any, others: tuple[Any, ...]) -> Any:
        """Return a number that changes with any bit of the array or of the others."""
        return sum((_mixed(one) for one in others), start=_mixed(x))

    def _key(self, hashed: Any) -> Any:
        return jax.random.fold_in(jax.random.key(self.seed), hashed)


def _mixed(x: Any) -> Any:
    """Return the sum of an array's bits, those of each number spread over all 32 places first (as MurmurHash3 does)."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return jnp.sum(bits ^ (bits >> np.uint32(16)), dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True)
class Combined(_Rows):
    """A matrix `X` as `S.T @ X / sqrt(rank)`: `decode` gives `S @ S.T @ X / rank`, whose expectation is `X`.

    The leaves are the combinations, `[rank, features]` of the array's dtype, and a hash from which `S` is made again.
    """

    gaussian: bool = False

    @property
    def error(self) -> float:
        """Expected error relative to the norm of the array, of a decoded array; that of the gradient is smaller."""
        return math.sqrt(self.rows / self.rank)

    def seconds(self, spec: Any) -> float:
        """Return the predicted seconds of both matmuls."""
        return 2 * 2.0 * self.rows * self.rank * self.features / spec.matmul_rate(self.dtype)

    def _random(self, hashed: Any) -> Any:
        make = jax.random.normal if self.gaussian else jax.random.rademacher
        return make(self._key(hashed), (self.rows, self.rank), self.dtype)

    def encode(self, x: Any, *others: Any) -> tuple[Any, Any]:
        """Return the combinations and the hash, which is of the array and the others."""
        hashed = self._hash(x, others)
        product = jnp.matmul(self._random(hashed).T, self._matrix(x), preferred_element_type=jnp.float32)
        return (product * np.float32(1 / math.sqrt(self.rank))).astype(self.dtype), hashed

    def decode(self, leaves: tuple[Any, Any]) -> Any:
        """Return an array whose expectation is the one that was encoded."""
        product = jnp.matmul(self._random(leaves[1]), leaves[0], preferred_element_type=jnp.float32)
        return self._array((product * np.float32(1 / math.sqrt(self.rank))).astype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Sampled(_Rows):
    """A matrix as `rank` of its rows: the largest as they are, others drawn at random and scaled.

    The leaves are the rows, `[rank, features]` of the array's dtype, and their numbers, `int32 [rank]`. `decode` adds
    them up in an array of zeros, whose expectation is the one that was encoded.
    """

    @property
    def error(self) -> float:
        """Expected error relative to the norm of the array, at most, of a decoded array."""
        return math.sqrt(self.rows / self.rank)

    def seconds(self, spec: Any) -> float:
        """Return the predicted seconds of sorting the norms."""
        return self.rows * math.log2(max(2, self.rows)) ** 2 / spec.vector_flops_per_second

    def encode(self, x: Any, *others: Any) -> tuple[Any, Any]:
        """Return the rows and their numbers, drawn from a hash of the array and the others."""
        return self.taken(x, self.norms(x), self._key(self._hash(x, others)))

    def norms(self, x: Any) -> Any:
        """Return the norms of the rows, float32 `[rows]`."""
        return jnp.sqrt(jnp.sum(self._matrix(x).astype(jnp.float32) ** 2, axis=1))

    def taken(self, x: Any, chances: Any, key: Any) -> tuple[Any, Any]:
        """Return `rank` rows, drawn in proportion to `chances` (float32 `[rows]`, at least 0), and their numbers."""
        index, weight = self.sample(chances, key)
        return (self._matrix(x)[index].astype(jnp.float32) * weight[:, None]).astype(self.dtype), index

    def sample(self, chances: Any, key: Any) -> tuple[Any, Any]:
        """Return numbers and weights of `rank` rows; those of the largest chances come first, as they are."""
        chances = chances + np.float32(jnp.finfo(jnp.float32).tiny)
        order = jnp.argsort(-chances).astype(jnp.int32)
        chance = chances[order] / jnp.sum(chances)
        reached = jnp.cumsum(chance)
        slots = jnp.arange(self.rank, dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros(1, jnp.float32), reached])[: self.rank]
        left = jnp.maximum(1 - before, 0)
        kept = jnp.argmin(left / (self.rank - slots).astype(jnp.float32)).astype(jnp.int32)
        rest = left[kept]
        drawn = before[kept] + jax.random.uniform(key, (self.rank,), jnp.float32) * rest
        # A comparison of all with all, which fuses: JAX 0.12's searchsorted cannot be lowered from within a jaxpr.
        drawn = jnp.sum(reached[:, None] <= drawn[None], axis=0, dtype=jnp.int32)
        place = jnp.where(slots < kept, slots, jnp.clip(drawn, kept, self.rows - 1))
        scaled = rest / ((self.rank - kept).astype(jnp.float32) * chance[place])
        return order[place], jnp.where(slots < kept, jnp.float32(1), scaled)

    def decode(self, leaves: tuple[Any, Any]) -> Any:
        """Return an array whose expectation is the one that was encoded."""
        empty = jnp.zeros((self.rows, self.features), self.dtype)
        return self._array(empty.at[leaves[1]].add(leaves[0], mode="promise_in_bounds"))
