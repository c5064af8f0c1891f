"""The yard before the survey: the exact preparations of every planned step, in their order.

In: a flat closed jaxpr. Out: an equal one that XLA holds less memory for, without a repeat and without a choice. Each
preparation is a room of its own; they stand here so that their order is in one place.
"""

from __future__ import annotations

from typing import Any

from memopt import _compat as c
from memopt import _eager, _narrow, _onehot, _sink, _transposes


def prepare(closed: Any) -> Any:
    """Return an equal flat closed jaxpr that holds less."""
    for preparation in (_sink.sink, _onehot.onehot, _narrow.narrow, _transposes.fold):
        closed = preparation(closed)
    return _eager.eager(c.close(c.dce(closed)[0], c.jaxpr_consts(closed)))
