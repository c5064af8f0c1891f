"""Pareto, sweep and fits judge rows rightly and continue where they stopped."""

import _report
import fits
import pareto
import pytest
import sweep

GIB = 2**30


def row(name, peak, flops, **more):
    return {"step": "s", "row": name, "peak_bytes": peak, "temp_bytes": peak - 100, "recompute_flops": flops} | more


def test_budgets_are_the_policies_peaks_and_two_below_the_lowest():
    rows = {name: row(name, peak, 0, target="t") for name, peak in (("nothing", 1000), ("dots", 3000))}
    found = pareto.budgets(rows | {"plain": row("plain", 9000, 0, target="t")})
    assert found == {
        "memopt@nothing": (1004, "t"),
        "memopt@dots": (3014, "t"),
        "memopt@below10": (910, "t"),
        "memopt@below25": (775, "t"),
    }


@pytest.mark.parametrize(
    "ours, verdict",
    [
        (row("memopt@dots", 1004, 50), None),
        (row("memopt@dots", 1006, 50), "peak 1.006 of the policy's"),
        (row("memopt@dots", 900, 60), "recomputes 10 FLOP more"),
        ({"step": "s", "row": "memopt@dots", "note": "no plan fits"}, "no plan fits"),
    ],
)
def test_a_row_loses_by_peak_or_by_flops(ours, verdict):
    found = pareto.losses([row("plain", 9000, 0), row("dots", 1000, 50), ours])
    assert found == ([] if verdict is None else [f"s memopt@dots: {verdict}"])


def test_the_median_saving_leaves_out_policies_that_repeat_nothing():
    rows = [row("dots", 1000, 0), row("nothing", 500, 80), row("memopt@dots", 990, 0), row("memopt@nothing", 500, 40)]
    assert pareto.median_saving(rows) == 0.5
    assert pareto.median_saving(rows[:2]) is None


def test_a_finished_row_is_not_made_again(tmp_path):
    cache = _report.Cache(tmp_path / "rows.json", {})
    case = pareto.Case("gpt2:scan", "tiny", "t", "")
    made = pareto._cached(case, "plain", cache, lambda: {"flops": 1.0})
    assert made == {"step": "gpt2:scan", "row": "plain", "flops": 1.0}
    assert pareto._cached(case, "plain", cache, lambda: pytest.fail("made again")) == made


def test_the_pictures_are_written(tmp_path):
    rows = [row("plain", 2 * GIB, 0, recompute_share=0.0), row("memopt@dots", GIB, 9, recompute_share=0.1)]
    pareto.draw(tmp_path / "pareto.png", rows)
    sweep.draw(tmp_path / "sweep.png", [item | {"budget_bytes": 2 * GIB} for item in rows])
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("pareto.png", "sweep.png"))


def test_budgets_of_a_sweep_fall_evenly_to_a_share_of_the_temporaries():
    found = sweep.budgets({"peak_bytes": 1000, "temp_bytes": 800}, 12)
    assert len(found) == 12 and found[0] == 1000 and found[-1] == 200 + int(0.12 * 800)
    assert found == sorted(found, reverse=True)


def swept(budget, peak, flops):
    return {"step": "s", "budget_bytes": budget, "peak_bytes": peak, "recompute_flops": flops}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([swept(100, 90, 0), swept(80, 80, 5), swept(60, None, None)], None),
        ([swept(100, 101, 0)], "the compiled peak is 101 B"),
        ([swept(1000, 500, 0), swept(900, 506, 1)], "the compiled peak is higher than at a larger budget"),
        ([swept(100, 90, 6), swept(80, 80, 5)], "recomputes more than at a smaller budget"),
    ],
)
def test_a_sweep_is_judged(rows, words):
    found = sweep.violations(rows)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


@pytest.mark.parametrize(
    "peak_bytes, limit_bytes, names",
    [(10, 16, []), (17, 16, ["s does not fit 16 B"]), (None, 16, ["s does not fit 16 B"])],
)
def test_what_does_not_fit_is_named(peak_bytes, limit_bytes, names):
    assert fits.misses([{"step": "s", "peak_bytes": peak_bytes, "limit_bytes": limit_bytes}]) == names
