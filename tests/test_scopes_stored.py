"""Scopes that ask for another form: what they mark is in that form in every plan, by default or by a list of passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt._scopes import mark_of, marks_in, module_path
from tests import forced

WIDTH, ROWS, DEPTH = 256, 2048, 6
ARGS = jnp.full((DEPTH, WIDTH, WIDTH), 0.01), jnp.ones((ROWS, WIDTH))


def step_of(mark):
    @mark
    def inner(h, w):
        return jnp.sin(jnp.sin(h @ w))

    def layer(h, w):
        return jnp.cos(inner(h, w)), None

    return jax.grad(lambda ws, x: jnp.sum(jax.lax.scan(layer, x, ws)[0] ** 2))


def choices(plan):
    return {(d.choice, d.name.rsplit("/", 1)[-1].split(".")[0]) for d in plan.decisions}


def test_marks_are_read_with_their_codec():
    assert mark_of("jvp(memopt.compress.int8)/mlp") == "compress.int8"
    assert module_path("GPT/memopt.offload/memopt.compress.int4-token/mlp") == "GPT/mlp"
    closed = jax.make_jaxpr(step_of(memopt.compress("int8")))(*ARGS)
    assert marks_in(closed) == {"compress.int8"}


@pytest.mark.parametrize(
    ("mark", "form"), [(memopt.compress("int8"), "int8"), (memopt.offload, "host")], ids=["compress", "offload"]
)
def test_every_plan_stores_what_is_marked(mark, form):
    step = memopt.optimize(step_of(mark), budget="90%", target="cpu", verify=False)
    marked = {name for choice, name in choices(step.plan(*ARGS)) if choice == form}
    assert marked and marked <= {"dot_general", "sin", "cos"}
    for rung in step.trace(*ARGS)._program.ladder.rungs[1:]:
        assert rung.choice.stores and {s.name for s in rung.choice.stores.values()} == {form}
    want, got = step_of(lambda f: f)(*ARGS), step(*ARGS)
    exact = form == "host"
    np.testing.assert_allclose(
        got, want, rtol=1e-5 if exact else 1, atol=(1e-6 if exact else 0.02) * np.abs(want).max()
    )


def test_a_list_without_the_pass_says_what_it_leaves():
    step = memopt.optimize(
        step_of(memopt.offload), budget="80%", target="cpu", passes=[memopt.passes.Remat()], verify=False
    )
    plan = step.plan(*ARGS)
    assert "host" not in {choice for choice, _ in choices(plan)}
    assert any("@memopt.offload marks was left as it was: no pass" in note for note in plan.notes)


def test_a_pass_for_marks_alone_proposes_nothing_else():
    survey = forced.survey_of(jax.make_jaxpr(step_of(memopt.compress("int8")))(*ARGS))
    found = list(memopt.passes.Compress("int8", only_marked=True).propose(survey))
    every = list(memopt.passes.Compress("int8").propose(survey))
    assert found and all(s.asked for s in found) and len(found) < len(every)
    assert not list(memopt.passes.Compress("int4", only_marked=True).propose(survey))


def test_a_codec_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no codec 'int9'"):
        memopt.compress("int9")
    with pytest.raises(TypeError, match="takes a codec's name"):
        memopt.compress(jnp.sin)
