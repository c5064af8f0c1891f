"""What the experiments on sharded steps share: a Llama on a mesh of a TPU target, and the figures of one device.

In: names of models, targets and strategies. Out: steps, meshes, bytes of the state on one device, what collectives
send. Nothing is compiled here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

_FIELDS = ("vocabulary", "width", "heads", "kv_heads", "hidden")


def step_of(model: str, batch: int, length: int, layers: int | None = None, remat: str | None = None) -> Any:
    """Return a Llama's step, the shapes of its arguments and its options; `layers` None for the model's own."""
    from memopt.models import llama, steps

    config = {"llama_1b": llama.LLAMA_1B_UNTIED, "llama_8b": llama.LLAMA_8B, "llama_70b": llama.LLAMA_70B}[model]
    sizes = {name: getattr(config, name) for name in _FIELDS}
    depth = layers or config.layers
    return steps.reference_step("llama_1b", batch=batch, length=length, depth=depth, remat=remat, **sizes)


def devices_of(target: str) -> int:
    """Return the JAX devices of a TPU target: a chip of v4 and 7x is two."""
    _, kind, topology = target.split(":")
    return math.prod(map(int, topology.split("x"))) * (2 if kind in ("v4", "tpu7x") else 1)


def mesh_of(target: str, strategy: str, second_ways: int) -> Any:
    """Return a mesh with one axis, or with a second one for the part of the strategy that splits values.

    `"tensor"` and `"sequence"` alone take all devices along that axis; `"hierarchical"` alone has an outer axis and an
    inner one.
    """
    import memopt

    ways = devices_of(target)
    parts = strategy.split("+")
    second = next((part for part in ("context", "tensor", "sequence") if part in parts), None)
    inner = min(second_ways, ways)
    if second is None and "hierarchical" in parts:
        return memopt.mesh(target, (ways // inner, inner), ("outer", "inner"))
    if second is None:
        return memopt.mesh(target, (ways,), ("data",))
    name = "context" if second == "context" else "model"
    if not {"data", "zero1", "zero2", "zero3", "hierarchical", "context"} & set(parts):
        return memopt.mesh(target, (ways,), (name,))
    return memopt.mesh(target, (ways // inner, inner), ("data", name))


def rows_of(mesh: Any) -> int:
    """Return the devices between which a mesh of `mesh_of` splits a batch."""
    return math.prod(size for name, size in mesh.shape.items() if name in ("data", "outer", "inner"))


def state_bytes(state: Any, places: Any = None) -> tuple[int, int]:
    """Return the bytes of a state on one device, and in all.

    Args:
      state: a tree of shapes.
      places: the sharding of each leaf, in the same tree; None where one device holds all.
    """
    import jax

    leaves = jax.tree.leaves(state)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if places is None:
        return total, total
    pairs = zip(leaves, jax.tree.leaves(places), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs), total


def predicted_sends(plan: Any) -> dict[str, float]:
    """Return what a plan predicts of its collectives: bytes by kind, bytes and seconds in all."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    rows = [d for d in plan.decisions if d.name.removeprefix("shard/") in kinds]
    found = {f"predicted_{d.name.removeprefix('shard/')}_bytes": float(d.value_bytes) for d in rows}
    return found | {
        "predicted_sent_bytes": float(sum(d.value_bytes for d in rows)),
        "predicted_collective_seconds": sum(d.collective_seconds for d in rows),
    }


def compiled_sends(found: Iterable[Any], target: str) -> dict[str, float]:
    """Return what the collectives of a compiled program send: counts and bytes by kind, bytes and seconds in all."""
    found = list(found)
    figures: dict[str, float] = {
        "sent_bytes": sum(one.sent_bytes for one in found),
        "collective_seconds": sum(one.seconds(target) for one in found),
    }
    for kind in sorted({one.kind for one in found}):
        figures[f"{kind}_bytes"] = sum(one.sent_bytes for one in found if one.kind == kind)
        figures[f"{kind}_count"] = sum(one.times for one in found if one.kind == kind)
    return figures
