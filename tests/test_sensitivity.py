"""Sensitivities against what is worked out by hand, and plans that give each value bits by them."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memopt
from memopt import _bits, _codecs, _hessian, _probe
from memopt._network import Choice, Network
from memopt._step import Step
from memopt._target import Target
from memopt.passes import Compress, Remat

LAYERS, ROWS, WIDTH, OUT = 3, 128, 32, 8
CODECS = ("int8", "int4", "int2")
SMALL = 0.01  # by how much less the loss depends on the second product


def loss(ws, xs):
    """Two products a layer whose gradients are sums of one residual each, `x * y`, `x / y`; the second counts less."""

    def layer(total, one):
        (w, v), (x, y) = one
        with jax.named_scope("first"):
            total += jnp.sum((x * y) @ w)
        with jax.named_scope("second"):
            return total + SMALL * jnp.sum((x / y) @ v), None

    return jax.lax.scan(layer, jnp.float32(0), (ws, xs))[0]


def bent(ws, xs):
    """A loss whose Hessian with respect to `x * y` is `2 w w.T` for each row."""

    def layer(total, one):
        (w, v), (x, y) = one
        with jax.named_scope("first"):
            return total + jnp.sum(((x * y) @ w) ** 2), None

    return jax.lax.scan(layer, jnp.float32(0), (ws, xs))[0]


def deep(ws, xs):
    return jnp.sum(jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), xs, ws)[0] ** 2)


def arguments():
    rng = np.random.default_rng(0)
    ws = [rng.standard_normal((LAYERS, WIDTH, OUT)).astype(np.float32) for _ in range(2)]
    xs = [rng.uniform(1.0, 2.0, (LAYERS, ROWS, WIDTH)).astype(np.float32) for _ in range(2)]
    return tuple(ws), tuple(xs)


def deep_arguments():
    rng = np.random.default_rng(0)
    ws = rng.standard_normal((16, 64, 64)).astype(np.float32) / 16
    return ws, rng.standard_normal((512, 64)).astype(np.float32)


def measured(fn, args, passes=None, **kwargs):
    return memopt.sensitivity(fn, *args, passes=passes or [Compress(CODECS)], target="cpu", **kwargs)


def harms(found):
    return {(row.value, row.form): row.harm for row in found.rows}


def by_hand():
    """The squared relative error of the gradient of `loss`: each layer's is `residual.T @ ones`."""
    (ws, vs), (x, y) = arguments()
    residuals, scales = {"first/mul.0": x * y, "second/div.0": x / y}, {"first/mul.0": 1.0, "second/div.0": SMALL}
    norm = sum(OUT * np.sum((scales[v] * r.sum(axis=1)) ** 2) for v, r in residuals.items())
    found = {}
    for value, array in residuals.items():
        for name in CODECS:
            codec = _codecs.lean(_codecs.codec(name))
            back = np.stack([codec.decode(codec.encode(one)) for one in array])
            found[value, name] = OUT * np.sum((scales[value] * (back - array).sum(axis=1)) ** 2) / norm
    return found


def test_gradient_errors_are_those_worked_out_by_hand():
    found, want = harms(measured(jax.value_and_grad(loss), arguments())), by_hand()
    assert found.keys() == want.keys()
    for key, harm in want.items():
        assert found[key] == pytest.approx(harm, rel=1e-2), key


@pytest.fixture(scope="module")
def first():
    return measured(jax.value_and_grad(loss), arguments())


def planned(fn, one, budget, others=()):
    return memopt.optimize(fn, budget=budget, passes=[*others, one], target="cpu", verify=False)


def plans(fn, one, args, others=()):
    """All plans of a ladder but the step as written, as functions with the plan of each."""
    found = planned(fn, one, "100%", others).plans(*args)[1:]
    common = dict(passes=[*others, one], target="cpu", verify=False)
    return [(memopt.optimize(fn, plan=plan, **common), plan) for plan in found]


def test_what_the_gradient_hardly_depends_on_gets_few_bits(first):
    found = plans(jax.value_and_grad(loss), Compress(CODECS, sensitivity=first), arguments())
    kept = [{d.name: d.choice for d in plan.decisions} for _, plan in found]
    bits = {"keep": 32, "int8": 8, "int4": 4, "int2": 2}
    assert ("int8", "int2") in [(k["first/mul.0"], k["second/div.0"]) for k in kept]
    assert all(bits[k["second/div.0"]] <= bits[k["first/mul.0"]] for k in kept)
    assert (kept[-1]["first/mul.0"], kept[-1]["second/div.0"]) == ("int2", "int2")
    for _, plan in found:
        errors = {d.name: d.error for d in plan.decisions if d.error is not None}
        assert errors == pytest.approx({n: harms(first)[n, kept_as(plan, n)] ** 0.5 for n in errors})
        assert plan.predicted_error == pytest.approx(sum(e**2 for e in errors.values()) ** 0.5)
        assert plan.predicted_error**2 == pytest.approx(least(first, plan))
        assert f"{plan.predicted_error:.3g} is predicted of" in str(plan)


def test_the_frontier_takes_the_least_harm_a_byte_first(first):
    closed = jax.make_jaxpr(jax.value_and_grad(loss))(*arguments())
    step = Step(closed, Target.parse("cpu"), [Compress(CODECS, sensitivity=first)], None, None)
    network = Network(step.survey, {}, np.ones(step.survey.bins, bool), frozenset(), step.stores)
    found = _bits.frontier(step, Choice({}), step.stores, network, 16)
    plain = sum(row.value_bytes for row in first.rows if row.form == "int2")
    assert len(found) > 3 and {s.name for s in found[-1].stores.values()} == {"int2"}
    points = [(0.0, plain), *((step.harm(choice), kept_bytes(step, choice, plain)) for choice in found)]
    slopes = [(h - g) / (a - b) for (g, a), (h, b) in itertools.pairwise(points)]
    assert slopes == sorted(slopes) and slopes[0] >= 0
    few = _bits.frontier(step, Choice({}), step.stores, network, 2)
    assert len(few) == 2 and few[-1].key == found[-1].key
    alike = [[s.name for s in x.stores.values()] for x in _bits._alike(step, Choice({}), step.stores, network)]
    assert sorted(alike) == [["int2"] * 2, ["int4"] * 2, ["int8"] * 2]


def test_an_error_that_repeats_carry_into_the_next_block_is_not_taken_for_measured():
    def unrolled(ws, x):
        for w in ws:
            x = x + jnp.sin(x @ w)
        return jnp.sum(x**2)

    ws, x = deep_arguments()
    closed = jax.make_jaxpr(jax.value_and_grad(unrolled))(list(ws[:6]), x)
    step = Step(closed, Target.parse("cpu"), [Remat(), Compress("int4")], None, None)
    ends = _probe.block_ends(step.survey.graph)
    assert len(ends) >= 4 and ends <= set(step.repeatable)
    last, within = step.survey.bins - 1, _probe.everything(step.survey, step.repeatable)
    started = {v for op in within[last] for v in step.survey.graph.ops[op].inputs}
    store = next(s for s in step.stores if s.value in started)
    store = dataclasses.replace(store, harm=1.0, repeated_harm=2.0)
    for repeats, harm in (({}, 1.0), (within, 2.0), ({last: within[last] | ends}, np.inf)):
        assert step.harm(Choice(repeats, {store.value: store})) == harm


def kept_bytes(step, choice, plain):
    """The bytes of all values with forms, over all runs."""
    saved = [step.survey.bytes_of_value(v) - s.bytes for v, s in choice.stores.items()]
    return plain - LAYERS * sum(saved)


def least(found, plan):
    """The smallest sum of harms of any mix of forms that takes no more bytes than the plan's: by trying all."""
    stored = sum(d.stored_bytes or d.value_bytes for d in plan.decisions if d.name in ("first/mul.0", "second/div.0"))
    ways = {}
    for row in found.rows:
        ways.setdefault(row.value, [(row.value_bytes, 0.0)]).append((row.stored_bytes, row.harm))
    mixes = itertools.product(*ways.values())
    return min(sum(h for _, h in mix) for mix in mixes if sum(b for b, _ in mix) <= stored)


def kept_as(plan, name):
    return next(d.choice for d in plan.decisions if d.name == name)


def test_a_training_step_is_measured_by_its_gradients_not_by_what_it_returns(first):
    def step(params, momentum, xs):
        grads = jax.grad(loss)(params, xs)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum

    ws, xs = arguments()
    found = measured(step, (ws, jax.tree.map(jnp.ones_like, ws), xs))
    assert harms(found) == pytest.approx(harms(first), rel=1e-3)


def test_gradients_summed_up_in_a_loop_over_microbatches_are_found():
    ws, xs = arguments()
    pieces = jax.tree.map(lambda x: x.reshape(LAYERS, 2, ROWS // 2, WIDTH).swapaxes(0, 1), xs)

    def step(ws, pieces):
        def add(total, xs):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(ws, xs)), None

        return jax.lax.scan(add, (jnp.float32(0), jax.tree.map(jnp.zeros_like, ws)), pieces)[0]

    found = harms(measured(step, (ws, pieces), [Compress("int8-token")]))
    whole = harms(measured(jax.value_and_grad(loss), (ws, xs), [Compress("int8-token")]))
    assert found == pytest.approx(whole, rel=0.05)  # rows have scales of their own; sums of float32 in another order


def test_errors_where_repeats_start_from_a_value_are_those_of_such_plans():
    args, fn, others = deep_arguments(), jax.value_and_grad(deep), [Remat()]
    found = measured(fn, args, [*others, Compress("int4")])
    written = harms(found)
    assert any(row.repeated_harm > 1.2 * row.harm > 0 for row in found.rows)
    assert any(row.repeated_harm > row.harm == 0 for row in found.rows)  # what the sine is repeated from
    exact = fn(*args)[1]
    step, plan = plans(fn, Compress("int4", sensitivity=found), args, others)[-1]
    (row,) = [d for d in plan.decisions if d.error is not None]
    assert "recompute" in {d.choice for d in plan.decisions} and row.error**2 > 1.2 * written[row.name, "int4"]
    error = float(np.linalg.norm(step(*args)[1] - exact) / np.linalg.norm(exact))
    assert error == pytest.approx(plan.predicted_error, rel=1e-2)


def test_more_memory_never_means_more_error_and_a_limit_is_kept():
    args, fn = deep_arguments(), jax.value_and_grad(deep)
    found = measured(fn, args)
    errors = [plan.predicted_error for _, plan in plans(fn, Compress(CODECS, sensitivity=found), args)]
    middle = (errors[0] * errors[-1]) ** 0.5
    assert errors == sorted(errors) and errors[0] < middle / 3
    limited = Compress(CODECS, sensitivity=found, total_error=middle)
    points = planned(fn, limited, "100%").frontier(*args)
    plan = planned(fn, limited, points[-1].peak_bytes).plan(*args)
    assert errors[0] < plan.predicted_error <= middle
    with pytest.raises(memopt.BudgetError, match=r"Allow a larger error \(total_error=0\.\d+\)"):
        planned(fn, limited, int(0.8 * points[-1].peak_bytes)).plan(*args)


def test_plans_by_sensitivity_are_saved_and_applied(first):
    args, fn, one = arguments(), jax.value_and_grad(loss), Compress(CODECS, sensitivity=first)
    step, plan = plans(fn, one, args)[-1]
    again = memopt.Plan.from_json(plan.to_json())
    assert again == plan and again.predicted_error > 0
    loaded = Compress(CODECS, sensitivity=memopt.Sensitivity.from_json(first.to_json()))
    applied = memopt.optimize(fn, budget="100%", passes=[loaded], target="cpu", verify=False, plan=again)
    for want, got in zip(jax.tree.leaves(step(*args)), jax.tree.leaves(applied(*args)), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="its passes is"):
        memopt.optimize(fn, budget="100%", passes=[Compress(CODECS)], target="cpu", plan=again).plan(*args)


def test_a_sensitivity_of_another_step_stores_nothing(first):
    args = deep_arguments()
    step = planned(jax.value_and_grad(deep), Compress(CODECS, sensitivity=first), "100%")
    assert len(step.frontier(*args)) == 1
    assert any("was measured on another form of this step" in note for note in step.plan(*args).notes)


def test_hutchinson_estimates_have_the_mean_and_the_variance_of_theory():
    def function(arrays):
        a, b, c = arrays
        return jnp.sum(jnp.sin(a) @ b) ** 2 + jnp.sum(a**3) + jnp.sum(b * c**2)

    rng = np.random.default_rng(0)
    points = [rng.standard_normal(s).astype(np.float32) for s in ((3, 4), (4,), (4,))]

    def at_zero(z):
        return function([p + x for p, x in zip(points, z, strict=True)])

    shapes = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in points]
    exact = jax.jit(jax.hessian(at_zero))([jnp.zeros_like(p) for p in points])
    samples = 100
    drawn = _hessian.estimates(_hessian.hutchinson(at_zero, shapes), shapes, samples=samples, seed=0)
    for i, point in enumerate(points):
        block = np.asarray(exact[i][i], np.float64).reshape(point.size, point.size)
        variance = 2 * np.sum((block - np.diag(np.diag(block))) ** 2)
        assert abs(drawn[i].mean() - np.trace(block)) < 4 * np.sqrt(variance / samples) + 1e-5
        assert drawn[i].var(ddof=1) == pytest.approx(variance, rel=0.5, abs=1e-10)  # none of a diagonal block
        assert _hessian.mean(drawn[i]) == pytest.approx(
            (drawn[i].mean(), np.sqrt(variance / samples)), rel=0.3, abs=1e-6
        )


def test_the_hessian_form_is_the_trace_times_the_distance():
    (ws, _), (x, y) = args = arguments()
    passes = [Remat(), Compress("int4")]  # so that values which repeats alone would read are measured, too
    found = {(r.value, r.form): r for r in measured(jax.value_and_grad(bent), args, passes, kind="hessian").rows}
    array, codec = x * y, _codecs.lean(_codecs.codec("int4"))
    distance = sum(float(np.sum((codec.decode(codec.encode(one)) - one) ** 2)) for one in array)
    row = found["first/mul.0", "int4"]
    assert abs(row.trace - 2 * np.sum(ws**2) / (LAYERS * WIDTH)) < 4 * row.trace_error
    assert row.harm == pytest.approx(row.trace * distance, rel=1e-3)
    assert found["first/dot_general.0", "int4"].trace == pytest.approx(2.0)  # of a sum of squares, with no variance
    assert found["first/mul.1", "int4"].harm is None  # the square's derivative: the loss does not depend on it


def test_the_gauss_newton_form_is_the_trace_of_the_gradients_jacobian(first):
    (_, _), (x, y) = args = arguments()
    norm = OUT * (np.sum((x * y).sum(axis=1) ** 2) + np.sum((SMALL * (x / y).sum(axis=1)) ** 2))
    found = {r.value: r for r in measured(jax.value_and_grad(loss), args, kind="gauss-newton", samples=16).rows}
    for value, scale in (("first/mul.0", 1.0), ("second/div.0", SMALL)):
        row = found[value]
        assert abs(row.trace - OUT * scale**2 / norm) < 4 * row.trace_error
        assert 0.2 < row.trace_error * 16**0.5 / (row.trace * (2 / (LAYERS * WIDTH)) ** 0.5) < 5
    share = harms(first)["first/mul.0", "int8"] / found["first/mul.0"].harm
    assert found["first/mul.0"].form == "int2" and share < 1  # the last row of a value is that of the last codec


def test_a_program_with_nothing_disturbed_is_the_step():
    args = deep_arguments()
    closed = jax.make_jaxpr(jax.value_and_grad(deep))(*args)
    step = Step(closed, Target.parse("cpu"), [Remat(), Compress("int2")], None, None)
    results = _probe.gradients(step.survey.graph)
    values = sorted({s.value for s in step.stores})
    want = jax.value_and_grad(deep)(*args)
    everything = _probe.everything(step.survey, step.repeatable)
    for repeats in ({}, everything):
        run = jax.extend.core.jaxpr_as_fun(_probe.switched(step.survey, step.stores, results, repeats))
        (got,) = jax.jit(run)(*args, np.int32(_probe.EXACT))
        np.testing.assert_allclose(got, want[1], rtol=1e-4, atol=1e-4)
        program, shapes = _probe.leaning(step.survey, values, results, repeats)
        (got,) = jax.jit(jax.extend.core.jaxpr_as_fun(program))(*args, *(jnp.zeros(s.shape, s.dtype) for s in shapes))
        np.testing.assert_allclose(got, want[1], rtol=1e-4, atol=1e-4)
    program, shapes = _probe.shifted(step.survey, values, step.survey.graph.top.outs[0])
    (got,) = jax.jit(jax.extend.core.jaxpr_as_fun(program))(*args, *(jnp.zeros(s.shape, s.dtype) for s in shapes))
    np.testing.assert_allclose(got, want[0], rtol=1e-6)


def test_what_cannot_be_measured_is_refused_with_the_remedy(first):
    args, fn = arguments(), jax.value_and_grad(loss)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with pytest.raises(TypeError, match="Give a real batch"):
        measured(fn, shapes)
    with pytest.raises(ValueError, match="one of the kinds 'gradient', 'gauss-newton', 'hessian', not 'fisher'"):
        measured(fn, args, kind="fisher")
    with pytest.raises(ValueError, match="Give passes="):
        measured(fn, args, [Remat()])
    with pytest.raises(ValueError, match="loss=..., or return it"):
        measured(jax.grad(loss), args, kind="hessian")
    with pytest.raises(ValueError, match="Give them to it"):
        memopt.sensitivity(memopt.optimize(fn, passes=[Compress()]), *args, passes=[Compress()])
    with pytest.raises(ValueError, match="sensitivity=memopt.sensitivity"):
        Compress(total_error=0.1)
    with pytest.raises(ValueError, match="has to be positive"):
        Compress(sensitivity=first, total_error=0.0)
    other = memopt.Sensitivity("hessian", first.step, first.rows)
    mixed = [Compress("int8", sensitivity=first), Compress("int4", sensitivity=other)]
    with pytest.raises(ValueError, match="different kinds do not add up: gradient, hessian"):
        memopt.optimize(fn, budget="50%", passes=mixed, target="cpu").plan(*args)
    for text in ("", "{}", json.dumps(json.loads(first.to_json()) | {"memopt_sensitivity": 9})):
        with pytest.raises(ValueError, match="no saved sensitivity"):
            memopt.Sensitivity.from_json(text)


def test_a_loss_behind_a_barrier_is_no_gradient():
    def step(w, x):
        value, gradient = jax.value_and_grad(deep)(w, x)
        return jax.lax.optimization_barrier((value, gradient)), x

    args = deep_arguments()
    found = measured(step, args, [Compress("int4")], kind="hessian", loss="[0][0]")
    assert found.rows == measured(jax.value_and_grad(deep), args, [Compress("int4")], kind="hessian").rows


def test_modules_and_methods_are_measured():
    class Model(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(64, 64, rngs=nnx.Rngs(0))

        @functools.partial(memopt.optimize, passes=[Compress("int4")], target="cpu")
        def step(self, x):
            return nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(jnp.sin(m.inner(x)))))(self)

    model, x = Model(), deep_arguments()[1]
    method = harms(memopt.sensitivity(model.step, x))
    plain = measured(Model.step.__wrapped__, (model, x), [Compress("int4")])
    assert method == harms(plain) and max(method.values()) > 0


def test_a_step_that_memopt_made_is_measured_with_its_own_passes(first):
    one = Compress(CODECS, sensitivity=first, total_error=0.1)
    step = memopt.optimize(jax.value_and_grad(loss), passes=[one], target="cpu")
    assert harms(memopt.sensitivity(step, *arguments())) == pytest.approx(harms(first), rel=1e-6)
