"""The kernel that takes a naive attention's place: two functions of the values that the plain operations had.

In: a `Found`. Out: a forward function (values of q, k, v, masks, biases to the product's result and the log-sum-exp)
and a backward one, both in the layouts and dtypes of the plain operations; and the mask as static settings where it is
a causal or a windowed one. It knows jaxprs only through the space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from memopt import _compat as c
from memopt.pallas_kernels._dtypes import wide
from memopt.pallas_kernels.attention import api, reference
from memopt.pallas_kernels.attention.spec import Extras, Spec, lean_blocks
from memopt.passes._mask_bounds import Unknown, row_extents
from memopt.passes._match import Node, Space
from memopt.passes._match_attention import Found
from memopt.passes._match_dims import Atom, region_between


@dataclasses.dataclass
class Call:
    """A replacement: the form of the kernel, its settings, and which masks are still arrays."""

    keeps_result: ClassVar[bool] = True  # whether the backward function takes the results of the forward one

    found: Found
    form: api.Form
    spec: Spec
    masks: list[tuple[int, bool]]
    note: str
    code: Any = api  # has `forward` and `backward` as the kernels' `api` has them

    @property
    def operands(self) -> list[int]:
        """Values that both functions take first: q, k, v, masks, biases."""
        biases = [value for value, _ in self.found.scores.biases]
        return [self.found.q, self.found.k, self.found.v, *(value for value, _ in self.masks), *biases]

    def forward(self, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the second product's result, as the plain step has it, and the log-sum-exp."""
        q, k, v, bias, extras = self._arguments(arrays)
        out, lse = self.code.forward(self.form, self.spec, q, k, v, bias, extras)
        if self._mean_rows(extras):
            out = api.mean_where_masked(self.spec, out, v, extras)
        node = self.found.out
        out = checkpoint_name(self._plain("out", node.outs[0], out), "attention_out")
        return out, checkpoint_name(lse, "attention_lse")

    def backward(self, *arrays: jax.Array) -> list[jax.Array]:
        """Return the gradients that the plain step has, from operands, result, log-sum-exp and cotangent."""
        *operands, out, lse, cotangent = arrays
        q, k, v, bias, extras = self._arguments(operands)
        out = self._canonical("out", self.found.out.outs[0], out).astype(q.dtype)
        cotangent = self._canonical("out", self.found.cotangent, cotangent).astype(q.dtype)
        more_v = None
        if self._mean_rows(extras):
            some = reference.mask(self.spec, extras, out.shape[1], k.shape[1]).any(axis=-1).swapaxes(1, 2)[..., None]
            _, pull = jax.vjp(lambda v: api.mean_where_masked(self.spec, jax.lax.stop_gradient(out), v, extras), v)
            (more_v,) = pull(cotangent)
            cotangent = jnp.where(some, cotangent, jnp.zeros_like(cotangent))
        dq, dk, dv, _ = self.code.backward(self.form, self.spec, q, k, v, bias, extras, out, lse, cotangent)
        dv = dv if more_v is None else dv + more_v
        made = {"q": dq, "k": dk, "v": dv}
        return [self._plain(name, node.outs[0], made[name]) for name, node in self.found.grads.items()]

    def _mean_rows(self, extras: Extras) -> bool:
        return extras.mask is not None and min(self.found.scores.fills) > -np.inf

    def _arguments(self, arrays: Sequence[jax.Array]):
        values = dict(zip(self.operands, arrays, strict=True))
        dtype = values[self.found.q].dtype
        names = (("q", self.found.q), ("k", self.found.k), ("v", self.found.v))
        q, k, v = (self._canonical(name, value, values[value]).astype(dtype) for name, value in names)
        mask = None
        for value, allows in self.masks:
            keep = self._canonical("mask", value, values[value])
            keep = keep if allows else jnp.logical_not(keep)
            mask = keep if mask is None else jnp.logical_and(mask, keep)
        bias = None
        for value, factor in self.found.scores.biases:
            more = self._canonical("mask", value, values[value]).astype(wide(dtype)) * factor
            bias = more if bias is None else bias + more
        return q, k, v, bias, Extras(mask=mask)

    def _canonical(self, name: str, value: int, x: jax.Array) -> jax.Array:
        """Lay out an array in the four axes of the kernels; for masks and biases, absent axes have size 1."""
        have, order = self.found.axes.all(value), self.found.orders[name]
        x = x.reshape([a.size for a in have])
        place = {id(a): i for i, a in enumerate(have)}
        wanted = [a for axis in order for a in axis]
        x = x.transpose([place[id(a)] for a in wanted if id(a) in place])
        x = x.reshape([a.size if id(a) in place else 1 for a in wanted])
        shape = [a.size if id(a) in place or _partly(axis, place) else 1 for axis in order for a in axis]
        x = jnp.broadcast_to(x, shape)
        sizes, start = [], 0
        for axis in order:
            sizes.append(int(np.prod(shape[start : start + len(axis)], dtype=int)))
            start += len(axis)
        return x.reshape(sizes)

    def _plain(self, name: str, value: int, x: jax.Array) -> jax.Array:
        """Lay out a result of the kernels as the plain step has it."""
        aval, order, want = self.found.axes.space.avals[value], self.found.orders[name], self.found.axes.all(value)
        atoms = [a for axis in order for a in axis]
        x = x.reshape([a.size for a in atoms])
        place = {id(a): i for i, a in enumerate(atoms)}
        return x.transpose([place[id(a)] for a in want]).reshape(aval.shape).astype(aval.dtype)


def _partly(axis: Sequence[Atom], place: dict[int, int]) -> bool:
    return any(id(a) in place for a in axis)


def make(space: Space, found: Found, platform: str, parts: int = 1, kind: str | None = None) -> Call:
    """Choose settings and form for what was found.

    Args:
        space: where it was found.
        found: the attention.
        platform: "tpu", "gpu", or anything else for pure JAX.
        parts: into how many parts XLA splits the tokens; tiles of the pure-JAX form are that much larger.
        kind: the kind of device, such as "v6e", that TPU kernels are laid out for.
    """
    scores = found.scores
    right, left, masks = None, None, []
    for value, allows in scores.masks:
        bounds = static_bounds(space, found, value, allows) if value in space.fixed else None
        if bounds is None:
            masks.append((value, allows))
        else:
            left, right = _tighter(left, bounds[0]), _tighter(right, bounds[1])
    spec = Spec(
        scale=scores.scale,
        causal=right is not None,
        offset=right or 0,
        window=None if left is None else (left, None),
        soft_cap=scores.soft_cap,
    )
    call = Call(found, api.Form(name="lean"), spec, masks, "")
    if parts > 1:
        outer, rows, heads = ([a.size for a in axis] for axis in found.orders["q"][:3])
        columns = math.prod(a.size for a in found.orders["k"][1])
        tiles = lean_blocks(max(1, math.prod((*outer, *heads)) // parts), math.prod(rows), columns, spec)
        return dataclasses.replace(call, form=api.Form(name="lean", blocks=tiles), note="pure JAX")
    return dataclasses.replace(call, **dict(zip(("form", "note"), _form(space, call, platform, kind), strict=True)))


def _tighter(first: int | None, second: int | None) -> int | None:
    bounds = [b for b in (first, second) if b is not None]
    return min(bounds) if bounds else None


def _form(space: Space, call: Call, platform: str, kind: str | None) -> tuple[api.Form, str]:
    if platform not in ("tpu", "gpu"):
        return api.Form(name="lean"), "pure JAX"
    form = api.Form(name=platform, device=kind)
    avals = [space.avals[value] for value in call.operands]
    shapes = jax.eval_shape(lambda *arrays: call._arguments(arrays), *(_shape(aval) for aval in avals))
    why = api.problem(form, call.spec, *shapes)
    return (form, f"{platform} kernel") if why is None else (api.Form(name="lean"), f"pure JAX: {why}")


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


# Masks that are settings.

_MOST_PAIRS = 2**29  # of a mask that is evaluated pair by pair


def static_bounds(space: Space, found: Found, value: int, allows: bool) -> tuple[int | None, int | None] | None:
    """Return `(left, right)` when a constant mask allows exactly `row - left <= column <= row + right`, else None."""
    time, columns = found.orders["mask"][2], found.orders["mask"][3]
    have = found.axes.all(value)
    if [id(a) for a in have] not in ([id(a) for a in (*time, *columns)], [id(a) for a in (*columns, *time)]):
        return None
    flip = bool(columns) and [id(a) for a in have][0] == id(columns[0]) and bool(time)
    nodes = region_between(space, [value], [])
    size = int(np.prod([a.size for a in columns]))
    try:
        first, last, count = row_extents(nodes, value, space.avals[value].shape, allows=allows, flip=flip)
    except Unknown:
        if math.prod(space.avals[value].shape) > _MOST_PAIRS:
            return None
        extent = jax.jit(lambda: _extent(nodes, value, allows, flip)).lower()
        first, last, count = (np.asarray(x) for x in extent.compile()())
    return _bounds(first, last, count, size)


def _extent(nodes: Sequence[Node], value: int, allows: bool, flip: bool):
    env: dict[int, Any] = {}
    for node in nodes:
        operands = [
            v.val if isinstance(v, c.Literal) else env[n] for v, n in zip(node.eqn.invars, node.ins, strict=True)
        ]
        result = node.eqn.primitive.bind(*operands, **node.eqn.params)
        env[node.outs[0]] = result[0] if node.eqn.primitive.multiple_results else result
    keep = env[value].reshape([n for n in env[value].shape if n > 1])
    keep = (keep if allows else jnp.logical_not(keep)).T if flip else (keep if allows else jnp.logical_not(keep))
    column = jax.lax.broadcasted_iota(jnp.int32, keep.shape, 1)
    big = jnp.full_like(column, keep.shape[1])
    first = jnp.where(keep, column, big).min(axis=1)
    return first, jnp.where(keep, column, -jnp.ones_like(column)).max(axis=1), keep.sum(axis=1, dtype=jnp.int32)


def _bounds(first, last, count, columns: int) -> tuple[int | None, int | None] | None:
    if (count == 0).any() or (count != last - first + 1).any():
        return None
    rows = np.arange(len(first))
    right, left = _offset(last - rows, last < columns - 1), _offset(rows - first, first > 0)
    if right is False or left is False:
        return None
    clipped = (right is None or (np.minimum(rows + right, columns - 1) == last).all()) and (
        left is None or (np.maximum(rows - left, 0) == first).all()
    )
    return (left, right) if clipped else None


def _offset(distance: np.ndarray, inner: np.ndarray) -> int | bool | None:
    """Return the one distance of rows that the edge does not clip, None where it clips all, False if they differ."""
    values = set(distance[inner].tolist())
    return None if not values else values.pop() if len(values) == 1 else False
