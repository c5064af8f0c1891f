"""Transfers inside loops: stacks that lie on the host go to the device one row at a time.

In: a flat closed jaxpr whose state is fetched from the host as a whole. Out: an equal one in which a loop that reads
such a stack as slices, or reads and writes its rows in the carry, takes the stack where it is and moves rows alone.
What other operations read is still fetched as a whole. It chooses nothing.
"""

from __future__ import annotations

from typing import Any

import jax

from memopt import _compat as c
from memopt import _pairs
from memopt._sizes import is_on_host


def sink(closed: Any) -> Any:
    """Return an equal closed jaxpr in which loops fetch and send back rows of stacks on the host."""
    base = c.open_jaxpr(closed)
    fetches = {e.outvars[0]: e for e in base.eqns if _moves(e, to_host=False)}
    if not fetches:
        return closed
    readers = _readers(base)
    renamed: dict[Any, Any] = {}  # a result on the host that a loop now makes there itself
    eqns, changed = [], False
    for eqn in base.eqns:
        if eqn.primitive.name == "scan":
            new = _Sinker(eqn, fetches, readers).build(renamed)
            changed, eqn = changed or new is not eqn, new
        elif eqn.outvars and eqn.outvars[0] in renamed:
            continue
        eqns.append(eqn)
    if not changed:
        return closed
    outvars = [v if isinstance(v, c.Literal) else renamed.get(v, v) for v in base.outvars]
    return c.close(c.dce(c.rebuild(base, eqns=eqns, outvars=outvars))[0], c.jaxpr_consts(closed))


def _moves(eqn: Any, *, to_host: bool) -> bool:
    """Say whether an equation moves one array from the device to the host, or back."""
    if eqn.primitive.name != "device_put" or len(eqn.invars) != 1 or isinstance(eqn.invars[0], c.Literal):
        return False
    return (is_on_host(eqn.invars[0].aval), is_on_host(eqn.outvars[0].aval)) == (not to_host, to_host)


def _readers(jaxpr: Any) -> dict[Any, list[Any]]:
    """Return for each variable the equations that read it, None for the results of the jaxpr."""
    found: dict[Any, list[Any]] = {}
    for eqn in [*jaxpr.eqns, None]:
        for v in jaxpr.outvars if eqn is None else eqn.invars:
            if not isinstance(v, c.Literal):
                found.setdefault(v, []).append(eqn)
    return found


class _Sinker:
    """One loop built anew with its stacks where they lie."""

    def __init__(self, eqn: Any, fetches: dict[Any, Any], readers: dict[Any, list[Any]]):
        self.eqn, self.fetches, self.readers = eqn, fetches, readers
        self.loop = _pairs.Loop(eqn)
        self.body = self.loop.body
        self.inside = _readers(self.body)
        self.invars = list(self.body.invars)
        self.operands = list(eqn.invars)
        self.outvars = list(eqn.outvars)
        self.before: list[Any] = []  # transfers at the start of the body
        self.replaced: dict[int, list[Any]] = {}  # an equation of the body -> those in its place
        self.body_outs = list(self.body.outvars)

    def build(self, renamed: dict[Any, Any]) -> Any:
        """Return the loop's equation, the very same where nothing is sunk; note results that it makes on the host."""
        for k in range(self.loop.num_carry):
            self._carry(k, renamed)
        for k in range(self.loop.first_xs, len(self.operands)):
            self._slice(k)
        if all(a is b for a, b in zip(self.operands, self.eqn.invars, strict=True)):
            return self.eqn
        eqns = [*self.before, *(new for e in self.body.eqns for new in self.replaced.get(id(e), [e]))]
        body = c.rebuild(self.body, invars=self.invars, outvars=self.body_outs, eqns=eqns)
        return _pairs.scan_eqn(self.eqn, body, self.loop.sorted(self.operands), self.outvars, self.loop.length)

    def _slice(self, k: int) -> None:
        fetch = self._fetch(k)
        if fetch is None:
            return
        row = c.Var(_there(self.invars[k].aval))
        self.before.append(c.replace_eqn(fetch, invars=[row], outvars=[self.invars[k]]))
        self.invars[k], self.operands[k] = row, fetch.invars[0]

    def _fetch(self, k: int) -> Any | None:
        operand = self.operands[k]
        return None if isinstance(operand, c.Literal) else self.fetches.get(operand)

    def _carry(self, number: int, renamed: dict[Any, Any]) -> None:
        """Leave a carried stack on the host, of which the body reads rows and writes one, and that goes back there."""
        k = self.loop.num_consts + number
        fetch, carried, final = self._fetch(k), self.invars[k], self.outvars[number]
        uses = self.inside.get(carried, [])
        writes = [e for e in uses if _is_row(e, "dynamic_update_slice", carried)]
        reads = [e for e in uses if _is_row(e, "dynamic_slice", carried)]
        backs = self.readers.get(final, [])
        if fetch is None or len(writes) != 1 or len(writes) + len(reads) != len(uses):
            return
        (write,) = writes
        if self.body_outs[number] is not write.outvars[0] or self.inside[write.outvars[0]] != [None]:
            return
        if len(backs) != 1 or backs[0] is None or not _moves(backs[0], to_host=True):
            return
        stack, written = c.Var(_there(carried.aval)), c.Var(_there(carried.aval))
        for read in reads:
            part = c.Var(_there(read.outvars[0].aval))
            there = c.replace_eqn(read, invars=[stack, *read.invars[1:]], outvars=[part])
            self.replaced[id(read)] = [there, c.replace_eqn(fetch, invars=[part], outvars=read.outvars)]
        row = c.Var(_there(write.invars[1].aval))
        sent = c.replace_eqn(backs[0], invars=[write.invars[1]], outvars=[row])
        put = c.replace_eqn(write, invars=[stack, row, *write.invars[2:]], outvars=[written])
        self.replaced[id(write)] = [sent, put]
        self.invars[k], self.operands[k], self.body_outs[number] = stack, fetch.invars[0], written
        self.outvars[number] = renamed[backs[0].outvars[0]] = c.Var(_there(final.aval))


def _is_row(eqn: Any, name: str, stack: Any) -> bool:
    """Say whether an equation takes or writes rows of a stack, and reads it in no other way."""
    if eqn is None or eqn.primitive.name != name or eqn.invars[0] is not stack:
        return False
    return all(v is not stack for v in eqn.invars[1:])


def _there(aval: Any) -> Any:
    """Return the type of the same value on the host."""
    return aval.update(memory_space=jax.memory.Space.Host)
