"""The meter: how many bytes of temporaries a rewritten step holds in each time segment.

In: a rewritten jaxpr, its timeline, and the segment of each variable. Out: an array, one figure a segment, by which the
search prices memory where it binds. It predicts and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def usage_of(jaxpr: Any, timeline: Any, own: Mapping[Any, int], new: Mapping[Any, int], segments: int) -> np.ndarray:
    """Return the largest predicted bytes of temporaries in each time segment.

    Args:
      jaxpr: the open rewritten jaxpr.
      timeline: its timeline.
      own: segment of each variable of the step.
      new: segment of each variable that the rewrite added.
      segments: number of segments.
    """
    usage = np.zeros(segments)
    _Spread(own, new, usage).body(jaxpr, timeline, 0.0)
    return usage


class _Spread:
    def __init__(self, own: Mapping[Any, int], new: Mapping[Any, int], usage: np.ndarray):
        self.own, self.new, self.usage = own, new, usage

    def body(self, jaxpr: Any, timeline: Any, outside: float) -> None:
        """Note what each equation holds, with the bytes held outside this body."""
        places = np.array([self._place(eqn) for eqn in jaxpr.eqns], np.int64)
        found = np.flatnonzero(places >= 0)
        np.maximum.at(self.usage, places[found], outside + timeline.usage[found])
        for i, eqn in enumerate(jaxpr.eqns):
            if eqn.primitive.name == "shard_map":
                self._shard_map(timeline, i, outside)
            elif i in timeline.inner:
                self._enter(timeline.inner[i], outside + timeline.usage[i])

    def _place(self, eqn: Any) -> int:
        for var in eqn.outvars:
            place = self.own.get(var)
            if place is None:
                place = self.new.get(var)
            if place is not None:
                return place
        return -1

    def _shard_map(self, timeline: Any, index: int, outside: float) -> None:
        for inside, used, bodies in timeline.within(index):
            place = self._place(inside)
            if place >= 0:
                self.usage[place] = max(self.usage[place], outside + used)
            for inner in bodies:
                self._enter(inner, outside + used)

    def _enter(self, inner: Any, used: float) -> None:
        self.body(inner.body, inner, used - max(inner.usage.max(initial=0), 0))
