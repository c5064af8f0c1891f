"""`Lossless`: residual bytes without and with it, what compiles to what, and that results are the same.

In: flags; reference steps as shapes. Out: for each step a row as written and one in which nothing is repeated and
whatever has a smaller exact form is kept in it (an otherwise equal plan), then pairs of rows at the same budgets, by
`Remat` and `Kernels` without and with `Lossless` (the default passes), each the plan that a call with that budget runs
(one that compiles to more is left for another; "unverified" where none is left): residual bytes (what is read again
later, of all places), temporaries compiled ahead of time for the target, and whether the tiny form gives bitwise the
same on the CPU, run operation by operation.
A table, a CSV file and a picture; exit code 1 where a row with `Lossless` compiles to more than its partner.

    python experiments/lossless.py --steps=resnet,unet_2d
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("row", "row"),
    _report.Column("budget_bytes", "budget", "bytes"),
    _report.Column("residual_bytes", "residuals", "bytes"),
    _report.Column("forms", "in exact forms"),
    _report.Column("recompute_flops", "repeated", "flops"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("settled", "within budget"),
    _report.Column("fell", "less by", "percent"),
    _report.Column("planning_seconds", "planning", "seconds"),
    _report.Column("difference", "tiny, on CPU"),
)
#: Steps as `name[:layers][:field=value]`.
STEPS = ("resnet", "unet_2d", "gpt2:scan:dropout=0.1")


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", list(STEPS), "Reference steps, as name, name:layers or name:layers:field=value.")
    flags.DEFINE_list("budgets", ["0.7", "0.0"], "Where between the smallest and the plain peak budgets lie.")
    flags.DEFINE_bool("full", False, "Use the full forms, not the small ones.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_bool("compile", True, "Compile; otherwise predictions alone.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string("out_dir", "out/lossless", "Folder for rows, CSV file and picture.")


def parse(name: str) -> tuple[str, str | None, dict[str, float]]:
    """Return a step's family, the form of its layers, and fields of its configuration."""
    family, *rest = name.split(":")
    fields = dict(part.split("=") for part in rest if "=" in part)
    layers = next((part for part in rest if "=" not in part), None)
    return family, layers, {key: float(value) for key, value in fields.items()}


def build(name: str, form: str) -> tuple:
    """Return a reference step in one of its forms."""
    from memopt.models import steps

    family, layers, fields = parse(name)
    return steps.reference_step(family, layers=layers, small=form == "small", tiny=form == "tiny", **fields)


def kept_bytes(decision: Any) -> int:
    """Return the bytes that a decision keeps: all, none where it is repeated, or those of its form."""
    if decision.choice == "recompute":
        return 0
    return decision.value_bytes if decision.stored_bytes is None else decision.stored_bytes


def planned_row(built: tuple, passes: Sequence[Any], budget: float | str, target: str, compiles: bool) -> dict:
    """Plan, and compile, within a budget; "least" takes the smallest predicted peak, whatever it compiles to."""
    import memopt

    step, args, options = built
    common = dict(target=target, passes=list(passes), **options)
    asked = settled = compiles and budget != "least"
    if budget == "least":
        points = memopt.optimize(step, budget="100%", verify=False, **common).frontier(*args)
        budget = min(point.peak_bytes for point in points)
    planned = memopt.optimize(step, budget=int(budget), verify=settled, **common)
    try:
        if settled:
            planned.lower(*args).compile()  # plans again where the compiled peak is over
    except memopt.BudgetError:
        settled, planned = False, memopt.optimize(step, budget=int(budget), verify=False, **common)
    figures = _figures(planned.measure(*args)) if compiles else {}
    plan = planned.plan(*args)
    forms = sorted({d.choice for d in plan.decisions} - {"keep", "recompute"})
    row = {
        "residual_bytes": sum(map(kept_bytes, plan.decisions)),
        "forms": ", ".join(f"{sum(d.choice == form for d in plan.decisions)} {form}" for form in forms),
        "recompute_flops": plan.recompute_flops,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "planning_seconds": plan.planning_seconds,
        "settled": ("yes" if settled else "unverified") if asked else "",
    }
    return row | figures


def plain_row(built: tuple, target: str, compiles: bool) -> dict[str, Any]:
    """Predict, and compile, the step as written; its residuals are those of a plan that changes nothing."""
    import memopt

    step, args, options = built
    passes = [memopt.passes.Lossless()]
    plan = memopt.optimize(step, budget="100%", target=target, passes=passes, verify=False, **options).plan(*args)
    row = {
        "residual_bytes": sum(d.value_bytes for d in plan.decisions),
        "predicted_peak_bytes": plan.baseline_peak_bytes,
    }
    return row | (_figures(memopt.measure(step, *args, target=target, **options)) if compiles else {})


def difference(name: str) -> str:
    """Run two otherwise equal plans of the tiny form on the CPU, without and with forms, and compare all results.

    They are run operation by operation: compiled whole, XLA fuses other operations and adds in another order.
    """
    import jax
    import numpy as np
    from jax.extend import core

    import memopt
    from memopt.models import steps

    step, args, _ = build(name, "tiny")
    args = steps.concrete(args)
    common = dict(target="cpu", passes=[memopt.passes.Lossless()], verify=False)
    peaks = [point.peak_bytes for point in memopt.optimize(step, budget="100%", **common).frontier(*args)]
    plain, stored = (memopt.optimize(step, budget=peak, **common) for peak in (max(peaks), min(peaks)))
    forms = [any(d.choice not in ("keep", "recompute") for d in p.plan(*args).decisions) for p in (plain, stored)]
    if forms != [False, True]:
        return "nothing to store"
    with jax.disable_jit():
        want, got = (core.jaxpr_as_fun(p.trace(*args).jaxpr)(*jax.tree.leaves(args)) for p in (plain, stored))
    apart = 0.0
    for one, other in zip(want, got, strict=True):
        if jax.numpy.issubdtype(one.dtype, jax.dtypes.prng_key):
            continue
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        apart = max(apart, float(np.max(np.abs(other - one) / max(1e-30, float(np.abs(one).max())), initial=0.0)))
    return "bitwise" if apart == 0.0 else f"{apart:.1e} relative"


def _figures(memory: Any) -> dict[str, Any]:
    return {key: getattr(memory, key) for key in ("temp_bytes", "peak_bytes", "xla_remat_ops", "compile_seconds")}


def compared(without: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the share by which its temporaries are below its partner's."""
    if found.get("temp_bytes") is None or not without.get("temp_bytes"):
        return found
    return found | {"fell": 1.0 - found["temp_bytes"] / without["temp_bytes"]}


def rows_of(name: str, form: str, cache: _report.Cache, values: Any) -> list[dict[str, Any]]:
    """Return a step's rows, each made where it is not there yet."""
    import memopt

    default = memopt.passes.default()
    without = [p for p in default if p.name != "lossless"]
    target, compiles = values.target, values.compile
    built = build(name, form)

    def row(key: str, make: Any) -> dict[str, Any]:
        if cache.get(f"{name}|{key}") is None:
            _report.console().print(f"{name}: {key} ...")
            cache.put(f"{name}|{key}", {"step": name, "row": key} | make())
        return cache.get(f"{name}|{key}")

    plain = row("as written", lambda: plain_row(built, target, compiles))
    alone = [memopt.passes.Lossless()]
    equal = row(
        "Lossless, nothing repeated",
        lambda: planned_row(built, alone, "least", target, compiles) | {"difference": difference(name)},
    )
    rows = [plain, compared(plain, equal)]
    least = row("smallest without", lambda: planned_row(built, without, "least", target, False))
    for share in map(float, values.budgets):
        low, high = least["predicted_peak_bytes"], plain["predicted_peak_bytes"]
        budget = int(low + share * (high - low))
        pair = [
            row(f"{title} at {share:g}", lambda p=p: planned_row(built, p, budget, target, compiles))  # noqa: B023
            for title, p in (("without", without), ("default", default))
        ]
        rows += [one | {"budget_bytes": budget} for one in (pair[0], compared(*pair))]
    return rows


def picture(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw residual bytes as written and in exact forms."""
    pairs = [(a, b) for a, b in zip(rows, rows[1:], strict=False) if a["row"] == "as written"]
    with _report.figure(path) as (_, axes):
        for k, title in enumerate(("as written", "in exact forms")):
            heights = [pair[k]["residual_bytes"] / _report.GIB for pair in pairs]
            axes.bar([i + 0.4 * k for i in range(len(pairs))], heights, 0.4, label=title, color=_report.COLORS[k])
        axes.set_xticks([i + 0.2 for i in range(len(pairs))], [pair[0]["step"] for pair in pairs])
        axes.set(title="Residuals, nothing repeated", ylabel="GiB")
        axes.legend()


def main(argv: Sequence[str]) -> int:
    """Make every row that is not there yet, then print and write all."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, rows = flags.FLAGS, []
    form = "tiny" if values.tiny else "full" if values.full else "small"
    folder = pathlib.Path(values.out_dir)
    settings = {"form": form, "target": values.target, "budgets": values.budgets, "compile": values.compile}
    cache = _report.Cache(folder / "rows.json", settings | {"made with": _report.environment(commit=False)})
    for name in values.steps:
        rows += rows_of(name, form, cache, values)
        _report.write_csv(folder / "lossless.csv", rows)
    picture(folder / "lossless.png", rows)
    _report.print_table(COLUMNS, rows, f"Lossless, compiled for {values.target}, {form} forms")
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    return 1 if any(row.get("fell", 0.0) < 0.0 for row in rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
