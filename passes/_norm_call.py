"""The kernel that takes a norm's place: two functions of the values that the plain operations had.

In: a `Norm`. Out: a forward function (rows and parameters to the result) and a backward one, both in the layouts and
dtypes of the plain operations. Nothing but operands is kept between them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from memopt.pallas_kernels.norms import api
from memopt.pallas_kernels.norms.reference import Spec
from memopt.passes._match import Node, Space
from memopt.passes._match_norm import Norm


@dataclasses.dataclass
class Call:
    """A replacement: the form of the kernel and its settings."""

    keeps_result: ClassVar[bool] = False

    found: Norm
    form: api.Form
    spec: Spec
    note: str

    @property
    def operands(self) -> list[int]:
        """Values that both functions take first."""
        return [v for v in (self.found.x, self.found.scale, self.found.bias) if v is not None]

    def forward(self, *arrays: jax.Array) -> tuple[jax.Array]:
        """Return the result, as the plain step has it."""
        return (self._plain(self.found.out, api.run(self.form, self.spec, *self._arguments(arrays))),)

    def backward(self, *arrays: jax.Array) -> list[jax.Array]:
        """Return the gradients that the plain step has, from operands and cotangent; that of the rows alone."""
        *operands, cotangent = arrays
        x, scale, bias = self._arguments(operands)
        cotangent = self._rows(self.found.cotangent, cotangent).astype(x.dtype)
        dx, dscale, dbias = api.backward(self.form, self.spec, x, scale, bias, cotangent)
        made = {"x": dx, "scale": dscale, "bias": dbias}
        return [self._plain(node, made[name]) for name, node in self.found.grads.items()]

    def _arguments(self, arrays) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        values = dict(zip(self.operands, arrays, strict=True))
        found, dtype = self.found, self.found.out.eqn.outvars[0].aval.dtype
        scale, bias = (None if v is None else values[v].reshape(-1) for v in (found.scale, found.bias))
        x = self._rows(found.x, values[found.x])
        # A result wider than its rows is computed as such.
        return x.astype(dtype) if np.dtype(dtype).itemsize > x.dtype.itemsize else x, scale, bias

    def _rows(self, value: int, x: jax.Array) -> jax.Array:
        have, order = self.found.axes.all(value), [*self.found.rows, *self.found.width]
        place = {id(a): i for i, a in enumerate(have)}
        x = x.reshape([a.size for a in have]).transpose([place[id(a)] for a in order])
        return x.reshape(-1, int(np.prod([a.size for a in self.found.width])))

    def _plain(self, node: Node, x: jax.Array) -> jax.Array:
        aval, have = node.eqn.outvars[0].aval, self.found.axes.all(node.outs[0])
        if x.ndim == 2:
            order = [*self.found.rows, *self.found.width]
            place = {id(a): i for i, a in enumerate(order)}
            x = x.reshape([a.size for a in order]).transpose([place[id(a)] for a in have])
        return x.reshape(aval.shape).astype(aval.dtype)


def make(space: Space, found: Norm, platform: str) -> Call:
    """Choose the form for what was found; arguments as in `_attention_call.make`."""
    call = Call(found, api.Form(name="lean"), Spec(found.centered, found.epsilon), "pure JAX")
    if platform not in ("tpu", "gpu"):
        return call
    avals = [jax.ShapeDtypeStruct(space.avals[v].shape, space.avals[v].dtype) for v in call.operands]
    why = api.problem(
        api.Form(name=platform), call.spec, *jax.eval_shape(lambda *arrays: call._arguments(arrays), *avals)
    )
    form = api.Form(name=platform if why is None else "lean")
    return dataclasses.replace(call, form=form, note=f"{platform} kernel" if why is None else f"pure JAX: {why}")
