"""A region of a step on small shapes: which axes are the same axis, and the region's values in numpy.

In: the equations of a region and its input values. Out: for every value the atoms that its axes are made of (an axis
that a reshape cuts in two is two atoms), small sizes for them, and the region evaluated in float64 on random inputs of
those sizes. Only primitives listed here can be in a region; any other is named in `Unsupported`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from memopt import _compat as c
from memopt.passes._match import Node, Space


class Unsupported(Exception):
    """Why a region cannot be looked at, as a clause that completes a sentence."""


@dataclasses.dataclass(eq=False)
class Atom:
    """A piece of an axis that is never cut further; `parts` after it was cut or found to be another one."""

    size: int
    parts: list[Atom] | None = None


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
            raise Unsupported("it reads something else than the operands of the pattern")
        wanted.add(id(node))
        stack.extend(v for v in node.ins if v is not None)
    return [node for node in space.nodes if id(node) in wanted]


def flat(atoms: Sequence[Atom]) -> list[Atom]:
    """Return the present atoms of a list that may hold ones cut or merged since."""
    found: list[Atom] = []
    for atom in atoms:
        found.extend([atom] if atom.parts is None else flat(atom.parts))
    return found


class Axes:
    """The atoms of each axis of each value of a region."""

    def __init__(self, space: Space, region: Sequence[Node], inputs: Sequence[int]):
        self.space = space
        self.known: dict[int, list[list[Atom]]] = {}
        for value in inputs:
            self.known[value] = self._new(space.avals[value].shape)
        for node in region:
            self._node(node)

    def of(self, value: int) -> list[list[Atom]]:
        """Return the present atoms of each axis of a value; an axis of size 1 has none."""
        return [flat(axis) for axis in self.known[value]]

    def all(self, value: int) -> list[Atom]:
        """Return the present atoms of a value, major to minor."""
        return [atom for axis in self.of(value) for atom in axis]

    def _new(self, shape: Sequence[int]) -> list[list[Atom]]:
        return [[] if size == 1 else [Atom(size)] for size in shape]

    def _node(self, node: Node) -> None:
        name, out = node.name, node.eqn.outvars[0].aval.shape
        ins = [None if v is None else self.known[v] for v in node.ins]
        if name in _ELEMENTWISE or entry_call(node.eqn) is not None:
            result = self._elementwise([x for x in ins if x], out)
        elif name in ("broadcast_in_dim", "iota"):
            result = self._new(out)
            where = node.eqn.params.get("broadcast_dimensions", ()) if name == "broadcast_in_dim" else ()
            for axis, at in zip(ins[0] if where else (), where, strict=True):
                if axis:
                    result[at] = axis
        elif name == "reshape":
            result = self._reshape([atom for axis in (ins[0] or []) for atom in flat(axis)], out)
        elif name == "squeeze":
            result = [axis for i, axis in enumerate(ins[0]) if i not in node.eqn.params["dimensions"]]
        elif name == "transpose":
            result = [ins[0][i] for i in node.eqn.params["permutation"]]
        elif name in _REDUCTIONS:
            result = [axis for i, axis in enumerate(ins[0]) if i not in node.eqn.params["axes"]]
        elif name == "dot_general":
            result = self._dot(node, ins)
        elif name in ("gather", "scatter-add"):
            result = _indexing(node.name)[0](node, ins)
        else:
            raise Unsupported(f"`{name}` is not among the operations that are understood there")
        self.known[node.outs[0]] = result

    def _elementwise(self, ins: list[list[list[Atom]]], out: Sequence[int]) -> list[list[Atom]]:
        result: list[list[Atom]] = [[] for _ in out]
        for axes in ins:
            for i, axis in enumerate(axes):
                if axis and result[i]:
                    _unify(axis, result[i])
                elif axis:
                    result[i] = axis
        return result

    def _dot(self, node: Node, ins) -> list[list[Atom]]:
        (left, right), (left_batch, right_batch) = node.eqn.params["dimension_numbers"]
        for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
            if ins[0][i]:
                _unify(ins[0][i], ins[1][j])
        free = [
            [axis for i, axis in enumerate(side) if i not in (*contract, *batch)]
            for side, contract, batch in ((ins[0], left, left_batch), (ins[1], right, right_batch))
        ]
        return [*(ins[0][i] for i in left_batch), *free[0], *free[1]]

    def _reshape(self, atoms: list[Atom], shape: Sequence[int]) -> list[list[Atom]]:
        result, queue = [], list(atoms)
        for size in shape:
            axis: list[Atom] = []
            while size > 1:
                atom = queue.pop(0)
                if size % atom.size:
                    if atom.size % size:
                        raise Unsupported("a reshape mixes axes")
                    head, rest = Atom(size), Atom(atom.size // size)
                    atom.parts = [head, rest]
                    queue.insert(0, rest)
                    atom = head
                axis.append(atom)
                size //= atom.size
            result.append(axis)
        return result


def _indexing(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (_gather_axes, _gather) if name == "gather" else (_scatter_axes, _scatter)


def _gather_axes(node: Node, ins) -> list[list[Atom]]:
    """Axes of one entry picked along one axis: for each position of the others, or the same one for all of them."""
    numbers = node.eqn.params["dimension_numbers"]
    if len(numbers.collapsed_slice_dims) != 1 or ins[0] is None:
        raise Unsupported("entries are picked along more than one axis")
    rest = [i for i in range(len(ins[0])) if i not in numbers.collapsed_slice_dims]
    if len(ins[1]) == 1 and list(numbers.offset_dims) == list(range(len(rest))):
        return [ins[0][i] for i in rest]
    _pair_batches(ins, numbers.operand_batching_dims, numbers.start_indices_batching_dims)
    if any(ins[0][i] for i in rest if i not in numbers.operand_batching_dims):
        raise Unsupported("entries are picked in a way that is not understood")
    result = list(ins[1][:-1])
    for at in numbers.offset_dims:  # axes of size 1, which JAX leaves out of the batch
        result.insert(at, [])
    return result


def _pair_batches(ins, first: Sequence[int], second: Sequence[int]) -> None:
    for i, j in zip(first, second, strict=True):
        if ins[0][i] and ins[1][j]:
            _unify(ins[0][i], ins[1][j])


def _gather(numbers, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    (at,) = numbers.collapsed_slice_dims
    if not numbers.operand_batching_dims and np.ndim(indices) == 1:
        return np.take(x, int(np.asarray(indices)[0]), axis=at)
    moved = _rows(x, at, numbers.operand_batching_dims)
    flat_indices = indices[..., 0].reshape(*moved.shape[:-1], -1)
    picked = np.take_along_axis(moved, flat_indices, axis=-1).reshape(indices.shape[:-1])
    return np.expand_dims(picked, tuple(numbers.offset_dims))


def _rows(x: np.ndarray, at: int, batches: Sequence[int]) -> np.ndarray:
    """Return an array with one axis last, after the batch axes; all others have size 1 and are dropped."""
    dropped = tuple(i for i in range(x.ndim) if i != at and i not in batches)
    return np.squeeze(np.moveaxis(x, at, -1), tuple(i - (i > at) for i in dropped))


def _scatter_axes(node: Node, ins) -> list[list[Atom]]:
    numbers = node.eqn.params["dimension_numbers"]
    if len(numbers.inserted_window_dims) != 1 or ins[0] is None:
        raise Unsupported("entries are added along more than one axis")
    _pair_batches(ins, numbers.operand_batching_dims, numbers.scatter_indices_batching_dims)
    (at,) = numbers.inserted_window_dims
    added = list(ins[2] or ())
    if len(ins[1]) == 1:
        places = [axis for i, axis in enumerate(ins[0]) if i != at]
    else:
        if any(axis for i, axis in enumerate(ins[0]) if i != at and i not in numbers.operand_batching_dims):
            raise Unsupported("entries are added in a way that is not understood")
        places = ins[1][:-1]
        added = [axis for i, axis in enumerate(added) if i not in numbers.update_window_dims]
    for one, place in zip(added, places, strict=False):
        if one and place:
            _unify(one, place)
    return list(ins[0])


def _scatter(numbers, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    (at,) = numbers.inserted_window_dims
    if not numbers.operand_batching_dims and np.ndim(indices) == 1:
        out = np.moveaxis(np.array(x), at, 0)
        out[int(np.asarray(indices)[0])] += updates
        return np.moveaxis(out, 0, at)
    whole = np.array(x)
    out = _rows(whole, at, numbers.operand_batching_dims)  # a view
    flat_indices = indices[..., 0].reshape(*out.shape[:-1], -1)
    if np.ndim(updates) == len(numbers.update_window_dims) + indices.ndim - 1:
        updates = np.squeeze(updates, tuple(numbers.update_window_dims))
    flat_updates = np.broadcast_to(updates, indices.shape[:-1]).reshape(flat_indices.shape)
    lead = np.indices(flat_indices.shape)[:-1]
    np.add.at(out, (*lead, flat_indices), flat_updates)
    return whole


def _unify(first: list[Atom], second: list[Atom]) -> None:
    """Make two axes the same one, cutting atoms where one of them is made of more."""
    a, b = flat(first), flat(second)
    while a and b:
        x, y = a.pop(0), b.pop(0)
        if x is y:
            continue
        if x.size == y.size:
            y.parts = [x]
        elif x.size > y.size and x.size % y.size == 0:
            rest = Atom(x.size // y.size)
            x.parts = [y, rest]
            a.insert(0, rest)
        elif y.size % x.size == 0:
            rest = Atom(y.size // x.size)
            y.parts = [x, rest]
            b.insert(0, rest)
        else:
            raise Unsupported("two axes are cut in ways that do not fit together")


class Small:
    """A region evaluated in float64 on small random inputs."""

    def __init__(self, axes: Axes, region: Sequence[Node], seed: int = 0):
        self.axes, self.region = axes, region
        self.random = np.random.default_rng(seed)
        self.sizes: dict[int, int] = {}
        self.atoms: list[Atom] = []

    def size(self, atom: Atom) -> int:
        """Return the small size of an atom: 2 to 5, different ones in turn."""
        if id(atom) not in self.sizes:
            self.atoms.append(atom)  # keeps the id its own
            self.sizes[id(atom)] = min(atom.size, (3, 4, 2, 5)[len(self.sizes) % 4])
        return self.sizes[id(atom)]

    def shape(self, value: int) -> tuple[int, ...]:
        """Return the small shape of a value."""
        return tuple(math.prod(self.size(a) for a in axis) for axis in self.axes.of(value))

    def random_input(self, value: int) -> np.ndarray:
        """Return random numbers, or random truth values for a mask, in the small shape of an input."""
        dtype = self.axes.space.avals[value].dtype
        if dtype == np.bool_:
            return self.random.random(self.shape(value)) < 0.7
        if np.issubdtype(dtype, np.integer):
            return self.random.integers(0, 2, self.shape(value))  # every axis has two entries at least
        return self.random.normal(size=self.shape(value))

    def run(self, inputs: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return all values of the region."""
        env: dict[int, Any] = dict(inputs)
        with np.errstate(all="ignore"):
            for node in self.region:
                operands = [
                    _value(v.val) if isinstance(v, c.Literal) else env[n]
                    for v, n in zip(node.eqn.invars, node.ins, strict=True)
                ]
                env[node.outs[0]] = self._apply(node, operands)
        return env

    def _apply(self, node: Node, operands: list[Any]) -> np.ndarray:
        name, params, out = node.name, node.eqn.params, self.shape(node.outs[0])
        if name == "broadcast_in_dim":
            shape = [1] * len(out)
            for at, size in zip(params["broadcast_dimensions"], np.shape(operands[0]), strict=True):
                shape[at] = size
            return np.broadcast_to(np.reshape(operands[0], shape), out)
        if name == "iota":
            line = np.arange(out[params["dimension"]])
            return np.broadcast_to(np.expand_dims(line, [i for i in range(len(out)) if i != params["dimension"]]), out)
        if name in ("reshape", "squeeze"):
            return np.reshape(operands[0], out)
        if name == "transpose":
            return np.transpose(operands[0], params["permutation"])
        if name == "integer_pow":
            return operands[0] ** float(params["y"])
        if name in _REDUCTIONS:
            return _REDUCTIONS[name](operands[0], axis=tuple(params["axes"]))
        if name in ("gather", "scatter-add"):
            return _indexing(name)[1](params["dimension_numbers"], *operands)
        if name == "dot_general":
            return _dot(params["dimension_numbers"], *operands)
        if name == "convert_element_type":
            whole = np.issubdtype(params["new_dtype"], np.integer)
            truth = params["new_dtype"] == np.bool_
            return np.asarray(operands[0]).astype(bool if truth else np.int64 if whole else np.float64)
        body = entry_call(node.eqn)
        return _entries(body, operands) if body is not None else _ELEMENTWISE[name](*operands)


def entry_call(eqn: Any) -> Any | None:
    """Return the body of a call with a derivative of its own (such as `jax.nn.relu`) that maps entry to entry."""
    if eqn.primitive.name != "custom_jvp_call" or len(eqn.outvars) != 1:
        return None
    body = c.open_jaxpr(eqn.params["call_jaxpr"])
    shape = eqn.outvars[0].aval.shape
    return body if all(v.aval.shape == shape for v in eqn.invars) and _is_entries(body, shape) else None


def _is_entries(body: Any, shape: Sequence[int]) -> bool:
    for eqn in body.eqns:
        if len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape != shape:
            return False
        inner = [c.open_jaxpr(b) for _, _, b in c.subjaxprs(eqn.params)]
        if not (all(_is_entries(b, shape) for b in inner) if inner else eqn.primitive.name in _ELEMENTWISE):
            return False
    return not body.constvars


def _entries(body: Any, operands: Sequence[Any]) -> Any:
    env = dict(zip(body.invars, operands, strict=True))

    def read(var: Any) -> Any:
        return _value(var.val) if isinstance(var, c.Literal) else env[var]

    for eqn in body.eqns:
        ins = [read(v) for v in eqn.invars]
        inner = [c.open_jaxpr(b) for _, _, b in c.subjaxprs(eqn.params)]
        if inner:
            env[eqn.outvars[0]] = _entries(inner[0], ins)
        elif eqn.primitive.name == "integer_pow":
            env[eqn.outvars[0]] = ins[0] ** float(eqn.params["y"])
        else:
            env[eqn.outvars[0]] = _ELEMENTWISE[eqn.primitive.name](*ins)
    return read(body.outvars[0])


def _value(literal: Any) -> Any:
    value = np.asarray(literal)
    if value.dtype == np.bool_ or np.issubdtype(value.dtype, np.integer):
        return value
    return value.astype(np.float64)


def _dot(numbers, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (left, right), (left_batch, right_batch) = numbers
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in range(a.ndim)]
    second = [""] * b.ndim
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        second[j] = first[i]
    second = [x or next(letters) for x in second]
    batch = [first[i] for i in left_batch]
    free = [x for i, x in enumerate(first) if i not in (*left, *left_batch)]
    free += [x for j, x in enumerate(second) if j not in (*right, *right_batch)]
    return np.einsum(f"{''.join(first)},{''.join(second)}->{''.join(batch + free)}", a, b)


def _select(which, *cases):
    return np.where(which, cases[1], cases[0])


def _same(x, *_):
    return x


_REDUCTIONS: dict[str, Callable[..., Any]] = {"reduce_max": np.max, "reduce_sum": np.sum}
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log1p": np.log1p,
    "abs": np.abs,
    "sign": np.sign,
    "tanh": np.tanh,
    "logistic": special.expit,
    "erf": special.erf,
    "erfc": special.erfc,
    "pow": np.power,
    "square": np.square,
    "one_minus_square": lambda x: 1 - np.square(x),
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "integer_pow": np.power,
    "is_finite": np.isfinite,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "select_n": _select,
    "convert_element_type": _same,
    "stop_gradient": _same,
    "name": _same,
    "copy": _same,
    "copy_p": _same,
    "optimization_barrier": _same,
    "reduce_precision": _same,
}
