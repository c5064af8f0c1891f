"""The command: what it prints, saves and compares, its exit statuses, and a sentence for every error."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import memopt
from memopt import _cli
from memopt._check import compare_figures, figures_to_json
from memopt._errors import BudgetError
from memopt._measure import measure

MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def double(x):
    return x * 2


def wasteful(x):
    return x * 2, x * 3


class FakePlan:
    """A plan, as far as the command looks at it."""

    def __init__(self, baseline_peak_bytes, predicted_peak_bytes, budget_bytes=None):
        self.baseline_peak_bytes, self.predicted_peak_bytes = baseline_peak_bytes, predicted_peak_bytes
        self.budget_bytes = budget_bytes

    def __str__(self):
        return f"plan of {self.predicted_peak_bytes} bytes"

    def to_json(self):
        return json.dumps({"plan": vars(self)})

    @classmethod
    def from_json(cls, text):
        return cls(**json.loads(text)["plan"])


class FakeOptimized:
    """A step that memopt.optimize made: `options` are what it was given."""

    def __init__(self, step, **options):
        self.step, self.options = step, options

    def __call__(self, *args):
        return self.step(*args)

    def plan(self, *args):
        if self.options.get("budget") == "1B":
            raise BudgetError(1, 100, advice=["Donate argument 0."])
        return FakePlan(100, 50, self.options.get("budget"))

    def measure(self, *args):
        return measure(self.step, *args, donate_argnums=0)

    def explain(self, *args):
        return f"optimized {sorted(self.options)}"


@pytest.fixture
def factories(monkeypatch):
    """A module `factories` on the path, and fakes for what other parts of memopt bring."""
    module = ModuleType("factories")
    module.double = lambda: (double, (MATRIX,))
    module.wasteful = lambda: (wasteful, (MATRIX,))
    module.donated = lambda: (double, [MATRIX], {"donate_argnums": 0})
    module.with_budget = lambda: (double, (MATRIX,), {"budget": "1GiB"})
    module.optimized = lambda: (FakeOptimized(double), (MATRIX,))
    module.alone = lambda: double
    module.bare_argument = lambda: (double, MATRIX)
    module.untraceable = lambda: (lambda x: x if x.sum() > 0 else -x, (MATRIX,))
    module.number = 3
    module.buggy = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "factories", module)
    explanation = SimpleNamespace(to_png=lambda path: Path(path).write_text("png"))
    monkeypatch.setattr(memopt, "explain", lambda step, *args, **options: explanation, raising=False)
    monkeypatch.setattr(memopt, "optimize", FakeOptimized, raising=False)
    reading = SimpleNamespace(from_json=lambda text: SimpleNamespace(plans=(FakePlan.from_json(text),)))
    monkeypatch.setattr(memopt, "Plans", reading)
    return module


def run(capsys, *words):
    """Return the exit status, the standard output and the standard error of a command line."""
    status = _cli.main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_measure(factories, capsys):
    status, out, _ = run(capsys, "measure", "factories:double")
    assert status == 0
    assert "memory per device on cpu" in out and "512.0 KiB" in out


def test_measure_takes_the_options_of_the_factory(factories, capsys):
    assert "-256.0 KiB" in run(capsys, "measure", "factories:donated")[1]


@pytest.mark.tpu_aot
def test_target_override(factories, capsys):
    status, out, _ = run(capsys, "measure", "factories:double", "--target", "tpu:v5e")
    assert status == 0 and "tpu:v5e:1x1" in out and "15.75 GiB" in out


def test_measure_with_a_budget_measures_the_optimized_step(factories, capsys):
    for words in (["factories:double", "--budget", "1GiB"], ["factories:with_budget"], ["factories:optimized"]):
        assert "-256.0 KiB" in run(capsys, "measure", *words)[1]


def test_explain(factories, capsys, tmp_path):
    status, out, _ = run(capsys, "explain", "factories:double", "--png", str(tmp_path / "a.png"))
    assert status == 0 and "to_png" in out
    assert (tmp_path / "a.png").read_text() == "png"
    assert run(capsys, "explain", "factories:with_budget", "--target", "cpu")[1] == "optimized ['budget', 'target']\n"


def test_plan(factories, capsys, tmp_path):
    status, out, _ = run(capsys, "plan", "factories:double", "--budget", "60%", "--save", str(tmp_path / "p.json"))
    assert status == 0 and out.startswith("plan of 50 bytes")
    assert json.loads((tmp_path / "p.json").read_text()) == {"plan": vars(FakePlan(100, 50, "60%"))}


def test_no_plan_fits(factories, capsys):
    status, _, err = run(capsys, "plan", "factories:double", "--budget", "1B")
    assert status == 1
    assert err.startswith("memopt: No plan fits the budget of 1 B") and "Donate argument 0." in err


def test_check_against_stored_figures(factories, capsys, tmp_path):
    path = str(tmp_path / "figures.json")
    assert run(capsys, "check", "factories:double", "--save", path)[0] == 0
    status, out, _ = run(capsys, "check", "factories:double", path)
    assert status == 0 and "did not grow by more than 1 %" in out
    status, out, _ = run(capsys, "check", "factories:wasteful", path)
    assert status == 1 and "+50.0%" in out and "Compiled peak grew by more than 1 %" in out
    assert run(capsys, "check", "factories:wasteful", path, "--tolerance", "51%")[0] == 0
    assert run(capsys, "check", "factories:wasteful", path, "--tolerance", "0.49")[0] == 1
    assert run(capsys, "check", "factories:donated", path)[0] == 0


def test_a_step_that_fits_no_longer_fails_at_any_tolerance():
    stored = measure(double, MATRIX)
    assert not compare_figures(figures_to_json(stored), stored, 10.0).grew
    assert compare_figures(figures_to_json(stored), dataclasses.replace(stored, fits=False), 10.0).grew


def test_check_can_store_after_comparing(factories, capsys, tmp_path):
    path = str(tmp_path / "figures.json")
    run(capsys, "measure", "factories:double", "--save", path)
    assert run(capsys, "check", "factories:wasteful", path, "--save", path)[0] == 1
    assert run(capsys, "check", "factories:wasteful", path)[0] == 0


def test_check_tells_another_jax_version(factories, capsys, tmp_path):
    path = tmp_path / "figures.json"
    run(capsys, "check", "factories:double", "--save", str(path))
    path.write_text(path.read_text().replace(jax.__version__, "0.0.1"))
    assert "stored with JAX 0.0.1" in run(capsys, "check", "factories:double", str(path))[1]


@pytest.mark.parametrize(
    ("stored", "status"), [(FakePlan(100, 50), 0), (FakePlan(99, 49), 1), (FakePlan(60, 50), 1), (FakePlan(100, 40), 1)]
)
def test_check_against_a_stored_plan(factories, capsys, tmp_path, stored, status):
    path = tmp_path / "plan.json"
    path.write_text(stored.to_json())
    expected = 1 if status else 0
    assert run(capsys, "check", "factories:double", str(path))[0] == expected


def test_check_plans_under_the_stored_budget(factories, capsys, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(FakePlan(100, 50, "1B").to_json())
    assert run(capsys, "check", "factories:double", str(path))[0] == 1
    assert run(capsys, "check", "factories:double", str(path), "--budget", "2B")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["measure", "factories"], "Unreadable factory 'factories': write module:function."),
        (["measure", "no_such_module_here:f"], "Cannot import 'no_such_module_here'"),
        (["measure", "factories:nothing"], "Module 'factories' has no function 'nothing'; it has: double, "),
        (["measure", "factories:number"], "Module 'factories' has no function 'number'"),
        (
            ["measure", "factories:alone"],
            "must return (step, args) or (step, args, options), args a tuple; got function",
        ),
        (["measure", "factories:bare_argument"], "got (function, ShapeDtypeStruct)."),
        (["measure", "factories:double", "--target", "abc"], "Unknown target 'abc'"),
        (["measure", "factories:untraceable"], "TracerBoolConversionError"),
        (
            ["plan", "factories:optimized", "--budget", "1GiB"],
            "returns an optimized step, which --budget cannot change",
        ),
        (["check", "factories:double"], "Nothing to check against: give a stored FILE, or --save FILE to write one."),
        (["check", "factories:double", "no_such_file.json"], "No such file"),
    ],
)
def test_errors_are_one_sentence(factories, capsys, words, message):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert err.startswith("memopt: error: ") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "The stored file is no JSON"),
        ('{"format": "memopt figures 1", "memory": {}}', "The stored figures are damaged"),
        ('{"format": "memopt figures 1", "memory": {"x": 1}, "jax_version": ""}', "The stored figures are damaged"),
    ],
)
def test_damaged_figures(factories, capsys, tmp_path, text, message):
    path = tmp_path / "figures.json"
    path.write_text(text)
    status, _, err = run(capsys, "check", "factories:double", str(path))
    assert status == 2 and message in err


def test_figures_of_another_target(factories, capsys, tmp_path):
    path = tmp_path / "figures.json"
    run(capsys, "measure", "factories:double", "--save", str(path))
    path.write_text(path.read_text().replace('"cpu"', '"tpu:v5e:1x1"'))
    status, _, err = run(capsys, "check", "factories:double", str(path))
    assert status == 2 and "are for target 'tpu:v5e:1x1', the new ones for 'cpu'. Give --target tpu:v5e:1x1" in err


def test_traceback_on_request(factories):
    with pytest.raises(_cli.UsageError, match="Unreadable factory"):
        _cli.main(["measure", "factories", "--traceback"])


def test_a_bug_in_the_factory_keeps_its_traceback(factories):
    with pytest.raises(ZeroDivisionError):
        _cli.main(["measure", "factories:buggy"])


@pytest.mark.parametrize("text", ["x", "-1%", "nan", "inf", ""])
def test_unreadable_tolerance(factories, capsys, text):
    with pytest.raises(SystemExit) as raised:
        _cli.main(["check", "factories:double", "f", f"--tolerance={text}"])
    assert raised.value.code == 2
    assert "write 1% or 0.01" in capsys.readouterr().err


def test_no_command(capsys):
    with pytest.raises(SystemExit) as raised:
        _cli.main([])
    assert raised.value.code == 2


def test_a_factory_in_the_working_folder(monkeypatch, tmp_path, capsys):
    (tmp_path / "my_factory_here.py").write_text("def make():\n    return (lambda x: x + 1), (1.0,)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run(capsys, "measure", "my_factory_here:make")[0] == 0


def matmul_step(params, batch):
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((batch["x"] @ w["w"] + w["b"]) ** 2))(params)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), loss


def sharded_factory():
    params = {"w": jax.ShapeDtypeStruct((256, 128), jnp.float32), "b": jax.ShapeDtypeStruct((128,), jnp.float32)}
    return matmul_step, (params, {"x": jax.ShapeDtypeStruct((16, 256), jnp.float32)}), {"donate_argnums": 0}


@pytest.mark.loose_promotion
@pytest.mark.parametrize("command", ["plan", "explain"])
def test_a_mesh_tells_what_is_sharded_how_and_what_is_sent(monkeypatch, capsys, command):
    module = ModuleType("sharded_factories")
    module.make = sharded_factory
    monkeypatch.setitem(sys.modules, "sharded_factories", module)
    words = [command, "sharded_factories:make", "--target", "cpu", "--mesh", "data=8", "--strategy", "zero3"]
    assert _cli.main(words) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "shard over data" in printed and "all-gather" in printed and "over data" in printed
    assert "fewer than 1024" in printed  # why the bias is whole on every device


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mesh", "data"], "Unreadable mesh 'data': write axes with their devices"),
        (["--mesh", "data=3"], "has 3 devices"),
        (["--strategy", "zero3"], "--strategy needs a --mesh"),
        (["--mesh", "data=8", "--strategy", "zero9"], "Unknown sharding strategy 'zero9'"),
    ],
)
def test_a_mesh_that_cannot_be(monkeypatch, capsys, words, message):
    module = ModuleType("sharded_factories")
    module.make = sharded_factory
    monkeypatch.setitem(sys.modules, "sharded_factories", module)
    assert _cli.main(["plan", "sharded_factories:make", "--target", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
