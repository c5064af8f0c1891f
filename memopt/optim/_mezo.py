"""MeZO: training with forward passes alone, in the memory of inference.

In comes a loss function, out comes a step. The direction of a step is made again from its seed whenever it is needed,
the parameters are perturbed in place, and momentum and Adam's moments are replayed from the slopes of past steps, so
that nothing of the parameters' size is kept. It is no optax transformation, since there is no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt.optim._leaves import Leaf, describe, leaf_key, static_int, wide

Method = Literal["sgd", "momentum", "adam"]
METHODS = ("sgd", "momentum", "adam")


class MezoState(NamedTuple):
    """What a MeZO step takes and returns.

    Attributes:
      params: the parameters.
      count: int32 scalar, the number of steps so far; seeds follow from it.
      slopes: float32 `[history]`, the slopes of the last steps, the newest first; empty for "sgd".
      thresholds: float32 `[leaves]`, the magnitude up to which a leaf's elements move; empty without a sparse mask.

    Example:
      >>> import jax.numpy as jnp
      >>> from memopt.optim import mezo
      >>> mezo(lambda params: jnp.sum(params**2), 0.1, method="adam").init(jnp.ones(3)).slopes.shape
      (16,)
    """

    params: Any
    count: jax.Array
    slopes: jax.Array
    thresholds: jax.Array


def direction(leaf: Leaf, seed: int, count: Any) -> jax.Array:
    """Make the normal direction of one leaf at one step, in wide precision; the same whenever it is asked for."""
    return jax.random.normal(leaf_key(seed, leaf, count), leaf.shape, wide(leaf.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MezoStep:
    """A training step of two forward passes, made by `mezo`: `state = step.init(params)`, `step(state, *args)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from memopt.optim import mezo
      >>> step = mezo(lambda params: jnp.sum(params**2), 0.1)
      >>> state, loss = jax.jit(step, donate_argnums=0)(step.init(jnp.ones(3)))
      >>> int(state.count), loss.shape
      (1, ())
    """

    loss_fn: Callable[..., jax.Array]
    learning_rate: Any
    epsilon: float
    method: Method
    b1: float
    b2: float
    eps: float
    history: int
    weight_decay: float
    sparsity: float | None
    blocks: int
    seed: int

    def init(self, params: Any) -> MezoState:
        """Return the state before the first step; it holds the parameters themselves, and no copy of them."""
        slots = 0 if self.method == "sgd" else self.history
        values = jax.tree.leaves(params) if self.sparsity is not None else []
        limits = [jnp.quantile(jnp.abs(one.astype(jnp.float32)), 1 - self.sparsity) for one in values]
        thresholds = jnp.stack(limits) if limits else jnp.zeros(0, jnp.float32)
        return MezoState(params, jnp.zeros([], jnp.int32), jnp.zeros(slots, jnp.float32), thresholds)

    def __call__(self, state: MezoState, *args: Any) -> tuple[MezoState, jax.Array]:
        """Take one step; donate the state, so that the parameters are changed in place.

        Args:
          state: from `init` or the step before.
          *args: what the loss takes beside the parameters.

        Returns:
          The new state, and the mean of the two losses.
        """
        masks, count = self._masks(state), state.count
        up = self._moved(state.params, count, masks, self.epsilon)
        high = self.loss_fn(up, *args)
        # The count goes through the barriers too: XLA would keep equal directions from one pass to the next.
        up, high, count = jax.lax.optimization_barrier((up, high, count))
        down = self._moved(up, count, masks, -2 * self.epsilon)
        low = self.loss_fn(down, *args)
        down, low, count = jax.lax.optimization_barrier((down, low, count))
        slope = (high - low).astype(jnp.float32) / (2 * self.epsilon)
        slopes = jnp.concatenate([slope[None], state.slopes[:-1]]) if state.slopes.size else state.slopes
        params = self._updated(down, count, masks, slope, slopes)
        return MezoState(params, state.count + 1, slopes, state.thresholds), (high + low) / 2

    def _masks(self, state: MezoState) -> list[Any]:
        """Pack the sparse masks of the unperturbed parameters, one bit an element, or None for each leaf."""
        leaves = jax.tree.leaves(state.params)
        if self.sparsity is None:
            return [None] * len(leaves)
        limits = state.thresholds
        return [jnp.packbits(jnp.abs(one.astype(jnp.float32)) <= limits[i]) for i, one in enumerate(leaves)]

    def _moved(self, params: Any, count: jax.Array, masks: list[Any], distance: float) -> Any:
        """Move all parameters along this step's direction, one leaf after the other."""
        leaves, values, treedef = describe(params)
        new = []
        for part in zip(leaves, values, masks, strict=True):
            moved = self._move(*part, count, len(leaves), distance)
            moved, count = jax.lax.optimization_barrier((moved, count))
            new.append(moved)
        return treedef.unflatten(new)

    def _move(self, leaf: Leaf, value: jax.Array, mask: Any, count: Any, total: int, distance: float) -> jax.Array:
        along = self._active(leaf, count, total) * distance * direction(leaf, self.seed, count)
        return (value.astype(along.dtype) + _masked(along, mask)).astype(value.dtype)

    def _active(self, leaf: Leaf, count: Any, total: int) -> Any:
        """Return 1 where the leaf's block is the one of this step, else 0."""
        if self.blocks == 1:
            return 1.0
        own = leaf.index * self.blocks // total
        return (count % self.blocks == own).astype(wide(leaf.dtype))

    def _updated(self, params: Any, count: jax.Array, masks: list[Any], slope: jax.Array, slopes: jax.Array) -> Any:
        """Take back the perturbation and descend, in one pass over each leaf."""
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        leaves, values, treedef = describe(params)
        new = []
        for leaf, value, mask in zip(leaves, values, masks, strict=True):
            active = self._active(leaf, count, len(leaves))
            along = direction(leaf, self.seed, count)
            back = _masked(active * self.epsilon * along, mask)
            if self.method == "sgd":
                step = active * slope.astype(along.dtype) * along
            else:
                step = self._replayed(leaf, count, slopes.astype(along.dtype), len(leaves))
            restored = value.astype(along.dtype) + back
            moved = (restored - rate * (_masked(step, mask) + self.weight_decay * restored)).astype(value.dtype)
            moved, count = jax.lax.optimization_barrier((moved, count))
            new.append(moved)
        return treedef.unflatten(new)

    def _replayed(self, leaf: Leaf, count: Any, slopes: jax.Array, total: int) -> jax.Array:
        """Make the momentum, or Adam's direction, of one leaf from the slopes and seeds of past steps."""
        dtype = slopes.dtype

        def add(back, sums):
            known = (back <= count).astype(dtype) * self._active(leaf, count - back, total)
            part = known * slopes[back] * direction(leaf, self.seed, count - back)
            age = back.astype(dtype)
            mu = sums[0] + (1 - self.b1) * jnp.power(jnp.asarray(self.b1, dtype), age) * part
            if self.method == "momentum":
                return (mu,)
            return mu, sums[1] + (1 - self.b2) * jnp.power(jnp.asarray(self.b2, dtype), age) * jnp.square(part)

        zeros = jnp.zeros(leaf.shape, dtype)
        sums = jax.lax.fori_loop(0, self.history, add, (zeros,) if self.method == "momentum" else (zeros, zeros))
        steps = jnp.minimum(count + 1, self.history).astype(dtype)
        mu = sums[0] / (1 - jnp.power(jnp.asarray(self.b1, dtype), steps))
        if self.method == "momentum":
            return mu
        nu = sums[1] / (1 - jnp.power(jnp.asarray(self.b2, dtype), steps))
        return mu / (jnp.sqrt(nu) + self.eps)


def _masked(along: jax.Array, mask: Any) -> jax.Array:
    if mask is None:
        return along
    bits = jnp.unpackbits(mask, count=along.size).reshape(along.shape)
    return along * bits.astype(along.dtype)


def mezo(
    loss_fn: Callable[..., jax.Array],
    learning_rate: optax.ScalarOrSchedule,
    *,
    epsilon: float = 1e-3,
    method: Method = "sgd",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    history: int = 16,
    weight_decay: float = 0.0,
    sparsity: float | None = None,
    blocks: int = 1,
    seed: int = 0,
) -> MezoStep:
    """Make a training step of two forward passes and no backward pass.

    Memory: that of one forward pass. There are no gradients and no activations to keep, and the parameters are
    perturbed in place when the state is donated; what is added is the transient of one leaf at a time. A sparse mask
    adds one bit a parameter while a step runs. Cost: two forward passes, and three normal numbers a parameter
    (`history` more with "momentum" and "adam").

    Args:
      loss_fn: `(params, *args) -> loss`, a scalar. It need not be differentiable.
      learning_rate: a number or an optax schedule.
      epsilon: length of the perturbation, along a normal direction.
      method: "sgd"; "momentum" and "adam" make their moments again from the slopes of the last `history` steps.
      b1, b2, eps: of momentum and Adam, bias-corrected for the window.
      history: steps that momentum and Adam look back.
      weight_decay: decoupled.
      sparsity: share of each leaf, the largest elements at `init`, that stays as it is; None moves all elements.
      blocks: groups of leaves of which one in turn is moved at each step.
      seed: seeds the directions.

    Returns:
      A step: `state = step.init(params)`, then `state, loss = jax.jit(step, donate_argnums=0)(state, *args)`;
      `state.params` are the parameters.

    Raises:
      ValueError: a setting is out of its range.
      TypeError: an integer setting is traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from memopt.optim import mezo
      >>> loss = lambda params, target: jnp.mean((params["w"] - target) ** 2)
      >>> step = mezo(loss, 0.1)
      >>> run, state = jax.jit(step, donate_argnums=0), step.init({"w": jnp.zeros(4)})
      >>> for _ in range(200):
      ...     state, value = run(state, jnp.ones(4))
      >>> float(value) < 0.05
      True

    Source: Malladi et al. 2023, "Fine-tuning language models with just forward passes", algorithm 1 and appendix B; the
    mask from Liu et al. 2024, "Sparse MeZO"; blocks from Zhang et al. 2024, "Revisiting zeroth-order optimization".

    Limits: perturbing in place and back rounds the parameters, in bfloat16 noticeably. Momentum and Adam forget what is
    older than `history`. Adam's replay holds two arrays of the leaf's size.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    numbers = {"history": static_int("history", history), "blocks": static_int("blocks", blocks)}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value} is too small: choose 1 or more")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is no share: choose a number from 0 to below 1, or None")
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} is too small: choose a number above 0")
    return MezoStep(
        loss_fn=loss_fn,
        learning_rate=learning_rate,
        epsilon=epsilon,
        method=method,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        sparsity=sparsity,
        seed=static_int("seed", seed),
        **numbers,
    )
