"""Loops divided in two: the same values, no stack sliced, and two pairs that are planned apart."""

import jax
import jax.numpy as jnp
import pytest

from memopt import _compat as c
from memopt import _divide, _inline, _split, _timeline
from memopt._graph import Graph
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes import Remat
from tests import loop_pairs

TPU = Target.parse("tpu:v5e:1x1")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", [name for name in loop_pairs.PROGRAMS if name != "sharded"])
def test_values_and_gradients_stay(name):
    closed, args, paths = loop_pairs.traced(name, 7)
    assert paths
    for path in paths:
        new = _divide.divide(closed, path, 3)
        assert len(loop_pairs.scans(new)) > len(loop_pairs.scans(closed))
        loop_pairs.assert_same(closed, new, args)


@pytest.mark.parametrize(
    ("name", "block", "levels"), [("layers", 5, 2), ("reversed_loop", 4, 3), ("outputs_too", 5, 2), ("noise", 4, 3)]
)
def test_blocks_that_leave_a_rest(name, block, levels):
    closed, args, (path,) = loop_pairs.traced(name, 13)
    new = _split.two_level(closed, path, block, levels=levels)
    assert {13 // block, block, 13 % block} <= {e.params["length"] for e in loop_pairs.scans(new)} | {1}
    loop_pairs.assert_same(closed, new, args)


@pytest.mark.parametrize("at", [-1, 0, 7, 8])
def test_an_empty_part_is_refused(at):
    closed, _, (path,) = loop_pairs.traced("layers", 7)
    assert _divide.divide(closed, path, at) is None


def test_values_that_differ_between_devices_are_refused():
    closed, _, (path,) = loop_pairs.traced("sharded", 12)
    assert _divide.divide(closed, path, 3) is None


def test_what_is_no_loop_is_refused():
    closed, _, (path,) = loop_pairs.traced("layers", 7)
    assert _divide.divide(closed, path[0] + 1, 3) is None


@pytest.mark.parametrize("name", ["layers", "reversed_loop", "outputs_too"])
def test_no_stack_is_sliced_or_joined(name):
    closed, _, (path,) = loop_pairs.traced(name, 7)
    new = _divide.divide(closed, path, 3)
    names = {e.primitive.name for e in c.open_jaxpr(new).eqns} - {e.primitive.name for e in c.open_jaxpr(closed).eqns}
    assert names <= {"iota", "broadcast_in_dim"}


@pytest.mark.parametrize("at", [3, 4])
def test_parts_are_pairs_of_their_own(at):
    closed, _, (path,) = loop_pairs.traced("layers", 8)
    graph = Graph(_divide.divide(closed, path, at))
    first = [op for op in graph.ops if op.feeds]
    assert [op.eqn.params["length"] for op in first] == [at, 8 - at]
    assert [[reader.eqn.params["length"] for reader in op.feeds] for op in first] == [[at], [8 - at]]
    assert first[0].feeds[0].id > first[1].feeds[0].id  # the reading loops run from the end
    assert all(op.feeds[0].mapped for op in first)


def mlp(length):
    """Layers with one dear and one cheap residual each, so that a plan has something to choose."""

    def loss(w, h):
        h, _ = jax.lax.scan(lambda h, w: (h + jnp.sin(jnp.tanh(h @ w) @ w.T), None), h, w)
        return (h**2).sum()

    shapes = jax.ShapeDtypeStruct((length, 512, 512), jnp.float32), jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    return _inline.inline(jax.jit(jax.value_and_grad(loss)).trace(*shapes).jaxpr)


def test_the_timeline_knows_that_dividing_costs_memory():
    # Compiled for v5e, an 8-layer MLP divided at 4 took 1.46 times the plain step's temporaries.
    closed = mlp(8)
    plain = _timeline.simulate(closed, target=TPU).peak_bytes
    assert 1.2 * plain < _timeline.simulate(_divide.divide(closed, 0, 4), target=TPU).peak_bytes < 1.7 * plain


def test_plans_in_between_appear():
    def rungs(closed):
        ladder = make_ladder(closed, donated=[False, False], target=TPU, passes=[Remat()])
        return [r.predicted_peak_bytes for r in ladder.rungs]

    closed = mlp(8)
    whole, parts = rungs(closed), rungs(_divide.divide(closed, 0, 4))
    assert len(parts) > len(whole)
    gaps = [(low, high, (high - low) / 4) for high, low in zip(whole, whole[1:], strict=False)]
    assert any(low + margin < peak < high - margin for low, high, margin in gaps[1:] for peak in parts)


def test_a_variant_divides():
    closed, args, (path,) = loop_pairs.traced("layers", 8)
    variants = [v for v in _split.candidates(closed) if v.kind == "divide"]
    assert [v.parameter for v in variants] == [2, 4, 6]
    loop_pairs.assert_same(closed, _split.apply_variant(closed, variants[0]), args)
