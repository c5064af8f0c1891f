"""Predicted memory per device and planning time of `Shard(strategy="auto")`, from 1 device to 512.

For each number of devices a Llama is planned on a torus of that many v5p chips, one sequence on each device, with the
default passes and the state donated: the chosen strategy, parameters and state per device, the predicted peak of the
chosen plan and the smallest one, and how long the whole search took. Without a named budget the planner spends what the
device has; the smallest peak says what it could have done without. Nothing is compiled: these peaks are predictions.

    python experiments/sharding_devices.py --model=llama_8b --devices=1,8,64,512
"""

from __future__ import annotations

import gc
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import _report
import _sharded
from absl import app, flags

TOPOLOGIES = {
    1: "1x1x1",
    2: "2x1x1",
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
LIMIT_SECONDS = 30.0
COLUMNS = (
    _report.Column("devices", "devices", "number"),
    _report.Column("chosen", "chosen"),
    _report.Column("state_bytes", "state", "bytes"),
    _report.Column("state_ratio", "of total / devices", "number"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("least_peak_bytes", "smallest predicted", "bytes"),
    _report.Column("predicted_collective_seconds", "collectives, predicted", "seconds"),
    _report.Column("recompute_share", "recomputed", "percent"),
    _report.Column("planning_seconds", "planning", "seconds"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_string("model", "llama_8b", "The step: llama_1b, llama_8b or llama_70b.")
    flags.DEFINE_list("devices", list(map(str, TOPOLOGIES)), f"Numbers of devices, of {list(TOPOLOGIES)}.")
    flags.DEFINE_string("kind", "v5p", "TPU kind, one whose chips form a cube.")
    flags.DEFINE_integer("length", 2048, "Tokens of one sequence.")
    flags.DEFINE_string("strategy", "auto", "Strategy of memopt.passes.Shard.")
    flags.DEFINE_string("out_dir", "out/sharding_devices", "Folder for CSV file and picture.")


def row_of(devices: int, options: Any) -> dict[str, Any]:
    """Return the figures of one number of devices."""
    import memopt

    target = f"tpu:{options.kind}:{TOPOLOGIES[devices]}"
    step, args, jit_options = _sharded.step_of(options.model, devices, options.length)
    passes = list(memopt.passes.default())
    if devices > 1:
        mesh = memopt.mesh(target, (devices,), ("data",))
        passes.append(memopt.passes.Shard(mesh, strategy=options.strategy))
    planned = memopt.optimize(step, passes=passes, target=target, **jit_options)
    row: dict[str, Any] = {"devices": devices, "target": target, "tokens": devices * options.length}
    try:
        plan = planned.plan(*args)
    except memopt.BudgetError as error:
        return row | {"note": f"no plan fits: {error.smallest_peak_bytes} bytes at least"}
    searched = next((d for d in plan.decisions if d.name.startswith("shard/auto/")), None)
    row["chosen"] = "one device" if devices == 1 else options.strategy
    if searched is not None:
        row["chosen"] = searched.name.removeprefix("shard/auto/")
    row["predicted_peak_bytes"], row["planning_seconds"] = plan.predicted_peak_bytes, plan.planning_seconds
    row["least_peak_bytes"] = min(point.peak_bytes for point in planned.frontier(*args))
    row["recompute_share"] = plan.recompute_flops / plan.baseline_flops
    places = planned.shardings(*args)[0][0] if devices > 1 else None
    held, total = _sharded.state_bytes(args[0], places)
    row |= {"state_bytes": held, "state_ratio": held * devices / total}
    return row | _sharded.predicted_sends(plan)


def gib_ticks(values: Iterable[float]) -> list[float]:
    """Return the powers of two around some values, at most nine of them, evenly spaced on a log axis."""
    values = [math.log2(value) for value in values]
    low, high = math.floor(min(values)), math.ceil(max(values))
    step = max(1, math.ceil((high - low) / 8))
    return [2.0**power for power in range(low, high + step, step)]


def draw(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Draw bytes per device and planning seconds over the number of devices."""
    rows = [row for row in rows if "predicted_peak_bytes" in row]
    counts = [row["devices"] for row in rows]
    with _report.figure(path, columns=2, size=(10.0, 4.2)) as (drawing, (left, right)):
        lines = (
            ("predicted_peak_bytes", "chosen plan"),
            ("least_peak_bytes", "smallest plan"),
            ("state_bytes", "parameters and state"),
        )
        for (key, label), color in zip(lines, _report.COLORS, strict=False):
            left.plot(counts, [row[key] / _report.GIB for row in rows], "o-", color=color, label=label)
        right.plot(counts, [row["planning_seconds"] for row in rows], "o-", color=_report.COLORS[0])
        right.axhline(LIMIT_SECONDS, color=_report.COLORS[6], linestyle="--", label="asked at 512")
        left.set(xscale="log", yscale="log", xlabel="devices", ylabel="GiB per device, predicted")
        right.set(xscale="log", ylim=(0, None), xlabel="devices", ylabel="planning, seconds")
        for axes in (left, right):
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
            axes.legend(loc="lower left")
        ticks = gib_ticks(row[key] / _report.GIB for row in rows for key, _ in lines)
        left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        left.set_ylim(ticks[0], ticks[-1])
        drawing.suptitle(title)


def main(_: Any) -> None:
    """Plan for every number of devices; exit code 1 where planning for 512 takes too long."""
    options = flags.FLAGS
    folder, rows = pathlib.Path(options.out_dir), []
    for devices in map(int, options.devices):
        rows.append(row_of(devices, options))
        print(rows[-1], flush=True)
        _report.write_csv(folder / "devices.csv", rows)
        gc.collect()
    title = f"{options.model}, {options.strategy}, {options.length} tokens a device, {options.kind}"
    draw(rows, folder / "devices.png", title)
    _report.print_table(COLUMNS, rows, f"{title} ({_report.environment()})")
    for row in rows:
        if row["devices"] == 512 and row.get("planning_seconds", 0) > LIMIT_SECONDS:
            raise SystemExit(f"Planning for 512 devices took {row['planning_seconds']:.1f} s, over {LIMIT_SECONDS} s.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
