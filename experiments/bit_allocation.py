"""Which residual gets how many bits: one width for all against mixes by measured sensitivity, at the same budgets.

In: flags; the models and data of `residual_quality.py`, after some steps of exact training. Out: for each budget (peak
and residual bytes of one width for all, and of points between two) plans of `Compress` with several codecs: chosen by
bytes and seconds alone, by the measured gradient error of each value and codec, by its Gauss-Newton form, and by the
Hessian-trace form of HAWQ-V2. Of each the bytes of all residuals, which are no more than the budget's where any plan's
are, the error that was predicted from single values, and the relative error of the gradient that was measured, on the
batch of the measurement and on others. A table, a CSV file, and a picture. Exit code 1 where a mix by gradient errors
is worse than one width for all at its budget.

    python experiments/bit_allocation.py --models=gpt
"""

import functools
import itertools
import pathlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import _report
import residual_quality
from absl import app, flags

COLUMNS = (
    _report.Column("model", "model"),
    _report.Column("budget_bytes", "residuals allowed", "bytes"),
    _report.Column("way", "bits by"),
    _report.Column("mix", "values as"),
    _report.Column("residual_bytes", "residuals", "bytes"),
    _report.Column("predicted", "predicted", "number"),
    _report.Column("error", "gradient error", "number"),
    _report.Column("other_error", "on other batches", "number"),
)
UNIFORM, BLIND = "one width", "bytes and seconds"
#: Ways to choose bits by a sensitivity: its kinds.
KINDS = ("gradient", "gauss-newton", "hessian")


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("models", ["gpt", "vit"], "gpt, vit or both.")
    flags.DEFINE_list("codecs", ["int8", "int4", "int2"], "Codecs, most bits first.")
    flags.DEFINE_list("kinds", list(KINDS), "Kinds of memopt.sensitivity.")
    flags.DEFINE_integer("between", 1, "Budgets between those of two codecs.")
    flags.DEFINE_integer("samples", 4, "Random vectors a value, for traces.")
    flags.DEFINE_integer("others", 4, "Other batches to compare gradients on.")
    flags.DEFINE_integer("width", 64, "Features.")
    flags.DEFINE_integer("depth", 2, "Layers.")
    flags.DEFINE_integer("heads", 4, "Attention heads.")
    flags.DEFINE_integer("length", 64, "Bytes of a sequence (gpt).")
    flags.DEFINE_integer("batch", 16, "Sequences or images a step.")
    flags.DEFINE_integer("warm", 50, "Steps of exact training before gradients are compared.")
    flags.DEFINE_float("rate", 1e-3, "Learning rate of AdamW.")
    flags.DEFINE_string("out_dir", "out/bit_allocation", "Folder for the CSV file and the picture.")


def stored(plan: Any) -> frozenset[str]:
    """Return the names of the values that a plan keeps in a lossy form."""
    return frozenset(d.name for d in plan.decisions if d.stored_bytes is not None)


def residual_bytes(plan: Any, names: frozenset[str]) -> int:
    """Return the bytes of these values as a plan keeps them; what no codec is for is the same in all plans."""
    kept = [d for d in plan.decisions if d.name in names and d.choice != "recompute"]
    return sum(d.value_bytes if d.stored_bytes is None else d.stored_bytes for d in kept)


def mix(plan: Any) -> str:
    """Return how many values a plan keeps in which lossy form."""
    counts = Counter(d.choice for d in plan.decisions if d.stored_bytes is not None)
    return ", ".join(f"{count} {form}" for form, count in sorted(counts.items(), reverse=True)) or "none"


def budgets(sizes: Sequence[tuple[int, int]], between: int) -> list[tuple[int, int]]:
    """Return these pairs of peak and residual bytes, and so many in equal steps between neighbours, largest first."""
    found = [sizes[0]]
    for above, below in itertools.pairwise(sizes):
        steps = [k / (between + 1) for k in range(1, between + 2)]
        found += [tuple(round(a - (a - b) * x) for a, b in zip(above, below, strict=True)) for x in steps]
    return found


class Bench:
    """One model after some training: its exact gradient, and plans under budgets."""

    def __init__(self, name: str, values: Any):
        import jax

        self.name, self.values = name, values
        self.names: frozenset[str] = frozenset()  # of the values that one width for all puts into it
        self.quality = residual_quality.Bench(name, values)
        exact = jax.jit(self.quality.grad)
        params = self.quality.train(exact, 0, values.warm)
        tasks = [self.quality.task.batch("train", values.warm + i, 0) for i in range(1 + values.others)]
        self.batches = [(params, *batch) for batch in tasks]
        self.exact = [exact(*args) for args in self.batches]

    @functools.cache  # noqa: B019 (a bench lives as long as the script)
    def plans(self, one: Any) -> list[Any]:
        """Return all plans of a pass, the largest predicted peak first."""
        import memopt

        step = memopt.optimize(self.quality.grad, budget="100%", target="cpu", passes=[one])
        return step.plans(*self.batches[0])[1:]

    def within(self, one: Any, peak: int, most: int) -> Any:
        """Return the first plan of a pass within a peak whose residuals take no more bytes than this.

        Where none is so small, as values have no figure by some sensitivity, it is the smallest; None where no plan is
        within the peak.
        """
        plans = [(residual_bytes(p, self.names), p) for p in self.plans(one) if p.predicted_peak_bytes <= peak]
        least = min((size for size, _ in plans), default=0)
        return next((p for size, p in plans if size <= max(most, least)), None)

    def sensitivity(self, kind: str) -> Any:
        """Measure on the first batch."""
        import memopt

        start = time.perf_counter()
        passes = [memopt.passes.Compress(tuple(self.values.codecs))]
        drawn = {} if kind == "gradient" else {"samples": self.values.samples}
        found = memopt.sensitivity(self.quality.grad, *self.batches[0], passes=passes, kind=kind, target="cpu", **drawn)
        print(f"{self.name} {kind}: {len(found.rows)} forms in {time.perf_counter() - start:.1f} s", flush=True)
        return found

    def row(self, way: str, one: Any, plan: Any, most: int) -> dict[str, Any]:
        """Return the figures of a plan of a pass."""
        import memopt

        step = memopt.optimize(self.quality.grad, target="cpu", passes=[one], plan=plan, verify=False)
        pairs = zip(self.exact, self.batches, strict=True)
        errors = [residual_quality.compared(want, step(*args))["error"] for want, args in pairs]
        row = {
            "model": self.name,
            "budget_bytes": most,
            "way": way,
            "mix": mix(plan),
            "residual_bytes": residual_bytes(plan, self.names),
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "predicted": plan.predicted_error,
            "error": errors[0],
            "other_error": statistics.fmean(errors[1:]) if errors[1:] else None,
        }
        print(f"{self.name} {_report.format_bytes(most)} {way}: {row['mix']}: {row['error']:.3g}", flush=True)
        return row


def rows_of(bench: Bench, values: Any, report: Callable[[dict[str, Any]], None]) -> None:
    """Report a row for each budget and way; one width for all at the budgets of its own plans."""
    import memopt

    make = functools.partial(memopt.passes.Compress, tuple(values.codecs))
    ways = {BLIND: make()} | {kind: make(sensitivity=bench.sensitivity(kind)) for kind in values.kinds}
    found = {}
    for codec in values.codecs:
        one = memopt.passes.Compress(codec, always=True)
        plan = bench.plans(one)[-1]
        bench.names |= stored(plan)
        found[plan.predicted_peak_bytes, residual_bytes(plan, bench.names)] = one, plan
    for peak, most in budgets(list(found), values.between):
        if (peak, most) in found:
            report(bench.row(UNIFORM, *found[peak, most], most))
        for way, one in ways.items():
            if plan := bench.within(one, peak, most):
                report(bench.row(way, one, plan, most))


def worse(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the budgets at which bits by gradient errors have a larger measured error than one width for all."""
    found = {(row["model"], row["budget_bytes"], row["way"]): row["error"] for row in rows}
    places = [(model, budget) for model, budget, way in found if way == "gradient"]
    bad = [(m, b) for m, b in places if found[m, b, "gradient"] > 1.001 * found.get((m, b, UNIFORM), float("inf"))]
    return [f"{model} at {_report.format_bytes(budget)}" for model, budget in bad]


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw errors over residual bytes, for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    with _report.figure(path, columns=len(models), size=(5.6 * len(models), 4.2), squeeze=False) as (_, axes):
        for axis, model in zip(axes[0], models, strict=True):
            for color, way in zip(_report.COLORS, (UNIFORM, BLIND, *KINDS), strict=False):
                own = [row for row in rows if row["model"] == model and row["way"] == way and row["error"] > 0]
                if not own:
                    continue
                own.sort(key=lambda row: row["residual_bytes"])
                sizes = [row["residual_bytes"] / _report.MIB for row in own]
                axis.plot(sizes, [100 * row["error"] for row in own], "o-", color=color, label=way)
                if way == "gradient":
                    axis.plot(sizes, [100 * row["predicted"] for row in own], ":", color=color, label="predicted")
            axis.set(yscale="log", xlabel="residuals, MiB", ylabel="relative error of the gradient, %", title=model)
            axis.legend()


def main(argv: Sequence[str]) -> int:
    """Measure, plan, compare, print, write and draw."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, folder = flags.FLAGS, pathlib.Path(flags.FLAGS.out_dir)
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        _report.write_csv(folder / "bit_allocation.csv", rows)

    for name in values.models:
        rows_of(Bench(name, values), values, report)
    size = f"{values.depth} layers of {values.width}, batches of {values.batch}, after {values.warm} steps"
    _report.print_table(COLUMNS, rows, f"Bits of residuals, {size}")
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    draw(folder / "bit_allocation.png", rows)
    bad = worse(rows)
    if bad:
        print(f"FAILED: one width for all is better than bits by gradient errors: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
