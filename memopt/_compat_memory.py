"""What stands for an array in the host's memory where only shapes are known.

In: a shape with a sharding. Out: one that JAX traces as a value on the host. `jax.ShapeDtypeStruct` is traced as one on
the device whatever memory its sharding names (JAX 0.10), while an array there is traced as what it is.
"""

from __future__ import annotations

from typing import Any

import jax
from jax._src import core as _core
from jax._src import dtypes as _dtypes


class HostShape(jax.ShapeDtypeStruct):
    """A shape of an array in the host's memory; its sharding has the memory kind `pinned_host`."""


def _aval(shape: Any) -> Any:
    plain = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shape.sharding, weak_type=shape.weak_type)
    return jax.typeof(plain).update(memory_space=jax.memory.Space.Host)


_core.pytype_aval_mappings[HostShape] = _aval
_dtypes.register_canonicalize_value_handler(HostShape, None)
