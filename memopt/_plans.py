"""The folder of plans: those of several signatures of one step, in one file, found by what each was made for.

In: `Plan`s, or a file of them; the fingerprint of a call. Out: the plan of that call, or one error that names what
differs and what is there. Nothing here plans or applies.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from memopt._fingerprint import arguments_in, difference
from memopt._plan import Plan, parse

FORMAT = 1
_SHOWN = 4  # arguments shown of a signature


@dataclasses.dataclass(frozen=True)
class Plans:
    """Saved plans of several signatures, for `optimize(plan=...)`.

    Each call takes the plan that was made for its step, shapes, target, JAX version and passes; nothing is planned. A
    call for which there is none raises, and names what differs.

    Attributes:
      plans: the plans; of two for the same signature the later one counts.

    Raises:
      ValueError: there is no plan.
      TypeError: something else than plans.

    Example:
      >>> import jax, jax.numpy as jnp, memopt
      >>> def step(w, x):
      ...     loss = lambda w: jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(jnp.sin(x @ w)), None), x, w)[0])
      ...     return jax.grad(loss)(w)
      >>> planned = memopt.optimize(step, budget="60%", target="cpu")
      >>> w, small, large = jnp.ones((16, 64, 64)), jnp.ones((1024, 64)), jnp.ones((2048, 64))
      >>> text = memopt.Plans((planned.plan(w, small), planned.plan(w, large))).to_json()
      >>> again = memopt.optimize(step, plan=memopt.Plans.from_json(text), target="cpu")
      >>> again.plan(w, large).repeats == planned.plan(w, large).repeats
      True
    """

    plans: tuple[Plan, ...]

    def __post_init__(self):
        if not isinstance(self.plans, Iterable) or not all(isinstance(plan, Plan) for plan in self.plans):
            raise TypeError(f"memopt.Plans takes memopt.Plan objects, got {self.plans!r}: read Plan.from_json(text).")
        found = {tuple(plan.fingerprint.items()): plan for plan in self.plans}
        if not found:
            raise ValueError("There is no plan in memopt.Plans: make one with the .plan(...) of an optimized step.")
        object.__setattr__(self, "plans", tuple(found.values()))

    @staticmethod
    def of(plans: Any) -> Plans:
        """Return plans as `optimize(plan=...)` takes them: one, several in a list, or `Plans`.

        Raises:
          TypeError: something else.
        """
        if isinstance(plans, Plans):
            return plans
        if isinstance(plans, Plan):
            return Plans((plans,))
        if isinstance(plans, (tuple, list)):
            return Plans(tuple(plans))
        raise TypeError(
            f"plan takes a memopt.Plan, got {plans!r}. Read one: memopt.Plan.from_json(text), "
            "or several: memopt.Plans.from_json(text)."
        )

    def to_json(self) -> str:
        """Return all plans as one JSON string, for `Plans.from_json`."""
        return json.dumps({"memopt_plans": FORMAT, "plans": [plan.to_data() for plan in self.plans]}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plans:
        """Read what `Plans.to_json` or `Plan.to_json` wrote.

        Raises:
          ValueError: the text holds no plans, plans of another format, or damaged ones; the field is named.
        """
        data = parse(text)
        if not isinstance(data, dict) or "memopt_plans" not in data:
            return Plans((Plan.from_data(data),))
        if data["memopt_plans"] != FORMAT or not isinstance(data.get("plans"), list):
            raise ValueError(f"These saved plans are damaged, or not of format {FORMAT}: plan again, and save them.")
        return Plans(tuple(map(Plan.from_data, data["plans"])))

    def with_plan(self, plan: Plan) -> Plans:
        """Return these plans with one more, in place of the one for the same arguments, target and passes."""
        same = [_asked(other.fingerprint) == _asked(plan.fingerprint) for other in self.plans]
        return Plans((*(p for p, is_same in zip(self.plans, same, strict=True) if not is_same), plan))

    def choose(self, fingerprint: Mapping[str, str]) -> Plan:
        """Return the plan that was made for this step.

        Args:
          fingerprint: of the step, as far as it is known before its loops are divided.

        Raises:
          ValueError: none was; the message names the first field that differs, and the signatures that are there.
        """
        found = [p for p in self.plans if all(p.fingerprint.get(k) == v for k, v in fingerprint.items())]
        if found:
            return found[-1]
        if len(self.plans) == 1:
            self.plans[0].check_fingerprint(fingerprint)
        asked = fingerprint.get("arguments", "")
        nearest = max(self.plans, key=lambda plan: _agreement(plan.fingerprint, fingerprint))
        raise ValueError(
            f"None of the {len(self.plans)} saved plans is for this call; of the nearest one, "
            f"{difference(nearest.fingerprint, fingerprint)}. Saved are plans for {self._signatures(asked)}. "
            "Plan this call without plan=, and save its plan with the others in memopt.Plans."
        )

    def for_arguments(self, arguments: str, target: str) -> Plan:
        """Return the plan for arguments of these shapes, whatever else differs; the only one, where there is one.

        Raises:
          ValueError: there is none.
        """
        found = [p for p in self.plans if p.fingerprint.get("arguments") == arguments and p.target == target]
        if found or len(self.plans) == 1:
            return [*self.plans, *found][-1]
        raise ValueError(
            f"None of the {len(self.plans)} stored plans is for these arguments on '{target}'. Stored are plans for "
            f"{self._signatures(arguments)}. Store one for them with --save."
        )

    def _signatures(self, arguments: str) -> str:
        """List the signatures by those arguments in which they differ from each other or from this one."""
        known = [arguments_in(p.fingerprint.get("arguments", "")) for p in self.plans]
        count = {len(each) for each in (*known, arguments_in(arguments))}
        places = range(max(count))
        if len(count) == 1:
            columns = list(zip(*known, arguments_in(arguments), strict=True))
            places = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        return "; ".join(f"({_told(each, places)}) on {p.target}" for each, p in zip(known, self.plans, strict=True))


def _told(arguments: list[str], places: Iterable[int]) -> str:
    shown = [f"argument {i}: {arguments[i]}" for i in list(places)[:_SHOWN] if i < len(arguments)]
    return ", ".join(shown) or f"{len(arguments)} arguments"


def _asked(fingerprint: Mapping[str, str]) -> list[str | None]:
    return [fingerprint.get(name) for name in ("target", "passes", "arguments", "shardings")]


def _agreement(plan: Mapping[str, str], call: Mapping[str, str]) -> tuple[int, int]:
    """Say how near a plan is to a call: fields that are equal, then arguments that are."""
    pairs = zip(arguments_in(plan.get("arguments", "")), arguments_in(call.get("arguments", "")), strict=False)
    return sum(plan.get(k) == v for k, v in call.items()), sum(a == b for a, b in pairs)
