"""The planner: ladders of small steps, what may be asked of them, and that they say the same in every process."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt import _planner, _rungs, _search
from memopt._contract import Left, Pass, Repeat
from memopt._plan import Plan
from memopt._planner import Ladder, ladder_of_plan, make_ladder
from memopt._scopes import keep, recompute
from memopt._step import Step
from memopt._target import Target
from memopt.passes import Remat

TARGET = Target.parse("gpu:h100")  # no fast memory of its own that would hold these small arrays
DEPTH = 6


def loss(weights, x):
    """The squared output of a chain of matmuls and tanh."""
    for i, w in enumerate(weights):
        with jax.named_scope(f"layer_{i}"):
            x = jnp.tanh(x @ w)
    return jnp.sum(x * x)


def arguments():
    """Eight thousand rows, so that the activations are the memory."""
    return [jnp.ones((128, 128))] * DEPTH, jnp.ones((8192, 128))


def traced(function=loss):
    """The jaxpr of a training step without its update."""
    return jax.make_jaxpr(jax.grad(function))(*arguments())


@functools.cache
def as_it_is():
    """The ladder of the step, planned once."""
    return planned(traced())


def planned(closed=None, passes=None, **keywords):
    """The ladder of a step."""
    if closed is None and passes is None and not keywords:
        return as_it_is()
    closed = traced() if closed is None else closed
    passes = [Remat()] if passes is None else passes
    return make_ladder(closed, donated=[False] * len(closed.in_avals), target=TARGET, passes=passes, **keywords)


def test_peaks_fall_and_seconds_rise():
    rungs = planned().rungs
    assert len(rungs) >= 3
    peaks, seconds = [r.predicted_peak_bytes for r in rungs], [r.seconds for r in rungs[1:]]
    assert all(a > b for a, b in zip(peaks, peaks[1:], strict=False))
    assert all(a <= b for a, b in zip(seconds, seconds[1:], strict=False))
    assert peaks[-1] < 0.75 * peaks[0]
    assert not rungs[0].choice.repeats


def test_every_rung_computes_the_step():
    closed = traced()
    flat = jax.tree.leaves(arguments())
    want = c.as_function(closed)(*flat)
    for rung in planned(closed).rungs:
        c.check(rung.jaxpr())
        for a, b in zip(want, c.as_function(rung.jaxpr())(*flat), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_choose_takes_the_cheapest_that_fits():
    ladder = planned()
    peaks = [r.predicted_peak_bytes for r in ladder.rungs]
    assert ladder.choose(None) == 0
    assert [ladder.choose(p) for p in peaks] == list(range(len(peaks)))
    assert [ladder.choose(p - 1) for p in peaks] == [*range(1, len(peaks)), None]


def test_choose_believes_measured_peaks_first():
    ladder = planned()
    peaks = [r.predicted_peak_bytes for r in ladder.rungs]
    assert ladder.choose(peaks[1], {1: peaks[1] + 1}) == 2
    assert ladder.choose(peaks[2], {1: peaks[2]}) == 1
    assert ladder.choose(peaks[-1], {len(peaks) - 1: peaks[-1] + 1}) is None


def test_the_ladder_knows_no_budget():
    ladder = planned()
    before = [r.choice.key for r in ladder.rungs]
    ladder.choose(ladder.rungs[-1].predicted_peak_bytes)
    ladder.plan(1, ladder.rungs[1].predicted_peak_bytes)
    assert [r.choice.key for r in ladder.rungs] == before
    assert [r.choice.key for r in planned(traced()).rungs] == before


def test_without_passes_the_step_stays_as_written():
    closed = traced()
    ladder = planned(closed, passes=())
    assert [r.jaxpr() for r in ladder.rungs] == [closed]
    assert ladder.plan(0).decisions == ()


def choices(ladder, name):
    """What each rung after the first decides for a value (None where it is not read later)."""
    found = [{d.name: d.choice for d in ladder.plan(i).decisions} for i in range(1, len(ladder.rungs))]
    return [rows.get(name) for rows in found]


def test_a_value_is_kept_on_demand():
    free = planned()
    name = min(d.name for d in free.plan(len(free.rungs) - 1).decisions if d.choice == "recompute")
    ladder = planned(overrides={name: "keep"})
    assert len(ladder.rungs) > 1
    assert "recompute" not in choices(ladder, name)


def test_a_value_is_run_again_on_demand():
    name = "layer_3/dot_general.0"
    free = planned(overrides={name: "keep"})
    assert "recompute" not in choices(free, name)
    ladder = planned(overrides={name: "recompute"})
    assert len(ladder.rungs) > 1
    assert "keep" not in choices(ladder, name)


def test_one_of_several_results_is_settled_by_the_name_in_its_row():
    def loss(w, x):
        for _ in range(3):
            a, b = jnp.split(jnp.sin(x @ w), 2, axis=-1)
            x = x + jnp.tile(jnp.sin(a) * jnp.cos(b), 2)
        return jnp.sum(x * x)

    closed = jax.make_jaxpr(jax.grad(loss))(jnp.ones((64, 64)), jnp.ones((1024, 64)))
    ladder = planned(closed)
    rows = [d.name for i in range(len(ladder.rungs)) for d in ladder.plan(i).decisions if "split" in d.name]
    assert any(name.endswith(":1") for name in rows)
    kept, repeated = (planned(closed, overrides=dict.fromkeys(rows, choice)) for choice in ("keep", "recompute"))
    assert len(kept.rungs) > 1 and not any("recompute" in choices(kept, name) for name in rows)
    assert any("recompute" in choices(repeated, name) for name in rows)


def test_an_override_of_nothing_names_what_is_near():
    with pytest.raises(ValueError, match=r"'layer_2/tanhh.0' names no value of this step; the nearest are.*'layer_2"):
        planned(overrides={"layer_2/tanhh.0": "keep"})


def test_an_override_asks_for_keep_or_recompute():
    with pytest.raises(ValueError, match="override of 'layer_2/tanh.0' is 'drop'; it can be 'keep' or 'recompute'"):
        planned(overrides={"layer_2/tanh.0": "drop"})


@pytest.mark.parametrize(("mark", "choice"), [(keep, "keep"), (recompute, "recompute")])
def test_marks_decide_for_what_is_inside(mark, choice):
    layer = mark(lambda x, w: jnp.tanh(x @ w))

    def marked(weights, x):
        for w in weights[:3]:
            x = jnp.tanh(x @ w)
        with jax.named_scope("inside"):
            x = layer(x, weights[3])
        for w in weights[4:]:
            x = jnp.tanh(x @ w)
        return jnp.sum(x * x)

    ladder = planned(traced(marked))
    assert len(ladder.rungs) > 1
    for i in range(1, len(ladder.rungs)):
        rows = [d for d in ladder.plan(i).decisions if d.module.endswith("inside") and "tanh" in d.name]
        assert rows and {d.choice for d in rows} == {choice}


def of_cuts_alone():
    """The ladder of the sweep's cuts, without what is found between them."""
    closed = traced()
    step = Step(closed, TARGET, [Remat()], None, None)
    plain = _rungs.plain_rung(step, ())
    return Ladder([plain, *_rungs.hull(plain, _search.Search(step, (), plain).run(refined=False))], step, 0.0)


def test_cut_plans_have_no_gap_at_their_own_peak():
    ladder = of_cuts_alone()
    cut = [i for i, rung in enumerate(ladder.rungs) if rung.price is not None]
    assert cut
    for i in cut:
        assert ladder.plan(i).optimality_gap == 0.0
        assert ladder.plan(i, ladder.rungs[i].predicted_peak_bytes).optimality_gap == 0.0


@pytest.mark.parametrize("ladder", [of_cuts_alone, planned])
def test_no_gap_is_below_zero(ladder):
    ladder = ladder()
    for i, rung in enumerate(ladder.rungs):
        for budget in (None, rung.predicted_peak_bytes, rung.predicted_peak_bytes * 2):
            assert ladder.plan(i, budget).optimality_gap >= 0.0


def test_a_plan_with_a_larger_budget_than_it_needs_has_a_gap():
    ladder = planned()
    last = len(ladder.rungs) - 1
    assert ladder.plan(last, ladder.rungs[0].predicted_peak_bytes).optimality_gap > 0.0


@dataclasses.dataclass(frozen=True)
class Early:
    """A toy pass in one file: only what comes before matmul number `count` may be run again."""

    count: int = 2
    name: str = "early"

    def propose(self, survey):
        """Yield a repeat for each of them and say what was left."""
        seen = 0
        for op in survey.graph.ops:
            seen += op.eqn.primitive.name == "dot_general"
            if seen <= self.count:
                yield Repeat(op.id, survey.seconds[op.id])
            elif op.eqn.primitive.name == "dot_general":
                yield Left(op.eqn.primitive.name, "it is none of the first")


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A toy pass that proposes nothing."""

    name: str = "nothing"

    def propose(self, survey):
        """Yield nothing."""
        return iter(())


def test_a_pass_is_one_class():
    assert isinstance(Early(), Pass) and isinstance(Nothing(), Pass)
    assert not any(rung.choice.repeats or rung.choice.stores for rung in planned(passes=[Nothing()]).rungs)
    ladder = planned(passes=[Early(2)])
    assert len(ladder.rungs) > 1
    names = {d.name for i in range(len(ladder.rungs)) for d in ladder.plan(i).decisions if d.choice == "recompute"}
    assert names and all(name.startswith(("layer_0/", "layer_1/")) for name in names)
    assert ladder.plan(1).notes == ("dot_general was left as it was: it is none of the first.",)


CHILD = """
import json, runpy, sys
sys.path.insert(0, {tests!r})
import conftest
import jax
sys.path.insert(0, {root!r})
from tests import test_planner as t
{body}
"""


def in_a_process(body: str, seed: str, text: str = "") -> str:
    """Run code with this module as `t` in a new process with a hash seed of its own, and return what it prints."""
    root = pathlib.Path(__file__).resolve().parent.parent
    code = CHILD.format(tests=str(root / "tests"), root=str(root), body=body)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, PYTHONHASHSEED=seed),
        input=text,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_is_the_same_in_every_process():
    body = "print(json.dumps([t.told(r) for r in t.planned().rungs]))"
    first, second = in_a_process(body, "1"), in_a_process(body, "2")
    assert first == second
    assert json.loads(first) == [told(r) for r in planned().rungs]


def told(rung):
    """A rung as JSON can hold it."""
    return [rung.predicted_peak_bytes, {str(p): sorted(ops) for p, ops in rung.choice.repeats.items()}]


def test_a_saved_plan_is_applied_in_another_process():
    ladder = planned()
    text = ladder.plan(2).to_json()
    body = """
plan = t.Plan.from_json(sys.stdin.read())
closed = t.traced()
_, rung = t.ladder_of_plan(closed, plan, donated=(), target=t.TARGET, passes=[t.Remat()]).rungs
print(json.dumps([t.told(rung), len(rung.jaxpr().eqns)]))
"""
    found = json.loads(in_a_process(body, "3", text))
    rung = ladder.rungs[2]
    assert found == [told(rung), len(rung.jaxpr().eqns)]
    assert rung.choice.repeats


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("jaxpr", {"function": lambda w, x: loss(w, x * 2.0)}),
        ("target", {"target": "gpu:a100"}),
        ("passes", {"passes": [Remat(respect_checkpoint=True)]}),
        ("jax version", {}),
    ],
)
def test_a_plan_for_another_step_is_refused(field, change):
    plan = planned().plan(1)
    if field == "jax version":
        plan = dataclasses.replace(plan, fingerprint=dict(plan.fingerprint, **{field: "0.0.1"}))
    closed = traced(change.get("function", loss))
    target = Target.parse(change["target"]) if "target" in change else TARGET
    with pytest.raises(ValueError, match=f"for another step: its {field} is .* Plan again"):
        ladder_of_plan(closed, plan, donated=(), target=target, passes=change.get("passes", [Remat()]))


def test_plans_go_to_json_and_back():
    for i, _ in enumerate((ladder := planned()).rungs):
        plan = ladder.plan(i, 1 << 30)
        assert Plan.from_json(plan.to_json()) == plan
    assert memopt.Plan is Plan


def test_forms_whose_sketched_plans_are_all_beaten_are_not_searched():
    base = as_it_is().rungs[0]

    class Sketched:
        def __init__(self, *plans):
            self.step = types.SimpleNamespace(harm_limit=None)
            figures = ("predicted_peak_bytes", "recompute_flops")
            self.plans = [
                dataclasses.replace(base, step=self.step, **dict(zip(figures, p, strict=True))) for p in plans
            ]

        def sketch(self):
            return self.plans

    good, beaten, small = Sketched((100, 0.0), (60, 5.0)), Sketched((100, 1.0), (70, 6.0)), Sketched((20, 9.0))
    assert _planner._promising([good, beaten, small]) == [good, small]
    assert _planner._promising([beaten]) == [beaten]


def test_a_step_inside_a_shard_map_has_the_ladder_of_the_step():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    inside, outside = planned(jax.make_jaxpr(mapped)(*arguments())), planned()
    assert inside.rungs[-1].predicted_peak_bytes < 0.7 * inside.rungs[0].predicted_peak_bytes
    assert inside.rungs[-1].predicted_peak_bytes <= 1.1 * outside.rungs[-1].predicted_peak_bytes
    weights, x = arguments()
    weights = [w * 0.01 for w in weights]
    got = c.as_function(inside.rungs[-1].jaxpr())(*weights, x)
    for have, want in zip(got, jax.grad(loss)(weights, x), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
