"""Tests of what the comparison of bit widths counts: plans in; bytes, mixes, budgets and a verdict out."""

import types

import bit_allocation


def decision(choice, value_bytes, stored_bytes=None, name="a"):
    return types.SimpleNamespace(choice=choice, value_bytes=value_bytes, stored_bytes=stored_bytes, name=name)


def test_residuals_are_counted_in_the_form_that_they_are_kept_in():
    rows = [decision("keep", 100), decision("recompute", 70), decision("int4", 80, 10), decision("int8", 80, 20)]
    rows.append(decision("keep", 1000, name="b"))
    plan = types.SimpleNamespace(decisions=[*rows, decision("int8", 40, 10)])
    assert bit_allocation.residual_bytes(plan, frozenset("a")) == 140
    assert bit_allocation.stored(plan) == {"a"}
    assert bit_allocation.mix(plan) == "2 int8, 1 int4"
    assert bit_allocation.mix(types.SimpleNamespace(decisions=rows[:2])) == "none"


def test_budgets_lie_between_those_of_two_widths():
    assert bit_allocation.budgets([(100, 60), (40, 20)], 1) == [(100, 60), (70, 40), (40, 20)]
    assert bit_allocation.budgets([(100, 60), (40, 20)], 0) == [(100, 60), (40, 20)]


def test_a_plan_has_to_keep_both_budgets():
    bench = object.__new__(bit_allocation.Bench)
    bench.names = frozenset("a")
    figures = {90: 50, 80: 45, 70: 30, 60: 10}
    plans = [
        types.SimpleNamespace(predicted_peak_bytes=peak, decisions=[decision("keep", kept)])
        for peak, kept in figures.items()
    ]
    bench.plans = lambda one: plans
    assert bench.within("pass", 85, 100) is plans[1]
    assert bench.within("pass", 85, 30) is plans[2]
    assert bench.within("pass", 85, 9) is plans[3] and bench.within("pass", 50, 100) is None


def test_a_mix_that_is_worse_than_one_width_is_named():
    def row(way, error, budget=1 << 20):
        return {"model": "gpt", "budget_bytes": budget, "way": way, "error": error}

    rows = [row(bit_allocation.UNIFORM, 0.1), row("gradient", 0.1), row("hessian", 0.5), row("gradient", 0.9, 5)]
    assert bit_allocation.worse(rows) == []
    assert bit_allocation.worse([*rows[:1], row("gradient", 0.2)]) == ["gpt at 1.0 MiB"]
