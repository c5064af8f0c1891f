"""Naive attention, found by dataflow: a softmax between two products, and the backward pass that is exactly its own.

In: a `Space`. Out: for each softmax between two products a `Found`, or the reason why it has to stay. Names, order,
transposes and casts play no part. What is found is compared on small random inputs, forward and backward together, with
the definition of attention; without that agreement nothing is reported as found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from memopt.passes._match import Node, Space
from memopt.passes._match_dims import Atom, Axes, Small, Unsupported

_LAYOUT = frozenset({"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim", "reduce_precision"})
_PLAIN = frozenset({"name", "copy", "copy_p", "stop_gradient", "optimization_barrier"})
_MIXED = frozenset({"mul", "div", "add", "sub", "select_n"})
FILLED = -1e4  # a score of at most this stands for a hidden pair


@dataclasses.dataclass
class Scores:
    """How scores are made of a product: factor, cap, masks and biases."""

    product: Node
    factor: float = 1.0
    soft_cap: float | None = None
    masks: list[tuple[int, bool]] = dataclasses.field(default_factory=list)  # value, and which truth value allows
    fills: list[float] = dataclasses.field(default_factory=list)
    biases: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # value, and its factor

    @property
    def scale(self) -> float:
        """The scale as `attention` takes it."""
        return self.factor * (1.0 if self.soft_cap is None else self.soft_cap)


@dataclasses.dataclass
class Found:
    """One attention. Numbers are values of the space.

    Attributes:
        q, k, v: operands of the products.
        out: the node of the second product.
        cotangent: of its result, None where there is no backward pass.
        grads: `"q"`, `"k"`, `"v"` -> the node that makes this gradient; those that exist.
        scores: the way from the first product to the softmax.
        axes: the atoms of all values of the region.
        orders: `"q"`, `"k"`, `"v"`, `"out"`, `"mask"` -> atoms of each of the four axes that kernels want.
        softmax: the node that divides by the sum.
    """

    q: int
    k: int
    v: int
    out: Node
    cotangent: int | None
    grads: dict[str, Node]
    scores: Scores
    axes: Axes
    orders: dict[str, list[list[Atom]]]
    softmax: Node

    @property
    def extras(self) -> list[int]:
        """Masks and biases, in the order in which a replacement takes them."""
        return [value for value, _ in (*self.scores.masks, *self.scores.biases)]


def find(space: Space) -> Iterator[tuple[Node, Found | str]]:
    """Yield the softmax node of each candidate, with what was found or the reason against it."""
    for node in space.nodes:
        exponential = _softmax(space, node)
        if exponential is None:
            continue
        scores_value = _unshifted(space, exponential)
        if _reaches(space, scores_value) is None or not any(_products(space, node.outs[0], _LAYOUT | _PLAIN | _MIXED)):
            continue
        try:
            found = _examine(space, node, scores_value)
            _verify(space, found)
            yield node, found
        except Unsupported as error:
            yield node, str(error)


# The softmax.


def _softmax(space: Space, node: Node) -> Node | None:
    """Return the `exp` node whose result this `div` node divides by its own sum, or None."""
    if node.name != "div" or None in node.ins:
        return None
    exponential = space.makers.get(space.root(node.ins[0]))
    if exponential is None or exponential.name != "exp":
        return None
    total = _stripped(space, node.ins[1])
    maker = space.makers.get(total)
    if maker is None or maker.name != "reduce_sum":
        return None
    return exponential if _stripped(space, maker.ins[0]) == exponential.outs[0] else None


def _unshifted(space: Space, exponential: Node) -> int:
    """Return the scores: what the exponential takes, before a row's maximum was subtracted."""
    value = space.root(exponential.ins[0])
    node = space.makers.get(value)
    if node is not None and node.name == "sub" and None not in node.ins:
        shift = space.makers.get(_stripped(space, node.ins[1]))
        if shift is not None and shift.name == "max" and sum(v is not None for v in shift.ins) == 1:
            shift = space.makers.get(_stripped(space, next(v for v in shift.ins if v is not None)))
        if shift is not None and shift.name == "reduce_max":
            return node.ins[0]
    return value


def _stripped(space: Space, value: int) -> int:
    """Return what a value is a copy of in another layout or precision."""
    while (node := space.makers.get(value)) is not None and node.name in _LAYOUT | _PLAIN:
        if len(node.ins) != 1 or node.ins[0] is None:
            break
        value = node.ins[0]
    return value


def _products(space: Space, value: int, through: frozenset[str] = _LAYOUT | _PLAIN) -> Iterator[Node]:
    """Yield the products that read a value, also through some operations: by default copies in another layout."""
    for node in space.readers.get(value, ()):
        if node.name == "dot_general":
            yield node
        elif node.name in through:
            yield from _products(space, node.outs[0], through)


# The scores.


def _reaches(space: Space, value: int | None, depth: int = 24) -> Node | None:
    """Return the product that a value is made of by operations on scores alone, or None."""
    node = space.makers.get(value) if value is not None else None
    if node is None or depth == 0:
        return None
    if node.name == "dot_general":
        return node
    if node.name in _LAYOUT | _PLAIN | {"mul", "div", "add", "sub", "tanh", "select_n", "max", "min", "neg"}:
        for value in node.ins:
            if value is not None and value not in space.fixed and (found := _reaches(space, value, depth - 1)):
                return found
    return None


def _parse(space: Space, value: int) -> Scores:
    """Follow the scores back to their product, collecting what was done to it."""
    found = Scores(product=None)  # type: ignore[arg-type]
    while True:
        node = space.makers[value]
        if node.name == "dot_general":
            found.product = node
            return found
        if node.name in _LAYOUT | _PLAIN:
            value = node.ins[0]
        elif node.name in ("mul", "div"):
            value = _scaled(space, node, found)
        elif node.name == "tanh":
            if found.soft_cap is not None:
                raise Unsupported("scores are capped twice")
            found.soft_cap, found.factor, value = found.factor, 1.0, node.ins[0]
        elif node.name == "select_n" and len(node.ins) == 3:
            value = _masked(space, node, found)
        elif node.name in ("add", "sub"):
            value = _biased(space, node, found)
        else:
            raise Unsupported(f"scores pass through `{node.name}`")


def _scaled(space: Space, node: Node, found: Scores) -> int:
    for position in (1, 0) if node.name == "mul" else (1,):
        number, other = space.literal(node, position), node.ins[1 - position]
        if number is not None and other is not None:
            found.factor = found.factor * number if node.name == "mul" else found.factor / number
            return other
    raise Unsupported(f"scores go through `{node.name}` with something that is no constant")


def _masked(space: Space, node: Node, found: Scores) -> int:
    if found.soft_cap is not None:
        raise Unsupported("scores are masked before they are capped")
    for position in (1, 2):
        fill, kept = space.literal(node, position), node.ins[3 - position]
        if fill is not None and kept is not None:
            if fill * found.factor > FILLED:
                raise Unsupported(f"hidden scores are set to {fill:g}, which does not make their weight 0")
            found.masks.append((_peeled(space, node.ins[0]), position == 1))
            found.fills.append(fill)
            return kept
    raise Unsupported("scores are chosen between two arrays")


def _biased(space: Space, node: Node, found: Scores) -> int:
    if found.soft_cap is not None:
        raise Unsupported("a bias is added before the cap")
    for position in (0, 1):
        value, other = node.ins[position], node.ins[1 - position]
        if _reaches(space, value) is None or (position == 1 and node.name == "sub"):
            continue
        if other is None:  # a constant shifts all scores alike
            return value
        sign = -1.0 if node.name == "sub" else 1.0
        found.biases.append((_peeled(space, other), sign * found.factor))
        return value
    raise Unsupported("the product is subtracted from something")


def _peeled(space: Space, value: int) -> int:
    """Return a value as it was before it was broadcast."""
    while (node := space.makers.get(value)) is not None and node.name in ("broadcast_in_dim", "reshape", *_PLAIN):
        if len(node.ins) != 1 or node.ins[0] is None or not space.avals[node.ins[0]].shape:
            break
        value = node.ins[0]
    return value


# The region: everything that scores flow into.


def _examine(space: Space, softmax: Node, scores_value: int) -> Found:
    scores = _parse(space, scores_value)
    tainted, ends = _closure(space, scores.product.outs[0])
    outs = [end for end in ends if end in list(_products(space, softmax.outs[0]))]
    first, second = scores.product.ins
    if first is None or second is None or first == second:
        raise Unsupported("queries and keys are the same array")
    extras = {value for value, _ in (*scores.masks, *scores.biases)}
    for out in outs:
        v = _other(out, tainted)
        grads, cotangent = _cotangent(space, tainted, ends, out, v, scores, extras)
        if cotangent is not None or len(ends) == 1:
            return _arranged(space, softmax, scores, out, v, cotangent, grads, (first, second))
    raise Unsupported("its backward pass was not recognised")


def _closure(space: Space, start: int) -> tuple[set[int], list[Node]]:
    """Return all values that hold scores or what is made of them, and the products that contract them away."""
    tainted, ends = {start}, []
    for node in space.nodes:
        touched = [v for v in node.ins if v in tainted]
        if not touched:
            continue
        if node.name == "dot_general":
            if len(touched) == 2:
                raise Unsupported("scores are multiplied with each other")
            ends.append(node)
        elif node.eqn.effects or len(node.outs) != 1 or node.name in ("scan", "while", "cond", "gather", "sort"):
            raise Unsupported(f"scores or weights are read by `{node.name}`")
        else:
            tainted.update(node.outs)
    if tainted & space.escapes:
        raise Unsupported("scores or weights are a result of the step, or of its loop")
    return tainted, ends


def _other(node: Node, tainted: set[int]) -> int:
    return next(v for v in node.ins if v is not None and v not in tainted)


def _cotangent(space, tainted, ends, out: Node, v: int, scores: Scores, extras: set[int]):
    """Return the nodes of the gradients of q, k, v and the cotangent, or `({}, None)` where the roles do not fit."""
    if len(ends) == 1:
        return {}, None
    source = _stripped(space, v)
    cotangents = set()
    for node in space.nodes:
        if not any(value in tainted for value in node.ins) or node.name == "dot_general":
            continue
        for value in node.ins:
            if value is None or value in tainted or value in space.fixed or _peeled(space, value) in extras:
                continue
            product = space.makers.get(_stripped(space, value))
            sides = [] if product is None or product.name != "dot_general" else list(product.ins)
            matches = [i for i, side in enumerate(sides) if side is not None and _stripped(space, side) == source]
            if not matches:
                return {}, None
            cotangents.add(sides[1 - matches[0]])
    if len(cotangents) != 1:
        return {}, None
    cotangent = cotangents.pop()
    roles = _roles(space, tainted, ends, out, cotangent, scores)
    return (roles, cotangent) if roles is not None else ({}, None)


def _roles(space, tainted, ends, out: Node, cotangent: int, scores: Scores) -> dict[str, Node] | None:
    first, second = (_stripped(space, v) for v in scores.product.ins)
    behind = _downstream(space, tainted, cotangent)
    roles: dict[str, Node] = {}
    for end in ends:
        if end is out:
            continue
        other = _other(end, tainted)
        late = any(v in behind for v in end.ins if v in tainted)
        if not late and _stripped(space, other) == _stripped(space, cotangent):
            role = "v"
        elif late and _stripped(space, other) in (first, second):
            role = "second" if _stripped(space, other) == first else "first"
        else:
            return None
        if role in roles:
            return None
        roles[role] = end
    return roles


def _downstream(space: Space, tainted: set[int], cotangent: int) -> set[int]:
    found = {cotangent}
    for node in space.nodes:
        if any(v in found for v in node.ins):
            found.update(node.outs)
    return found & tainted


def region_between(space: Space, outputs: Iterable[int], inputs: Sequence[int]) -> list[Node]:
    """Return the nodes between inputs and outputs, in order."""
    wanted, stack, seen = set(), list(outputs), set(inputs)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = space.makers.get(value)
        if node is None:
            raise Unsupported("it reads something beside queries, keys, values, masks and biases")
        wanted.add(id(node))
        stack.extend(v for v in node.ins if v is not None)
    return [node for node in space.nodes if id(node) in wanted]


def _arranged(space, softmax, scores: Scores, out: Node, v: int, cotangent, grads, sides) -> Found:
    inputs = [*sides, v, *(value for value, _ in (*scores.masks, *scores.biases))]
    inputs = list(dict.fromkeys([*inputs, *([] if cotangent is None else [cotangent])]))
    region = region_between(space, [out.outs[0], *(node.outs[0] for node in grads.values())], inputs)
    axes = Axes(space, region, inputs)
    total = space.makers[_stripped(space, softmax.ins[1])]
    columns = _minus(axes.all(total.ins[0]), axes.all(total.outs[0]))
    q, k = sides
    names = {"first": "q", "second": "k", "v": "v"}
    if _within(columns, axes.all(q)):
        q, k, names = k, q, {"first": "k", "second": "q", "v": "v"}
    grads = {names[role]: node for role, node in grads.items()}
    orders = _orders(axes, scores, q, k, v, columns)
    found = Found(q, k, v, out, cotangent, grads, scores, axes, orders, softmax)
    expected = {"q": q, "k": k, "v": v, "out": out.outs[0]}
    expected |= {f"grad {name}": node.outs[0] for name, node in grads.items()}
    expected |= {} if cotangent is None else {"grad out": cotangent}
    for name, value in expected.items():
        atoms = [atom for axis in orders[name.removeprefix("grad ")] for atom in axis]
        if {id(a) for a in atoms} != {id(a) for a in axes.all(value)}:
            raise Unsupported(f"the axes of {name} are not those of attention")
    return found


def _orders(axes: Axes, scores: Scores, q: int, k: int, v: int, columns: list[Atom]) -> dict[str, list[list[Atom]]]:
    plane, of_q, of_k = axes.all(scores.product.outs[0]), axes.all(q), axes.all(k)
    batch = [a for a in plane if _within([a], of_q) and _within([a], of_k)]
    rows = [a for a in plane if not _within([a], of_k)]
    if {id(a) for a in plane if not _within([a], of_q)} != {id(a) for a in columns}:
        raise Unsupported("the softmax is not over the keys")
    width, depth = _minus(of_q, plane), _minus(axes.all(v), plane)
    time = _time(axes, scores, rows)
    outer, heads, group = batch[:-1], batch[-1:], _minus(rows, time)
    columns = [a for a in plane if _within([a], columns)]
    return {
        "q": [outer, time, [*heads, *group], width],
        "k": [outer, columns, heads, width],
        "v": [outer, columns, heads, depth],
        "out": [outer, time, [*heads, *group], depth],
        "mask": [outer, [*heads, *group], time, columns],
    }


def _time(axes: Axes, scores: Scores, rows: list[Atom]) -> list[Atom]:
    """Return the row atoms that are positions, not heads of a group: those that a mask knows, else the last."""
    masked = [a for value, _ in (*scores.masks, *scores.biases) for a in axes.all(value)]
    positions = [a for a in rows if _within([a], masked)]
    return positions if len(positions) == 1 else rows[-1:]


def _within(atoms: Sequence[Atom], others: Sequence[Atom]) -> bool:
    return {id(a) for a in atoms} <= {id(a) for a in others}


def _minus(atoms: Sequence[Atom], others: Sequence[Atom]) -> list[Atom]:
    return [a for a in atoms if id(a) not in {id(b) for b in others}]


# The proof.


def _verify(space: Space, found: Found) -> None:
    """Raise `Unsupported` unless region and definition agree on small random inputs, in float64."""
    inputs = [found.q, found.k, found.v, *found.extras, *([] if found.cotangent is None else [found.cotangent])]
    outputs = [found.out.outs[0], *(node.outs[0] for node in found.grads.values())]
    region = region_between(space, outputs, inputs)
    small = Small(found.axes, region)
    values = {value: small.random_input(value) for value in dict.fromkeys(inputs)}
    env = small.run(values)
    expected = _definition(found, small, values)
    names = {"out": found.out, **found.grads}
    for name, node in names.items():
        ours, theirs = canonical(small, found, name, node.outs[0], env[node.outs[0]]), expected[name]
        if not np.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(theirs).max())):
            which = "its result differs" if name == "out" else f"its gradient of {name} differs"
            raise Unsupported(f"{which} from that of attention on random inputs")


def canonical(small: Small, found: Found, name: str, value: int, x: np.ndarray) -> np.ndarray:
    """Return a small array in the four axes that kernels want."""
    have, order = found.axes.all(value), found.orders[name]
    x = np.reshape(x, [small.size(a) for a in have])
    place = {id(a): i for i, a in enumerate(have)}
    wanted = [a for axis in order for a in axis]
    x = np.transpose(x, [place[id(a)] for a in wanted if id(a) in place])
    x = np.reshape(x, [small.size(a) if id(a) in place else 1 for a in wanted])
    x = np.broadcast_to(x, [small.size(a) for a in wanted])
    return np.reshape(x, [int(np.prod([small.size(a) for a in axis])) for axis in order])


def _definition(found: Found, small: Small, values: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Return attention and its gradients by their formulas, in the four axes that kernels want."""
    scores = found.scores
    q, k, v = (canonical(small, found, n, x, values[x]) for n, x in (("q", found.q), ("k", found.k), ("v", found.v)))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    x = np.einsum("bqhd,bkhd->bhqk", q, k) * scores.scale
    bent = np.zeros_like(x) if scores.soft_cap is None else np.tanh(x / scores.soft_cap)
    x = x if scores.soft_cap is None else bent * scores.soft_cap
    for value, factor in scores.biases:
        x = x + factor * canonical(small, found, "mask", value, values[value])
    keep = np.ones(x.shape, bool)
    for value, allows in scores.masks:
        keep &= canonical(small, found, "mask", value, values[value]) == allows
    x = np.where(keep, x, -1e30)
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    result = {"out": np.einsum("bhqk,bkhd->bqhd", weights, v)}
    if found.cotangent is None:
        return result
    g = canonical(small, found, "out", found.cotangent, values[found.cotangent])
    dweights = np.einsum("bqhd,bkhd->bhqk", g, v)
    ds = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    ds = np.where(keep, ds * (1 - bent * bent), 0) * scores.scale
    result["q"] = np.einsum("bhqk,bkhd->bqhd", ds, k)
    for name, gradient in (("k", np.einsum("bhqk,bqhd->bkhd", ds, q)), ("v", np.einsum("bhqk,bqhd->bkhd", weights, g))):
        result[name] = gradient.reshape(*gradient.shape[:2], -1, group, gradient.shape[-1]).sum(axis=3)
    return result
