"""The CPU's own figures, measured: matmul rates, memory bandwidth, element-wise rates.

Nothing comes in; a `CpuFigures` goes out, from a handful of small jitted programs (about a second, once a process).
It measures only when asked and touches no device but the first CPU device.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

_SECONDS = 0.12  # For each program: many short runs, so that one of them is undisturbed on a busy machine.
_MATMUL_SIZE = 384
_STREAM_ELEMENTS = 8 * 2**20  # 32 MiB of float32: past the last-level cache's share of most machines.
_CHAIN_ELEMENTS = 2**19  # Enough for XLA to use all threads.
_CHAIN_LENGTH = 64
_TRANSCENDENTAL_LENGTH = 4


@dataclasses.dataclass(frozen=True)
class CpuFigures:
    """Measured rates of the first CPU device.

    Attributes:
        matmul_flops_per_second: by dtype name, for float32 and bfloat16.
        memory_bytes_per_second: read and write of an array larger than the caches.
        vector_flops_per_second: multiplications and additions in one fused loop.
        transcendental_weight: multiplications that one transcendental call takes the time of.
    """

    matmul_flops_per_second: dict[str, float]
    memory_bytes_per_second: float
    vector_flops_per_second: float
    transcendental_weight: float


@functools.lru_cache(maxsize=1)
def calibrate() -> CpuFigures:
    """Measure the CPU, once in a process.

    Takes about a second and 64 MiB. Each figure is the best of several runs, so that other work on the machine
    disturbs it little. Safe under a trace: the programs run at once and leave nothing in it.

    Returns:
        The figures, the same object on every call.

    Example:
        >>> calibrate().memory_bytes_per_second > 0
        True
    """
    with jax.ensure_compile_time_eval():
        return _measure()


def _measure() -> CpuFigures:
    cheap = _chain_seconds(_cheap_chain) / _CHAIN_LENGTH
    costly = _chain_seconds(_transcendental_chain) / _TRANSCENDENTAL_LENGTH
    stream = np.ones(_STREAM_ELEMENTS, np.float32)
    return CpuFigures(
        matmul_flops_per_second={name: _matmul_rate(name) for name in ("float32", "bfloat16")},
        memory_bytes_per_second=2 * stream.nbytes / _best_seconds(lambda x: x + np.float32(1), stream),
        vector_flops_per_second=_CHAIN_ELEMENTS / cheap,
        transcendental_weight=max(1.0, costly / cheap),
    )


def _matmul_rate(name: str) -> float:
    operand = np.full((_MATMUL_SIZE, _MATMUL_SIZE), 0.5, jax.numpy.dtype(name))
    seconds = _best_seconds(lambda a: lax.dot(a, a, precision=lax.Precision.DEFAULT), operand)
    return 2.0 * _MATMUL_SIZE**3 / seconds


def _chain_seconds(chain: Callable[[jax.Array], jax.Array]) -> float:
    return _best_seconds(chain, np.full(_CHAIN_ELEMENTS, 0.5, np.float32))


def _cheap_chain(x: jax.Array) -> jax.Array:
    y = x
    for _ in range(_CHAIN_LENGTH // 2):
        y = y * x + x
    return y


def _transcendental_chain(x: jax.Array) -> jax.Array:
    for _ in range(_TRANSCENDENTAL_LENGTH // 2):
        x = lax.tanh(lax.exp(x * x))
    return x


def _best_seconds(function: Callable[[jax.Array], jax.Array], operand: np.ndarray) -> float:
    """Return the shortest of several runs of a jitted function, in place: fresh pages would cost more than the run."""
    jitted = jax.jit(function, donate_argnums=0)
    value = jitted(jax.device_put(operand, jax.devices("cpu")[0])).block_until_ready()
    best = float("inf")
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        value = jitted(value).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)
