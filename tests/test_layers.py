"""Blocks of an unrolled step: found where operations repeat, planned each by itself, and tied to the backward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _apply, _blocks, _layers, _rungs, _search
from memopt import _compat as c
from memopt._network import Choice
from memopt._step import Step
from memopt._target import Target
from memopt.models import steps
from memopt.passes import Remat

TARGET = Target.parse("tpu:v5e:1x1")
DEPTH, DIM = 6, 256


def block(weights, x):
    """Two residual halves, each narrow at its end and wide inside."""
    for up, down in weights:
        h = x - jnp.mean(x, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)
        up, down = up.astype(x.dtype), down.astype(x.dtype)  # repeated beside the weight's gradient
        x = x + jax.nn.gelu(h @ up, approximate=False) @ down
    return x


def loss(weights, x):
    for one in weights:
        x = block(one, x)
    return jnp.sum(x * x)


def step(weights, moments, x):
    """One step of gradient descent with momentum."""
    grads = jax.grad(loss)(weights, x)
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)
    return jax.tree.map(lambda w, m: w - 0.1 * m, weights, moments), moments


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@functools.cache
def search() -> _search.Search:
    """A search of the step that has not begun."""
    weights = [[(shape(DIM, 4 * DIM), shape(4 * DIM, DIM))] * 2] * DEPTH
    closed = jax.make_jaxpr(step)(weights, weights, shape(65536, DIM).update(dtype=jnp.bfloat16))
    donated = [True] * (8 * DEPTH) + [False]
    surveyed = Step(closed, TARGET, [Remat()], None, None)
    return _search.Search(surveyed, donated, _rungs.plain_rung(surveyed, donated))


@functools.cache
def table():
    """The blocks of the step and what they cost at each level."""
    layers = _layers._layers(search())
    return layers, _layers._Table(search(), layers)


def test_forward_and_backward_pass_are_stretches_cut_where_one_value_crosses():
    graph = search().survey.graph
    found = _blocks.stretches(graph, graph.top, 96)
    assert len(found) == 2
    for stretch in found:
        assert (stretch.end - stretch.start) // stretch.period >= DEPTH - 1
        assert stretch.parts == 1 or stretch.parts == 2
        held = _blocks.crossing(graph, graph.top, 0, len(graph.top.ops), stretch.period)
        for cut in stretch.cuts:
            sizes = [graph.values[v].aval.size for v, (low, high) in held.items() if low <= cut <= high]
            assert sum(size >= 65536 * DIM for size in sizes) == 1


def test_segments_begin_where_blocks_begin():
    graph = search().survey.graph
    starts = {ops[0].index for b in graph.top.bins if (ops := [op for op in graph.top.ops if op.bin == b])}
    for stretch in _blocks.stretches(graph, graph.top, 96):
        assert starts.issuperset(stretch.cuts)


def test_few_cuts_are_left_where_few_are_allowed():
    graph = search().survey.graph
    found = _blocks.stretches(graph, graph.top, 4)
    assert 2 <= sum(len(s.cuts) for s in found) <= 8


def test_the_last_level_keeps_everything_and_the_first_little():
    layers, found = table()
    count = len(layers.blocks)
    assert not layers.choice([found.kept[-1]] * count).repeats
    assert layers.flops(layers.choice([found.kept[0]] * count)).min() > 0


def test_levels_may_differ_from_block_to_block():
    layers, found = table()
    mixed = layers.choice([found.kept[0]] * (len(layers.blocks) - 1) + [found.kept[-1]])
    flops = layers.flops(mixed)
    assert flops[-1] == 0 and flops[:-1].min() > 0


def fits(costs, chosen, bound):
    """Whether these levels stay within a bound, counted block after block."""
    held = 0.0
    for place, k in enumerate(chosen):
        if costs.work[k, place] + held > bound:
            return False
        held += costs.held[k]
    return costs.head + held <= bound


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_levels_are_those_of_a_full_enumeration(seed):
    random = np.random.default_rng(seed)
    costs = object.__new__(_layers._Table)
    costs.held = np.array([0.0, *random.uniform(1, 4, 3)])
    costs.flops = random.uniform(0, 1, (4, 5)) * np.array([[4.0], [2.0], [1.0], [0.0]])
    costs.work, costs.head = random.uniform(4, 9, (4, 5)), 3.0
    for bound in (8.0, 10.0, 14.0, 20.0):
        every = [x for x in itertools.product(range(4), repeat=5) if fits(costs, x, bound)]
        least = min((sum(costs.flops[k, place] for place, k in enumerate(x)) for x in every), default=None)
        chosen = costs.cheapest(bound)
        assert (chosen is None) == (least is None)
        if chosen is not None:
            assert fits(costs, chosen, bound)
            assert sum(costs.flops[k, place] for place, k in enumerate(chosen)) == pytest.approx(least)


def test_bounds_are_met_and_the_least_of_them_by_a_hair():
    _, found = table()
    bounds = found.bounds(4)
    assert bounds == sorted(bounds, reverse=True)
    assert all(found.cheapest(bound) is not None for bound in bounds)
    assert found.cheapest(0.98 * bounds[-1]) is None


def test_blocks_that_hold_nothing_have_bounds():
    costs = object.__new__(_layers._Table)
    costs.kept, costs.head = [set(), set()], 0.0
    costs.held, costs.flops = np.zeros(2), np.zeros((2, 3))
    costs.work, costs.each = np.zeros((2, 3)), np.zeros(2)
    assert np.isfinite(costs.bounds(6)).all()


def test_plans_of_blocks_lower_the_peak_below_all_matmuls_kept():
    layers, found = table()
    frugal = search().score(layers.choice([found.kept[0]] * len(layers.blocks)))
    assert frugal.predicted_peak_bytes < 0.7 * search().score(Choice({})).predicted_peak_bytes


def test_repeats_are_not_tied_to_gradients_of_weights():
    layers, found = table()
    graph = search().survey.graph
    closed, _ = _apply.apply(graph, layers.choice([found.kept[0]] * len(layers.blocks)).repeats)
    guarded = {
        v for eqn in c.open_jaxpr(closed).eqns if eqn.primitive.name == "optimization_barrier" for v in eqn.invars
    }
    assert guarded
    weights = {(DIM, 4 * DIM), (4 * DIM, DIM)}
    made = {v for eqn in c.open_jaxpr(closed).eqns for v in eqn.outvars}
    assert not [v for v in guarded & made if v.aval.shape in weights]


def test_steps_without_equal_blocks_are_left_to_the_cut():
    closed = jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))))(shape(DIM, DIM), shape(64, DIM))
    surveyed = Step(closed, TARGET, [Remat()], None, None)
    alone = _search.Search(surveyed, [False, False], _rungs.plain_rung(surveyed, [False, False]))
    assert _layers._layers(alone) is None


def test_where_blocks_hold_nothing_the_next_cut_is_where_nothing_crosses():
    assert _blocks._necks(np.array([4.0, 0.0, 3.0]), 2, 0, 1, 0.0) == [1]
    assert _blocks._necks(np.array([4.0, 1.0, 3.0]), 2, 0, 1, 0.0) == []


def test_attention_may_be_run_again_twice_and_its_scores_do_not_wait_for_their_backward_pass():
    with jax.numpy_dtype_promotion("standard"):
        train, args, _ = steps.reference_step("vit_b", layers="unrolled", small=True)
        closed = jax.make_jaxpr(train)(*args)
    surveyed = Step(closed, TARGET, [Remat()], None, None)
    found = _search.Search(surveyed, [], _rungs.plain_rung(surveyed, []))
    layers = _layers._layers(found)
    once, twice = layers.levels[0], layers.levels[-1]
    assert not once.alone and twice.kept == once.kept and twice.alone
    table = _layers._Table(found, layers)
    assert (table.work[-1] < table.work[0]).all()
    made = [_scores(found.score(layers.choice([level] * len(layers.blocks))).jaxpr()) for level in (once, twice)]
    assert len(made[1]) == len(made[0]) + len(layers.blocks)
    assert len(set(made[1])) == len(made[1])  # XLA would merge two that come from the same values


def _scores(closed):
    """For each attention of the forward pass, run once or again, the values that its views are of."""
    eqns = c.open_jaxpr(closed).eqns
    makers = {v: e for e in eqns for v in e.outvars}

    def source(var):
        while var in makers and makers[var].primitive.name in {"reshape", "transpose", "split", "name", "add"}:
            var = makers[var].invars[0]
        return var

    return [tuple(map(source, e.invars)) for e in eqns if _makes_scores(e)]


def _makes_scores(eqn):
    shape = eqn.outvars[0].aval.shape
    forward = "transpose" not in str(eqn.source_info.name_stack)
    return eqn.primitive.name == "dot_general" and len(shape) == 4 and shape[-1] == shape[-2] and forward
