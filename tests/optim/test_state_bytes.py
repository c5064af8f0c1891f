"""Every byte of optimizer state, counted on shapes; and what a step may hold beside it.

In come the large matrices that the project's figures name, out go bytes a parameter. Nothing is allocated but in the
last tests, which compile updates.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import optim

MATRIX = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
STACK = jax.ShapeDtypeStruct((12, 1024, 2816), jnp.float32)


def state_bytes(optimizer, params) -> int:
    """Return the bytes of all arrays of a state."""
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def of_adamw(optimizer, params) -> float:
    """Return a state's bytes as a share of AdamW's."""
    return state_bytes(optimizer, params) / state_bytes(optax.adamw(0.1), params)


@pytest.mark.parametrize(
    "shape", [(2048, 2048), (12, 1024, 2816), (50304, 768), (12, 768, 2304), (4096, 11008)], ids=str
)
def test_bytes_a_parameter(shape):
    params = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    size = np.prod(shape)
    assert 2 < state_bytes(optim.adamw_8bit(0.1), params) / size <= 2.06
    assert 1 < state_bytes(optim.adamw_4bit(0.1), params) / size <= 1.1
    assert 1 < state_bytes(optim.lion_8bit(0.1), params) / size <= 1.03
    assert 1 < state_bytes(optim.momentum_8bit(0.1), params) / size <= 1.03


def test_galore_on_scan_stacked_weights():
    share = of_adamw(optim.galore(0.1, rank=64), STACK)
    assert share == pytest.approx((64 * 1024 + 2 * 64 * 2816) / (2 * 1024 * 2816), rel=1e-6)
    assert share <= 0.11 < of_adamw(optax.contrib.galore(0.1, rank=64), STACK)


EXACT = {
    "galore_8bit": (lambda: optim.galore(0.1, optim.scale_by_adam_8bit(), rank=64), 0.03),
    "q_galore": (lambda: optim.q_galore(0.1, rank=64), 0.02),
    "apollo": (lambda: optim.apollo(0.1, rank=64), 64 / 1024 + 1e-6),
    "apollo_mini": (lambda: optim.apollo_mini(0.1), 1 / 1024 + 1e-6),
    "dct_low_rank": (lambda: optim.dct_low_rank(0.1, rank=64), 64 / 1024 + 3e-5),
    "muon": (lambda: optim.muon(0.1), 0.5 + 1e-6),
    "muon_8bit": (lambda: optim.muon_8bit(0.1), 0.126),
    "came": (lambda: optim.came(0.1), 0.5 + (1024 + 2816) / (1024 * 2816) + 1e-6),
    "adam_mini": (lambda: optim.adam_mini(0.1), 0.5 + 1 / 2048 + 1e-6),
}


@pytest.mark.parametrize("name", EXACT)
def test_share_of_adamw(name):
    make, most = EXACT[name]
    assert 0 < of_adamw(make(), STACK) <= most


def test_nothing_is_saved_for_nothing():
    """A vector and a small matrix take no basis, no codes and no factors that would cost more than they save."""
    params = {"bias": jax.ShapeDtypeStruct((512,), jnp.float32), "kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    for make in (optim.galore, optim.apollo, optim.dct_low_rank, optim.adamw_8bit, optim.adamw_4bit):
        assert state_bytes(make(0.1), params) <= state_bytes(optax.adamw(0.1), params) + 8


def primitives(jaxpr) -> list[str]:
    """Return the names of all primitives of a jaxpr, those inside others too."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn.primitive.name)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda one: hasattr(one, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += primitives(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.loose_promotion
@pytest.mark.parametrize("make", [optim.galore, optim.q_galore])
def test_no_singular_values_and_no_refresh_outside_a_loop(make):
    optimizer = make(0.1, rank=16)
    params = {"kernel": jax.ShapeDtypeStruct((3, 64, 128), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)
    closed = jax.make_jaxpr(optimizer.update)(params, state, params)
    everywhere = primitives(closed.jaxpr)
    assert not {"svd", "eigh", "qr", "householder_product", "geqrf"} & set(everywhere)
    refreshes = {"random_bits", "argmin"}  # the range finder's tests, and the choice of a unit vector
    assert refreshes <= set(everywhere)
    top = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name not in ("while", "cond")]
    outside = [name for eqn in top for name in (eqn.primitive.name, *primitives_of(eqn))]
    assert not refreshes & set(outside)


def primitives_of(eqn) -> list[str]:
    """Return the names of the primitives inside one equation."""
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda one: hasattr(one, "eqns"))
    inner = [getattr(value, "jaxpr", value) for value in values]
    return [name for one in inner if hasattr(one, "eqns") for name in primitives(one)]


def test_encoded_state_is_updated_in_place():
    optimizer = optim.scale_by_adam_8bit()
    params = {"kernel": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)
    memory = jax.jit(optimizer.update, donate_argnums=1).lower(params, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= state_bytes(optimizer, params)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("shape", "block"), [((16, 512, 2048), 2048), ((4, 2048, 4096), 512)], ids=["rows", "down"])
def test_no_moment_is_in_memory_in_full_precision(shape, block):
    optimizer = optim.adamw_8bit(0.1, block=block)
    params = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    made = memopt.optimize(step, target="tpu:v5e:1x1", passes=[], donate_argnums=(0, 1))
    memory = made.measure(params, jax.eval_shape(optimizer.init, params), params)
    assert memory.temp_bytes <= 1.05 * 2 * math.prod(shape)  # an update in bfloat16, where blocks are apart


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_4bit", "lion_8bit"])
def test_moments_are_held_back_until_their_scales_are_made(name):
    optimizer = getattr(optim, name)(0.1, min_size=32)
    params = {name: jnp.ones((8, 128)) for name in ("a", "b", "c")} | {"bias": jnp.ones(3)}
    traced = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    barriers = [e for e in traced.jaxpr.eqns if e.primitive is jax.lax.optimization_barrier_p]
    assert len([e for e in barriers if len(e.invars) > 1]) == 3  # a leaf's own: leaves do not wait for each other
    assert [e.outvars[0].aval.shape for e in barriers if len(e.invars) == 1] == [(8, 128)] * 3  # each leaf's update
