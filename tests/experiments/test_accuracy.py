"""Accuracy judges its rows rightly, compiles a program once, and predicts it at every run."""

import _report
import accuracy
import pytest

GIB = 2**30
TINY = accuracy.Case("gpt2:scan", "tiny", "cpu")


def row(error, **more):
    names = {"step": "s", "form": "small", "target": "cpu", "row": "plain"}
    return names | {"peak_bytes": GIB, "predicted_peak_bytes": int(GIB * (1 + error)), "error": error} | more


def bench(folder, *, replan=False):
    caches = [_report.Cache(folder / name, {}) for name in ("plans.json", "compiled.json")]
    return accuracy.Bench(*caches, "", replan)


@pytest.mark.parametrize(
    "errors, words",
    [
        ([0.05, -0.04, 0.14], []),
        ([0.06, -0.06, 0.01], ["the median error is 6.0 %"]),
        ([0.01, 0.01, -0.16], ["s small cpu plain: the error is -16.0 %"]),
        ([], ["no row has a compiled peak"]),
    ],
)
def test_rows_are_judged_by_the_median_and_the_worst(errors, words):
    assert accuracy.misses([row(error) for error in errors]) == words


def test_the_summary_has_a_line_for_each_target_and_one_for_all():
    rows = [row(-0.02), row(0.10, target="tpu", roofline_error=-0.5), row(0.04, target="tpu")]
    lines = {line["target"]: line for line in accuracy.summary(rows)}
    assert list(lines) == ["cpu", "tpu", "all"]
    assert (lines["tpu"]["error_median"], lines["tpu"]["error_worst"]) == (pytest.approx(0.07), 0.10)
    assert (lines["all"]["error_rows"], lines["all"]["roofline_error_worst"]) == (3, 0.5)
    assert "roofline_error_rows" not in lines["cpu"]


def test_unrolled_steps_are_not_compiled_for_the_cpu():
    found = accuracy.cases(["gpt2:scan", "gpt2:unrolled"], ["small"], ["cpu", "tpu:v5e:1x1"])
    assert [(case.name, case.target) for case in found] == [
        ("gpt2:scan", "cpu"),
        ("gpt2:scan", "tpu:v5e:1x1"),
        ("gpt2:unrolled", "tpu:v5e:1x1"),
    ]


@pytest.mark.once
@pytest.mark.loose_promotion
def test_compiled_figures_are_kept_and_predictions_made_anew(tmp_path, monkeypatch):
    rows = list(bench(tmp_path).rows(TINY, ["60%"]))
    assert [item["row"] for item in rows] == ["plain", "60%"]
    assert rows[1]["peak_bytes"] < rows[0]["peak_bytes"]
    for item in rows:
        assert item["error"] == item["predicted_peak_bytes"] / item["peak_bytes"] - 1
        assert item["predicted_temp_bytes"] - item["temp_bytes"] == item["predicted_peak_bytes"] - item["peak_bytes"]
    from memopt import _timeline

    monkeypatch.setattr(_timeline, "_reported_bytes", lambda *_: (0, 0))
    monkeypatch.setattr(accuracy, "_plan", lambda *_: pytest.fail("planned again"))
    monkeypatch.setattr("memopt._optimize.Optimized.measure", lambda *_: pytest.fail("compiled again"))
    again = list(bench(tmp_path).rows(TINY, ["60%"]))
    assert [item["peak_bytes"] for item in again] == [item["peak_bytes"] for item in rows]
    for item, old in zip(again, rows, strict=True):
        assert item["predicted_peak_bytes"] < old["predicted_peak_bytes"]


def test_the_note_says_what_the_roofline_cannot_see():
    import jax

    def printing(x):
        jax.debug.print("{}", x)
        return -x

    shape = jax.ShapeDtypeStruct((8,), "float32")
    note = accuracy.roofline(jax.jit(printing).trace(shape).jaxpr, 64)["note"]
    assert note.startswith("the roofline skips debug_") or jax.__version_info__ >= (0, 11)  # newer ones know printing
    found = accuracy.roofline(jax.jit(lambda x: -x * x).trace(shape).jaxpr, 96)
    assert found["note"] == "" and found["roofline_error"] == found["roofline_bytes"] / 96 - 1


def test_where_the_roofline_fails_the_note_says_why(monkeypatch):
    import jax
    from jax.experimental import roofline

    def broken(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr(roofline, "roofline", broken)
    found = accuracy.roofline(jax.jit(jax.lax.neg).trace(jax.ShapeDtypeStruct((8,), "float32")).jaxpr, 64)
    assert found == {"note": "the roofline fails: ValueError no such thing"}


def test_the_picture_is_written(tmp_path):
    accuracy.draw(tmp_path / "accuracy.png", [row(0.1, roofline_bytes=GIB), row(0.0, target="tpu")])
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
