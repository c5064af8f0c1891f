"""The kernel that takes a gated MLP's place: two functions of the values that the plain operations had.

In: an `Mlp`. Out: a forward function (rows and weights to the last product's result) and a backward one, both in the
layouts and dtypes of the plain operations. Nothing but operands is kept between them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax

from memopt.pallas_kernels.gated_mlp import api
from memopt.passes._match import Node, Space
from memopt.passes._match_mlp import Mlp


@dataclasses.dataclass
class Call:
    """A replacement: the form of the kernel."""

    keeps_result: ClassVar[bool] = False

    found: Mlp
    form: api.Form
    note: str

    @property
    def operands(self) -> list[int]:
        """Values that both functions take first."""
        return [self.found.x, self.found.gate, self.found.up, self.found.down]

    def forward(self, *arrays: jax.Array) -> tuple[jax.Array]:
        """Return the last product's result, as the plain step has it."""
        out = api.run(self.form, self.found.activation, *self._arguments(arrays))
        return (self._plain("out", self.found.out, out),)

    def backward(self, *arrays: jax.Array) -> list[jax.Array]:
        """Return the gradients that the plain step has, from operands and cotangent; that of the rows whole."""
        *operands, cotangent = arrays
        cotangent = self._canonical("out", self.found.cotangent, cotangent).astype(operands[0].dtype)
        grads = api.gradients(self.form, self.found.activation, *self._arguments(operands), cotangent)
        made = dict(zip(("x", "gate", "up", "down"), grads, strict=True))
        return [self._plain(name, node, made[name]) for name, node in self.found.grads.items()]

    def _arguments(self, arrays) -> list[jax.Array]:
        names = zip(("x", "gate", "up", "down"), self.operands, arrays, strict=True)
        return [self._canonical(name, value, x) for name, value, x in names]

    def _canonical(self, name: str, value: Any, x: jax.Array) -> jax.Array:
        """Lay out an array in the two axes that kernels want."""
        have, order = self.found.axes.all(value), self.found.orders[name]
        place = {id(a): i for i, a in enumerate(have)}
        x = x.reshape([a.size for a in have]).transpose([place[id(a)] for axis in order for a in axis])
        return x.reshape([math.prod(a.size for a in axis) for axis in order])

    def _plain(self, name: str, node: Node, x: jax.Array) -> jax.Array:
        """Lay out a result of the kernels as the plain step has it."""
        aval, order = node.eqn.outvars[0].aval, [a for axis in self.found.orders[name] for a in axis]
        place = {id(a): i for i, a in enumerate(order)}
        x = x.reshape([a.size for a in order]).transpose([place[id(a)] for a in self.found.axes.all(node.outs[0])])
        return x.reshape(aval.shape).astype(aval.dtype)


def make(space: Space, found: Mlp, platform: str) -> Call:
    """Choose the form for what was found; arguments as in `_attention_call.make`."""
    call = Call(found, api.Form(name="lean"), "pure JAX")
    if platform != "tpu":
        return call
    avals = [jax.ShapeDtypeStruct(space.avals[v].shape, space.avals[v].dtype) for v in call.operands]
    why = api.problem(
        api.Form(name="tpu"), found.activation, *jax.eval_shape(lambda *arrays: call._arguments(arrays), *avals)
    )
    form = api.Form(name="tpu" if why is None else "lean")
    return dataclasses.replace(call, form=form, note="tpu kernel" if why is None else f"pure JAX: {why}")
