"""Which columns a constant mask allows in each row, found without making the mask.

In: the operations that make a mask of positions. Out: for each row its first and last allowed column, and how many
there are. Squares of the mask are evaluated by interval arithmetic and cut in four where they are mixed, down to single
pairs: a band of any length takes a number of steps that grows with its length, not with its square. Exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memopt import _compat as c
from memopt.passes._match import Node

Range = tuple[Any, Any]  # the least and the largest value in each square
Roles = tuple[int | None, ...]  # for each axis of a value: 0 for rows, 1 for columns, None where its size is 1

#: So many mixed squares are looked at together before a mask is given up.
_MOST = 2**21


class Unknown(Exception):
    """An operation has no rule here, or too many squares are mixed."""


def row_extents(
    nodes: Sequence[Node], value: int, shape: Sequence[int], *, allows: bool = True, flip: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first allowed column, the last, and the number of allowed ones, for each row of a mask.

    Args:
        nodes: the operations that make it, of constants and positions alone.
        value: the mask.
        shape: its shape, with at most two sizes that are not 1: rows and columns.
        allows: which value of the mask allows a pair.
        flip: whether columns come before rows.

    Returns:
        Three int64 arrays of a length of rows; a row with no allowed column has `columns`, -1 and 0.

    Raises:
        Unknown: an operation has no rule, or the mask is no band.
    """
    makers = {node.outs[0]: node for node in nodes}
    long = [i for i, n in enumerate(shape) if n > 1]
    if len(long) != 2:
        raise Unknown("the mask is no matrix")
    first_role = 1 if flip else 0
    roles = tuple(first_role if i == long[0] else 1 - first_role if i == long[1] else None for i in range(len(shape)))
    sizes = shape[long[1 if flip else 0]], shape[long[0 if flip else 1]]
    first, last = np.full(sizes[0], sizes[1]), np.full(sizes[0], -1)
    count = np.zeros(sizes[0], np.int64)
    side = 1 << (max(sizes) - 1).bit_length()
    starts = np.zeros((1, 2), np.int64)
    while len(starts):
        ends = np.minimum(starts + side, sizes) - 1
        low, high = _Squares(makers, starts, ends).of(value, roles)
        low, high = np.broadcast_to(low, len(starts)), np.broadcast_to(high, len(starts))
        allowed = low == 1 if allows else high == 0
        _note(starts[allowed], ends[allowed], side, first, last, count)
        mixed = starts[low != high]
        side //= 2
        if len(mixed) and (side == 0 or len(mixed) * 4 > _MOST):
            raise Unknown("the mask is no band")
        starts = (mixed[:, None] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * side).reshape(-1, 2)
        starts = starts[(starts < sizes).all(axis=1)]
    return first, last, count


def _note(
    starts: np.ndarray, ends: np.ndarray, side: int, first: np.ndarray, last: np.ndarray, count: np.ndarray
) -> None:
    """Add squares in which all pairs are true."""
    rows = -(-len(first) // side)
    least, most, sums = np.full(rows, first.max(initial=0) + 1 + last.size), np.full(rows, -1), np.zeros(rows, np.int64)
    where = starts[:, 0] // side
    np.minimum.at(least, where, starts[:, 1])
    np.maximum.at(most, where, ends[:, 1])
    np.add.at(sums, where, ends[:, 1] - starts[:, 1] + 1)
    spread = np.arange(len(first)) // side
    np.minimum(first, least[spread], out=first)
    np.maximum(last, most[spread], out=last)
    count += sums[spread]


class _Squares:
    """Ranges of values over squares of positions, from `starts` to `ends`, both `[squares, 2]` and inclusive."""

    def __init__(self, makers: dict[int, Node], starts: np.ndarray, ends: np.ndarray):
        self.makers, self.starts, self.ends = makers, starts, ends
        self.known: dict[tuple[int, Roles], Range] = {}

    def of(self, value: int, roles: Roles) -> Range:
        """Return the range of a value whose axes are rows or columns."""
        if (value, roles) not in self.known:
            self.known[value, roles] = self._make(self.makers[value], roles)
        return self.known[value, roles]

    def _make(self, node: Node, roles: Roles) -> Range:
        name, params = node.name, node.eqn.params
        shapes = [v.aval.shape for v in node.eqn.invars]
        if name == "iota":
            role = roles[params["dimension"]]
            return (0, 0) if role is None else (self.starts[:, role], self.ends[:, role])
        if name == "broadcast_in_dim":
            return self._operand(node, 0, tuple(roles[d] for d in params["broadcast_dimensions"]))
        if name == "transpose":
            back = np.argsort(params["permutation"])
            return self._operand(node, 0, tuple(roles[i] for i in back))
        if name in ("reshape", "squeeze"):
            kept = iter([r for r, n in zip(roles, node.eqn.outvars[0].aval.shape, strict=True) if n > 1])
            if [n for n in shapes[0] if n > 1] != [n for n in node.eqn.outvars[0].aval.shape if n > 1]:
                raise Unknown("a reshape mixes axes")
            return self._operand(node, 0, tuple(next(kept) if n > 1 else None for n in shapes[0]))
        if name not in _RULES:
            raise Unknown(f"`{name}` has no rule")
        kind = node.eqn.outvars[0].aval.dtype.kind
        if name == "convert_element_type" and _narrows(node.eqn):
            raise Unknown("a cast loses positions")
        if (name in ("and", "or", "not") and kind != "b") or (name in ("sub", "neg") and kind == "u"):
            raise Unknown(f"`{name}` of numbers of this kind has no rule")
        return _RULES[name](*(self._operand(node, i, roles if shape else ()) for i, shape in enumerate(shapes)))

    def _operand(self, node: Node, position: int, roles: Roles) -> Range:
        operand, shape = node.eqn.invars[position], node.eqn.invars[position].aval.shape
        if isinstance(operand, c.Literal):
            return operand.val, operand.val
        return self.of(node.ins[position], tuple(r if n > 1 else None for r, n in zip(roles, shape, strict=True)))


def _narrows(eqn: Any) -> bool:
    """Say whether a cast may change a position."""
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return after != np.bool_ and before != np.bool_ and (after.itemsize < 4 or after.kind not in "iuf")


def _order(always: Callable, never: Callable) -> Callable[[Range, Range], Range]:
    return lambda a, b: (np.where(always(a, b), 1, 0), np.where(never(a, b), 0, 1))


def _times(a: Range, b: Range) -> Range:
    products = [np.multiply(x, y) for x in a for y in b]
    return np.minimum.reduce(np.broadcast_arrays(*products)), np.maximum.reduce(np.broadcast_arrays(*products))


def _flag(x: Any) -> Any:
    return np.asarray(x).astype(np.int64)


_lt = _order(lambda a, b: np.less(a[1], b[0]), lambda a, b: np.greater_equal(a[0], b[1]))
_le = _order(lambda a, b: np.less_equal(a[1], b[0]), lambda a, b: np.greater(a[0], b[1]))
_eq = _order(
    lambda a, b: np.equal(a[0], a[1]) & np.equal(b[0], b[1]) & np.equal(a[0], b[0]),
    lambda a, b: np.less(a[1], b[0]) | np.less(b[1], a[0]),
)


def _not(a: Range) -> Range:
    return 1 - _flag(a[1]), 1 - _flag(a[0])


def _select(which: Range, *cases: Range) -> Range:
    """Take the second case where all is true, the first where nothing is, and what holds both elsewhere."""
    if len(cases) != 2:
        raise Unknown("a choice between more than two cases has no rule")
    (low_0, high_0), (low_1, high_1) = ((_flag(x) if np.asarray(x).dtype == bool else x for x in one) for one in cases)
    all_true, none = np.equal(which[0], 1), np.equal(which[1], 0)
    low = np.where(all_true, low_1, np.where(none, low_0, np.minimum(low_0, low_1)))
    return low, np.where(all_true, high_1, np.where(none, high_0, np.maximum(high_0, high_1)))


_RULES: dict[str, Callable[..., Range]] = {
    "lt": _lt,
    "le": _le,
    "gt": lambda a, b: _lt(b, a),
    "ge": lambda a, b: _le(b, a),
    "eq": _eq,
    "ne": lambda a, b: _not(_eq(a, b)),
    "and": lambda a, b: (np.minimum(_flag(a[0]), _flag(b[0])), np.minimum(_flag(a[1]), _flag(b[1]))),
    "or": lambda a, b: (np.maximum(_flag(a[0]), _flag(b[0])), np.maximum(_flag(a[1]), _flag(b[1]))),
    "not": _not,
    "add": lambda a, b: (np.add(a[0], b[0]), np.add(a[1], b[1])),
    "sub": lambda a, b: (np.subtract(a[0], b[1]), np.subtract(a[1], b[0])),
    "mul": _times,
    "neg": lambda a: (np.negative(a[1]), np.negative(a[0])),
    "max": lambda a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
    "min": lambda a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    "select_n": _select,
    "convert_element_type": lambda a: a,
    "copy": lambda a: a,
    "stop_gradient": lambda a: a,
}
