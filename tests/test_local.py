"""Tests of what each device holds of a sharded step's values: specs, the twin, and what the compiled program tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memopt import _compat as c
from memopt import _cost, _local, _local_hlo

P = PartitionSpec


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def local_of(fn, mesh, specs, *shapes, compiled=None):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    closed = jax.make_jaxpr(fn)(*args)
    shardings = tuple(None if s is None else NamedSharding(mesh, s) for s in specs)
    return closed, _local.local_shapes(closed, _local.Shardings(shardings, None, compiled))


def outputs(fn, mesh, specs, *shapes):
    closed, local = local_of(fn, mesh, specs, *shapes)
    twin = c.open_jaxpr(local.twin(closed))
    return [v.aval.shape for v in twin.outvars]


def _layer(h, w):
    return jnp.tanh(h @ w), h


CASES = {
    "elementwise": (lambda x, y: jnp.sin(x) + y, (P("data"), P()), ((8, 6), (8, 6)), (2, 6)),
    "matmul": (lambda x, w: x @ w, (P("data"), P(None, "model")), ((8, 6), (6, 4)), (2, 2)),
    "contracted": (lambda x, w: x @ w, (P(None, "data"), P("data")), ((6, 8), (8, 4)), (6, 4)),
    "gathered weight": (lambda x, w: x @ w, (P("data"), P("data")), ((8, 8), (8, 4)), (2, 4)),
    "batched": (
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
        (P("data"), P("data")),
        ((8, 2, 3), (8, 3, 5)),
        (2, 2, 5),
    ),
    "sum": (lambda x: x.sum(0), (P("data", "model"),), ((8, 4),), (2,)),
    "transpose": (lambda x: x.T, (P("data"),), ((8, 6),), (6, 2)),
    "heads": (lambda x: x.reshape(8, 4, 6), (P("data", "model"),), ((8, 24),), (2, 2, 6)),
    "broadcast": (lambda x, b: x * b, (P("data"), P()), ((8, 6), (1, 6)), (2, 6)),
    "slice": (lambda x: x[:, 1:4], (P("data"),), ((8, 6),), (2, 3)),
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), (P(("data", "model")),), ((8, 6),), (1, 6)),
    "cumsum": (lambda x: jnp.cumsum(x, axis=1), (P("data"),), ((8, 6),), (2, 6)),
    "uneven": (lambda x: x * 2, (P("data"),), ((9, 6),), (3, 6)),
    "scan": (lambda w, x: jax.lax.scan(_layer, x, w)[1], (P(), P("data")), ((5, 6, 6), (8, 6)), (5, 2, 6)),
    "jit": (lambda x: jax.jit(jnp.cos)(x), (P("data"),), ((8, 6),), (2, 6)),
    "cond": (lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), (P("data"),), ((8, 6),), (2, 6)),
    "constraint": (lambda x: jax.lax.with_sharding_constraint(x * 2, None), (P("data"),), ((8, 6),), (2, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_local_shape_of_the_output(name, mesh):
    fn, specs, shapes, expected = CASES[name]
    if name == "constraint":
        fixed = NamedSharding(mesh, P(None, "model"))
        fn, expected = (lambda x: jax.lax.with_sharding_constraint(x * 2, fixed)), (8, 3)
    assert outputs(fn, mesh, specs, *shapes) == [expected]


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("constraint", "uneven")])
def test_shapes_are_those_that_xla_chooses(name, mesh):
    fn, specs, shapes, expected = CASES[name]
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    compiled = jax.jit(fn).lower(*args).compile()
    out = jax.eval_shape(fn, *args)
    assert compiled.output_shardings.shard_shape(out.shape) == expected


def test_embedding_and_its_gradient(mesh):
    def grad(table, tokens):
        return jax.grad(lambda t: jnp.take(t, tokens.astype(jnp.int32), axis=0).sum())(table)

    closed, local = local_of(grad, mesh, (P(), P("data")), (16, 6), (8, 3))
    shapes = {v.aval.shape for e in c.open_jaxpr(local.twin(closed)).eqns for v in e.outvars}
    assert (2, 3, 6) in shapes and (8, 3, 6) not in shapes


def test_flops_and_collectives_are_those_of_one_device(mesh):
    closed, local = local_of(lambda x, w: x @ w, mesh, (P("data"), P("data")), (8, 8), (8, 4))
    twin = local.twin(closed)
    assert _cost.matmul_flops(twin) == _cost.matmul_flops(closed) / 4
    (call,) = c.open_jaxpr(twin).eqns
    assert [e.primitive.name for e in c.open_jaxpr(call.params["call_jaxpr"]).eqns] == ["all_gather", "dot_general"]


def test_gradient_of_a_sharded_parameter_is_scattered(mesh):
    def step(w, x):
        return w - jax.grad(lambda w: (x @ w).sum())(w)

    closed, local = local_of(step, mesh, (P("data"), P("data")), (8, 4), (16, 8))
    twin = c.open_jaxpr(local.twin(closed))
    assert twin.outvars[0].aval.shape == (2, 4)
    calls = [c.open_jaxpr(e.params["call_jaxpr"]).eqns for e in twin.eqns if "call_jaxpr" in e.params]
    gradient = [[e.primitive.name for e in eqns] for eqns in calls if eqns[0].primitive.name == "dot_general"]
    assert gradient == [["dot_general", "reduce_scatter"]]


def test_sums_over_devices_are_in_memory_before_they_are_added_up(mesh):
    """Else what comes after a matmul would be computed in its kernel."""
    closed, local = local_of(lambda x, w: jnp.tanh(x @ w), mesh, (P(None, "data"), P("data")), (6, 8), (8, 4))
    eqns = c.open_jaxpr(local.twin(closed)).eqns
    assert [e.primitive.name for e in c.open_jaxpr(eqns[0].params["call_jaxpr"]).eqns] == [
        "dot_general",
        "optimization_barrier",
    ]
    whole, local = local_of(lambda x, w: jnp.tanh(x @ w), mesh, (P("data"), P()), (8, 8), (8, 4))
    assert [e.primitive.name for e in c.open_jaxpr(local.twin(whole)).eqns] == ["dot_general", "tanh"]


def test_a_chain_is_passed_along_a_few_times_however_long_it_is(mesh, monkeypatch):
    def chain(x):
        for _ in range(40):
            x = jnp.sin(x)
        return x

    real, calls = _local.Spread._pass_on, []
    monkeypatch.setattr(_local.Spread, "_pass_on", lambda self, *args: calls.append(self) or real(self, *args))
    closed, local = local_of(chain, mesh, (P("data", "model"),), (8, 6))
    assert local.divisors(c.open_jaxpr(closed).outvars[0]) == (4, 2)
    assert len(calls) <= 4 * len(calls[0].factors)


def test_unsharded_arguments_need_no_local():
    closed = jax.make_jaxpr(jnp.sin)(jnp.ones(3))
    assert _local.local_shapes(closed, _local.Shardings((None,))) is None
    assert _local.local_shapes(closed, _local.Shardings((jnp.ones(3).sharding,))) is None


def unknown(x):
    return jnp.fft.fft(x).real * 2


def test_unknown_values_come_from_the_compiled_program(mesh):
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    compiled = jax.jit(unknown).lower(x).compile()
    _, local = local_of(unknown, mesh, (P("data"),), (8, 64), compiled=lambda: compiled)
    assert len(local.notes) == 1 and "plain step's compiled program" in local.notes[0]


def test_unknown_values_without_a_compiled_program_count_as_unsharded(mesh):
    closed, local = local_of(unknown, mesh, (P("data"),), (8, 64))
    fft = next(e for e in c.open_jaxpr(closed).eqns if e.primitive.name == "fft" or "jaxpr" in e.params)
    assert local.divisors(fft.outvars[0]) == (1, 1)
    assert "the plain step was not compiled: counted as unsharded" in local.notes[0]


def test_reading_a_compiled_program():
    text = """
      %all-gather = f32[8,4]{1,0} all-gather(%a), metadata={op_name="jit(f)/while/body/closed_call/m/tanh"}
      ROOT %t = f32[2,4]{1,0} tanh(%b), metadata={op_name="jit(f)/while/body/closed_call/m/tanh" stack_frame_id=1}
      %s = (f32[2]{0}, s32[2]{0}) sort(%b, %d), dimensions={0}, metadata={op_name="jit(f)/jit(g)/sort"}
    """
    known = _local_hlo.parts(text)
    assert _local_hlo.find(known, "m", "tanh", [(8, 4)]) == [(2, 4)]
    assert _local_hlo.find(known, "", "sort", [(8,), (8,)]) == [(2,), (2,)]
    assert _local_hlo.find(known, "other", "tanh", [(8, 4)]) is None
    assert _local_hlo.find(known, "m", "tanh", [(1, 4)]) is None


def test_parts_of_an_axis_become_an_axis():
    sizes = {"data": 8}
    assert _local.spec_of_shape((16, 4), (4, 4), sizes) == (("data:4",), ())
    assert sizes == {"data": 8, "data:4": 4}
    assert _local.spec_of_shape((16, 4), (5, 4), {"data": 8}) is None
    assert _local.spec_of_shape((16, 4), (16,), sizes) is None


def test_prefixes_of_shardings(mesh):
    one, two = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    tree = ({"a": 1, "b": 2}, 3)
    assert _local.leaf_shardings(tree, (one, two)) == [one, one, two]
    assert _local.leaf_shardings(tree, one) == [one, one, one]
    assert _local.leaf_shardings(tree, (None, two)) == [None, None, two]
