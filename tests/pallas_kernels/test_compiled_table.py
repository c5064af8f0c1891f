"""No kernel is left out of the tables of what is compiled for TPUs and lowered for CUDA.

In: the sources of the kernel families, and the tables `AOT` of their tests, traced and not compiled. Each family's own
test compiles its table: for v5e, v5p and v6e ahead of time, and attention for CUDA.
"""

import functools
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import memopt.pallas_kernels
from memopt import _compat as c
from memopt.pallas_kernels import linear_cross_entropy, quantize_weight, quantized_matmul
from tests.pallas_kernels import (
    test_attention,
    test_blockwise,
    test_gated_mlp,
    test_linear_cross_entropy,
    test_norms,
    test_quantized_matmul,
)

SOURCES = pathlib.Path(memopt.pallas_kernels.__file__).parent


def _named() -> set[str]:
    """Return the names that the sources give to kernels."""
    return {name for path in SOURCES.rglob("*.py") for name in re.findall(r'"(memopt_[a-z0-9_]+)"', path.read_text())}


def _called(jaxpr) -> Iterator[str]:
    for eqn in c.open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn.params["name_and_src_info"].name if "name_and_src_info" in eqn.params else eqn.params["name"]
            continue
        for _, _, body in c.subjaxprs(eqn.params):
            yield from _called(body)


def _attention() -> Iterator[str]:
    for _, shape, settings in test_attention.AOT:
        step, arguments = test_attention._compile_arguments(shape, settings, jnp.bfloat16)
        yield from _called(jax.make_jaxpr(step)(*arguments))


def _losses() -> Iterator[str]:
    x = jax.ShapeDtypeStruct
    for tokens, dim, vocab in test_linear_cross_entropy.AOT:
        arguments = x((tokens, dim), jnp.bfloat16), x((dim, vocab), jnp.bfloat16), x((tokens,), jnp.int32)
        step = jax.grad(lambda *arguments: linear_cross_entropy(*arguments).mean(), (0, 1))
        yield from _called(jax.make_jaxpr(step)(*arguments))


def _products() -> Iterator[str]:
    for _, (tokens, rows, columns), bits, group, activations in test_quantized_matmul.AOT:
        make = functools.partial(quantize_weight, bits=bits, group=group)
        weight = jax.eval_shape(make, jax.ShapeDtypeStruct((rows, columns), jnp.float32))
        product = functools.partial(quantized_matmul, activations=activations)
        step = jax.grad(lambda x, w, product=product: product(x, w).astype(jnp.float32).sum())
        yield from _called(jax.make_jaxpr(step)(jax.ShapeDtypeStruct((tokens, rows), jnp.bfloat16), weight))


def _norms() -> Iterator[str]:
    for _, norm, shape, parameters in test_norms.AOT:
        step, arguments = test_norms.step_and_arguments(norm, shape, parameters)
        yield from _called(jax.make_jaxpr(step)(*arguments))


def _gated() -> Iterator[str]:
    for _, shape, activation in test_gated_mlp.AOT:
        step, arguments = test_gated_mlp.step_and_arguments(shape, activation)
        yield from _called(jax.make_jaxpr(step)(*arguments))
    step, arguments = test_gated_mlp.gated_step("silu", (1000, 5632))
    yield from _called(jax.make_jaxpr(step)(*arguments))


def _blockwise() -> Iterator[str]:
    for _, shape, block in test_blockwise.AOT:
        for make in (test_blockwise.adam_step, test_blockwise.round_trip):
            step, arguments = make(shape, block)
            yield from _called(jax.make_jaxpr(step)(*arguments))


def test_every_kernel_is_in_a_table():
    called = {*_attention(), *_losses(), *_products(), *_norms(), *_gated(), *_blockwise()}
    assert len(called) >= 20
    assert called == _named()
