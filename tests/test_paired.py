"""Bodies in pairs beyond two loops of one region: loops in paired loops, branches of a `cond`, maps, each in others.

Every program is differentiated in float64; forced repeats of all shares must give the step's own values, twice. What is
paired is asserted on the graph, what is saved on the planner's ladder.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt import _rerun, _split
from memopt._planner import ladder_of_plan, make_ladder
from memopt._plans import Plans
from memopt.passes import Remat
from tests import forced

W = 4
CPU = forced.Target.parse("cpu")


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.5)


def rnn_a_layer():
    """A recurrent net in each of the scanned layers."""

    def loss(ws, xs):
        def cell(w, h, x):
            h = jnp.tanh(h @ w[0] + jnp.sin(x @ w[1]))
            return h, jnp.cos(h) * x

        def layer(xs, w):
            h, ys = jax.lax.scan(functools.partial(cell, w), jnp.zeros((2, W)), xs)
            return xs + ys + h[None], None

        return (jax.lax.scan(layer, xs, ws)[0] ** 2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, 3, 2, W, W), draw(1, 5, 2, W))


def chunked_attention():
    """Attention over chunks of queries in each of the scanned layers."""

    def loss(ws, x):
        def layer(x, w):
            q, k, v = x @ w[0], x @ w[1], x @ w[2]
            chunk = lambda _, q: (None, jax.nn.softmax(q @ k.T, -1) @ v)  # noqa: E731
            o = jax.lax.scan(chunk, None, q.reshape(2, 3, W))[1]
            return x + o.reshape(6, W), None

        return (jax.lax.scan(layer, x, ws)[0] ** 2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, 3, 3, W, W), draw(1, 6, W))


def three_levels():
    """A loop in a loop in a loop, with keys as slices of the innermost."""

    def loss(w, x, keys):
        def inner(h, key):
            return jnp.sin(h @ w) + jax.random.normal(key, h.shape, h.dtype), h.sum()

        def middle(h, keys):
            h, s = jax.lax.scan(inner, h, keys)
            return jnp.tanh(h) * s.mean(), s

        def outer(h, keys):
            h, s = jax.lax.scan(middle, h, keys)
            return h + s.sum(), None

        return (jax.lax.scan(outer, x, keys)[0] ** 2).sum()

    keys = jax.random.split(jax.random.key(0), (2, 3, 2))
    return jax.value_and_grad(loss, (0, 1)), (draw(0, W, W), draw(1, 3, W), keys)


def two_inner_loops():
    """Two inner loops, one of which reads what the other stacks, the second from the end."""

    def loss(ws, xs):
        def layer(xs, w):
            first = jax.lax.scan(lambda h, x: (jnp.sin(h @ w + x), h), xs[0], xs)[1]
            second = jax.lax.scan(lambda h, x: (jnp.cos(h @ w) * x, h + x), xs[1], first, reverse=True)[1]
            return xs + second * first, None

        return (jax.lax.scan(layer, xs, ws)[0] ** 2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, 3, W, W), draw(1, 5, 2, W))


def accumulated_inside():
    """Microbatches around scanned layers, differentiated through from outside (one step of meta learning)."""

    def loss(ws, batches):
        def inner_loss(ws, x):
            return (jax.lax.scan(lambda h, w: (jnp.sin(h @ w) + h, None), x, ws)[0] ** 2).sum()

        def one(total, x):
            return total + jax.grad(inner_loss)(ws, x), None

        grads = jax.lax.scan(one, jnp.zeros_like(ws), batches)[0]
        return inner_loss(ws - 0.1 * grads, batches[0])

    return jax.value_and_grad(loss), (draw(0, 3, W, W), draw(1, 2, 3, W))


def branch_a_layer():
    """A `cond` in the body of scanned layers."""

    def loss(ws, x):
        def layer(x, w):
            yes, no = (lambda x: jnp.sin(jnp.tanh(x @ w) @ w)), (lambda x: jnp.cos(x) * w[:1])
            return jax.lax.cond(x.sum() > 0, yes, no, x) + 1.0, None

        return (jax.lax.scan(layer, x, ws)[0] ** 2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, 3, W, W), draw(1, 3, W))


def switches():
    """Unrolled switches, with a loop in one branch and scalars and integers in another."""

    def loss(w, x):
        for i in range(3):
            loop = lambda x: jax.lax.scan(lambda h, _: (jnp.sin(h @ w), None), x, length=3)[0]  # noqa: E731
            part = lambda x: jnp.where(jnp.arange(W)[None] < 2, jnp.exp(-(x.mean() ** 2)) * x, x)  # noqa: E731
            wide = lambda x: jnp.sin(jnp.tanh(x @ w) @ w)  # noqa: E731
            x = x + jax.lax.switch((x.sum() > 0).astype(int) + i % 2, [wide, part, loop], x)
        return (x**2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, W, W), draw(1, 3, W))


def _bend(w, x):
    return jnp.tanh(x @ w) + jnp.exp(-x * x)


def _turn(w, x):
    return jnp.sin(x @ w) * x


def branches_traced_once():
    """Conditions whose branches are the same functions: JAX traces them once, and they hold the same variables."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def layer(w, x, i):
        return x + jax.lax.switch(i, [_bend, _turn, _turn], w, x)

    def loss(w, x):
        index = (x.sum() > 0).astype(int)
        for _ in range(3):
            x = layer(w, x, index)
        return (x**2).sum()

    def penalty(w, x):
        return loss(w, x) + (jax.grad(loss)(w, x) ** 2).sum()

    return jax.value_and_grad(penalty, (0, 1)), (draw(0, W, W), draw(1, 3, W))


def _cell(w, h, x):
    h = jnp.tanh(h @ w + jnp.sin(x @ w))
    return h, jnp.cos(h) * x


def loops_traced_once():
    """Two loops over one traced body, whose stacks one and the same later loops read."""

    def loss(ws, xs):
        def body(carry, x):
            h, k = carry
            return (jnp.sin(h @ ws[0] + x), jnp.cos(k @ ws[1]) * x), h * k

        def layer(xs, w):
            cell = functools.partial(_cell, w)
            one = jax.lax.scan(cell, xs[0], xs)[1]
            two = jax.lax.scan(cell, xs[1], one)[1]
            return jax.lax.scan(body, (xs[0], xs[1]), one * two)[1] + xs, None

        return (jax.lax.scan(layer, xs, ws)[0] ** 2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, 3, W, W), draw(1, 5, 2, W))


def two_pulls():
    """Two cotangents pulled back through one `cond` in a loop."""

    def step(w, x):
        def run(w, x):
            body = lambda x, _: (jax.lax.cond(x[0, 0] > 0, jnp.sin, lambda x: jnp.tanh(x @ w), x), x.sum())  # noqa: E731
            x, s = jax.lax.scan(body, x, length=4)
            return x.sum(), s

        (a, s), pull = jax.vjp(run, w, x)
        return a, pull((jnp.ones_like(a), jnp.zeros_like(s))), pull((a, s))

    return step, (draw(0, W, W), draw(1, 3, W))


def mapped(check_vma, scanned):
    """A differentiated `shard_map`, which leaves two of them, with a scalar between; layers unrolled or scanned."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def layer(x, w):
        h = jnp.tanh(x @ w)
        shared = jax.lax.pmean(jnp.square(h).mean(), "d")
        return jnp.sin(h @ w) * jnp.exp(-shared) * h.sum() + jnp.cos(h), None

    def local(ws, x):
        if scanned:
            return jax.lax.scan(layer, x, ws)[0]
        for w in ws:
            x, _ = layer(x, w)
        return x

    def loss(ws, x):
        specs = (spec(), spec("d"))
        y = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec("d"), check_vma=check_vma)(ws, x)
        return (y**2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, 2, W, W), draw(1, 6, W))


def maps():
    return mapped(True, False)


def unchecked_maps():
    return mapped(False, False)


def loops_in_maps():
    return mapped(True, True)


def keys_in_a_branch():
    """Typed keys in a branch, which no other branch can fill in for: it stays as it was."""

    def loss(w, x, key):
        noisy = lambda x: jnp.sin(x @ w) * jax.random.normal(jax.random.split(key)[0], x.shape, x.dtype)  # noqa: E731
        return (jax.lax.cond(x[0, 0] > 0, noisy, jnp.cos, x) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1)), (draw(0, W, W), draw(1, 3, W), jax.random.key(0))


NESTED = (rnn_a_layer, chunked_attention, three_levels, two_inner_loops, accumulated_inside)
BRANCHES = (branch_a_layer, switches, branches_traced_once, loops_traced_once, two_pulls)
MAPS = (maps, unchecked_maps, loops_in_maps)
PROGRAMS = {f.__name__: f for f in (*NESTED, *BRANCHES, *MAPS, keys_in_a_branch)}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def traced(name):
    fn, args = PROGRAMS[name]()
    return jax.jit(fn).trace(*args).jaxpr, jax.tree.leaves(args)


def assert_equal_values(name, news):
    """Run all rewrites and the step as written as one program, twice."""
    closed, args = traced(name)
    for new in news:
        c.check(new)
        assert [v.aval for v in c.open_jaxpr(new).outvars] == [v.aval for v in c.open_jaxpr(closed).outvars]
    every = jax.jit(lambda *xs: [c.as_function(one)(*xs) for one in (closed, *news)])
    compiled = every.lower(*args).compile(compiler_options=QUICK)
    for _ in range(2):
        want, *found = compiled(*args)
        for got in found:
            for a, b in zip(want, got, strict=True):
                assert np.linalg.norm(a - b) <= 1e-12 * max(1.0, np.linalg.norm(a))


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_kept_whatever_is_repeated(name):
    with jax.enable_x64(True):
        closed, _ = traced(name)
        assert_equal_values(name, [forced.force(closed, share=s, seed=k) for k, s in enumerate((0.0, 0.3, 0.6, 1.0))])


def pairs(name):
    """Return `(primitive, whether the reader stands in another region)` of all pairs."""
    with jax.enable_x64(True):
        graph = forced.survey_of(traced(name)[0]).graph
    return {(op.eqn.primitive.name, op.region != reader.region) for op in graph.ops for reader in op.feeds}


def test_what_is_paired():
    for program in NESTED:
        assert ("scan", True) in pairs(program.__name__), program
    assert ("cond", True) in pairs("branch_a_layer") and ("cond", True) in pairs("two_pulls")
    assert pairs("switches") == {("cond", False), ("scan", True)}
    assert pairs("maps") == pairs("unchecked_maps") == {("shard_map", False)}
    assert pairs("loops_in_maps") == {("shard_map", False), ("scan", True)}
    assert not pairs("keys_in_a_branch")


@pytest.mark.parametrize("name", ["rnn_a_layer", "chunked_attention", "three_levels"])
def test_inner_loops_run_again(name):
    with jax.enable_x64(True):
        flat = forced.survey_of(traced(name)[0]).graph.closed
        again = _rerun.rerun(flat)
        assert_equal_values(name, [again, forced.force(again, share=0.5, seed=1)])
        nested = [_rerun.has_nested(forced.survey_of(one).graph) for one in (flat, again)]
        assert nested == [True, name == "three_levels"]  # there the innermost loops of the middle one's pair are left


def test_loops_that_read_each_other_do_not_run_again():
    with jax.enable_x64(True):
        assert _rerun.rerun(forced.survey_of(traced("two_inner_loops")[0]).graph.closed) is None
        assert _rerun.rerun(jax.make_jaxpr(jnp.sin)(1.0)) is None


def test_stores_come_through_every_level():
    with jax.enable_x64(True):
        for name in ("rnn_a_layer", "three_levels", "branch_a_layer", "switches"):
            assert_equal_values(name, [forced.stored(seed)(traced(name)[0]) for seed in (0, 1)])


def layered(inner):
    """A step of 8 layers over 64 rows of 128, as shapes."""

    def loss(ws, xs):
        return (jax.lax.scan(inner, xs, ws)[0] ** 2).sum()

    return jax.value_and_grad(loss), (jnp.zeros((8, 2, 128, 128), jnp.float32), jnp.zeros((16, 64, 128), jnp.float32))


def recurrent_layer(xs, w):
    def cell(h, x):
        gate = jax.nn.sigmoid(h @ w[0])
        h = gate * jnp.tanh(x @ w[1]) + h * (1.0 - gate)
        return h, jnp.sin(h) * x

    return xs + jax.lax.scan(cell, jnp.zeros_like(xs[0]), xs)[1], None


def branching_layer(xs, w):
    yes, no = (lambda x: jnp.tanh(jnp.sin(x @ w[0]) @ w[1])), (lambda x: jnp.cos(jnp.tanh(x @ w[1])))
    return xs + jax.lax.cond(xs[0, 0, 0] > 0, yes, no, xs), None


@pytest.mark.parametrize(("inner", "share"), [(recurrent_layer, 0.75), (branching_layer, 0.9)])
def test_memory_falls_without_a_matmul_run_again(inner, share):
    """What costs no matmul is repeated inside the inner body: an inner loop or branch that is atomic cannot."""
    fn, args = layered(inner)
    closed = jax.make_jaxpr(fn)(*args)
    ladder = make_ladder(closed, donated=(False,) * 2, target=CPU, passes=[Remat()])
    free = [r for r in ladder.rungs if r.recompute_flops == 0]
    assert free[-1].predicted_peak_bytes < share * ladder.rungs[0].predicted_peak_bytes
    assert ladder.rungs[-1].predicted_peak_bytes < 0.6 * ladder.rungs[0].predicted_peak_bytes


def test_a_plan_with_inner_loops_run_again_is_saved():
    fn, args = layered(recurrent_layer)
    closed = jax.make_jaxpr(fn)(*args)
    common = {"donated": (False,) * 2, "target": CPU, "passes": [Remat()]}
    ladder = make_ladder(closed, **common)
    index, rung = next((i, r) for i, r in enumerate(ladder.rungs) if r.step.variant == _split.RERUN)
    text = Plans((ladder.plan(index),)).to_json()
    again = ladder_of_plan(closed, Plans.from_json(text), **common).rungs[-1]
    assert again.predicted_peak_bytes == rung.predicted_peak_bytes
    assert "Inner loops run again" in str(Plans.from_json(text).plans[0])


@pytest.mark.parametrize("inner", [recurrent_layer, branching_layer])
def test_the_decorator_runs_such_steps(inner):
    fn, args = layered(inner)
    args = [jax.random.normal(jax.random.key(i), a.shape, a.dtype) * 0.1 for i, a in enumerate(args)]
    step = memopt.optimize(fn, budget="70%", target="cpu", passes=[Remat()], verify=False)
    want = jax.jit(fn)(*args)
    for _ in range(2):
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(step(*args)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
