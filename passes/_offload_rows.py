"""A fraction of the tokens: products of which some rows go to the host, while the backward pass makes the others again.

In: a flat step and a fraction. Out: an equal one in which the backward pass reads a large matrix product as its first
rows, which the forward pass hands on as a value of its own, and its other rows, made again there from the same rows of
what the product is made of. What element-wise operations and reductions make of such products is made again of them.
So the first rows are an ordinary value that may be sent away, and the others are never kept. Found on dataflow: which
operations treat rows alone is `_row_cuts`; a layer's input, and what cannot be cut into rows, is handed on whole.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp

from memopt import _compat as c
from memopt import _cost, _pairs, _scopes, _specs
from memopt._contract import Context, Left, Rewritten
from memopt._plan import Decision
from memopt.passes import _row_parts

#: What `memopt._scopes.mark_of` says of first rows.
MARK = "rows"
#: Fractions end at so many rows, where there are many: parts of tiles would be padded.
GRAIN = 16


@dataclasses.dataclass(frozen=True)
class Rows:
    """Let first rows of products be values of the step, and the backward pass make the other rows again.

    Args:
      fraction: the part of the rows that the forward pass hands on, or `"auto"`.
      where: patterns on module paths of the products; empty for all.
      least_bytes: smaller products stay as they are.
    """

    fraction: float | str
    where: tuple[str, ...] = ()
    least_bytes: int = 1 << 20
    stage: ClassVar[int] = 46
    optional: ClassVar[bool] = True

    def is_wanted(self, eqn: Any, around: Any = None) -> bool:
        """Say whether a product is large enough, and made in a module that the patterns name."""
        if _bytes(eqn.outvars[0]) < self.least_bytes:
            return False
        stack = c.name_stack(eqn) if around is None else c.name_stack(around) + c.name_stack(eqn)
        path = _scopes.module_path(str(stack))
        return not self.where or any(_scopes.match_path(p, path) for p in self.where)

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "offload-rows"

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with its products cut into rows; None where there is none to cut."""
        base, rows, left = c.open_jaxpr(closed), [], []
        paired = [pair for i in range(len(base.eqns)) if (pair := _pairs.find(base, i)) and len(pair.readers) == 1]
        for pair in paired:
            cut = functools.partial(_InLoops, self, base, pair)
            base = self._built(base, cut, context, rows, left)
        if not paired:
            base = self._built(base, functools.partial(_AtOneLevel, self, base), context, rows, left)
        if not rows and not left:
            left.append(Left("Every product", "none is cut into rows that the backward pass could make again"))
        if not rows:
            return Rewritten(closed, left=tuple(left))
        return Rewritten(c.close(base, c.jaxpr_consts(closed)), tuple(rows), tuple(left))

    def _built(self, base: Any, make: Any, context: Context, rows: list[Decision], left: list[Left]) -> Any:
        """Return a level with the products of a pair of loops, or of the level itself, cut into rows."""
        trial = make(count=None)
        length, products = trial.forward.length, sum(map(_bytes, trial.heads))
        if not products:
            return base
        fraction = self.fraction
        if fraction == "auto":
            fraction = _hidden(trial, products, _specs.spec_for(context.target))
        count = _count(fraction, length, least=0 if self.fraction == "auto" else 1)
        if count in (0, length):
            what = "no row" if count == 0 else "every row"
            why = f"{what} of them would be hidden, as the link sends {fraction:.3f} of them while a layer is computed"
            left.append(Left("Every large product", why))
            return base
        found = make(count=count)
        first = next(iter(found.heads))
        axis, source = found.forward.axis[first], c.user_source(found.forward.maker[first])
        size = products * trial.trips
        away = f"{count} of {length} rows (axis {axis}) may go to the host; the backward pass makes the others again"
        name = f"offload/rows.{len(rows)}"
        rows.append(
            Decision(name, "", source, size, f"{count / length:.3f} of rows", f"of {len(trial.heads)} products {away}")
        )
        return found.level()


def _bytes(var: Any) -> int:
    return _cost.aval_bytes(var.aval)


def _count(fraction: float, length: int, least: int) -> int:
    grain = GRAIN if length >= 4 * GRAIN else 1
    return min(length, max(least, round(fraction * length / grain) * grain if fraction else 0, 0))


def _hidden(trial: Any, products: int, spec: Any) -> float:
    """Return the fraction of the rows that the link to the host takes while the forward pass of a layer runs.

    What is handed on whole goes first, as in MEMO: there a layer's input and attention's result.
    """
    seconds = sum(_cost.eqn_seconds(eqn, spec) for eqn in trial.forward_eqns)
    whole = sum(_bytes(v) for v in trial.whole())
    return min(1.0, max(0.0, (seconds * spec.host_bytes_per_second - whole) / products))


class _InLoops(_row_parts.Backward):
    """Products of a forward loop's body, read in the body of the backward loop.

    Args:
      settings: the pass.
      base: the level that holds both loops, open.
      pair: their places.
      count: how many rows the forward loop hands on; None for half of them, to see what can be cut.
    """

    def __init__(self, settings: Rows, base: Any, pair: _pairs.Pair, *, count: int | None):
        self.base, self.pair = base, pair
        self.first, self.second = (_pairs.Loop(base.eqns[i]) for i in (pair.index, pair.readers[0]))
        self.trips = self.first.length
        consts, carry, xs = self.first.sorted(self.first.body.invars)
        self.given = dict(zip((*consts, *xs), (*self.first.consts, *self.first.xs), strict=True))
        self.forward_eqns = self.first.body.eqns
        seeds = [v for v in carry if len(v.aval.shape) > 1 and jnp.issubdtype(v.aval.dtype, jnp.floating)]
        wanted = functools.partial(settings.is_wanted, around=self.first.eqn)
        forward = _row_parts.Forward(self.forward_eqns, max(seeds, key=_bytes, default=None), self.given, wanted)
        super().__init__(forward, forward.length // 2 if count is None else count)
        self.new_consts: list[tuple[Any, Any]] = []  # variable of the body, operand
        self.new_xs: list[tuple[Any, Any]] = []
        self.new_ys: list[tuple[Any, Any]] = []  # variable of the first body, result
        outs = dict(zip(self.first.eqn.outvars, self.first.body.outvars, strict=True))
        self.ys = {v: outs[v] for v in self.first.ys if not isinstance(outs[v], c.Literal)}
        inner = self.second.sorted(self.second.body.invars)
        self.held = {  # what the backward body holds of the outside already
            **{
                (False, v): w for v, w in zip(self.second.consts, inner[0], strict=True) if not isinstance(v, c.Literal)
            },
            **{(True, v): w for v, w in zip(self.second.xs, inner[2], strict=True) if not isinstance(v, c.Literal)},
        }
        self.mapped = {w: self.ys[v] for (sliced, v), w in self.held.items() if sliced and v in self.ys}
        self.handed.update((v, w) for w, v in self.mapped.items())
        self.read(self.second.body.eqns, self.mapped)

    def whole(self) -> list[Any]:
        """Return the values of the forward body that the backward one reads whole."""
        read = {v for eqn in self.eqns for v in eqn.invars if not isinstance(v, c.Literal)}
        parts = {head for head, _ in self.heads.values()}
        return [v for v, w in self.handed.items() if w in read and v not in self.given and v not in parts]

    def hand(self, var: Any) -> Any:
        """Return what holds a forward value in the backward body: an operand of both loops, or a new stack."""
        if var not in self.given:
            return self._stacked(var)
        outer = self.given[var]
        if isinstance(outer, c.Literal):
            return outer
        sliced = outer.aval.shape != var.aval.shape
        if (sliced, outer) not in self.held:
            self.held[sliced, outer] = c.Var(var.aval)
            (self.new_xs if sliced else self.new_consts).append((self.held[sliced, outer], outer))
        return self.held[sliced, outer]

    def hand_head(self, var: Any) -> Any:
        """Return what holds first rows in the backward body."""
        if var not in self.handed:
            self.handed[var] = self._stacked(var)
        return self.handed[var]

    def _stacked(self, var: Any) -> Any:
        stack, inner = c.Var(c.stacked_aval(var.aval, self.trips)), c.Var(var.aval)
        self.new_ys.append((var, stack))
        self.new_xs.append((inner, stack))
        return inner

    def level(self) -> Any:
        """Return the level with both loops built anew."""
        body, first = self.first.body, self.first
        outvars = [*body.outvars, *(v for v, _ in self.new_ys)]
        body = c.rebuild(body, eqns=self.with_heads(body.eqns), outvars=outvars)
        operands = (first.consts, first.init, first.xs)
        results = [*first.eqn.outvars, *(stack for _, stack in self.new_ys)]
        forward = _pairs.scan_eqn(first.eqn, body, operands, results, first.length)
        second = self.second
        consts, carry, xs = second.sorted(second.body.invars)
        invars = [*consts, *(v for v, _ in self.new_consts), *carry, *xs, *(v for v, _ in self.new_xs)]
        body = c.rebuild(second.body, invars=invars, eqns=self.eqns)
        operands = (
            [*second.consts, *(outer for _, outer in self.new_consts)], second.init,
            [*second.xs, *(outer for _, outer in self.new_xs)],
        )  # fmt: skip
        backward = _pairs.scan_eqn(second.eqn, body, operands, second.eqn.outvars, second.length)
        eqns = list(self.base.eqns)
        eqns[self.pair.index], eqns[self.pair.readers[0]] = forward, backward
        return c.rebuild(self.base, eqns=eqns)


class _AtOneLevel(_row_parts.Backward):
    """Products of the forward pass that the backward pass reads at the same level.

    Args:
      settings: the pass.
      base: the level, open.
      count: as in `_InLoops`.
    """

    trips = 1

    def __init__(self, settings: Rows, base: Any, *, count: int | None):
        self.base, self.tie = base, None
        self.forward_eqns = [eqn for eqn in base.eqns if not _is_backward(eqn)]
        forward = _row_parts.Forward(self.forward_eqns, None, base.invars, settings.is_wanted)
        super().__init__(forward, forward.length // 2 if count is None else count)
        self.gradients = {v for eqn in base.eqns if _is_backward(eqn) for v in eqn.outvars if c.guardable(v)}
        every = {v: v for v in (*forward.products, *forward.derived)}
        for eqn in base.eqns:
            if _is_backward(eqn):
                self.read([eqn], every)
            else:
                self.eqns.append(eqn)

    def whole(self) -> list[Any]:
        """Return the values of the forward pass that stand behind barriers."""
        return [v for v, w in self.handed.items() if v is not w]

    def before(self, eqn: Any) -> None:
        """Note the gradient that is there when an equation reads what is made again."""
        self.tie = next((v for v in eqn.invars if not isinstance(v, c.Literal) and v in self.gradients), self.tie)

    def hand(self, var: Any) -> Any:
        """Return a forward value behind a barrier with a gradient: XLA would make rows again at once without it."""
        if var in self.forward.constants or self.tie is None or not c.guardable(var):
            return var
        eqn, (guarded, _) = c.barrier_eqn([var, self.tie], self.like)
        self.eqns.append(eqn)
        return guarded

    def placed(self, eqn: Any) -> Any:
        """Return an equation with the name stack of what reads its result: it is of the backward pass."""
        return c.with_source(eqn, self.like.source_info)

    def level(self) -> Any:
        """Return the level with what is made again in its place."""
        return c.rebuild(self.base, eqns=self.with_heads(self.eqns))


def _is_backward(eqn: Any) -> bool:
    return c.is_transposed(c.transforms(eqn))
