"""The range finder: what is known of values from how they are made, without running anything.

In: a graph. Out: for values whose dataflow says so, a `Known`: the interval that integers lie in, or the few numbers
that a value can be at all (a mask times a constant, a gradient of `max`). What it cannot prove it does not claim.

Interval arithmetic on integers is done in Python's integers; a result that leaves its type, and so could wrap, is
unknown. Sets of numbers are computed in the value's own type by the operation itself, by running it on them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _graph as g

MOST = 4  # numbers in a set: two bits
DEEPEST = 200  # operations in a row that are looked through


@dataclasses.dataclass(frozen=True)
class Known:
    """What a value can be.

    Attributes:
      low: smallest integer (None where no interval is known).
      high: largest integer.
      numbers: all that it can be, in ascending order, of its own dtype; None where they are too many or not known.
    """

    low: int | None = None
    high: int | None = None
    numbers: tuple[Any, ...] | None = None


_SAME = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose slice rev copy name".split())
_POINTWISE = frozenset("mul add sub div neg max min select_n convert_element_type and or not xor".split())


class Bounds:
    """What is known of a graph's values, found where it is asked for.

    Args:
      graph: the step.
    """

    def __init__(self, graph: g.Graph):
        self.graph = graph
        self.known: dict[int, Known | None] = {}

    def of(self, value: int, depth: int = 0) -> Known | None:
        """Return what is known of a value; nothing that is made by more than `DEEPEST` operations in a row is."""
        if value not in self.known:
            if depth > DEEPEST:
                return None
            op = self.graph.values[value].op
            self.known[value] = None if op is None or len(op.outputs) != 1 else self._of(op, depth)
        return self.known[value]

    def _of(self, op: g.Op, depth: int) -> Known | None:
        name, aval = op.eqn.primitive.name, op.eqn.outvars[0].aval
        if not c.guardable(op.eqn.outvars[0]):
            return None
        if name in _SAME:
            return self._input(op, 0, depth)
        if aval.dtype == np.bool_:  # asked so, for a typed key has no NumPy dtype
            return None
        few = self._few(op, depth) if name in _POINTWISE else None
        if few is not None:
            return few
        if name in _INTERVALS and jax.numpy.issubdtype(aval.dtype, jax.numpy.integer):
            return _interval(op, name, [self._input(op, i, depth) for i in range(len(op.inputs))])
        return None

    def _input(self, op: g.Op, i: int, depth: int) -> Known | None:
        value = op.inputs[i]
        return _of_literal(op.eqn.invars[i]) if value is None else self.of(value, depth + 1)

    def _few(self, op: g.Op, depth: int) -> Known | None:
        """Return all numbers that a pointwise operation can give, by running it on those of its operands.

        What was made last is asked first: where that can be anything the rest need not be known.
        """
        sets: list[list[np.ndarray]] = [[] for _ in op.inputs]
        for i in sorted(range(len(op.inputs)), key=lambda i: -1 if op.inputs[i] is None else -op.inputs[i]):
            atom = op.eqn.invars[i]
            dtype = np.dtype(atom.aval.dtype)
            if dtype == np.bool_ or (i == 0 and op.eqn.primitive.name == "select_n"):
                which = range(2) if dtype == np.bool_ else range(len(op.eqn.invars) - 1)
                sets[i] = [np.array(n, dtype) for n in which]
                continue
            known = self._input(op, i, depth)
            if known is None or known.numbers is None:
                return None
            sets[i] = [np.asarray(n, dtype) for n in known.numbers]
        results = [_run(op.eqn, numbers) for numbers in itertools.product(*sets)]
        return _few_of(results, op.eqn.outvars[0].aval.dtype)


def _of_literal(atom: Any) -> Known | None:
    value = np.asarray(atom.val).astype(atom.aval.dtype)
    if value.size != 1:
        return None
    return _few_of([value.reshape(())], atom.aval.dtype)


def _few_of(results: list[np.ndarray], dtype: Any) -> Known | None:
    distinct: dict[bytes, np.ndarray] = {one.tobytes(): one for one in results}
    if len(distinct) > MOST or not all(np.isfinite(one.astype(np.float64)) for one in distinct.values()):
        return None
    numbers = tuple(sorted(distinct.values(), key=lambda one: (one.astype(np.float64), one.tobytes())))
    if jax.numpy.issubdtype(dtype, jax.numpy.integer):
        return Known(int(numbers[0]), int(numbers[-1]), numbers)
    return Known(numbers=numbers)


def _run(eqn: Any, numbers: tuple[np.ndarray, ...]) -> np.ndarray:
    """Run an operation on single numbers."""
    params = {k: v for k, v in eqn.params.items() if k != "sharding"}
    if "sharding" in eqn.params:
        params["sharding"] = None
    with jax.ensure_compile_time_eval():
        return np.asarray(eqn.primitive.bind(*[jax.numpy.asarray(n) for n in numbers], **params))


def _interval(op: g.Op, name: str, inputs: list[Known | None]) -> Known | None:
    rule = _INTERVALS.get(name)
    found = None if rule is None else rule(op.eqn, inputs)
    if found is None:
        return None
    info = np.iinfo(op.eqn.outvars[0].aval.dtype)
    return Known(*found) if info.min <= found[0] <= found[1] <= info.max else None


def _needs_all(rule: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int] | None]:
    def guarded(eqn: Any, inputs: list[Known | None]) -> tuple[int, int] | None:
        if any(known is None or known.low is None for known in inputs):
            return None
        return rule(eqn, [(known.low, known.high) for known in inputs])

    return guarded


def _axis_length(eqn: Any, inputs: Any) -> tuple[int, int]:
    shape = eqn.invars[0].aval.shape
    return 0, max(0, int(np.prod([shape[a] for a in eqn.params["axes"]])) - 1)


def _iota(eqn: Any, inputs: Any) -> tuple[int, int]:
    return 0, max(0, eqn.params["shape"][eqn.params["dimension"]] - 1)


def _converted(eqn: Any, inputs: list[Known | None]) -> tuple[int, int] | None:
    if np.dtype(eqn.invars[0].aval.dtype) == np.bool_:
        return 0, 1
    known = inputs[0]
    return None if known is None or known.low is None else (known.low, known.high)


def _remainder(eqn: Any, inputs: list[Known | None]) -> tuple[int, int] | None:
    divisor = inputs[1]
    if divisor is None or divisor.low is None or divisor.low <= 0:
        return None
    positive = inputs[0] is not None and inputs[0].low is not None and inputs[0].low >= 0
    return 0 if positive else 1 - divisor.high, divisor.high - 1


def _union(eqn: Any, inputs: list[tuple[int, int]]) -> tuple[int, int]:
    return min(low for low, _ in inputs), max(high for _, high in inputs)


def _selected(eqn: Any, inputs: list[Known | None]) -> tuple[int, int] | None:
    return _needs_all(_union)(eqn, inputs[1:])


def _masked(eqn: Any, inputs: list[Known | None]) -> tuple[int, int] | None:
    """A bitwise `and` with something that is not negative is between 0 and it."""
    tops = [known.high for known in inputs if known is not None and known.low is not None and known.low >= 0]
    return (0, min(tops)) if tops else None


def _operand(eqn: Any, inputs: list[Known | None]) -> tuple[int, int] | None:
    known = inputs[0]
    return None if known is None or known.low is None else (known.low, known.high)


_INTERVALS: dict[str, Callable[..., tuple[int, int] | None]] = {
    "iota": _iota,
    "argmax": _axis_length,
    "argmin": _axis_length,
    "convert_element_type": _converted,
    "rem": _remainder,
    "and": _masked,
    "select_n": _selected,
    "clamp": lambda eqn, inputs: _needs_all(_union)(eqn, [inputs[0], inputs[2]]),
    "concatenate": _needs_all(_union),
    "reduce_max": _operand,
    "reduce_min": _operand,
    "dynamic_slice": _operand,
    "add": _needs_all(lambda eqn, x: (x[0][0] + x[1][0], x[0][1] + x[1][1])),
    "sub": _needs_all(lambda eqn, x: (x[0][0] - x[1][1], x[0][1] - x[1][0])),
    "mul": _needs_all(lambda eqn, x: _corners(x, lambda a, b: a * b)),
    "max": _needs_all(lambda eqn, x: (max(x[0][0], x[1][0]), max(x[0][1], x[1][1]))),
    "min": _needs_all(lambda eqn, x: (min(x[0][0], x[1][0]), min(x[0][1], x[1][1]))),
}


def _corners(pairs: list[tuple[int, int]], how: Callable[[int, int], int]) -> tuple[int, int]:
    found = [how(a, b) for a in pairs[0] for b in pairs[1]]
    return min(found), max(found)
