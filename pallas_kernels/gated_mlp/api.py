"""One `gated_activation` and one `gated_mlp` for all platforms, differentiated, that keep inputs alone.

In: arrays as users hold them. Out: the result. A form that cannot serve a call is passed over with a logged sentence;
the pure-JAX form serves every call.
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
from .activations import NAMES, Activation

Implementation = Literal["reference", "lean", "tpu", "gpu"]
_log = logging.getLogger("memopt.pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way to compute: which code, sizes of a tile (None: by shape), whether kernels are emulated."""

    name: Implementation
    blocks: Any = None
    interpret: bool = False


def gated_activation(
    gate: jax.Array,
    up: jax.Array,
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
    blocks: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute `activation(gate) * up`: SwiGLU ("silu"), GeGLU ("gelu", "gelu_exact") or ReGLU ("relu").

    Memory: `gate` and `up` are kept for the backward pass, and nothing that was made of them. Cost: the backward pass
    takes the activation again. Exact.

    Args:
        gate, up: floats of one shape and dtype, `[..., hidden]`.
        activation: of the gate; "gelu" is the tanh form.
        implementation: None to choose; or "reference", "lean", "tpu", "gpu".
        blocks: `(rows, hidden)` of a tile for "tpu", entries of a program for "gpu"; None to choose by shape.
        interpret: run a kernel's body in JAX, on any platform (slow; for tests).

    Returns:
        As `gate`; computed in float32 (float64 for float64).

    Raises:
        ValueError: the arguments do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> gated_activation(jnp.asarray([-1.0, 2.0]), jnp.asarray([5.0, 3.0]), activation="relu").tolist()
        [0.0, 6.0]

    Source: Shazeer 2020, "GLU variants improve transformer".

    Limits: first derivatives in reverse mode only. The GPU kernels were lowered and emulated, and timed nowhere.
    """
    _check_names(activation, gate, up)
    if gate.shape != up.shape or gate.ndim < 1:
        raise ValueError(f"gate {gate.shape}, up {up.shape}: give one shape [..., hidden]")
    rows = [x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (gate, up)]
    call = functools.partial(_choose, gated_problem, run_gated, activation)
    return call(implementation, blocks, interpret, ("tpu", "gpu"), rows).reshape(gate.shape)


def gated_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
    blocks: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute `(activation(x @ gate) * (x @ up)) @ down` with hidden activations that never exist whole.

    Memory: `x` and the weights are kept for the backward pass; hidden activations and their gradients, five arrays of
    `[tokens, hidden]` in the plain form, exist a tile at a time. Cost: the backward pass makes two products of six
    again; on TPUs five, where 16 MiB of VMEM do not hold the gradient of `x` in float32. Exact: sums are reassociated,
    roundings of gate and up to half precision are dropped.

    Args:
        x: `[..., dim]`, floats.
        gate, up: `[dim, hidden]`, in `x`'s dtype.
        down: `[hidden, out]`, in `x`'s dtype.
        activation: of the gate; "gelu" is the tanh form.
        implementation: None to choose; or "reference", "lean", "tpu".
        blocks: `(tokens, hidden units)` of a tile, None to choose by shape; "lean" reads the last alone.
        interpret: run a kernel's body in JAX, on any platform (slow; for tests).

    Returns:
        `[..., out]` in `x`'s dtype.

    Raises:
        ValueError: the arguments do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> eye = jnp.eye(2)
        >>> gated_mlp(jnp.asarray([[1.0, 2.0]]), eye, eye, eye, activation="relu").tolist()
        [[1.0, 4.0]]

    Source: Shazeer 2020, "GLU variants improve transformer".

    Limits: no GPU kernel: there the pure-JAX form runs. First derivatives in reverse mode only.
    """
    _check_names(activation, x, gate, up, down)
    shapes = f"x {x.shape}, gate {gate.shape}, up {up.shape}, down {down.shape}"
    if x.ndim < 1 or gate.ndim != 2 or gate.shape != up.shape or down.ndim != 2:
        raise ValueError(f"{shapes}: give [..., dim], [dim, hidden] twice and [hidden, out]")
    if x.shape[-1] != gate.shape[0] or gate.shape[1] != down.shape[0]:
        raise ValueError(f"{shapes}: dim and hidden must agree")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    call = functools.partial(_choose, problem, run, activation)
    out = call(implementation, blocks, interpret, ("tpu",), [rows, gate, up, down])
    return out.reshape(*x.shape[:-1], down.shape[1])


def _check_names(activation: str, *arrays: jax.Array) -> None:
    if activation not in NAMES:
        raise ValueError(f"{activation=}: {', '.join(NAMES)} are served")
    if len({a.dtype for a in arrays}) != 1 or not jnp.issubdtype(arrays[0].dtype, jnp.floating):
        raise ValueError(f"dtypes {[str(a.dtype) for a in arrays]}: cast them to one floating dtype")


def _choose(why_not, function, activation, implementation, blocks, interpret: bool, kernels, operands) -> jax.Array:
    if implementation is not None:
        form = Form(name=implementation, blocks=blocks, interpret=interpret)
        if why := why_not(form, activation, *operands):
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
        return function(form, activation, *operands)
    served = {}
    for name in kernels:
        if why := why_not(Form(name=name), activation, *operands):
            _log.info("%s on %s falls back to pure JAX: %s", function.__name__, name, why)
        else:
            served["cuda" if name == "gpu" else name] = functools.partial(function, Form(name=name), activation)
    plain = functools.partial(function, Form(name="lean", blocks=blocks), activation)
    return lax.platform_dependent(*operands, default=plain, **served) if served else plain(*operands)


# The activation alone.


def gated_problem(form: Form, activation: Activation, gate: Any, up: Any) -> str | None:
    """Say why a form of the activation cannot serve a call, or None where it can; shapes and dtypes are enough."""
    kernels = {"tpu": tpu, "gpu": gpu}.get(form.name)
    return None if kernels is None else kernels.gated_problem(activation, gate, up, form.blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_gated(form: Form, activation: Activation, gate, up):
    """Compute the activation of rows `[rows, hidden]` in one form."""
    if form.name in ("reference", "lean"):
        return (reference if form.name == "reference" else lean).gated(activation, gate, up)
    return (tpu if form.name == "tpu" else gpu).gated(activation, gate, up, form.blocks, form.interpret)


def gated_gradients(form: Form, activation: Activation, gate, up, cotangent):
    """Return the gradients of gate and up in one form."""
    if form.name == "reference":
        return jax.vjp(functools.partial(reference.gated, activation), gate, up)[1](cotangent)
    if form.name == "lean":
        return lean.gated_gradients(activation, gate, up, cotangent)
    kernels = tpu if form.name == "tpu" else gpu
    return kernels.gated_gradients(activation, gate, up, cotangent, form.blocks, form.interpret)


run_gated.defvjp(
    lambda form, activation, gate, up: (run_gated(form, activation, gate, up), (gate, up)),
    lambda form, activation, saved, cotangent: gated_gradients(form, activation, *saved, cotangent),
)


# The whole MLP.


def problem(form: Form, activation: Activation, x: Any, gate: Any, up: Any, down: Any) -> str | None:
    """Say why a form of the whole MLP cannot serve a call, or None where it can; shapes and dtypes are enough."""
    if form.name == "gpu":
        return "there is no GPU kernel of a whole MLP"
    return tpu.problem(activation, x, gate, up, down, form.blocks) if form.name == "tpu" else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(form: Form, activation: Activation, x, gate, up, down):
    """Compute the gated MLP of rows `[tokens, dim]` in one form."""
    if form.name == "reference":
        return reference.mlp(activation, x, gate, up, down)
    if form.name == "lean":
        return lean.mlp(activation, x, gate, up, down, form.blocks and form.blocks[1])
    return tpu.mlp(activation, x, gate, up, down, form.blocks, form.interpret)


def gradients(form: Form, activation: Activation, x, gate, up, down, cotangent):
    """Return the gradients of rows and weights in one form; arguments as in `lean.mlp_gradients`."""
    if form.name == "reference":
        return jax.vjp(functools.partial(reference.mlp, activation), x, gate, up, down)[1](cotangent)
    if form.name == "lean":
        return lean.mlp_gradients(activation, x, gate, up, down, cotangent, form.blocks and form.blocks[1])
    return tpu.mlp_gradients(activation, x, gate, up, down, cotangent, form.blocks, form.interpret)


run.defvjp(
    lambda form, activation, *operands: (run(form, activation, *operands), operands),
    lambda form, activation, saved, cotangent: gradients(form, activation, *saved, cotangent),
)
