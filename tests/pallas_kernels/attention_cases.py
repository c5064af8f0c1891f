"""The conformance table of attention: one row a case, shared by all forms; what comes out is operands and tolerances.

Each case names its shapes and settings; `operands` makes the arrays. Errors are relative to the largest magnitude of
each result, and stated per dtype: float32 differs by summation order, bfloat16 by one rounding of the weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ERRORS = {"float64": 1e-13, "float32": 3e-6, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes `(batch, queries, keys, heads, kv_heads, head_dim, value_dim)`, settings, and special inputs."""

    name: str
    shape: tuple[int, ...] = (1, 70, 70, 2, 2, 64, 64)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    scale_of_q: float = 1.0
    quick: bool = False  # runs in CI, on the lean form


SEGMENTS = np.repeat(np.arange(3), 30)[None, :70]
CASES = [
    Case("plain"),
    Case("causal", settings={"is_causal": True}),
    Case("cross", (2, 33, 140, 2, 1, 64, 80), quick=True),
    Case("grouped causal", (1, 140, 140, 4, 2, 64, 64), {"is_causal": True}, quick=True),
    Case("multi-query", (1, 40, 40, 4, 1, 80, 80)),
    Case("window", (1, 300, 300, 1, 1, 64, 64), {"local_window_size": (40, 10)}),
    Case("causal window", (1, 300, 300, 1, 1, 64, 64), {"local_window_size": (60, None), "is_causal": True}),
    Case("segments", settings={"q_segment_ids": SEGMENTS, "is_causal": True}),
    Case(
        "lengths",
        (2, 70, 70, 1, 1, 64, 64),
        {"key_value_seq_lengths": [3, 70], "query_seq_lengths": [70, 0]},
    ),
    Case("bias", bias=(1, 2, 70, 70), settings={"soft_cap": 3.0}),
    Case("key bias", (2, 70, 50, 2, 2, 64, 64), bias=(2, 1, 1, 50)),
    Case("alibi", settings={"alibi_slopes": [0.5, 0.25], "is_causal": True}),
    Case("soft cap", settings={"soft_cap": 2.0}),
    Case("mask with empty rows", mask=(1, 2, 70, 70)),
    Case("mask, mean of empty rows", mask=(1, 1, 70, 70), settings={"masked_rows": "mean"}, quick=True),
    Case("empty causal rows", settings={"is_causal": True, "causal_offset": -20, "masked_rows": "mean"}),
    Case("dropout", settings={"dropout_rate": 0.4, "dropout_key": 7}, quick=True),
    Case("sigmoid", settings={"kind": "sigmoid", "sigmoid_bias": -4.0, "is_causal": True}),
    Case(
        "blocks",
        (1, 300, 300, 1, 1, 64, 64),
        {"block_mask": np.tri(3, dtype=bool)[::-1], "is_causal": True},
    ),
    Case("extreme scores", scale_of_q=1e4, settings={"is_causal": True}),
    Case("one query", (2, 1, 70, 2, 2, 64, 64)),
]


def operands(case: Case, dtype: str) -> tuple[list, dict, jax.Array]:
    """Return `[q, k, v, bias]` (bias may be None), the settings as arrays, and a cotangent."""
    batch, queries, keys, heads, kv_heads, head_dim, value_dim = case.shape
    shapes = [(batch, queries, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, value_dim)]
    random = np.random.default_rng(0)
    factors = (case.scale_of_q, 1.0, 1.0)
    q, k, v = (jnp.asarray(random.normal(size=s) * f, dtype) for s, f in zip(shapes, factors, strict=True))
    wide = "float64" if dtype == "float64" else "float32"
    bias = None if case.bias is None else jnp.asarray(random.normal(size=case.bias), wide)
    settings = {name: _array(name, value) for name, value in case.settings.items()}
    if case.mask is not None:
        mask = random.random(case.mask) < 0.3
        mask[:, :, 3] = False
        settings["mask"] = jnp.asarray(mask)
    cotangent = jnp.asarray(random.normal(size=(batch, queries, heads, value_dim)), dtype)
    return [q, k, v, bias], settings, cotangent


def _array(name: str, value: Any) -> Any:
    if name == "dropout_key":
        return jax.random.key(value)
    if name == "alibi_slopes":
        return jnp.asarray(value, jnp.float32)
    return jnp.asarray(value, jnp.int32) if name.endswith(("ids", "lengths")) else value
