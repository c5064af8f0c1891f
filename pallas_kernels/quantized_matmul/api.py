"""One `quantized_matmul` for all platforms, differentiated for its activations, and a `dot_general` for Flax layers.

In: arrays as users hold them and a `QuantizedWeight`. Out: the product. The weight is frozen: it has no gradient. A
form that cannot serve a call is passed over with a logged sentence; the pure-JAX form serves every call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from . import lean, reference, tpu
from .weight import QuantizedWeight, quantize_weight

Implementation = Literal["reference", "lean", "tpu"]
_log = logging.getLogger("memopt.pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way to compute the product: which code, tile sizes (None: by shape), whether kernels are emulated."""

    name: Implementation
    blocks: tuple[int, int, int] | None = None
    interpret: bool = False


def quantized_matmul(
    x: jax.Array,
    weight: QuantizedWeight,
    *,
    activations: Literal["int8"] | None = None,
    implementation: Implementation | None = None,
    blocks: tuple[int, int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply activations with a quantized weight that is never dequantized whole.

    Memory: the weight stays in 1 or half a byte an entry, forward and backward; a tile of it exists in floats. Cost: a
    conversion an entry and tile. Not exact: the weight carries its rounding, and with `activations="int8"` each token's
    activations are rounded to 8 bits, of which the gradient knows nothing (straight through).

    Args:
        x: `[..., rows]`, bfloat16, float16 or float32.
        weight: from `quantize_weight`, `[rows, columns]`; frozen, it has no gradient.
        activations: "int8" to multiply 8-bit codes of both sides into int32.
        implementation: None to choose; or "reference", "lean", "tpu".
        blocks: `(tokens, rows, columns)` of a tile, None to choose by shape; "lean" reads the last alone.
        interpret: run the kernels' bodies in JAX, on any platform (slow; for tests).

    Returns:
        `[..., columns]` in `x`'s dtype, summed in float32.

    Raises:
        ValueError: shapes or settings do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> weight = quantize_weight(jnp.eye(4), bits=4)
        >>> quantized_matmul(jnp.arange(4.0)[None], weight).tolist()
        [[0.0, 1.0, 2.0, 3.0]]

    Source: Dettmers et al. 2022, "LLM.int8()", vector-wise scales (no outliers are set apart); Kim et al. 2023,
    "FineQuant".

    Limits: no GPU kernel: there the pure-JAX form runs. First derivatives in reverse mode only.
    """
    if activations not in (None, "int8"):
        raise ValueError(f"{activations=}: None and 'int8' are served")
    if x.ndim < 1 or x.shape[-1] != weight.shape[0] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x {x.dtype} {x.shape}, weight {weight.shape}: give floats [..., {weight.shape[0]}]")
    rows, rounded = x.reshape(-1, x.shape[-1]), activations == "int8"
    if implementation is not None:
        form = Form(name=implementation, blocks=blocks, interpret=interpret)
        if why := problem(form, rows, weight):
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
        out = run(form, rounded, rows, weight)
    else:
        out = _dispatch(rounded, blocks, rows, weight)
    return out.reshape(*x.shape[:-1], weight.shape[1])


def problem(form: Form, x: Any, weight: QuantizedWeight) -> str | None:
    """Say why a form cannot serve a call, or None where it can; shapes and dtypes of the arguments are enough."""
    return tpu.problem(x, weight, form.blocks) if form.name == "tpu" else None


def _dispatch(rounded: bool, blocks, x, weight: QuantizedWeight) -> jax.Array:
    plain = functools.partial(run, Form(name="lean", blocks=blocks), rounded)
    why = tpu.problem(x, weight, None)
    if why:
        _log.info("quantized matmul on tpu falls back to pure JAX: %s", why)
        return plain(x, weight)
    kernel = functools.partial(run, Form(name="tpu"), rounded)
    return lax.platform_dependent(x, weight, default=plain, tpu=kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(form: Form, rounded: bool, x, weight: QuantizedWeight):
    """Compute the product in one form, `x` being a matrix."""
    if form.name == "reference":
        return reference.matmul(x, weight, rounded)
    if form.name == "tpu":
        return tpu.matmul(x, weight, rounded, form.blocks, form.interpret)
    return lean.matmul(x, weight, rounded, form.blocks and form.blocks[2])


def _run_forward(form: Form, rounded: bool, x, weight):
    return run(form, rounded, x, weight), weight


def _run_backward(form: Form, rounded: bool, weight, cotangent):
    return gradient(form, cotangent, weight), None


run.defvjp(_run_forward, _run_backward)


def gradient(form: Form, cotangent, weight: QuantizedWeight) -> jax.Array:
    """Return the gradient of the activations in one form, both being matrices."""
    if form.name == "reference":
        return reference.gradient(cotangent, weight)
    if form.name == "tpu":
        return tpu.gradient(cotangent, weight, form.blocks, form.interpret)
    return lean.gradient(cotangent, weight, form.blocks and form.blocks[2])


# Flax layers.


def quantized_dot_general(
    bits: int = 8, group: int | None = None, activations: Literal["int8"] | None = None
) -> Callable[..., jax.Array]:
    """Return a `dot_general` that quantizes its right side, for layers such as `flax.linen.Dense(dot_general=...)`.

    Memory and cost: parameters stay as they are; the product is that of `quantized_matmul`. For training that knows of
    the rounding: gradients of both sides take the rounded weight for the left side's, and pass straight through the
    rounding for the right side's.

    Args:
        bits, group: as in `quantize_weight`; "adaptive" is not served, as it reads values.
        activations: as in `quantized_matmul`.

    Returns:
        A function with the signature of `jax.lax.dot_general`. Products with batch dimensions, or with a right side
        whose contracted axes do not come first, are computed as they are, with a logged sentence.

    Example:
        >>> dot_general = quantized_dot_general(bits=8)
        >>> dot_general(jnp.ones((1, 2)), jnp.ones((2, 3)), (((1,), (0,)), ((), ()))).tolist()
        [[2.0, 2.0, 2.0]]
    """

    def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **settings):
        (left, right), batch = dimension_numbers
        first, last = tuple(range(len(right))), tuple(range(lhs.ndim - len(left), lhs.ndim))
        if (
            tuple(map(tuple, batch)) != ((), ())
            or tuple(right) != first
            or tuple(left) != last
            or lhs.dtype != rhs.dtype
        ):
            _log.info("dot_general of %s and %s is not quantized: %s", lhs.shape, rhs.shape, dimension_numbers)
            numbers = {"precision": precision, "preferred_element_type": preferred_element_type, **settings}
            return lax.dot_general(lhs, rhs, dimension_numbers, **numbers)
        rows = math.prod(rhs.shape[: len(right)])
        out = _trained(bits, group, activations, lhs.reshape(-1, rows), rhs.reshape(rows, -1))
        out = out.reshape(*lhs.shape[: lhs.ndim - len(left)], *rhs.shape[len(right) :])
        return out if preferred_element_type is None else out.astype(preferred_element_type)

    return dot_general


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _trained(bits: int, group: int | None, activations, x, weight):
    return quantized_matmul(x, quantize_weight(weight, bits, group), activations=activations)


def _trained_forward(bits: int, group: int | None, activations, x, weight):
    quantized = quantize_weight(weight, bits, group)
    return quantized_matmul(x, quantized, activations=activations), (x, quantized)


def _trained_backward(bits: int, group: int | None, activations, saved, cotangent):
    x, quantized = saved
    _, pull = jax.vjp(lambda x: quantized_matmul(x, quantized), x)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dweight = lax.dot_general(
        x, cotangent, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return *pull(cotangent), dweight.astype(x.dtype)


_trained.defvjp(_trained_forward, _trained_backward)
