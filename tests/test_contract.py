"""The contract with passes: two toy passes, each one frozen dataclass, whose proposals are chosen, applied and saved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt import _cost
from memopt._contract import Left, Repeat, Store
from memopt._planner import ladder_of_plan, make_ladder
from memopt._target import Target

CPU = Target.parse("cpu")
ROWS, WIDTH, DEPTH = 2048, 128, 6


@dataclasses.dataclass(frozen=True)
class Bits:
    """Keep masks as bits, eight in a byte: exact."""

    name: str = "bits"

    def propose(self, survey):
        """Offer every array of bools whose last axis is a multiple of eight."""
        for value in survey.graph.values:
            if value.aval.dtype == bool and value.aval.size and value.aval.shape[-1:] and value.aval.shape[-1] % 8 == 0:
                yield Store(value.id, 1e-9, value.aval.size // 8, functools.partial(jnp.packbits, axis=-1),
                            lambda bits: jnp.unpackbits(bits, axis=-1).astype(bool), name="bits")


@dataclasses.dataclass(frozen=True)
class Half:
    """Keep large float32 arrays as bfloat16: lossy."""

    name: str = "half"
    least_bytes: int = 1 << 16

    def propose(self, survey):
        """Offer every large float32 array, matmuls' results and all others alike."""
        for value in survey.graph.values:
            size = _cost.aval_bytes(value.aval)
            if value.aval.dtype == np.float32 and size >= self.least_bytes:
                yield Store(value.id, 1e-9, size // 2, lambda x: x.astype(jnp.bfloat16),
                            lambda x: x.astype(jnp.float32), error=2.0**-8, name="bf16")
