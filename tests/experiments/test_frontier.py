"""Tests of what the table of techniques promises: plans in, the cheapest within each budget and a verdict out."""

import frontier


def point(peak, seconds):
    return {"peak_bytes": peak, "seconds": seconds, "recompute_flops": 0.0}


REMAT, OFFLOAD = [point(100, 0.0), point(60, 2.0)], [point(100, 0.0), point(70, 1.0)]


def test_budgets_end_just_above_the_smallest_peak():
    assert frontier.budgets_of({"remat": REMAT, "mix": [point(40, 9.0)]}, 3) == [80, 60, 41]


def test_the_mix_is_held_against_the_best_technique_that_fits():
    def verdict(mix, budget):
        return frontier.rows_at("s", budget, {"remat": REMAT, "offload": OFFLOAD, "mix": mix})[-1]["verdict"]

    assert verdict([point(65, 1.0)], 75) == "no slower"
    assert verdict([point(65, 1.5)], 75) == "SLOWER"
    assert verdict([point(50, 9.0)], 55) == "alone fits"
    assert verdict([point(80, 0.0)], 55) == "does not fit"


def test_the_cheapest_plan_is_the_fastest_that_fits():
    assert frontier.cheapest([*REMAT, point(50, 1.5)], 60)["peak_bytes"] == 50
    assert frontier.cheapest(REMAT, 10) is None


def test_what_falls_short_is_said():
    row = {"step": "s", "technique": "mix", "budget_bytes": 50, "peak_bytes": 49, "verdict": "no slower"}
    least = [frontier.smallest("s", "remat", REMAT, {"peak_bytes": 61})]
    least += [frontier.smallest("s", "mix", [point(40, 9.0)], {"smallest_bytes": 42})]
    assert least[1]["peak_bytes"] == 42 and least[1]["predicted_peak_bytes"] == 40
    assert frontier.failures([row, *least]) == []
    for wrong in ({"peak_bytes": 51}, {"verdict": "SLOWER"}, {"verdict": "no plan fits when compiled"}):
        assert len(frontier.failures([row | wrong, *least])) == 1
    assert frontier.failures([row, least[0], least[1] | {"peak_bytes": 61}]) == [
        "s: the mix reaches 61 bytes, no less than 61 by repeating alone"
    ]
