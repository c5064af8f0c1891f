"""RMSNorm and LayerNorm, found by dataflow: a root of a row's mean square, what is divided by it, and the gradients.

In: a `Space`. Out: for each such root a `Norm`, or the reason why it has to stay. How means are taken, whether the
variance is that of centered rows or a difference of squares, and the order of factors play no part: the region is
compared with the definition on random inputs. The gradient of the rows may be found amid a sum with others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from memopt.passes._match import Node, Space
from memopt.passes._match_dims import Atom, Axes, Small, Unsupported, region_between

_LAYOUT = frozenset({"convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "reduce_precision"})
_PLAIN = frozenset({"name", "copy", "copy_p", "stop_gradient", "optimization_barrier"})
_ROOTS = frozenset({"rsqrt", "sqrt", "pow"})
_POINTWISE = _LAYOUT | _PLAIN | {
    "mul", "div", "add", "add_any", "sub", "neg", "max", "min", "square", "integer_pow", "sqrt", "rsqrt", "pow", "abs",
    "select_n", "eq", "ge", "gt", "le", "lt", "one_minus_square",
}  # fmt: skip


@dataclasses.dataclass
class Norm:
    """One norm. Numbers are values of the space.

    Attributes:
        x, scale, bias: rows and parameters, the latter None where there are none.
        centered, epsilon: the settings.
        out: the node of the result.
        cotangent: of the result, None where there is no backward pass.
        grads: `"x"`, `"scale"`, `"bias"` -> the node that makes this gradient; that of the rows may add `others`.
        others: what the node of the rows' gradient adds to it.
        axes: the atoms of all values of the region.
        rows, width: atoms of the rows.
    """

    x: int
    scale: int | None
    bias: int | None
    centered: bool
    epsilon: float
    out: Node
    cotangent: int | None
    grads: dict[str, Node]
    others: list[int]
    axes: Axes
    rows: list[Atom]
    width: list[Atom]


def may_be_in(eqns: Iterable[Any]) -> bool:
    """Whether there is a root and a sum at all."""
    names = {eqn.primitive.name for eqn in eqns}
    return bool(names & _ROOTS) and "reduce_sum" in names


def find(space: Space) -> Iterator[tuple[Node, Norm | str]]:
    """Yield the root of each candidate, with what was found or the reason against it."""
    for root in space.nodes:
        x = _source(space, root) if _is_root(space, root) else None
        if x is None:
            continue
        try:
            yield root, _Search(space, root, x).run()
        except Unsupported as error:
            yield root, str(error)


# What the root is of.


def _is_root(space: Space, node: Node) -> bool:
    if node.name == "pow":
        return node.ins[0] is not None and abs(space.literal(node, 1) or 0) == 0.5
    return node.name in _ROOTS and node.ins[0] is not None


def _source(space: Space, root: Node) -> int | None:
    """Return the rows that a root is a statistic of, or None where it is of something else."""
    found, stack, seen = set(), [root.ins[0]], set()
    while stack:
        value = stack.pop()
        if value is None or value in seen or value in space.fixed:
            continue
        seen.add(value)
        node = space.makers.get(value)
        if node is None or len(seen) > 40:
            return None
        if node.name == "reduce_sum":
            found.add(_rows(space, node.ins[0]))
        elif node.name in _POINTWISE:
            stack.extend(node.ins)
        else:
            return None
    return found.pop() if len(found) == 1 else None


def _rows(space: Space, value: int) -> int:
    """Return rows before they were squared, centered or cast."""
    while (node := space.makers.get(value)) is not None:
        squared = node.name == "mul" and node.ins[0] == node.ins[1]
        if squared or node.name in ("square", "integer_pow") or node.name in _LAYOUT | _PLAIN:
            if node.ins[0] is None or (node.name == "broadcast_in_dim"):
                break
            value = node.ins[0]
        elif node.name == "sub" and None not in node.ins and _is_mean(space, node.ins[1], _rows(space, node.ins[0])):
            value = node.ins[0]
        else:
            break
    return value


def _is_mean(space: Space, value: int, rows: int) -> bool:
    while (node := space.makers.get(value)) is not None and node.name in _LAYOUT | _PLAIN | {"div", "mul"}:
        value = next((v for v in node.ins if v is not None), None)
    return node is not None and node.name == "reduce_sum" and _rows(space, node.ins[0]) == rows


def _stripped(space: Space, value: int) -> int:
    """Return what a value is a cast or a reshaped copy of; broadcasts stay."""
    while (node := space.makers.get(value)) is not None and node.name in (_LAYOUT - {"broadcast_in_dim"}) | _PLAIN:
        if len(node.ins) != 1 or node.ins[0] is None:
            break
        value = node.ins[0]
    return value


def _peeled(space: Space, value: int) -> int:
    """Return a parameter as it was before it was broadcast."""
    while (node := space.makers.get(value)) is not None and node.name in _LAYOUT | _PLAIN:
        if len(node.ins) != 1 or node.ins[0] is None or not space.avals[node.ins[0]].shape:
            break
        value = node.ins[0]
    return value


def _is_of_rows(node: Node) -> bool:
    """Whether a sum is over the entries of a row, that is over the last axis alone."""
    return tuple(node.eqn.params["axes"]) == (len(node.eqn.invars[0].aval.shape) - 1,)


def _is_parameter(aval: Any, width: int) -> bool:
    return aval.size == width and aval.shape[-1:] == (width,)


class _Search:
    """One root: the forward region around it, then the backward one."""

    def __init__(self, space: Space, root: Node, x: int):
        self.space, self.root, self.x = space, root, x
        self.size = int(np.prod(space.avals[x].shape))
        self.epsilon = self._epsilon()
        self.late = self._reached([x])
        self.parameters: set[int] = set()
        self.inside = self._forward()

    def run(self) -> Norm:
        outs = [node for node in self.space.nodes if node.outs[0] in self.inside and self._is_full(node.outs[0])]
        reasons = []
        for out in reversed(outs):
            found = self._with_out(out)
            if isinstance(found, Norm):
                return found
            reasons.append(found)
        named = [reason for reason in reasons if reason is not None]
        raise Unsupported(named[0] if named else "no value equals the norm of its rows on random inputs")

    def _epsilon(self) -> float:
        value = self.space.root(self.root.ins[0])
        while (node := self.space.makers.get(value)) is not None and node.name in _LAYOUT | _PLAIN:
            value = node.ins[0]
        if node is not None and node.name == "add":
            numbers = [self.space.literal(node, i) for i in (0, 1)]
            if any(number is not None for number in numbers):
                return next(number for number in numbers if number is not None)
        if node is not None and node.name in ("div", "mul", "max", "sub"):
            return 0.0
        raise Unsupported("nothing constant is added to the mean square under its root")

    def _is_full(self, value: int) -> bool:
        return int(np.prod(self.space.avals[value].shape)) == self.size

    def _reached(self, starts: Iterable[int]) -> set[int]:
        found = set(starts)
        for node in self.space.nodes:
            if any(v in found for v in node.ins):
                found.update(node.outs)
        return found

    def _forward(self) -> set[int]:
        """Return the values made of rows and parameters alone, and note the parameters."""
        inside, width = {self.x}, self.space.avals[self.x].shape[-1]
        for node in self.space.nodes:
            if not any(v in inside for v in node.ins) or node.name not in _POINTWISE | {"reduce_sum"}:
                continue
            if node.name == "reduce_sum" and not _is_of_rows(node):
                continue
            others = [v for v in node.ins if v is not None and v not in inside and v not in self.space.fixed]
            peeled = [_peeled(self.space, v) for v in others]
            if all(_is_parameter(self.space.avals[v], width) and v not in self.late for v in peeled):
                inside.update(node.outs)
                self.parameters.update(peeled)
        return inside

    # The result.

    def _with_out(self, out: Node) -> Norm | str | None:
        """Return the norm with this result; None where it is none, or why its gradients are not its own."""
        value, space = out.outs[0], self.space
        used = self._used(value)
        if len(used) > 2 or not self._needs_root(value):
            return None
        try:
            region = region_between(space, [value], [self.x, *used])
            axes = Axes(space, region, [self.x, *used])
            known = self._settings(axes, region, value, used)
        except Unsupported:
            return None
        if known is None:
            return None
        try:
            return self._with_gradients(out, *known)
        except Unsupported as error:
            return str(error)

    def _used(self, value: int) -> list[int]:
        found, stack, seen = [], [value], {self.x}
        while stack:
            value = stack.pop()
            if value in seen or value in self.space.fixed:
                continue
            seen.add(value)
            if value not in self.inside:
                peeled = _peeled(self.space, value)
                found += [peeled] if peeled not in found else []
                continue
            stack.extend(v for v in self.space.makers[value].ins if v is not None)
        return found

    def _needs_root(self, value: int) -> bool:
        stack, seen = [value], set()
        while stack:
            value = stack.pop()
            if value == self.root.outs[0]:
                return True
            if value not in seen and value in self.inside and value != self.x:
                seen.add(value)
                stack.extend(v for v in self.space.makers[value].ins if v is not None)
        return False

    def _settings(self, axes: Axes, region, value: int, used: list[int]):
        """Return `(centered, scale, bias)` with which the definition gives this value, or None."""
        rows, width = self._atoms(axes)
        if any({id(a) for a in axes.all(v)} != {id(a) for a in width} for v in used):
            return None
        small = _small(axes, region, width)
        inputs = [self.x, *used]
        values = {v: small.random_input(v) for v in inputs}
        ours = _laid(axes, small, value, small.run(values)[value], rows, width)
        x = _laid(axes, small, self.x, values[self.x], rows, width)
        given = {v: np.ravel(values[v]) for v in used}
        options = {0: [(None, None)], 1: [(*used, None), (None, *used)], 2: list(itertools.permutations(used))}
        for (scale, bias), centered in itertools.product(options[len(used)], (False, True)):
            if _close(ours, _definition(centered, self.epsilon, x, given.get(scale), given.get(bias), None)["out"]):
                return centered, scale, bias
        return None

    def _atoms(self, axes: Axes) -> tuple[list[Atom], list[Atom]]:
        have, size = axes.all(self.x), self.space.avals[self.x].shape[-1]
        width: list[Atom] = []
        while have and int(np.prod([a.size for a in width])) < size:
            width.insert(0, have.pop())
        return have, width

    # The gradients.

    def _with_gradients(self, out: Node, centered: bool, scale: int | None, bias: int | None) -> Norm:
        used = [v for v in (scale, bias) if v is not None]
        cotangent = self._cotangent(out, used)
        if cotangent is None:
            region = region_between(self.space, [out.outs[0]], [self.x, *used])
            axes = Axes(self.space, region, [self.x, *used])
            found = self.x, scale, bias, centered, self.epsilon, out, None, {}, []
            return Norm(*found, axes, *self._atoms(axes))
        total, exits, others = self._backward(cotangent, used)
        nodes = [*([] if total is None else [total]), *exits]
        inputs = list(dict.fromkeys([self.x, *used, cotangent, *others]))
        region = region_between(self.space, [out.outs[0], *(node.outs[0] for node in nodes)], inputs)
        axes = Axes(self.space, region, inputs)
        rows, width = self._atoms(axes)
        small = _small(axes, region, width)
        values = {v: small.random_input(v) for v in inputs}
        env = small.run(values)

        def laid(value: int) -> np.ndarray:
            return _laid(axes, small, value, env[value], rows, width)

        given = [None if v is None else np.ravel(values[v]) for v in (scale, bias)]
        expected = _definition(centered, self.epsilon, laid(self.x), *given, laid(cotangent))
        grads = {} if total is None else {"x": total}
        if total is not None and not _close(laid(total.outs[0]), expected["x"] + sum(laid(v) for v in others)):
            raise Unsupported("the gradient of its rows is not its own on random inputs")
        for node in exits:
            names = [n for n in ("scale", "bias") if n not in grads and n in expected]
            value = np.ravel(env[node.outs[0]])
            name = next((n for n in names if _close(value, expected[n])), None)
            if name is None:
                raise Unsupported("a sum over its rows is not the gradient of its scale or bias on random inputs")
            grads[name] = node
        made = self.x, scale, bias, centered, self.epsilon, out, cotangent, grads, others
        return Norm(*made, axes, rows, width)

    def _cotangent(self, out: Node, used: list[int]) -> int | None:
        """Return what the backward pass multiplies with what is inside, before the scale; None without one."""
        found = set()
        for node in self.space.nodes:
            if node.outs[0] in self.inside or node.name not in _POINTWISE:
                continue
            internal = [v for v in node.ins if v in self.inside and v not in (self.x, out.outs[0])]
            for value in node.ins:
                if not internal or value is None or value in self.inside or value in self.space.fixed:
                    continue
                if self._is_full(value):
                    found.add(self._before_scale(value, used))
        early = self._reached(found) if len(found) > 1 else set()
        found = {v for v in found if not self._made_of(v, found - {v})} if early else found
        if len(found) > 1:
            raise Unsupported("its backward pass was not recognised")
        return found.pop() if found else None

    def _made_of(self, value: int, others: set[int]) -> bool:
        return any(value in self._reached([v]) for v in others)

    def _before_scale(self, value: int, used: list[int]) -> int:
        value = _stripped(self.space, value)
        node = self.space.makers.get(value)
        if node is not None and node.name == "mul" and None not in node.ins:
            for one, other in (node.ins, node.ins[::-1]):
                if _peeled(self.space, one) in used:
                    return _stripped(self.space, other)
        return value

    def _backward(self, cotangent: int, used: list[int]) -> tuple[Node | None, list[Node], list[int]]:
        """Return the node of the rows' gradient, the sums over rows, and what the former adds to the gradient."""
        space = self.space
        allowed = self.inside | {v for v in space.avals if _peeled(space, v) in used}
        made, exits, others = {cotangent}, [], {}
        nodes: list[Node] = []
        last = -1
        for node in space.nodes:
            touched = [v for v in node.ins if v in made]
            if not touched or node.name not in _POINTWISE | {"reduce_sum"} or node.outs[0] in self.inside:
                continue
            rest = [v for v in node.ins if v is not None and v not in made and v not in allowed]
            added = node.name in ("add_any", "add") and [v for v in rest if self._is_full(v)]
            if node.name == "reduce_sum" and not _is_of_rows(node):
                exits.append(node)
            elif added:
                if touched[0] != cotangent:
                    made.update(node.outs)
                    nodes.append(node)
                    others[node.outs[0]] = added[0]
            elif all(v in space.fixed for v in rest):
                made.update(node.outs)
                nodes.append(node)
                last = len(nodes) - 1 if any(v in self.inside for v in node.ins) else last
        return self._joined(nodes, last, exits, cotangent, others)

    def _joined(self, nodes: list[Node], last: int, exits: list[Node], cotangent: int, others: dict[int, int]):
        """Return the first node after all that read what is inside in which everything has come together."""
        for index in range(max(last, 0), len(nodes)):
            node, before = nodes[index], {n.outs[0] for n in nodes[:index]}
            later = nodes[index + 1 :]
            if not self._is_full(node.outs[0]) or any(v in before for n in later for v in n.ins):
                continue
            held = {cotangent, *before, node.outs[0]}
            kept = [e for e in exits if e.ins[0] in held - {node.outs[0]}]
            return node, kept, [others[n.outs[0]] for n in nodes[: index + 1] if n.outs[0] in others]
        if last < 0 and exits:
            return None, exits, []
        raise Unsupported("the parts of the gradient of its rows do not come together")


def _small(axes: Axes, region, width: list[Atom]) -> Small:
    """Return the region on few rows of full width: means are divided by a constant."""
    small = Small(axes, region)
    for atom in width:
        small.atoms.append(atom)
        small.sizes[id(atom)] = atom.size
    return small


def _laid(axes: Axes, small: Small, value: int, x: np.ndarray, rows: list[Atom], width: list[Atom]) -> np.ndarray:
    have, wanted = axes.all(value), [*rows, *width]
    place = {id(a): i for i, a in enumerate(have)}
    if set(place) != {id(a) for a in wanted}:
        raise Unsupported("its axes are not those of a norm")
    x = np.transpose(np.reshape(x, [small.size(a) for a in have]), [place[id(a)] for a in wanted])
    return np.reshape(x, [-1, int(np.prod([small.size(a) for a in width]))])


def _close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


def _definition(centered: bool, epsilon: float, x, scale, bias, g) -> dict[str, np.ndarray]:
    """Return the norm of rows and its gradients by their formulas."""
    y = x - x.mean(axis=1, keepdims=True) if centered else x
    inverse = 1 / np.sqrt((y * y).mean(axis=1, keepdims=True) + epsilon)
    y = y * inverse
    found = {"out": y * (1 if scale is None else scale) + (0 if bias is None else bias)}
    if g is None:
        return found
    h = g if scale is None else g * scale
    dx = h - y * (h * y).mean(axis=1, keepdims=True) - (h.mean(axis=1, keepdims=True) if centered else 0)
    found["x"] = dx * inverse
    found |= {} if scale is None else {"scale": (g * y).sum(axis=0)}
    return found | ({} if bias is None else {"bias": g.sum(axis=0)})
