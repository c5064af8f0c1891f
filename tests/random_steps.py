"""The steps of the random programs: in come a model, a state, a batch, a key and a rate; out go a new state and values.

Every step is ``step(model, state, batch, key, rate)``. Most differentiate the loss; each stands for one way in which
people write training code. Nothing here knows of planners or of memopt.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.random_models import Model, loss_fn, outputs, scalar_loss

tree_map = jax.tree_util.tree_map


@dataclass(frozen=True)
class Step:
    """A step function, how its state is made from parameters, how often it is drawn, whether its state is donated."""

    step: Callable[..., Any]
    state: Callable[[Any], Any]
    weight: float = 1.0
    donates: bool = True
    differentiates: bool = True


def descend(params, grads, rate):
    """One step of SGD, leaf by leaf."""
    return tree_map(lambda p, g: p - rate * g, params, grads)


def sgd(model: Model, params, batch, key, rate):
    loss, grads = jax.value_and_grad(scalar_loss)(params, model, batch, key)
    return descend(params, grads, rate), loss


def momentum(model: Model, state, batch, key, rate):
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], model, batch, key)
    speed = tree_map(lambda m, g: 0.9 * m + g, state["speed"], grads)
    return {"params": descend(state["params"], speed, rate), "speed": speed, "count": state["count"] + 1}, loss, aux


def adam(model: Model, state, batch, key, rate):
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], model, batch, key)
    first = tree_map(lambda m, g: (0.9 * m.astype(g.dtype) + 0.1 * g).astype(m.dtype), state["first"], grads)
    second = tree_map(lambda v, g: 0.99 * v + 0.01 * g * g, state["second"], grads)
    count = state["count"] + 1
    scale = 1.0 - 0.99 ** count.astype(jnp.float32)
    step = tree_map(lambda m, v: m.astype(v.dtype) / jnp.sqrt(v / scale + 0.01), first, second)
    new = {"params": descend(state["params"], step, rate), "first": first, "second": second, "count": count}
    return new, loss, aux, optax_like_norm(grads)


def optax_like_norm(grads):
    """The global norm: one reader of every gradient, after all of them."""
    return jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree_util.tree_leaves(grads)) + 1e-6)


def clipped(model: Model, params, batch, key, rate):
    loss, grads = jax.value_and_grad(scalar_loss)(params, model, batch, key)
    norm = optax_like_norm(grads)
    return descend(params, tree_map(lambda g: g / (1.0 + norm), grads), rate), loss, norm


def guarded(model: Model, params, batch, key, rate):
    loss, grads = jax.value_and_grad(scalar_loss)(params, model, batch, key)
    new = lax.cond(jnp.isfinite(loss), lambda: descend(params, grads, rate), lambda: params)
    return new, loss


def gan(model: Model, params, batch, key, rate):
    first, second = jax.random.split(key)
    loss_d, grads_d = jax.value_and_grad(_critic)(params, model, batch, first)
    params = descend(params, grads_d, rate)
    loss_g, grads_g = jax.value_and_grad(scalar_loss)(params, model, batch, second)
    return descend(params, grads_g, rate), loss_d - loss_g, loss_g


def _critic(params, model: Model, batch, key):
    real = outputs(model, params, batch, key)
    return jnp.mean(jax.nn.softplus(-real[:, 0])) + 0.1 * jnp.mean(real[:, 1] ** 2)


def actor_critic(model: Model, params, batch, key, rate):
    grads_a = jax.grad(scalar_loss)(params, model, batch, key)
    grads_c = jax.grad(_critic)(params, model, batch, key)
    return descend(params, tree_map(lambda a, c: a + 0.5 * c, grads_a, grads_c), rate)


def accumulate(model: Model, params, batch, key, rate):
    def body(carry, one):
        grads, total = carry
        loss, new = jax.value_and_grad(scalar_loss)(params, model, {**batch, "x": one[0]}, one[1])
        return (tree_map(jnp.add, grads, new), total + loss), loss

    micro = batch["x"][None, :, :] * jnp.asarray([1.0, -0.5], jnp.float32)[:, None, None]
    zeros = tree_map(jnp.zeros_like, params), jnp.float32(0)
    (grads, total), losses = lax.scan(body, zeros, (micro, jax.random.split(key, 2)))
    return descend(params, grads, rate), total, losses


def loop(model: Model, params, batch, key, rate):
    def body(params, key):
        loss, grads = jax.value_and_grad(scalar_loss)(params, model, batch, key)
        return descend(params, grads, rate), loss

    return lax.scan(body, params, jax.random.split(key, 3))


def fori(model: Model, params, batch, key, rate):
    def body(i, carry):
        params, total = carry
        loss, grads = jax.value_and_grad(scalar_loss)(params, model, batch, jax.random.fold_in(key, i))
        return descend(params, grads, rate), total + loss

    return lax.fori_loop(0, batch["step"], body, (params, jnp.float32(0)))


def penalty(model: Model, params, batch, key, rate):
    def total(params):
        slope = jax.grad(lambda x: jnp.sum(outputs(model, params, {**batch, "x": x}, key)[:, 0]))(batch["x"])
        return scalar_loss(params, model, batch, key) + 0.1 * jnp.mean(slope**2)

    loss, grads = jax.value_and_grad(total)(params)
    return descend(params, grads, rate), loss


def maml(model: Model, params, batch, key, rate):
    def outer(params):
        grads = jax.grad(scalar_loss)(params, model, batch, key)
        return scalar_loss(descend(params, grads, 0.05), model, batch, key)

    loss, grads = jax.value_and_grad(outer)(params)
    return descend(params, grads, rate), loss


def hessian(model: Model, params, batch, key, rate):
    gradient = jax.grad(functools.partial(scalar_loss, model=model, batch=batch, key=key))
    grads, product = jax.jvp(gradient, (params,), (tree_map(jnp.ones_like, params),))
    return descend(params, grads, rate), product


def per_example(model: Model, params, batch, key, rate):
    def one(x):
        return jax.grad(scalar_loss)(params, model, {**batch, "x": x}, key)

    grads = jax.vmap(one)(jnp.stack([batch["x"], -batch["x"]]))
    return descend(params, tree_map(lambda g: jnp.mean(g, axis=0), grads), rate)


def lora(model: Model, params, batch, key, rate):
    def adapted(small):
        merged = {**params, "in": params["in"] + small @ small.T}
        return scalar_loss(merged, model, batch, key)

    loss, grad = jax.value_and_grad(adapted)(params["in"][:, :2])
    return {**params, "in": params["in"].at[:, :2].add(-rate * grad)}, loss


def pullbacks(model: Model, params, batch, key, rate):
    logits, pull = jax.vjp(lambda p: outputs(model, p, batch, key), params)
    (first,), (second,) = pull(jnp.ones_like(logits)), pull(jnp.tanh(logits))
    return descend(params, first, rate), optax_like_norm(second)


def forward_mode(model: Model, params, batch, key, rate):
    tangent = tree_map(lambda p: 0.1 * jnp.ones_like(p), params)
    (loss, aux), (slope, _) = jax.jvp(lambda p: loss_fn(p, model, batch, key), (params,), (tangent,))
    return descend(params, tree_map(lambda t: t * slope, tangent), rate), loss, aux


def jitted(model: Model, state, batch, key, rate):
    return jax.jit(functools.partial(momentum, model), donate_argnums=0)(state, batch, key, rate)


def inference(model: Model, params, batch, key, rate):
    logits = outputs(model, params, batch, key)
    return logits, jnp.sum(batch["tokens"]), 2.0, np.float32(1.5), batch["x"], jnp.sin(rate)


def _with_speed(params):
    return {"params": params, "speed": tree_map(np.zeros_like, params), "count": np.int32(0)}


def _with_moments(params):
    first = tree_map(lambda p: np.zeros_like(p, dtype=jnp.bfloat16), params)
    return {"params": params, "first": first, "second": tree_map(np.zeros_like, params), "count": np.int32(0)}


def _bare(params):
    return params


STEPS = {
    "sgd": Step(sgd, _bare, 2.0),
    "momentum": Step(momentum, _with_speed, 2.0),
    "adam": Step(adam, _with_moments, 2.0),
    "clipped": Step(clipped, _bare),
    "guarded": Step(guarded, _bare),
    "gan": Step(gan, _bare),
    "actor_critic": Step(actor_critic, _bare),
    "accumulate": Step(accumulate, _bare),
    "loop": Step(loop, _bare),
    "fori": Step(fori, _bare, 0.5),
    "penalty": Step(penalty, _bare, 0.5),
    "maml": Step(maml, _bare, 0.5),
    "hessian": Step(hessian, _bare, 0.5),
    "per_example": Step(per_example, _bare, 0.5),
    "lora": Step(lora, _bare),
    "pullbacks": Step(pullbacks, _bare),
    "forward_mode": Step(forward_mode, _bare, 0.5, differentiates=False),
    "jitted": Step(jitted, _with_speed),
    "inference": Step(inference, _bare, 1.5, donates=False, differentiates=False),
}


def draw_step(rng: np.random.Generator) -> str:
    """Draw the name of a step by weight."""
    weights = np.array([s.weight for s in STEPS.values()])
    return str(rng.choice(list(STEPS), p=weights / weights.sum()))
