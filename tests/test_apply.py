"""The builders: what is repeated, where it is guarded, what a pair of loops hands on, and what is never repeated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _apply
from memopt import _compat as c
from tests import forced, rewrite_checks

X = np.linspace(-1.0, 1.0, 16, dtype=np.float32).reshape(4, 4)
WS = np.stack([X * 0.5, X.T, -X])


def primitives(jaxpr) -> list[str]:
    """The names of all primitives, bodies included, in order."""
    found = []
    for eqn in c.open_jaxpr(jaxpr).eqns:
        found.append(eqn.primitive.name)
        for _, _, body in c.subjaxprs(eqn.params):
            found += primitives(body)
    return found


def loops(jaxpr) -> list:
    """The scans of the top level, in order."""
    return [e for e in c.open_jaxpr(jaxpr).eqns if e.primitive.name == "scan"]


def applied(closed, share=1.0):
    """The step with everything repeated that may be, and with nothing repeated; both checked."""
    new, kept = forced.force(closed, share=share, late=True), forced.force(closed, share=0.0)
    assert rewrite_checks.type_differences(closed, new) == rewrite_checks.type_differences(closed, kept) == []
    return new, kept


def block(w, x):
    return jnp.sin(jnp.tanh(x @ w))


def deep(w, x):
    return jnp.sum(block(w, block(w, block(w, x))))


def scanned(w, x):
    return jnp.sum(jax.lax.scan(lambda h, v: (block(v, h), None), x, w)[0])


def test_repeats_outside_loops_stand_behind_a_barrier():
    new, kept = applied(jax.make_jaxpr(jax.grad(deep))(X, X))
    assert primitives(kept).count("tanh") == 3 and "optimization_barrier" not in primitives(kept)
    assert primitives(new).count("tanh") > 3
    eqns = c.open_jaxpr(new).eqns
    guarded = {v for e in eqns if e.primitive.name == "optimization_barrier" for v in e.outvars}
    seen: set = set()
    for eqn in (e for e in eqns if e.primitive.name == "dot_general"):
        operands = tuple(eqn.invars), str(eqn.params)
        assert operands not in seen  # XLA would merge two operations on the same operands
        seen.add(operands)
    assert any(v in guarded for e in eqns if e.primitive.name == "dot_general" for v in e.invars)


def test_a_barrier_is_tied_to_the_latest_value():
    new, _ = applied(jax.make_jaxpr(jax.grad(deep))(X, X))
    eqns = c.open_jaxpr(new).eqns
    made = {v: i for i, e in enumerate(eqns) for v in e.outvars}
    barriers = [i for i, e in enumerate(eqns) if e.primitive.name == "optimization_barrier"]
    near = sum(i - max(made.get(v, -1) for v in eqns[i].invars) <= 2 for i in barriers)
    assert barriers and near >= len(barriers) // 2


def test_a_barrier_is_tied_to_no_matmul_that_goes_on_in_element_wise_operations():
    def mlp(w, x):  # its backward pass multiplies the gradient of `tanh` by a slope before a matmul reads it
        for a, b in w:
            x = x + jnp.concatenate([jnp.tanh(x @ a) @ b, x @ b.T @ a.T], 1)[:, :4]
        return jnp.sum(x)

    new, _ = applied(jax.make_jaxpr(jax.grad(mlp))([(X, X)] * 3, X))
    eqns = c.open_jaxpr(new).eqns
    makers = {v: e for e in eqns for v in e.outvars}
    readers: dict = {}
    for eqn in eqns:
        for var in (v for v in eqn.invars if not isinstance(v, c.Literal)):
            readers.setdefault(var, set()).add(eqn.primitive.name)
    tied = [e.invars[-1] for e in eqns if e.primitive.name == "optimization_barrier" and e.invars[-1] in makers]
    assert any(makers[v].primitive.name != "dot_general" for v in tied)
    for var in tied:
        assert makers[var].primitive.name != "dot_general" or "dot_general" in readers[var]
        assert makers[var].primitive.name not in ("concatenate", "pad")


def test_a_pair_of_loops_hands_on_no_residual_that_is_repeated():
    new, kept = applied(jax.make_jaxpr(jax.grad(scanned))(WS, X))
    first, second = loops(new)
    assert len(first.outvars) < len(loops(kept)[0].outvars)
    body = second.params["jaxpr"]
    assert "tanh" in primitives(body) and "tanh" not in primitives(loops(kept)[1].params["jaxpr"])
    assert "optimization_barrier" not in primitives(new)  # inside a paired body there is nothing to merge with


def test_random_bits_are_repeated_from_the_same_key():
    def fn(key, w, x):
        h = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), block(w, x), 0.0)
        return deep(w, h)

    closed = jax.make_jaxpr(jax.grad(fn, argnums=1))(jax.random.key(0), X, X)
    new, kept = applied(closed)
    assert primitives(new).count("random_bits") > primitives(kept).count("random_bits") == 1
    args = jax.random.key(0), X, X
    np.testing.assert_allclose(c.as_function(new)(*args)[0], c.as_function(closed)(*args)[0], rtol=1e-4, atol=1e-6)


def test_effects_are_never_repeated():
    def noisy(w, x):
        jax.debug.callback(lambda v: None, x[0, 0])
        return block(w, x)

    def fn(w, x):
        return jnp.sum(jax.lax.scan(lambda h, v: (noisy(v, h), None), noisy(w[0], x), w)[0])

    new, _ = applied(jax.make_jaxpr(jax.grad(fn))(WS, X))
    assert primitives(new).count("debug_callback") == 2


def test_a_loop_with_an_effect_is_never_repeated():
    def fn(w, x):
        def body(h, v):
            jax.debug.callback(lambda v: None, h[0, 0])
            return jnp.sin(h) @ v, None

        return deep(w[0], jax.lax.scan(body, x, jax.lax.stop_gradient(w))[0])

    closed = jax.make_jaxpr(jax.grad(fn))(WS, X)
    survey = forced.survey_of(closed)
    effectful = {op.id for op in survey.graph.ops if op.eqn.effects}
    assert effectful and not effectful & {i for ops in forced.repeatable(survey).values() for i in ops}


def test_a_kernel_is_repeated_whole():
    from jax.experimental import pallas as pl

    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.sin(x_ref[...]) * 2.0

    def fn(w, x):
        h = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, 4), jnp.float32), interpret=True)(x)
        return deep(w, h)

    closed = jax.make_jaxpr(jax.grad(fn))(X, X)
    new, kept = applied(closed)
    bodies = {id(e.params["jaxpr"]) for e in c.open_jaxpr(new).eqns if e.primitive.name == "pallas_call"}
    assert primitives(new).count("pallas_call") > primitives(kept).count("pallas_call") == 1 and len(bodies) == 1


def test_a_literal_that_a_loop_takes_is_taken_over():
    def body(scale, h, v):
        return jnp.sin(h * scale) * jnp.tanh(h @ v), None

    def fn(w, x):
        loop = jax.jit(lambda scale, w, x: jnp.sum(jax.lax.scan(functools.partial(body, scale), x, w)[0]))
        return loop(jnp.float32(2.0), w, x)

    closed = jax.make_jaxpr(jax.grad(fn, argnums=1))(WS, X)
    new, kept = applied(closed)
    assert any(isinstance(v, c.Literal) for v in loops(kept)[0].invars)
    assert any(isinstance(v, c.Literal) for v in loops(new)[1].invars)
    np.testing.assert_allclose(c.as_function(new)(WS, X)[0], c.as_function(closed)(WS, X)[0], rtol=1e-4, atol=1e-6)


def test_the_index_of_a_cond_is_not_behind_a_barrier():
    def fn(flag, w, x):
        h = jax.lax.cond(flag, lambda v: jnp.sin(v @ w), jnp.tanh, x)
        return deep(w, h)

    closed = jax.make_jaxpr(jax.grad(fn, argnums=1))(np.bool_(True), X, X)
    survey = forced.survey_of(closed)
    first = next(op for op in survey.graph.ops if op.eqn.primitive.name == "cond")
    last = survey.graph.top.ops[-1].bin
    new, _ = _apply.apply(survey.graph, {p: frozenset([first.id]) for p in range(first.bin + 1, last + 1)})
    eqns = c.open_jaxpr(new).eqns
    guarded = {v for e in eqns if e.primitive.name == "optimization_barrier" for v in e.outvars}
    conds = [e for e in eqns if e.primitive.name == "cond" and any(v in guarded for v in e.invars)]
    assert conds and not any(e.invars[0] in guarded for e in conds)


def test_barriers_hold_values_of_the_same_varying_axes():
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def local(w, x):
        def loss(v):
            h = jax.lax.scan(lambda h, _: (block(v, h), None), block(v, x), None, length=2)[0]
            return jax.lax.psum(deep(v, h), "d")

        return jax.grad(loss)(w)

    closed = jax.make_jaxpr(jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec()))(X, X)
    new, _ = applied(closed)
    assert "optimization_barrier" in primitives(new)
    np.testing.assert_allclose(
        jax.jit(c.as_function(new))(X, X)[0], jax.jit(c.as_function(closed))(X, X)[0], rtol=1e-4, atol=1e-5
    )


def test_nothing_repeated_changes_no_operation():
    closed = jax.make_jaxpr(jax.grad(deep))(X, X)
    survey = forced.survey_of(closed)
    new, bins = _apply.apply(survey.graph, {})
    assert primitives(new) == primitives(survey.graph.closed) and set(bins.values()) <= set(range(survey.bins))
