"""A small language step and meshes for the tests of sharding: in comes a strategy, out come a step, a mesh, a jaxpr.

Nothing here knows of the sharding pass.
"""

import jax
import jax.numpy as jnp

from memopt import _compat as c
from memopt import _inline
from memopt._contract import Context
from memopt._target import Target

LAYERS, WIDTH, HIDDEN, WORDS, BATCH, LENGTH = 2, 16, 32, 64, 16, 8
STRATEGIES = {
    "data": ((8,), ("data",)),
    "zero1": ((8,), ("data",)),
    "zero2": ((8,), ("data",)),
    "zero3": ((8,), ("data",)),
    "hierarchical": ((2, 4), ("outer", "inner")),
    "tensor": ((8,), ("model",)),
    "zero3+tensor": ((4, 2), ("data", "model")),
    "zero3+tensor+sequence": ((4, 2), ("data", "model")),
    "zero2+context": ((4, 2), ("data", "context")),
}


def layer(h, w):
    return h + jnp.tanh(h @ w["up"]) @ w["down"], None


def loss_of(params, batch, scan):
    h = params["embed"][batch["tokens"]]
    if scan:
        h, _ = jax.lax.scan(layer, h, params["blocks"])
    else:
        for i in range(LAYERS):
            h, _ = layer(h, jax.tree.map(lambda w: w[i], params["blocks"]))  # noqa: B023
    logits = (h * params["scale"]) @ params["head"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1))


def make_step(scan=True):
    """Return a language step over plain dictionaries with momentum, and its arguments."""

    def step(state, batch):
        params, moments = state
        loss, grads = jax.value_and_grad(loss_of)(params, batch, scan)
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)
        return (jax.tree.map(lambda p, m: p - 0.1 * m, params, moments), moments), loss

    keys = iter(jax.random.split(jax.random.key(0), 9))

    def draw(*shape):
        return jax.random.normal(next(keys), shape) * 0.3

    params = {
        "embed": draw(WORDS, WIDTH),
        "blocks": {"up": draw(LAYERS, WIDTH, HIDDEN), "down": draw(LAYERS, HIDDEN, WIDTH)},
        "scale": jnp.ones(WIDTH),
        "head": draw(WIDTH, WORDS),
    }
    tokens = jax.random.randint(next(keys), (BATCH, LENGTH), 0, WORDS)
    state = params, jax.tree.map(jnp.zeros_like, params)
    return step, (state, {"tokens": tokens, "labels": jnp.roll(tokens, -1, 1)})


def mesh_of(strategy):
    shape, names = STRATEGIES[strategy]
    return jax.make_mesh(shape, names)


def flat_of(step, args):
    traced = jax.jit(step).trace(*args)
    flat = _inline.inline(traced.jaxpr)
    results = jax.tree_util.tree_unflatten(traced.out_tree, traced.jaxpr.out_avals)
    paths, out_paths = (
        tuple(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
        for tree in (args, results)
    )
    context = Context(Target.parse("tpu:v5e"), paths, out_paths)
    return c.close(c.dce(flat)[0], c.jaxpr_consts(flat)), context
