"""A matmul into a cross-entropy, found by dataflow: logits, the loss of each token, and both gradients of the matmul.

In: a `Space`. Out: for each product whose result is exponentiated and summed over one of its own axes a `Loss`, or the
reason why it has to stay. How the loss is written plays no part: a value that equals the loss of each token, and one
that acts as its cotangent, are looked for by evaluating the region on small random inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from memopt.passes._match import Node, Space
from memopt.passes._match_dims import Atom, Axes, Small, Unsupported, region_between

_ASIDE = frozenset(
    {"convert_element_type", "reshape", "transpose", "squeeze", "name", "copy", "copy_p", "stop_gradient"}
)


@dataclasses.dataclass
class Loss:
    """One loss. Numbers are values of the space.

    Attributes:
        hidden, weight, labels: what it is made of; the weight as it was before it was transposed.
        loss: the node of the loss of each token, times `sign`.
        cotangent: what the gradients are linear in, times `cotangent_sign` that of the loss; None without gradients.
        grads: `"hidden"`, `"weight"` -> the node that makes this gradient.
        product: the node of the logits.
        axes: the atoms of all values of the region.
        tokens, width, vocab: atoms.
    """

    hidden: int
    weight: int
    labels: int
    loss: Node
    sign: float
    cotangent: int | None
    cotangent_sign: float
    grads: dict[str, Node]
    product: Node
    axes: Axes
    tokens: list[Atom]
    width: list[Atom]
    vocab: list[Atom]


def find(space: Space) -> Iterator[tuple[Node, Loss | str]]:
    """Yield the product of each candidate, with what was found or the reason against it."""
    for node in space.nodes:
        if node.name != "reduce_sum":
            continue
        exponential = space.makers.get(space.root(node.ins[0])) if node.ins[0] is not None else None
        product = _logits(space, exponential)
        if product is None or not _logarithm(space, node.outs[0]):
            continue
        try:
            yield product, _examine(space, product)
        except Unsupported as error:
            yield product, str(error)


def _logits(space: Space, node: Node | None) -> Node | None:
    """Return the product that an `exp` is taken of, after something that is subtracted from each row."""
    if node is None or node.name != "exp":
        return None
    value = node.ins[0]
    while value is not None and (node := space.makers.get(value)) is not None:
        if node.name == "dot_general":
            batch = node.eqn.params["dimension_numbers"][1]
            return node if batch == ((), ()) else None
        if node.name not in _ASIDE | {"sub", "add", "mul"}:
            return None
        value = next((v for v in node.ins if v is not None and v not in space.fixed), None)
    return None


def _logarithm(space: Space, value: int) -> bool:
    readers = space.readers.get(value, ())
    aside = _ASIDE | {"broadcast_in_dim", "abs"}
    return any(n.name == "log" or (n.name in aside and _logarithm(space, n.outs[0])) for n in readers)


def _examine(space: Space, product: Node) -> Loss:
    full, ends = _full(space, product)
    labels = _labels(space, product, full)
    first, second = product.ins
    for hidden, weight in ((first, second), (second, first)):
        if hidden is not None and weight is not None:
            found = _with_roles(space, product, full, ends, hidden, weight, labels)
            if found is not None:
                return found
    raise Unsupported("no value equals the cross-entropy of each token, or its gradients are not exactly its own")


def _full(space: Space, product: Node) -> tuple[set[int], list[Node]]:
    """Return the values as large as the logits that are made of them, and the products that read them."""
    size = int(np.prod(product.eqn.outvars[0].aval.shape))
    full, ends, known = set(product.outs), [], set(product.outs)
    for node in space.nodes:
        touched = [v for v in node.ins if v in known]
        if not touched:
            continue
        if node.name == "dot_general":
            if any(v in full for v in touched):
                ends.append(node)
            continue
        if node.eqn.effects or len(node.outs) != 1 or node.name in ("argmax", "sort", "top_k"):
            if any(v in full for v in touched):
                raise Unsupported(f"logits are read by `{node.name}`")
            continue
        known.update(node.outs)
        if int(np.prod(space.avals[node.outs[0]].shape)) >= size:
            full.update(node.outs)
    if full & space.escapes:
        raise Unsupported("logits are a result of the step, or of its loop")
    return full, ends


def _labels(space: Space, product: Node, full: set[int]) -> int:
    """Return the one integer array that is compared or picked with next to the logits."""
    found = set()
    for node in space.nodes:
        if node.name == "gather" and node.ins[0] in full:
            found.add(_origin(space, node.ins[1]))
        if node.name == "eq" and int(np.prod(node.eqn.outvars[0].aval.shape)) >= int(
            np.prod(product.eqn.outvars[0].aval.shape)
        ):
            found.update(_origin(space, v) for v in node.ins if v is not None and v not in space.fixed)
    if len(found) != 1:
        raise Unsupported("its labels are not one array of integers")
    return found.pop()


def _origin(space: Space, value: int) -> int:
    """Return integers as they were before negative ones were wrapped, and before layout and casts."""
    while (node := space.makers.get(value)) is not None:
        if node.name == "select_n" and node.ins[1] is not None:
            value = node.ins[1]
        elif node.name in _ASIDE | {"broadcast_in_dim"} and node.ins[0] is not None and space.avals[node.ins[0]].shape:
            value = node.ins[0]
        else:
            break
    return value


def _with_roles(space, product, full, ends, hidden: int, weight: int, labels: int) -> Loss | None:
    source = weight
    while (node := space.makers.get(source)) is not None and node.name in ("transpose", "name", "copy", "copy_p"):
        source = node.ins[0]
    grads = _gradients(space, ends, full, hidden, source)
    inputs = [hidden, source, labels]
    for node, sign in _losses(space, product, inputs, full):
        if not grads:
            return _arranged(space, product, node, sign, None, 1.0, grads, inputs, full)
        for cotangent in _cotangents(space, grads, inputs, full, node):
            found = _arranged(space, product, node, sign, cotangent, 1.0, grads, inputs, full)
            if found is not None:
                return found
    return None


def _gradients(space: Space, ends: list[Node], full: set[int], hidden: int, weight: int) -> dict[str, Node]:
    grads: dict[str, Node] = {}
    for end in ends:
        others = [v for v in end.ins if v is not None and v not in full]
        role = None if len(others) != 1 else _role(space, others[0], hidden, weight)
        if role is None or role in grads:
            raise Unsupported("logits or their gradient are multiplied with something else")
        grads[role] = end
    return grads


def _role(space: Space, value: int, hidden: int, weight: int) -> str | None:
    while True:
        if value == hidden:
            return "weight"
        if value == weight:
            return "hidden"
        node = space.makers.get(value)
        if node is None or node.name not in _ASIDE or node.ins[0] is None:
            return None
        value = node.ins[0]


def _losses(space: Space, product: Node, inputs: list[int], full: set[int]) -> Iterator[tuple[Node, float]]:
    """Yield the nodes, in order, whose result equals the loss of each token, or the sum of all, or its negative."""
    size = int(np.prod(space.avals[inputs[2]].shape))
    known = set(product.outs)
    for node in space.nodes:
        if node.name == "dot_general" or not any(v in known for v in node.ins) or len(node.outs) != 1:
            continue
        known.update(node.outs)
        aval = space.avals[node.outs[0]]
        if (
            int(np.prod(aval.shape)) not in (1, size)
            or not np.issubdtype(aval.dtype, np.floating)
            or node.outs[0] in full
        ):
            continue
        try:
            region = region_between(space, node.outs, inputs)
            axes = Axes(space, region, inputs)
            small = Small(axes, region)
            values = {value: small.random_input(value) for value in inputs}
            loss = np.ravel(small.run(values)[node.outs[0]])
            expected = _definition(axes, small, inputs, values, None)[0]
        except Unsupported:
            continue
        expected = expected if len(loss) == len(expected) else expected.sum(keepdims=True)
        if len(loss) == len(expected) and np.allclose(loss, expected, rtol=1e-6, atol=1e-6):
            yield node, 1.0
        elif len(loss) == len(expected) and np.allclose(loss, -expected, rtol=1e-6, atol=1e-6):
            yield node, -1.0


def _cotangents(space: Space, grads: dict[str, Node], inputs: list[int], full: set[int], loss: Node) -> Iterator[int]:
    """Yield values of one number a token, or one in all, on the way to the gradients, that no logit reaches.

    The loss itself may reach them: the gradient of a function of the losses does.
    """
    size = int(np.prod(space.avals[inputs[2]].shape))
    region = region_between(space, [node.outs[0] for node in grads.values()], [*inputs, *_free(space, full)])
    late = set(full)
    for node in space.nodes:
        if node is not loss and any(v in late for v in node.ins):
            late.update(node.outs)
    values = {v for node in region for v in (*node.ins, *node.outs) if v is not None and v not in late}
    found = [v for v in values if int(np.prod(space.avals[v].shape)) in (1, size) and v not in inputs]
    yield from sorted((v for v in found if np.issubdtype(space.avals[v].dtype, np.floating)), reverse=True)


def _free(space: Space, full: set[int]) -> list[int]:
    """Return the values that nothing in the space makes."""
    return [v for v in space.avals if v not in space.makers and v not in full]


def _arranged(space, product, node: Node, sign, cotangent, cotangent_sign, grads, inputs, full) -> Loss | None:
    leaves = [*inputs, *([] if cotangent is None else [cotangent])]
    outputs = [node.outs[0], *(grad.outs[0] for grad in grads.values())]
    try:
        region = region_between(space, outputs, leaves)
        axes = Axes(space, region, leaves)
    except Unsupported:
        return None
    inside = {id(n) for n in region}
    small = Small(axes, region)
    values = {value: small.random_input(value) for value in leaves}
    env = small.run(values)
    g = None if cotangent is None else np.ravel(values[cotangent])
    try:
        _, dhidden, dweight = _definition(axes, small, inputs, values, g)
    except Unsupported:
        return None
    expected = {"hidden": dhidden, "weight": dweight}
    for name, grad in grads.items():
        ours = _laid(axes, small, grad.outs[0], env[grad.outs[0]], _order(axes, inputs, name))
        if np.allclose(ours, -expected[name], rtol=1e-6, atol=1e-6):
            cotangent_sign = -1.0
        elif not np.allclose(ours, expected[name], rtol=1e-6, atol=1e-6):
            return None
    for value in full:
        for reader in space.readers.get(value, ()):
            if id(reader) not in inside:
                raise Unsupported(f"logits, or what is made of them, are read by `{reader.name}` elsewhere")
    tokens, width, vocab = _atoms(axes, inputs)
    hidden, weight, labels = inputs
    return Loss(
        hidden, weight, labels, node, sign, cotangent, cotangent_sign, grads, product, axes, tokens, width, vocab
    )


def _atoms(axes: Axes, inputs: list[int]) -> tuple[list[Atom], list[Atom], list[Atom]]:
    hidden, weight = (axes.all(v) for v in inputs[:2])
    ids = {id(a) for a in weight}
    width = [a for a in hidden if id(a) in ids]
    return [a for a in hidden if id(a) not in ids], width, [a for a in weight if id(a) not in {id(b) for b in width}]


def _order(axes: Axes, inputs: list[int], name: str) -> list[list[Atom]]:
    tokens, width, vocab = _atoms(axes, inputs)
    return [tokens, width] if name == "hidden" else [vocab, width]


def _laid(axes: Axes, small: Small, value: int, x: np.ndarray, order: list[list[Atom]]) -> np.ndarray:
    have = axes.all(value)
    place = {id(a): i for i, a in enumerate(have)}
    wanted = [a for axis in order for a in axis]
    if set(place) != {id(a) for a in wanted}:
        return np.full((1,), np.nan)
    x = np.transpose(np.reshape(x, [small.size(a) for a in have]), [place[id(a)] for a in wanted])
    return np.reshape(x, [int(np.prod([small.size(a) for a in axis])) for axis in order])


def _definition(axes: Axes, small: Small, inputs: list[int], values, cotangent):
    """Return the loss of each token and, from a cotangent, the gradients of hidden states and `[vocab, dim]` weight."""
    hidden = _laid(axes, small, inputs[0], values[inputs[0]], _order(axes, inputs, "hidden"))
    weight = _laid(axes, small, inputs[1], values[inputs[1]], _order(axes, inputs, "weight"))
    labels = np.ravel(values[inputs[2]])
    if hidden.ndim != 2 or weight.ndim != 2 or len(labels) != len(hidden):
        raise Unsupported("tokens and labels do not belong together")
    logits = hidden @ weight.T
    top = logits.max(axis=1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    rows = np.arange(len(labels))
    loss = lse - logits[rows, labels]
    if cotangent is None:
        return loss, None, None
    gradient = np.exp(logits - lse[:, None])
    gradient[rows, labels] -= 1
    if len(cotangent) not in (1, len(loss)):
        raise Unsupported("tokens and cotangents do not belong together")
    gradient *= cotangent[:, None]
    return loss, gradient @ weight, gradient.T @ hidden
