"""Memory against recomputation: memopt's remat beside every `jax.checkpoint` policy that a person would try.

In: flags; the reference steps, as shapes. Out: one row for each way to compile each step (compiled ahead of time for
the target, by default a TPU that need not be there), a table, a CSV file and a picture; exit code 1 where a plan of
memopt is over its policy's peak or repeats more. Finished rows are kept in the output folder: a stopped sweep goes on.

    python experiments/pareto.py --steps=gpt2 --small
"""

import dataclasses
import functools
import gc
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _report
from absl import app, flags

POLICIES = ("nothing", "dots", "dots_no_batch", "qkvo")
#: Reference steps as `name` or `name:layers`.
STEPS = ("gpt2:scan", "gpt2:unrolled", "llama_1b:scan", "llama_4l:unrolled", "vit_b:unrolled")
#: Budgets below the lowest policy: its compiled peak less these shares of its temporaries.
BELOW = (0.10, 0.25)
#: A plan may be this much over its policy's peak, and recompute this much more.
PEAK_SLACK, FLOPS_SLACK = 1.005, 1.0 + 1e-9
COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("row", "row"),
    _report.Column("budget_bytes", "budget", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("recompute_flops", "recomputed", "flops"),
    _report.Column("recompute_share", "of the step", "percent"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("compile_seconds", "compile", "seconds"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", list(STEPS), "Reference steps, as name or name:layers.")
    flags.DEFINE_bool("small", False, "Use the small forms.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_list("rows", [], "Beside the policies only these rows: memopt@<policy>, memopt@below.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string("larger_target", "tpu:v5p:1x1x1", "Where a program goes that is too large; empty for nowhere.")
    flags.DEFINE_string("out_dir", "out/pareto", "Folder for rows, CSV file and picture.")


@dataclasses.dataclass(frozen=True)
class Case:
    """One reference step on one target.

    Args:
        name: as `gpt2:scan`.
        form: "full", "small" or "tiny".
        target: what to compile for.
        larger_target: where a program goes that is too large for it; empty for nowhere.
    """

    name: str
    form: str
    target: str
    larger_target: str

    def build(self, remat: str | None = None) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Return the step, its shapes and its jit options, with a checkpoint policy on each block or none."""
        from memopt.models import steps

        name, _, layers = self.name.partition(":")
        size = {"small": self.form == "small", "tiny": self.form == "tiny"}
        return steps.reference_step(name, layers=layers or None, remat=remat, **size)


def step_flops(step: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> float:
    """Return the matmul FLOPs of a step's jaxpr after dead-code elimination."""
    import jax
    from jax.interpreters import partial_eval

    import memopt

    closed = (step if hasattr(step, "plan") else jax.jit(step, **options)).trace(*args).jaxpr
    jaxpr = getattr(closed, "jaxpr", closed)
    return memopt.matmul_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def hand_row(case: Case, policy: str | None) -> dict[str, Any]:
    """Compile the plain step (None), or the step with a checkpoint policy, and return its figures."""
    import memopt

    step, args, options = case.build(policy)
    memory = memopt.measure(step, *args, target=case.target, **options)
    row = {"target": case.target, "note": ""}
    if not memory.fits and case.larger_target:
        memory = memopt.measure(step, *args, target=case.larger_target, **options)
        row = {"target": case.larger_target, "note": f"compiled on {case.larger_target}"}
    return row | {"flops": step_flops(step, args, options)} | _figures(memory)


def predicted(case: Case, policy: str | None, target: str) -> dict[str, int]:
    """Return what memopt predicts of the plain step or one with a policy; made anew for finished rows as well."""
    import memopt

    step, args, options = case.build(policy)
    return {"predicted_peak_bytes": memopt.explain(step, *args, target=target, **options).peak_bytes}


def memopt_row(case: Case, budget_bytes: int, target: str) -> dict[str, Any]:
    """Plan and compile the step within a budget by remat alone, and return its figures."""
    import memopt

    step, args, options = case.build()
    passes = [memopt.passes.Remat()]
    optimized = memopt.optimize(step, budget=budget_bytes, target=target, passes=passes, **options)
    try:
        optimized.lower(*args).compile()  # plans again where the compiled peak is over
        memory = optimized.measure(*args)
    except memopt.BudgetError as error:
        return {"budget_bytes": budget_bytes, "note": f"no plan fits: {error.smallest_peak_bytes} bytes at least"}
    plan = optimized.plan(*args)
    return {
        "budget_bytes": budget_bytes,
        "flops": step_flops(optimized, args, options),
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "planning_seconds": plan.planning_seconds,
        "optimality_gap": plan.optimality_gap,
        "target": target,
        "note": "" if target == case.target else f"compiled on {target}",
    } | _figures(memory)


def _figures(memory: Any) -> dict[str, Any]:
    keys = ["argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes"]
    return {key: getattr(memory, key) for key in [*keys, "xla_remat_ops", "compile_seconds"]}


def budgets(rows: dict[str, dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """Return memopt's budgets and where to compile: each policy's compiled peak, and two below the lowest of them.

    What a plan may be over a policy's peak is in the budget, so that a plan so far over is not planned again.
    """
    hand = {name: rows[name] for name in POLICIES if rows.get(name, {}).get("temp_bytes") is not None}
    found = {f"memopt@{name}": (int(PEAK_SLACK * row["peak_bytes"]), row["target"]) for name, row in hand.items()}
    if hand:
        lowest = min(hand.values(), key=lambda row: row["peak_bytes"])
        for share in BELOW:
            budget_bytes = lowest["peak_bytes"] - int(share * lowest["temp_bytes"])
            found[f"memopt@below{100 * share:.0f}"] = budget_bytes, lowest["target"]
    return found


def sweep(case: Case, wanted: Sequence[str], cache: _report.Cache) -> Iterator[dict[str, Any]]:
    """Yield the rows of one step, those that are finished from the cache."""
    found: dict[str, dict[str, Any]] = {}
    for policy in (None, *POLICIES):
        name = policy or "plain"
        found[name] = _cached(case, name, cache, functools.partial(hand_row, case, policy))
        found[name] |= predicted(case, policy, found[name]["target"])
        yield found[name] | _share(found, name)
    for name, (budget_bytes, target) in budgets(found).items():
        if not wanted or name.rstrip("0123456789") in wanted:
            found[name] = _cached(case, name, cache, functools.partial(memopt_row, case, budget_bytes, target))
            yield found[name] | _share(found, name)


def _share(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    flops, plain = found[name].get("flops"), found["plain"]["flops"]
    if flops is None:
        return {}
    return {"recompute_flops": flops - plain, "recompute_share": (flops - plain) / plain if plain else 0.0}


def _cached(case: Case, name: str, cache: _report.Cache, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    key = f"{case.name}|{name}"
    row = cache.get(key)
    if row is None:
        _report.console().print(f"{case.name}: {name} ...")
        row = {"step": case.name, "row": name} | make()
        cache.put(key, row)
        gc.collect()
    return row


def losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one sentence for each row where memopt does worse than the policy whose peak it was given."""
    found = []
    hand = {(row["step"], row["row"]): row for row in rows}
    for row in rows:
        rival = hand.get((row["step"], row["row"].partition("@")[2]))
        if rival is None or not row["row"].startswith("memopt@"):
            continue
        name = f"{row['step']} {row['row']}"
        if row.get("peak_bytes") is None:
            found.append(f"{name}: {row['note']}")
        elif row["peak_bytes"] > PEAK_SLACK * rival["peak_bytes"]:
            found.append(f"{name}: peak {row['peak_bytes'] / rival['peak_bytes']:.3f} of the policy's")
        elif row["recompute_flops"] > FLOPS_SLACK * max(rival["recompute_flops"], 0.0):
            more = row["recompute_flops"] - rival["recompute_flops"]
            found.append(f"{name}: recomputes {_report.format_flops(more)} more")
    return found


def median_saving(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the median share of recomputed FLOPs that memopt saves, over the policies that recompute anything."""
    hand = {(row["step"], row["row"]): row.get("recompute_flops") for row in rows}
    shares = [
        1 - row["recompute_flops"] / rival
        for row in rows
        if row["row"].startswith("memopt@") and row.get("recompute_flops") is not None
        if (rival := hand.get((row["step"], row["row"].partition("@")[2])))
    ]
    return statistics.median(shares) if shares else None


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw compiled peak against recomputed FLOPs, one panel a step."""
    names = list(dict.fromkeys(row["step"] for row in rows))
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    size = (5.6 * columns, 4.2 * lines)
    with _report.figure(path, rows=lines, columns=columns, size=size, squeeze=False) as (_, grid):
        for axes, name in zip(grid.flat, names, strict=False):
            _panel(axes, name, [row for row in rows if row["step"] == name and row.get("peak_bytes")])
        for axes in list(grid.flat)[len(names) :]:
            axes.set_visible(False)


def _panel(axes: Any, name: str, rows: Sequence[dict[str, Any]]) -> None:
    hand = [row for row in rows if not row["row"].startswith("memopt@")]
    ours = sorted((row for row in rows if row["row"].startswith("memopt@")), key=lambda row: row["peak_bytes"])
    for label, chosen, marker, color in (("jax.checkpoint", hand, "o", 1), ("memopt, Remat", ours, "s", 0)):
        where = [row["peak_bytes"] / _report.GIB for row in chosen], [100 * row["recompute_share"] for row in chosen]
        axes.plot(*where, marker=marker, label=label, color=_report.COLORS[color], linestyle="-" if color == 0 else "")
    for row in hand:
        at = row["peak_bytes"] / _report.GIB, 100 * row["recompute_share"]
        axes.annotate(row["row"], at, xytext=(6, 4), textcoords="offset points", fontsize=8.5)
    axes.margins(x=0.16, y=0.14)
    axes.set(title=name, xlabel="compiled peak (GiB)", ylabel="recomputed FLOPs (% of the step)")
    axes.legend(loc="upper right")


def main(argv: Sequence[str]) -> int:
    """Compile every row that is not there yet, then print and write all."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    folder, out, rows = pathlib.Path(values.out_dir), _report.console(), []
    form = "tiny" if values.tiny else "small" if values.small else "full"
    settings = {"form": form, "target": values.target, "made with": _report.environment(commit=False)}
    cache = _report.Cache(folder / "rows.json", settings)
    for name in values.steps:
        rows += sweep(Case(name, form, values.target, values.larger_target), values.rows, cache)
        _report.write_csv(folder / "pareto.csv", rows)
    _report.print_table(COLUMNS, rows, f"Compiled for {values.target}, {form} forms", out)
    draw(folder / "pareto.png", rows)
    saving = median_saving(rows)
    if saving is not None:
        out.print(
            f"  at the peaks of the policies that recompute, memopt recomputes {100 * saving:.0f} % less (median)"
        )
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in losses(rows):
        out.print(f"WORSE: {sentence}", soft_wrap=True)
    return 1 if losses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
