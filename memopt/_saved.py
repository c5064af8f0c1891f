"""The reading desk: the data of a saved plan, checked before anything is built from it.

In: what JSON gave, and later the numbers of the step that a plan is applied to. Out: the fields of a plan, of the types
that it has, or a `ValueError` that names the field and the remedy. Files come from other versions and other hands:
nothing here trusts them. It knows no planner and applies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FORMAT = 2
_REMEDY = "Plan again, and save that plan."


def plan_fields(data: Any, wanted: frozenset[str]) -> dict[str, Any]:
    """Return the fields of a saved plan in the types that it holds them in.

    Args:
      data: a JSON object as `Plan.to_json` writes it, parsed.
      wanted: the names of all fields.

    Raises:
      ValueError: it is no plan, one of another format, or a field is missing, unknown or no such thing.
    """
    if not isinstance(data, dict) or "memopt_plan" not in data:
        several = isinstance(data, dict) and "memopt_plans" in data
        raise ValueError(
            "This file holds plans of several signatures: read it with memopt.Plans.from_json()."
            if several
            else "This is no saved memopt plan: save one with Plan.to_json()."
        )
    if data["memopt_plan"] != FORMAT:
        raise ValueError(f"This saved plan has format {data['memopt_plan']!r}, and memopt reads {FORMAT}. {_REMEDY}")
    fields = {**_LATER, **{key: value for key, value in data.items() if key != "memopt_plan"}}
    for name in sorted(wanted ^ set(fields)):
        raise damaged(name, "is missing" if name in wanted else "is no field of a plan")
    return {name: _read(name, value) for name, value in fields.items()}


def damaged(field: str, what: str) -> ValueError:
    """Return the error for a field of a saved plan that cannot be."""
    return ValueError(f"The saved plan is damaged: {field!r} {what}. {_REMEDY}")


def check_numbers(
    repeats: Mapping[int, tuple[int, ...]],
    stores: Mapping[int, str],
    *,
    places: range,
    repeatable: Mapping[int, Any],
    forms: frozenset[tuple[int, str]],
    alone: int,
) -> None:
    """Make sure that the numbers of a plan mean something in this step.

    Args:
      repeats: time segment -> operations.
      stores: value -> form.
      places: the step's time segments.
      repeatable: the operations that a pass lets run again.
      forms: `(value, form)` of all that a pass lets be stored.
      alone: the number that may stand in place of a segment.

    Raises:
      ValueError: a segment, an operation or a stored value does not exist, or is none that a pass proposes.
    """
    for place, ops in repeats.items():
        if place not in places and place != alone:
            raise damaged("repeats", f"names time segment {place}, and this step has {len(places)}")
        for op in ops:
            if op not in repeatable:
                raise damaged("repeats", f"names operation {op}, which no pass lets run again in this step")
    for value, name in stores.items():
        if (value, name) not in forms:
            raise ValueError(f"The saved plan stores value {value} as {name!r}, which no pass proposes. {_REMEDY}")


def _read(name: str, value: Any) -> Any:
    test, what, convert = _FIELDS[name]
    if not test(value):
        raise damaged(name, f"is {_short(value)}, and has to be {what}")
    return convert(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(one, value))


def _is_table(one: Callable[[Any], bool], key: Callable[[str], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key(k) and one(v) for k, v in value.items())


def _is_written_count(key: str) -> bool:
    return key.removeprefix("-").isascii() and key.removeprefix("-").isdigit()


def _is_decision(value: Any) -> bool:
    texts = {"name", "module", "source", "choice", "reason"}
    # Plans saved before these are read too.
    later = {"stored_bytes": _is_count, "collective_seconds": _is_number, "error": _is_number}
    if not isinstance(value, dict) or value.keys() - later.keys() != texts | {"value_bytes"}:
        return False
    figures = _is_count(value["value_bytes"]) and all(
        value.get(name) is None or is_one(value[name]) for name, is_one in later.items()
    )
    return figures and all(_is_text(value[name]) for name in texts)


def _is_variant(value: Any) -> bool:
    if value == []:
        return True
    if not isinstance(value, list) or len(value) != 4:
        return False
    kind, path, *counts = value
    return kind in ("two_level", "divide", "rerun") and _is_list(_is_count)(path) and all(map(_is_count, counts))


def _same(value: Any) -> Any:
    return value


def _numbered(value: Mapping[str, Any]) -> dict[int, Any]:
    return {int(k): tuple(v) if isinstance(v, list) else v for k, v in value.items()}


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


_COUNT = (_is_count, "a whole number", _same)
_NUMBER = (_is_number, "a number", _same)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any], Any]]] = {
    "baseline_peak_bytes": _COUNT,
    "predicted_peak_bytes": _COUNT,
    "budget_bytes": (lambda value: value is None or _is_count(value), "a whole number or null", _same),
    "baseline_flops": _NUMBER,
    "recompute_flops": _NUMBER,
    "predicted_overhead": _NUMBER,
    "optimality_gap": _NUMBER,
    "planning_seconds": _NUMBER,
    "decisions": (_is_list(_is_decision), "a list of decisions", _same),
    "dropped": (_is_list(_is_decision), "a list of decisions", _same),
    "notes": (_is_list(_is_text), "a list of sentences", tuple),
    "target": (_is_text, "a text", _same),
    "fingerprint": (_is_table(_is_text, bool), "a table of texts", _same),
    "repeats": (_is_table(_is_list(_is_count), _is_written_count), "a table of lists of operations", _numbered),
    "stores": (_is_table(_is_text, _is_written_count), "a table of forms", _numbered),
    "predicted_error": (lambda value: value is None or _is_number(value), "a number or null", _same),
    "rewrites": (_is_list(_is_text), "a list of passes", tuple),
    "variant": (_is_variant, "empty or the kind, path, block and levels of a divided loop", _tupled),
}
_LATER: dict[str, Any] = {"dropped": [], "predicted_error": None}  # fields that plans saved before do not have
