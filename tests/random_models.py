"""Random models: in come drawn layers; out come wrapped layers, stacks of them, and the loss of the steps.

Wrappers put a layer under checkpoint, jit, cond, scan, vmap or custom_vjp; stacks are unrolled, scanned or nested.
Nothing here draws anything, and nothing knows of planners or of memopt.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from tests.random_layers import LAYERS, squash

Layer = Callable[..., jax.Array]
POLICIES = jax.checkpoint_policies


@dataclass(frozen=True)
class Model:
    """What a program draws once: the layers, how they are stacked, the sizes and the loss."""

    layers: tuple[Layer, ...]
    stack: str
    length: int
    rows: int
    width: int
    classes: int
    loss: str
    inputs: str


# ---- wrappers: layer -> layer ---------------------------------------------------------------------------------------


def _residual(layer: Layer, p, h, c):
    return h + 0.5 * layer(p, h, c)


def _remat(layer: Layer, policy, p, h, c):
    return jax.checkpoint(layer, policy=policy)(p, h, c)


def _remat_open(layer: Layer, p, h, c):
    return jax.checkpoint(layer, prevent_cse=False)(p, h, c)


def _remat_nested(layer: Layer, p, h, c):
    return jax.checkpoint(functools.partial(_remat, layer, POLICIES.dots_saveable))(p, h, c)


def _jit(layer: Layer, p, h, c):
    return jax.jit(layer)(p, h, c)


def _inline(layer: Layer, p, h, c):
    return jax.jit(layer, inline=True)(p, h, c)


def _cond(layer: Layer, p, h, c):
    return lax.cond(c["mask"][0], layer, LAYERS["dense"], p, h, c)


def _switch(layer: Layer, p, h, c):
    return lax.switch(c["step"] % 3, [layer, LAYERS["dense"], LAYERS["waves"]], p, h, c)


def _scan_repeat(layer: Layer, p, h, c):
    return lax.scan(functools.partial(_repeat_body, layer, p, c), h, None, length=3)[0]


def _scan_jit(layer: Layer, p, h, c):
    return _scan_repeat(functools.partial(_jit, layer), p, h, c)


def _scan_remat(layer: Layer, p, h, c):
    return _scan_repeat(functools.partial(_remat, layer, POLICIES.nothing_saveable), p, h, c)


def _scan_cond(layer: Layer, p, h, c):
    return _scan_repeat(functools.partial(_cond, layer), p, h, c)


def _repeat_body(layer: Layer, p, c, h, _):
    return squash(layer(p, h, c)), None


def _fori(layer: Layer, p, h, c):
    return lax.fori_loop(0, 2, functools.partial(_fori_body, layer, p, c), h)


def _fori_body(layer: Layer, p, c, i, h):
    return squash(layer(p, h, {**c, "step": c["step"] + i}))


def _vmap(layer: Layer, p, h, c):
    halves = h.reshape(2, h.shape[0] // 2, h.shape[1])
    return jax.vmap(layer, in_axes=(None, 0, None))(p, halves, c).reshape(h.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _opaque(layer: Layer, p, h, c):
    return layer(p, h, c)


def _opaque_forward(layer: Layer, p, h, c):
    out, pullback = jax.vjp(functools.partial(layer, c=c), p, h)
    return out, pullback


def _opaque_backward(layer: Layer, pullback, ct):
    return (*pullback(ct), None)


_opaque.defvjp(_opaque_forward, _opaque_backward)

WRAPPERS: dict[str, Callable[[Layer], Layer]] = {
    "plain": lambda layer: layer,
    "residual": lambda layer: functools.partial(_residual, layer),
    "remat": lambda layer: functools.partial(_remat, layer, None),
    "remat_dots": lambda layer: functools.partial(_remat, layer, POLICIES.dots_saveable),
    "remat_dots_flat": lambda layer: functools.partial(_remat, layer, POLICIES.dots_with_no_batch_dims_saveable),
    "remat_all": lambda layer: functools.partial(_remat, layer, POLICIES.everything_saveable),
    "remat_names": lambda layer: functools.partial(_remat, layer, POLICIES.save_only_these_names("hidden")),
    "remat_not_names": lambda layer: functools.partial(_remat, layer, POLICIES.save_anything_except_these_names("out")),
    "remat_open": lambda layer: functools.partial(_remat_open, layer),
    "remat_nested": lambda layer: functools.partial(_remat_nested, layer),
    "jit": lambda layer: functools.partial(_jit, layer),
    "inline": lambda layer: functools.partial(_inline, layer),
    "cond": lambda layer: functools.partial(_cond, layer),
    "switch": lambda layer: functools.partial(_switch, layer),
    "scan_repeat": lambda layer: functools.partial(_scan_repeat, layer),
    "scan_jit": lambda layer: functools.partial(_scan_jit, layer),
    "scan_remat": lambda layer: functools.partial(_scan_remat, layer),
    "scan_cond": lambda layer: functools.partial(_scan_cond, layer),
    "fori": lambda layer: functools.partial(_fori, layer),
    "vmap": lambda layer: functools.partial(_vmap, layer),
    "custom_vjp": lambda layer: functools.partial(_opaque, layer),
}


def stopped(layer: Layer) -> Layer:
    """Keep the layer out of differentiation: for what JAX cannot differentiate in reverse."""
    return functools.partial(_stop, layer)


def _stop(layer: Layer, p, h, c):
    return squash(h @ p["w"] + lax.stop_gradient(layer(lax.stop_gradient(p), lax.stop_gradient(h), c)))


# ---- stacks of layers and the loss ----------------------------------------------------------------------------------


def _apply_all(layers: tuple[Layer, ...], p, h, c):
    for number, layer in enumerate(layers):
        h = squash(layer(p, h, {**c, "key": jax.random.fold_in(c["key"], number)}))
    return h


def _scan_body(layers: tuple[Layer, ...], c, h, xs):
    p, key = xs
    h = _apply_all(layers, p, h, {**c, "key": key})
    return h, jnp.mean(h, axis=0)


def _scan_stack(model: Model, params, h, c, length: int):
    keys = jax.random.split(c["key"], length)
    body = functools.partial(_scan_body, model.layers, c)
    if model.stack == "scan_remat":
        body = jax.checkpoint(body, prevent_cse=False, policy=POLICIES.dots_with_no_batch_dims_saveable)
    unroll = 2 if model.stack == "scan_unroll" else 1
    h, means = lax.scan(body, h, (params, keys), reverse=model.stack == "scan_reverse", unroll=unroll)
    return h + jnp.sum(means, axis=0)[None, :] / max(length, 1)


def _nested_body(model: Model, c, h, xs):
    p, key = xs
    return _scan_stack(model, p, h, {**c, "key": key}, 2), None


def run_stack(model: Model, params, h, c):
    """Apply the model's layers as it stacks them."""
    if model.stack == "unrolled":
        for number, p in enumerate(params):
            h = _apply_all(model.layers, p, h, {**c, "key": jax.random.fold_in(c["key"], number)})
        return h
    if model.stack == "nested":
        xs = params, jax.random.split(c["key"], model.length)
        return lax.scan(functools.partial(_nested_body, model, c), h, xs)[0]
    return _scan_stack(model, params, h, c, model.length)


def outputs(model: Model, params, batch, key):
    """Return the logits ``[rows, classes]``."""
    h = batch["x"] @ params["in"] if model.inputs == "dense" else params["embed"][batch["tokens"]] + 0.1 * batch["x"]
    c = {
        "key": key,
        "ids": batch["tokens"],
        "mask": batch["mask"],
        "step": batch["step"],
        "scale": jnp.sum(params["in"][0]),
    }
    return run_stack(model, params["layers"], h, c) @ params["head"]


def loss_fn(params, model: Model, batch, key):
    """Return the scalar loss and integer, bool and float side values."""
    logits = outputs(model, params, batch, key)
    if model.loss == "xent":
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1)
        loss = -jnp.mean(picked)
    elif model.loss == "onehot":
        loss = -jnp.mean(jnp.sum(jax.nn.one_hot(batch["labels"], model.classes) * jax.nn.log_softmax(logits), axis=1))
    else:
        loss = jnp.mean(jnp.square(jnp.tanh(logits) - 0.1))
    aux = {
        "mean": jnp.mean(logits),
        "count": jnp.sum(batch["labels"]),
        "any": jnp.any(batch["mask"]),
        "best": jnp.argmax(batch["x"], axis=1),
    }
    return loss, aux


def scalar_loss(params, model: Model, batch, key):
    """Return only the loss."""
    return loss_fn(params, model, batch, key)[0]
