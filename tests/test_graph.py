"""The numbered graph: equal computations are one value, across a user's checkpoint and across a pair of loops."""

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _compat as c
from memopt import _graph, _inline

X = np.linspace(-1.0, 1.0, 16, dtype=np.float32).reshape(4, 4)
WS = np.stack([X * 0.5, X.T, -X])


def graph_of(fn, *args):
    """The graph of a function's inlined jaxpr, dead code dropped."""
    flat = _inline.inline(jax.make_jaxpr(fn)(*args))
    return _graph.Graph(c.close(c.dce(flat)[0], c.jaxpr_consts(flat)))


def count(graph, name) -> int:
    """How many operations of this name the graph holds, over all regions."""
    return sum(op.eqn.primitive.name == name for op in graph.ops)


def block(w, x):
    return jnp.sin(jnp.tanh(x @ w))


def scanned(body):
    return lambda ws, x: jnp.sum(jax.lax.scan(lambda h, w: (body(w, h), None), x, ws)[0])


def test_a_checkpoint_is_merged_with_its_forward():
    plain = graph_of(jax.grad(lambda w, x: jnp.sum(block(w, x))), X, X)
    marked = graph_of(jax.grad(lambda w, x: jnp.sum(jax.checkpoint(block)(w, x))), X, X)
    for name in ("tanh", "sin", "cos"):
        assert count(marked, name) == count(plain, name)


def test_a_checkpoint_in_a_loop_is_merged_with_the_forward_loop():
    graph = graph_of(jax.grad(scanned(jax.checkpoint(block, prevent_cse=False))), WS, X)
    assert count(graph, "tanh") == 1 and count(graph, "scan") == 2


def test_loops_that_hand_stacks_on_are_a_pair():
    graph = graph_of(jax.grad(scanned(block)), WS, X)
    first, second = (op for op in graph.ops if op.eqn.primitive.name == "scan")
    assert first.feeds == [second] and not second.feeds
    assert second.bodies[0].sources == [first.bodies[0].id] and second.mapped


def test_zeros_of_both_signs_stay_apart():
    graph = graph_of(lambda x: (x * 0.0, x * -0.0, x * 0.0), X)
    assert count(graph, "mul") == 2


def test_effects_are_not_merged():
    @jax.jit
    def noisy(x):
        jax.debug.callback(lambda v: None, x)
        return jnp.sin(x)

    graph = graph_of(lambda x: noisy(x) + noisy(x), X)
    assert count(graph, "debug_callback") == 2 and count(graph, "sin") == 1


def test_random_bits_of_one_key_are_one_value():
    def fn(key):
        return jax.random.uniform(key, (3,)) + jax.random.uniform(key, (3,))

    assert count(graph_of(fn, jax.random.key(0)), "random_bits") == 1


def test_a_kernel_is_atomic():
    from jax.experimental import pallas as pl

    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.sin(x_ref[...])

    graph = graph_of(pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, 4), jnp.float32), interpret=True), X)
    (op,) = (op for op in graph.ops if op.eqn.primitive.name == "pallas_call")
    assert not op.bodies and count(graph, "sin") == 0


def test_a_result_that_the_first_of_two_equal_computations_drops_is_kept():
    def function(x):
        largest, _ = jax.lax.top_k(x, 2)
        _, places = jax.lax.top_k(x, 2)
        return largest, places

    closed = jax.make_jaxpr(function)(jnp.arange(5.0))
    graph = _graph.Graph(closed)
    assert not any(isinstance(graph.values[v].var, c.DropVar) for v in graph.top.outs)
