"""Check: stored memory figures, written once and compared in a user's CI.

Figures (`Memory`) or plans come in; a JSON text, or a verdict with its reason, goes out. Files are read and written by
the command, compiling and planning happen elsewhere.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import jax

from memopt._bytes import format_bytes
from memopt._measure import Memory

FORMAT = "memopt figures 1"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison: whether memory grew beyond the tolerance, and the sentences that say so."""

    grew: bool
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def figures_to_json(memory: Memory) -> str:
    """Write figures down as JSON, with the JAX version that they were made with.

    Args:
        memory: what `memopt.measure` returned.

    Returns:
        JSON text; the compile time is left out, so that the text is the same on every machine.
    """
    figures = dataclasses.asdict(memory) | {"compile_seconds": None, "unused_donations": list(memory.unused_donations)}
    return json.dumps({"format": FORMAT, "jax_version": jax.__version__, "memory": figures}, indent=2) + "\n"


def is_figures(text: str) -> bool:
    """Tell whether a JSON text was written by `figures_to_json`; other files are taken for stored plans.

    Raises:
        ValueError: the text is no JSON.
    """
    try:
        stored = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The stored file is no JSON ({error}). Write it again with --save.") from error
    return isinstance(stored, dict) and stored.get("format") == FORMAT


def figures_from_json(text: str) -> tuple[Memory, str]:
    """Read figures back.

    Args:
        text: from `figures_to_json`.

    Returns:
        The figures, and the JAX version that they were made with.

    Raises:
        ValueError: fields are missing or unknown.
    """
    stored = json.loads(text)
    try:
        figures: dict[str, Any] = dict(stored["memory"])
        figures["unused_donations"] = tuple(figures["unused_donations"])
        return Memory(**figures), stored["jax_version"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"The stored figures are damaged ({error}). Write them again with --save.") from error


def compare_figures(text: str, memory: Memory, tolerance: float) -> Verdict:
    """Compare new figures with stored ones.

    Args:
        text: from `figures_to_json`.
        memory: the new figures.
        tolerance: growth of the peak that is let pass, as a fraction: 0.01 is 1 %.

    Returns:
        A verdict; `grew` is true where the peak grew by more, or the step fitted and fits no longer.

    Raises:
        ValueError: the stored figures are for another target, or damaged.
    """
    stored, version = figures_from_json(text)
    if stored.target != memory.target:
        raise ValueError(
            f"The stored figures are for target '{stored.target}', the new ones for '{memory.target}'. "
            f"Give --target {stored.target}, or store figures for this one with --save."
        )
    names = ("peak_bytes", "temp_bytes", "argument_bytes", "output_bytes", "alias_bytes", "host_temp_bytes")
    lines = [f"target {memory.target}"]
    lines += [_row(name, getattr(stored, name), getattr(memory, name)) for name in names]
    grew = _grew(stored.peak_bytes, memory.peak_bytes, tolerance) or (stored.fits and not memory.fits)
    if version != jax.__version__:
        lines.append(f"The figures were stored with JAX {version}, this is {jax.__version__}.")
    return Verdict(grew, (*lines, _sentence("Compiled peak", grew, tolerance)))


def compare_plans(stored: Any, plan: Any, tolerance: float) -> Verdict:
    """Compare the predictions of a new plan with those of a stored one; nothing is compiled.

    Args:
        stored, plan: with `baseline_peak_bytes` and `predicted_peak_bytes`, as `memopt.Plan`.
        tolerance: as in `compare_figures`.

    Returns:
        A verdict; `grew` is true where the plain step's peak or the planned one grew by more.
    """
    names = ("baseline_peak_bytes", "predicted_peak_bytes")
    pairs = [(getattr(stored, name), getattr(plan, name)) for name in names]
    grew = any(_grew(before, after, tolerance) for before, after in pairs)
    rows = [_row(name, *pair) for name, pair in zip(names, pairs, strict=True)]
    return Verdict(grew, (*rows, _sentence("Predicted peak", grew, tolerance)))


def _grew(before: int | None, after: int | None, tolerance: float) -> bool:
    if before is None or after is None:
        return before is not None
    return after > before * (1 + tolerance)


def _row(name: str, before: int | None, after: int | None) -> str:
    change = f"{(after - before) / before:+.1%}" if before and after is not None else ""
    label = name.removesuffix("_bytes").replace("_", " ")
    return f"  {label:<18}{format_bytes(before):>12} -> {format_bytes(after):>12}  {change}".rstrip()


def _sentence(what: str, grew: bool, tolerance: float) -> str:
    return f"{what} {'grew' if grew else 'did not grow'} by more than {100 * tolerance:.4g} % of what was stored."
