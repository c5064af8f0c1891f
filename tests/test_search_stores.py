"""Plans with stores in the search: mixed, pruned, and ordered by their seconds."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _mixtures, _rungs, _specs
from memopt._contract import Store
from memopt._network import Choice
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes import Compress, Offload, Remat
from tests import forced

CPU = Target.parse("cpu")
ARGS = jax.ShapeDtypeStruct((6, 256, 256), jnp.float32), jax.ShapeDtypeStruct((2048, 256), jnp.float32)


def loss(ws, x):
    return jnp.sum(jax.lax.scan(lambda h, w: (jnp.sin(h + jax.nn.gelu(h @ w)), None), x, ws)[0] ** 2)


def ladder(passes):
    closed = jax.make_jaxpr(jax.grad(loss))(*ARGS)
    return make_ladder(closed, donated=[False] * 2, target=CPU, passes=passes)


def store(value):
    return Store(value, 1.0, 8, lambda x: x, lambda x: x)


def test_mixtures_take_one_plans_forms_up_to_an_operation_and_the_others_after_it():
    graph = forced.survey_of(jax.make_jaxpr(jax.grad(loss))(*ARGS)).graph
    made = [v for v in graph.values if v.op is not None and not v.op.bodies][:4]
    first, second, third, fourth = (store(v.id) for v in made)
    one = Choice({0: frozenset({made[0].op.id})}, {first.value: first, second.value: second})
    other = Choice({}, {third.value: third, fourth.value: fourth})
    found = _mixtures.mixtures(one, other, set(), graph)
    middle = sorted({v.op.id for v in made})[2]
    early = {v.id for v in made if v.op.id < middle}
    assert [set(c.stores) for c in found] == [
        {v for v in one.stores if v in early} | {v for v in other.stores if v not in early},
        {v for v in other.stores if v in early} | {v for v in one.stores if v not in early},
    ]
    assert found[0].repeats == one.repeats and found[1].repeats == {}


def rung(flops, seconds, peak, stored=0.0):
    choice = types.SimpleNamespace(stores={0: types.SimpleNamespace(seconds=stored, late=False)} if stored else {})
    figures = types.SimpleNamespace(recompute_flops=flops, seconds=seconds, predicted_peak_bytes=peak, choice=choice)
    figures.harm, figures.allowed = 0.0, True
    return figures


def test_a_slow_transfer_is_not_called_free():
    plain, repeat, away = rung(0, 0, 100), rung(5, 0.1, 60), rung(0, 9.0, 50, stored=9.0)
    assert _rungs.hull(plain, [away, repeat]) == [repeat, away]
    assert _rungs.hull(plain, [rung(0, 9.0, 50), repeat])[0].recompute_flops == 0


def test_spares_are_what_no_plan_beats_without_holes():
    plain, good, holed, worse = rung(0, 0, 100), rung(5, 0.1, 60), rung(4, 0.1, 110), rung(6, 0.1, 70)
    for one, packed in ((plain, 90), (good, 55), (holed, 50), (worse, 54)):
        one.packed_peak_bytes = packed
    chosen = _rungs.hull(plain, [good, holed, worse])
    assert chosen == [good]
    assert _rungs.spares(chosen, [good, holed, worse]) == [holed]


#: Bytes, matmul FLOPs and vector FLOPs a second. With the last two mixes were once slower than a technique alone.
RATES = [(2e10, 4e10, 2e10), (8e9, 1e11, 1e9), (1.28e11, 1e10, 1e10)]


@pytest.fixture
def rates(request, monkeypatch):
    """Plan for a CPU of these rates in place of this machine's."""
    memory, matmul, vector = request.param
    flops = {"float32": matmul, "default": matmul}
    spec = _specs.DeviceSpec("cpu", "cpu", 1 << 34, memory, flops, vector, memory, 0.0, "made up")
    monkeypatch.setattr(_specs, "_cpu_spec", lambda: spec)
    return request.param


def assert_no_worse(mixed, alone):
    """For each plan of a technique alone the mix has one that is no larger and no slower."""
    for single in alone[1:]:
        within = [r.seconds for r in mixed if r.predicted_peak_bytes <= single.predicted_peak_bytes]
        assert min(within, default=np.inf) <= single.seconds + 1e-12, single


@pytest.mark.parametrize("rates", RATES, indirect=True)
@pytest.mark.parametrize("technique", [Compress("int8"), Offload(least_bytes=4096)])
def test_a_mix_is_nowhere_worse_than_either_alone(technique, rates):
    mixed, *alone = [ladder(p).rungs for p in ([Remat(), technique], [Remat()], [technique])]
    peaks = [r.predicted_peak_bytes for r in mixed]
    assert peaks == sorted(peaks, reverse=True)
    seconds = [r.seconds for r in mixed[1:]]
    assert seconds == sorted(seconds)
    for rungs in alone:
        assert_no_worse(mixed, rungs)
    assert any(r.choice.stores for r in mixed)


@pytest.mark.parametrize("rates", RATES[1:2], indirect=True)
def test_a_mix_of_three_is_nowhere_worse_than_any_alone(rates):
    every = [Remat(), Compress("int8"), Offload(least_bytes=4096)]
    mixed = ladder(every).rungs
    for technique in every:
        assert_no_worse(mixed, ladder([technique]).rungs)
