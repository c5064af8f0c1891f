"""Tests of what the budgets' table promises: in come rows, out go sentences."""

import cpu_budgets


def row(name, rss, ratio=1.0, predicted=1.0):
    return {"row": name, "rss_peak_bytes": rss, "step_ratio": ratio, "predicted_ratio": predicted}


def test_falling_memory_and_predicted_time_are_fine():
    assert cpu_budgets.problems([row("plain", 100), row("40%", 60, 1.2, 1.1)]) == []


def test_memory_that_rises_and_time_beyond_the_prediction_are_named():
    found = cpu_budgets.problems([row("plain", 100), row("70%", 90), row("40%", 92, 1.3, 1.1)])
    assert found == [
        "40%: the process took more memory than at 70%.",
        "40%: a step took 1.30 of the plain one's time, predicted were 1.10.",
    ]


def test_a_row_takes_medians_without_the_step_that_compiles():
    plain = {"memory": {"peak_bytes": 10}, "predicted_peak_bytes": 9, "rss_peak_bytes": 20, "step_seconds": [9, 2, 2]}
    plan = {"predicted_peak_bytes": 5, "predicted_overhead": 0.1, "recompute_flops": 1.0, "baseline_flops": 4.0}
    ours = plain | {"plan": plan, "step_seconds": [99, 3, 3]}
    found = cpu_budgets.row_of("40%", ours, plain, 6)
    assert (found["step_ratio"], found["predicted_ratio"], found["recompute_share"]) == (1.5, 1.1, 0.25)
