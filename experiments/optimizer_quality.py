"""Quality on real text: a byte-level GPT trained with every optimizer, one grid of learning rates, several seeds.

In: flags; the sources of Python's standard library. Out: for each optimizer its best learning rate of the grid, the
loss on held-out files with its spread over the seeds, and the gap to AdamW; a table, a CSV file with every run, a
picture. Exit code 1 where 8-bit or 4-bit AdamW is not within the seeds' spread of AdamW. All optimizers see the same
batches, the same initial parameters, a warm-up over the first tenth and a cosine decay, gradients clipped to a norm of
1, and no weight decay.

The defaults are the size that the figure asks for (10M parameters, 2,000 steps). They take days on a small machine:
what was run is said by the title of the table. A run that was stopped goes on where it was.

    python experiments/optimizer_quality.py --width=64 --depth=2 --heads=2 --length=64 --steps=150 --parallel=6
"""

import functools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import _report
import _text
import numpy as np
from absl import app, flags

CLOSE = ("adamw_8bit", "adamw_4bit")
COLUMNS = (
    _report.Column("optimizer", "optimizer"),
    _report.Column("rate", "best rate", "number"),
    _report.Column("loss", "held-out loss, nats a byte", "number"),
    _report.Column("spread", "spread of seeds", "number"),
    _report.Column("gap", "gap to adamw", "number"),
    _report.Column("state_bytes", "state", "bytes"),
    _report.Column("verdict", "within adamw's spread"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("optimizers", [], "Names to train beside adamw; empty for all.")
    flags.DEFINE_integer("width", 320, "Features.")
    flags.DEFINE_integer("depth", 8, "Layers.")
    flags.DEFINE_integer("heads", 8, "Attention heads.")
    flags.DEFINE_integer("length", 256, "Bytes of a sequence.")
    flags.DEFINE_integer("batch", 16, "Sequences a step.")
    flags.DEFINE_integer("steps", 2000, "Steps of a run.")
    flags.DEFINE_integer("seeds", 3, "Seeds of each rate: of the parameters and the batches.")
    flags.DEFINE_integer("tune_seeds", 0, "Seeds that choose the rate; the others run at that rate alone. 0: all.")
    flags.DEFINE_list("rates", ["1e-3", "3e-3", "1e-2"], "Learning rates, the same for all optimizers.")
    flags.DEFINE_integer("refresh_every", 200, "Updates between two bases of the low-rank optimizers.")
    flags.DEFINE_integer("parallel", 1, "Runs that are trained at once; memory grows with it.")
    flags.DEFINE_string("text_dir", "", "Folder of Python sources; empty for the standard library.")
    flags.DEFINE_string("out_dir", "out/optimizer_quality", "Folder for the CSV file and the picture.")


def optimizers(width: int, refresh_every: int) -> dict[str, Callable[[Any], Any]]:
    """Return the optimizers by name, as functions of a schedule; low ranks are a quarter of the width."""
    import optax

    from memopt import optim

    rank = max(1, width // 4)
    made: dict[str, Callable[[Any], Any]] = {"adamw": optax.adamw, "adafactor": optax.adafactor, "lion": optax.lion}
    made["sm3"] = lambda rate: optax.chain(optax.scale_by_sm3(), optax.scale_by_learning_rate(rate))
    names = "adamw_8bit adamw_4bit lion_8bit momentum_8bit muon muon_8bit came adam_mini".split()
    made |= {name: getattr(optim, name) for name in names}
    low = {"rank": rank, "refresh_every": refresh_every}
    made |= {name: functools.partial(getattr(optim, name), **low) for name in ("galore", "q_galore", "apollo")}
    made["dct_low_rank"] = functools.partial(optim.dct_low_rank, **low)
    made["apollo_mini"] = functools.partial(optim.apollo_mini, refresh_every=refresh_every)
    decays = {"adamw", "lion", *names} - {"momentum_8bit"}
    return {name: functools.partial(make, weight_decay=0.0) if name in decays else make for name, make in made.items()}


class Bench:
    """Trains one optimizer at several rates and seeds, with programs that are compiled once."""

    def __init__(self, values: Any):
        from memopt.models import gpt2

        self.values, self.rates = values, [float(rate) for rate in values.rates]
        sizes = {"layers": values.depth, "width": values.width, "heads": values.heads, "length": values.length}
        self.model = gpt2.GPT2(gpt2.GPT2Config(vocabulary=256, dtype="float32", **sizes))
        folder = values.text_dir or None
        self.train, self.held = (_text.load(split, folder=folder) for split in ("train", "validation"))

    def windows(self, text: Any, step: int, seed: int) -> Any:
        """Return the windows of one step."""
        return _text.batch(text, step=step, size=self.values.batch, length=self.values.length, seed=seed)

    def loss(self, params: Any, windows: Any) -> Any:
        """Return the mean cross-entropy."""
        from memopt.models import common

        return common.mean_cross_entropy(self.model.apply({"params": params}, windows[:, :-1]), windows[:, 1:])

    def transform(self, make: Callable[[Any], Any], rate: Any) -> Any:
        """Return an optimizer with the shared schedule and clipping; the rate may be traced."""
        import jax.numpy as jnp
        import optax

        steps, warm = self.values.steps, max(1, self.values.steps // 10)

        def schedule(count: Any) -> Any:
            left = jnp.clip((count - warm) / max(1, steps - warm), 0.0, 1.0)
            return rate * jnp.minimum((count + 1) / warm, 1.0) * 0.5 * (1 + jnp.cos(math.pi * left))

        return optax.chain(optax.clip_by_global_norm(1.0), make(schedule))

    def run(self, make: Callable[[Any], Any]) -> tuple[np.ndarray, int]:
        """Train all runs; return held-out losses `[rates, seeds]` and the bytes of one state.

        With `tune_seeds` below `seeds` the other seeds run at the best rate alone, and the losses left out are NaN.
        """
        seeds = self.values.seeds
        tuning = min(self.values.tune_seeds or seeds, seeds)
        losses = np.full((len(self.rates), seeds), np.nan)
        programs = self.programs(make)
        grid = [(rate, seed) for rate in range(len(self.rates)) for seed in range(tuning)]
        state_bytes = self.train_all(programs, grid, losses)
        if tuning < seeds:
            best = best_rate(losses[:, :tuning])
            self.train_all(programs, [(best, seed) for seed in range(tuning, seeds)], losses)
        return losses, state_bytes

    def programs(self, make: Callable[[Any], Any]) -> tuple[Callable[..., Any], ...]:
        """Return compiled functions that start, advance and score `parallel` runs of an optimizer."""
        import jax
        import jax.numpy as jnp

        def start(rate: Any, seed: Any) -> Any:
            params = self.model.init(jax.random.key(seed), jnp.zeros((1, self.values.length), jnp.int32))["params"]
            return params, self.transform(make, rate).init(params)

        def advance(run: Any, rate: Any, batches: Any) -> Any:
            optimizer = self.transform(make, rate)

            def step(carry: Any, windows: Any) -> Any:
                params, state = carry
                grads = jax.grad(self.loss)(params, windows)
                updates, state = optimizer.update(grads, state, params)
                return (jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), state), None

            return jax.lax.scan(step, run, batches)[0]

        def score(params: Any, held: Any) -> Any:
            return jax.lax.map(lambda batch: self.loss(params, batch), held).mean()

        if self.values.parallel == 1:  # a batch of one would turn conditions into selections
            alone = lambda fn: lambda *args: jax.tree.map(lambda x: x[None], fn(*jax.tree.map(lambda x: x[0], args)))  # noqa: E731
            held_alone = lambda params, held: score(jax.tree.map(lambda x: x[0], params), held)[None]  # noqa: E731
            return jax.jit(alone(start)), jax.jit(alone(advance), donate_argnums=0), jax.jit(held_alone)
        mapped = jax.vmap(score, in_axes=(0, None))
        return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(advance), donate_argnums=0), jax.jit(mapped)

    def train_all(self, programs: Sequence[Callable[..., Any]], grid: Sequence[tuple[int, int]], losses: Any) -> int:
        """Train the runs of a grid of rates and seeds, write their losses, and return the bytes of one state."""
        import jax
        import jax.numpy as jnp

        start, advance, score = programs
        ways, steps, size = self.values.parallel, self.values.steps, 0
        chunk = min(50, steps)
        held = np.stack([self.windows(self.held, i, 12345) for i in range(8)])
        for first in range(0, len(grid), ways):
            group = (*grid[first : first + ways], *[grid[-1]] * ways)[:ways]  # the last one again, to be full
            rates = jnp.asarray([self.rates[rate] for rate, _ in group])
            states = start(rates, jnp.asarray([seed for _, seed in group]))
            for begin in range(0, steps - steps % chunk, chunk):
                numbers = range(begin, begin + chunk)
                batches = [[self.windows(self.train, i, seed) for i in numbers] for _, seed in group]
                states = advance(states, rates, np.stack([np.stack(one) for one in batches]))
            made = np.asarray(score(states[0], held), np.float64)
            for place, loss in zip(group, made, strict=True):
                losses[place] = loss
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(states[1])) // ways
        return size


def best_rate(losses: np.ndarray) -> int:
    """Return the rate with the smallest mean over seeds; runs that diverged count as infinite."""
    return int(np.where(np.isfinite(losses).all(1), losses.mean(1), math.inf).argmin())


def summary(name: str, losses: np.ndarray, rates: Sequence[float], state_bytes: int) -> dict[str, Any]:
    """Return an optimizer's row: its best rate by the mean over seeds, of those rates that all seeds ran at."""
    best = best_rate(losses)
    ran = np.isfinite(losses[best]).all()
    mean, spread = (float(losses[best].mean()), float(np.ptp(losses[best]))) if ran else (math.inf, math.nan)
    runs = {
        f"{rate:g}/{seed}": float(value)
        for rate, row in zip(rates, losses, strict=True)
        for seed, value in enumerate(row)
        if not np.isnan(value) or best == rates.index(rate)
    }
    row = {"optimizer": name, "rate": rates[best], "loss": mean, "spread": spread}
    return row | {"state_bytes": state_bytes, "runs": runs}


def compare(made: list[dict[str, Any]]) -> None:
    """Add each row's gap to AdamW, and whether it is within the larger of the two spreads."""
    base = next(row for row in made if row["optimizer"] == "adamw")
    for row in made:
        row["gap"] = row["loss"] - base["loss"]
        row["verdict"] = "yes" if row["gap"] <= max(base["spread"], row["spread"]) else "no"


def finished(names: Sequence[str], known: dict[str, Callable[[Any], Any]], values: Any) -> list[dict[str, Any]]:
    """Return the rows of all named optimizers; those that an earlier run of these settings finished are kept."""
    keys = "width depth heads length batch steps seeds tune_seeds rates refresh_every text_dir".split()
    settings = {key: values[key].value for key in keys}
    cache, bench, made = _report.Cache(pathlib.Path(values.out_dir) / "rows.json", settings), Bench(values), []
    for name in names:
        begin, row = time.perf_counter(), cache.get(name)
        if row is None:
            losses, state_bytes = bench.run(known[name])
            row = summary(name, losses, bench.rates, state_bytes)
            cache.put(name, row)
        seconds = time.perf_counter() - begin
        print(f"{name}: {row['loss']:.4f} at {row['rate']:g}, spread {row['spread']:.4f}, {seconds:.0f} s", flush=True)
        made.append(row)
    return made


def main(argv: Sequence[str]) -> int:
    """Train, print, write, draw."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    known = optimizers(values.width, values.refresh_every)
    unknown = [name for name in values.optimizers if name not in known]
    if unknown:
        raise app.UsageError(f"no optimizer {unknown}: choose among {list(known)}")
    names = list(dict.fromkeys(["adamw", *(values.optimizers or known)]))
    made = finished(names, known, values)
    compare(made)
    size = f"{values.depth} layers of {values.width}, {values.batch} sequences of {values.length} bytes"
    title = f"Byte-level GPT, {size}, {values.steps} steps, {values.seeds} seeds, rates {', '.join(values.rates)}"
    _report.print_table(COLUMNS, sorted(made, key=lambda row: row["loss"]), title)
    print(f"made with {_report.environment()}")
    folder = pathlib.Path(values.out_dir)
    _report.write_csv(folder / "optimizer_quality.csv", [{**row, **row["runs"], "runs": size} for row in made])
    draw(made, title, folder / "optimizer_quality.png")
    far = [row["optimizer"] for row in made if row["optimizer"] in CLOSE and row["verdict"] == "no"]
    if far:
        print(f"FAILED: not within the seeds' spread of adamw: {', '.join(far)}", file=sys.stderr)
    return 1 if far else 0


def draw(made: Sequence[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draw each optimizer's loss with the range of its seeds."""
    rows = sorted((row for row in made if math.isfinite(row["loss"])), key=lambda row: -row["loss"])
    with _report.figure(path, size=(8, 6)) as (_, axis):
        for place, row in enumerate(rows):
            best = [value for key, value in row["runs"].items() if key.startswith(f"{row['rate']:g}/")]
            axis.plot([min(best), max(best)], [place, place], color=_report.COLORS[0], linewidth=3)
            axis.plot([statistics.fmean(best)], [place], "o", color=_report.COLORS[1])
        axis.set_yticks(range(len(rows)), [row["optimizer"] for row in rows])
        axis.set_xlabel("held-out loss, nats a byte")
        axis.set_title(title, fontsize=8)


if __name__ == "__main__":
    define_flags()
    app.run(main)
