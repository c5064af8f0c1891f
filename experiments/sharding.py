"""Memory per device of sharded steps, by strategy: the compiler's figures for TPU meshes, from shapes alone.

For each case (a Llama on a mesh) and each strategy the step is planned with the default passes and `Shard`, compiled
for all devices of the target, and put into a table: parameters and state per device against the total over the devices,
the compiled peak, the prediction, and what the collectives send. No TPU is needed and nothing runs.

    python experiments/sharding.py --cases=llama_8b:v5e:4x4 --strategies=zero3,zero3+tensor
"""

from __future__ import annotations

import gc
import math
import pathlib
from typing import Any

import _report
from absl import app, flags

CASES = ("llama_8b:v5e:4x4", "llama_8b:v5p:2x2x1", "llama_70b:v5p:4x4x4")
COLUMNS = (
    _report.Column("case", "step and mesh"),
    _report.Column("strategy", "strategy"),
    _report.Column("chosen", "chosen"),
    _report.Column("mesh", "mesh"),
    _report.Column("state_share_bytes", "state / devices", "bytes"),
    _report.Column("argument_bytes", "arguments", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("limit_bytes", "limit", "bytes"),
    _report.Column("recompute_share", "recomputed", "percent"),
    _report.Column("sent_bytes", "sent by collectives", "bytes"),
    _report.Column("planning_seconds", "planning", "seconds"),
    _report.Column("compile_seconds", "compiling", "seconds"),
    _report.Column("note", "note"),
)
_FIELDS = ("vocabulary", "width", "heads", "kv_heads", "hidden")


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("cases", list(CASES), "Steps and meshes, as model:kind:topology.")
    flags.DEFINE_list("strategies", ["zero3", "zero3+tensor"], "Strategies of memopt.passes.Shard.")
    flags.DEFINE_integer("model_ways", 4, "Devices along the second axis, where a strategy needs one.")
    flags.DEFINE_integer("length", 2048, "Tokens of one sequence.")
    flags.DEFINE_enum("attention", "ring", ["ring", "ulysses", "gather"], "Attention over a split sequence.")
    flags.DEFINE_integer("batch", None, "Sequences in all; None for one on each device along the data axis.")
    flags.DEFINE_string("budget", None, "Budget per device; None for the compiler's limit.")
    flags.DEFINE_bool("compile", True, "Compile, else predict alone.")
    flags.DEFINE_string("out_dir", "out/sharding", "Folder for the CSV file.")


def step_of(model: str, batch: int, length: int) -> Any:
    """Return a Llama's step, the shapes of its arguments and its options."""
    from memopt.models import llama, steps

    config = {"llama_1b": llama.LLAMA_1B_UNTIED, "llama_8b": llama.LLAMA_8B, "llama_70b": llama.LLAMA_70B}[model]
    sizes = {name: getattr(config, name) for name in _FIELDS}
    return steps.reference_step("llama_1b", batch=batch, length=length, depth=config.layers, **sizes)


def mesh_of(target: str, strategy: str, second_ways: int) -> Any:
    """Return a mesh with one axis, or with a second one for the part of the strategy that splits values."""
    import memopt

    ways = devices_of(target)
    second = next((part for part in ("context", "tensor", "sequence") if part in strategy), None)
    if second is None:
        return memopt.mesh(target, (ways,), ("data",))
    inner = min(second_ways, ways)
    return memopt.mesh(target, (ways // inner, inner), ("data", "context" if second == "context" else "model"))


def devices_of(target: str) -> int:
    """Return the JAX devices of a TPU target: a chip of v4 and 7x is two."""
    _, kind, topology = target.split(":")
    return math.prod(map(int, topology.split("x"))) * (2 if kind in ("v4", "tpu7x") else 1)


def row_of(case: str, strategy: str, options: Any) -> dict[str, Any]:
    """Return the figures of one step on one mesh under one strategy."""
    import jax

    import memopt

    model, _, topology = case.partition(":")
    target = f"tpu:{topology}"
    mesh = mesh_of(target, strategy, options.model_ways)
    batch = options.batch or mesh.devices.shape[0]
    step, args, jit_options = step_of(model, batch, options.length)
    shard = memopt.passes.Shard(mesh, strategy=strategy, attention=options.attention)
    passes = [*memopt.passes.default(), shard]
    planned = memopt.optimize(step, passes=passes, target=target, budget=options.budget, **jit_options)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[0]))
    row: dict[str, Any] = {"case": case, "strategy": strategy, "mesh": "x".join(map(str, mesh.devices.shape))}
    row["state_share_bytes"] = total // mesh.size
    try:
        compiled = planned.lower(*args).compile() if options.compile else None
        plan = planned.plan(*args)
    except memopt.BudgetError as error:
        return row | {"note": f"no plan fits: {error.smallest_peak_bytes} bytes at least"}
    row |= {"predicted_peak_bytes": plan.predicted_peak_bytes, "planning_seconds": plan.planning_seconds}
    row["recompute_share"] = plan.recompute_flops / plan.baseline_flops
    searched = [d for d in plan.decisions if d.name.startswith("shard/auto/")]
    for one in searched:
        print(f"  {one.name.removeprefix('shard/auto/')}: {one.choice}, {one.reason}", flush=True)
    row["chosen"] = searched[0].name.removeprefix("shard/auto/") if searched else strategy
    return row if compiled is None else row | compiled_figures(planned, compiled, args)


def compiled_figures(planned: Any, compiled: Any, args: Any) -> dict[str, Any]:
    """Return the compiler's figures of a step."""
    import memopt

    memory = planned.measure(*args)
    names = ("argument_bytes", "temp_bytes", "peak_bytes", "limit_bytes", "compile_seconds", "xla_remat_ops")
    sent = memopt.collectives(compiled)
    figures = {name: getattr(memory, name) for name in names} | {"sent_bytes": sum(one.sent_bytes for one in sent)}
    for kind in sorted({one.kind for one in sent}):
        figures[f"{kind}_bytes"] = sum(one.sent_bytes for one in sent if one.kind == kind)
        figures[f"{kind}_count"] = sum(one.times for one in sent if one.kind == kind)
    return figures


def main(_: Any) -> None:
    """Measure every case under every strategy."""
    options = flags.FLAGS
    rows = []
    for case in options.cases:
        for strategy in options.strategies:
            rows.append(row_of(case, strategy, options))
            print(rows[-1], flush=True)
            _report.write_csv(pathlib.Path(options.out_dir) / "sharding.csv", rows)
            gc.collect()
    _report.print_table(COLUMNS, rows, f"Sharded steps, per device ({_report.environment()})")


if __name__ == "__main__":
    define_flags()
    app.run(main)
