"""Training steps over Flax's `TrainState`, one for each kind of model.

In come a state and a batch, out go the new state and the mean loss. The steps are top-level functions that reach the
model through `state.apply_fn`, so one function serves every model of its kind. None of them saves memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from .common import mean_cross_entropy

Batch = dict[str, Any]
TrainState = train_state.TrainState


class DropoutState(train_state.TrainState):
    """A `TrainState` with the key from which each step's dropout key is folded."""

    key: Any


class NormState(train_state.TrainState):
    """A `TrainState` with the running statistics of batch normalization."""

    batch_stats: Any


State = TrainState | DropoutState | NormState
Step = Callable[[Any, Any], tuple[Any, jax.Array]]


@functools.cache
def adamw(learning_rate: float = 3e-4, weight_decay: float = 0.1) -> optax.GradientTransformation:
    """Make the AdamW of the reference steps; equal settings give the same object, so that states compare equal.

    Memory: two moments a parameter, in the parameter's dtype.

    Example:
        >>> adamw(1e-3) is adamw(1e-3)
        True

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """
    return optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=weight_decay)


def language_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
    """Take one step on `{"tokens", "labels"}`, each int32 `[batch, length]`.

    Example:
        >>> from memopt.models.steps import concrete, reference_step
        >>> step, args, _ = reference_step("gpt2", tiny=True)
        >>> state, loss = step(*concrete(args, seed=0))
        >>> int(state.step), loss.shape
        (1, ())
    """
    loss, grads = jax.value_and_grad(_language_loss)(state.params, state, batch)
    return state.apply_gradients(grads=grads), loss


def dropout_step(state: DropoutState, batch: Batch) -> tuple[DropoutState, jax.Array]:
    """Take one step as `language_step` does, with a dropout key folded from the state's key and step."""
    rngs = {"dropout": jax.random.fold_in(state.key, state.step)}
    loss, grads = jax.value_and_grad(_language_loss)(state.params, state, batch, rngs)
    return state.apply_gradients(grads=grads), loss


def image_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
    """Take one step on `{"images", "labels"}`: images `[batch, ..., channels]`, one int32 class an image or a pixel."""
    loss, grads = jax.value_and_grad(_image_loss)(state.params, state, batch)
    return state.apply_gradients(grads=grads), loss


def norm_step(state: NormState, batch: Batch) -> tuple[NormState, jax.Array]:
    """Take one step as `image_step` does, and update the running statistics of batch normalization."""
    (loss, stats), grads = jax.value_and_grad(_norm_loss, has_aux=True)(state.params, state, batch)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


def abstract_state(
    model: nn.Module, inputs: Any, optimizer: optax.GradientTransformation, *, dropout: bool = False
) -> State:
    """Make the shapes of a model's training state; allocates nothing.

    Args:
        model: a linen module that takes one argument.
        inputs: that argument, a `jax.ShapeDtypeStruct`.
        optimizer: the optax transformation of the state.
        dropout: give the state a dropout key.

    Returns:
        A `NormState` for a model with `batch_stats`, a `DropoutState` with `dropout`, else a `TrainState`. Each leaf is
        a `jax.ShapeDtypeStruct`.

    Example:
        >>> from memopt.models.gpt2 import GPT2, GPT2_TINY
        >>> tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        >>> abstract_state(GPT2(GPT2_TINY), tokens, adamw()).params["wte"]["embedding"].shape
        (256, 32)
    """
    return jax.eval_shape(functools.partial(_make_state, model, optimizer, dropout), inputs)


def _make_state(model: nn.Module, optimizer: optax.GradientTransformation, dropout: bool, inputs: Any) -> State:
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, inputs)
    parts = {"apply_fn": model.apply, "params": variables["params"], "tx": optimizer}
    if "batch_stats" in variables:
        state = NormState.create(**parts, batch_stats=variables["batch_stats"])
    elif dropout:
        state = DropoutState.create(**parts, key=jax.random.key(2))
    else:
        state = TrainState.create(**parts)
    return state.replace(step=jnp.zeros((), jnp.int32))


def _language_loss(params: Any, state: TrainState, batch: Batch, rngs: dict[str, Any] | None = None) -> jax.Array:
    logits = state.apply_fn({"params": params}, batch["tokens"], rngs=rngs)
    return mean_cross_entropy(logits, batch["labels"])


def _image_loss(params: Any, state: TrainState, batch: Batch) -> jax.Array:
    return mean_cross_entropy(state.apply_fn({"params": params}, batch["images"]), batch["labels"])


def _norm_loss(params: Any, state: NormState, batch: Batch) -> tuple[jax.Array, Any]:
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, updates = state.apply_fn(variables, batch["images"], mutable=["batch_stats"])
    return mean_cross_entropy(logits, batch["labels"]), updates["batch_stats"]
