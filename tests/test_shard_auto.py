"""Tests of the sharding pass's search: what it takes and plans, and what where the compiled step is too large."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt import _local, _planner, _verify
from memopt.passes import Shard, _shard_auto
from tests.shard_steps import flat_of, make_step, mesh_of

pytestmark = pytest.mark.loose_promotion


def test_auto_splits_parameters_and_state_in_full_and_takes_the_quickest_of_these():
    fn, args = make_step()
    step = memopt.optimize(fn, passes=[Shard(mesh_of("data"), "auto", least_elements=16)])
    rows = [d for d in step.plan(*args).decisions if d.name.startswith("shard/auto/")]
    assert [d.choice for d in rows].count("chosen") == 1 and len(rows) > 3
    quicker = [d for d in rows if d.collective_seconds < rows[0].collective_seconds]
    assert quicker and all("not all of parameters and state split" in d.reason for d in quicker)
    leaves = zip(jax.tree.leaves(args[0]), jax.tree.leaves(step.shardings(*args)[0][0]), strict=True)
    sizes = [(leaf.size, int(np.prod(place.shard_shape(leaf.shape)))) for leaf, place in leaves]
    assert sum(held for _, held in sizes) <= 1.05 * sum(size for size, _ in sizes) / 8


#: Collective seconds, bytes of state and predicted peak of each candidate of four devices.
FIGURES = {
    "zero1 on 4": (3.0, 60, 90),
    "zero2 on 4": (2.0, 60, 80),
    "zero3 on 4": (5.0, 25, 70),
    "zero1+tensor on 2x2": (3.5, 40, 60),
    "zero3+tensor on 2x2": (4.5, 26, 65),
    "zero3+tensor+sequence on 2x2": (4.0, 25, 120),
    "zero1+tensor on 1x4": (6.0, 25, 120),
    "zero3+tensor on 1x4": (6.0, 25, 120),
    "zero3+tensor+sequence on 1x4": (6.0, 25, 120),
}


@pytest.mark.parametrize(
    "budget, expected",
    [
        (None, "zero3+tensor+sequence on 2x2"),  # split in full, quickest
        (100, "zero3+tensor on 2x2"),  # split in full within 5 %, quickest of those that fit
        (62, "zero1+tensor on 2x2"),  # nothing that is split in full fits
        (50, "zero1+tensor on 2x2"),  # nothing fits: the smallest peak
    ],
)
def test_auto_takes_whole_parameters_only_where_nothing_that_is_split_in_full_fits(budget, expected):
    class Ladder:
        first = 0

        def __init__(self, one):
            rung = types.SimpleNamespace(predicted_peak_bytes=FIGURES[one.title][2], seconds=0.0)
            self.title, self.rungs, self.sketched = one.title, [rung], False

    def lay_out(one):
        one.collective_seconds, one.state_bytes, _ = FIGURES[one.title]
        one.argument_bytes = one.state_bytes

    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    found = list(_shard_auto.search(mesh, lay_out, lambda one, _: Ladder(one), lambda _: budget))
    assert found[0].title == expected and len(found) == len(FIGURES)
    assert {ladder.rows[0].choice for ladder in found} == {"chosen"}
    shown = {d.name.removeprefix("shard/auto/") for d in found[0].rows}
    assert expected in shown < set(FIGURES) and len(shown) == 1 + _shard_auto._RUNNERS_UP


def test_auto_plans_the_chosen_one_alone_in_full(monkeypatch):
    fn, args = make_step()
    real, made = _planner.make_ladder, []

    def make(closed, **settings):
        made.append((settings["sketched"], len(settings["rewritten"])))
        return real(closed, **settings)

    monkeypatch.setattr(_planner, "make_ladder", make)
    passes = [*memopt.passes.default(), Shard(mesh_of("data"), "auto", least_elements=64)]
    plan = memopt.optimize(fn, passes=passes).plan(*args)
    sketches = [sketched for sketched, _ in made]
    assert sketches.count(False) == 1 and not sketches[-1] and len(sketches) > 1
    assert any(known for _, known in made)  # what kernels made of the step is not made again
    assert [d.choice for d in plan.decisions if d.name.startswith("shard/auto/")].count("chosen") == 1


@pytest.mark.parametrize("strategy", ["zero3", "zero3+tensor+sequence"])
def test_what_plans_repeat_is_cut_as_what_it_is_a_copy_of(strategy, monkeypatch):
    real, saved = _local.Spread.run, []

    def run(spread, jaxpr):
        whole = _local.Spread(spread.sizes, dict(spread.specs), set(spread.fixed), spread.origins)
        real(whole, jaxpr)
        real(spread, jaxpr)
        assert whole.specs == spread.specs
        saved.append(len(whole.factors) - len(spread.factors))

    monkeypatch.setattr(_local.Spread, "run", run)
    fn, args = make_step()
    passes = [memopt.passes.Remat(), Shard(mesh_of(strategy), strategy, least_elements=64)]
    memopt.optimize(fn, passes=passes, budget="1GiB").plan(*args)
    assert sum(count > 0 for count in saved) > 5


def test_a_sketch_holds_some_of_the_plans_of_a_ladder():
    fn, args = make_step()
    flat, context = flat_of(fn, args)
    passes = [memopt.passes.Remat(), Shard(mesh_of("zero3"), "zero3", least_elements=64)]
    donated = [False] * len(c.open_jaxpr(flat).invars)
    settings = {"donated": donated, "target": context.target, "passes": passes, "context": context}
    full, sketch = (_planner.make_ladder(flat, sketched=s, **settings) for s in (False, True))
    assert 1 < len(sketch.rungs) <= len(full.rungs)
    least = [min(r.predicted_peak_bytes for r in one.rungs[1:]) for one in (full, sketch)]
    assert least[0] <= least[1] <= 1.2 * least[0]


def test_auto_takes_less_memory_where_the_quickest_does_not_fit():
    fn, args = make_step()
    passes = [Shard(mesh_of("data"), "auto", least_elements=64)]
    free = memopt.optimize(fn, passes=passes).plan(*args)
    chosen = next(d for d in free.decisions if d.choice == "chosen")
    tight = memopt.optimize(fn, passes=passes, budget=chosen.value_bytes - 1).plan(*args)
    best = next(d for d in tight.decisions if d.choice == "chosen")
    assert best.value_bytes < chosen.value_bytes and ", fits" in best.reason


def test_auto_goes_on_to_the_next_one_where_the_compiled_step_is_over_the_budget(monkeypatch):
    fn, args = make_step()
    passes = [Shard(mesh_of("data"), "auto", least_elements=64)]
    free = memopt.optimize(fn, passes=passes).plan(*args)
    first = next(d for d in free.decisions if d.choice == "chosen")
    real, seen = _verify.compile_rung, []

    def over(program, args, kwargs):
        compiled, memory = real(program, args, kwargs)
        strategy = program.ladder.rows[0].name
        seen.append(strategy)
        size = program.budget_bytes + (1 if strategy == first.name else 0)
        memory = dataclasses.replace(memory, peak_bytes=size)
        program.measured[program.index] = memory.peak_bytes
        return compiled, memory

    monkeypatch.setattr(_verify, "compile_rung", over)
    step = memopt.optimize(fn, passes=passes, budget="1GiB")
    step.lower(*args).compile()
    rows = {d.name: d for d in step.plan(*args).decisions if d.name.startswith("shard/auto/")}
    assert rows[first.name].choice == "runner-up" and "compiled over the budget" in rows[first.name].reason
    assert seen[0] == first.name and rows[seen[-1]].choice == "chosen" != first.name
    placed = step.shardings(*args)[0][0]
    shape = next(iter(jax.tree.leaves(placed))).mesh.devices.shape
    assert seen[-1].endswith("on " + "x".join(map(str, shape)))


def test_a_saved_plan_of_auto_is_applied_without_a_search(monkeypatch):
    fn, args = make_step()
    passes = [memopt.passes.Remat(), Shard(mesh_of("data"), "auto", least_elements=64)]
    plan = memopt.optimize(fn, passes=passes).plan(*args)
    monkeypatch.setattr(_shard_auto, "search", lambda *_: pytest.fail("searched"))
    again = memopt.optimize(fn, passes=passes, plan=memopt.Plan.from_json(plan.to_json()))
    assert again.plan(*args).predicted_peak_bytes == plan.predicted_peak_bytes


def test_auto_on_one_axis_of_features_where_the_batch_does_not_divide():
    fn, (state, batch) = make_step()
    odd = jax.tree.map(lambda x: x[:7, :7], batch)
    plan = memopt.optimize(fn, passes=[Shard(mesh_of("data"), "auto", least_elements=16)]).plan(state, odd)
    chosen = next(d for d in plan.decisions if d.choice == "chosen")
    assert chosen.name.endswith("tensor on 1x8")


def test_auto_with_nothing_that_applies():
    def fn(params, batch):
        return jax.tree.map(lambda p: p - 0.1 * jnp.sum(batch), params), jnp.sum(batch)

    with pytest.raises(ValueError, match=r"No sharding strategy applies to this step on 8 devices.*batch of 7"):
        memopt.optimize(fn, passes=[Shard(mesh_of("data"), "auto")]).plan({"bias": jnp.ones(7)}, jnp.ones((7, 3)))
