"""The foreman: which operations after a loop treat each layer of its stacked results alone.

In: an open jaxpr and one of its loops. Out: a `Region`: the loop's stacked results that it starts from, the operations
that could run inside the loop, one layer at a time, what they read and what they make; and for stacks that have other
readers, the reason. Found by dataflow alone. It moves nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from memopt import _compat as c
from memopt import _row_loops, _rows
from memopt._pairs import Loop


@dataclasses.dataclass
class Member:
    """An operation of a region: its equation, which operands are stacks, and what it is for one layer."""

    eqn: Any
    stacked: tuple[bool, ...]
    row: _rows.Row


@dataclasses.dataclass
class Region:
    """Operations after a loop that can run inside it, one layer at a time.

    Attributes:
      loop: the loop.
      sources: positions among the loop's `ys` of the stacks that only these operations read.
      members: the operations, in order; some make operands of others and do not depend on the loop.
      why: for positions of other stacks that operations read, why they stay.
    """

    loop: Loop
    sources: list[int]
    members: list[Member]
    why: dict[int, str]

    def inputs(self) -> tuple[list[Any], list[Any]]:
        """Return the variables from outside that members read as stacks, and those that all layers share."""
        made = {v for m in self.members for v in m.eqn.outvars} | {self.loop.ys[i] for i in self.sources}
        stacks: dict[Any, None] = {}
        whole: dict[Any, None] = {}
        for m in self.members:
            for v, s in zip(m.eqn.invars, m.stacked, strict=True):
                if not isinstance(v, c.Literal) and v not in made:
                    (stacks if s else whole)[v] = None
        return list(stacks), list(whole)

    def origins(self) -> dict[Any, set[Any]]:
        """Return for each variable that members make the stacks from outside that it is made from."""
        stacks = set(self.inputs()[0])
        found: dict[Any, set[Any]] = {v: {v} for v in stacks}
        for m in self.members:
            read = [v for v, s in zip(m.eqn.invars, m.stacked, strict=True) if s and not isinstance(v, c.Literal)]
            whole = set().union(*(found.get(v, set()) for v in read))
            found.update((v, whole) for v in m.eqn.outvars)
        return found


def region(jaxpr: Any, index: int) -> Region:
    """Find the region of the loop at a place of an open jaxpr; without sources where there is none."""
    return _Finder(jaxpr, index).find()


_LATE = "is ready only when all layers' gradients are"


class _Finder:
    def __init__(self, jaxpr: Any, index: int):
        self.jaxpr, self.index = jaxpr, index
        self.loop = Loop(jaxpr.eqns[index])
        results = set(_variables(jaxpr.outvars))
        self.after = [e for e in jaxpr.eqns[index + 1 :] if not is_sent(e, results)]
        self.readers: dict[Any, list[int]] = {}
        for place, eqn in enumerate(jaxpr.eqns):
            for v in _variables(eqn.invars):
                self.readers.setdefault(v, []).append(place)
        for v in _variables(jaxpr.outvars):
            self.readers.setdefault(v, []).append(len(jaxpr.eqns))
        self.makers = {v: e for e in jaxpr.eqns for v in e.outvars}
        self.why: dict[int, str] = {}

    def find(self) -> Region:
        sources = {v: i for i, v in enumerate(self.loop.ys) if not isinstance(v, c.DropVar) and v in self.readers}
        for v in _variables(self.jaxpr.outvars):
            if v in sources:
                self.why[sources[v]] = "the step returns it"
        while True:
            before = len(self.why)
            members, owners = self._forward({v: i for v, i in sources.items() if i not in self.why})
            if len(self.why) == before:
                break
        used = {i for own in owners for i in own}
        return Region(self.loop, sorted(used), self._with_producers(members), self.why)

    def _forward(self, sources: dict[Any, int]) -> tuple[list[Member], list[frozenset[int]]]:
        """Follow the stacks downstream once; note for each that cannot be followed why."""
        rows = {v: frozenset([i]) for v, i in sources.items()}  # one layer at a time -> the stacks it comes from
        late = {v for v in self.loop.eqn.outvars if v not in rows}
        members, owners = [], []
        for eqn in self.after:
            read = [v for v in _variables(eqn.invars)]
            own = frozenset().union(*(rows[v] for v in read if v in rows))
            member = self._member(eqn, rows, late) if own else None
            if member is None:
                for i in own:
                    self.why.setdefault(i, self._reason(eqn, late))
                if own or any(v in late for v in read):
                    late.update(eqn.outvars)
                continue
            members.append(member)
            owners.append(own)
            if member.row.gather is None:
                rows.update((v, own) for v in eqn.outvars)
            else:
                late.update(eqn.outvars)
        return members, owners

    def _reason(self, eqn: Any, late: set[Any]) -> str:
        if any(v in late for v in _variables(eqn.invars)):
            return f"its update needs a value that {_LATE}, such as a norm over all of them, or another kept stack"
        return f"{eqn.primitive.name} does not treat each layer alone"

    def _member(self, eqn: Any, rows: dict[Any, Any], late: set[Any]) -> Member | None:
        if any(v in late for v in _variables(eqn.invars)):
            return None
        return self._alone(eqn, [not isinstance(v, c.Literal) and v in rows for v in eqn.invars])

    def _alone(self, eqn: Any, dependent: Sequence[bool]) -> Member | None:
        """Say what the equation is for one layer: operands of as many rows are stacks, or else only dependent ones."""
        length = self.loop.length
        wide = [d or _leading(v) == length for v, d in zip(eqn.invars, dependent, strict=True)]
        for stacked in (wide, list(dependent)):
            row = _rows.row(eqn, stacked, length)
            if row is not None:
                return Member(eqn, tuple(stacked), row)
        loop = _row_loops.row(eqn, dependent, length, self.makers, self.readers.__contains__)
        return None if loop is None else Member(eqn, *loop)

    def _with_producers(self, members: list[Member]) -> list[Member]:
        """Add what only members read as stacks and what can be made one layer at a time itself: decayed moments."""
        inside = {id(m.eqn): m for m in members}
        wanted = {v for m in members for v, s in zip(m.eqn.invars, m.stacked, strict=True) if s}
        for place in range(len(self.jaxpr.eqns) - 1, -1, -1):
            eqn = self.jaxpr.eqns[place]
            if id(eqn) in inside or place == self.index or not any(v in wanted for v in eqn.outvars):
                continue
            if not all(self._inside(r, inside) for v in eqn.outvars for r in self.readers.get(v, ())):
                continue
            member = self._alone(eqn, [False] * len(eqn.invars))
            if member is not None and member.row.gather is None:
                inside[id(eqn)] = member
                wanted.update(v for v, s in zip(eqn.invars, member.stacked, strict=True) if s)
        return [inside[id(eqn)] for eqn in self.jaxpr.eqns if id(eqn) in inside]

    def _inside(self, place: int, inside: dict[int, Member]) -> bool:
        return place < len(self.jaxpr.eqns) and id(self.jaxpr.eqns[place]) in inside


def is_sent(eqn: Any, results: set[Any]) -> bool:
    """Say whether an equation only moves a result of the step to other memory: what it moves is a result then."""
    return eqn.primitive.name == "device_put" and len(eqn.invars) == 1 and eqn.outvars[0] in results


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (v for v in atoms if not isinstance(v, c.Literal))


def _leading(atom: Any) -> int | None:
    shape = getattr(atom.aval, "shape", ())
    return shape[0] if shape and not isinstance(atom, c.Literal) else None
