"""Codes of local derivatives: found on dataflow, by hand on few numbers, within their bounds, in loops and unrolled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _apply, _inline
from memopt import _compat as c
from memopt._codecs_derivative import DERIVATIVES
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes import Compress, Remat, _residuals
from memopt.passes._derivatives import Derivatives
from tests import forced

ROWS, WIDTH, DEPTH = 256, 128, 4
RAMPS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu, "hard_swish": jax.nn.hard_swish, "relu6": jax.nn.relu6}
OTHERS = {"tanh": jnp.tanh, "mish": jax.nn.mish}
NEWER = jax.__version_info__ >= (0, 11)
SHORT = {"tanh": pytest.mark.xfail(NEWER, reason="there it is one multiplication already, and no run", strict=True)}


def arguments(dtype=np.float32):
    rng = np.random.default_rng(0)
    ws, bs = rng.standard_normal((DEPTH, WIDTH, WIDTH)) / 11, rng.standard_normal((DEPTH, WIDTH)) / 3
    return jnp.asarray(ws, dtype), jnp.asarray(bs, dtype), jnp.asarray(2 * rng.standard_normal((ROWS, WIDTH)), dtype)


def scanned(f):
    return lambda ws, bs, x: jnp.sum(
        jax.lax.scan(lambda h, w: (h + f(h @ w[0] + w[1][None]), None), x, (ws, bs))[0] ** 2
    )


def unrolled(f):
    def loss(ws, bs, x):
        for w, b in zip(ws, bs, strict=True):
            x = x + f(x @ w + b[None])
        return jnp.sum(x**2)

    return loss


def flat(closed):
    closed = _inline.inline(closed)
    return c.close(c.dce(closed)[0], c.jaxpr_consts(closed))


def rewritten(loss, args):
    plain = flat(jax.make_jaxpr(jax.value_and_grad(loss))(*args))
    new = flat(Derivatives().rewrite(plain, None).closed)
    c.check(new)
    return plain, new


def run(closed, args):
    return jax.jit(c.as_function(closed))(*args)


def marks(closed):
    return [one.mark for one in _residuals.residuals(forced.survey_of(closed)) if one.mark]


def stored(closed, codec):
    survey = forced.survey_of(closed)
    proposals = {p.value: p for p in Compress(codec).propose(survey) if hasattr(p, "encode")}
    new, _ = _apply.apply(survey.graph, {}, proposals)
    c.check(new)
    return new, proposals


@pytest.mark.parametrize("loop", [scanned, unrolled])
@pytest.mark.parametrize("name", [*RAMPS, *(pytest.param(name, marks=SHORT.get(name, [])) for name in OTHERS)])
def test_a_run_becomes_one_multiplication_and_results_stay(name, loop):
    plain, new = rewritten(loop((RAMPS | OTHERS)[name]), arguments())
    expected = "derivative.mask" if name in RAMPS else "derivative"
    found = marks(new)
    assert len(found) == (1 if loop is scanned else DEPTH)
    assert set(found[: 1 if loop is scanned else DEPTH - 1]) == {
        expected
    }  # the last run goes on into the loss's square
    for want, got in zip(run(plain, arguments()), run(new, arguments()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_gradients_in_bf16_and_of_gated_units():
    def gated(h):
        return jax.nn.silu(h) * jnp.roll(h, 1, axis=-1)

    plain, new = rewritten(scanned(gated), arguments(jnp.bfloat16))
    assert "derivative" in marks(new)
    want, got = (run(one, arguments(jnp.bfloat16))[1].astype(np.float32) for one in (plain, new))
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


HAND = np.float32([-4.0, -1.5, 0.6, 1.5, 4.0, -3.5, 0.0, 3.5])


def by_hand(codec):
    """Gradients of `sum(hard_swish(x))` at `HAND`: its derivative is (2 x + 3) / 6 between -3 and 3."""
    x = jnp.asarray(np.tile(HAND, (33, 16)))  # 33 rows: each row has a scale of its own
    once = jnp.eye(128)[None]

    def loss(once, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jax.nn.hard_swish(h @ w), None), x, once)[0])

    plain = flat(jax.make_jaxpr(jax.grad(loss, argnums=1))(once, x))
    new, found = stored(flat(Derivatives().rewrite(plain, None).closed), codec)
    assert len(found) == 1
    return np.asarray(run(new, (once, x))[0])[0, :8]


def test_a_worked_example():
    np.testing.assert_allclose(by_hand("derivative-mask"), [0, 0, 1, 1, 1, 0, 0, 1])
    exact = np.float32([0, 0, 0.7, 1, 1, 0, 0.5, 1])
    for codec, steps in (("derivative4", 15), ("derivative2", 3)):
        found = by_hand(codec)
        np.testing.assert_allclose(found * steps, np.round(found * steps), atol=1e-5)
        np.testing.assert_allclose(found, exact, atol=0.5 / steps + 1e-6)


@pytest.mark.parametrize(("codec", "steps"), [("derivative4", 15), ("derivative2", 3)])
@pytest.mark.parametrize("loop", [scanned, unrolled])
def test_gradients_are_within_half_a_step(codec, steps, loop):
    """The gradient of one layer's input is `d` times what comes back, so its error is half a step of `d` of that."""

    def loss(ws, bs, x):
        return loop(jax.nn.gelu)(ws, bs, x)

    _, new = rewritten(loss, arguments())
    survey = forced.survey_of(new)
    form = DERIVATIVES[codec]
    proposals = [p for p in Compress(codec).propose(survey) if hasattr(p, "encode")]
    assert proposals and all(p.name == codec and p.error == form.error for p in proposals)
    d = jax.vmap(jax.vmap(jax.grad(jax.nn.gelu)))(arguments()[2])
    spread = float(d.max() - d.min())
    assert np.abs(proposals[0].decode(proposals[0].encode(d)) - d).max() <= spread / steps / 2 + 1e-6


@pytest.mark.parametrize("loop", [scanned, unrolled])
@pytest.mark.parametrize("codec", list(DERIVATIVES))
def test_the_loss_is_exact_and_gradients_are_near(codec, loop):
    plain, new = rewritten(loop(jax.nn.gelu), arguments())
    coded, found = stored(new, codec)
    assert found
    want, got = run(plain, arguments()), run(coded, arguments())
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    error = np.linalg.norm(got[1] - want[1]) / np.linalg.norm(want[1])
    assert 1e-4 < error < {"derivative4": 0.05, "derivative2": 0.25, "derivative-mask": 0.15}[codec]


@pytest.mark.parametrize("loop", [scanned, unrolled])
@pytest.mark.parametrize("codec", list(DERIVATIVES))
def test_masks_of_relu6_are_exact(codec, loop):
    plain, new = rewritten(loop(jax.nn.relu6), arguments())
    coded, found = stored(new, codec)
    assert found
    for want, got in zip(run(plain, arguments()), run(coded, arguments()), strict=True):
        np.testing.assert_array_equal(got, want)


def test_masks_are_for_ramps_alone():
    _, new = rewritten(scanned(jax.nn.mish), arguments())
    assert not stored(new, "derivative-mask")[1] and stored(new, "derivative4")[1]


def test_plans_store_derivatives_and_say_so():
    closed = jax.make_jaxpr(jax.grad(scanned(jax.nn.gelu), argnums=2))(*arguments())
    passes = [Remat(), Compress("derivative4", always=True)]
    ladder = make_ladder(closed, donated=[False] * 3, target=Target.parse("cpu"), passes=passes)
    rung = next(rung for rung in ladder.rungs if rung.choice.stores)
    assert {store.name for store in rung.choice.stores.values()} == {"derivative4"}
    first = next(e for e in c.open_jaxpr(rung.closed).eqns if e.primitive.name == "scan")
    stacks = [v.aval for v in first.outvars if not isinstance(v, c.DropVar) and v.aval.shape[:1] == (DEPTH,)]
    assert any(a.dtype == np.uint8 for a in stacks)
    assert not [a for a in stacks if a.dtype == np.float32 and a.size >= DEPTH * ROWS * WIDTH]
    row = next(d for d in ladder.plan(ladder.rungs.index(rung)).decisions if d.choice == "derivative4")
    assert "relative error of at most 0.0666667" in row.reason


def test_without_a_run_the_step_stays_and_says_so():
    plain = flat(jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(x @ w)))(jnp.zeros((8, 8)), jnp.zeros((8, 8))))
    found = Derivatives().rewrite(plain, None)
    assert found.closed is plain and "no run" in found.left[0].why
    assert Compress("int8").parts() == [] and Compress(("int8", "derivative2")).parts() == [Derivatives()]
