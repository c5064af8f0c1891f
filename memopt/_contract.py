"""The treaty between the planner and the passes: propose, choose, apply.

A pass sees a `Survey` and proposes what may be done, with its price; the planner chooses by one cut; the builders apply
what was chosen. A pass is a frozen dataclass whose fields are its settings, in a file of its own, and knows neither the
planner nor another pass. Everything a pass can say today is below; other kinds of proposals join here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

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
class Store:
    """Another way to keep a value until it is read again: encoded where it is made, decoded where it is read.

    What reads the value where it is made, and the step's outputs, get the value itself. An exact form is decoded for
    all other readers. A lossy one is decoded for the backward pass alone (what JAX transposed), and so are repeats that
    start from one: no forward result, such as a loss or a metric, carries the error. Arguments, and values inside a
    `shard_map`, cannot be stored; the plan says so.

    Attributes:
      value: the value's id in the survey's graph.
      seconds: predicted time of encoding and decoding it once.
      bytes: bytes of the encoded value, of one run of the operation that makes it.
      encode: the value -> a pytree of arrays; traced once.
      decode: that pytree -> a value of the same shape and dtype; traced once.
      error: largest relative error that the decoded value may have, as the pass states it; 0.0 is exact.
      name: what the plan calls this form, such as `"int8"`.
    """

    value: int
    seconds: float
    bytes: int
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    error: float = 0.0
    name: str = "encoded"


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

    def propose(self, survey: Survey) -> Iterable[Repeat | Store | Left]:
        """Yield what may be done to this step."""
        ...
