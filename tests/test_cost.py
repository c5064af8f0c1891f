"""Bytes, FLOPs and seconds: known answers, XLA's own cost analysis as the oracle, and order between alternatives."""

import dataclasses
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from memopt._cost import aval_bytes, eqn_seconds, jaxpr_seconds, matmul_flops, padded_bytes
from memopt._specs import DeviceSpec

SPEC = DeviceSpec(
    name="test",
    platform="tpu",
    memory_bytes=2**34,
    memory_bytes_per_second=1e12,
    matmul_flops_per_second={"bfloat16": 2e14, "float32": 1e14, "float32_highest": 1e13, "default": 1e13},
    vector_flops_per_second=1e13,
    host_bytes_per_second=1e10,
    link_bytes_per_second=1e11,
    source="test",
)


def shaped(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def flops(function, *avals):
    return matmul_flops(jax.make_jaxpr(function)(*avals))


def seconds(function, *avals, spec=SPEC):
    return jaxpr_seconds(jax.make_jaxpr(function)(*avals), spec)


def xla_flops(function, *avals):
    return jax.jit(function).lower(*avals).compile().cost_analysis().get("flops", 0.0)


# Bytes


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [
        ((), "float32", 4),
        ((3, 5), "float32", 60),
        ((3, 5), "bool", 15),
        ((3,), "int4", 2),
        ((0, 7), "float32", 0),
        ((2, 3), "bfloat16", 12),
        ((2,), "complex64", 16),
        ((4,), jax.dtypes.float0, 0),
    ],
)
def test_aval_bytes(shape, dtype, size):
    assert aval_bytes(shaped(shape, dtype)) == size


def test_typed_keys_count_their_base_array():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    assert aval_bytes(keys) == 3 * 8
    assert padded_bytes(keys, "cpu") == 64


def test_tokens_and_references_take_nothing():
    (token,) = jax.make_jaxpr(lax.create_token)(0.0).out_avals
    assert aval_bytes(token) == padded_bytes(token, "tpu") == 0
    references = [v.aval for v in kernel_eqn().params["jaxpr"].invars]
    assert references and [aval_bytes(aval) for aval in references] == [0, 0, 0]


# Argument sizes of programs `x -> (x + 1) * 3` compiled for TPU v5e by XLA (JAX 0.10.2).
TPU_SIZES = [
    ((), "float32", 512),
    ((5,), "float32", 512),
    ((129,), "float32", 1024),
    ((1000,), "float32", 4096),
    ((1100,), "float32", 8192),
    ((100000,), "float32", 401408),
    ((8, 128), "float32", 4096),
    ((3, 5), "float32", 2048),
    ((2, 3), "float32", 1024),
    ((7, 1), "float32", 512),
    ((200, 3), "float32", 4096),
    ((1024, 1), "float32", 4096),
    ((1024, 64), "float32", 262144),
    ((33, 257), "float32", 61440),
    ((16, 100, 100), "float32", 819200),
    ((64, 12, 1, 1024), "float32", 3145728),
    ((6, 16, 100, 130), "float32", 6389760),
    ((2, 2, 2, 2, 2), "float32", 8192),
    ((), "bfloat16", 512),
    ((1000,), "bfloat16", 2048),
    ((3, 5), "bfloat16", 1024),
    ((8, 128), "bfloat16", 2048),
    ((1024, 1), "bfloat16", 4096),
    ((8, 12, 1024, 1), "bfloat16", 196608),
    ((33, 257), "bfloat16", 30720),
    ((3, 5), "int8", 512),
    ((16, 100, 100), "int8", 204800),
    ((1024, 3), "int8", 4096),
    ((9, 130), "int8", 4096),
    ((1100,), "bool", 2048),
    ((2, 200), "bool", 1024),
    ((64, 12, 1, 1024), "bool", 786432),
    ((2, 3), "int4", 512),
    ((128, 3, 224, 224), "int4", 9633792),
]


@pytest.mark.parametrize(("shape", "dtype", "size"), TPU_SIZES)
def test_padding_on_tpu_is_what_xla_allocates(shape, dtype, size):
    assert padded_bytes(shaped(shape, dtype), "tpu") == size


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("shape", "dtype"), [((33, 100), "float32"), ((5, 7, 3), "bfloat16"), ((6, 130), "bool")])
def test_padding_on_tpu_against_the_compiler(shape, dtype):
    from memopt._target import Target, devices

    device = jax.sharding.SingleDeviceSharding(devices(Target.parse("tpu:v5e:1x1"))[0])
    operand = jax.ShapeDtypeStruct(shape, dtype, sharding=device)
    lowered = jax.jit(lambda x: x != x).trace(operand).lower(lowering_platforms=("tpu",))
    assert lowered.compile().memory_analysis().argument_size_in_bytes == padded_bytes(operand, "tpu")


@hypothesis.given(
    st.lists(st.integers(0, 300), max_size=4), st.sampled_from(["float32", "bfloat16", "int8", "bool", "int4"])
)
def test_padding_never_shrinks_and_ignores_the_order_of_dimensions(shape, dtype):
    for platform in ("cpu", "gpu", "tpu"):
        padded = padded_bytes(shaped(shape, dtype), platform)
        assert padded >= aval_bytes(shaped(shape, dtype))
        assert padded == padded_bytes(shaped(shape[::-1], dtype), platform)


def test_other_platforms_round_to_64_bytes():
    assert padded_bytes(shaped((3, 5)), "cpu") == padded_bytes(shaped((3, 5)), "gpu") == 64
    assert padded_bytes(shaped((17,)), "cpu") == 128


# FLOPs


@hypothesis.given(*[st.integers(2, 7)] * 4)  # XLA rewrites what has a dimension of 1.
@hypothesis.settings(max_examples=8)
def test_dot_flops_agree_with_xla(batch, rows, inner, columns):
    avals = shaped((batch, rows, inner)), shaped((batch, inner, columns))

    def function(a, b):
        return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))))

    assert flops(function, *avals) == 2 * batch * rows * inner * columns
    assert flops(function, *avals) == xla_flops(function, *avals)


@st.composite
def convolutions(draw):
    groups, kind = draw(st.sampled_from([1, 2])), draw(st.sampled_from(["plain", "feature", "batch"]))
    feature, batch = (groups if kind == "feature" else 1), (groups if kind == "batch" else 1)
    lhs = (
        batch * draw(st.integers(1, 2)),
        feature * draw(st.integers(1, 3)),
        *draw(st.tuples(*[st.integers(4, 7)] * 2)),
    )
    rhs = (2 * draw(st.integers(1, 2)), lhs[1] // feature, *draw(st.tuples(*[st.integers(1, 3)] * 2)))
    pairs = st.tuples(*[st.integers(1, 2)] * 2)
    options = dict(
        window_strides=draw(pairs),
        padding=draw(st.tuples(*[st.tuples(*[st.integers(0, 2)] * 2)] * 2)),
        lhs_dilation=draw(pairs),
        rhs_dilation=draw(pairs),
        feature_group_count=feature,
        batch_group_count=batch,
    )
    return lhs, rhs, options


@hypothesis.given(convolutions())
@hypothesis.settings(max_examples=25)
def test_convolution_flops_agree_with_xla(case):
    lhs, rhs, options = case

    def function(a, b):
        return lax.conv_general_dilated(a, b, **options)

    lowered = jax.jit(function).lower(shaped(lhs), shaped(rhs))  # Before XLA:CPU turns it into something else.
    assert flops(function, shaped(lhs), shaped(rhs)) == lowered.cost_analysis().get("flops", 0.0)


def matmul(x):
    return lax.dot(x, x)


SQUARE = shaped((8, 8))
ONCE = 2.0 * 8**3


def scanned(x):
    return lax.scan(lambda c, _: (matmul(c), None), x, length=5)[0]


def nested(x):
    return lax.scan(lambda c, _: (scanned(c), None), x, length=3)[0]


def branched(x):
    return lax.cond(x[0, 0] > 0, lambda x: matmul(matmul(x)), matmul, x)


def looped(x):
    return lax.while_loop(lambda c: matmul(c)[0, 0] > 0, matmul, x)


@jax.custom_vjp
def custom(x):
    return matmul(x)


custom.defvjp(lambda x: (custom(x), x), lambda x, g: (lax.dot(g, x),))


@jax.custom_jvp
def custom_tangent(x):
    return matmul(x)


custom_tangent.defjvp(lambda x, t: (matmul(x[0]), lax.dot(t[0], x[0])))


def sharded(x):
    mesh = Mesh(jax.devices()[:4], ("data",))
    spec = PartitionSpec("data")
    return jax.shard_map(lambda x: lax.dot(x, x.T), mesh=mesh, in_specs=spec, out_specs=spec)(x)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (matmul, 1),
        (jax.jit(matmul), 1),
        (jax.checkpoint(matmul), 1),
        (custom, 1),
        (custom_tangent, 1),
        (scanned, 5),
        (nested, 15),
        (branched, 2),
        (looped, 2),
        (jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(matmul(x)))(x).sum()), 4),
        (sharded, 1 / 16),
    ],
)
def test_flops_of_bodies(function, times):
    assert flops(function, SQUARE) == times * ONCE


def kernel_eqn():
    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = lax.dot(a_ref[...], b_ref[...])

    block = pl.BlockSpec((8, 8), lambda i, j: (0, 0))
    call = pl.pallas_call(kernel, shaped((8, 8)), grid=(3, 5), in_specs=[block, block], out_specs=block)
    return next(e for e in jax.make_jaxpr(call)(SQUARE, SQUARE).eqns if e.primitive.name == "pallas_call")


def test_kernel_is_its_body_times_its_grid():
    assert matmul_flops(kernel_eqn()) == 15 * ONCE


def test_flops_take_closed_and_open_jaxprs_and_equations():
    closed = jax.make_jaxpr(scanned)(SQUARE)
    assert matmul_flops(closed) == matmul_flops(closed.jaxpr) == matmul_flops(closed.eqns[-1]) == 5 * ONCE


# Seconds


def test_matmul_is_bound_by_arithmetic_or_by_memory():
    big = shaped((4096, 4096), "bfloat16")
    assert seconds(lax.dot, big, big) == pytest.approx(2 * 4096**3 / 2e14)
    thin = shaped((4096, 1), "bfloat16")
    assert seconds(lax.dot, big, thin) == pytest.approx((4096**2 + 2 * 4096) * 2 / 1e12)


def test_precision_of_float32():
    big = shaped((4096, 4096))

    def precise(a):
        return lax.dot(a, a, precision="highest")

    assert seconds(precise, big) == pytest.approx(10 * seconds(lambda a: lax.dot(a, a), big))


def test_transcendentals_weigh_more_than_cheap_operations():
    x = shaped((1024, 1024))
    assert seconds(jnp.negative, x) < seconds(jnp.exp, x) < seconds(jnp.sin, x)


def test_shape_changes_are_free():
    x = shaped((1024, 1024))
    assert seconds(lambda x: lax.optimization_barrier(x.reshape(-1, 2)[None]), x) == 0.0


def test_random_bits_cost_a_hundred_operations_a_word():
    key = jax.eval_shape(lambda: jax.random.key(0))
    word = seconds(lambda k: jax.random.bits(k, (1024, 1024)), key) / 2**20
    assert word == pytest.approx(100 / 1e13)


def test_loops_multiply_and_pay_for_their_stacks():
    x = shaped((256, 256))

    def carried(x):
        return lax.scan(lambda c, _: (matmul(c), None), x, length=5)[0]

    def stacked(x):
        return lax.scan(lambda c, _: (matmul(c), c), x, length=5)

    stack = 5 * 4 * 256**2
    assert seconds(carried, x) == pytest.approx(5 * seconds(matmul, x))
    assert seconds(stacked, x) == pytest.approx(seconds(carried, x) + stack / 1e12)
    assert seconds(stacked, x, spec=dataclasses.replace(SPEC, platform="cpu")) > seconds(stacked, x)


def test_branches_cost_their_dearest():
    x = shaped((512, 512))
    assert seconds(branched, x) == pytest.approx(2 * seconds(matmul, x), rel=0.01)


def test_kernels_cost_their_arithmetic_and_one_pass_over_memory():
    fast = dataclasses.replace(SPEC, matmul_flops_per_second={"default": 1e30}, vector_flops_per_second=1e30)
    assert eqn_seconds(kernel_eqn(), fast) == pytest.approx(3 * 8 * 8 * 4 / 1e12)
    slow = dataclasses.replace(SPEC, matmul_flops_per_second={"default": 1e3})
    assert eqn_seconds(kernel_eqn(), slow) == pytest.approx(15 * ONCE / 1e3)


def test_collectives_are_bound_by_the_link():
    mesh = Mesh(jax.devices()[:4], ("data",))

    def reduced(x):
        spec = PartitionSpec("data")
        return jax.shard_map(lambda x: lax.psum(x, "data"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())(x)

    shard_bytes = 2**22 // 4 * 4
    assert seconds(reduced, shaped((2**22,))) == pytest.approx(2 * shard_bytes / 1e11)


def test_unknown_primitives_cost_their_traffic():
    def function(x):
        return jax.pure_callback(lambda x: x, x, x)

    x = shaped((1024, 1024))
    assert seconds(function, x) == pytest.approx(2 * 4 * 2**20 / 1e12)


def test_updates_in_place_do_not_pay_for_the_whole_buffer():
    def update(buffer, row):
        return lax.dynamic_update_slice(buffer, row, (0, 0))

    small = seconds(update, shaped((8, 1024)), shaped((1, 1024)))
    assert seconds(update, shaped((8192, 1024)), shaped((1, 1024))) == small > 0


@pytest.mark.slow  # a timing: true on a quiet machine alone
def test_a_hundred_thousand_equations_take_well_under_a_second():
    def chain(x):
        for _ in range(2_000):
            x = lax.sin(x) * x + x
        return x

    jaxpr = jax.make_jaxpr(chain)(shaped((4, 4)))
    start = time.process_time()
    matmul_flops(jaxpr)
    jaxpr_seconds(jaxpr, SPEC)
    assert (time.process_time() - start) * 100_000 / len(jaxpr.eqns) < 2.5  # 0.6 s alone; the machine may be busy.


def test_gradient_of_a_block_costs_about_three_forwards():
    weights = shaped((256, 1024), "bfloat16"), shaped((1024, 256), "bfloat16")

    def loss(weights, x):
        return jax.nn.gelu(x @ weights[0]).__matmul__(weights[1]).astype(jnp.float32).sum()

    x = shaped((2048, 256), "bfloat16")
    ratio = seconds(jax.grad(loss, (0, 1)), weights, x) / seconds(loss, weights, x)
    assert 2.2 < ratio < 3.8
