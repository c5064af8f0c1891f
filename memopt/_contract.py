"""The treaty between the planner and the passes: propose, choose, apply.

A pass sees a `Survey` and proposes what may be done, with its price; the planner chooses by one cut; the builders apply
what was chosen. A pass is a frozen dataclass whose fields are its settings, in a file of its own, and knows neither the
planner nor another pass. Everything a pass can say today is below; other kinds of proposals join here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from memopt._survey import Survey


@dataclasses.dataclass(frozen=True)
class Repeat:
    """An operation that may be run again where its outputs are read later, instead of keeping them.

    Attributes:
      op: the operation's id in the survey's graph.
      seconds: predicted time of one run.
    """

    op: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Left:
    """Something that a pass left as it was, with the sentence that says why; the plan prints it."""

    what: str
    why: str


@runtime_checkable
class Pass(Protocol):
    """What the planner asks of a pass."""

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        ...

    def propose(self, survey: Survey) -> Iterable[Repeat | Left]:
        """Yield what may be done to this step."""
        ...
