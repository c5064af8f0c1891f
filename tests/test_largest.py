"""Largest: the size found, the number of trials, and steps that plan."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from memopt._errors import BudgetError
from memopt._largest import largest
from memopt._measure import Memory, memory_of_error
from memopt._target import Target


def double(x):
    return x * 2


def rows(count):
    return (jax.ShapeDtypeStruct((count, 256), jnp.float32),)


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ((1, 100), 10),
        ((10, 11), 10),
        ([1, 2, 4, 8, 16, 32], 8),
        ([10], 10),
        (range(1, 100, 4), 9),
        ((1, 5), 5),
        ([2, 3], 3),
        ([11, 12], None),
    ],
)
def test_the_largest_size_that_fits(sizes, size):
    found = largest(double, rows, sizes, budget="20KiB")  # 2 KiB a row: in and out
    assert found.size == size
    assert all(trial.fits == (trial.size <= 10) and trial.peak_bytes == 2048 * trial.size for trial in found.trials)
    assert (None if size is None else found.memory.peak_bytes) == (None if size is None else 2048 * size)
    assert len({trial.size for trial in found.trials}) == len(found.trials)


def test_linear_memory_takes_four_compilations():
    assert [trial.size for trial in largest(double, rows, (1, 1000), budget="20KiB").trials] == [1, 1000, 10, 11]


def test_options_reach_the_compiler():
    assert largest(double, rows, (1, 100), budget="20KiB", donate_argnums=0).size == 20


def test_a_table_is_printed():
    assert str(largest(double, rows, (1, 100), budget="20KiB")).splitlines()[:3] == [
        "largest size that fits: 10 (budget 20.0 KiB)",
        "          size          peak",
        "             1       2.0 KiB  fits",
    ]
    assert str(largest(double, rows, [11], budget="20KiB")).startswith("no size fits (budget 20.0 KiB)")


@pytest.mark.tpu_aot
def test_the_limit_of_a_tpu_is_the_budget():
    found = largest(double, rows, [2**20, 2**22, 2**23, 2**24], target="tpu:v5e", donate_argnums=0)
    assert (found.size, found.budget_bytes) == (2**23, 63 * 2**28)
    assert found.memory.peak_bytes == 2**33


@pytest.mark.parametrize("sizes", [[], [2, 1], [1, 1], (5, 1), [1, 2, 2]])
def test_sizes_must_increase(sizes):
    with pytest.raises(ValueError, match=r"Sizes must increase.*Write \(1, 64\) or \[1, 2, 4, 8\]"):
        largest(double, rows, sizes, budget="1MiB")


def test_the_cpu_needs_a_budget():
    with pytest.raises(ValueError, match="Target 'cpu' has no memory limit. Give budget='8GiB'"):
        largest(double, rows, (1, 2))


def test_arguments_must_be_a_tuple():
    with pytest.raises(TypeError, match=r"make_args\(1\) must return a tuple of arguments; got ShapeDtypeStruct"):
        largest(double, lambda count: rows(count)[0], (1, 2), budget="1MiB")


class OptimizedStep:
    """A step that plans 10 bytes a row under 100 bytes, and compiles to `factor` times that."""

    def __init__(self, factor=1.0, budget_bytes=100):
        self.factor, self.budget_bytes, self.compiled = factor, budget_bytes, []

    def plan(self, size):
        return SimpleNamespace(budget_bytes=self._fitting(10 * size), predicted_peak_bytes=10 * size)

    def measure(self, size):
        self.compiled.append(size)
        peak_bytes = int(10 * size * self.factor)
        self._fitting(peak_bytes)
        return Memory(0, 0, 0, peak_bytes, 0, peak_bytes, None, True, 0, 0.0)

    def _fitting(self, peak_bytes):
        if self.budget_bytes is not None and peak_bytes > self.budget_bytes:
            raise BudgetError(self.budget_bytes, peak_bytes)
        return self.budget_bytes


def as_arguments(size):
    return (size,)


def test_an_optimized_step_is_planned_and_compiled_once():
    step = OptimizedStep()
    found = largest(step, as_arguments, (1, 64))
    assert (found.size, found.budget_bytes, found.memory.peak_bytes) == (10, 100, 100)
    assert step.compiled == [10]


def test_an_optimized_step_that_compiles_to_more_is_searched_by_compiling():
    step = OptimizedStep(factor=1.5)
    found = largest(step, as_arguments, (1, 64))
    assert (found.size, found.memory.peak_bytes) == (6, 90)
    assert step.compiled[0] == 10 and 7 in step.compiled
    assert {trial.size: trial.fits for trial in found.trials}[10] is False


def test_an_optimized_step_of_which_nothing_fits():
    found = largest(OptimizedStep(), as_arguments, [11, 12])
    assert (found.size, found.memory, found.budget_bytes) == (None, None, 100)


def test_an_optimized_step_without_a_budget():
    with pytest.raises(ValueError, match="no budget and its device no limit. Give memopt.optimize a budget."):
        largest(OptimizedStep(budget_bytes=None), as_arguments, (1, 64))


@pytest.mark.parametrize("given", [{"budget": 5}, {"target": "cpu"}, {"donate_argnums": 0}])
def test_an_optimized_step_takes_no_options(given):
    with pytest.raises(ValueError, match="cannot change a step that memopt.optimize made"):
        largest(OptimizedStep(), as_arguments, (1, 64), **given)


def test_an_unknown_peak_falls_back_to_bisection(monkeypatch):
    def measure(step, size, target):
        memory = Memory(0, 0, 0, 0, 0, 0, None, True, 0, 0.0)
        return memory if size <= 37 else memory_of_error("Used 9G of 1G hbm", target)

    monkeypatch.setattr("memopt._largest.measure", measure)
    found = largest(double, as_arguments, (1, 64), budget="2GiB", target=Target("cpu"))
    assert found.size == 37
