"""The contract with passes: toy passes, each one frozen dataclass, whose proposals are chosen, applied and saved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _apply, _cost, _forms
from memopt import _compat as c
from memopt._contract import Store
from memopt._plan import Plan
from memopt._planner import ladder_of_plan, make_ladder
from memopt._target import Target
from tests import forced, random_programs

CPU = Target.parse("cpu")
ROWS, WIDTH, DEPTH = 2048, 128, 6


@dataclasses.dataclass(frozen=True)
class Bits:
    """Keep masks as bits, eight in a byte: exact."""

    name: str = "bits"

    def propose(self, survey):
        """Offer every array of bools whose last axis is a multiple of eight."""
        for value in survey.graph.values:
            if value.aval.dtype == bool and value.aval.size and value.aval.shape[-1:] and value.aval.shape[-1] % 8 == 0:
                yield Store(
                    value.id,
                    1e-9,
                    value.aval.size // 8,
                    functools.partial(jnp.packbits, axis=-1),
                    lambda bits: jnp.unpackbits(bits, axis=-1).astype(bool),
                    name="bits",
                )


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Keep large float32 arrays as 16 bits and a scale: lossy, two leaves. (XLA:CPU widens bfloat16 itself.)"""

    name: str = "rounded"
    least_bytes: int = 1 << 19

    def propose(self, survey):
        """Offer every large float32 array."""
        for value in survey.graph.values:
            size = _cost.aval_bytes(value.aval)
            if value.aval.dtype == np.float32 and size >= self.least_bytes:
                yield Store(value.id, 1e-9, size // 2 + 4, encode, decode, error=1e-3, name="int16")


def encode(x):
    """Codes and their scale."""
    scale = jnp.max(jnp.abs(x)) / 32767.0 + 1e-30
    return {"codes": jnp.round(x / scale).astype(jnp.int16), "scale": scale}


def decode(form):
    """The value again."""
    return form["codes"].astype(jnp.float32) * form["scale"]


def masked(h, w):
    """A layer whose backward pass reads a mask."""
    h = h @ w
    return jnp.where(h > 0.1, h, 0.0) * 1.5


def unrolled(ws, x):
    for i in range(DEPTH):
        x = jnp.sin(x @ ws[i])
    return jnp.sum(x * x)


def scanned(ws, x):
    return jnp.sum(jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, ws)[0] ** 2)


def nested(ws, x):
    inner = functools.partial(jax.lax.scan, lambda h, w: (jnp.sin(h @ w), None))
    return jnp.sum(jax.lax.scan(lambda h, w: (inner(h, w)[0], None), x, ws.reshape(2, -1, WIDTH, WIDTH))[0] ** 2)


def gated(ws, x):
    return jnp.sum(jax.lax.scan(lambda h, w: (masked(h, w), None), x, ws)[0] ** 2)


@functools.cache
def arguments():
    rng = np.random.default_rng(0)
    draw = rng.standard_normal((DEPTH, WIDTH, WIDTH)) / np.sqrt(WIDTH), rng.standard_normal((ROWS, WIDTH))
    return tuple(x.astype(np.float32) for x in draw)


@functools.cache
def traced(fn):
    return jax.make_jaxpr(jax.value_and_grad(fn))(*arguments())


@functools.cache
def planned(fn, one):
    return make_ladder(traced(fn), donated=[False] * 2, target=CPU, passes=[one])


def temporaries(closed):
    return jax.jit(c.as_function(closed)).lower(*arguments()).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("fn", [unrolled, scanned, nested])
def test_a_lossy_form_changes_gradients_alone(fn):
    rung = planned(fn, Rounded()).rungs[-1]
    assert rung.choice.stores
    c.check(rung.closed)
    want, got = (jax.jit(c.as_function(x))(*arguments()) for x in (traced(fn), rung.closed))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    error = np.linalg.norm(got[1] - want[1]) / np.linalg.norm(want[1])
    assert 0.0 < error < 1e-2


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fn", [unrolled, scanned, nested])
def test_no_forward_result_reads_a_lossy_form(fn, share):
    survey = forced.survey_of(traced(fn))
    rng = np.random.default_rng(1)
    lost = {v.id: Store(v.id, 0.0, 1, lambda x: x, lambda x: x * 0, error=1.0) for v in survey.graph.values}
    lost = {v: store for v, store in lost.items() if _forms.refusal(survey.graph, store) is None}
    repeats = {p: frozenset(o for o in ops if rng.random() < share) for p, ops in forced.repeatable(survey).items()}
    new, _ = _apply.apply(survey.graph, repeats, lost)
    want, got = (jax.jit(c.as_function(x))(*arguments()) for x in (traced(fn), new))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    if share < 1.0:  # with all repeated, nothing that is stored has to be read back
        assert np.linalg.norm(got[1] - want[1]) > 0.5 * np.linalg.norm(want[1])


def test_an_exact_form_changes_nothing():
    rung = planned(gated, Bits()).rungs[-1]
    assert rung.choice.stores
    want, got = (jax.jit(c.as_function(x))(*arguments()) for x in (traced(gated), rung.closed))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("fn", "one"), [(gated, Bits()), (scanned, Rounded())])
def test_predicted_and_compiled_memory_fall(fn, one):
    plain, *_, last = planned(fn, one).rungs
    assert last.predicted_peak_bytes < plain.predicted_peak_bytes
    assert temporaries(last.closed) < 0.95 * temporaries(traced(fn))


def test_a_pair_of_loops_hands_on_the_leaves_alone():
    first = next(e for e in c.open_jaxpr(planned(gated, Bits()).rungs[-1].closed).eqns if e.primitive.name == "scan")
    dtypes = [v.aval.dtype for v in first.outvars if not isinstance(v, c.DropVar)]
    assert np.dtype("uint8") in dtypes and np.dtype(bool) not in dtypes


def test_a_saved_plan_stores_again():
    ladder = planned(scanned, Rounded())
    plan = Plan.from_json(ladder.plan(len(ladder.rungs) - 1).to_json())
    again = ladder_of_plan(traced(scanned), plan, donated=[False] * 2, target=CPU, passes=[Rounded()]).rungs[1]
    assert plan.stores and {v: s.name for v, s in again.choice.stores.items()} == plan.stores
    assert again.predicted_peak_bytes == ladder.rungs[-1].predicted_peak_bytes


def test_a_plan_shows_forms_and_errors():
    cases = (scanned, Rounded(), "int16", "error of at most 0.001"), (gated, Bits(), "bits", "exactly")
    for fn, one, choice, says in cases:
        ladder = planned(fn, one)
        rows = [d for d in ladder.plan(len(ladder.rungs) - 1).decisions if d.choice == choice]
        assert rows and all(says in d.reason for d in rows)


def test_a_form_that_gives_back_another_type_is_refused():
    survey = forced.survey_of(traced(scanned))
    value = next(op for op in survey.graph.ops if op.eqn.primitive.name == "sin").outputs[0]
    wrong = Store(value, 0.0, 1, lambda x: x, lambda x: x[0], name="torn")
    with pytest.raises(ValueError, match="'torn' decodes"):
        _apply.apply(survey.graph, {}, {value: wrong})


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_keep_their_values_in_another_form(seed):
    assert random_programs.check_program(seed, forced.stored(seed)) == []
