"""Accuracy: memopt's predicted peaks, and those of JAX's own roofline estimate, beside the compiler's.

In: flags; the reference steps, as shapes. Out: a row for each step, form, target and plan, a table, a CSV file and a
picture; exit code 1 where the median error of the predicted peaks is over 5 % or the worst over 15 %. Plans are chosen
by prediction and compiled as they are. Plans and compiled figures (by a digest of the program) are kept in the output
folder; predictions are made anew by every run, so that it costs little after a change of the timeline.

    python experiments/accuracy.py --steps=gpt2:scan --forms=small --targets=tpu:v5e:1x1
"""

import contextlib
import dataclasses
import gc
import hashlib
import logging
import pathlib
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import _report
from absl import app, flags

#: Reference steps as `name:layers`.
STEPS = ("gpt2:scan", "gpt2:unrolled", "llama_1b:scan", "llama_4l:unrolled", "vit_b:unrolled")
TARGETS = ("tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1", "cpu")
#: XLA:CPU hands some fusions to a kernel library, and what that allocates is in none of the compiler's figures.
NO_LIBRARY_KERNELS = {"xla_cpu_experimental_ynn_fusion_type": ""}
#: A budget that any stored plan fits.
NO_LIMIT = 1 << 60
#: Largest allowed errors, as fractions of the compiled peak.
MEDIAN, WORST = 0.05, 0.15
COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("form", "form"),
    _report.Column("target", "target"),
    _report.Column("row", "budget"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("error", "error", "percent"),
    _report.Column("predicted_temp_bytes", "predicted temporaries", "bytes"),
    _report.Column("temp_bytes", "compiled temporaries", "bytes"),
    _report.Column("roofline_bytes", "roofline peak", "bytes"),
    _report.Column("roofline_error", "its error", "percent"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", list(STEPS), "Reference steps, as name:layers.")
    flags.DEFINE_list("forms", ["small", "full"], "Forms of the steps: full, small, tiny.")
    flags.DEFINE_list("targets", list(TARGETS), "What to compile for. On the CPU scanned steps only.")
    flags.DEFINE_list("budgets", ["75%", "50%", "30%"], "Budgets beside the plain step; the smallest plan below all.")
    flags.DEFINE_string("larger_target", "tpu:v5p:1x1x1", "Where a program goes that is too large; empty for nowhere.")
    flags.DEFINE_bool("replan", False, "Choose all plans anew, by the predictions of today.")
    flags.DEFINE_string("out_dir", "out/accuracy", "Folder for plans, compiled figures, CSV file and picture.")


@dataclasses.dataclass(frozen=True)
class Case:
    """One reference step on one target.

    Args:
        name: as `gpt2:scan`.
        form: "full", "small" or "tiny".
        target: what to compile for.
    """

    name: str
    form: str
    target: str

    def optimized(self, **settings: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the step under `memopt.optimize` with these settings, and its shapes."""
        import memopt
        from memopt.models import steps

        name, _, layers = self.name.partition(":")
        size = {"small": self.form == "small", "tiny": self.form == "tiny"}
        step, args, options = steps.reference_step(name, layers=layers or None, **size)
        if self.target == "cpu":
            options = options | {"compiler_options": NO_LIBRARY_KERNELS}
        return memopt.optimize(step, target=self.target, **settings, **options), args


def cases(names: Sequence[str], forms: Sequence[str], targets: Sequence[str]) -> list[Case]:
    """Return all cases; unrolled steps are left out on the CPU, where they take very long to compile."""
    found = [Case(name, form, target) for target in targets for form in forms for name in names]
    return [case for case in found if case.target != "cpu" or case.name.endswith(":scan")]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Makes rows; plans and compiled figures come from and go to caches."""

    plans: _report.Cache
    compiled: _report.Cache
    larger_target: str
    replan: bool

    def rows(self, case: Case, budgets: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows of one case, each plan once."""
        seen = set()
        for name in ("plain", *budgets):
            row, key = self._row(case, name)
            if row.get("peak_bytes") is None and self.larger_target not in ("", case.target):
                larger = dataclasses.replace(case, target=self.larger_target)
                row, key = self._row(larger, name)
                row["note"] = f"too large for {case.target}. {row['note']}".strip()
            if key not in seen:
                seen.add(key)
                yield row
            gc.collect()

    def _row(self, case: Case, name: str) -> tuple[dict[str, Any], str]:
        step, args, plan = self._planned(case, name)
        key = hashlib.sha256(step.lower(*args).as_text().encode()).hexdigest()[:24] + case.target
        figures = self._figures(step, args, key, f"{case.name} {case.form} {case.target}: {name} ...")
        row = dataclasses.asdict(case) | {"step": case.name, "row": name, "note": figures["note"]}
        row |= {"predicted_peak_bytes": plan.predicted_peak_bytes} | figures
        if figures["peak_bytes"] is not None:
            row["predicted_temp_bytes"] = plan.predicted_peak_bytes - figures["peak_bytes"] + figures["temp_bytes"]
            row["error"] = plan.predicted_peak_bytes / figures["peak_bytes"] - 1
            row |= roofline(step.trace(*args).jaxpr, figures["peak_bytes"])
            row["note"] = "; ".join(filter(None, (figures["note"], row["note"])))
        return row, key

    def _planned(self, case: Case, name: str) -> tuple[Any, Any, Any]:
        """Return the step with the plan of a row applied, its shapes, and the plan with today's prediction."""
        import memopt

        if name == "plain":
            step, args = case.optimized(passes=[])
            return step, args, step.plan(*args)
        key = "|".join([*dataclasses.astuple(case), name])
        stored = None if self.replan else self.plans.get(key)
        if stored is not None:
            try:
                plan, passes = memopt.Plan.from_json(stored["plan"]), [memopt.passes.Remat()]
                step, args = case.optimized(plan=plan, budget=NO_LIMIT, passes=passes)
                return step, args, step.plan(*args)
            except (ValueError, IndexError) as error:  # another step, or segments of an older planner
                _report.console().print(f"{key}: planned again, {error}", soft_wrap=True)
        step, args, plan = _plan(case, name)
        self.plans.put(key, {"plan": plan.to_json()})
        return step, args, plan

    def _figures(self, step: Any, args: Any, key: str, text: str) -> dict[str, Any]:
        figures = self.compiled.get(key)
        if figures is None:
            _report.console().print(text)
            memory = step.measure(*args)
            figures = {name: getattr(memory, name) for name in ("peak_bytes", "temp_bytes", "compile_seconds")}
            if memory.temp_bytes is None:
                figures |= {"peak_bytes": None, "note": f"the compiler needs {_report.format_bytes(memory.peak_bytes)}"}
            else:
                ops = memory.xla_remat_ops
                figures["note"] = f"XLA repeats {ops} operations of its own" if ops else ""
            self.compiled.put(key, figures)
        return figures


def _plan(case: Case, budget: str) -> tuple[Any, Any, Any]:
    """Plan by prediction, for the smallest plan where none fits."""
    import memopt

    step, args = case.optimized(budget=budget, passes=[memopt.passes.Remat()])
    try:
        return step, args, step.plan(*args)
    except memopt.BudgetError as error:
        step, args = case.optimized(budget=error.smallest_peak_bytes, passes=[memopt.passes.Remat()])
        return step, args, step.plan(*args)


def roofline(closed_jaxpr: Any, peak_bytes: int) -> dict[str, Any]:
    """Return the peak that `jax.experimental.roofline` gives a step, its error, and in the note what it cannot see."""
    import jax
    from jax.experimental import roofline as jax_roofline
    from jax.extend import core

    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed_jaxpr.in_avals]
    with skipped_primitives() as skipped:
        try:
            _, result = jax_roofline.roofline(core.jaxpr_as_fun(closed_jaxpr))(*shapes)
        except Exception as error:  # noqa: BLE001 - whatever stops it is what the row has to say
            return {"note": f"the roofline fails: {type(error).__name__} {str(error)[:60]}".strip()}
    note = f"the roofline skips {', '.join(sorted(skipped))}" if skipped else ""
    found = int(result.peak_hbm_bytes)
    return {"roofline_bytes": found, "roofline_error": found / peak_bytes - 1, "note": note}


@contextlib.contextmanager
def skipped_primitives() -> Iterator[set[str]]:
    """Collect the primitives that the roofline logs as unknown to it, and keep the log quiet."""
    skipped: set[str] = set()

    def collect(record: logging.LogRecord) -> bool:
        match = re.search(r"No roofline rule for ([\w-]+)", record.getMessage())
        if match:
            skipped.add(match[1])
        return match is None

    logger = logging.getLogger("absl")
    logger.addFilter(collect)
    try:
        yield skipped
    finally:
        logger.removeFilter(collect)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the median and the worst error by size, a row a target and one for all, the roofline's beside them."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    found = []
    for label, mine in [(t, [r for r in rows if r["target"] == t]) for t in targets] + [("all", list(rows))]:
        line: dict[str, Any] = {"target": label}
        for key in ("error", "roofline_error"):
            sizes = [abs(row[key]) for row in mine if row.get(key) is not None]
            if sizes:
                line |= {f"{key}_rows": len(sizes), f"{key}_median": statistics.median(sizes)}
                line[f"{key}_worst"] = max(sizes)
        found.append(line)
    return found


SUMMARY_COLUMNS = (
    _report.Column("target", "target"),
    _report.Column("error_rows", "rows", "number"),
    _report.Column("error_median", "median error", "percent"),
    _report.Column("error_worst", "worst error", "percent"),
    _report.Column("roofline_error_rows", "roofline's rows", "number"),
    _report.Column("roofline_error_median", "median error", "percent"),
    _report.Column("roofline_error_worst", "worst error", "percent"),
)


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one sentence for each limit that is broken: the median of all errors, and each row over the worst."""
    found = []
    errors = [abs(row["error"]) for row in rows if row.get("error") is not None]
    if not errors:
        return ["no row has a compiled peak"]
    if (median := statistics.median(errors)) > MEDIAN:
        found.append(f"the median error is {100 * median:.1f} %")
    for row in rows:
        if abs(row.get("error") or 0.0) > WORST:
            name = " ".join(row[key] for key in ("step", "form", "target", "row"))
            found.append(f"{name}: the error is {100 * row['error']:.1f} %")
    return found


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw predicted against compiled peaks, memopt's on the left and the roofline's on the right."""
    done = [row for row in rows if row.get("peak_bytes")]
    ends = [min(row["peak_bytes"] for row in done) / _report.GIB, max(row["peak_bytes"] for row in done) / _report.GIB]
    kinds = ("predicted_peak_bytes", "roofline_bytes"), ("memopt", "JAX's roofline")
    with _report.figure(path, columns=2, size=(11, 4.8)) as (_, panels):
        for axes, key, title in zip(panels, *kinds, strict=True):
            for index, target in enumerate(dict.fromkeys(row["target"] for row in done)):
                mine = [row for row in done if row["target"] == target and row.get(key)]
                where = [[row[name] / _report.GIB for row in mine] for name in ("peak_bytes", key)]
                axes.scatter(*where, s=18, color=_report.COLORS[index % len(_report.COLORS)], label=target)
            axes.plot(ends, ends, color="black", linestyle=":", linewidth=1)
            axes.fill_between(ends, [e * (1 - WORST) for e in ends], [e * (1 + WORST) for e in ends], alpha=0.1)
            axes.set(title=title, xlabel="compiled peak (GiB)", ylabel="predicted peak (GiB)")
            axes.set(xscale="log", yscale="log")
            axes.legend(loc="upper left")


def main(argv: Sequence[str]) -> int:
    """Plan and compile what is not there yet, predict all, then print, write and judge."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    folder, out = pathlib.Path(values.out_dir), _report.console()
    settings = {"made with": _report.environment(commit=False)}
    caches = [_report.Cache(folder / name, settings) for name in ("plans.json", "compiled.json")]
    bench, rows = Bench(*caches, values.larger_target, values.replan), []
    for case in cases(values.steps, values.forms, values.targets):
        for row in bench.rows(case, values.budgets):
            known = {(r["step"], r["form"], r["target"], r["row"]) for r in rows}
            if (row["step"], row["form"], row["target"], row["row"]) not in known:
                rows.append(row)
        _report.write_csv(folder / "accuracy.csv", rows)
    _report.print_table(COLUMNS, rows, "Predicted against compiled peaks", out)
    _report.print_table(SUMMARY_COLUMNS, summary(rows), "Errors by size", out)
    if any(row.get("peak_bytes") for row in rows):
        draw(folder / "accuracy.png", rows)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
