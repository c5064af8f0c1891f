"""The curvature gauge: traces with respect to values inside a step, by random vectors.

In: a survey, lossy forms, a batch, and which values are the loss or the gradients. Out: for each form Omega of HAWQ-V2,
and the mean trace in it with its standard error: of the loss's Hessian, for which the forward pass is differentiated
twice, or of the Gauss-Newton matrix of the gradients' error, for which the step is differentiated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _compat as c
from memopt import _probe
from memopt._contract import Store
from memopt._survey import Survey

Traced = tuple[float, float, float]  # Omega, the mean trace, and the standard error of that


def loss_traces(
    survey: Survey, stores: Sequence[Store], loss: int, leaves: Sequence[Any], *, samples: int, seed: int
) -> list[Traced | None]:
    """Return for each form Omega of HAWQ-V2, the loss's mean trace and its standard error; None without the loss.

    Omega is `|mean trace| * |Q(x) - x|^2` (section 3.1), with all runs of a loop's value as one vector. Values that the
    loss does not depend on, such as local derivatives, have none.
    """
    values = sorted({store.value for store in stores})
    program, shapes = _probe.shifted(survey, values, loss)
    run = c.as_function(program)
    base = c.open_jaxpr(program)
    read = {v for eqn in base.eqns for v in eqn.invars if not isinstance(v, c.Literal)}
    kept = [i for i, shift in enumerate(base.invars[len(leaves) :]) if shift in read]
    if not kept:
        return [None] * len(stores)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def of(shifts: Sequence[Any]) -> Any:
        every = list(zeros)
        for i, shift in zip(kept, shifts, strict=True):
            every[i] = shift
        return run(*leaves, *every)[0]

    blocks = [shapes[i] for i in kept]
    found = estimates(hutchinson(of, blocks), blocks, samples=samples, seed=seed)
    means = {values[i]: mean(one / max(1, shapes[i].size)) for i, one in zip(kept, found, strict=True)}
    return _omegas(survey, stores, means, leaves)


def gradient_traces(
    survey: Survey,
    stores: Sequence[Store],
    results: Sequence[int],
    leaves: Sequence[Any],
    repeats: Mapping[int, frozenset[int]],
    *,
    samples: int,
    seed: int,
) -> list[Traced | None]:
    """Return the same for half the Hessian of `|g(d) - g|^2 / |g|^2`, where the backward pass reads `x + d`.

    At `d = 0` that is the Gauss-Newton matrix `J.T J / |g|^2` of the gradients, and `z . H z = |J z|^2 / |g|^2`. Omega
    is then the squared relative error of the gradient to expect of an error as large as the form's, in no direction.
    """
    values = sorted({store.value for store in stores})
    program, shapes = _probe.leaning(survey, values, results, repeats)
    run = c.as_function(program)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def squares(vectors: Sequence[Any]) -> Any:
        gradients, moved = jax.jvp(lambda shifts: run(*leaves, *shifts), (zeros,), (list(vectors),))
        return [_square(x) for x in moved], [_square(x) for x in gradients]

    moved, norms = estimates(squares, shapes, samples=samples, seed=seed)
    norm = norms[0][0][moved.sum(axis=(0, 1)) > 0].sum()
    found = moved.sum(axis=-1) / (norm if norm > 0 else 1.0)
    sizes = [max(1, s.size) for s in shapes]
    means = {v: mean(one / size) for v, one, size in zip(values, found, sizes, strict=True)}
    return _omegas(survey, stores, means, leaves)


def hutchinson(function: Callable[[list[Any]], Any], shapes: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """Return `z -> z . H z` for the Hessian of a scalar function at zero."""
    zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def product(vectors: list[Any]) -> Any:
        _, products = jax.jvp(jax.grad(function), (zeros,), (vectors,))
        return sum(_dot(z, h) for z, h in zip(vectors, products, strict=True))

    return product


def estimates(function: Callable[[list[Any]], Any], shapes: Sequence[Any], *, samples: int, seed: int) -> Any:
    """Return what a function makes of random vectors: entries that are 1 or -1 in one block, and 0 elsewhere.

    Of `z . H z` (Hutchinson's estimator) the mean is the trace of the block of `H`, the variance twice the sum of the
    squares of the block's entries off the diagonal.

    Args:
      function: a list of arrays -> a scalar, or a tuple of lists of scalars.
      shapes: those of the arrays, one for each block.
      samples: vectors for each block.
      seed: of the vectors.

    Returns:
      float64 `[blocks, samples]`, or a tuple of `[blocks, samples, ...]`.
    """

    @jax.jit
    def sample(block: Any, number: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), len(shapes))
        drawn = [jax.random.rademacher(k, s.shape, s.dtype) for k, s in zip(keys, shapes, strict=True)]
        found = function([z * (block == np.int32(i)).astype(z.dtype) for i, z in enumerate(drawn)])
        return tuple(map(jnp.stack, found)) if isinstance(found, tuple) else (found,)

    found = [[sample(np.int32(i), np.uint32(k)) for k in range(samples)] for i in range(len(shapes))]
    parts = range(len(found[0][0]))
    arrays = tuple(np.asarray([[one[k] for one in row] for row in found], np.float64) for k in parts)
    return arrays if len(arrays) > 1 else arrays[0]


def mean(found: np.ndarray) -> tuple[float, float]:
    """Return the mean of estimates and its standard error, which is infinite for a single one."""
    spread = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    return float(found.mean()), float(spread)


def _dot(x: Any, y: Any) -> Any:
    return jnp.sum((x * y).astype(np.promote_types(x.dtype, np.float32)))


def _square(x: Any) -> Any:
    return _dot(x, x)


def _omegas(survey: Survey, stores: Sequence[Store], means: Mapping, leaves: Sequence[Any]) -> list[Traced | None]:
    values, measured = list(means), [s for s in stores if s.value in means]
    arrays = jax.jit(c.as_function(_probe.made(survey, values)))(*leaves)
    found = dict(zip(values, arrays, strict=True))

    @jax.jit
    def distances(found: Mapping[int, Any]) -> list[Any]:
        return [_distance(store, found[store.value], survey) for store in measured]

    known = {id(s): float(x) for s, x in zip(measured, distances(found), strict=True)}
    return [(abs(means[s.value][0]) * known[id(s)], *means[s.value]) if id(s) in known else None for s in stores]


def _distance(store: Store, array: Any, survey: Survey) -> Any:
    """Return `|Q(x) - x|^2` over all runs of a value."""

    def square(x: Any) -> Any:
        wide = np.promote_types(x.dtype, np.float32)
        return jnp.sum((store.decode(store.encode(x)).astype(wide) - x.astype(wide)) ** 2)

    shape = survey.graph.values[store.value].aval.shape
    return jnp.sum(jax.vmap(square)(jnp.reshape(array, (-1, *shape))))
