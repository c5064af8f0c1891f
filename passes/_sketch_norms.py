"""The ledger of gradient norms: what is kept of each sample's gradients from the last time that it was seen.

In: norms by sample number, the numbers of a batch's samples, rows and the gradients of their outputs. Out: the chances
of rows in a sample, the gradient of a weight made from it, and the norms after the step. All are functions of arrays;
nothing here knows a step. A sample that was not seen yet, and a norm that is not finite, count as the mean of the
batch's others; rows of one sample (its tokens) share its norm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt.passes._sketch_form import Sampled

#: The norm of a sample that was not seen yet.
UNSEEN = -1.0
#: Share of the chances that goes by the rows' own norms alone, so that none is 0 where its row is not.
_OWN = 0.1


def fresh(samples: int, layers: int | None) -> Any:
    """Return the norms before the first step: float32 `[samples]`, or `[layers, samples]` of a scanned stack."""
    return jnp.full((samples,) if layers is None else (layers, samples), UNSEEN, jnp.float32)


def read(norms: Any, numbers: Any) -> Any:
    """Return the norms of a batch's samples, float32 `[..., batch]`, all of them finite and at least 0.

    Args:
      norms: float32 `[..., samples]`.
      numbers: int32 `[batch]`; a number outside the range is a sample that was not seen.
    """
    inside = (numbers >= 0) & (numbers < norms.shape[-1])
    found = jnp.take(norms, jnp.where(inside, numbers, 0), axis=-1, mode="clip")
    known = jnp.broadcast_to(inside, found.shape) & jnp.isfinite(found) & (found >= 0)
    count = jnp.sum(known, axis=-1, keepdims=True, dtype=jnp.float32)
    total = jnp.sum(jnp.where(known, found, 0), axis=-1, keepdims=True)
    mean = jnp.where(count > 0, total / jnp.maximum(count, 1), 1)
    return jnp.where(known, found, jnp.broadcast_to(mean, found.shape))


def written(norms: Any, numbers: Any, squares: Any) -> Any:
    """Return the norms after a step.

    Args:
      norms: float32 `[..., samples]`.
      numbers: int32 `[batch]`; what is outside the range is not written.
      squares: squared norms of the batch's gradients, float32 `[..., batch]`.
    """
    places = jnp.where(numbers < 0, norms.shape[-1], numbers)
    return norms.at[..., places].set(jnp.sqrt(squares), mode="drop")


@dataclasses.dataclass(frozen=True)
class Rows(Sampled):
    """A sample of rows whose chances go by their own norms times the cached ones of their samples.

    Attributes:
      sample_axis: which of `axes` numbers the samples of a batch; rows along the others are of one sample.
      group: how many neighbours along that axis are of one sample: 1, or more where tokens were folded into it.
    """

    sample_axis: int = 0
    group: int = 1

    @property
    def batch(self) -> int:
        """Samples in a batch."""
        return self.shape[self.axes[self.sample_axis]] // self.group

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.axes)

    def chances(self, x: Any, norms: Any) -> Any:
        """Return the chances of the rows of an array, float32 `[rows]`, given the norms of the batch's samples.

        Mostly the product of both norms, and for a tenth the rows' own alone: where the cache is wrong, the variance
        is at most ten times that of a sample without it.
        """
        own = self.norms(x)
        place = jnp.broadcast_to(norms[:, None], (self.batch, self.group)).reshape(-1)
        place = jax.lax.broadcast_in_dim(place, self._row_shape, (self.sample_axis,)).reshape(self.rows)
        both = own * (place / jnp.maximum(jnp.max(place), np.float32(jnp.finfo(jnp.float32).tiny)))
        return (1 - _OWN) * _shares(both) + _OWN * _shares(own)

    def kept(self, x: Any, norms: Any, key_data: Any) -> tuple[Any, Any]:
        """Return the rows that are kept, `[rank, features]`, and their numbers, int32 `[rank]`."""
        return self.taken(x, self.chances(x, norms), jax.random.wrap_key_data(key_data))

    def squares(self, y: Any, axes: tuple[int, ...]) -> Any:
        """Return the squared norms of the samples' gradients, float32 `[batch]`.

        Args:
          y: the gradient of the layer's result.
          axes: those that are contracted, in the order of `self.axes`.
        """
        kept = axes[self.sample_axis]
        total = jnp.sum(y.astype(jnp.float32) ** 2, axis=tuple(a for a in range(y.ndim) if a != kept))
        return jnp.sum(total.reshape(self.batch, self.group), axis=1)

    def picked(self, y: Any, axes: tuple[int, ...], index: Any) -> Any:
        """Return the rows of the gradient of a layer's result that were kept of its input: `[rank, outputs]`."""
        order = (*axes, *(a for a in range(y.ndim) if a not in axes))
        matrix = jnp.transpose(y, order).reshape(self.rows, y.size // self.rows)
        return matrix.at[index].get(mode="promise_in_bounds")


def _shares(numbers: Any) -> Any:
    return numbers / (jnp.sum(numbers) + np.float32(jnp.finfo(jnp.float32).tiny))


def layout(shape: tuple[int, ...], axes: tuple[int, ...], batch: int) -> tuple[int, int] | None:
    """Return which of the contracted axes numbers the samples, and how many rows along it are of one; None for none.

    The first axis as long as the batch; else the first one if it is a multiple of it (tokens folded into it).
    """
    sizes = [shape[a] for a in axes]
    if batch in sizes:
        return sizes.index(batch), 1
    return (0, sizes[0] // batch) if sizes[0] % batch == 0 else None
