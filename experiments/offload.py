"""Offload, compiled: what leaves the device's memory, and what of it the compiler really keeps on the host.

In: flags; reference steps as shapes. Out: a row for the plain step and one for the plan that sends the most to the
host, compiled ahead of time for the target; by how much temporaries fell, what the host holds instead, and the
difference, which is slices on their way. With fractions below 1 a row for each: the plan with the smallest predicted
peak in which this part of the tokens' products goes and the rest is made again; and one for the plan of `Remat` alone
with the smallest predicted peak. A table and a CSV file; exit code 1 where temporaries fell by less than the host
holds, slices of four layers allowed.

    python experiments/offload.py --steps=gpt2:scan --small --fractions=1,0.5
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

#: Slices on their way may be as much as so many layers hold.
LAYERS_IN_FLIGHT = 4
COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("row", "row"),
    _report.Column("recompute_flops", "repeated", "flops"),
    _report.Column("recompute_share", "of the step", "percent"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("host_temp_bytes", "on the host", "bytes"),
    _report.Column("fall_bytes", "fell by", "bytes"),
    _report.Column("in_flight_bytes", "in flight", "bytes"),
    _report.Column("in_flight_layers", "in layers", "number"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("seconds_added", "added, predicted", "seconds"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", ["gpt2:scan"], "Reference steps, as name or name:layers.")
    flags.DEFINE_bool("small", False, "Use the small forms.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_list(
        "fractions", ["1"], "Parts of the tokens to send, numbers or auto; below 1 the rest is made again."
    )
    flags.DEFINE_bool("kernels", False, "Take kernels of attention and losses in every planned row.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string(
        "larger_target", "tpu:v5p:1x1x1", "Where the plain step goes that is too large; empty: nowhere."
    )
    flags.DEFINE_string("out_dir", "out/offload", "Folder for rows and the CSV file.")


def plain_row(built: tuple, target: str, larger_target: str) -> dict[str, Any]:
    """Compile the plain step, for the larger target where it does not fit."""
    import memopt

    step, args, options = built
    memory, note = memopt.measure(step, *args, target=target, **options), ""
    if not memory.fits and larger_target:
        memory, note = memopt.measure(step, *args, target=larger_target, **options), f"compiled on {larger_target}"
    return {"row": "plain", "note": note} | _figures(memory)


def offload_row(built: tuple, target: str, least_bytes: int, fraction: float | str = 1.0) -> dict[str, Any]:
    """Compile the plan with the smallest predicted peak that `Offload` alone gives; of a fraction, one that repeats."""
    import memopt

    passes = [memopt.passes.Offload(fraction=fraction, least_bytes=least_bytes)]
    return _planned(built, target, passes, "offload" if fraction == 1.0 else f"fraction {fraction}", fraction != 1.0)


def remat_row(built: tuple, target: str) -> dict[str, Any]:
    """Compile the plan with the smallest predicted peak that `Remat` alone gives."""
    import memopt

    return _planned(built, target, [memopt.passes.Remat()], "remat", False)


def _planned(built: tuple, target: str, passes: list[Any], name: str, repeats: bool) -> dict[str, Any]:
    import memopt

    step, args, options = built
    if flags.FLAGS.kernels:
        passes = [memopt.passes.Kernels(), *passes]
    common = dict(target=target, passes=passes, verify=False, **options)
    points = memopt.optimize(step, budget="100%", **common).frontier(*args)
    points = [point for point in points if point.recompute_flops > 0] if repeats else points
    if not points:
        return {"row": name, "note": "no product is cut into rows"}
    least = min(points, key=lambda point: point.peak_bytes)
    planned = memopt.optimize(step, budget=least.peak_bytes, **common)
    memory = planned.measure(*args)
    plan = planned.plan(*args)
    note = next((text for text in plan.notes if text.startswith("Offload")), "")
    return {
        "row": name,
        "recompute_flops": plan.recompute_flops,
        "recompute_share": plan.recompute_flops / plan.baseline_flops,
        "cut": next((d.reason for d in plan.decisions if d.name.startswith("offload/rows")), ""),
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "seconds_added": least.seconds,
        "away": sum(d.value_bytes for d in plan.decisions if d.choice == "host"),
        "note": note,
    } | _figures(memory)


def compared(plain: dict[str, Any], row: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return a row with by how much temporaries fell, and what is missing to what the host holds."""
    if plain["temp_bytes"] is None or row.get("temp_bytes") is None or row["row"] == "remat":
        return row
    fall = plain["temp_bytes"] - row["temp_bytes"]
    flight = row["host_temp_bytes"] - (plain["host_temp_bytes"] or 0) - fall
    share = flight / (row["host_temp_bytes"] / layers) if row["host_temp_bytes"] else None
    return row | {"fall_bytes": fall, "in_flight_bytes": flight, "in_flight_layers": share}


def misses(row: dict[str, Any]) -> bool:
    """Say whether temporaries fell by less than the host holds, or whether nothing is there."""
    layers = row.get("in_flight_layers")
    return not row.get("host_temp_bytes") or layers is None or layers > LAYERS_IN_FLIGHT


def _figures(memory: Any) -> dict[str, Any]:
    keys = ("argument_bytes", "temp_bytes", "host_temp_bytes", "peak_bytes", "xla_remat_ops", "compile_seconds")
    return {key: getattr(memory, key) for key in keys}


def main(argv: Sequence[str]) -> int:
    """Compile every row that is not there yet, then print and write all."""
    from memopt.models import steps

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    folder, rows = pathlib.Path(values.out_dir), []
    form = "tiny" if values.tiny else "small" if values.small else "full"
    settings = {
        "form": form,
        "target": values.target,
        "kernels": values.kernels,
        "made with": _report.environment(commit=False),
    }
    cache = _report.Cache(folder / "rows.json", settings)
    for name in values.steps:
        family, _, layers = name.partition(":")
        size = {"small": values.small, "tiny": values.tiny}
        built = steps.reference_step(family, layers=layers or None, **size)
        kind = steps.FAMILIES[family]
        depth = (kind.tiny if values.tiny else kind.small if values.small else kind.full).layers
        makers = {
            "plain": lambda b=built: plain_row(b, values.target, values.larger_target),
        }
        least = 1 << (10 if values.tiny else 20)
        for text in values.fractions:
            part = text if text == "auto" else float(text)
            name_of = "offload" if part == 1.0 else f"fraction {part}"
            makers[name_of] = lambda b=built, least=least, part=part: offload_row(b, values.target, least, part)
        if values.fractions != ["1"]:
            makers["remat"] = lambda b=built: remat_row(b, values.target)
        found = {}
        for row, make in makers.items():
            if cache.get(f"{name}|{row}") is None:
                _report.console().print(f"{name}: {row} ...")
                cache.put(f"{name}|{row}", {"step": name} | make())
            found[row] = cache.get(f"{name}|{row}")
        rows += [row if name == "plain" else compared(found["plain"], row, depth) for name, row in found.items()]
        _report.write_csv(folder / "offload.csv", rows)
    _report.print_table(COLUMNS, rows, f"Residuals on the host, compiled for {values.target}, {form} forms")
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    return 1 if any(misses(row) for row in rows if row["row"] not in ("plain", "remat")) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
