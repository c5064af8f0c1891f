"""One `rms_norm` and one `layer_norm` for all platforms, differentiated, whose backward pass keeps the input alone.

In: arrays as users hold them. Out: arrays of the same shapes. A form that cannot serve a call is passed over with a
logged sentence; the pure-JAX form serves every call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from . import gpu, lean, reference, tpu
from .reference import Spec

Implementation = Literal["reference", "lean", "tpu", "gpu"]
_log = logging.getLogger("memopt.pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way to compute a norm: which code, rows of a block (None: by shape), whether kernels are emulated."""

    name: Implementation
    block: int | None = None
    interpret: bool = False


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
    implementation: Implementation | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Divide each row by the root of its mean square.

    Memory: the backward pass keeps `x` (and `scale`), nothing in float32 and no statistics; the plain form in half
    precision keeps one or two float32 copies of `x`. Cost: the backward pass makes the statistics again. Exact: sums
    are reassociated.

    Args:
        x: `[..., width]`, floats.
        scale, bias: `[width]` or None.
        epsilon: added to the mean square.
        implementation: None to choose; or "reference", "lean", "tpu", "gpu".
        block: rows of a block of a kernel, None to choose by shape.
        interpret: run a kernel's body in JAX, on any platform (slow; for tests).

    Returns:
        As `x`; sums are float32 (float64 for float64).

    Raises:
        ValueError: the shapes do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> rms_norm(jnp.asarray([[3.0, -3.0]]), jnp.asarray([1.0, 2.0]), epsilon=0.0).tolist()
        [[1.0, -2.0]]

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization".

    Limits: first derivatives in reverse mode only. The GPU kernels were lowered and emulated, and timed nowhere.
    """
    return _norm(Spec(False, float(epsilon)), x, scale, bias, implementation, block, interpret)


def layer_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
    implementation: Implementation | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Subtract each row's mean and divide by its standard deviation.

    Memory, cost, arguments, result, errors and limits are those of `rms_norm`.

    Example:
        >>> layer_norm(jnp.asarray([[1.0, 3.0]]), epsilon=0.0).tolist()
        [[-1.0, 1.0]]

    Source: Ba, Kiros and Hinton 2016, "Layer normalization".
    """
    return _norm(Spec(True, float(epsilon)), x, scale, bias, implementation, block, interpret)


def _norm(spec: Spec, x, scale, bias, implementation, block, interpret) -> jax.Array:
    _check(x, scale, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if implementation is not None:
        form = Form(name=implementation, block=block, interpret=interpret)
        if why := problem(form, spec, rows, scale, bias):
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
        return run(form, spec, rows, scale, bias).reshape(x.shape)
    forms = {"tpu": Form(name="tpu", block=block), "cuda": Form(name="gpu", block=block)}
    served = {}
    for platform, form in forms.items():
        if why := problem(form, spec, rows, scale, bias):
            _log.info("norm on %s falls back to pure JAX: %s", platform, why)
        else:
            served[platform] = functools.partial(run, form, spec)
    plain = functools.partial(run, Form(name="lean"), spec)
    out = lax.platform_dependent(rows, scale, bias, default=plain, **served) if served else plain(rows, scale, bias)
    return out.reshape(x.shape)


def _check(x, scale, bias) -> None:
    shapes = [None if a is None else a.shape for a in (scale, bias)]
    if x.ndim < 1 or any(shape not in (None, x.shape[-1:]) for shape in shapes):
        raise ValueError(f"x {x.shape}, scale {shapes[0]}, bias {shapes[1]}: give [..., width], [width] or None, twice")
    if any(a is not None and not jnp.issubdtype(a.dtype, jnp.floating) for a in (x, scale, bias)):
        raise ValueError(f"x {x.dtype}: give floats")


def problem(form: Form, spec: Spec, x: Any, scale: Any, bias: Any) -> str | None:
    """Say why a form cannot serve a call, or None where it can; shapes and dtypes of the arguments are enough.

    Example:
        >>> x = jax.ShapeDtypeStruct((8, 96), jnp.float32)
        >>> problem(Form(name="tpu"), Spec(False, 1e-6), x, None, None)
        'a width of 96: multiples of 128 up to 16,384 are served'
    """
    kernels = {"tpu": tpu, "gpu": gpu}.get(form.name)
    return None if kernels is None else kernels.problem(spec, x, scale, bias, form.block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(form: Form, spec: Spec, x, scale, bias):
    """Compute a norm of rows `[rows, width]` in one form."""
    return forward(form, spec, x, scale, bias)


def forward(form: Form, spec: Spec, x, scale, bias) -> jax.Array:
    """Return the norm in one form; arguments as in `reference.norm`."""
    if form.name == "reference":
        return reference.norm(spec, x, scale, bias)
    if form.name == "lean":
        return lean.forward(spec, x, scale, bias)
    kernels = tpu if form.name == "tpu" else gpu
    return kernels.forward(spec, x, scale, bias, form.block, form.interpret)


def backward(form: Form, spec: Spec, x, scale, bias, cotangent):
    """Return the gradients of x, scale and bias in one form; arguments as in `lean.backward`."""
    if form.name == "reference":
        return jax.vjp(functools.partial(reference.norm, spec), x, scale, bias)[1](cotangent)
    if form.name == "lean":
        return lean.backward(spec, x, scale, bias, cotangent)
    kernels = tpu if form.name == "tpu" else gpu
    return kernels.backward(spec, x, scale, bias, cotangent, form.block, form.interpret)


def _run_forward(form: Form, spec: Spec, x, scale, bias):
    return forward(form, spec, x, scale, bias), (x, scale, bias)


def _run_backward(form: Form, spec: Spec, saved, cotangent):
    return backward(form, spec, *saved, cotangent)


run.defvjp(_run_forward, _run_backward)
