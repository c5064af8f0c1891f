"""The interpreter between bodies: which values of one body are those of an earlier one.

In: a graph while it is built, and an operation with bodies. Out: for each of its bodies the inputs that *are* values of
the body that made them. After differentiation a loop, a branch or a `shard_map` is two of them: the first hands
residuals to the second. A slice of a stack is the value that the first loop stacked; what a `cond` hands to a `cond` of
the same index, branch by branch, and a `shard_map` to one over the same mesh in the same layout, is that value itself.
The first may stand in the same region or, where that region reads another one in turn, there: a loop in the body of a
loop is paired with the one in the body of the loop that reads it. It decides nothing.
"""

from __future__ import annotations

from typing import Any

import jax

from memopt import _compat as c

#: The parameter that holds the bodies of an operation that the graph enters.
BODIES = {"scan": "jaxpr", "while": "body_jaxpr", "cond": "branches", "shard_map": "jaxpr"}


def inputs_from(graph: Any, region: Any, op: Any) -> tuple[list[dict[int, int]], list[Any]]:
    """Return, for each body of an operation, its inputs that are values of an earlier body; and what made those.

    Args:
      graph: the graph, up to this operation.
      region: where the operation stands.
      op: the operation.

    Returns:
      A list of `{number of the body's input: value}`, and the operations whose bodies these values live in.
    """
    find = {"scan": _of_scan, "cond": _of_cond, "shard_map": _of_shard_map}.get(op.eqn.primitive.name)
    return find(graph, region, op) if find else ([{} for _ in bodies(op.eqn)], [])


def bodies(eqn: Any) -> tuple[Any, ...]:
    """Return the bodies of an equation that the graph enters."""
    key = BODIES.get(eqn.primitive.name)
    found = eqn.params[key] if key else ()
    return found if isinstance(found, tuple) else (found,)


def first_operand(eqn: Any) -> int:
    """Return the number of the operand that is the first input of an equation's bodies."""
    return 1 if eqn.primitive.name == "cond" else 0


def mapped(op: Any, shared: list[dict[int, int]]) -> frozenset[int]:
    """Return the operands that every body reads through the body that made them, or does not read."""
    read = [_read_inputs(body) for body in bodies(op.eqn)]
    numbers = set().union(*shared)
    shift = first_operand(op.eqn)
    return frozenset(i + shift for i in numbers if all(i in s or i not in r for s, r in zip(shared, read, strict=True)))


def _read_inputs(body: Any) -> set[int]:
    base = c.open_jaxpr(body)
    read = {v for eqn in base.eqns for v in eqn.invars if not isinstance(v, c.Literal)}
    read |= {v for v in base.outvars if not isinstance(v, c.Literal)}
    return {i for i, v in enumerate(base.invars) if v in read}


def maker_of(graph: Any, region: Any, operand: int | None, name: str) -> Any | None:
    """Return the operation of this kind that made an operand, here or in a body that this one reads."""
    if operand is None or graph.values[operand].region not in (region.id, *region.sources):
        return None
    maker = graph.values[operand].op
    return maker if maker is not None and maker.eqn.primitive.name == name and maker.bodies else None


def _of_scan(graph: Any, region: Any, op: Any) -> tuple[list[dict[int, int]], list[Any]]:
    num_consts, num_carry = c.scan_layout(op.eqn)
    first_xs = num_consts + num_carry
    shared: dict[int, int] = {}
    makers = []
    for i in range(first_xs, len(op.inputs)):
        maker = maker_of(graph, region, op.inputs[i], "scan")
        if maker is None or (maker.region != region.id and not graph.nested):
            continue
        if maker.eqn.params["length"] != op.eqn.params["length"]:
            continue
        position = maker.outputs.index(op.inputs[i])
        inner = None if position < c.scan_layout(maker.eqn)[1] else _own(graph, maker, 0, position)
        if inner is not None:
            shared[i] = inner
            makers.append(maker)
    makers = list(dict.fromkeys(makers))
    for maker in makers:
        _share_loop_operands(graph, op, maker, shared)
    return [shared], makers


def _own(graph: Any, maker: Any, body: int, position: int) -> int | None:
    """Return the value of a body that its operation hands out at a position, where it is that body's own."""
    inner = maker.bodies[body].outs[position]
    return inner if inner is not None and graph.values[inner].region == maker.bodies[body].id else None


def _share_loop_operands(graph: Any, op: Any, maker: Any, shared: dict[int, int]) -> None:
    """Let constants and slices that both loops take from the same array be the maker's own values."""
    num_consts, num_carry = c.scan_layout(op.eqn)
    maker_consts, maker_carry = c.scan_layout(maker.eqn)
    known_consts = {v: i for i, v in enumerate(maker.inputs[:maker_consts]) if v is not None}
    first = maker_consts + maker_carry
    known_xs = {v: first + i for i, v in enumerate(maker.inputs[first:]) if v is not None}
    for i, v in enumerate(op.inputs):
        table = known_consts if i < num_consts else known_xs if i >= num_consts + num_carry else {}
        if i not in shared and v is not None and v in table:
            _share(graph, maker, 0, table[v], shared, i)


def _share(graph: Any, maker: Any, body: int, number: int, shared: dict[int, int], i: int) -> None:
    """Let an input of a body be the maker's own value of one of its inputs, where it has it as its own."""
    region = maker.bodies[body]
    inner = region.env[c.open_jaxpr(region.jaxpr).invars[number]]
    if graph.values[inner].region == region.id:
        shared[i] = inner


def _of_cond(graph: Any, region: Any, op: Any) -> tuple[list[dict[int, int]], list[Any]]:
    shared: list[dict[int, int]] = [{} for _ in bodies(op.eqn)]
    makers = []
    for i, operand in enumerate(op.inputs[1:]):
        maker = maker_of(graph, region, operand, "cond")
        if maker is None or maker.inputs[0] is None or maker.inputs[0] != op.inputs[0] or not _is_plain(maker):
            continue
        position = maker.outputs.index(operand)
        found = [_own(graph, maker, k, position) for k in range(len(shared))]
        for k, inner in enumerate(found):
            if inner is not None and graph.values[inner].aval == c.open_jaxpr(bodies(op.eqn)[k]).invars[i].aval:
                shared[k][i] = inner
                makers.append(maker)
    makers = list(dict.fromkeys(makers))
    for maker in makers:
        known = {v: number for number, v in enumerate(maker.inputs[1:]) if v is not None}
        for i, operand in enumerate(op.inputs[1:]):
            for k, table in enumerate(shared):
                if i not in table and operand in known:
                    _share(graph, maker, k, known[operand], table, i)
    return shared, makers


def _is_plain(op: Any) -> bool:
    """Say whether a branch may hand out any value of its own: another branch can fill it with zeros."""
    closed = [c.open_jaxpr(body) for body in bodies(op.eqn)]
    values = [v.aval for base in closed for eqn in base.eqns for v in eqn.outvars]
    return not any(base.constvars for base in closed) and all(map(_is_fillable, values))


def _is_fillable(aval: Any) -> bool:
    is_array = type(aval) is c.ShapedArray and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
    return is_array and not c.vma(aval)


def _of_shard_map(graph: Any, region: Any, op: Any) -> tuple[list[dict[int, int]], list[Any]]:
    return [{}], []
