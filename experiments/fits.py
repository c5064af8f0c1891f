"""Steps that plain jit cannot compile for a 16 GB chip: do they fit with the decorator's defaults and nothing else?

In: flags; the full reference steps, as shapes. Out: for each step the plain verdict of the compiler and the figures of
`memopt.optimize(target=..., donate_argnums=...)` with no budget named (the device's own limit), a table and a CSV file;
exit code 1 where one does not fit.

    python experiments/fits.py --steps=gpt2:scan
"""

import gc
import pathlib
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

STEPS = ("gpt2:scan", "llama_1b:scan")
COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("plain", "plain jit"),
    _report.Column("plain_peak_bytes", "plain peak", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("limit_bytes", "limit", "bytes"),
    _report.Column("recompute_flops", "recomputed", "flops"),
    _report.Column("recompute_share", "of the step", "percent"),
    _report.Column("planning_seconds", "planning", "seconds"),
    _report.Column("xla_remat_ops", "repeated by XLA", "number"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", list(STEPS), "Reference steps, as name or name:layers.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string("out_dir", "out/fits", "Folder for the CSV file.")


def row_of(name: str, target: str, tiny: bool) -> dict[str, Any]:
    """Return the figures of one step, plain and decorated."""
    import memopt
    from memopt.models import steps

    family, _, layers = name.partition(":")
    step, args, options = steps.reference_step(family, layers=layers or None, tiny=tiny)
    plain = memopt.measure(step, *args, target=target, **options)
    row = {"step": name, "plain": "fits" if plain.fits else "out of memory", "plain_peak_bytes": plain.peak_bytes}
    row["limit_bytes"] = plain.limit_bytes
    optimized = memopt.optimize(step, target=target, **options)
    try:
        optimized.lower(*args).compile()
    except memopt.BudgetError as error:
        return row | {"plain": f"{row['plain']}; no plan fits: {error.smallest_peak_bytes} bytes at least"}
    memory, plan = optimized.measure(*args), optimized.plan(*args)
    return row | {
        "peak_bytes": memory.peak_bytes,
        "xla_remat_ops": memory.xla_remat_ops,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "recompute_flops": plan.recompute_flops,
        "recompute_share": plan.recompute_flops / plan.baseline_flops if plan.baseline_flops else 0.0,
        "planning_seconds": plan.planning_seconds,
    }


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name every step that does not fit the device."""
    return [
        f"{row['step']} does not fit {_report.format_bytes(row['limit_bytes'])}"
        for row in rows
        if row.get("peak_bytes") is None or row["limit_bytes"] is None or row["peak_bytes"] > row["limit_bytes"]
    ]


def main(argv: Sequence[str]) -> int:
    """Compile each step twice and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    for name in values.steps:
        rows.append(row_of(name, values.target, values.tiny))
        gc.collect()
        _report.write_csv(pathlib.Path(values.out_dir) / "fits.csv", rows)
    _report.print_table(COLUMNS, rows, f"Compiled for {values.target}, no budget named", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
