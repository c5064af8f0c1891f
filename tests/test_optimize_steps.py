"""Tests of the decorator on the steps that people write: branches, two losses, RL loops, Flax, sharded arguments.

The planner is a stand-in (`fake_ladder`), as in `test_optimize`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memopt._optimize import optimize
from tests.fake_ladder import BUDGET, W, X, assert_same, check, copied, is_rewritten, sgd
from tests.fake_ladder import ladder as ladder


def test_control_flow_custom_rules_and_checkpoint():
    @jax.custom_vjp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defvjp(lambda x: (clipped(x), x), lambda x, g: (g * (abs(x) < 1).astype(g.dtype),))

    @jax.checkpoint
    def body(x):
        return jnp.sin(clipped(x))

    def loss(x, n):
        x = jax.lax.cond(n > 1, body, jnp.cos, x)
        x = (
            jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 1.5), (0, jax.lax.stop_gradient(x)))[1]
            + x
        )
        return jax.lax.scan(lambda c, y: (body(c) + y, c.sum()), x, jnp.ones((3, 4, 8)))[0].sum()

    check(jax.value_and_grad(loss), X, jnp.int32(2))
    check(jax.jit(jax.grad(loss)), X, jnp.int32(0))


def test_gan_with_two_losses():
    def step(state, z, real):
        def generated(g):
            return jnp.tanh(z @ g)

        def critic(d, x):
            return jax.nn.sigmoid(x @ d)

        d_loss, d_grad = jax.value_and_grad(
            lambda d: -jnp.log(critic(d, real)).mean() - jnp.log(1 - critic(d, generated(state["g"]))).mean()
        )(state["d"])
        g_loss, g_grad = jax.value_and_grad(lambda g: -jnp.log(critic(state["d"], generated(g))).mean())(state["g"])
        return {"g": state["g"] - g_grad, "d": state["d"] - d_grad}, (g_loss, d_loss)

    check(step, {"g": W, "d": jnp.ones((8, 1))}, X, X + 1, donate_argnums=0)


def test_reinforcement_learning_loop_under_scan():
    @optimize(budget=BUDGET)
    def update(carry, key):
        policy, position = carry
        action = jax.random.categorical(key, policy)
        moved = position + action.astype(jnp.float32)
        reward = -abs(moved - 2.0)
        grad = jax.grad(lambda p: jax.nn.log_softmax(p)[action] * reward)(policy)
        return (policy + 0.1 * grad, moved * 0.5), reward

    keys = jax.random.split(jax.random.key(0), 5)
    start = (jnp.zeros(4), jnp.float32(0))
    ours = jax.jit(lambda c, k: jax.lax.scan(update, c, k))(start, keys)
    plain = jax.jit(lambda c, k: jax.lax.scan(update.__wrapped__, c, k))(start, keys)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, plain)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class State(train_state.TrainState):
    batch_stats: dict
    key: jax.Array


@pytest.mark.loose_promotion
def test_linen_train_state_with_dropout_and_batch_stats():
    variables = Net().init(jax.random.key(0), X, train=False)
    state = State.create(
        apply_fn=Net().apply, params=variables["params"], tx=optax.adamw(1e-2),
        batch_stats=variables["batch_stats"], key=jax.random.key(1),
    )  # fmt: skip

    def step(state, x):
        def loss(params):
            out, new = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats}, x, train=True,
                rngs={"dropout": jax.random.fold_in(state.key, state.step)}, mutable=["batch_stats"],
            )  # fmt: skip
            return (out**2).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats), value

    ours, plain = optimize(step, budget=BUDGET, donate_argnums=0), jax.jit(step, donate_argnums=0)
    one, two = copied(state), copied(state)
    for _ in range(3):
        (one, loss_one), (two, loss_two) = ours(one, X), plain(two, X)
        assert_same((one, loss_one), (two, loss_two))
    assert int(one.step) == 3
    assert is_rewritten(ours, one, X)


def sharded_arguments():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    w = jax.device_put(W, NamedSharding(mesh, PartitionSpec(None, "model")))
    return mesh, w, jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))


def test_sharded_arguments_keep_their_shardings():
    mesh, w, x = sharded_arguments()
    step = check(sgd, w, x)
    assert step(w, x)[0].sharding.is_equivalent_to(w.sharding, 2)
    check(sgd, w, x, out_shardings=(NamedSharding(mesh, PartitionSpec("data")), None))
    spec = NamedSharding(mesh, PartitionSpec("data"))
    check(sgd, W, X, in_shardings=(spec, NamedSharding(mesh, PartitionSpec())))
    assert step.shardings(w, x) == ((w.sharding, x.sharding), {})
    assert_same(step(W, X), jax.jit(sgd)(W, X))  # other shardings, another program
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)
    assert step.measure(shape, x).argument_bytes == w.nbytes // 2 + x.nbytes // 4


def test_explicit_shardings_in_the_types():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, PartitionSpec("data")))
    check(lambda w, x: jnp.sin(x @ w).sum(1), W, x)
    with jax.set_mesh(mesh):
        check(lambda x: jax.reshard(x * 2, PartitionSpec()), x)


def test_shard_map():
    mesh, w, x = sharded_arguments()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec()
    )
    def gradient(w, x):
        grad = jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
        return jax.lax.pmean(grad, "data")

    check(lambda w, x: w - gradient(w, x), w, x)
