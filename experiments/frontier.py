"""Memory against time: repeating, compressing and offloading residuals, each alone and all in one plan.

In: flags; scanned reference steps as shapes. Out: for each step, technique and budget the plan that takes the least
predicted time within it, its predicted peak and, compiled ahead of time for the target, its compiled peak; a table, a
CSV file and a picture of all plans. The last row of a technique is the smallest peak that it reaches when compiled,
whatever the time. Exit code 1 where the mix is predicted to take longer than a technique alone, compiles to more than a
budget that it claims to fit, or reaches no smaller peak than repeating alone.

    python experiments/frontier.py --steps=gpt2:scan --nocompile
    python experiments/frontier.py --steps=llama_1b:scan --target=tpu:v5p:1x1x1  # whose plans need up to 27 GiB
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("technique", "technique"),
    _report.Column("budget_bytes", "budget", "bytes"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("seconds", "added, predicted", "seconds"),
    _report.Column("recompute_flops", "repeated", "flops"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("host_temp_bytes", "on the host", "bytes"),
    _report.Column("verdict", "verdict"),
)
REPEATING, MIX = "remat", "mix"
#: The smallest budget lies so far above the smallest predicted peak: what is compiled differs from what is predicted.
ABOVE_SMALLEST = 1.04
#: A plan's predicted seconds may be above another's by this much: sums are made in another order.
SLACK_SECONDS = 1e-9


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", ["gpt2:scan", "llama_1b:scan"], "Reference steps, as name or name:layers.")
    flags.DEFINE_string("codec", "int8", "The codec of Compress.")
    flags.DEFINE_integer("budgets", 5, "Budgets between the smallest peak of all and the plain one.")
    flags.DEFINE_bool("small", False, "Use the small forms.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_bool("compile", True, "Compile the mix at each budget; otherwise predictions alone.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to plan and compile for.")
    flags.DEFINE_string("out_dir", "out/frontier", "Folder for rows, CSV file and picture.")


def techniques(codec: str) -> dict[str, list]:
    """Return the lists of passes by name."""
    import memopt

    remat, compress, offload = memopt.passes.Remat(), memopt.passes.Compress(codec), memopt.passes.Offload()
    single = {REPEATING: [remat], f"compress {codec}": [compress], "offload": [offload]}
    return single | {MIX: [remat, compress, offload]}


def points_of(built: tuple, passes: Sequence[Any], target: str) -> list[dict[str, float]]:
    """Return all plans of a list of passes, the plain step first."""
    import memopt

    step, args, options = built
    planned = memopt.optimize(step, budget="100%", target=target, passes=list(passes), verify=False, **options)
    keys = ("peak_bytes", "seconds", "recompute_flops")
    return [{key: getattr(point, key) for key in keys} for point in planned.frontier(*args)]


def cheapest(points: Sequence[dict[str, float]], budget: float) -> dict[str, float] | None:
    """Return the plan that takes the least time within a budget; None where none fits."""
    return min((p for p in points if p["peak_bytes"] <= budget), key=lambda p: p["seconds"], default=None)


def budgets_of(points: dict[str, list[dict[str, float]]], count: int) -> list[int]:
    """Return budgets from the plain peak, left out, down to about the smallest of all, evenly apart."""
    low = min(p["peak_bytes"] for found in points.values() for p in found)
    high = max(p["peak_bytes"] for found in points.values() for p in found)
    return [int(high - (high - low) * (k + 1) / count) for k in range(count - 1)] + [int(ABOVE_SMALLEST * low)]


def rows_at(step: str, budget: int, points: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a row for each technique at a budget, with what the mix is worth there."""
    found = {name: cheapest(one, budget) for name, one in points.items()}
    single = [p["seconds"] for name, p in found.items() if p is not None and name != MIX]
    rows = []
    for name, point in found.items():
        row: dict[str, Any] = {"step": step, "technique": name, "budget_bytes": budget}
        if point is None:
            rows.append(row | {"verdict": "does not fit"})
            continue
        figures = {"predicted_peak_bytes": point["peak_bytes"]} | {k: point[k] for k in ("seconds", "recompute_flops")}
        if name == MIX:
            worse = bool(single) and point["seconds"] > min(single) + SLACK_SECONDS
            figures["verdict"] = "SLOWER" if worse else "no slower" if single else "alone fits"
        rows.append(row | figures)
    return rows


def compiled(built: tuple, passes: Sequence[Any], budget: int, target: str) -> dict[str, Any]:
    """Plan within a budget, compile, plan again where that is over, and return the compiler's figures.

    Where no plan fits, `smallest_bytes` is the smallest compiled peak that was reached.
    """
    import memopt

    step, args, options = built
    planned = memopt.optimize(step, budget=budget, target=target, passes=list(passes), **options)
    try:
        planned.lower(*args).compile()
    except memopt.BudgetError as error:
        return {"smallest_bytes": error.smallest_peak_bytes, "verdict": "no plan fits when compiled"}
    memory = planned.measure(*args)
    return {key: getattr(memory, key) for key in ("peak_bytes", "temp_bytes", "host_temp_bytes", "compile_seconds")}


def smallest(step: str, technique: str, points: Sequence[dict[str, float]], found: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the smallest compiled peak of a technique, from the figures of its smallest predicted plan."""
    row = {"step": step, "technique": technique, "predicted_peak_bytes": min(p["peak_bytes"] for p in points)}
    return row | {"peak_bytes": found.get("peak_bytes", found.get("smallest_bytes")), "verdict": "its smallest"}


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what falls short, a sentence for each."""
    found = []
    for row in rows:
        if row.get("verdict") in ("SLOWER", "no plan fits when compiled"):
            found.append(f"{row['step']}, {row['technique']} at {row['budget_bytes']} bytes: {row['verdict']}")
        if row.get("budget_bytes") and row.get("peak_bytes", 0) > row["budget_bytes"]:
            found.append(f"{row['step']}: {row['peak_bytes']} bytes compiled are over {row['budget_bytes']}")
    least = {(r["step"], r["technique"]): r["peak_bytes"] for r in rows if r.get("verdict") == "its smallest"}
    for (step, technique), peak in least.items():
        if technique == MIX and peak >= least[step, REPEATING]:
            found.append(
                f"{step}: the mix reaches {peak} bytes, no less than {least[step, REPEATING]} by repeating alone"
            )
    return found


def picture(path: pathlib.Path, step: str, points: dict[str, list[dict[str, float]]]) -> None:
    """Draw all plans of a step."""
    with _report.figure(path) as (_, axes):
        for color, (name, found) in zip(_report.COLORS, points.items(), strict=False):
            peaks = [p["peak_bytes"] / _report.GIB for p in found]
            axes.plot(peaks, [1e3 * p["seconds"] for p in found], "o-", label=name, color=color, markersize=3)
        axes.set(title=step, xlabel="predicted peak, GiB", ylabel="added time, predicted, ms")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.legend()


def main(argv: Sequence[str]) -> int:
    """Plan every technique, then compile the mix, print and write."""
    from memopt.models import steps

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, rows = flags.FLAGS, []
    form = "tiny" if values.tiny else "small" if values.small else "full"
    folder = pathlib.Path(values.out_dir)
    settings = {"form": form, "target": values.target, "codec": values.codec}
    cache = _report.Cache(folder / "rows.json", settings | {"made with": _report.environment(commit=False)})
    for name in values.steps:
        family, _, layers = name.partition(":")
        built = steps.reference_step(family, layers=layers or None, small=values.small, tiny=values.tiny)
        known, points = techniques(values.codec), {}
        for technique, passes in known.items():
            key = f"{name}|{technique}"
            if cache.get(key) is None:
                _report.console().print(f"{key} ...")
                cache.put(key, {"points": points_of(built, passes, values.target)})
            points[technique] = cache.get(key)["points"]
        for budget in budgets_of(points, values.budgets):
            found = rows_at(name, budget, points)
            if values.compile:
                key = f"{name}|{MIX}|{budget}"
                if cache.get(key) is None:
                    cache.put(key, compiled(built, known[MIX], budget, values.target))
                found[-1] |= cache.get(key)
            rows += found
            _report.write_csv(folder / "frontier.csv", rows)
        for technique in (REPEATING, MIX) if values.compile else ():
            key = f"{name}|smallest|{technique}"
            if cache.get(key) is None:
                least = int(min(p["peak_bytes"] for p in points[technique]))
                cache.put(key, compiled(built, known[technique], least, values.target))
            rows.append(smallest(name, technique, points[technique], cache.get(key)))
            _report.write_csv(folder / "frontier.csv", rows)
        picture(folder / f"frontier_{name.replace(':', '_')}.png", name, points)
    _report.print_table(COLUMNS, rows, f"Each technique alone and the mix, {values.target}, {form} forms")
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    missed = failures(rows)
    for sentence in missed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
