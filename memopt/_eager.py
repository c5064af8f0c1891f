"""The early riser: what is known before a backward loop is finished before it.

In: a flat closed jaxpr. Out: an equal one, in which each loop that reads another loop's results starts behind a barrier
with the step's results that it has no part in (a head's update; a loss that is made of logits), and with matmuls whose
result is smaller than the operands that die with it. XLA's scheduler may otherwise run such a matmul after the loop,
fused with its update, and hold its operands (the gradient of the logits, two matrices of tokens times vocabulary) until
then, or the logits for one gather that only the loss reads (Llama 1B: 501 MiB through the whole backward loop). It
changes no value, repeats nothing, moves no effect, and looks at the top level alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memopt import _compat as c
from memopt._cost import aval_bytes

LEAST_BYTES = 1 << 20  # results smaller than this wait for nobody
_LOOPS = frozenset({"scan", "while"})
_MATMULS = frozenset({"dot_general", "conv_general_dilated"})
_VIEWS = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "convert_element_type"})


def eager(closed: Any) -> Any:
    """Return an equal closed jaxpr in which early results are tied to the start of the loop after them."""
    jaxpr = c.open_jaxpr(closed)
    order = _Order(jaxpr)
    for loop in [e for e in jaxpr.eqns if e.primitive.name in _LOOPS and e.outvars]:
        order.finish_before(loop)
    if not order.changed:
        return closed
    return c.close(c.rebuild(jaxpr, eqns=order.eqns, outvars=order.outvars), c.jaxpr_consts(closed))


class _Order:
    """The equations of a step, and who makes and who reads each value."""

    def __init__(self, jaxpr: Any):
        self.eqns, self.outvars = list(jaxpr.eqns), list(jaxpr.outvars)
        self.changed = False
        self._index()

    def _index(self) -> None:
        self.maker = {v: i for i, eqn in enumerate(self.eqns) for v in eqn.outvars}
        self.readers: dict[Any, list[int]] = {}
        for i, eqn in enumerate(self.eqns):
            for v in _variables(eqn.invars):
                self.readers.setdefault(v, []).append(i)
        self.results = set(_variables(self.outvars))

    def finish_before(self, loop: Any) -> None:
        """Put what can be finished before this loop behind one barrier with it."""
        at = next(i for i, eqn in enumerate(self.eqns) if eqn.outvars == loop.outvars)
        before = self._ancestors(self.eqns[at].invars)
        carry = self._carry(at)
        if carry is None or not any(self.eqns[i].primitive.name in _LOOPS for i in before):
            return
        after = self._descendants(at)
        early = [v for v in dict.fromkeys(_variables(self.outvars)) if self._is_early(v, before, after)]
        early = [v for v in early if not any(self.eqns[i].effects for i in self._ancestors([v]) - before)]
        moved = self._ancestors(early) - before
        late: set[int] = set()
        for i in sorted(set(range(at)) - before - moved):
            found = self._small(i, at, moved)
            if found is not None:
                early.append(found[0])
                late |= found[1]
        if early:
            self._tie(at, carry, list(dict.fromkeys(early)), moved, late)

    def _carry(self, at: int) -> Any | None:
        """Return a value that the loop starts from and that an equation makes."""
        eqn = self.eqns[at]
        consts, carried = c.scan_layout(eqn) if eqn.primitive.name == "scan" else (0, len(eqn.invars))
        found = [v for v in _variables(eqn.invars[consts : consts + carried]) if v in self.maker and c.guardable(v)]
        return max(found, key=lambda v: aval_bytes(v.aval), default=None)

    def _is_early(self, v: Any, before: set[int], after: set[int]) -> bool:
        made = self.maker.get(v)
        if made is None or made in before or made in after:
            return False
        return c.guardable(v) and (aval_bytes(v.aval) >= LEAST_BYTES or self._ends_large(v, before))

    def _ends_large(self, v: Any, before: set[int]) -> bool:
        """Whether a small result, a loss, is made of something large that the loop does not need."""
        read = (x for i in self._ancestors([v]) - before for x in _variables(self.eqns[i].invars))
        return any(x in self.maker and aval_bytes(x.aval) >= LEAST_BYTES for x in read)

    def _small(self, i: int, at: int, moved: set[int]) -> tuple[Any, set[int]] | None:
        """Return a matmul's result that dies after the loop and is smaller than what dies with the matmul.

        With it come the casts and views of it before the loop, which are then better made after it.
        """
        views: list[int] = []
        readers = self.readers.get(self.eqns[i].outvars[0], ()) if self.eqns[i].outvars else ()
        if not readers or min(readers) < at or any(r in moved for r in readers):
            return None
        while self.eqns[i].primitive.name in _VIEWS and self.eqns[i].invars[0] in self.maker:
            views.append(i)
            source = self.eqns[i].invars[0]
            if len(self.readers[source]) > 1:
                return None
            i = self.maker[source]
        matmul = self.eqns[i]
        if matmul.primitive.name not in _MATMULS or matmul.effects or matmul.outvars[0] in self.results:
            return None
        result = matmul.outvars[0]
        dying = sum(aval_bytes(v.aval) for v in set(_variables(matmul.invars)) if self._dies_in(v, i, at))
        if not c.guardable(result) or not dying > aval_bytes(result.aval) >= LEAST_BYTES:
            return None
        return result, set(views)

    def _dies_in(self, v: Any, i: int, at: int) -> bool:
        return v in self.maker and v not in self.results and all(r == i or r < at for r in self.readers[v])

    def _tie(self, at: int, carry: Any, early: list[Any], moved: set[int], late: set[int]) -> None:
        barrier, fresh = c.barrier_eqn([carry, *early], self.eqns[at])
        renamed = dict(zip(early, fresh[1:], strict=True))
        head = [self.eqns[i] for i in range(len(self.eqns)) if i in moved or i < at and i not in late]
        loop = _reading(self.eqns[at], renamed | {carry: fresh[0]})
        after = [*sorted(late), *(i for i in range(at + 1, len(self.eqns)) if i not in moved)]
        rest = [_reading(self.eqns[i], renamed) for i in after]
        self.eqns = [*head, barrier, loop, *rest]
        self.outvars = [v if isinstance(v, c.Literal) else renamed.get(v, v) for v in self.outvars]
        self.changed = True
        self._index()

    def _ancestors(self, roots: Iterable[Any]) -> set[int]:
        found: set[int] = set()
        todo = _variables(roots)
        while todo:
            i = self.maker.get(todo.pop())
            if i is not None and i not in found:
                found.add(i)
                todo += _variables(self.eqns[i].invars)
        return found

    def _descendants(self, start: int) -> set[int]:
        found, todo = {start}, list(self.eqns[start].outvars)
        while todo:
            for i in self.readers.get(todo.pop(), ()):
                if i not in found:
                    found.add(i)
                    todo += self.eqns[i].outvars
        return found


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, c.Literal)]


def _reading(eqn: Any, renamed: dict[Any, Any]) -> Any:
    invars = [v if isinstance(v, c.Literal) else renamed.get(v, v) for v in eqn.invars]
    return eqn if all(a is b for a, b in zip(invars, eqn.invars, strict=True)) else c.replace_eqn(eqn, invars=invars)
