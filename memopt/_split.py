"""The stairwell: a long loop rewritten in two or more levels, for steps in which the loop's carries are the memory.

In: an inlined closed jaxpr and the place of a forward loop whose residuals later loops read. Out: an equivalent closed
jaxpr in which the forward loop keeps its carry at the start of each block of iterations alone, and each reading loop
first runs a block again, with its residuals, and then reads them. Exact: the same equations in the same order. It also
lists the variants of a step's loops that are worth planning; which one is taken is not decided here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from memopt import _compat as c
from memopt import _divide, _pairs, _rerun
from memopt._pairs import Loop, Pair

MOST_PAIRS = 2  # pairs of loops whose variants are offered, those with the most residual bytes
SHORTEST_SPLIT, SHORTEST_DEEP, SHORTEST_DIVIDE = 16, 64, 4  # lengths from which each kind of variant is offered


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to rewrite one pair of loops of a step.

    Attributes:
      kind: `"two_level"`, `"divide"`, or `"rerun"` for all inner loops of paired outer ones (`_rerun`; no numbers).
      index: path of the forward loop: `(equation, body, equation, ..., equation)`, one number at the top level.
      parameter: block length, or the iteration at which the loop is divided.
      levels: levels of loops of a `"two_level"`, else 1.
    """

    kind: str
    index: tuple[int, ...]
    parameter: int
    levels: int = 2


#: Inner loops run again in the outer loop's reading body.
RERUN = Variant("rerun", (), 0, 1)


def candidates(closed: Any) -> list[Variant]:
    """List the variants that are worth planning: blocks near the roots of the length, and divisions at its quarters.

    Args:
      closed: inlined closed jaxpr.

    Returns:
      A few variants of each of the pairs with the most residual bytes, for `apply_variant`.
    """
    found = sorted(_pairs.find_all(c.open_jaxpr(closed)), key=lambda item: -item[1].residual_bytes)[:MOST_PAIRS]
    out: list[Variant] = []
    for path, pair in found:
        if pair.length >= SHORTEST_SPLIT:
            out.append(Variant("two_level", path, _block(pair.length, 1 / 2), 2))
        if pair.length >= SHORTEST_DEEP:
            out.append(Variant("two_level", path, _block(pair.length, 2 / 3), 3))
        if pair.length >= SHORTEST_DIVIDE:
            places = dict.fromkeys(pair.length * k // 4 for k in (1, 2, 3))
            out.extend(Variant("divide", path, at, 1) for at in places)
    return out


def apply_variant(closed: Any, variant: Variant) -> Any | None:
    """Return the step with one of its pairs of loops rewritten, or None where that cannot be done exactly."""
    if variant.kind == "rerun":
        return _rerun.rerun(closed)
    if variant.kind == "divide":
        return _divide.divide(closed, variant.index, variant.parameter)
    return two_level(closed, variant.index, variant.parameter, levels=variant.levels)


def two_level(closed: Any, index: int | tuple[int, ...], block: int, *, levels: int = 2) -> Any | None:
    """Rewrite a pair of loops in blocks, so that the forward loop keeps one carry a block.

    Memory: in place of the residuals of L iterations, the carries of L/block block starts and the residuals of one
    block; with more levels the block is split again, down to about log2(L) carries. Cost: the forward loop runs once
    more for each level after the first, for each loop that reads its residuals.

    Args:
      closed: inlined closed jaxpr.
      index: place of the forward loop among the equations, or its path into bodies.
      block: iterations in a block. Where it does not divide the length, the loops are divided first (`divide`), and the
        iterations that are left over, fewer than a block, stay as they are.
      levels: levels of loops. Lengths below the first are divisors of the one above, at equal ratios as near as may be;
        there are fewer levels where no divisor is left.

    Returns:
      The rewritten closed jaxpr with the same inputs and outputs; None where there is no pair at this place, its
      bodies have effects, or the block is no real part of the loop.
    """
    return _pairs.rewrite(closed, index, lambda jaxpr, place: _region(jaxpr, place, _blocks(block, levels)))


def _region(jaxpr: Any, index: int, blocks: list[int]) -> Any | None:
    pair = _pairs.find(jaxpr, index)
    if pair is None or not 1 < blocks[0] < pair.length:
        return None
    rest = pair.length % blocks[0]
    if not rest:
        return _Blocks(jaxpr, pair, blocks).jaxpr()
    if pair.length < 2 * blocks[0]:
        return None  # one whole block: nothing to scan over
    divided = _divide.region(jaxpr, pair, pair.length - rest)
    return None if divided is None else _region(divided[0], divided[1], blocks)


class _Blocks:
    """One pair of loops while it is built anew; `blocks` are the lengths of the inner loops, from the outside in."""

    def __init__(self, jaxpr: Any, pair: Pair, blocks: list[int]):
        self.old = jaxpr
        self.pair = pair
        self.block, self.deeper = blocks[0], blocks[1:]
        self.trips = pair.length // self.block
        self.first = Loop(jaxpr.eqns[pair.index])
        self.eqns: list[Any] = []
        self.blocked: dict[Any, Any] = {}  # stack of the whole length -> the same in blocks
        self.starts: list[Any] = []  # the forward loop's carries at the starts of the blocks

    def jaxpr(self) -> Any:
        """Return the region with both loops in blocks."""
        for i, eqn in enumerate(self.old.eqns):
            if i == self.pair.index:
                self._forward()
            elif i in self.pair.readers:
                self._backward(Loop(eqn))
            else:
                self.eqns.append(eqn)
        return c.rebuild(self.old, eqns=self.eqns)

    def _forward(self) -> None:
        """Run the blocks without the residuals, and stack the carry that each one starts from."""
        loop, inside = self.first, _Inside(self.block)
        kept = [i for i in range(len(loop.ys)) if i not in self.pair.residuals]
        consts, starts, xs = inside.operands(loop)
        eqn = self._inner(loop, (consts, starts, xs), kept)
        body = c.rebuild(loop.body, invars=inside.invars(starts), outvars=[*eqn.outvars, *starts], eqns=[eqn])
        self.starts = [c.Var(c.stacked_aval(v.aval, self.trips)) for v in starts]
        self._outer(loop, body, inside, [loop.ys[i] for i in kept], self.starts)

    def _backward(self, loop: Loop) -> None:
        """Run each block again from its start, with its residuals, and then the reading loop over them."""
        first, inside = self.first, _Inside(self.block)
        wanted = [i for i in self.pair.residuals if any(first.ys[i] is v for v in loop.xs)]
        consts, starts, xs = inside.operands(first)
        again = self._inner(first, (consts, starts, xs), wanted)
        inside.made = dict(zip([first.ys[i] for i in wanted], again.outvars[first.num_carry :], strict=True))
        consts, carry, xs = inside.operands(loop)
        read = self._inner(loop, (consts, carry, xs), range(len(loop.ys)))
        inside.from_starts(starts, self.starts)
        body = c.rebuild(loop.body, invars=inside.invars(carry), outvars=read.outvars, eqns=[again, read])
        if self.deeper:
            body = _region(body, 0, self.deeper) or body
        self._outer(loop, body, inside, loop.ys, [])

    def _inner(self, loop: Loop, operands: Any, positions: Sequence[int]) -> Any:
        """Return a loop's equation over one block, with the stacks at some positions."""
        body = _pairs.fresh(loop.body)
        finals = body.outvars[: loop.num_carry]
        ys = [body.outvars[loop.num_carry + i] for i in positions]
        outvars = [c.Var(v.aval) for v in body.invars[loop.num_consts : loop.first_xs]]
        outvars += [c.Var(c.stacked_aval(v.aval, self.block)) for v in ys]
        return _pairs.scan_eqn(loop.eqn, c.rebuild(body, outvars=[*finals, *ys]), operands, outvars, self.block)

    def _outer(self, loop: Loop, body: Any, inside: _Inside, ys: list[Any], extra: list[Any]) -> None:
        """Emit the loop over the blocks, and give its stacks the whole length."""
        made = [v.aval for v in body.outvars[loop.num_carry :]]
        stacks = [c.Var(c.stacked_aval(aval, self.trips)) for aval in made[: len(ys)]]
        xs = [self._in_blocks(v, inner) for v, inner in inside.xs.items()]
        operands = (list(inside.consts), loop.init, xs + inside.outer_starts)
        eqn = _pairs.scan_eqn(loop.eqn, body, operands, [*loop.finals, *stacks, *extra], self.trips, unroll=1)
        self.eqns.append(eqn)
        for y, stack in zip(ys, stacks, strict=True):
            if not isinstance(y, c.DropVar):
                self.blocked[y] = stack
                self.eqns.append(_pairs.reshape(stack, y, loop.eqn))

    def _in_blocks(self, stack: Any, inner: Any) -> Any:
        """Return a stack of the whole length as one of blocks, each of which the outer loop's body reads as `inner`."""
        if stack not in self.blocked:
            self.blocked[stack] = c.Var(c.stacked_aval(inner.aval, self.trips))
            self.eqns.append(_pairs.reshape(stack, self.blocked[stack], self.first.eqn))
        return self.blocked[stack]


class _Inside:
    """The operands of an outer loop's body: each array outside comes in once, whichever inner loops read it."""

    def __init__(self, block: int):
        self.block = block
        self.consts: dict[Any, Any] = {}  # array outside -> variable inside
        self.xs: dict[Any, Any] = {}  # stack outside -> variable of one block of it inside
        self.made: dict[Any, Any] = {}  # stack outside -> the block of it that is made inside
        self.starts: list[Any] = []
        self.outer_starts: list[Any] = []

    def operands(self, loop: Loop) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the variables inside for a loop's constants, carries and slices; carries are new ones each time."""
        consts, carry, xs = loop.sorted(loop.body.invars)
        return (
            [v if isinstance(v, c.Literal) else self._once(self.consts, v, v.aval) for v in loop.consts],
            [c.Var(v.aval) for v in carry],
            [
                self.made.get(v) or self._once(self.xs, v, c.stacked_aval(inner.aval, self.block))
                for v, inner in zip(loop.xs, xs, strict=True)
            ],
        )

    def from_starts(self, starts: list[Any], outer: list[Any]) -> None:
        """Take the carries that a block starts from as slices of their stacks."""
        self.starts, self.outer_starts = starts, outer

    def invars(self, carry: list[Any]) -> list[Any]:
        """Return the body's inputs, in the order of a loop's operands."""
        return [*self.consts.values(), *carry, *self.xs.values(), *self.starts]

    @staticmethod
    def _once(table: dict[Any, Any], outside: Any, aval: Any) -> Any:
        if outside not in table:
            table[outside] = c.Var(aval)
        return table[outside]


def _blocks(block: int, levels: int) -> list[int]:
    """Return the lengths of the inner loops: the first, then divisors, each near the next lower root of the first."""
    blocks, inner = [block], levels - 1
    for left in range(inner - 1, 0, -1):
        ideal = block ** (left / inner)
        divisors = [d for d in range(2, blocks[-1]) if blocks[-1] % d == 0]
        if not divisors:
            break
        blocks.append(min(divisors, key=lambda d: abs(math.log(d / ideal))))
    return blocks


def _block(length: int, power: float) -> int:
    """Return a block length near a power of the loop's, a divisor of it where one is near."""
    ideal = length**power
    divisors = [d for d in range(2, length) if length % d == 0 and ideal / 2 <= d <= ideal * 2]
    return min(divisors, key=lambda d: abs(math.log(d / ideal)), default=round(ideal))
