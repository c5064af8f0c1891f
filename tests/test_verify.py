"""Tests of the closing loop: compiled peaks against the budget, planning again, and the errors that help.

The planner is replaced by ladders whose predictions are wrong on purpose; the peaks are the compiler's own.
"""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from memopt import _program, _verify
from memopt._errors import BudgetError
from memopt._measure import measure
from memopt._optimize import optimize

LENGTH, SIZE = 16, 1024
W, X = jnp.full((SIZE,), 0.5, jnp.float32), jnp.ones((SIZE,), jnp.float32)


def loss_of(wrap):
    def loss(w, x):
        body = wrap(lambda c, _: (jnp.sin(c * w), None))
        return jax.lax.scan(body, x, None, length=LENGTH)[0].sum()

    return loss


def step_of(wrap):
    return lambda w, x: (w - jax.grad(loss_of(wrap))(w, x), x * 2)


STEP, SMALL_STEP = step_of(lambda f: f), step_of(jax.checkpoint)


class Ladder:
    """Rungs from (function, predicted peak) pairs; the planner's own choice."""

    def __init__(self, closed, rungs, spares=()):
        self.rungs, self.spares = (
            [rung(closed if fn is None else jax.make_jaxpr(fn)(W, X), *rest) for fn, *rest in some]
            for some in (rungs, spares)
        )

    def rung(self, index):
        return [*self.rungs, *self.spares][index]

    def choose(self, budget_bytes, measured):
        peaks = [measured.get(i, r.predicted_peak_bytes) for i, r in enumerate(self.rungs)]
        return next((i for i, peak in enumerate(peaks) if peak <= budget_bytes), None)


def rung(closed, peak_bytes, flops=0.0, packed_bytes=None, late=False):
    packed_bytes = peak_bytes if packed_bytes is None else packed_bytes
    return SimpleNamespace(
        choice=SimpleNamespace(stores={0: SimpleNamespace(late=True)} if late else {}),
        jaxpr=lambda: closed,
        predicted_peak_bytes=peak_bytes,
        packed_peak_bytes=packed_bytes,
        recompute_flops=flops,
        seconds=0.0,
    )


@pytest.fixture
def use(monkeypatch):
    def set_ladder(*rungs, spares=()):
        monkeypatch.setattr(_program, "make_ladder", lambda closed, *_, **__: Ladder(closed, rungs, spares))

    return set_ladder


PLAIN_BYTES = measure(STEP, W, X).peak_bytes
SMALL_BYTES = measure(SMALL_STEP, W, X).peak_bytes


def shuffled(number):
    """Another program with the plain step's peak."""
    return lambda w, x: STEP(w, jax.lax.optimization_barrier(x) + number)


def program_of(step):
    return step._core._latest


def test_the_checkpointed_step_is_smaller():
    assert SMALL_BYTES < 0.8 * PLAIN_BYTES


def test_a_plan_that_fits_is_compiled_once(use, caplog):
    use((None, PLAIN_BYTES), (SMALL_STEP, SMALL_BYTES))
    step = optimize(STEP, budget=SMALL_BYTES)
    with caplog.at_level(logging.INFO, "memopt"):
        step(W, X)
        step(W, X)
    assert program_of(step).index == 1
    assert program_of(step).measured == {1: SMALL_BYTES}
    assert step.measure(W, X).peak_bytes == SMALL_BYTES
    [line] = [record.getMessage() for record in caplog.records]
    for text in (
        "2 arrays, the largest f32[1024]",
        "for cpu",
        "budget",
        "plan predicted",
        "compiled",
        "FLOPs repeated",
    ):
        assert text in line
    assert "planned again" not in line


def test_a_miss_is_planned_again(use, caplog):
    use((None, PLAIN_BYTES // 2), (SMALL_STEP, SMALL_BYTES // 2))
    budget_bytes = (PLAIN_BYTES + SMALL_BYTES) // 2
    step = optimize(STEP, budget=budget_bytes)
    with caplog.at_level(logging.INFO, "memopt"):
        step(W, X)
    assert program_of(step).measured == {0: PLAIN_BYTES, 1: SMALL_BYTES}
    [line] = [record.getMessage() for record in caplog.records]
    assert "planned again 1 times" in line


def test_a_miss_scales_the_other_predictions(use):
    near = PLAIN_BYTES // 2 - 8
    use((None, PLAIN_BYTES // 2), (shuffled(0), near), (shuffled(1), near - 8), (SMALL_STEP, SMALL_BYTES // 2))
    step = optimize(STEP, budget=(PLAIN_BYTES + SMALL_BYTES) // 2)
    step(W, X)
    assert sorted(program_of(step).measured) == [0, 3]


@pytest.mark.parametrize(
    "predicted, flops, tried",
    [(1.005, 1.0, [0]), (1.005, 0.0, [1]), (1.02, 1.0, [1])],
    ids=["near and cheaper", "no cheaper", "not near"],
)
def test_a_plan_just_over_the_budget_is_compiled_first_where_it_repeats_less(use, predicted, flops, tried):
    use((None, int(predicted * PLAIN_BYTES)), (SMALL_STEP, SMALL_BYTES, flops))
    step = optimize(STEP, budget=PLAIN_BYTES)
    step(W, X)
    assert sorted(program_of(step).measured) == tried
    assert program_of(step).index == tried[-1]


@pytest.mark.parametrize(
    "predicted, packed, tried",
    [(1.2, 0.95, [0]), (1.2, 0.99, [1]), (1.02, 0.95, [1])],
    ids=["fits but for its holes", "hardly fits without", "small holes"],
)
def test_a_plan_that_fits_but_for_holes_is_compiled_first_where_it_repeats_less(use, predicted, packed, tried):
    use((None, int(predicted * PLAIN_BYTES), 0.0, int(packed * PLAIN_BYTES)), (SMALL_STEP, SMALL_BYTES, 1.0))
    step = optimize(STEP, budget=PLAIN_BYTES)
    step(W, X)
    assert sorted(program_of(step).measured) == tried


def test_a_spare_that_fits_but_for_holes_is_compiled_first(use):
    spares = ((shuffled(0), 2 * PLAIN_BYTES, 0.5, int(0.9 * PLAIN_BYTES)),)
    use((None, 3 * PLAIN_BYTES), (SMALL_STEP, SMALL_BYTES, 1.0), spares=spares)
    step = optimize(STEP, budget=PLAIN_BYTES)
    step(W, X)
    assert program_of(step).measured == {2: PLAIN_BYTES}
    assert program_of(step).index == 2


def test_where_nothing_is_predicted_to_fit_a_spare_may_repeat_more(use):
    spares = ((SMALL_STEP, 2 * PLAIN_BYTES, 9.0, int(0.9 * SMALL_BYTES)),)
    use((None, 3 * PLAIN_BYTES), (shuffled(0), int(1.1 * SMALL_BYTES), 1.0), spares=spares)
    step = optimize(STEP, budget=SMALL_BYTES)
    step(W, X)
    assert program_of(step).measured == {2: SMALL_BYTES}


@pytest.mark.parametrize("has_forms", [True, False])
def test_a_plan_without_exact_forms_is_tried_where_those_with_them_miss(use, has_forms):
    spares = ((SMALL_STEP, SMALL_BYTES, 9.0),)
    use((None, 3 * PLAIN_BYTES), (shuffled(0), int(0.9 * SMALL_BYTES), 1.0, None, has_forms), spares=spares)
    step = optimize(STEP, budget=SMALL_BYTES)
    if has_forms:
        step(W, X)
        assert program_of(step).measured == {1: PLAIN_BYTES, 2: SMALL_BYTES}
        assert program_of(step).index == 2
    else:
        with pytest.raises(BudgetError):
            step(W, X)


def test_a_plan_a_little_over_that_misses_does_not_count_as_the_one_without_forms(use):
    spares = ((shuffled(1), int(1.01 * SMALL_BYTES), 5.0), (SMALL_STEP, SMALL_BYTES, 9.0))
    use((None, 3 * PLAIN_BYTES), (shuffled(0), int(0.9 * SMALL_BYTES), 1.0, None, True), spares=spares)
    step = optimize(STEP, budget=SMALL_BYTES)
    step(W, X)
    assert program_of(step).measured == {1: PLAIN_BYTES, 2: PLAIN_BYTES, 3: SMALL_BYTES}


def test_a_spare_that_misses_leaves_the_rungs(use):
    spares = ((shuffled(0), 2 * PLAIN_BYTES, 0.5, SMALL_BYTES // 2),)
    use((None, 3 * PLAIN_BYTES), (SMALL_STEP, SMALL_BYTES, 1.0), spares=spares)
    step = optimize(STEP, budget=SMALL_BYTES)
    step(W, X)
    assert program_of(step).measured == {2: PLAIN_BYTES, 1: SMALL_BYTES}
    assert program_of(step).index == 1


def test_two_plans_just_over_the_budget_are_tried_at_most(use):
    over = [(shuffled(i), int((1.012 - 0.002 * i) * SMALL_BYTES), 1.0 * i) for i in range(5)]
    use((None, 2 * PLAIN_BYTES), *over, (SMALL_STEP, SMALL_BYTES, 9.0))
    step = optimize(STEP, budget=SMALL_BYTES)
    step(W, X)
    assert sorted(program_of(step).measured) == [1, 2, 6]


def test_after_three_spares_that_miss_a_plan_just_over_the_budget_is_still_tried(use):
    packed = [int((0.9 - 0.02 * i) * SMALL_BYTES) for i in range(4)]
    spares = [(shuffled(i), 2 * PLAIN_BYTES, 0.1 * i, size) for i, size in enumerate(packed)]
    near = SMALL_STEP, int(1.01 * SMALL_BYTES), 1.0
    use((None, 3 * PLAIN_BYTES), near, (shuffled(9), SMALL_BYTES, 9.0), spares=spares)
    step = optimize(STEP, budget=SMALL_BYTES)
    step(W, X)
    assert sorted(program_of(step).measured) == [1, 3, 4, 5]
    assert program_of(step).index == 1


def test_a_plan_just_over_the_budget_that_misses_costs_no_attempt(use):
    budget_bytes = PLAIN_BYTES - 1
    others = [(shuffled(i), budget_bytes - i, 1.0) for i in range(3)]
    use((None, int(1.005 * budget_bytes)), *others, (SMALL_STEP, SMALL_BYTES // 2, 1.0))
    step = optimize(STEP, budget=budget_bytes)
    step(W, X)
    assert sorted(program_of(step).measured) == [0, 1, 2, 3, 4]


def test_three_new_plans_at_most_then_an_error(use):
    use((None, 10), *((shuffled(i), 9 - i) for i in range(5)))
    step = optimize(STEP, budget=PLAIN_BYTES - 1)
    tried = []
    original = _verify.compile_rung

    def counted(program, args, kwargs):
        tried.append(program.index)
        return original(program, args, kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BudgetError) as error:
        patch.setattr(_verify, "compile_rung", counted)
        step(W, X)
    assert len(tried) == 4
    assert error.value.budget_bytes == PLAIN_BYTES - 1
    assert error.value.smallest_peak_bytes >= PLAIN_BYTES
    assert error.value.alive
    assert error.value.alive == sorted(error.value.alive, key=error.value.alive.index)


def test_the_error_names_donation_first_with_the_bytes(use):
    use((None, PLAIN_BYTES))
    with pytest.raises(BudgetError) as error:
        optimize(STEP, budget="1kB")(W, X)
    assert error.value.advice[0] == "Donate argument 0 (donate_argnums=0): 4.0 KiB less."
    assert error.value.advice[1] == "Donate argument 1 (donate_argnums=1): 4.0 KiB less."
    assert error.value.smallest_peak_bytes == PLAIN_BYTES
    assert any("arguments" in line for line in error.value.alive)
    with pytest.raises(BudgetError) as error:
        optimize(STEP, budget="1kB", donate_argnums=0)(W, X)
    assert error.value.advice == ["Donate argument 1 (donate_argnums=1): 4.0 KiB less."]
    with pytest.raises(BudgetError) as error:
        optimize(lambda w, x: STEP(w, x), budget="1kB", donate_argnums=0)(W, x=X)
    assert error.value.advice == ["Donate argument 'x' (donate_argnames='x'): 4.0 KiB less."]


def test_a_peak_far_over_the_prediction_on_the_cpu_is_said_to_be_the_compilers(use):
    use((None, PLAIN_BYTES // 2))
    with pytest.raises(BudgetError) as error:
        optimize(STEP, budget=PLAIN_BYTES - 1)(W, X)
    assert error.value.advice[0].startswith("Plan for the device that is to run the step (target=...)")
    assert "verify=False" in error.value.advice[0]
    use((None, PLAIN_BYTES))
    with pytest.raises(BudgetError) as error:
        optimize(STEP, budget=PLAIN_BYTES - 1)(W, X)
    assert not any("XLA:CPU" in sentence for sentence in error.value.advice)


def test_predictions_a_little_too_high_are_still_compiled(use):
    use((None, 2 * PLAIN_BYTES), (SMALL_STEP, int(1.1 * SMALL_BYTES)))
    step = optimize(STEP, budget=SMALL_BYTES)
    step(W, X)
    assert program_of(step).index == 1
    with pytest.raises(BudgetError):
        optimize(STEP, budget=SMALL_BYTES).plan(W, X)
    with pytest.raises(BudgetError):
        optimize(STEP, budget=SMALL_BYTES, verify=False)(W, X)


def test_lower_compile_verifies_too(use):
    use((None, PLAIN_BYTES // 2), (SMALL_STEP, SMALL_BYTES // 2))
    step = optimize(STEP, budget=(PLAIN_BYTES + SMALL_BYTES) // 2)
    analysis = step.lower(W, X).compile().memory_analysis()
    assert analysis.temp_size_in_bytes == measure(SMALL_STEP, W, X).temp_bytes
    with pytest.raises(BudgetError):
        optimize(STEP, budget=SMALL_BYTES - 1).lower(W, X).compile()


def test_lower_takes_a_plan_a_little_over_as_a_call_does(use):
    use((None, 2 * PLAIN_BYTES), (SMALL_STEP, int(1.1 * SMALL_BYTES)))
    step = optimize(STEP, budget=SMALL_BYTES)
    assert step.lower(W, X).compile().memory_analysis().temp_size_in_bytes == measure(SMALL_STEP, W, X).temp_bytes
    with pytest.raises(BudgetError):
        optimize(STEP, budget=SMALL_BYTES, verify=False).lower(W, X)


def test_an_error_leaves_nothing_half_done(use):
    use((None, PLAIN_BYTES // 2))
    step = optimize(STEP, budget=PLAIN_BYTES - 1)
    for _ in range(2):
        with pytest.raises(BudgetError):
            step(W, X)
    [program] = step._core._programs.values()
    assert program.run is None
    assert program.measured == {0: PLAIN_BYTES}


def test_percentages_are_of_the_plain_peak(use):
    use((None, 1000 * PLAIN_BYTES), (SMALL_STEP, 500 * PLAIN_BYTES))
    step = optimize(STEP, budget="60%")
    step(W, X)
    assert program_of(step).budget_bytes == 600 * PLAIN_BYTES
    assert program_of(step).index == 1


def test_out_of_memory_counts_as_over(use, monkeypatch):
    use((None, 100), (SMALL_STEP, 50))
    original = _verify.compile_lowered
    text = "Ran out of memory in memory space hbm. Used 16.51G of 15.75G hbm."

    def compile_lowered(lowered, target):
        if monkeypatch.first:
            monkeypatch.first = False
            from memopt._measure import memory_of_error

            return None, memory_of_error(text, target)
        return original(lowered, target)

    monkeypatch.first = True
    monkeypatch.setattr(_verify, "compile_lowered", compile_lowered)
    step = optimize(STEP, budget="20GiB")
    step(W, X)
    assert program_of(step).measured == {0: 20 * 2**30 + 1, 1: SMALL_BYTES}


def test_no_passes_is_plain_jit_and_still_keeps_the_budget():
    step = optimize(STEP, budget=PLAIN_BYTES, passes=[])
    step(W, X)
    assert program_of(step).run is program_of(step).plain
    with pytest.raises(BudgetError):
        optimize(STEP, budget=SMALL_BYTES, passes=[])(W, X)


def test_a_real_plan_runs_within_its_budget():
    from memopt.passes.remat import Remat

    budget_bytes = (PLAIN_BYTES + SMALL_BYTES) // 2
    step = optimize(STEP, budget=budget_bytes, passes=[Remat()])
    for ours, plain in zip(step(W, X), STEP(W, X), strict=True):
        assert jnp.allclose(ours, plain, rtol=1e-6)
    assert step.measure(W, X).peak_bytes <= budget_bytes


def test_a_miss_corrects_the_rungs_near_it():
    rungs = [SimpleNamespace(predicted_peak_bytes=peak) for peak in (1000, 800, 790, 500, 100)]
    program = SimpleNamespace(ladder=SimpleNamespace(rungs=rungs), measured={1: 850, 4: 110})
    assert _verify._expected(program) == {0: 1050, 1: 850, 2: 840, 3: 510, 4: 110}
    assert _verify._expected(program, of=2) == {0: 1010, 1: 850, 2: 800, 3: 510, 4: 110}
