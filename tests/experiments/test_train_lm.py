"""The training experiment judges its two runs rightly, and runs whole at a tiny size."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import train_lm

import memopt

SCRIPT = pathlib.Path(train_lm.__file__)


def run(peak, temp, losses=(4.0, 3.0)):
    return {
        "memory": {"peak_bytes": peak, "temp_bytes": temp},
        "losses": list(losses),
        "step_seconds": [9.0, 1.0, 2.0, 3.0],
        "rss_before_bytes": 10,
        "rss_peak_bytes": peak,
        "device_peak_bytes": None,
        "predicted_peak_bytes": peak + 1,
        "plan": {"predicted_peak_bytes": peak + 1, "baseline_flops": 100.0, "recompute_flops": 25.0},
    }


def test_the_budget_leaves_a_share_of_the_temporaries():
    assert train_lm.budget_of(run(1000, 600), 0.4) == 400 + 240


def test_equal_losses_within_the_budget_are_no_problem():
    assert train_lm.problems(run(1000, 600), run(640, 240), 640, "float32") == []


def test_a_missed_budget_is_named():
    found = train_lm.problems(run(1000, 600), run(641, 241), 640, "float32")
    assert found == ["The compiled peak of 641 B is over the budget of 640 B."]


@pytest.mark.parametrize("losses", [(4.0, 3.001), (4.0, float("nan"))])
def test_different_losses_are_named(losses):
    found = train_lm.problems(run(1000, 600), run(640, 240, losses), 640, "float32")
    assert len(found) == 1 and "losses differ" in found[0]


def test_the_table_leaves_out_what_was_not_measured_and_the_first_step():
    rows = {row["what"]: row for row in train_lm.table(run(1000, 600), run(640, 240))}
    assert "device peak in use" not in rows
    assert rows["step time, median"]["plain"] == 2.0
    assert rows["compiled peak"]["change"] == pytest.approx(-0.36)
    assert rows["  above RSS before step 1"]["memopt"] == 630


def test_resident_memory_is_read_in_bytes():
    assert 50 * 2**20 < train_lm.rss_bytes() <= train_lm.peak_rss_bytes() < 2**40


TINY = ("--steps=3", "--batch=2", "--length=64", "--layers=3", "--width=32", "--heads=2")


def source_path(folder):
    """Lay out memopt as it is imported here, for a process that knows no mapping of folders."""
    package = folder / "memopt"
    package.mkdir(parents=True)
    for path in pathlib.Path(memopt.__file__).parent.glob("*.py"):
        (package / path.name).symlink_to(path)
    for name in ("passes", "models"):
        (package / name).symlink_to(importlib.import_module(f"memopt.{name}").__path__[0])
    return str(folder)


def test_a_tiny_run_ends_well_and_writes_its_files(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(30):
        (tmp_path / "text" / f"m{index}.py").write_text("import this  # words\n" * 200)
    call = [sys.executable, str(SCRIPT), *TINY, f"--out_dir={tmp_path}/out", f"--text_dir={tmp_path}/text"]
    environment = os.environ | {"PYTHONPATH": source_path(tmp_path / "path")}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled temporaries" in done.stdout and "largest loss difference" in done.stdout
    assert (tmp_path / "out" / "train_lm.png").read_bytes().startswith(b"\x89PNG")
    runs = [json.loads((tmp_path / "out" / f"{role}_run.json").read_text()) for role in ("plain", "memopt")]
    assert runs[1]["memory"]["temp_bytes"] <= 0.41 * runs[0]["memory"]["temp_bytes"]
    assert len(runs[1]["losses"]) == 3
