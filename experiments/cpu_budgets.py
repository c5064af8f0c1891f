"""What budgets do to a process: real peak memory and step time of one training run, budget by budget, on the CPU.

In: flags of `train_lm.py`, whose runs these are, and a list of shares. Out: a row for the plain step and one for each
budget, each run in a process of its own: the compiler's bytes, the process's peak resident memory, the step's time
against the plain one's in turn, and the time that the plan predicted; a table, a CSV file and a picture. Exit code 1
where the resident peak does not fall with the budget, or a step takes over 15 points more than was predicted.

    python experiments/cpu_budgets.py --steps=6
"""

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import _report
import train_lm
from absl import app, flags

POINTS = 0.15  # how much more time a step may take than predicted, as a fraction of the plain step's
RSS_SLACK = 1.01
COLUMNS = (
    _report.Column("row", "temporaries allowed"),
    _report.Column("budget_bytes", "budget", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("rss_peak_bytes", "process peak", "bytes"),
    _report.Column("step_ratio", "step time", "number"),
    _report.Column("predicted_ratio", "predicted", "number"),
    _report.Column("recompute_share", "FLOPs repeated", "percent"),
)


def define_flags() -> None:
    """Define the flags beside those of `train_lm.py`; called when this file runs as a script, never at import."""
    train_lm.define_flags()
    flags.DEFINE_list("fractions", ["0.7", "0.4", "0.25"], "Budgets: arguments, outputs, this share of temporaries.")
    flags.FLAGS.set_default("out_dir", "out/cpu_budgets")
    flags.FLAGS.set_default("steps", 6)


def run(settings: train_lm.Settings, role: str, budget_bytes: int | None = None) -> dict[str, Any]:
    """Train in a process of its own and return its figures.

    Raises:
        RuntimeError: the run failed; its message is on the terminal.
    """
    pathlib.Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
    extra = [f"--{field.name}={getattr(settings, field.name)}" for field in dataclasses.fields(settings)]
    extra += [] if budget_bytes is None else [f"--budget_bytes={budget_bytes}"]
    figures = train_lm.spawn(settings, role, extra, own_flags=False)
    if figures is None:
        raise RuntimeError(f"the run in {settings.out_dir} failed")
    return figures


def row_of(name: str, figures: dict[str, Any], plain: dict[str, Any], budget_bytes: int | None) -> dict[str, Any]:
    """Return one row; times are medians without the first step, which compiles."""
    plan = figures.get("plan", {})
    seconds, base = (statistics.median(f["step_seconds"][1:]) for f in (figures, plain))
    return {
        "row": name,
        "budget_bytes": budget_bytes,
        "peak_bytes": figures["memory"]["peak_bytes"],
        "predicted_peak_bytes": plan.get("predicted_peak_bytes", figures["predicted_peak_bytes"]),
        "rss_peak_bytes": figures["rss_peak_bytes"],
        "step_ratio": seconds / base,
        "predicted_ratio": 1 + plan.get("predicted_overhead", 0.0),
        "recompute_share": plan.get("recompute_flops", 0.0) / max(plan.get("baseline_flops", 1.0), 1.0),
    }


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one sentence for each promise that a row breaks; the rows stand from the largest budget down."""
    found = []
    for larger, smaller in zip(rows, rows[1:], strict=False):
        if smaller["rss_peak_bytes"] > RSS_SLACK * larger["rss_peak_bytes"]:
            found.append(f"{smaller['row']}: the process took more memory than at {larger['row']}.")
    for row in rows:
        if row["step_ratio"] > row["predicted_ratio"] + POINTS:
            texts = f"{row['step_ratio']:.2f}", f"{row['predicted_ratio']:.2f}"
            found.append(f"{row['row']}: a step took {texts[0]} of the plain one's time, predicted were {texts[1]}.")
    return found


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw compiled and resident peaks, and the step's time, for each budget."""
    names = [row["row"] for row in rows]
    with _report.figure(path, columns=2, size=(11, 4.4)) as (_, (left, right)):
        for key, label, color in (("peak_bytes", "compiled peak", 0), ("rss_peak_bytes", "process peak", 1)):
            left.plot(names, [row[key] / _report.MIB for row in rows], "o-", label=label, color=_report.COLORS[color])
        for key, label, color in (("step_ratio", "measured", 1), ("predicted_ratio", "predicted", 0)):
            right.plot(names, [row[key] for row in rows], "o-", label=label, color=_report.COLORS[color])
        left.set(title="Memory", xlabel="budget", ylabel="MiB", ylim=(0, None))
        right.set(title="Step time", xlabel="budget", ylabel="of the plain step's", ylim=(0, None))
        left.legend()
        right.legend()


def main(argv: Sequence[str]) -> int:
    """Run the plain step and every budget, then print, write and judge all."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    names = [field.name for field in dataclasses.fields(train_lm.Settings)]
    settings = train_lm.Settings(**{name: values[name].value for name in names})
    folder = pathlib.Path(settings.out_dir)
    plain = run(dataclasses.replace(settings, out_dir=str(folder / "plain")), "plain")
    rows = [row_of("plain", plain, plain, None)]
    for fraction in values.fractions:
        budget_bytes = train_lm.budget_of(plain, float(fraction))
        figures = run(dataclasses.replace(settings, out_dir=str(folder / fraction)), "memopt", budget_bytes)
        rows.append(row_of(f"{float(fraction):.0%}", figures, plain, budget_bytes))
    _report.print_table(COLUMNS, rows, "One training run under budgets, on the CPU")
    _report.write_csv(folder / "cpu_budgets.csv", rows)
    draw(folder / "cpu_budgets.png", rows)
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    found = problems(rows)
    for sentence in found:
        print(f"MISSED: {sentence}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
