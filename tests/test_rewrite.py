"""Tests of passes that rewrite the step: in come toy passes in a few lines, out go ladders, plans and results."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt import _rewrite
from memopt._contract import Left, Rewriter, Rewritten
from memopt._plan import Decision

ROWS, WIDTH = 512, 2048


def wide(x, w):
    """A step whose transient `exp(x w)` is large, read twice."""
    scores = jnp.exp(x @ w)
    return jnp.sum(scores, axis=1), jnp.max(scores, axis=1)


def lean(x, w):
    """The same, a block of columns at a time."""

    def block(carry, columns):
        scores = jnp.exp(x @ columns)
        return (carry[0] + jnp.sum(scores, axis=1), jnp.maximum(carry[1], jnp.max(scores, axis=1))), None

    start = jnp.zeros(x.shape[0]), jnp.full(x.shape[0], -jnp.inf)
    blocks = w.reshape(w.shape[0], 16, -1).transpose(1, 0, 2)
    return jax.lax.scan(block, start, blocks)[0]


def shapes():
    return jax.ShapeDtypeStruct((ROWS, 32), jnp.float32), jax.ShapeDtypeStruct((32, WIDTH), jnp.float32)


def arguments():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s.shape) * 0.1, s.dtype) for s in shapes())


@dataclasses.dataclass(frozen=True)
class Lean:
    """Puts `lean` in the place of the whole step."""

    stage: ClassVar[int] = 10
    optional: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "lean"

    def rewrite(self, closed, context):
        row = Decision("scores", "", "", ROWS * WIDTH * 4, self.name, "in blocks of columns")
        return Rewritten(jax.make_jaxpr(lean)(*shapes()), (row,), (Left("dtype", f"{context.paths} stay float32"),))


@dataclasses.dataclass(frozen=True)
class Always(Lean):
    """The same, whatever the budget."""

    optional: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Silent(Always):
    """Rewrites nothing."""

    def rewrite(self, closed, context):
        return None


@dataclasses.dataclass(frozen=True)
class Broken(Always):
    """Loses an output."""

    def rewrite(self, closed, context):
        return Rewritten(jax.make_jaxpr(lambda x, w: lean(x, w)[0])(*shapes()))


def has_loop(jaxpr):
    return any(e.primitive.name == "scan" for e in c.open_jaxpr(jaxpr).eqns)


def test_toy_passes_keep_the_protocol():
    assert isinstance(Lean(), Rewriter)
    assert not isinstance(memopt.passes.Remat(), Rewriter)


def test_an_optional_rewrite_is_taken_where_the_budget_asks_for_it():
    for budget, taken in (("100%", False), ("40%", True)):
        step = memopt.optimize(wide, budget=budget, target="cpu", passes=[Lean()])
        plan = step.plan(*shapes())
        assert has_loop(step.trace(*shapes()).jaxpr) == taken
        assert plan.rewrites == (("lean",) if taken else ())
        assert ("lean" in [row.choice for row in plan.decisions]) == taken
        for got, want in zip(step(*arguments()), wide(*arguments()), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_plan_says_what_was_left():
    notes = memopt.optimize(wide, budget="40%", target="cpu", passes=[Lean()]).plan(*shapes()).notes
    assert "dtype was left as it was: ('[0]', '[1]') stay float32." in notes


def test_a_rewrite_asked_for_by_name_is_applied_without_a_budget():
    step = memopt.optimize(wide, target="cpu", passes=[Always()])
    assert has_loop(step.trace(*shapes()).jaxpr)
    plain = memopt.optimize(wide, target="cpu", passes=[Lean()])
    assert not has_loop(plain.trace(*shapes()).jaxpr)
    for got, want in zip(step(*arguments()), wide(*arguments()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_required_rewrite_is_on_every_rung_that_may_be_chosen():
    step = memopt.optimize(wide, budget="100%", target="cpu", passes=[Always(), memopt.passes.Remat()])
    assert has_loop(step.trace(*shapes()).jaxpr)
    assert step.plan(*shapes()).baseline_peak_bytes > ROWS * WIDTH * 4


def test_a_pass_that_does_nothing_leaves_the_step(caplog):
    step = memopt.optimize(wide, budget="100%", target="cpu", passes=[Silent()])
    assert step.plan(*shapes()).rewrites == ()
    assert not has_loop(step.trace(*shapes()).jaxpr)


def test_a_pass_that_loses_an_output_is_named():
    with pytest.raises(RuntimeError, match="'lean' changed the step's out_avals"):
        memopt.optimize(wide, budget="40%", target="cpu", passes=[Broken()]).plan(*shapes())


def test_a_saved_plan_is_rewritten_again():
    step = memopt.optimize(wide, budget="40%", target="cpu", passes=[Lean()])
    plan = memopt.Plan.from_json(step.plan(*shapes()).to_json())
    again = memopt.optimize(wide, target="cpu", passes=[Lean()], plan=plan)
    assert has_loop(again.trace(*shapes()).jaxpr)
    assert again.plan(*shapes()).predicted_peak_bytes == plan.predicted_peak_bytes


def test_rewrites_run_by_stage():
    @dataclasses.dataclass(frozen=True)
    class Later(Lean):
        stage: ClassVar[int] = 40

    assert [type(p) for p in _rewrite.rewriters([Later(), memopt.passes.Remat(), Lean()])] == [Lean, Later]


@dataclasses.dataclass(frozen=True)
class Parted(Lean):
    """The same, in two parts: the first does it, the second does it again."""

    again: bool | None = None

    @property
    def name(self):
        return "lean" if self.again is None else f"lean {'second' if self.again else 'first'}"

    def parts(self):
        return [Parted(again=False), Parted(again=True)]


def test_the_planner_may_leave_out_the_last_parts_of_a_pass():
    assert [p.name for p in _rewrite.rewriters([Parted()])] == ["lean first", "lean second"]
    plan = memopt.optimize(wide, budget="40%", target="cpu", passes=[Parted()]).plan(*shapes())
    assert plan.rewrites == ("lean first",)  # the second part saves nothing that the first one did not
    again = memopt.optimize(wide, target="cpu", passes=[Parted()], plan=plan)
    assert again.plan(*shapes()).rewrites == ("lean first",)


def test_a_rewrite_runs_once_for_all_forms_of_a_step(monkeypatch):
    ran = []
    rewrite = Parted.rewrite

    def counted(self, closed, context):
        ran.append(self.name)
        return rewrite(self, closed, context)

    monkeypatch.setattr(Parted, "rewrite", counted)
    memopt.optimize(wide, budget="40%", target="cpu", passes=[Parted(), memopt.passes.Remat()]).plan(*shapes())
    assert sorted(ran) == ["lean first", "lean second"]
