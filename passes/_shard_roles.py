"""The sharding pass's cast list: what each input of a step is, found on dataflow and tree paths.

In: a step's `Flow` and the paths of its leaves. Out: `Roles`: which inputs are parameters, moments and other state,
which are the batch, which result each becomes, and which values inside are gradients or parts of the update. No mesh
here.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from memopt import _fusion
from memopt.passes._shard_flow import ELEMENTWISE, Flow, is_float, is_var, reshaped, shape_of

PARAMETER, MOMENT, BATCH, OTHER = "parameter", "moment", "batch", "other"
Dims = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Roles:
    """What the inputs of a step are.

    Attributes:
      kinds: per input, one of the four kinds.
      result_of: input -> the output that it becomes after the step.
      data: the variables that depend on the batch.
      gradients: gradient values, outside and inside loops -> the input that they update, and which of its dimensions
        each of theirs is, None for a part of one.
      update: the variables of the update: element by element between a gradient and the new state.
    """

    kinds: tuple[str, ...]
    result_of: dict[int, int]
    data: frozenset[Any]
    gradients: dict[Any, tuple[int, Dims]]
    update: frozenset[Any]


def roles(flow: Flow, paths: Sequence[str], out_paths: Sequence[str]) -> Roles:
    """Find out what the inputs of a step are.

    Args:
      flow: the step's map.
      paths: per input, its path among the arguments; empty where none is known.
      out_paths: per output, its path in the result.
    """
    jaxpr = flow.jaxpr
    result_of = _pair(jaxpr, paths, out_paths)
    batch = _batch(jaxpr, paths, result_of)
    data = flow.reach(jaxpr.invars[i] for i in batch)
    losses = [v for i, v in enumerate(jaxpr.outvars) if i not in set(result_of.values()) and is_var(v)]
    needed = flow.ancestors(losses) if losses else None
    kinds = [OTHER] * len(jaxpr.invars)
    for i in batch:
        kinds[i] = BATCH
    for i in result_of:
        var = jaxpr.invars[i]
        if is_float(var) and shape_of(var):
            used = _is_used(flow, var, data) and (needed is None or var in needed)
            kinds[i] = PARAMETER if used else MOMENT
    gradients, update = _gradients(flow, kinds, result_of, data)
    return Roles(tuple(kinds), result_of, frozenset(data), gradients, frozenset(update))


def _pair(jaxpr: Any, paths: Sequence[str], out_paths: Sequence[str]) -> dict[int, int]:
    """Match each output with the input whose new value it is: by path and type, else by order among one type."""
    free: dict[tuple, dict[int, str]] = {}
    for i, var in enumerate(jaxpr.invars):
        free.setdefault(_type(var), {})[i] = _bare(paths[i]) if i < len(paths) else ""
    found: dict[int, int] = {}
    missed: dict[tuple, list[int]] = {}
    for o, var in enumerate(jaxpr.outvars):
        path = out_paths[o] if o < len(out_paths) else ""
        here = free.get(_type(var), {})
        wanted = (path, _bare(path))
        match = next((i for i, known in here.items() if known and known in wanted), None)
        if match is None:
            missed.setdefault(_type(var), []).append(o)
        else:
            del here[match]
            found[match] = o
    for kind, outputs in missed.items():
        if kind[0] and len(free.get(kind, ())) >= len(outputs):
            found.update(_by_suffix(free[kind], outputs, out_paths))
    return found


def _by_suffix(inputs: dict[int, str], outputs: Sequence[int], out_paths: Sequence[str]) -> dict[int, int]:
    """Match outputs of one type with inputs whose paths end alike; in order where no path is known."""
    found: dict[int, int] = {}
    for o in outputs:
        parts = _parts(out_paths[o]) if o < len(out_paths) else []
        scores = {i: _alike(parts, _parts(path)) for i, path in inputs.items() if i not in found}
        if not scores:
            break
        best = max(scores, key=lambda i: (scores[i], -i))
        if scores[best] or not parts:
            found[best] = o
    return found


def _type(var: Any) -> tuple:
    return shape_of(var), str(getattr(var.aval, "dtype", ""))


def _bare(path: str) -> str:
    """Return a path without the number of its argument or result."""
    return re.sub(r"^\[\d+\]", "", path) or path


def _parts(path: str) -> list[str]:
    return re.findall(r"\[[^\]]*\]|\.\w+", path)


def _alike(a: Sequence[str], b: Sequence[str]) -> int:
    count = 0
    for one, two in zip(reversed(a), reversed(b), strict=False):
        if one != two:
            break
        count += 1
    return count


def _batch(jaxpr: Any, paths: Sequence[str], result_of: dict[int, int]) -> list[int]:
    """Return the inputs that are the batch: of arguments that hold no state, those of the commonest leading size."""

    def argument(i: int) -> str:
        return (_parts(paths[i]) or [""])[0] if i < len(paths) else ""

    state = {argument(i) for i in result_of if len(shape_of(jaxpr.invars[i]))}
    free = [i for i in range(len(jaxpr.invars)) if i not in result_of and len(shape_of(jaxpr.invars[i]))]
    free = [i for i in free if not paths or argument(i) not in state]
    free = [i for i in free if not jax.dtypes.issubdtype(jaxpr.invars[i].aval.dtype, jax.dtypes.prng_key)]
    sizes = collections.Counter(shape_of(jaxpr.invars[i])[0] for i in free)
    if not sizes:
        return []
    common = max(sizes, key=lambda size: (sizes[size], size))
    return [i for i in free if shape_of(jaxpr.invars[i])[0] == common]


def _is_used(flow: Flow, leaf: Any, data: set[Any]) -> bool:
    """Say whether a leaf meets data in another way than element by element in its own shape."""
    seen, todo = {leaf}, [leaf]
    size = leaf.aval.size
    while todo:
        var = todo.pop()
        for eqn, _, _ in flow.readers.get(var, ()):
            if id(eqn) in flow.inner:
                continue
            if any(is_var(v) and v in data for v in eqn.invars):
                own = eqn.primitive.name in ELEMENTWISE and all(v.aval.size == var.aval.size for v in eqn.outvars)
                if not own:
                    return True
        for after in flow.next(var):
            if after not in seen and after not in data and after.aval.size <= max(size, 1) * 4096:
                seen.add(after)
                todo.append(after)
    return False


def _gradients(
    flow: Flow, kinds: Sequence[str], result_of: dict[int, int], data: set[Any]
) -> tuple[dict[Any, tuple[int, Dims]], set[Any]]:
    """Walk back from the new state, element by element, to where the gradients are made."""
    found: dict[Any, tuple[int, Dims]] = {}
    update: set[Any] = set()
    for kind in (MOMENT, PARAMETER):
        for leaf, out in result_of.items():
            if kinds[leaf] == kind:
                end = flow.jaxpr.outvars[out]
                _walk_back(flow, end, leaf, tuple(range(len(shape_of(end)))), data, found, update)
    return found, update


def _walk_back(flow: Flow, end: Any, leaf: int, dims: Dims, data: set[Any], found: dict, update: set[Any]) -> None:
    todo = [(end, dims)]
    while todo:
        var, dims = todo.pop()
        if not is_var(var) or var in update or var not in data:
            continue
        made = flow.makers.get(var)
        if made is None:
            continue
        eqn, _ = made
        if id(eqn) in flow.inner:
            found.setdefault(var, (leaf, dims))
            todo += _inside(flow, eqn, var, leaf, dims, found)
        elif eqn.primitive.name in ELEMENTWISE and eqn.primitive.name != "name":
            update.add(var)
            todo += [(v, dims) for v in eqn.invars if shape_of(v) == shape_of(var)]
        elif eqn.primitive.name != "broadcast_in_dim":
            found.setdefault(var, (leaf, dims))
            for part, its in _in_parts(flow, var, dims):
                if id(flow.makers[part][0]) in flow.inner:
                    todo.append((part, its))
                else:
                    found.setdefault(part, (leaf, its))


def _inside(flow: Flow, eqn: Any, var: Any, leaf: int, dims: Dims, found: dict) -> list[tuple[Any, Dims]]:
    """Return what a loop's result is inside its body, and where an accumulated one starts; note what is carried."""
    ends = []
    for link in flow.inner[id(eqn)][1]:
        if link.outer is var:
            ends.append((link.inner, dims[link.sliced :]))
            first = flow.carried.get(link.inner)
            if first is not None:
                found.setdefault(first, (leaf, dims))
                ends += [(v, dims) for v in flow.entries.get(first, ()) if v is not link.inner]
    return ends


def _in_parts(flow: Flow, var: Any, dims: Dims) -> list[tuple[Any, Dims]]:
    """Return the slices of a gradient that is made slice by slice, and the loop's result that holds them, if any.

    The gradient may be laid out in another way before it meets the update. Slices are looked for up to the matmul
    that makes them.
    """
    found: list[tuple[Any, Dims]] = []
    while (made := flow.makers.get(var)) is not None:
        eqn, shape = made[0], shape_of(var)
        name = eqn.primitive.name
        if id(eqn) in flow.inner:
            return [*found, (var, dims)]
        if name == "convert_element_type":
            pass
        elif name == "transpose":
            dims = tuple(dims[eqn.params["permutation"].index(d)] for d in range(len(dims)))
        elif name == "reshape":
            dims = reshaped(shape, shape_of(eqn.invars[0]), dims)
        elif name == "dynamic_update_slice":
            part, whole = eqn.invars[1], shape_of(var)
            its = tuple(d if a == b else None for d, a, b in zip(dims, shape_of(part), whole, strict=True))
            found += [(part, its)] if (part := _product(flow, part)) is not None else []
        else:
            return found if name == "broadcast_in_dim" else []
        var = eqn.invars[0]
    return found


def _product(flow: Flow, var: Any) -> Any:
    """Return the matmul's result that a value is, casts apart; None where it is none."""
    while (made := flow.makers.get(var)) is not None and made[0].primitive.name == "convert_element_type":
        var = made[0].invars[0]
    return var if made is not None and made[0].primitive.name in _fusion.MATMULS else None
