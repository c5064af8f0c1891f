"""The drawing table: a step as the planner sees it, surveyed, with what the passes proposed for it.

In: the closed jaxpr of a step, the target, the passes, overrides, the shardings of its arguments, which rewrites are
made first and how its loops are divided. Out: a `Step`, from which searches start and to which their plans belong. It
chooses nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from memopt import _compat as c
from memopt import (
    _cost,
    _forms,
    _frozen,
    _inline,
    _prepare,
    _probe,
    _prune,
    _rewrite,
    _saved,
    _scopes,
    _segments,
    _specs,
    _split,
)
from memopt._contract import Context, Left, Repeat, Store
from memopt._decisions import Names, decisions, settle
from memopt._fingerprint import fingerprint, graph_digest
from memopt._local import local_shapes
from memopt._network import Choice
from memopt._plan import Decision, Plan
from memopt._survey import Survey


class Step:
    """A step as the planner sees it: rewritten, surveyed, with what the passes proposed.

    Args:
      closed: the step as written.
      target: the target.
      passes: the passes.
      overrides: decision name -> `"keep"` or `"recompute"`.
      shardings: those of the arguments and results, None where nothing is sharded.
      variant: how a loop is divided, None where none is.
      context: what rewriting passes may know.
      rewrites: names of the passes that rewrite this step first; None for all that can.
      rewritten: outcomes of rewrites that steps of one planning share (`_rewrite.apply`).
    """

    def __init__(
        self,
        closed: Any,
        target: Any,
        passes: Sequence[Any],
        overrides: Mapping[str, str] | None,
        shardings: Any,
        variant: _split.Variant | None = None,
        context: Context | None = None,
        rewrites: Sequence[str] | None = None,
        rewritten: dict[tuple[str, ...], _rewrite.Outcome] | None = None,
    ):
        self.variant = variant
        self.context = Context(target) if context is None else context
        self.rewriters = [p for p in _rewrite.rewriters(passes) if rewrites is None or p.name in rewrites]
        self.pruned = False  # whether more is dead in it than XLA is known to remove
        self.closed, self.target, self.passes, self._rewritten = closed, target, passes, rewritten
        shardings = self.outcome.shardings or shardings
        self.local = None if shardings is None else local_shapes(self.flat, shardings)
        self.notes = () if self.local is None else self.local.notes
        self.compile_seconds = 0.0 if self.local is None else self.local.compile_seconds
        self.baseline_flops = _cost.matmul_flops(self.live)
        self.baseline_seconds = self.seconds(self.live)
        self.left: list[Left] = []
        self.survey: Survey | None = None
        self.repeatable: dict[int, float] = {}
        self.stores: list[Store] = []
        self.stores_by_pass: list[list[Store]] = []  # of each pass that proposes any
        self.always: set[int] = set()
        self.asked: dict[int, Store] = {}  # what the user asked by a scope to keep in this form
        self.sensitivity, self.harm_limit = _measured(passes)
        if passes and self.flat is not None:
            self._survey(overrides)

    @functools.cached_property
    def live(self) -> Any:
        """The step as written, without the dead code that XLA removes: gradients that are taken and dropped."""
        return c.close(c.dce(self.closed)[0], c.jaxpr_consts(self.closed))

    @functools.cached_property
    def outcome(self) -> _rewrite.Outcome:
        """The step without plain calls and dead code, after its rewrites."""
        respect = any(getattr(p, "respect_checkpoint", False) for p in self.passes)
        flat = _inline.inline(self.closed, respect_checkpoint=respect)
        flat, self.pruned = _prune.prune(flat)
        known = self._rewritten
        return _rewrite.apply(flat, self.rewriters, self.context, respect_checkpoint=respect, known=known)

    @functools.cached_property
    def flat(self) -> Any:
        """The step as it is surveyed, its loops divided; None where they cannot be."""
        flat = _prepare.prepare(self.outcome.closed, self.target.platform, sinks=self._repeats)
        return flat if self.variant is None else _split.apply_variant(flat, self.variant)

    @property
    def _proposing(self) -> list[Any]:
        return [p for p in self.passes if callable(getattr(p, "propose", None))]

    @property
    def _repeats(self) -> bool:
        """Whether a pass may propose repeats: what is made inside a loop for nothing is then made again there."""
        return any(getattr(p, "repeats", True) for p in self._proposing)

    @property
    def variant_key(self) -> tuple:
        """How the loops are divided, as a saved plan holds it."""
        return () if self.variant is None else dataclasses.astuple(self.variant)

    def seconds(self, closed: Any) -> float:
        """Return one device's predicted seconds of this step or of a rewrite of it."""
        twin = closed if self.local is None else self.local.twin(closed)
        return _cost.jaxpr_seconds(twin, _specs.spec_for(self.target))

    def _survey(self, overrides: Mapping[str, str] | None) -> None:
        self.survey = Survey(self.flat, self.target, self.local)
        self.names = Names(self.survey)
        offers = [list(p.propose(self.survey)) for p in self._proposing]
        proposals = [x for offer in offers for x in offer]
        never, self.always = settle(self.survey, self.names, overrides)
        self.repeatable = {x.op: x.seconds for x in proposals if isinstance(x, Repeat) and x.op not in never}
        self.always &= set(self.repeatable)
        self.left = [*self.outcome.left, *(x for x in proposals if isinstance(x, Left))]
        self.stores = self._possible([x for x in proposals if isinstance(x, Store)], never)
        possible = {id(store) for store in self.stores}
        self.stores_by_pass = [own for offer in offers if (own := [x for x in offer if id(x) in possible])]
        self.asked = {store.value: store for store in self.stores if store.asked}
        for op in filter(None, map(self._maker, self.asked)):
            if _scopes.mark_of(self.names.stack(op)) in _scopes.USED:
                self.repeatable.pop(op.id, None)
        self.always &= set(self.repeatable)
        self._tell_marks()

    def _possible(self, stores: Sequence[Store], never: set[int]) -> list[Store]:
        """Return the stores that the builders can carry out; the others are left, with a sentence."""
        named: dict[tuple[int, str], Store] = {}
        for store in stores:
            why = _forms.refusal(self.survey.graph, store)
            if why is not None:
                self.left.append(Left(f"The form {store.name!r} of a value", why))
            elif named.setdefault((store.value, store.name), store) is not store:
                raise ValueError(f"Two forms of one value are called {store.name!r}: give them names of their own.")
        return [store for store in named.values() if self._kept_by_op(store) not in never]

    def _tell_marks(self) -> None:
        """Say which marks no pass of the list carries out."""
        done = {_scopes.mark_of(self.names.stack(op)) for op in map(self._maker, self.asked) if op is not None}
        for mark in sorted(_scopes.USED & _scopes.marks_in(self.flat) - done) if _scopes.USED else ():
            self.left.append(Left(f"What @memopt.{mark} marks", "no pass of this list can keep any of it in that form"))

    def _maker(self, value: int) -> Any:
        return self.survey.graph.values[value].op

    def _kept_by_op(self, store: Store) -> int | None:
        maker = self.survey.graph.values[store.value].op
        return None if maker is None else maker.id

    def decisions(self, choice: Choice) -> list[Decision]:
        """Return the rows of a plan."""
        if self.survey is None:
            return []
        harms = {v: (self.sensitivity.figure(x), self.sensitivity.words(x)) for v, x in self.harms(choice).items()}
        return decisions(self.survey, self.names, choice, self.repeatable, harms)

    @functools.cached_property
    def frozen(self) -> _frozen.Found:
        """What is not kept because only gradients of frozen arguments would read it."""
        if self.survey is None:
            return _frozen.Found()
        return _frozen.find(self.survey.graph, self.context.paths, self.survey.bytes_of_value)

    def choice_of(self, plan: Plan) -> Choice:
        """Return the choice that a saved plan holds.

        Raises:
          ValueError: its numbers mean nothing in this step, or no pass proposes a form that it stores a value in.
        """
        forms = {(store.value, store.name): store for store in self.stores}
        _saved.check_numbers(
            plan.repeats,
            plan.stores,
            places=range(self.survey.bins),
            repeatable=self.repeatable,
            forms=frozenset(forms),
            alone=_segments.ALONE,
        )
        repeats = {place: frozenset(ops) for place, ops in plan.repeats.items()}
        return Choice(repeats, {value: forms[value, name] for value, name in plan.stores.items()})

    def harm(self, choice: Choice) -> float:
        """Return the harm that a choice's forms were measured to do, errors of several taken as independent."""
        return sum(self.harms(choice).values())

    def harms(self, choice: Choice) -> dict[int, float]:
        """Return the harm of each measured form, by value.

        Where a repeat that starts from one is the end of a block outside loops, and so carries the error into the next
        block, it is infinite: that was not measured.
        """
        measured = {v: s for v, s in choice.stores.items() if s.harm is not None}
        if not measured:
            return {}
        ops = self.survey.graph.ops
        repeated = sorted(set().union(*choice.repeats.values()))
        started = {v for op in repeated for v in ops[op].inputs}
        wrong, carried = set(measured), False
        for op in repeated:
            if not wrong.isdisjoint(ops[op].inputs):
                wrong.update(ops[op].outputs)
                carried = carried or op in self._block_ends
        harms = {v: math.inf if carried else s.repeated_harm for v, s in measured.items() if v in started}
        return {v: s.harm for v, s in measured.items()} | harms

    @functools.cached_property
    def _block_ends(self) -> frozenset[int]:
        return _probe.block_ends(self.survey.graph)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """What a saved plan of this step is good for."""
        found = fingerprint(self.closed, self.target, self.passes, self.local)
        return found if self.survey is None else {**found, "graph": graph_digest(self.survey.graph)}


def _measured(passes: Sequence[Any]) -> tuple[Any, float | None]:
    """Return what was measured for the passes, and the harm that they allow in all; None for each where nothing is.

    Raises:
      ValueError: two passes have figures of different kinds, which do not add up.
    """
    found = [p for p in passes if getattr(p, "sensitivity", None) is not None]
    kinds = sorted({p.sensitivity.kind for p in found})
    if len(kinds) > 1:
        raise ValueError(
            f"Errors of different kinds do not add up: {', '.join(kinds)}. Measure one kind for all passes."
        )
    limits = [p.harm_limit for p in found if p.harm_limit is not None]
    return (found[0].sensitivity if found else None), min(limits, default=None)
