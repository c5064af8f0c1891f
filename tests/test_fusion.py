"""Which values XLA puts in memory: each named fact of `memopt._fusion` on the smallest jaxpr that shows it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from memopt import _timeline_graph as tg
from memopt._fusion import Fusion, materialised

WIDTH = 256
SQUARE = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)


def stored(function, *shapes, platform="tpu"):
    """Return the names of the primitives whose results get a buffer."""
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    kept = materialised(jaxpr, platform)
    return [eqn.primitive.name for eqn in jaxpr.eqns if any(var in kept for var in eqn.outvars)]


def fused(function, *shapes):
    graph = tg.flatten(jax.make_jaxpr(function)(*shapes).jaxpr, "tpu")
    return graph, Fusion(graph)


def matmul(x, y):
    return lax.dot_general(x, y, (((1,), (0,)), ((), ())))


@pytest.mark.parametrize("platform, names", [("tpu", ["sub"]), ("cpu", ["dot_general", "sub"])])
def test_a_gradient_is_made_in_the_kernel_of_its_update(platform, names):
    assert stored(lambda w, x, y: w - matmul(x, y), SQUARE, SQUARE, SQUARE, platform=platform) == names


def test_what_a_gradient_needs_lives_until_its_update():
    def step(w, x, y):
        early = matmul(lax.sort(x), y)
        late = lax.sort(lax.sort(y, dimension=0), dimension=0)
        return w - (early + late)

    graph, fusion = fused(step, SQUARE, SQUARE, SQUARE)
    names = [op.name for op in graph.ops]
    first = graph.ops[names.index("sort")].outs[0]
    assert graph.ops[names.index("dot_general")].outs[0] not in fusion.stored
    assert fusion.last[first] >= len(names) - 1 - names[::-1].index("sort")


def test_an_update_takes_the_kernel_of_one_matmul_only():
    def step(w, x, y):
        return w - (matmul(x, y) + matmul(y, x))

    assert stored(step, SQUARE, SQUARE, SQUARE) == ["dot_general", "sub"]


@pytest.mark.parametrize("dead", [0, 2])
def test_a_kernel_that_nothing_waits_for_runs_before_the_next_that_makes_as_much(dead):
    def step(w, x, y):
        made = lax.sort(x)
        updated = w - matmul(made, y)
        other = lax.neg(lax.reduce_max(y, (0, 1)))
        for _ in range(dead):
            lax.sort(x)
        return updated, lax.sort(lax.sort(y)), other

    graph, fusion = fused(step, SQUARE, SQUARE, SQUARE)
    made, second = [i for i, op in enumerate(graph.ops) if op.name == "sort" and op.live][:2]
    assert fusion.last[graph.ops[made].outs[0]] == second - 1 - dead
    assert graph.ops[second - 1 - dead].live


def test_an_error_function_is_not_computed_twice():
    def twice(function):
        def step(x, y):
            value = function(matmul(x, y))
            return matmul(value, x), matmul(value, y)

        return step

    assert "erf" in stored(twice(lax.erf), SQUARE, SQUARE)
    assert "tanh" not in stored(twice(lax.tanh), SQUARE, SQUARE)


@pytest.mark.parametrize("dtype, repeated", [(jnp.bfloat16, True), (jnp.float32, False)])
def test_matmuls_compute_a_product_again_unless_it_is_made_of_something_larger(dtype, repeated):
    def step(x, y, z):
        wide = lax.sort(matmul(x, y).astype(dtype))
        product = (wide * lax.sort(matmul(y, x)).astype(dtype)).astype(jnp.bfloat16)
        return matmul(product, z), matmul(z, product)

    graph, fusion = fused(step, SQUARE, SQUARE, SQUARE)
    made = [v for op in graph.ops if op.name in ("mul", "convert_element_type") for v in op.outs]
    wanted = [v for v in made if v in fusion.stored and graph.avals[v].dtype == jnp.bfloat16]
    assert (not wanted) == repeated


@pytest.mark.parametrize("prevented", [True, False])
def test_a_checkpoint_reads_behind_a_barrier(prevented):
    def loss(w, x):
        block = jax.checkpoint(lambda x: jnp.sin(matmul(jnp.sin(matmul(x, w)), w)), prevent_cse=prevented)
        return block(jnp.cos(matmul(x, x))).sum()

    graph = tg.flatten(jax.make_jaxpr(jax.grad(loss))(SQUARE, SQUARE).jaxpr, "tpu")
    made = [v for v in graph.forced if graph.maker[v] >= 0]
    assert bool(made) == prevented
