"""The treaty between the planner and the passes: propose, choose, apply.

A pass sees a `Survey` and proposes what may be done, with its price; the planner chooses by one cut; the builders apply
what was chosen. A pass is a frozen dataclass whose fields are its settings, in a file of its own, and knows neither the
planner nor another pass. What changes the step itself, such as a fused kernel in place of plain operations, is a
`Rewritten` step, made before the survey. Everything a pass can say today is below; other kinds of proposals join here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from memopt._plan import Decision

if TYPE_CHECKING:
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
      encode: the value, and what `reads` names -> a pytree of arrays; traced once.
      decode: that pytree -> a value of the same shape and dtype; traced once.
      error: largest relative error that the decoded value may have, as the pass states it; 0.0 is exact.
      name: what the plan calls this form, such as `"int8"`.
      readers: ids of the operations, as the step is written, that the decoded value serves, where it is right for them
        alone (a sketch for a weight gradient, bits for a pooling's); no repeat starts from it. None: all readers.
      asked: whether the user asked for this form of this value: every plan that keeps the value keeps it so. What a
        scope asks for is not repeated either.
      late: whether plans are looked for as if this form were not there, and it is then tried on what they keep: for
        exact forms that take next to no time. Where no pass repeats anything it makes no difference.
      again_seconds: predicted time of decoding it once more, which is then done where readers lie on both sides of
        something larger than the value, rather than hold it through that. None: it is held.
      reads: values that `encode` takes after the value: inputs of the region that the value is made in.
      harm: what it does to the step's gradients by itself, as measured (`memopt.Sensitivity`), in whatever unit adds up
        over values, such as the squared relative error; None where nothing was measured. Of plans within the budget
        the one of the smallest sum is taken, or those up to `harm_limit`, an attribute of the pass, are allowed.
      repeated_harm: the same where repeats start from it.
    """

    value: int
    seconds: float
    bytes: int
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    error: float = 0.0
    name: str = "encoded"
    readers: frozenset[int] | None = None
    asked: bool = False
    late: bool = False
    again_seconds: float | None = None
    reads: tuple[int, ...] = ()
    harm: float | None = None
    repeated_harm: float | None = None


@dataclasses.dataclass(frozen=True)
class Left:
    """Something that a pass left as it was, with the sentence that says why; the plan prints it."""

    what: str
    why: str


@runtime_checkable
class Pass(Protocol):
    """What the planner asks of a pass.

    One that never yields a `Repeat` may say so by `repeats = False`: constants then stay outside loops, where no pass
    of the list could make them again.
    """

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        ...

    def propose(self, survey: Survey) -> Iterable[Repeat | Store | Left]:
        """Yield what may be done to this step."""
        ...


@runtime_checkable
class StateForm(Protocol):
    """What the front end asks of a pass that stores leaves of the state in another form between steps.

    `memopt.optimize` then takes and returns that form. `memopt._stored.LeafForm` has all three for passes that store
    each leaf by itself. A form with `asks = True` looks at the step before it chooses: its `compress` takes a second
    argument, a function that traces the step over this form with a state in the place of the given one, or None.
    """

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        ...

    @property
    def stores_state(self) -> bool:
        """Whether these settings store any leaf."""
        ...

    def compress(self, state: Any) -> Any:
        """Return a state, or shapes of one, in the stored form; ValueError where there is nothing to store."""
        ...

    def decompress(self, state: Any) -> Any:
        """Return a state, or shapes of one, in its plain form; plain leaves stay."""
        ...

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step over the stored form; called with a plain state it raises a TypeError with the remedy."""
        ...


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pass that rewrites the step may know beside its jaxpr.

    Attributes:
      target: the target (`memopt._target.Target`).
      paths: per input of the jaxpr, its `jax.tree_util.keystr` path among the arguments, such as
        `"[0].params['kernel']"`; empty where it has none.
      out_paths: per output, its path in the step's result.
      donated: per input, whether it is donated.
      shardings: those of the arguments and results (`memopt._local.Shardings`), None where nothing is sharded.
      partitioned: 0 for a step of one device; else XLA will partition it, which it cannot do with a kernel, and this is
        the number of parts that its tokens are split into, 1 where it is not known.
      feature_parts: into how many parts features, the vocabulary among them, are split where they divide.
    """

    target: Any
    paths: tuple[str, ...] = ()
    out_paths: tuple[str, ...] = ()
    donated: tuple[bool, ...] = ()
    shardings: Any = None
    partitioned: int = 0
    feature_parts: int = 1


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A step that takes and returns what the one that came in does, by other means.

    Attributes:
      closed: the closed jaxpr; inputs and outputs have the shapes and dtypes of the one that came in.
      rows: what was done, as rows of the plan.
      left: what was left as it was, and why.
      error: largest relative error of a result, as the pass states it; 0.0 where only sums are reassociated.
      shardings: those that the arguments and results have to have (`memopt._local.Shardings`), where the rewrite
        decides them; None leaves them as they are.
    """

    closed: Any
    rows: tuple[Decision, ...] = ()
    left: tuple[Left, ...] = ()
    error: float = 0.0
    shardings: Any = None


@runtime_checkable
class Rewriter(Protocol):
    """What the planner asks of a pass that rewrites the step before it is surveyed.

    Attributes:
      stage: rewrites run from the lowest stage to the highest, in whatever order the user lists the passes.
      optional: whether plans of the step without this rewrite stand on the ladder beside those with it; a rewrite that
        is not optional is applied whatever the budget.

    A pass may have `parts()`, which returns rewriters that do its work one after another: the planner may then leave
    out the last of them, where they are optional.
    """

    stage: ClassVar[int]
    optional: ClassVar[bool]

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        ...

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step rewritten; None where there is nothing to do and nothing to say.

        The jaxpr comes in flat: plain calls are inlined and dead code is gone, also inside bodies.
        """
        ...
