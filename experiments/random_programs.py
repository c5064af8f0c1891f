"""Run random training steps through memopt: in comes a number of seeds, out come a tally and the failures as a file.

Each seed of ``tests/random_programs.py`` is traced plainly and through ``memopt.optimize``, and the two jaxprs are held
against each other. Public names of memopt only.

    python experiments/random_programs.py --programs=10000 --out=out/random_programs.json
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
FLAGS = flags.FLAGS
flags.DEFINE_integer("programs", 10_000, "How many seeds to run.")
flags.DEFINE_integer("first", 0, "The first seed.")
flags.DEFINE_integer("processes", 2, "How many processes to use.")
flags.DEFINE_string("budget", "smallest", "Budget of every step, as memopt.optimize takes it, or its smallest peak.")
flags.DEFINE_string("out", "out/random_programs.json", "Where to write the tally and the failures.")


def start() -> None:
    """Prepare a worker: the CPU backend, and the generator on the path."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[0] = str(ROOT)


def run(task: tuple[int, str]) -> dict[str, object]:
    """Return what one seed came to: ``ok``, ``no plan``, ``wrong`` or ``crash``, with its seconds and lines."""
    import memopt
    from tests import random_programs

    seed, budget = task
    began = time.perf_counter()
    try:
        lines = random_programs.check_program(seed, random_programs.through_optimize(memopt.optimize, seed, budget))
        kind = "wrong" if lines else "ok"
    except memopt.BudgetError as error:
        kind, lines = "no plan", [str(error)]
    except Exception:  # noqa: BLE001 - a crash of any kind is a row of the tally, never the end of the run
        kind, lines = "crash", [traceback.format_exc(limit=-6)]
    return {"seed": seed, "kind": kind, "seconds": time.perf_counter() - began, "lines": lines}


def tally(rows: list[dict[str, object]]) -> dict[str, float]:
    """Return how many rows are of each kind, and the seconds of all."""
    kinds = ("ok", "no plan", "wrong", "crash")
    return {
        "programs": len(rows),
        **{k: sum(r["kind"] == k for r in rows) for k in kinds},
        "seconds": round(sum(r["seconds"] for r in rows), 1),
    }


def main(argv: list[str]) -> None:
    """Run the seeds, print the tally, write the failures; exit with 1 if any is wrong or crashed."""
    del argv
    tasks = [(seed, FLAGS.budget) for seed in range(FLAGS.first, FLAGS.first + FLAGS.programs)]
    rows: list[dict[str, object]] = []
    # A fresh process every 500 programs: compiled primitives would otherwise fill memory.
    with multiprocessing.get_context("spawn").Pool(FLAGS.processes, initializer=start, maxtasksperchild=500) as pool:
        for row in pool.imap_unordered(run, tasks):
            rows.append(row)
            if row["kind"] in ("wrong", "crash"):
                print(f"{row['kind']}: seed {row['seed']}: {row['lines'][0][-300:]}", flush=True)
            if len(rows) % 100 == 0:
                print(tally(rows), flush=True)
    result = tally(rows)
    print(result)
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"tally": result, "failures": [r for r in rows if r["kind"] != "ok"]}, indent=1))
    sys.exit(1 if result["wrong"] or result["crash"] else 0)


if __name__ == "__main__":
    app.run(main)
