"""Block-wise 8-bit codes and the Adam step on them, for all platforms: the forms that `memopt.optim` stores.

In: arrays `[..., width]`. Out: codes, scales, arrays. A form that cannot serve a call is passed over with a logged
sentence; the pure-JAX form serves every call.
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
from .reference import Spec

Implementation = Literal["reference", "lean", "tpu"]
Stored = tuple[jax.Array, jax.Array]
_log = logging.getLogger("memopt.pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way to compute: which code, and whether kernels are emulated."""

    name: Implementation
    interpret: bool = False


def quantize_blocks(
    x: jax.Array,
    *,
    block: int = 2048,
    signed: bool = True,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Stored:
    """Write an array as 8-bit codes of the dynamic map, with a scale for each block of a row.

    Memory: 1 byte an element and 4 a block. Cost: about 40 element-wise operations an element. Not exact: an element
    is off by half a cell of its decade, at most 0.4 % of itself in the largest ones and 7 % of the block's largest
    magnitude in the gap below it; what is not finite comes back as itself.

    Args:
        x: `[..., width]`, float32, bfloat16 or float16.
        block: elements that share a scale, along the last axis; the last block of a row may be shorter.
        signed: whether codes have a sign; without it negative numbers are taken as zero.
        implementation: None to choose; or "reference", "lean", "tpu".
        interpret: run the kernel's body in JAX, on any platform (slow; for tests).

    Returns:
        uint8 codes as `x`, and float32 scales `[..., blocks, rows]`, without the axis of blocks where there is one
        alone: as the codec of `memopt.optim.adamw_8bit` stores rows of 128 elements or more.

    Raises:
        ValueError: the arguments do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> codes, scales = quantize_blocks(jnp.asarray([[0.0, -3.0, 1.5]]))
        >>> codes.tolist(), scales.tolist()
        ([[127, 0, 220]], [3.0])

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization".

    Limits: no gradient, no GPU kernel: there the pure-JAX form runs.
    """
    _check(x, block)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.float64:
        raise ValueError(f"x {x.dtype}: give float32, bfloat16 or float16")
    spec = Spec(min(block, x.shape[-1]), signed)
    code, scale = _choose("quantize", implementation, interpret, spec.block, spec, _three(x))
    return code.reshape(x.shape), _stored(scale, x.shape)


def dequantize_blocks(
    codes: jax.Array,
    scales: jax.Array,
    *,
    block: int = 2048,
    signed: bool = True,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return the array that codes and scales stand for, in float32; all else as in `quantize_blocks`.

    Example:
        >>> dequantize_blocks(*quantize_blocks(jnp.asarray([[0.0, 2.0, jnp.inf]]))).tolist()
        [[0.0, 2.0, inf]]
    """
    _check(codes, block)
    spec = Spec(min(block, codes.shape[-1]), signed)
    _check_stored("codes", codes, scales, spec.block, codes.shape)
    operands = _three(codes), _scales(scales, codes.shape)
    return _choose("dequantize", implementation, interpret, spec.block, spec, *operands).reshape(codes.shape)


def adam_8bit_update(
    gradient: jax.Array,
    mu: Stored,
    nu: Stored,
    count: Any,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    block: int = 2048,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Stored, Stored]:
    """Take one Adam step whose moments are block-wise 8-bit codes, in one kernel on TPUs.

    Memory: moments exist in float32 for a tile alone; codes and scales are written in place where they are donated.
    Cost: a read of gradient and codes and a write of update and codes. The update uses moments before they are rounded.

    Args:
        gradient: `[..., width]`, float32, bfloat16 or float16.
        mu: codes and scales of the first moment, from `quantize_blocks(signed=True)`.
        nu: those of the second moment, from `quantize_blocks(signed=False)`.
        count: the number of this step, 1 at first.
        b1, b2, eps: as in `optax.scale_by_adam`.
        block, implementation, interpret: as in `quantize_blocks`.

    Returns:
        Adam's direction in `gradient`'s dtype, to be scaled by the learning rate and subtracted, and the new `mu` and
        `nu`: those of `memopt.optim.scale_by_adam_8bit`.

    Raises:
        ValueError: the arguments do not belong together.
        NotImplementedError: the implementation asked for cannot serve this call; the message says why.

    Example:
        >>> zero = jnp.zeros((8, 128))
        >>> mu, nu = quantize_blocks(zero), quantize_blocks(zero, signed=False)
        >>> update, mu, nu = adam_8bit_update(zero + 0.5, mu, nu, 1)
        >>> round(float(update[0, 0]), 4)
        1.0

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization".
    """
    _check(gradient, block)
    block = min(block, gradient.shape[-1])
    for name, moment in (("mu", mu), ("nu", nu)):
        _check_stored(name, *moment, block, gradient.shape)
    moments = [(_three(m[0]), _scales(m[1], gradient.shape)) for m in (mu, nu)]
    operands = _three(gradient), *moments, jnp.asarray(count), *(jnp.asarray(x, jnp.float32) for x in (b1, b2, eps))
    update, *new = _choose("adam", implementation, interpret, block, block, *operands)
    stored = [(code.reshape(gradient.shape), _stored(scale, gradient.shape)) for code, scale in new]
    return update.reshape(gradient.shape), *stored


# Shapes: kernels take [batch, rows, width] and scales [batch, blocks, rows].


def _three(x: jax.Array) -> jax.Array:
    rows = x.shape[-2] if x.ndim > 1 else 1
    return x.reshape(math.prod(x.shape[:-2]), rows, x.shape[-1])


def _stored(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    blocks = () if scale.shape[1] == 1 else (scale.shape[1],)
    return scale.reshape(*shape[:-2], *blocks, *shape[-2:-1])


def _scales(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    rows = shape[-2] if len(shape) > 1 else 1
    batch = math.prod(shape[:-2])
    return scale.reshape(batch, scale.size // max(batch * rows, 1), rows)


def _check(x: jax.Array, block: int) -> None:
    if x.ndim < 1 or block < 1 or not x.size:
        raise ValueError(f"an array {x.shape} in blocks of {block}: give [..., width] with elements, and blocks of one")


def _check_stored(name: str, code, scale, block: int, shape: tuple[int, ...]) -> None:
    wanted = math.prod(shape[:-1]) * -(-shape[-1] // block)
    if code.shape != shape or code.dtype != jnp.uint8 or scale.size != wanted or scale.dtype != jnp.float32:
        have = f"{code.dtype} {code.shape} and {scale.dtype} {scale.shape}"
        raise ValueError(f"{name} has {have}: uint8 {shape} and {wanted} scales in float32 are needed")


# Dispatch.


def _choose(name: str, implementation, interpret: bool, block: int, setting: Any, *operands: Any) -> Any:
    why = tpu.problem(operands[0], block)
    if implementation is not None:
        if implementation == "tpu" and why:
            raise NotImplementedError(f"implementation='tpu' cannot serve this call: {why}")
        return _function(Form(name=implementation, interpret=interpret), name, setting)(*operands)
    plain = _function(Form(name="lean"), name, setting)
    if why:
        _log.info("%s of blocks on tpu falls back to pure JAX: %s", name, why)
        return plain(*operands)
    return lax.platform_dependent(*operands, default=plain, tpu=_function(Form(name="tpu"), name, setting))


def _function(form: Form, name: str, setting: Any) -> Callable[..., Any]:
    module = {"reference": reference, "lean": lean, "tpu": tpu}[form.name]
    more = {"interpret": form.interpret} if form.name == "tpu" else {}
    return functools.partial(getattr(module, name), setting, **more)
