"""What do kernels leave of a training step's memory? The planner's plans beside `jax.checkpoint` on every block.

In: flags; reference steps, as shapes. Out: for each step the compiler's temporaries without the gradient tree, and the
repeated FLOPs: full remat of each block, plans within the peak that half of its temporaries (gradients apart) would
give, and a long sequence on one chip; a table, a CSV file and a picture. Exit code 1 where a plan holds more than half
of what full remat does, repeats as much, or does not fit.

    python experiments/kernels.py --steps=gpt2 --small
"""

import functools
import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import _report
from absl import app, flags

COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("row", "row"),
    _report.Column("budget_bytes", "budget", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("predicted_peak_bytes", "predicted", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("beyond_bytes", "beyond gradients", "bytes"),
    _report.Column("share", "of full remat's", "percent"),
    _report.Column("recompute_share", "repeated, of the step", "percent"),
    _report.Column("rewrites", "kernels"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", ["gpt2", "llama_1b"], "Reference steps; their layers are a scan.")
    flags.DEFINE_list("long", ["llama_1b:16384"], "Steps as name:length that have to fit the target.")
    flags.DEFINE_bool("small", False, "Use the small forms.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_float("share", 0.5, "How much of full remat's temporaries beyond the gradients a plan may hold.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string("out_dir", "out/kernels", "Folder for the CSV file and the picture.")


def _build(name: str, form: dict[str, Any], **more: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    from memopt.models import steps

    return steps.reference_step(name, layers="scan", **form, **more)


def _flops(step: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> float:
    import jax
    from jax.interpreters import partial_eval

    import memopt

    closed = (step if hasattr(step, "plan") else jax.jit(step, **options)).trace(*args).jaxpr
    jaxpr = getattr(closed, "jaxpr", closed)
    return memopt.matmul_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def gradient_bytes(args: Sequence[Any]) -> int:
    """Return the bytes of a gradient tree: one array like each parameter."""
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[0].params))


def rows_of(name: str, target: str, share: float, form: dict[str, Any]) -> list[dict[str, Any]]:
    """Return full remat's figures and those of the default passes' plan that has to hold `share` of its temporaries."""
    step, args, options = _build(name, form)
    plain_flops, gradients = _flops(step, args, options), gradient_bytes(args)
    remat = _hand_row(name, target, gradients, plain_flops, form)
    budget = remat["peak_bytes"] - int((1 - share) * remat["beyond_bytes"])
    ours = _plan_row(name, target, budget, None, form, {})
    for row in (remat, ours):
        row["gradient_bytes"] = gradients
        if row.get("temp_bytes") is not None:
            row["beyond_bytes"] = row["temp_bytes"] - gradients
            row["share"] = row["beyond_bytes"] / remat["beyond_bytes"]
    return [remat, ours]


def _hand_row(name: str, target: str, gradients: int, plain_flops: float, form: dict[str, Any]) -> dict[str, Any]:
    import memopt

    step, args, options = _build(name, form, remat="nothing")
    memory = memopt.measure(step, *args, target=target, **options)
    repeated = (_flops(step, args, options) - plain_flops) / plain_flops
    figures = {"peak_bytes": memory.peak_bytes, "temp_bytes": memory.temp_bytes, "recompute_share": repeated}
    return {"step": name, "row": "full remat", "beyond_bytes": memory.temp_bytes - gradients} | figures


def _plan_row(
    name: str, target: str, budget: int | None, passes: Sequence[Any] | None, form: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Plan and compile a step within a budget, None for the target's own limit, and return its figures."""
    import memopt

    step, args, options = _build(name, form, **more)
    optimized = memopt.optimize(step, budget=budget, target=target, passes=passes, **options)
    row = {"step": name, "row": "memopt", "budget_bytes": budget}
    try:
        optimized.lower(*args).compile()
        memory = optimized.measure(*args)
    except memopt.BudgetError as error:
        return row | {"note": f"no plan fits: {_report.format_bytes(error.smallest_peak_bytes)} at least"}
    plan = optimized.plan(*args)
    return row | {
        "peak_bytes": memory.peak_bytes,
        "temp_bytes": memory.temp_bytes,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "recompute_share": plan.recompute_flops / plan.baseline_flops,
        "rewrites": ", ".join(plan.rewrites),
        "xla_remat_ops": memory.xla_remat_ops,
        "limit_bytes": memory.limit_bytes,
        "fits": memory.fits,
    }


def long_row(case: str, target: str, form: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a long sequence on one chip: the default passes, and `FuseUpdate` where it needs that."""
    import memopt

    name, _, length = case.partition(":")
    more = {"length": int(length)}
    row = _plan_row(name, target, None, None, form, more)
    if row.get("peak_bytes") is None:
        passes = [*memopt.passes.default(), memopt.passes.FuseUpdate()]
        row = _plan_row(name, target, None, passes, form, more)
        row["note"] = f"{row.get('note', '')} with FuseUpdate".strip()
    return row | {"step": case}


def misses(rows: Sequence[dict[str, Any]], share: float) -> list[str]:
    """Name every plan that holds or repeats more than it may, or that does not fit."""
    found = []
    hand = {row["step"]: row for row in rows if row["row"] == "full remat"}
    for row in (row for row in rows if row["row"] == "memopt"):
        rival = hand.get(row["step"])
        if row.get("peak_bytes") is None:
            found.append(f"{row['step']}: {row['note']}")
        elif rival and row["share"] > share:
            found.append(f"{row['step']}: {row['share']:.2f} of full remat's temporaries beyond the gradients")
        elif rival and row["recompute_share"] >= rival["recompute_share"]:
            found.append(
                f"{row['step']}: repeats {row['recompute_share']:.1%}, full remat {rival['recompute_share']:.1%}"
            )
    return found


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the temporaries beyond the gradients, full remat beside the plan."""
    pairs = [row for row in rows if row.get("share") is not None]
    names = list(dict.fromkeys(row["step"] for row in pairs))
    with _report.figure(path) as (_, axes):
        for offset, kind, color in ((-0.2, "full remat", 1), (0.2, "memopt", 0)):
            chosen = [row for row in pairs if row["row"] == kind]
            places = [names.index(row["step"]) + offset for row in chosen]
            heights = [row["beyond_bytes"] / _report.MIB for row in chosen]
            axes.bar(places, heights, width=0.38, label=kind, color=_report.COLORS[color])
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("temporaries beyond the gradients, MiB")
        axes.set_title("Full remat of each block, and plans with kernels")
        axes.legend()


def main(argv: Sequence[str]) -> int:
    """Compile every row and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out = flags.FLAGS, _report.console()
    form, folder, rows = {"small": values.small, "tiny": values.tiny}, pathlib.Path(values.out_dir), []
    made = [functools.partial(rows_of, name, values.target, values.share, form) for name in values.steps]
    made += [functools.partial(_one, case, values.target, form) for case in values.long]
    for make in made:
        rows += make()
        gc.collect()
        _report.write_csv(folder / "kernels.csv", rows)
    draw(folder / "kernels.png", rows)
    _report.print_table(COLUMNS, rows, f"Compiled for {values.target}", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows, values.share):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows, values.share) else 0


def _one(case: str, target: str, form: dict[str, Any]) -> list[dict[str, Any]]:
    return [long_row(case, target, form)]


if __name__ == "__main__":
    define_flags()
    app.run(main)
