"""The experiment with several processes: its verdicts, and (slow) a run that is killed and goes on with fewer."""

import subprocess
import sys

import multihost
import pytest

GOOD = {"run": "a", "steps": 8, "difference": 1e-6, "lost_steps": 2}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"steps": 7}, ["a: 7 steps of 8"]),
        ({"difference": 0.1}, ["a: a loss differs by 0.1"]),
        ({"difference": float("nan")}, ["a: a loss differs by nan"]),
        ({"lost_steps": 5}, ["a: 5 steps were lost, a save is made every 3"]),
    ],
)
def test_broken_promises_are_named(change, says):
    assert multihost.misses([GOOD | change], 8, 3) == says


@pytest.mark.slow
@pytest.mark.parametrize("processes, resumed", [(2, 1), (4, 4)])
def test_a_killed_run_goes_on_with_as_many_or_fewer_processes(tmp_path, processes, resumed):
    settings = [f"--processes={processes}", "--steps=6", "--save_every=2", "--kill_after=3", f"--resume_with={resumed}"]
    command = [sys.executable, multihost.__file__, *settings, f"--out_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "killed and resumed" in done.stdout
    print(done.stdout)  # the table, for `pytest -s`
    assert not list(tmp_path.glob("killed/saves/*tmp*"))
