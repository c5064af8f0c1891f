"""Does memopt change results? Ten steps against plain jit, over models, budgets and dtypes.

In: flags; the tiny reference steps with real arrays. Out: a row for each model, dtype and budget, a table and a CSV
file; exit code 1 where a parameter is further from the plain step's than allowed: 1e-12 of its norm in float64, 1e-5 in
float32, and in bfloat16 no further from a float64 run than 1.5 times the plain bfloat16 step is.

    python experiments/exactness.py --models=gpt2 --dtypes=float32
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import _report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import memopt
from memopt.models import steps

MODELS = ("gpt2:scan", "gpt2:unrolled", "llama_1b:scan", "vit_b:unrolled", "resnet:unrolled", "lstm:scan")
LIMITS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1.5}
COLUMNS = (
    _report.Column("model", "model"),
    _report.Column("dtype", "dtype"),
    _report.Column("budget", "budget"),
    _report.Column("recompute_flops", "recomputed", "flops"),
    _report.Column("difference", "difference", "number"),
    _report.Column("limit", "limit", "number"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("models", list(MODELS), "Reference steps, as name or name:layers.")
    flags.DEFINE_list("budgets", ["80%", "60%"], "Budgets, as shares of the plain step's peak.")
    flags.DEFINE_list("dtypes", list(LIMITS), "Dtypes of the computation.")
    flags.DEFINE_integer("steps", 10, "Steps to take.", lower_bound=1)
    flags.DEFINE_string("out_dir", "out/exactness", "Folder for the CSV file.")


def build(model: str, dtype: str) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """Return the tiny form of a reference step with SGD, and its arrays; parameters are float32 for bfloat16."""
    name, _, layers = model.partition(":")
    wide = jnp.dtype("float32" if dtype == "bfloat16" else dtype)
    step, shapes, _ = steps.reference_step(
        name, layers=layers or None, tiny=True, optimizer=optax.sgd(0.1), dtype=jnp.dtype(dtype), param_dtype=wide
    )
    return step, steps.concrete(shapes, seed=0)


def run(step: Callable[..., Any], args: tuple[Any, Any], count: int) -> list[np.ndarray]:
    """Take steps on one batch and return the parameters as float64."""
    state, batch = args
    for _ in range(count):
        state, _ = step(state, batch)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]


def distance(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """Return the largest difference of two leaves, as a fraction of the right one's norm."""
    pairs = zip(left, right, strict=True)
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in pairs)


def rows_of(model: str, dtype: str, budgets: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return a row a budget for one model and dtype."""
    step, args = build(model, dtype)
    plain = run(jax.jit(step), args, count)
    exact = run(jax.jit(build(model, "float64")[0]), build(model, "float64")[1], count) if dtype == "bfloat16" else None
    return [_row(model, dtype, budget, (step, args), (plain, exact), count) for budget in budgets]


def _row(model: str, dtype: str, budget: str, case: Any, references: Any, count: int) -> dict[str, Any]:
    (step, args), (plain, exact) = case, references
    row = {"model": model, "dtype": dtype, "budget": budget, "limit": LIMITS[dtype]}
    optimized, ours, note = planned_run(step, args, budget, count)
    row["recompute_flops"] = optimized.plan(*args).recompute_flops
    if exact is None:
        return row | {"difference": distance(ours, plain), "note": note}
    note = "; ".join(filter(None, ("plain's = 1", note)))
    return row | {"difference": distance(ours, exact) / max(distance(plain, exact), 1e-30), "note": note}


def planned_run(step: Any, args: Any, budget: str, count: int) -> tuple[Any, list[np.ndarray], str]:
    """Run a step within a budget, or by the smallest plan where the compiled peaks of none fit: results are asked for.

    Tiny steps on the CPU often take more than their plan says, because XLA:CPU does not order unrolled programs.
    """
    optimized = memopt.optimize(step, budget=budget)
    try:
        return optimized, run(optimized, args, count), ""
    except memopt.BudgetError:
        pass
    optimized = memopt.optimize(step, budget=budget, verify=False)
    try:
        return optimized, run(optimized, args, count), "compiled over the budget"
    except memopt.BudgetError as error:
        budget_bytes = int(1.1 * error.smallest_peak_bytes)  # float64 widens batch statistics in the first step
        optimized = memopt.optimize(step, budget=budget_bytes, verify=False)
        return optimized, run(optimized, args, count), "the smallest plan"


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name every row over its limit, or say that no row was measured at all."""
    measured = [row for row in rows if "difference" in row]
    if not measured:
        return ["no budget could be met, so nothing was compared: pass larger --budgets"]
    return [
        f"{row['model']} {row['dtype']} at {row['budget']}: {row['difference']:.3g} is over {row['limit']:.3g}"
        for row in measured
        if not row["difference"] <= row["limit"]  # a NaN is a miss
    ]


def main(argv: Sequence[str]) -> None:
    """Run the experiment."""
    del argv
    values = flags.FLAGS
    jax.config.update("jax_enable_x64", True)
    rows = []
    for model in values.models:
        for dtype in values.dtypes:
            rows += rows_of(model, dtype, values.budgets, values.steps)
    _report.print_table(COLUMNS, rows, f"Largest difference of a parameter after {values.steps} steps")
    _report.write_csv(pathlib.Path(values.out_dir) / "exactness.csv", rows)
    if missed := misses(rows):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    define_flags()
    app.run(main)
