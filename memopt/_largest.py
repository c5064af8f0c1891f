"""Largest: the largest batch, length or size of a step that fits a device.

A step, a function from size to arguments, and sizes come in; the size found, its figures and every trial go out. Each
trial is compiled (`measure`); for a step that `memopt.optimize` made it is planned, and the best one compiled. Nothing
is run.
"""

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from memopt._bytes import format_bytes, parse_bytes
from memopt._errors import BudgetError
from memopt._measure import Memory, is_optimized, measure
from memopt._target import Target
from memopt._target import limit_bytes as target_limit_bytes

_GUESSES = 2  # trials placed by interpolation before plain bisection takes over


@dataclass(frozen=True)
class Trial:
    """One size that was tried: its peak in bytes (None where it is not known), and whether that fits."""

    size: int
    peak_bytes: int | None
    fits: bool
    seconds: float


@dataclass(frozen=True)
class Largest:
    """The answer of `largest`.

    Args:
        size: the largest size that fits, or None where not even the smallest does.
        memory: the compiler's figures at that size.
        budget_bytes: what the peaks were compared with.
        trials: every trial, in the order in which they were made.

    Example:
        >>> import jax, jax.numpy as jnp, memopt
        >>> rows = lambda n: (jax.ShapeDtypeStruct((n, 256), jnp.float32),)
        >>> print(memopt.largest(lambda x: x * 2, rows, [8, 16], budget="20KiB"))
        largest size that fits: 8 (budget 20.0 KiB)
                  size          peak
                     8      16.0 KiB  fits
                    16      32.0 KiB  does not fit
    """

    size: int | None
    memory: Memory | None
    budget_bytes: int
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        found = "no size fits" if self.size is None else f"largest size that fits: {self.size}"
        rows = [
            f"  {trial.size:>12}{format_bytes(trial.peak_bytes):>14}  {'fits' if trial.fits else 'does not fit'}"
            for trial in sorted(self.trials, key=lambda trial: trial.size)
        ]
        return "\n".join([f"{found} (budget {format_bytes(self.budget_bytes)})", f"  {'size':>12}{'peak':>14}", *rows])


def largest(
    step: Callable[..., Any],
    make_args: Callable[[int], Sequence[Any]],
    sizes: Sequence[int],
    *,
    target: str | Target | None = None,
    budget: int | str | None = None,
    **options: Any,
) -> Largest:
    """Find the largest size at which a step fits.

    Costs about four compilations where memory grows linearly with the size, never more than a bisection plus two.

    Args:
        step: as in `memopt.measure`, or a step that `memopt.optimize` made: its sizes are found by planning, and only
            the size found is compiled.
        make_args: from a size to the arguments of the step; shapes (`jax.ShapeDtypeStruct`) are enough.
        sizes: increasing sizes to choose from, or a tuple `(low, high)` for every whole number from low to high.
        target: as in `memopt.measure`.
        budget: bytes or `"14GiB"`; None for the limit of the target.
        **options: options of `jax.jit`, as in `memopt.measure`.

    Returns:
        `Largest`, with `size` None where not even the smallest size fits.

    Raises:
        ValueError: sizes that do not increase, a target without a limit (CPU) and no budget, or a target, budget or
            options for a step that `memopt.optimize` made.
        TypeError: `make_args` returns something else than a tuple or list.

    Example:
        >>> import jax, jax.numpy as jnp, memopt
        >>> rows = lambda n: (jax.ShapeDtypeStruct((n, 256), jnp.float32),)
        >>> memopt.largest(lambda x: x * 2, rows, (1, 100), budget="20KiB").size
        10

    Limits: the peak is taken to grow with the size; where it does not, a size that fits is found, not the largest.
    """
    candidates = _candidates(sizes)
    if is_optimized(step):
        _reject_given({"target": target, "budget": budget, **options})
        return _largest_optimized(step, make_args, candidates)
    parsed = Target.parse(target)
    budget_bytes = target_limit_bytes(parsed) if budget is None else parse_bytes(budget)
    if budget_bytes is None:
        raise ValueError(f"Target '{parsed}' has no memory limit. Give budget='8GiB', for example, or a TPU target.")

    def memory_at(size: int) -> tuple[Memory, int]:
        return measure(step, *_arguments(make_args, size), target=parsed, **options), budget_bytes

    log = _Log(memory_at)
    return log.result(candidates, _search(candidates, log))


def _largest_optimized(step: Any, make_args: Callable[[int], Sequence[Any]], candidates: Sequence[int]) -> Largest:
    """Search by planning, which compiles nothing; then compile the best, and where it is over, search by compiling."""
    planned = _Log(lambda size: _planned(step, _arguments(make_args, size)))
    best = _search(candidates, planned)
    if best is None:
        return planned.result(candidates, None)
    budget_bytes = planned.budget_bytes
    compiled = _Log(lambda size: (step.measure(*_arguments(make_args, size)), budget_bytes))
    if not compiled.trial(candidates[best]).fits:
        best = _search(candidates[:best], compiled)
    compiled.done = planned.done | compiled.done
    return compiled.result(candidates, best)


def _candidates(sizes: Sequence[int]) -> Sequence[int]:
    """Return the sizes to choose from; a tuple of two is a range that holds both ends."""
    if isinstance(sizes, tuple) and len(sizes) == 2:
        sizes = range(sizes[0], sizes[1] + 1)
    if len(sizes) == 0 or any(sizes[i] >= sizes[i + 1] for i in range(len(sizes) - 1) if not isinstance(sizes, range)):
        raise ValueError(f"Sizes must increase, and there must be one; got {sizes!r}. Write (1, 64) or [1, 2, 4, 8].")
    return sizes


def _reject_given(given: dict[str, Any]) -> None:
    names = sorted(name for name, value in given.items() if value is not None)
    if names:
        raise ValueError(f"{names} cannot change a step that memopt.optimize made. Give them to memopt.optimize.")


class _Log:
    """Trials that were made, each size once; `memory_at` gives the figures of a size and what they must fit."""

    def __init__(self, memory_at: Callable[[int], tuple[Any, int]]) -> None:
        self.memory_at = memory_at
        self.done: dict[int, Trial] = {}
        self.memories: dict[int, Memory] = {}
        self.budget_bytes = 0

    def trial(self, size: int) -> Trial:
        if size not in self.done:
            start = time.perf_counter()
            peak_bytes, fits = self._peak(size)
            self.done[size] = Trial(size, peak_bytes, fits, time.perf_counter() - start)
        return self.done[size]

    def _peak(self, size: int) -> tuple[int | None, bool]:
        try:
            memory, self.budget_bytes = self.memory_at(size)
        except BudgetError as error:
            self.budget_bytes = error.budget_bytes
            return error.smallest_peak_bytes, False
        self.memories[size] = memory
        peak_bytes = memory.peak_bytes
        return peak_bytes, memory.fits and peak_bytes is not None and peak_bytes <= self.budget_bytes

    def result(self, candidates: Sequence[int], best: int | None) -> Largest:
        size = None if best is None else candidates[best]
        memory = None if size is None else self.memories[size]
        return Largest(size, memory, self.budget_bytes, tuple(self.done.values()))


class _Planned(NamedTuple):
    """The part of `Memory` that a plan predicts."""

    peak_bytes: int
    fits: bool = True


def _planned(step: Any, args: tuple) -> tuple[Any, int]:
    plan = step.plan(*args)
    if plan.budget_bytes is None:
        raise ValueError("The step has no budget and its device no limit. Give memopt.optimize a budget.")
    return _Planned(plan.predicted_peak_bytes), plan.budget_bytes


def _arguments(make_args: Callable[[int], Sequence[Any]], size: int) -> tuple:
    args = make_args(size)
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"make_args({size}) must return a tuple of arguments; got {type(args).__name__}.")
    return tuple(args)


def _search(candidates: Sequence[int], log: _Log) -> int | None:
    """Return the index of the largest candidate that fits, or None; both ends are tried first."""
    low, high = 0, len(candidates) - 1
    if high < 0 or not log.trial(candidates[low]).fits:
        return None
    if log.trial(candidates[high]).fits:
        return high
    guesses = 0
    while high - low > 1:
        middle = _guess(candidates, low, high, log) if guesses < _GUESSES else (low + high) // 2
        guesses += 1
        low, high = (middle, high) if log.trial(candidates[middle]).fits else (low, middle)
    return low


def _guess(candidates: Sequence[int], low: int, high: int, log: _Log) -> int:
    """Return the index, strictly between two trials, where a straight line through them meets the budget."""
    below, above = log.trial(candidates[low]), log.trial(candidates[high])
    if below.peak_bytes is None or above.peak_bytes is None or above.peak_bytes <= below.peak_bytes:
        return (low + high) // 2
    share = (log.budget_bytes - below.peak_bytes) / (above.peak_bytes - below.peak_bytes)
    size = below.size + share * (above.size - below.size)
    return min(max(bisect.bisect_right(candidates, size) - 1, low + 1), high - 1)
