"""Inlining: plain calls dissolve with their names, what carries a meaning of its own stays, values are the same."""

import jax
import jax.numpy as jnp
import numpy as np

import memopt
from memopt import _compat as c
from memopt import _inline

X = np.linspace(-1.0, 1.0, 16, dtype=np.float32).reshape(4, 4)


def primitives(jaxpr) -> list[str]:
    """The names of all primitives, bodies included, in order."""
    found = []
    for eqn in c.open_jaxpr(jaxpr).eqns:
        found.append(eqn.primitive.name)
        for _, _, body in c.subjaxprs(eqn.params):
            found += primitives(body)
    return found


def layer(x):
    return jnp.sin(jnp.tanh(x @ x))


def checkpointed(x):
    return jnp.sum(jax.checkpoint(layer)(x))


def test_closed_calls_dissolve_whatever_jax_names_them():
    body = jax.make_jaxpr(layer)(X)
    x, out = c.Var(body.in_avals[0]), c.Var(body.out_avals[0])
    base = c.open_jaxpr(body)
    like = base.eqns[0]
    eqn = c.new_eqn([x], [out], c.closed_call_p, {"call_jaxpr": body}, c.no_effects, like.source_info, like.ctx)
    closed = c.close(c.rebuild(base, invars=[x], outvars=[out], eqns=[eqn]))
    assert primitives(_inline.inline(closed)) == primitives(body)
    np.testing.assert_allclose(c.as_function(closed)(X)[0], c.as_function(body)(X)[0], rtol=1e-6)


def test_checkpoint_and_jit_dissolve():
    closed = jax.make_jaxpr(jax.grad(lambda x: jax.jit(checkpointed)(x)))(X)
    assert {"remat2", "checkpoint"} & set(primitives(closed))
    flat = _inline.inline(closed)
    assert not {"remat2", "checkpoint", "jit", "pjit"} & set(primitives(flat))
    c.check(flat)
    np.testing.assert_allclose(c.as_function(flat)(X)[0], c.as_function(closed)(X)[0], rtol=1e-5)


def test_checkpoint_stays_when_respected():
    closed = jax.make_jaxpr(jax.grad(checkpointed))(X)
    found = primitives(_inline.inline(closed, respect_checkpoint=True))
    assert sum(n in ("remat2", "checkpoint") for n in found) == 1


def test_a_call_that_donates_stays():
    closed = jax.make_jaxpr(lambda x: jax.jit(layer, donate_argnums=0)(x * 2))(X)
    assert {"jit", "pjit"} & set(primitives(_inline.inline(closed)))


def test_calls_inside_loop_bodies_dissolve():
    def fn(x):
        return jax.lax.scan(lambda h, _: (jax.jit(layer)(h), None), x, None, length=3)[0]

    found = primitives(_inline.inline(jax.make_jaxpr(fn)(X)))
    assert "scan" in found and "tanh" in found and not {"jit", "pjit"} & set(found)


def test_names_of_calls_are_put_before_the_inner_ones():
    def fn(x):
        with jax.named_scope("outer"):
            return jax.jit(middle)(x)

    def middle(x):
        with jax.named_scope("middle"):
            return jax.jit(inner)(x)

    def inner(x):
        with jax.named_scope("inner"):
            return jnp.sin(x)

    flat = _inline.inline(jax.make_jaxpr(fn)(X))
    (eqn,) = (e for e in c.open_jaxpr(flat).eqns if e.primitive.name == "sin")
    parts = str(c.name_stack(eqn)).split("/")
    assert [p for p in parts if p in ("outer", "middle", "inner")] == ["outer", "middle", "inner"]


def test_one_jaxpr_called_twice_gives_variables_of_its_own():
    f = jax.jit(layer)
    flat = _inline.inline(jax.make_jaxpr(lambda x: f(f(x)))(X))
    made = [v for e in c.open_jaxpr(flat).eqns for v in e.outvars]
    assert primitives(flat).count("tanh") == 2 and len(made) == len(set(made))


def test_a_loop_body_closes_over_no_constants():
    table = jnp.asarray(np.arange(4, dtype=np.float32))

    def fn(x):
        return jax.lax.scan(lambda h, _: (jax.jit(lambda v: v * table[None, :])(h), None), x, None, length=2)[0]

    flat = _inline.inline(jax.make_jaxpr(fn)(X))
    bodies = [e.params["jaxpr"] for e in c.open_jaxpr(flat).eqns if e.primitive.name == "scan"]
    assert len(bodies) == 1 and not c.jaxpr_consts(bodies[0])
    np.testing.assert_allclose(c.as_function(flat)(X)[0], X * np.arange(4, dtype=np.float32)[None, :] ** 2)


def test_equations_without_a_user_line_take_that_of_the_call():
    def step(x):
        first = jax.nn.log_softmax(x)
        return jax.nn.log_softmax(first * 2)

    flat = _inline.inline(jax.make_jaxpr(step)(X))
    lines = [c.user_source(eqn).split(":")[1] for eqn in c.open_jaxpr(flat).eqns]
    first = step.__code__.co_firstlineno + 1
    count = (len(lines) - 1) // 2
    assert lines == [str(first)] * count + [str(first + 1)] * (count + 1)  # the product stands on the second line


def test_equations_with_a_user_line_keep_it_under_a_call():
    flat = _inline.inline(jax.make_jaxpr(jax.jit(layer))(X))
    (line,) = {c.user_source(eqn).split(":")[1] for eqn in c.open_jaxpr(flat).eqns}
    assert line == str(layer.__code__.co_firstlineno + 1)


def test_what_jax_lowers_itself_is_lowered_inside_loops():
    def loss(w, x):
        def body(c, _):
            place = jnp.searchsorted(jnp.linspace(-1.0, 1.0, 64), c[:, 0])
            return jnp.tanh(c @ w) * (1.0 + place[:, None].astype(c.dtype) / 64), None

        return jax.lax.scan(body, x, None, length=4)[0].sum()

    def step(w, x):
        value, grads = jax.value_and_grad(loss)(w, x)
        return w - grads, value

    w, x = jnp.full((64, 64), 0.01), jnp.ones((256, 64))
    planned = memopt.optimize(step, budget="95%", verify=False)
    for got, expected in zip(planned(w, x), jax.jit(step)(w, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert "call_hi_primitive" not in primitives(planned.trace(w, x).jaxpr)
