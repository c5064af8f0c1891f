"""Time of a training step on the CPU with each optimizer, against `optax.adamw`, in one run.

In: flags; the zoo's byte-level GPT. Out: a table and a CSV file; exit code 1 where 8-bit AdamW takes more than 1.5
times AdamW's time, or APOLLO at a quarter of the width more than 1.3 times. The optimizers take turns, one step each,
and the smallest time of each counts, so that a busy machine slows them alike. Seconds are those of the process on all
cores (CPU time), which other programs do not add to; wall time stands beside them.

    python experiments/optimizer_time.py --optimizers=adamw,adamw_8bit,apollo --rounds=5
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import _report
from absl import app, flags

LIMITS = {"adamw_8bit": 1.5, "apollo": 1.3}
COLUMNS = (
    _report.Column("optimizer", "optimizer"),
    _report.Column("cpu_seconds", "CPU time of a step", "seconds"),
    _report.Column("ratio", "against adamw", "number"),
    _report.Column("wall_seconds", "wall time", "seconds"),
    _report.Column("state_bytes", "state", "bytes"),
    _report.Column("limit", "at most", "number"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("optimizers", [], "Names to time beside adamw; empty for all.")
    flags.DEFINE_integer("rounds", 5, "Timed steps of each, after one that compiles.")
    flags.DEFINE_integer("batch", 16, "Sequences a step.")
    flags.DEFINE_integer("depth", 8, "Layers.")
    flags.DEFINE_string("out_dir", "out/optimizer_time", "Folder for the CSV file.")


def optimizers(width: int) -> dict[str, Callable[[], Any]]:
    """Return the optimizers by name; low ranks are a quarter of the width."""
    import optax

    from memopt import optim

    rank, rate = width // 4, 1e-4
    names = "adam_mini adamw_8bit adamw_4bit came lion_8bit muon muon_8bit apollo_mini".split()
    made: dict[str, Callable[[], Any]] = {"adamw": lambda: optax.adamw(rate)}
    made |= {name: lambda name=name: getattr(optim, name)(rate) for name in names}
    low = ("apollo", "galore", "q_galore", "dct_low_rank")
    return made | {name: lambda name=name: getattr(optim, name)(rate, rank=rank) for name in low}


def prepare(optimizer: Any, batch: int, depth: int) -> tuple[Callable[..., Any], Any, Any]:
    """Return a compiled step, a state and a batch, after one step."""
    import jax

    from memopt.models import steps

    step, shapes, options = steps.reference_step("gpt_bytes", batch=batch, depth=depth, optimizer=optimizer)
    state, data = steps.concrete(shapes)
    state = state.replace(opt_state=optimizer.init(state.params))
    run = jax.jit(step, **options)
    state, loss = run(state, data)
    jax.block_until_ready((state, loss))
    return run, state, data


def rows(names: Sequence[str], rounds: int, batch: int, depth: int) -> list[dict[str, Any]]:
    """Time all optimizers in turns, and return their rows."""
    import jax

    made = optimizers(256)
    ready = {}
    for name in dict.fromkeys(["adamw", *names]):
        ready[name] = prepare(made[name](), batch, depth)
        print(f"compiled {name}", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (run, state, data) in ready.items():
            cpu, wall = time.process_time(), time.perf_counter()
            state, loss = run(state, data)
            jax.block_until_ready((state, loss))
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            ready[name] = (run, state, data)
    base = min(cpu for cpu, _ in times["adamw"])
    return [_row(name, times[name], base, ready[name][1].opt_state) for name in ready]


def _row(name: str, times: Sequence[tuple[float, float]], base: float, state: Any) -> dict[str, Any]:
    import jax

    cpu, wall = (min(values) for values in zip(*times, strict=True))
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    figures = {"cpu_seconds": cpu, "wall_seconds": wall, "ratio": cpu / base, "state_bytes": state_bytes}
    return {"optimizer": name, **figures, "limit": LIMITS.get(name)}


def main(argv: Sequence[str]) -> int:
    """Time, print, write."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    known = optimizers(256)
    unknown = [name for name in values.optimizers if name not in known]
    if unknown:
        raise app.UsageError(f"no optimizer {unknown}: choose among {list(known)}")
    made = rows(values.optimizers or list(known), values.rounds, values.batch, values.depth)
    title = (
        f"Byte-level GPT, {values.depth} layers of 256, {values.batch} sequences of 256 bytes, best of {values.rounds}"
    )
    _report.print_table(COLUMNS, made, title)
    print(f"made with {_report.environment()}")
    _report.write_csv(pathlib.Path(values.out_dir) / "optimizer_time.csv", made)
    slow = [row["optimizer"] for row in made if row["limit"] and row["ratio"] > row["limit"]]
    if slow:
        print(f"FAILED: over the limit: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
