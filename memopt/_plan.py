"""The plan: what the planner decided for one step, one target and one budget, as a person and a file can read it.

In: figures and decisions from the planner. Out: a frozen `Plan` that prints as a table and goes to JSON and back. It
holds a fingerprint of the step that it was made for, so that it is never applied to another. Nothing here plans.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from memopt import _saved
from memopt._errors import format_bytes
from memopt._fingerprint import difference


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided for one value.

    Attributes:
      name: a name for `overrides=`, unique in the step: module path, primitive and a number.
      module: module path, as set by Flax or `jax.named_scope`.
      source: `file:line (function)` of the user's code.
      value_bytes: bytes of keeping it; in a loop, of its stack.
      choice: `"keep"`, `"recompute"`, or the name of the form that it is kept in.
      reason: one sentence.
      stored_bytes: bytes of the form that it is kept in, scales and padding included; None where it is in none.
      collective_seconds: predicted seconds on the links of a collective, or of all those of a way to shard; else None.
      error: what its form does to the gradients by itself, as `memopt.Sensitivity.figure`; None where that was not
        measured.

    Example:
      >>> import memopt
      >>> memopt.Decision("mlp/dot_general.0", "mlp", "model.py:3", 4096, "keep", "read in 1 later place").choice
      'keep'
    """

    name: str
    module: str
    source: str
    value_bytes: int
    choice: str
    reason: str
    stored_bytes: int | None = None
    collective_seconds: float | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A memory plan of a training step.

    Attributes:
      baseline_peak_bytes: predicted peak of the step as written, in bytes per device.
      predicted_peak_bytes: predicted peak of the planned step.
      budget_bytes: the budget, None where there was none.
      baseline_flops: matmul and convolution FLOPs of the step as written.
      recompute_flops: such FLOPs that the plan adds; negative where kernels skip more than is repeated.
      predicted_overhead: predicted added time as a fraction of the step's (0.05 is 5 %).
      optimality_gap: how much less time a plan within this budget could take at best, as a fraction of the step's, by
        the dual bound of the modelled problem.
      planning_seconds: time of planning, tracing and XLA not counted.
      decisions: a row for each value that is read again later, largest first.
      notes: a sentence for everything that was left as it was.
      target: the target's text.
      fingerprint: what the plan was made for: step, JAX version, target, passes.
      repeats: the plan itself: time segment -> numbers of the operations that are run again there.
      stores: and value -> the form that it is kept in.
      variant: how loops were divided before planning.
      rewrites: names of the passes that rewrote the step before planning.
      predicted_error: what all forms do to the gradients, as `memopt.Sensitivity.figure` of the sum of their harms;
        errors of several values are taken as independent. None where nothing was measured.
      dropped: a row for each value that would be kept if frozen arguments were trained, largest first; in no plan is
        any of them kept for a gradient.

    Example:
      >>> import jax, jax.numpy as jnp, memopt
      >>> @memopt.optimize(budget="60%", target="cpu")
      ... def step(w, x):
      ...     loss = lambda w: jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(jnp.sin(x @ w)), None), x, w)[0])
      ...     return jax.grad(loss)(w)
      >>> plan = step.plan(jnp.ones((16, 64, 64)), jnp.ones((1024, 64)))
      >>> plan.predicted_peak_bytes <= plan.budget_bytes
      True
    """

    baseline_peak_bytes: int
    predicted_peak_bytes: int
    budget_bytes: int | None
    baseline_flops: float
    recompute_flops: float
    predicted_overhead: float
    optimality_gap: float
    planning_seconds: float
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]
    target: str
    fingerprint: Mapping[str, str]
    repeats: Mapping[int, tuple[int, ...]]
    stores: Mapping[int, str] = dataclasses.field(default_factory=dict)
    variant: tuple[int, ...] = ()
    rewrites: tuple[str, ...] = ()
    predicted_error: float | None = None
    dropped: tuple[Decision, ...] = ()

    def to_json(self) -> str:
        """Return the plan as a JSON string, for `Plan.from_json`."""
        return json.dumps(self.to_data(), indent=1)

    def to_data(self) -> dict[str, Any]:
        """Return what `to_json` writes, as JSON's own types."""
        data = dataclasses.asdict(self)
        data["repeats"] = {str(k): list(v) for k, v in self.repeats.items()}
        data["stores"] = {str(k): v for k, v in self.stores.items()}
        return {"memopt_plan": _saved.FORMAT, **data}

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises:
          ValueError: the text is not a plan, one of another format, or a damaged one; the field is named.
        """
        return Plan.from_data(parse(text))

    @staticmethod
    def from_data(data: Any) -> Plan:
        """Read a plan from what `to_data` returned and JSON gave back.

        Raises:
          ValueError: as `from_json`.
        """
        fields = _saved.plan_fields(data, frozenset(f.name for f in dataclasses.fields(Plan)))
        fields.update({name: tuple(Decision(**d) for d in fields[name]) for name in ("decisions", "dropped")})
        return Plan(**fields)

    def check_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Make sure that the plan was made for this step.

        Raises:
          ValueError: it was not; the message names the first field that differs.
        """
        told = difference(self.fingerprint, fingerprint)
        if told:
            raise ValueError(f"The saved plan is for another step: {told}. Plan again, and save that plan.")

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        head = [
            ("target", self.target),
            ("peak as written, predicted", format_bytes(self.baseline_peak_bytes)),
            ("budget", "none" if self.budget_bytes is None else format_bytes(self.budget_bytes)),
            ("peak planned, predicted", format_bytes(self.predicted_peak_bytes)),
            ("FLOPs repeated", f"{self.recompute_flops:.3g} ({_percent(self.recompute_flops, self.baseline_flops)})"),
            ("time added, predicted", f"{100 * self.predicted_overhead:.1f} %"),
            ("optimality gap", f"{100 * self.optimality_gap:.1f} % of the step's time"),
            ("planned in", f"{self.planning_seconds:.2f} s"),
        ]
        rows = Table(title=f"{len(self.decisions)} values read again later, the largest first")
        for name in ("value", "bytes", "choice", "where", "why"):
            rows.add_column(name, overflow="fold", no_wrap=name in ("bytes", "choice"))
        for d in self.decisions[:24]:
            rows.add_row(d.name, format_bytes(d.value_bytes), d.choice, d.source, d.reason)
        out = io.StringIO()
        console = Console(file=out, width=140, highlight=False)
        for key, value in head:
            console.print(f"{key:<28}{value}")
        console.print(rows)
        if self.variant and self.variant[0] == "rerun":
            console.print("- Inner loops run again in the body that reads them, so that their stacks are short-lived.")
        elif self.variant:
            kind, index, block, levels = self.variant
            console.print(f"- The loop at equation {index} runs in {levels} levels, with blocks of {block} ({kind}).")
        for line in told_dropped(self.dropped):
            console.print(f"- {line}")
        for note in self.notes:
            console.print(f"- {note}")
        return out.getvalue()


def told_dropped(rows: Sequence[Decision], most: int = 6) -> list[str]:
    """Return a sentence for each of the largest values that are not kept because weights are frozen."""
    lines = [f"Not kept: {row.name} ({format_bytes(row.value_bytes)}); {row.reason}." for row in rows[:most]]
    rest = rows[most:]
    if rest:
        size = format_bytes(sum(row.value_bytes for row in rest))
        lines.append(f"Not kept: {len(rest)} more values ({size}) that only gradients of frozen arguments would read.")
    return lines


def parse(text: str) -> Any:
    """Parse JSON.

    Raises:
      ValueError: the text is no JSON.
    """
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"This is no saved memopt plan ({error}): save one with Plan.to_json().") from error


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
