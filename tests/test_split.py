"""Loops in two and more levels: the same values, and carries at block starts in place of residuals."""

import jax
import jax.numpy as jnp
import pytest

from memopt import _compat as c
from memopt import _inline, _pairs, _split, _timeline
from memopt._graph import Graph
from memopt._split import Variant
from memopt._target import Target
from tests import loop_pairs


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", loop_pairs.PROGRAMS)
def test_values_and_gradients_stay(name):
    closed, args, paths = loop_pairs.traced(name, 12)
    assert paths
    for path in paths:
        new = _split.two_level(closed, path, 4)
        assert len(loop_pairs.scans(new)) > len(loop_pairs.scans(closed))
        loop_pairs.assert_same(closed, new, args)


@pytest.mark.parametrize("name", ["layers", "reversed_loop", "carried_key", "two_readers", "outputs_too"])
def test_values_and_gradients_stay_in_three_levels(name):
    closed, args, paths = loop_pairs.traced(name, 12)
    for path in paths:
        new = _split.two_level(closed, path, 6, levels=3)
        assert len(loop_pairs.scans(new)) > len(loop_pairs.scans(closed))
        loop_pairs.assert_same(closed, new, args)


def stacked_shapes(closed):
    """Return the shapes of what the loops of a step stack at the top level."""
    return [v.aval.shape for e in c.open_jaxpr(closed).eqns if e.primitive.name == "scan" for v in _pairs.Loop(e).ys]


def test_only_block_starts_are_stacked():
    closed, _, (path,) = loop_pairs.traced("recurrent", 12)
    assert (12, 3, 4) in stacked_shapes(closed)
    assert stacked_shapes(_split.two_level(closed, path, 4)) == [(3, 3, 4)]


def test_levels_nest():
    closed, _, (path,) = loop_pairs.traced("recurrent", 32)
    lengths = [e.params["length"] for e in loop_pairs.scans(_split.two_level(closed, path, 16, levels=5))]
    assert lengths.count(2) >= 8 and set(lengths) == {2, 4, 8, 16}


def test_both_levels_are_pairs():
    closed, _, (path,) = loop_pairs.traced("layers", 12)
    graph = Graph(_split.two_level(closed, path, 4))
    first = [op for op in graph.ops if op.feeds]
    assert [op.eqn.params["length"] for op in first] == [3, 4]
    assert all(op.feeds[0].mapped for op in first)


def test_other_readers_keep_their_stack():
    closed, _, (path,) = loop_pairs.traced("outputs_too", 12)
    shapes = stacked_shapes(_split.two_level(closed, path, 4))
    assert shapes.count((3, 4, 3, 4)) == 1  # the output, in blocks


@pytest.mark.parametrize("block", [1, 12, 13])
def test_a_block_that_is_no_part_is_refused(block):
    closed, _, (path,) = loop_pairs.traced("recurrent", 12)
    assert _split.two_level(closed, path, block) is None


def effectful(w, h):
    def body(h, _):
        jax.debug.callback(lambda x: None, h.sum())
        return jnp.tanh(h @ w), None

    return jax.lax.scan(body, h, length=16)[0].sum()


def test_effects_are_refused():
    closed = _inline.inline(jax.jit(jax.grad(effectful)).trace(jnp.ones((4, 4)), jnp.ones((4, 4))).jaxpr)
    assert any(e.primitive.name == "scan" for e in c.open_jaxpr(closed).eqns)
    assert _split.candidates(closed) == []
    for i in range(len(c.open_jaxpr(closed).eqns)):
        assert _split.two_level(closed, i, 4) is None


def test_source_information_stays():
    closed, _, (path,) = loop_pairs.traced("layers", 12)
    dots = [
        c.user_source(e)
        for s in loop_pairs.scans(_split.two_level(closed, path, 4))
        for e in c.open_jaxpr(s.params["jaxpr"]).eqns
        if e.primitive.name == "dot_general"
    ]
    assert dots and all("loop_pairs.py" in text for text in dots)


def peak(closed):
    return _timeline.simulate(closed, target=Target.parse("gpu:h100")).peak_bytes  # no fast memory to hide in


def test_the_carries_of_a_long_loop_fall_as_the_root_of_its_length():
    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32)  # a carry of 1 MiB
    fn = jax.value_and_grad(lambda w, h: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=256)[0].sum())
    closed = _inline.inline(jax.jit(fn).trace(shape, shape).jaxpr)
    two, three = [v for v in _split.candidates(closed) if v.kind == "two_level"]
    mib, root = 2**20, 16
    residuals = _pairs.find(c.open_jaxpr(closed), two.index[0]).residual_bytes / 256 / mib  # per iteration
    assert peak(closed) > 256 * residuals * mib
    assert peak(_split.apply_variant(closed, two)) < (root * (1 + residuals) + 12) * mib
    assert peak(_split.apply_variant(closed, three)) < peak(_split.apply_variant(closed, two))
    assert peak(_split.two_level(closed, two.index, 128, levels=8)) <= peak(_split.apply_variant(closed, three))


def test_candidates_are_few_and_by_length():
    for length, kinds in (
        (3, []),
        (8, ["divide"] * 3),
        (16, ["two_level"] + ["divide"] * 3),
        (64, ["two_level"] * 2 + ["divide"] * 3),
    ):
        closed, _, (path,) = loop_pairs.traced("layers", length)
        found = _split.candidates(closed)
        assert [v.kind for v in found] == kinds
        assert all(v.index == path for v in found)
    assert [v.parameter for v in found] == [8, 16, 16, 32, 48]
    assert [v.levels for v in found] == [2, 3, 1, 1, 1]


def test_candidates_lie_in_inner_regions_too():
    closed, args, (path,) = loop_pairs.traced("accumulated", 16)
    assert len(path) == 3
    for variant in _split.candidates(closed):
        loop_pairs.assert_same(closed, _split.apply_variant(closed, variant), args)


def test_variants_are_values():
    assert Variant("divide", (3,), 4, 1) == Variant("divide", (3,), 4, 1)
