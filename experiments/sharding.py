"""Memory per device of sharded steps, by strategy: the compiler's figures for TPU meshes, from shapes alone.

For each case (a Llama on a mesh) and each strategy the step is planned with the default passes and `Shard`, compiled
for all devices of the target, and put into a table: parameters and state per device against their total over the
devices, the compiled peak, the prediction, and what the collectives send. Rows that are finished are kept in the
output folder and not made again. No TPU is needed and nothing runs.

    python experiments/sharding.py --cases=llama_8b:v5e:4x4 --strategies=zero3,zero3+tensor
"""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Sequence
from typing import Any

import _report
import _sharded
from absl import app, flags

CASES = ("llama_8b:v5e:4x4", "llama_8b:v5p:2x2x1", "llama_70b:v5p:4x4x4")
#: Which plan is compiled. By the budget, meshes have plans of their own; the other two compare them under one plan:
#: nothing is repeated (the first rung that is rewritten; with `--passes=shard` no kernel is in it but attention over a
#: split sequence), or as much as saves anything is.
PLANS = ("budget", "nothing_repeated", "least")
COLUMNS = (
    _report.Column("case", "step and mesh"),
    _report.Column("strategy", "strategy"),
    _report.Column("chosen", "chosen"),
    _report.Column("mesh", "mesh"),
    _report.Column("state_bytes", "state", "bytes"),
    _report.Column("state_ratio", "of total / devices", "number"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("limit_bytes", "limit", "bytes"),
    _report.Column("recompute_share", "recomputed", "percent"),
    _report.Column("predicted_collective_seconds", "collectives, predicted", "seconds"),
    _report.Column("collective_seconds", "of those compiled", "seconds"),
    _report.Column("sent_bytes", "sent", "bytes"),
    _report.Column("planning_seconds", "planning", "seconds"),
    _report.Column("compile_seconds", "compiling", "seconds"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("cases", list(CASES), "Steps and meshes, as model:kind:topology.")
    flags.DEFINE_list("strategies", ["zero3", "zero3+tensor"], "Strategies of memopt.passes.Shard.")
    flags.DEFINE_integer("model_ways", 4, "Devices along the second axis, where a strategy needs one.")
    flags.DEFINE_integer("length", 2048, "Tokens of one sequence.")
    flags.DEFINE_integer("layers", None, "Layers; None for the model's own.")
    flags.DEFINE_enum("attention", "ring", ["ring", "ulysses", "gather"], "Attention over a split sequence.")
    flags.DEFINE_integer("batch", None, "Sequences in all; None for one on each device along the data axis.")
    flags.DEFINE_string("budget", None, "Budget per device; None for the compiler's limit.")
    flags.DEFINE_enum("passes", "default", ["default", "shard"], "Passes beside Shard: the default ones, or none.")
    flags.DEFINE_enum("plan", "budget", list(PLANS), "The plan: by the budget, or one that is the same on every mesh.")
    flags.DEFINE_bool("compile", True, "Compile, else predict alone.")
    flags.DEFINE_string("out_dir", "out/sharding", "Folder for the CSV file.")


def row_of(case: str, strategy: str, options: Any) -> dict[str, Any]:
    """Return the figures of one step on one mesh under one strategy."""
    import memopt

    model, _, topology = case.partition(":")
    target = f"tpu:{topology}"
    mesh = _sharded.mesh_of(target, strategy, options.model_ways)
    batch = options.batch or _sharded.rows_of(mesh)
    step, args, jit_options = _sharded.step_of(model, batch, options.length, options.layers)
    shard = memopt.passes.Shard(mesh, strategy=strategy, attention=options.attention)
    passes = [shard] if options.passes == "shard" else [*memopt.passes.default(), shard]
    settings = {"passes": passes, "target": target, **jit_options}
    planned = memopt.optimize(step, budget=options.budget, **settings)
    if options.plan != "budget":
        planned = memopt.optimize(step, plan=held_plan(planned.plans(*args), options.plan), **settings)
    row: dict[str, Any] = {"case": case, "strategy": strategy, "mesh": "x".join(map(str, mesh.devices.shape))}
    row["tokens"] = batch * options.length
    try:
        compiled = planned.lower(*args).compile() if options.compile else None
        plan = planned.plan(*args)
    except memopt.BudgetError as error:
        return row | {"note": f"no plan fits: {error.smallest_peak_bytes} bytes at least"}
    except ValueError as error:
        return row | {"note": f"cannot apply: {error}"}
    row |= {"predicted_peak_bytes": plan.predicted_peak_bytes, "planning_seconds": plan.planning_seconds}
    row["recompute_share"] = plan.recompute_flops / plan.baseline_flops
    held, total = _sharded.state_bytes(args[0], planned.shardings(*args)[0][0])
    row |= {"state_bytes": held, "state_ratio": held * mesh.size / total}
    searched = [d for d in plan.decisions if d.name.startswith("shard/auto/")]
    for one in searched:
        print(f"  {one.name.removeprefix('shard/auto/')}: {one.choice}, {one.reason}", flush=True)
    row["chosen"] = searched[0].name.removeprefix("shard/auto/") if searched else strategy
    row |= _sharded.predicted_sends(plan)
    return row if compiled is None else row | compiled_figures(planned, compiled, args, target)


def held_plan(plans: Sequence[Any], which: str) -> Any:
    """Return the plan of a frontier that is compared over meshes.

    Args:
      plans: of `Optimized.plans`, the step as written first.
      which: `"least"`, the smallest predicted peak, or `"nothing_repeated"`, the least time of those that are sharded.
    """
    if which == "least":
        return min(plans, key=lambda plan: plan.predicted_peak_bytes)
    return min(plans[1:], key=lambda plan: (plan.predicted_overhead, plan.predicted_peak_bytes))


def compiled_figures(planned: Any, compiled: Any, args: Any, target: str) -> dict[str, Any]:
    """Return the compiler's figures of a step."""
    import memopt

    memory = planned.measure(*args)
    names = ("argument_bytes", "temp_bytes", "peak_bytes", "limit_bytes", "compile_seconds", "xla_remat_ops")
    figures = {name: getattr(memory, name) for name in names}
    return figures | _sharded.compiled_sends(memopt.collectives(compiled), target)


def main(_: Any) -> None:
    """Measure every case under every strategy."""
    options = flags.FLAGS
    folder = pathlib.Path(options.out_dir)
    names = ("model_ways", "length", "layers", "attention", "batch", "budget", "passes", "plan", "compile")
    settings = {name: getattr(options, name) for name in names} | {"environment": _report.environment(commit=False)}
    cache = _report.Cache(folder / "rows.json", settings)
    rows = []
    for case in options.cases:
        for strategy in options.strategies:
            row = cache.get(f"{case} {strategy}") or row_of(case, strategy, options)
            cache.put(f"{case} {strategy}", row)
            rows.append(row)
            print(rows[-1], flush=True)
            _report.write_csv(folder / "sharding.csv", rows)
            gc.collect()
    _report.print_table(COLUMNS, rows, f"Sharded steps, per device ({_report.environment()})")


if __name__ == "__main__":
    define_flags()
    app.run(main)
