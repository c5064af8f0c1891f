"""Saved plans: several signatures in one file, each applied to its own calls; damaged and foreign files are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _cli
from memopt._fingerprint import difference
from memopt.passes import Remat

LENGTH = 6


def loss(w, x):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(jnp.sin(h @ w)), None), x, w)
    return jnp.sum(h * h)


def step(w, x):
    return jax.value_and_grad(loss)(w, x)


def arguments(rows):
    rng = np.random.default_rng(rows)
    w = jnp.asarray(rng.standard_normal((LENGTH, 8, 8)) * 0.3, jnp.float32)
    return w, jnp.asarray(rng.standard_normal((rows, 8)), jnp.float32)


def planned(rows, **options):
    return memopt.optimize(step, budget="60%", target="cpu", passes=[Remat()], **options).plan(*arguments(rows))


@pytest.fixture(scope="module")
def plans():
    return memopt.Plans((planned(256), planned(512)))


def applied(plans):
    return memopt.optimize(step, plan=plans, passes=[Remat()], target="cpu", budget="60%")


def test_each_call_takes_its_own_plan(plans):
    again = memopt.Plans.from_json(plans.to_json())
    assert again == plans and len({tuple(p.repeats) for p in again.plans}) == 1
    one = applied(again)
    for rows, plan in zip((256, 512), plans.plans, strict=True):
        assert plan.repeats and one.plan(*arguments(rows)).repeats == plan.repeats
        assert one.plan(*arguments(rows)).predicted_peak_bytes == plan.predicted_peak_bytes
        for _ in range(2):
            got, want = one(*arguments(rows)), step(*arguments(rows))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_list_of_plans_is_enough(plans):
    assert applied(list(plans.plans)).plan(*arguments(512)).repeats == plans.plans[1].repeats


def test_a_signature_without_a_plan_names_what_differs_and_what_is_there(plans):
    with pytest.raises(ValueError) as raised:
        applied(plans).plan(*arguments(128))
    text = str(raised.value)
    assert "None of the 2 saved plans" in text and "number 1 of them is float32[" in text
    assert "float32[256,8]" in text and "float32[512,8]" in text and "this one's is float32[128,8]" in text
    assert "argument 0" not in text and "Plan this call" in text


def test_of_several_plans_the_differing_field_is_named(plans):
    other = memopt.optimize(step, plan=plans, passes=[Remat(respect_checkpoint=True)], target="cpu", budget="60%")
    with pytest.raises(ValueError, match="its passes is Remat.respect_checkpoint=False"):
        other.plan(*arguments(256))


def test_a_new_plan_takes_the_place_of_the_one_of_its_signature(plans):
    newer = dataclasses.replace(plans.plans[0], budget_bytes=1)
    assert [p.budget_bytes for p in plans.with_plan(newer).plans][1:] == [1]
    assert len(plans.with_plan(planned(128)).plans) == 3


def test_a_function_changed_since_is_refused():
    plan = planned(256)
    other = memopt.optimize(lambda w, x: step(w * 2.0, x), plan=plan, passes=[Remat()], target="cpu", budget="60%")
    with pytest.raises(ValueError, match="for another step: its jaxpr is .* Plan again"):
        other.plan(*arguments(256))


def changed(plan, **fields):
    return json.dumps({**plan.to_data(), **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"memopt_plan": 1}, "has format 1, and memopt reads 2. Plan again"),
        ({"repeats": [1]}, "'repeats' is .1., and has to be a table"),
        ({"repeats": {"x": [1]}}, "'repeats' is"),
        ({"repeats": {"0": [True]}}, "'repeats' is"),
        ({"repeats": {"0": 3}}, "'repeats' is"),
        ({"stores": {"0": 3}}, "'stores' is"),
        ({"variant": ["two_level", [0]]}, "'variant' is"),
        ({"variant": ["third", [0], 2, 2]}, "'variant' is"),
        ({"fingerprint": "none"}, "'fingerprint' is"),
        ({"decisions": [{"name": "x"}]}, "'decisions' is"),
        ({"predicted_peak_bytes": "12"}, "'predicted_peak_bytes' is '12', and has to be a whole number"),
        ({"surprise": 1}, "'surprise' is no field of a plan"),
    ],
)
def test_a_damaged_field_is_named(plans, fields, says):
    with pytest.raises(ValueError, match=says):
        memopt.Plan.from_json(changed(plans.plans[0], **fields))
    with pytest.raises(ValueError, match=says):
        memopt.Plans.from_json(
            json.dumps({"memopt_plans": 1, "plans": [json.loads(changed(plans.plans[0], **fields))]})
        )


def test_a_missing_field_is_named(plans):
    later = {"dropped", "predicted_error"}  # plans saved before these are read too
    for name in plans.plans[0].to_data().keys() - {"memopt_plan"} - later:
        data = {k: v for k, v in plans.plans[0].to_data().items() if k != name}
        with pytest.raises(ValueError, match=f"'{name}' is missing. Plan again"):
            memopt.Plan.from_json(json.dumps(data))
    older = {k: v for k, v in plans.plans[0].to_data().items() if k != "predicted_error"}
    assert memopt.Plan.from_json(json.dumps(older)).predicted_error is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"memopt_plans": 2, "plans": []}', '{"memopt_plans": 1}'])
def test_no_plans_at_all(text):
    with pytest.raises(ValueError, match="no saved memopt plan|damaged, or not of format"):
        memopt.Plans.from_json(text)
    with pytest.raises(ValueError, match="no saved memopt plan|plans of several signatures"):
        memopt.Plan.from_json(text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"repeats": {0: (10**6,)}}, "'repeats' names operation 1000000, which no pass lets run again"),
        ({"repeats": {0: (-1,)}}, "'repeats' names operation -1"),
        ({"repeats": {10**6: (1,)}}, "'repeats' names time segment 1000000, and this step has"),
        ({"stores": {0: "int3"}}, "stores value 0 as 'int3', which no pass proposes"),
        ({"variant": ("two_level", (0, 9, 9), 2, 2)}, "'variant' is .* no loop of this step can be divided so"),
        ({"variant": ("two_level", (10**6,), 2, 2)}, "'variant' is"),
    ],
)
def test_numbers_that_mean_nothing_in_the_step_are_refused(plans, fields, says):
    with pytest.raises(ValueError, match=says):
        applied(dataclasses.replace(plans.plans[0], **fields)).plan(*arguments(256))


def test_loops_that_carry_operations_elsewhere_are_refused(plans):
    """The number of a loop that feeds another one is a number, and no operation that may run again."""
    scan = next(i for i in range(10**3) if not _is_repeatable(plans.plans[0], i))
    with pytest.raises(ValueError, match=f"names operation {scan}"):
        applied(dataclasses.replace(plans.plans[0], repeats={0: (scan,)})).plan(*arguments(256))


def _is_repeatable(plan, op):
    try:
        applied(dataclasses.replace(plan, repeats={0: (op,)})).plan(*arguments(256))
    except ValueError:
        return False
    return True


def test_a_plan_of_an_older_memopt_is_refused(plans):
    """Without its arguments and its numbering a fingerprint cannot tell that the numbers still mean the same."""
    plan = plans.plans[0]
    for name in ("arguments", "graph"):
        older = dataclasses.replace(plan, fingerprint={k: v for k, v in plan.fingerprint.items() if k != name})
        with pytest.raises(ValueError, match=f"does not hold its {name}, so an older memopt wrote it. Plan again"):
            applied(older).plan(*arguments(256))
    other = dataclasses.replace(plan, fingerprint={**plan.fingerprint, "graph": "7 operations, 00"})
    with pytest.raises(ValueError, match="numbered its operations in another way .its graph is 7 operations, 00"):
        applied(other).plan(*arguments(256))


def test_plans_are_plans():
    with pytest.raises(ValueError, match="There is no plan"):
        memopt.Plans(())
    with pytest.raises(TypeError, match="takes memopt.Plan objects"):
        memopt.Plans(("a plan",))
    with pytest.raises(ValueError, match="give one of them"):
        memopt.optimize(step, plan=planned(256), overrides={"tanh.0": "keep"})


def test_equal_fingerprints_do_not_differ(plans):
    first, second = (p.fingerprint for p in plans.plans)
    assert difference(first, first) == "" and difference(first, second).startswith("its arguments differ: number 1")
    assert difference({"arguments": ""}, {"arguments": "a; b"}).endswith("0 arrays, and this one's are 2")


def test_the_command_saves_and_checks_several_signatures(tmp_path, monkeypatch, capsys):
    source = "import tests.test_plans as t\n"
    for rows in (256, 512, 128):
        source += f"def rows{rows}():\n    return t.step, t.arguments({rows}), {{'budget': '60%', 'target': 'cpu'}}\n"
    (tmp_path / "signatures_here.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "plans.json"
    assert _cli.main(["plan", "signatures_here:rows256", "signatures_here:rows512", "--save", str(path)]) == 0
    assert [p.target for p in memopt.Plans.from_json(path.read_text()).plans] == ["cpu", "cpu"]
    capsys.readouterr()
    assert _cli.main(["check", "signatures_here:rows512", str(path)]) == 0
    assert "did not grow" in capsys.readouterr().out
    assert _cli.main(["check", "signatures_here:rows128", str(path)]) == 2
    err = capsys.readouterr().err
    assert "None of the 2 stored plans is for these arguments on 'cpu'" in err and "float32[256,8]" in err
    assert _cli.main(["check", "signatures_here:rows256", str(path), "--save", str(path)]) == 0
    assert len(memopt.Plans.from_json(path.read_text()).plans) == 2
