"""Twelve budgets for each small form: is every budget kept, and does less memory never cost less or peak higher?

In: flags; the small reference steps, as shapes. Out: a row for each budget, a table, a CSV file and a picture; exit
code 1 where a compiled peak is over its budget, rises by more than 1 % as the budget falls, or FLOPs rise as it grows.

    python experiments/sweep.py --steps=gpt2:scan
"""

import dataclasses
import gc
import pathlib
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

STEPS = ("gpt2:scan", "gpt2:unrolled", "llama_1b:scan", "llama_4l:unrolled")
#: Budgets reach from the plain step's peak down to this share of its temporaries.
SMALLEST_SHARE = 0.12
PEAK_SLACK, FLOPS_SLACK = 1.01, 1.0 + 1e-9
COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("budget_bytes", "budget", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("recompute_flops", "recomputed", "flops"),
    _report.Column("compile_seconds", "compile", "seconds"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", list(STEPS), "Reference steps, as name or name:layers.")
    flags.DEFINE_integer("budgets", 12, "Budgets for each step.", lower_bound=2)
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, as the tests do, not the small ones.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string("out_dir", "out/sweep", "Folder for rows, CSV file and picture.")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One step on one target, and where its finished rows are kept."""

    name: str
    tiny: bool
    target: str
    cache: _report.Cache

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Return one row a budget, largest first, finished ones from the cache."""
        plain = self._cached("plain", None)
        found = []
        for budget_bytes in budgets(plain, count):
            row = self._cached(str(budget_bytes), budget_bytes)
            found.append(row)
            if row.get("peak_bytes") is None:
                break  # no plan fits here, so none fits below
        return found

    def _cached(self, key: str, budget_bytes: int | None) -> dict[str, Any]:
        key = f"{self.name}|{key}"
        row = self.cache.get(key)
        if row is None:
            label = "plain" if budget_bytes is None else _report.format_bytes(budget_bytes)
            _report.console().print(f"{self.name}: {label} ...")
            row = {"step": self.name, "budget_bytes": budget_bytes} | self._make(budget_bytes)
            self.cache.put(key, row)
            gc.collect()
        return row

    def _make(self, budget_bytes: int | None) -> dict[str, Any]:
        import memopt
        from memopt.models import steps

        name, _, layers = self.name.partition(":")
        step, args, options = steps.reference_step(name, layers=layers or None, small=not self.tiny, tiny=self.tiny)
        if budget_bytes is None:
            return _figures(memopt.measure(step, *args, target=self.target, **options))
        passes = [memopt.passes.Remat()]
        optimized = memopt.optimize(step, budget=budget_bytes, target=self.target, passes=passes, **options)
        try:
            optimized.lower(*args).compile()  # plans again where the compiled peak is over
            figures = _figures(optimized.measure(*args))
        except memopt.BudgetError as error:
            return {"note": f"no plan fits: {_report.format_bytes(error.smallest_peak_bytes)} at least"}
        plan = optimized.plan(*args)
        keys = ("predicted_peak_bytes", "recompute_flops", "optimality_gap", "planning_seconds")
        return figures | {key: getattr(plan, key) for key in keys}


def _figures(memory: Any) -> dict[str, Any]:
    return {key: getattr(memory, key) for key in ("peak_bytes", "temp_bytes", "xla_remat_ops", "compile_seconds")}


def budgets(plain: dict[str, Any], count: int) -> list[int]:
    """Return evenly spaced budgets, from the plain peak down to a small share of its temporaries."""
    fixed_bytes = plain["peak_bytes"] - plain["temp_bytes"]
    shares = [1 - (1 - SMALLEST_SHARE) * i / (count - 1) for i in range(count)]
    return [fixed_bytes + int(share * plain["temp_bytes"]) for share in shares]


def violations(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one sentence for each broken promise in the rows of one step, sorted from the largest budget down."""
    found = []
    done = [row for row in rows if row.get("peak_bytes") is not None]
    for row in done:
        if row["peak_bytes"] > row["budget_bytes"]:
            found.append(f"{_name(row)}: the compiled peak is {_report.format_bytes(row['peak_bytes'])}")
    for larger, smaller in zip(done, done[1:], strict=False):
        if smaller["peak_bytes"] > PEAK_SLACK * larger["peak_bytes"]:
            found.append(f"{_name(smaller)}: the compiled peak is higher than at a larger budget")
        if larger["recompute_flops"] > FLOPS_SLACK * smaller["recompute_flops"]:
            found.append(f"{_name(larger)}: recomputes more than at a smaller budget")
    return found


def _name(row: dict[str, Any]) -> str:
    return f"{row['step']} at {_report.format_bytes(row['budget_bytes'])}"


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw compiled peak and recomputed FLOPs against the budget, a line for each step."""
    done = [row for row in rows if row.get("peak_bytes") is not None]
    with _report.figure(path, columns=2, size=(11, 4.4)) as (_, (left, right)):
        for index, name in enumerate(dict.fromkeys(row["step"] for row in done)):
            mine = [row for row in done if row["step"] == name]
            where = [row["budget_bytes"] / _report.GIB for row in mine]
            look = {"marker": "o", "markersize": 4, "color": _report.COLORS[index % len(_report.COLORS)], "label": name}
            left.plot(where, [row["peak_bytes"] / _report.GIB for row in mine], **look)
            right.plot(where, [row["recompute_flops"] / 1e9 for row in mine], **look)
        ends = [row["budget_bytes"] / _report.GIB for row in done]
        diagonal = [min(ends), max(ends)]
        left.plot(diagonal, diagonal, color="black", linestyle=":", linewidth=1, label="budget")
        left.set(title="Compiled peak", xlabel="budget (GiB)", ylabel="GiB")
        right.set(title="Recomputed FLOPs", xlabel="budget (GiB)", ylabel="GFLOP", ylim=(0, None))
        left.legend(loc="upper left")


def main(argv: Sequence[str]) -> int:
    """Compile every budget that is not there yet, then print, write and judge all."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    folder, out = pathlib.Path(values.out_dir), _report.console()
    settings = {"tiny": values.tiny, "target": values.target, "made with": _report.environment(commit=False)}
    cache = _report.Cache(folder / "rows.json", settings)
    rows: list[dict[str, Any]] = []
    found: list[str] = []
    for name in values.steps:
        mine = Sweep(name, values.tiny, values.target, cache).rows(values.budgets)
        rows += mine
        found += violations(mine)
        _report.write_csv(folder / "sweep.csv", rows)
    _report.print_table(COLUMNS, rows, f"Budgets on {values.target}", out)
    if any(row.get("peak_bytes") is not None for row in rows):
        draw(folder / "sweep.png", rows)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in found:
        out.print(f"VIOLATED: {sentence}", soft_wrap=True)
    return 1 if found else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
