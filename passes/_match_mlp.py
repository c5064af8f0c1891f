"""A gated MLP, found by dataflow: two products of the same rows, an activation of one times the other, a third product.

In: a `Space`. Out: for each such product a `Mlp`, with the products of its backward pass, or the reason why it has to
stay. Which product is the gate, which activation it has and which gradient is whose is found out by evaluating the
region on small random inputs; without that agreement nothing is reported as found.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from scipy import special

from memopt import _compat as c
from memopt.passes._match import Node, Space
from memopt.passes._match_dims import Atom, Axes, Small, Unsupported, entry_call, region_between

_ASIDE = frozenset({"convert_element_type", "reshape", "transpose", "squeeze", "reduce_precision"})
_PLAIN = frozenset({"name", "copy", "copy_p", "stop_gradient", "optimization_barrier"})
_POINTWISE = _ASIDE | _PLAIN | {
    "mul", "div", "add", "sub", "neg", "max", "min", "exp", "logistic", "tanh", "erf", "erfc", "integer_pow", "square",
    "add_any", "one_minus_square", "select_n", "gt", "ge", "lt", "le", "eq", "broadcast_in_dim", "pow", "exp2", "abs",
    "sqrt",
}  # fmt: skip
_ROOT = np.sqrt(2 / np.pi)


def _tanh_gelu(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t = np.tanh(_ROOT * (z + 0.044715 * z**3))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _ROOT * (1 + 3 * 0.044715 * z * z)


def _gelu(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    phi = 0.5 * (1 + special.erf(z / np.sqrt(2)))
    return z * phi, phi + z * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


def _silu(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = special.expit(z)
    return z * s, s * (1 + z * (1 - s))


ACTIVATIONS = {
    "silu": _silu,
    "gelu": _tanh_gelu,
    "gelu_exact": _gelu,
    "relu": lambda z: (np.maximum(z, 0), (z > 0).astype(z.dtype)),
}


@dataclasses.dataclass
class Mlp:
    """One gated MLP. Numbers are values of the space.

    Attributes:
        x, gate, up, down: rows and weights; the weights as the products take them.
        activation: the name of the gate's activation.
        out: the node of the last product.
        cotangent: of its result, None where there is no backward pass.
        grads: `"x"`, `"gate"`, `"up"`, `"down"` -> the node that makes this gradient.
        second: the node of the other part of the rows' gradient, and the node that adds it to what holds the first.
        axes: the atoms of all values of the region.
        orders: `"x"`, `"gate"`, `"up"`, `"down"`, `"out"` -> atoms of the two axes that kernels want.
        hidden: the value of the gate's product, as large as hidden activations are.
    """

    x: int
    gate: int
    up: int
    down: int
    activation: str
    out: Node
    cotangent: int | None
    grads: dict[str, Node]
    second: tuple[Node, Node] | None
    axes: Axes
    orders: dict[str, list[list[Atom]]]
    hidden: int


def may_be_in(eqns: Iterable[Any], least_bytes: float) -> bool:
    """Whether two products of one array have results of one shape, large enough to be worth a kernel."""
    seen = set()
    for eqn in eqns:
        if eqn.primitive.name == "dot_general" and _worth(eqn.outvars[0].aval, least_bytes):
            for var in (v for v in eqn.invars if not isinstance(v, c.Literal)):
                key = (var, eqn.outvars[0].aval.shape)
                if key in seen:
                    return True
                seen.add(key)
    return False


def _worth(aval: Any, least_bytes: float) -> bool:
    return 5 * math.prod(aval.shape) * aval.dtype.itemsize >= least_bytes


def find(space: Space, least_bytes: float = 0) -> Iterator[tuple[Node, Mlp | str]]:
    """Yield the last product of each candidate, with what was found or the reason against it.

    Args:
        space: where to look.
        least_bytes: five arrays of hidden activations have to be as much; less is passed over.
    """
    seen: set[frozenset[int]] = set()
    for node in space.nodes:
        if node.name != "dot_general" or node.eqn.params["dimension_numbers"][1] != ((), ()) or None in node.ins:
            continue
        for position in (0, 1):
            sides = _sides(space, node.ins[position])
            if sides is None or not _worth(sides[0].eqn.outvars[0].aval, least_bytes):
                continue
            if (key := frozenset(side.outs[0] for side in sides)) in seen:
                continue
            seen.add(key)
            try:
                yield node, _examine(space, node, node.ins[1 - position], sides)
            except Unsupported as error:
                yield node, str(error)


def _sides(space: Space, value: int) -> list[Node] | None:
    """Return the two products of one array of rows that a value is made of by operations on single entries."""
    ends: dict[int, Node] = {}
    stack, seen, multiplied = [value], {value}, False
    while stack:
        node = space.makers.get(stack.pop())
        if len(seen) > 80:
            return None
        if node is None:
            continue  # a bias or a mask: a near miss
        if node.name == "dot_general":
            ends[node.outs[0]] = node
            if len(ends) > 2 or None in node.ins:
                return None
            continue
        if not _is_pointwise(node):
            continue
        multiplied |= node.name == "mul"
        new = [v for v in node.ins if v is not None and v not in space.fixed and v not in seen]
        seen.update(new)
        stack.extend(new)
    found = [node for node in space.nodes if node.outs[0] in ends] if len(ends) == 2 and multiplied else []
    return found if found and len(_shared(space, found)) == 1 else None


def _is_pointwise(node: Node) -> bool:
    return node.name in _POINTWISE or entry_call(node.eqn) is not None


def _shared(space: Space, sides: list[Node]) -> set[int]:
    first, second = ({space.root(v) for v in side.ins} for side in sides)
    return first & second


def _stripped(space: Space, value: int) -> int:
    while (node := space.makers.get(value)) is not None and node.name in _ASIDE | _PLAIN:
        if len(node.ins) != 1 or node.ins[0] is None:
            break
        value = node.ins[0]
    return value


def _examine(space: Space, out: Node, down: int, sides: list[Node]) -> Mlp:
    (rows,) = _shared(space, sides)
    x = next(v for v in sides[0].ins if space.root(v) == rows)
    weights = [next(v for v in side.ins if space.root(v) != rows) for side in sides]
    avals = [space.avals[v] for v in (x, *weights, down, out.outs[0])]
    if len({aval.dtype for aval in avals}) != 1:
        raise Unsupported(f"its operands and result have dtypes {sorted({str(aval.dtype) for aval in avals})}")
    tainted, ends = _closure(space, {side.outs[0] for side in sides})
    ends = [end for end in ends if end is not out]
    roles = _roles(space, tainted, ends, rows, weights, down) if ends else {}
    cotangent = _cotangent(space, tainted, down) if ends else None
    leaves = list(dict.fromkeys([x, *weights, down, *([] if cotangent is None else [cotangent])]))
    outputs = [out.outs[0], *(node.outs[0] for nodes in roles.values() for node in nodes)]
    region = region_between(space, outputs, leaves)
    axes = Axes(space, region, leaves)
    for gate, up in ((0, 1), (1, 0)):
        found = _agreeing(space, axes, region, out, x, weights[gate], weights[up], down, cotangent, roles)
        if found is not None:
            return dataclasses.replace(found, hidden=sides[gate].outs[0])
    raise Unsupported("its result or its gradients are not those of a gated MLP on random inputs")


def _closure(space: Space, starts: set[int]) -> tuple[set[int], list[Node]]:
    """Return all values that hold hidden activations or what is made of them, and the products that read them."""
    tainted, ends = set(starts), []
    for node in space.nodes:
        touched = [v for v in node.ins if v in tainted]
        if not touched:
            continue
        if node.name == "dot_general":
            if len(touched) == 2:
                raise Unsupported("hidden activations are multiplied with each other")
            ends.append(node)
        elif not _is_pointwise(node):
            raise Unsupported(f"hidden activations are read by `{node.name}`")
        else:
            tainted.update(node.outs)
    if tainted & space.escapes:
        raise Unsupported("hidden activations are a result of the step, or of its loop")
    return tainted, ends


def _roles(space, tainted, ends: list[Node], rows: int, weights: list[int], down: int) -> dict[str, list[Node]]:
    """Return the products of the backward pass by what they are: `"x"` two parts, `"wide"` two weights, `"down"`."""
    roles: dict[str, list[Node]] = {"x": [], "wide": [], "down": []}
    plain = [_stripped(space, w) for w in weights]
    for end in ends:
        other = next(v for v in end.ins if v is not None and v not in tainted)
        if space.root(other) == rows or _stripped(space, other) == _stripped(space, rows):
            roles["wide"].append(end)
        elif _stripped(space, other) in plain:
            roles["x"].append(end)
        else:
            roles["down"].append(end)
    sizes = {name: len(found) for name, found in roles.items()}
    if sizes["x"] not in (0, 2) or sizes["wide"] not in (0, 2) or sizes["down"] > 1:
        raise Unsupported(f"its backward pass has {sizes['x']}, {sizes['wide']} and {sizes['down']} products")
    return {name: found for name, found in roles.items() if found}


def _cotangent(space: Space, tainted: set[int], down: int) -> int:
    """Return what is multiplied with the last weight on the way into hidden activations' gradients."""
    found = set()
    for node in space.nodes:
        if node.name == "dot_general" or not any(v in tainted for v in node.ins):
            continue
        for value in node.ins:
            if value is None or value in tainted or value in space.fixed:
                continue
            product = space.makers.get(_stripped(space, value))
            sides = [] if product is None or product.name != "dot_general" else product.ins
            matches = [
                i for i, v in enumerate(sides) if v is not None and _stripped(space, v) == _stripped(space, down)
            ]
            if not matches:
                raise Unsupported("hidden activations meet something that is not made of its rows and weights")
            found.add(sides[1 - matches[0]])
    if len(found) != 1:
        raise Unsupported("its backward pass was not recognised")
    return found.pop()


def _agreeing(space, axes: Axes, region, out: Node, x, gate, up, down, cotangent, roles) -> Mlp | None:
    orders = _orders(axes, x, gate, up, down)
    small = Small(axes, region)
    leaves = dict.fromkeys([x, gate, up, down, *([] if cotangent is None else [cotangent])])
    values = {value: small.random_input(value) for value in leaves}
    env = small.run(values)

    def laid(name: str, value: int) -> np.ndarray:
        return _laid(axes, small, value, env[value], orders[name])

    operands = [laid(name, value) for name, value in (("x", x), ("gate", gate), ("up", up), ("down", down))]
    g = None if cotangent is None else laid("out", cotangent)
    for activation in ACTIVATIONS:
        expected = _definition(activation, *operands, g)
        if not _close(laid("out", out.outs[0]), expected["out"]):
            continue
        grads = _assigned(roles, expected, laid)
        if grads is None:
            return None
        second = _second(space, roles["x"]) if "x" in roles else None
        return Mlp(x, gate, up, down, activation, out, cotangent, grads, second, axes, orders, x)
    return None


def _assigned(roles, expected, laid) -> dict[str, Node] | None:
    """Return the node of each gradient, or None where a product is no gradient of this MLP."""
    grads: dict[str, Node] = {}
    if "x" in roles:
        first, second = roles["x"]
        if not _close(laid("x", first.outs[0]) + laid("x", second.outs[0]), expected["x"]):
            return None
        grads["x"] = first
    if "down" in roles:
        (node,) = roles["down"]
        if not _close(laid("down", node.outs[0]), expected["down"]):
            return None
        grads["down"] = node
    if "wide" in roles:
        for order in itertools.permutations(roles["wide"]):
            if all(_close(laid(n, node.outs[0]), expected[n]) for n, node in zip(("gate", "up"), order, strict=True)):
                return grads | dict(zip(("gate", "up"), order, strict=True))
        return None
    return grads


def _close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


def _second(space: Space, parts: list[Node]) -> tuple[Node, Node]:
    """Return the later part of the rows' gradient, and the sum that adds it to what holds the earlier part."""
    first, second = parts
    value = second.outs[0]
    while len(readers := space.readers.get(value, ())) == 1 and readers[0].name in _ASIDE | _PLAIN:
        value = readers[0].outs[0]
    if len(readers) != 1 or readers[0].name not in ("add_any", "add") or second.side != first.side:
        raise Unsupported("the two parts of the gradient of its rows are not added")
    total = readers[0]
    other = next((v for v in total.ins if v is not None and v != value), None)
    if other is None or value in space.escapes or not _holds(space, other, first.outs[0]):
        raise Unsupported("the two parts of the gradient of its rows are not added to each other")
    if space.avals[other].shape != space.avals[total.outs[0]].shape:
        raise Unsupported("the two parts of the gradient of its rows have different shapes")
    return second, total


def _holds(space: Space, value: int, part: int) -> bool:
    """Whether a value is a sum with that part in it, and the part is read by nothing else."""
    while part not in (value, None):
        readers = space.readers.get(part, ())
        if len(readers) != 1 or readers[0].name not in _ASIDE | _PLAIN | {"add_any", "add"} or part in space.escapes:
            return False
        part = readers[0].outs[0]
    return part == value


def _orders(axes: Axes, x: int, gate: int, up: int, down: int) -> dict[str, list[list[Atom]]]:
    of = {name: axes.all(value) for name, value in (("x", x), ("gate", gate), ("up", up), ("down", down))}
    inside = {id(a) for a in of["gate"]}
    width = [a for a in of["x"] if id(a) in inside]
    tokens = [a for a in of["x"] if id(a) not in inside]
    hidden = _minus(of["gate"], width)
    last = _minus(of["down"], hidden)
    found = {"x": [tokens, width], "gate": [width, hidden], "up": [width, hidden]}
    return found | {"down": [hidden, last], "out": [tokens, last]}


def _minus(atoms: list[Atom], others: list[Atom]) -> list[Atom]:
    return [a for a in atoms if id(a) not in {id(b) for b in others}]


def _laid(axes: Axes, small: Small, value: int, x: np.ndarray, order: list[list[Atom]]) -> np.ndarray:
    have, wanted = axes.all(value), [a for axis in order for a in axis]
    place = {id(a): i for i, a in enumerate(have)}
    if set(place) != {id(a) for a in wanted}:
        raise Unsupported("the axes of its operands are not those of a gated MLP")
    x = np.transpose(np.reshape(x, [small.size(a) for a in have]), [place[id(a)] for a in wanted])
    return np.reshape(x, [int(np.prod([small.size(a) for a in axis])) for axis in order])


def _definition(activation: str, x, gate, up, down, g) -> dict[str, np.ndarray]:
    """Return a gated MLP and its gradients by their formulas."""
    z, u = x @ gate, x @ up
    a, slope = ACTIVATIONS[activation](z)
    found = {"out": (a * u) @ down}
    if g is None:
        return found
    dh = g @ down.T
    dz, du = dh * u * slope, dh * a
    return found | {"x": dz @ gate.T + du @ up.T, "gate": x.T @ dz, "up": x.T @ du, "down": (a * u).T @ g}
