"""State in the host's memory between its uses: which leaves lie there, and how they come and go.

In: patterns of paths. Out: a `LeafForm` that keeps those leaves in `pinned_host`, and the step in which they are
fetched one after the other. An array is the same array there; its sharding alone says where it is.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _in_turn, _stored
from memopt._compat_memory import HostShape
from memopt._contract import Context, Rewritten
from memopt._plan import Decision
from memopt._sizes import is_on_host
from memopt.passes import _offload_loops

HOST = "pinned_host"


class HostState(_stored.LeafForm):
    """What a pass needs to keep leaves of the state on the host; its fields `state` and `least_bytes` say which."""

    state: tuple[str, ...]
    least_bytes: int

    @property
    def stores_state(self) -> bool:
        """Whether any state is to be there."""
        return bool(self.state)

    def stores(self, path: str, leaf: Any) -> bool:
        """Say whether a leaf belongs to the host: an array that is large enough, at a path that matches."""
        plain = not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        big = plain and math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize >= self.least_bytes
        return big and len(leaf.shape) > 0 and _stored.matches(path, self.state)

    def is_stored(self, node: Any) -> bool:
        """Say whether an array, a tracer or a shape is in the host's memory."""
        if isinstance(node, jax.core.Tracer):
            return is_on_host(node.aval)
        sharding = getattr(node, "sharding", None)
        return isinstance(node, (jax.Array, jax.ShapeDtypeStruct)) and getattr(sharding, "memory_kind", None) == HOST

    def encode(self, leaf: Any) -> Any:
        """Return a leaf on the host, laid out over devices as it was."""
        return _moved(leaf, HOST, jax.memory.Space.Host)

    def decode(self, node: Any) -> Any:
        """Return a leaf on the device."""
        return _moved(node, "device", jax.memory.Space.Device)

    def _encoded(self, node: Any) -> Any:
        return node if self.is_stored(node) else self.encode(node)

    def _decoded(self, node: Any) -> Any:
        return self.decode(node)


def _moved(leaf: Any, kind: str, space: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return jax.device_put(leaf, space)
    sharding = leaf.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding = sharding.with_memory_kind(kind)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = HostShape if kind == HOST else jax.ShapeDtypeStruct
        return shape(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)
    return jax.device_put(leaf, sharding)


def rewritten(closed: Any, context: Context, name: str) -> Rewritten:
    """Return the step with leaves that come in on the host fetched and sent back: by rows in loops, else in turn."""
    base = c.open_jaxpr(closed)
    places = [i for i, v in enumerate(base.invars) if is_on_host(v.aval)]
    rows = tuple(_row(context.paths[i], base.invars[i].aval, name) for i in places)
    sunk = _offload_loops.sink(closed)
    base = c.open_jaxpr(sunk)
    whole = {e.invars[0] for e in base.eqns if e.primitive.name == "device_put" and len(e.invars) == 1}
    return Rewritten(_in_turn.in_turn(sunk, [[i] for i in places if base.invars[i] in whole]), rows)


def _row(path: str, aval: Any, name: str) -> Decision:
    size = math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
    return Decision(path, "", "", size, name, "in the host's memory between steps, fetched where it is used")
