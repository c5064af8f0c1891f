"""How long planning takes: unrolled programs of 100 to 100,000 equations, GPT-2 unrolled, scanned models of any depth.

In: flags; programs built here and reference steps, as shapes. Out: a row for each program, a table, a CSV file, a
picture and the exponent fitted to the unrolled programs; exit code 1 where a limit is missed. Tracing the user's step
is not counted, nothing is compiled.

    python experiments/planning_time.py --sizes=100,1000,10000
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import _report
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

import memopt
from memopt.models import steps

SIZES = ("100", "300", "1000", "3000", "10000", "30000", "100000")
DEPTHS = ("1", "10", "100", "1000")
BATCH, WIDTH, RATE = 4096, 128, 1e-3
EQUATIONS_PER_LAYER = 18  # Of the step below, forward, backward and update.
LIMIT_SECONDS = {"scanned": 1.0, "gpt2": 5.0}
LIMIT_EXPONENT = 1.3
COLUMNS = (
    _report.Column("program", "program"),
    _report.Column("equations", "equations", "number"),
    _report.Column("planning_seconds", "planning", "seconds"),
    _report.Column("limit_seconds", "limit", "seconds"),
    _report.Column("baseline_peak_bytes", "plain peak", "bytes"),
    _report.Column("predicted_peak_bytes", "planned peak", "bytes"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("sizes", list(SIZES), "Equations of the unrolled programs, about.")
    flags.DEFINE_list("depths", list(DEPTHS), "Layers of the scanned programs.")
    flags.DEFINE_bool("gpt2", True, "Plan GPT-2 with 12 unrolled layers too.")
    flags.DEFINE_string("budget", "80%", "The budget of every plan.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to plan for.")
    flags.DEFINE_string("out_dir", "out/planning_time", "Folder for CSV file and picture.")


def layer(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Apply one residual layer, `[batch, width]` and `[width, width]`."""
    return x + lax.tanh(lax.dot(x, weight)) * 0.5


def unrolled(depth: int) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """Build a training step of unrolled residual layers, and its shapes."""

    def step(weights, x):
        grads = jax.grad(lambda weights: _unrolled_loss(weights, x))(weights)
        return [weight - RATE * grad for weight, grad in zip(weights, grads, strict=True)]

    return step, ([_shape(WIDTH, WIDTH)] * depth, _shape(BATCH, WIDTH))


def _unrolled_loss(weights: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    for weight in weights:
        x = layer(x, weight)
    return jnp.sum(x * x)


def scanned(depth: int) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """Build the same training step with its layers in a scan, and its shapes."""

    def step(weights, x):
        return weights - RATE * jax.grad(lambda weights: _scanned_loss(weights, x))(weights)

    return step, (_shape(depth, WIDTH, WIDTH), _shape(BATCH, WIDTH))


def _scanned_loss(weights: jax.Array, x: jax.Array) -> jax.Array:
    x, _ = lax.scan(lambda x, weight: (layer(x, weight), None), x, weights)
    return jnp.sum(x * x)


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def plan_row(name: str, kind: str, step: Callable[..., Any], args: Sequence[Any], **options: Any) -> dict[str, Any]:
    """Plan one step and return its row."""
    equations = _equation_count(jax.make_jaxpr(step)(*args).jaxpr)
    plan, note = _plan(step, args, options)
    return {
        "program": name,
        "kind": kind,
        "equations": equations,
        "planning_seconds": plan.planning_seconds,
        "limit_seconds": LIMIT_SECONDS.get(kind),
        "baseline_peak_bytes": plan.baseline_peak_bytes,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "note": note,
    }


def _plan(step: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> tuple[memopt.Plan, str]:
    """Plan for the budget, or for the plain peak where nothing can be saved (as in a program of one layer)."""
    try:
        return memopt.optimize(step, **options).plan(*args), ""
    except memopt.BudgetError:
        return memopt.optimize(step, **options | {"budget": "100%"}).plan(*args), "no plan fits; timed at 100%"


def _equation_count(jaxpr: Any) -> int:
    """Count equations with those inside bodies, each body once."""
    bodies = (body for eqn in jaxpr.eqns for body in jax.extend.core.jaxprs_in_params(eqn.params))
    return len(jaxpr.eqns) + sum(map(_equation_count, bodies))


def fitted_exponent(rows: Sequence[dict[str, Any]]) -> float | None:
    """Fit seconds to a power of the equations over the unrolled rows; None for fewer than two."""
    points = [(row["equations"], row["planning_seconds"]) for row in rows if row["kind"] == "unrolled"]
    if len(points) < 2:
        return None
    sizes, seconds = np.log(np.asarray(points)).T
    return float(np.polyfit(sizes, seconds, 1)[0])


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]], exponent: float | None) -> None:
    """Draw planning time against equations, one colour a kind."""
    with _report.figure(path) as (_, axes):
        for color, kind in zip(_report.COLORS, dict.fromkeys(row["kind"] for row in rows), strict=False):
            found = [row for row in rows if row["kind"] == kind]
            label = f"{kind} (exponent {exponent:.2f})" if kind == "unrolled" and exponent is not None else kind
            points = [row["equations"] for row in found], [row["planning_seconds"] for row in found]
            axes.loglog(*points, "o-" if kind == "unrolled" else "o", color=color, label=label)
        axes.set(xlabel="equations", ylabel="planning (s)")
        axes.legend()


def misses(rows: Sequence[dict[str, Any]], exponent: float | None) -> list[str]:
    """Name every limit that was missed."""
    found = [
        f"{row['program']}: {row['planning_seconds']:.2f} s is over {row['limit_seconds']:.0f} s"
        for row in rows
        if row["limit_seconds"] and row["planning_seconds"] > row["limit_seconds"]
    ]
    if exponent is not None and exponent > LIMIT_EXPONENT:
        found.append(f"the fitted exponent {exponent:.2f} is over {LIMIT_EXPONENT}")
    return found


def make_rows(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Plan every program that the flags name."""
    values, rows = flags.FLAGS, []
    for size in map(int, values.sizes):
        depth = max(1, size // EQUATIONS_PER_LAYER)
        rows.append(plan_row(f"residual layers, {depth} unrolled", "unrolled", *unrolled(depth), **options))
    for depth in map(int, values.depths):
        rows.append(plan_row(f"residual layers, {depth} scanned", "scanned", *scanned(depth), **options))
    if values.gpt2:
        step, args, _ = steps.reference_step("gpt2", layers="unrolled")
        rows.append(plan_row("GPT-2 124M, 12 unrolled", "gpt2", step, args, **options))
    return rows


def main(argv: Sequence[str]) -> None:
    """Run the experiment."""
    del argv
    values = flags.FLAGS
    folder = pathlib.Path(values.out_dir)
    rows = make_rows({"budget": values.budget, "target": values.target, "donate_argnums": 0})
    exponent = fitted_exponent(rows)
    _report.print_table(COLUMNS, rows, f"Planning time for {values.target}, budget {values.budget}")
    _report.write_csv(folder / "planning_time.csv", rows)
    draw(folder / "planning_time.png", rows, exponent)
    if exponent is not None:
        print(f"Fitted exponent of the unrolled programs: {exponent:.2f}")
    if missed := misses(rows, exponent):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    define_flags()
    app.run(main)
