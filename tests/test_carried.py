"""Tests of rows that a loop carries: repeats inside the loop read the row before it is written, and no second stack."""

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _apply, _carried, _inline, _segments
from memopt import _compat as c
from memopt import _graph as g
from memopt.passes.fuse_update import fuse

LAYERS, WIDTH = 4, 8


def loss_of(params, batch):
    def layer(h, w):
        return h + jnp.tanh(jnp.sin(h @ w)), None

    return jnp.mean(jax.lax.scan(layer, batch, params)[0] ** 2)


def fused_step(params, moment, batch):
    grads = jax.grad(loss_of)(params, batch)
    moment = 0.9 * moment + grads
    return params - 0.1 * moment, moment


def fused():
    args = [
        jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((2, LAYERS, WIDTH, WIDTH)) / 3
    ]
    args.append(jnp.ones((3, WIDTH)))
    flat = _inline.inline(jax.make_jaxpr(fused_step)(*args))
    return fuse(c.close(c.dce(flat)[0], c.jaxpr_consts(flat)))[0], args


def loops(closed):
    return [e for e in c.open_jaxpr(closed).eqns if e.primitive.name == "scan"]


def test_old_rows_are_found_by_what_reads_and_writes_them():
    closed, _ = fused()
    backward = loops(closed)[1]
    counters = {i for i, v in enumerate(backward.invars) if v.aval.shape == (LAYERS,)}
    assert sorted({k for _, k in _carried.old_rows(backward, counters)}) == [1, 2]
    assert not list(_carried.old_rows(backward, set()))


def test_the_pair_is_recognised_and_repeats_read_the_old_row():
    closed, args = fused()
    graph = g.Graph(closed)
    _segments.assign(graph)
    (first, second) = [op for op in graph.ops if op.eqn.primitive.name == "scan"]
    assert first.feeds == [second]
    assert second.bodies[0].held
    forward = first.bodies[0]
    everything = frozenset(op.id for op in forward.ops)
    repeats = {place: everything for place in second.bodies[0].bins}
    new, _ = _apply.apply(graph, repeats)
    c.check(new)
    backward = loops(new)[1]
    num_consts, num_carry = c.scan_layout(backward)
    taken = [v.aval.shape for v in backward.invars]
    assert taken[:num_consts].count((LAYERS, WIDTH, WIDTH)) == 0
    assert taken[num_consts + num_carry :].count((LAYERS, WIDTH, WIDTH)) == 0
    for got, want in zip(c.as_function(new)(*args), fused_step(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_row_that_another_trip_wrote_is_no_old_row():
    def wrong(stack, numbers):
        def body(stack, i):
            row = stack[(i + 1) % LAYERS]
            return jax.lax.dynamic_update_index_in_dim(stack, row + 1, i, 0), None

        return jax.lax.scan(body, stack, numbers)[0]

    closed = _inline.inline(jax.make_jaxpr(wrong)(jnp.ones((LAYERS, WIDTH)), jnp.arange(LAYERS)))
    (eqn,) = loops(closed)
    assert not list(_carried.old_rows(eqn, {len(eqn.invars) - 1}))
