"""Tests of signatures, the options of `jax.jit`, and budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memopt import _compat_frontend as compat
from memopt._budget import Budget, other_live_bytes, parse_budget, parse_reserve, resolve_budget
from memopt._signature import JitOptions, Signature, Statics
from memopt._target import Target


@pytest.mark.parametrize(
    ("text", "amount_bytes"),
    [
        (1, 1),
        (15_000_000_000, 15_000_000_000),
        (np.int64(7), 7),
        (14e9, 14_000_000_000),
        ("14GiB", 14 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("512 MiB", 512 * 2**20),
        ("2kb", 2000),
        ("1TiB", 2**40),
        ("4096", 4096),
        ("1_000_000", 1_000_000),
    ],
)
def test_budget_in_bytes(text, amount_bytes):
    assert parse_budget(text) == Budget(amount_bytes=amount_bytes)


def test_budget_as_a_fraction_and_none():
    assert parse_budget("60%") == Budget(fraction=0.6)
    assert parse_budget(" 12.5 % ").fraction == 0.125
    assert parse_budget(None) == Budget()


@pytest.mark.parametrize(
    "value", ["lots", "14 GiBB", "", "-3MB", 0, -1, "0MB", "0%", 1.5, True, float("nan"), [1], "1e9", "14G", "60 %x"]
)
def test_unreadable_budget_names_the_value_and_the_forms(value):
    with pytest.raises(ValueError, match="'14GiB', '500MB'") as error:
        parse_budget(value)
    assert repr(value) in str(error.value)


def test_reserve():
    assert parse_reserve(0) == 0
    assert parse_reserve("1kB") == 1000
    with pytest.raises(ValueError, match="reserve -1"):
        parse_reserve(-1)
    with pytest.raises(ValueError, match="reserve 'much'"):
        parse_reserve("much")


def resolved(budget, target, arguments=(), reserve_bytes=0, baseline=1000):
    return resolve_budget(
        parse_budget(budget),
        target=Target.parse(target),
        reserve_bytes=reserve_bytes,
        baseline_peak_bytes=lambda: baseline,
        arguments=arguments,
    )


def test_resolved_budgets():
    assert resolved("1MiB", "cpu") == 2**20
    assert resolved("60%", "cpu") == 600
    assert resolved(None, "cpu") is None
    assert resolved(None, "tpu:v5e", reserve_bytes=2**30) == int(14.75 * 2**30)


def test_other_live_bytes_leave_out_the_arguments_and_other_devices():
    first, second = jax.devices()[:2]
    before = other_live_bytes(first, [])
    mine = jax.device_put(jnp.zeros((256, 4)), first)
    other = jax.device_put(jnp.zeros((64, 4)), first)
    elsewhere = jax.device_put(jnp.zeros((512, 4)), second)
    assert other_live_bytes(first, [mine]) - before == other.nbytes
    assert other_live_bytes(first, []) - before == mine.nbytes + other.nbytes
    sharded = jax.device_put(jnp.zeros((800, 4)), NamedSharding(jax.make_mesh((8,), ("d",)), PartitionSpec("d")))
    assert other_live_bytes(first, [mine, other]) - before == sharded.nbytes // 8
    assert not elsewhere.is_deleted()


def test_same_program_for_equal_shapes_only():
    one, two = Signature.of((jnp.ones(3),), {}), Signature.of((jnp.zeros(3),), {})
    assert one.same_program(two)
    assert one.key() == two.key()
    for args, kwargs in [
        ((jnp.ones(4),), {}),
        ((jnp.ones(3, jnp.int32),), {}),
        ((1.0,), {}),
        (([jnp.ones(3)],), {}),
        ((), {"x": jnp.ones(3)}),
    ]:
        other = Signature.of(args, kwargs)
        assert not one.same_program(other)
        assert one.key() != other.key()


def test_shapes_and_arrays_share_a_key():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert Signature.of((shape,), {}).key() == Signature.of((jnp.ones(3),), {}).key()
    assert Signature.of((np.ones(3, np.float32), 1.0), {}).key() == Signature.of((jnp.ones(3), 2.0), {}).key()


def test_shardings_and_the_trace_context_are_part_of_the_program():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    plain = Signature.of((jnp.ones(8),), {})
    sharded = Signature.of((jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("d"))),), {})
    assert not plain.same_program(sharded)
    whole = Signature.of((jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec())),), {})
    assert whole.avals == sharded.avals
    assert not whole.same_program(sharded)
    assert whole.key() != sharded.key()
    assert plain.key() != sharded.key()
    with jax.default_matmul_precision("highest"):
        assert not plain.same_program(Signature.of((jnp.ones(8),), {}))


def test_statics_are_split_by_number_and_by_name():
    statics = Statics(jax.jit(lambda x, n, *, mode: x, static_argnums=1, static_argnames="mode"))
    args, kwargs, values = statics.split((1.0, 2), {"mode": "a", "y": 3})
    assert (args, kwargs) == ((1.0,), {"y": 3})
    assert values == ((1, int, 2), ("mode", str, "a"))
    assert statics.split((1.0, True), {"mode": "a"})[2] != statics.split((1.0, 1), {"mode": "a"})[2]


def test_options_are_completed_by_those_of_a_jitted_function():
    own = JitOptions(donate_argnums=(0,), donate_argnames=("state",), static_argnums=(2,))
    merged = JitOptions(donate_argnums=1).over(own)
    assert merged.keywords() == {"donate_argnums": 1, "static_argnums": (2,)}


def test_weak_types_are_given_back():
    strong, weak = jnp.float32(1), jax.typeof(1.0)
    assert compat.with_weak_type(strong, weak).weak_type
    assert not compat.with_weak_type(compat.with_weak_type(strong, weak), jax.typeof(strong)).weak_type
    assert compat.with_weak_type(strong, jax.typeof(strong)) is strong
