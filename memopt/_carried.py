"""The cloakroom ticket: carried stacks of which each trip of a loop reads its own row and then writes it.

In: a `scan` equation and which of its slices count its trips. Out: for each such carry, the variables that hold the row
as it was before the loop. So a reader of the old stack inside the loop need not take the stack a second time: the row
is there. It knows nothing of graphs or plans, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from memopt import _compat as c


def old_rows(eqn: Any, counters: Set[int]) -> Iterator[tuple[Any, int]]:
    """Yield `(variable of the body, position among the carries)` for each row of a carry read before it is written.

    Args:
      eqn: a `scan` equation.
      counters: positions among its operands of the slices that hold the trip's own number, as an `iota` does.
    """
    body = c.open_jaxpr(eqn.params["jaxpr"])
    num_consts, num_carry = c.scan_layout(eqn)
    numbers = {body.invars[i] for i in counters}
    makers = {v: e for e in body.eqns for v in e.outvars}
    for k in range(num_carry if numbers else 0):
        carried = body.invars[num_consts + k]
        index = _row_written(makers.get(body.outvars[k]) if _is_var(body.outvars[k]) else None, carried, numbers)
        if index is not None:
            yield from ((v, k) for v in _rows_read(body, carried, index))


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, c.Literal)


def _row_written(eqn: Any, carried: Any, numbers: Set[Any]) -> Any | None:
    """Return the trip's number where an equation writes that one row of the carry as it came in, and no other."""
    if eqn is None or eqn.primitive.name != "dynamic_update_slice" or eqn.invars[0] is not carried:
        return None
    whole = (1, *carried.aval.shape[1:])
    return eqn.invars[2] if eqn.invars[1].aval.shape == whole and _at_row(eqn.invars[2:], numbers) else None


def _rows_read(body: Any, carried: Any, index: Any) -> Iterator[Any]:
    """Yield the variables that hold the row of the carry at this number, without its leading axis."""
    parts = {
        e.outvars[0]
        for e in body.eqns
        if e.primitive.name == "dynamic_slice"
        and e.invars[0] is carried
        and e.outvars[0].aval.shape == (1, *carried.aval.shape[1:])
        and _at_row(e.invars[1:], {index})
    }
    for eqn in body.eqns:
        if eqn.primitive.name in ("reshape", "squeeze") and eqn.invars[0] in parts:
            if eqn.outvars[0].aval.shape == carried.aval.shape[1:]:
                yield eqn.outvars[0]


def _at_row(places: Any, numbers: Set[Any]) -> bool:
    rest = all(isinstance(v, c.Literal) and int(v.val) == 0 for v in places[1:])
    return rest and _is_var(places[0]) and places[0] in numbers
