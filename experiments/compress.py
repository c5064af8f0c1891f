"""Residuals in few bits against the best plan that only repeats, at the same repeated FLOPs, compiled for a TPU.

In: flags; scanned reference steps as shapes. Out: a row for the plan of `Remat` alone with the smallest predicted peak
within a share of the step's FLOPs, and one for each codec, which repeats the same FLOPs and keeps whatever it keeps in
that codec's form: residual bytes (the stacks that forward loops hand to backward ones, scales and padding included),
compiled temporaries, and how much of the saved residual bytes they fall by. A table and a CSV file.

    python experiments/compress.py --steps=gpt2:scan --small
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("row", "row"),
    _report.Column("recompute_flops", "repeated", "flops"),
    _report.Column("residual_bytes", "residuals", "bytes"),
    _report.Column("residual_share", "of Remat's", "percent"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("fall_share", "fell, of what is saved", "percent"),
    _report.Column("predicted_peak_bytes", "predicted peak", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
)
#: Repeated FLOPs that differ by less than this share count as the same.
SAME = 1e-3


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", ["gpt2:scan"], "Scanned reference steps, as name or name:layers.")
    flags.DEFINE_list("codecs", ["int8", "int4"], "Codecs, as memopt.passes.Compress takes them.")
    flags.DEFINE_float("flops", 0.05, "Repeated FLOPs to allow, as a share of the step's.")
    flags.DEFINE_bool("small", False, "Use the small forms.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_bool("compile", True, "Compile; otherwise predictions alone.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string("out_dir", "out/compress", "Folder for rows and the CSV file.")


def stacked_bytes(closed: Any) -> int:
    """Return the bytes of the results that forward loops stack and backward loops read one after another."""
    jaxpr = getattr(closed, "jaxpr", closed)
    read = {v for eqn in jaxpr.eqns if eqn.params.get("reverse") for v in eqn.invars if not hasattr(v, "val")}
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and not eqn.params["reverse"]]
    found = [v.aval for eqn in loops for v in eqn.outvars if v in read]
    length = {eqn.params["length"] for eqn in loops}
    return sum(aval.size * aval.dtype.itemsize for aval in found if aval.shape and aval.shape[0] in length)


def planned(built: tuple, passes: Sequence[Any], target: str, budget: Any, overrides: dict[str, str]) -> Any:
    """Return the step under a budget."""
    import memopt

    common = dict(target=target, passes=list(passes), overrides=overrides or None, verify=False)
    return memopt.optimize(built[0], budget=budget, **common, **built[2])


def least(built: tuple, passes: Sequence[Any], target: str, most_flops: float, overrides: dict[str, str]) -> Any:
    """Return the step with the plan of the smallest predicted peak within these FLOPs, or with the fewest FLOPs."""
    points = planned(built, passes, target, "100%", overrides).frontier(*built[1])[1:]
    return planned(built, passes, target, smallest(points, most_flops).peak_bytes, overrides)


def smallest(points: Sequence[Any], most_flops: float) -> Any:
    """Return the plan with the smallest predicted peak within these FLOPs, or the one with the fewest."""
    allowed = [p for p in points if p.recompute_flops <= most_flops]
    return min(allowed or points, key=lambda p: p.peak_bytes if allowed else p.recompute_flops)


def coded(built: tuple, passes: Sequence[Any], target: str, base: Any) -> Any:
    """Return the step with the smallest plan by these passes that repeats the FLOPs of the base's.

    Where the smallest within them repeats fewer, because one that takes fewer seconds hides those that repeat as many,
    whatever the base repeats is repeated by request, in every later place.
    """
    wanted = base.plan(*built[1])
    found = least(built, passes, target, wanted.recompute_flops * (1 + SAME), {})
    if abs(found.plan(*built[1]).recompute_flops - wanted.recompute_flops) <= SAME * wanted.recompute_flops:
        return found
    names = {d.name: d.choice for d in wanted.decisions if d.choice == "recompute"}
    return least(built, passes, target, wanted.recompute_flops * (1 + SAME), names)


def figures(step: Any, args: tuple, compiles: bool) -> dict[str, Any]:
    """Return the figures of a step's plan, compiled."""
    plan = step.plan(*args)
    found = {
        "recompute_flops": plan.recompute_flops,
        "baseline_flops": plan.baseline_flops,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "residual_bytes": stacked_bytes(step.trace(*args).jaxpr),
    }
    if compiles:
        memory = step.measure(*args)
        found |= {key: getattr(memory, key) for key in ("temp_bytes", "peak_bytes", "xla_remat_ops", "compile_seconds")}
    return found


def compared(base: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its residual bytes as a share, and by how much of what it saves temporaries fell."""
    saved = base["residual_bytes"] - found["residual_bytes"]
    out = found | {"residual_share": found["residual_bytes"] / base["residual_bytes"]}
    if saved > 0 and found.get("temp_bytes") is not None and base.get("temp_bytes") is not None:
        out["fall_share"] = (base["temp_bytes"] - found["temp_bytes"]) / saved
    return out


def main(argv: Sequence[str]) -> int:
    """Plan and compile every row, then print and write all."""
    import jax

    import memopt
    from memopt.models import steps

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, rows = flags.FLAGS, []
    form = "tiny" if values.tiny else "small" if values.small else "full"
    folder = pathlib.Path(values.out_dir)
    settings = {"form": form, "target": values.target, "flops": values.flops, "compile": values.compile}
    cache = _report.Cache(folder / "rows.json", settings | {"made with": _report.environment(commit=False)})
    for name in values.steps:
        family, _, layers = name.partition(":")
        built = steps.reference_step(family, layers=layers or None, small=values.small, tiny=values.tiny)
        most = values.flops * memopt.matmul_flops(jax.jit(built[0]).trace(*built[1]).jaxpr)
        remat = [memopt.passes.Remat()]
        base = least(built, remat, values.target, most, {})
        for codec in ("", *values.codecs):
            key = f"{name}|{codec}"
            if cache.get(key) is None:
                _report.console().print(f"{name}: {codec or 'Remat alone'} ...")
                passes = [*remat, memopt.passes.Compress(codec, always=True)] if codec else remat
                step = coded(built, passes, values.target, base) if codec else base
                row = {"step": name, "row": codec or "Remat"} | figures(step, built[1], values.compile)
                cache.put(key, row)
            rows.append(compared(cache.get(f"{name}|"), cache.get(key)))
            _report.write_csv(folder / "compress.csv", rows)
    _report.print_table(COLUMNS, rows, f"Residuals in few bits, compiled for {values.target}, {form} forms")
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
