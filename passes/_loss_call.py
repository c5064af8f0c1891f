"""The kernel that takes a cross-entropy's place: two functions of the values that the plain operations had.

In: a `Loss`. Out: a forward function (hidden states, weight, labels to the loss of each token and the log-sum-exp) and
a backward one, both in the layouts and dtypes of the plain operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memopt.pallas_kernels.linear_cross_entropy import api
from memopt.pallas_kernels.linear_cross_entropy.lean import chunk_size
from memopt.pallas_kernels.linear_cross_entropy.reference import Spec
from memopt.passes._match import Space
from memopt.passes._match_loss import Loss


@dataclasses.dataclass
class Call:
    """A replacement: the form of the kernel and its settings.

    `divided`: XLA partitions the step. Tokens then keep the dimensions that they have, because devices may split more
    than one of them.
    """

    keeps_result: ClassVar[bool] = True  # whether the backward function takes the results of the forward one

    found: Loss
    form: api.Form
    spec: Spec
    note: str
    divided: bool = False

    @property
    def operands(self) -> list[int]:
        """Values that both functions take first."""
        return [self.found.hidden, self.found.weight, self.found.labels]

    def forward(self, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the loss of each token, as the plain step has it, and the log-sum-exp."""
        loss, lse = api.forward(self.form, self.spec, *self._arguments(arrays))
        aval = self.found.loss.eqn.outvars[0].aval
        loss = loss * jnp.asarray(self.found.sign, loss.dtype)
        loss = (loss if loss.size == aval.size else loss.sum()).reshape(aval.shape).astype(aval.dtype)
        return loss, checkpoint_name(lse, "linear_cross_entropy_lse")

    def backward(self, *arrays: jax.Array) -> list[jax.Array]:
        """Return the gradients that the plain step has, from operands, log-sum-exp and cotangent."""
        *operands, _, lse, cotangent = arrays
        cotangent = cotangent.astype(lse.dtype) * jnp.asarray(self.found.cotangent_sign, lse.dtype)
        cotangent = (
            cotangent.reshape(lse.shape) if cotangent.size > 1 else jnp.broadcast_to(cotangent.reshape(()), lse.shape)
        )
        dhidden, dweight = api.backward(self.form, self.spec, *self._arguments(operands), lse, cotangent)
        return [self._plain(name, node, {"hidden": dhidden, "weight": dweight}[name]) for name, node in self._grads()]

    def _grads(self):
        return list(self.found.grads.items())

    def _arguments(self, arrays):
        hidden, weight, labels = arrays
        tokens = [a.size for a in self.found.tokens] if self.divided else [labels.size]
        dim = hidden.size // labels.size
        shape = (dim, -1) if self.spec.vocab_axis else (-1, dim)
        return hidden.reshape(*tokens, dim), weight.reshape(shape), labels.reshape(tokens).astype(jnp.int32)

    def _plain(self, name: str, node: Any, x: jax.Array) -> jax.Array:
        found, aval = self.found, node.eqn.outvars[0].aval
        if name == "hidden":
            order = [*found.tokens, *found.width]
        else:
            order = [*found.width, *found.vocab] if self.spec.vocab_axis else [*found.vocab, *found.width]
        place = {id(a): i for i, a in enumerate(order)}
        x = x.reshape([a.size for a in order])
        x = x.transpose([place[id(a)] for a in found.axes.all(node.outs[0])])
        return x.reshape(aval.shape).astype(aval.dtype)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Into how many parts values are split in a step that XLA partitions.

    Attributes:
        tokens: parts of the tokens, 1 where it is not known.
        features: parts of features, the vocabulary among them, 1 where it is not known.
        given: shape of an argument that comes sharded -> parts of each of its dimensions.
    """

    tokens: int
    features: int = 1
    given: Mapping[tuple[int, ...], tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def of_vocabulary(self, weight: tuple[int, ...], axis: int) -> int:
        """Return into how many parts the vocabulary of a weight is split, which lies along an axis."""
        if self.features > 1 or weight not in self.given or len(weight) != 2:
            return self.features
        return self.given[weight][axis]


def make(space: Space, found: Loss, platform: str, parts: Parts | None = None) -> Call:
    """Choose settings and form for what was found.

    Args:
        space: where it was found.
        found: the loss.
        platform: "tpu", or anything else for pure JAX.
        parts: into how many parts values are split in a step that XLA partitions; None in another one.

    Raises:
        NotImplementedError: the weight's axes are interleaved.
    """
    weight = [id(a) for a in found.axes.all(found.weight)]
    order = [id(a) for a in (*found.vocab, *found.width)]
    vocab_axis = 0 if weight == order else 1
    hidden = [id(a) for a in found.axes.all(found.hidden)]
    if hidden != [id(a) for a in (*found.tokens, *found.width)] or sorted(weight) != sorted(order):
        raise NotImplementedError("the axes of hidden states or weight are in an order that is not served")
    call = Call(found, api.Form(name="lean"), Spec(vocab_axis=vocab_axis), "pure JAX")
    if parts is not None:
        ways = parts.of_vocabulary(space.avals[found.weight].shape, vocab_axis)
        return _divided(call, parts.tokens, ways)
    if platform != "tpu":
        return call
    avals = [jax.ShapeDtypeStruct(space.avals[v].shape, space.avals[v].dtype) for v in call.operands]
    shapes = jax.eval_shape(lambda *arrays: call._arguments(arrays), *avals)
    why = api.problem(api.Form(name="tpu"), call.spec, *shapes)
    form = api.Form(name="tpu" if why is None else "lean")
    return dataclasses.replace(call, form=form, note="tpu kernel" if why is None else f"pure JAX: {why}")


def _divided(call: Call, token_parts: int, feature_parts: int) -> Call:
    """Return a call for a step that XLA partitions: a slice of the vocabulary has its share of each device's part."""
    tokens, vocab = (math.prod(a.size for a in axis) for axis in (call.found.tokens, call.found.vocab))
    parts, note = feature_parts, f"pure JAX, in slices of {feature_parts} parts of the vocabulary"
    if vocab % feature_parts:
        parts = 1
        note = (
            f"pure JAX: a vocabulary of {vocab} does not divide over {feature_parts} devices, each slice is one of all"
        )
    chunk = chunk_size(max(1, tokens // token_parts), vocab // parts)
    form = api.Form(name="lean", blocks=(0, chunk), parts=parts)
    return dataclasses.replace(call, form=form, note=note if feature_parts > 1 else call.note, divided=True)
