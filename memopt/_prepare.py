"""The yard before the survey: the exact preparations of every planned step, in their order.

In: a flat closed jaxpr. Out: an equal one that XLA holds less memory for, without a repeat and without a choice. Each
preparation is a room of its own; they stand here so that their order is in one place.
"""

from __future__ import annotations

from typing import Any

from memopt import _compat as c
from memopt import _eager, _narrow, _onehot, _sink, _transposes


def prepare(closed: Any, *, sinks: bool = True) -> Any:
    """Return an equal flat closed jaxpr that holds less.

    With `sinks` loop constants are made inside their loops, which is worth it where they can be made again there: kept
    for the backward loop, each would be one for every trip.
    """
    for preparation in (*([_sink.sink] if sinks else []), _onehot.onehot, _narrow.narrow, _transposes.fold):
        closed = preparation(closed)
    return _eager.eager(c.close(c.dce(closed)[0], c.jaxpr_consts(closed)))
