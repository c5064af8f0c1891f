"""Our optimizers beside PyTorch's on one small problem: state in bytes, and how far apart the weights end.

In: flags; the peers that are installed (`pip install -e '.[peers]'`: bitsandbytes, torchao, galore-torch,
apollo-torch). Out: a row for each pair with its state's bytes a parameter, the relative difference of what the weights
moved after the same gradients, and the loss that each reaches when it follows its own gradients, as a mean and a spread
over seeds; a table and a CSV file. A peer that is not installed, or does not run on a CPU, is a row that says so.

The problem is a regression by a network of one hidden layer, worked in NumPy: 262,656 weights, one matrix projected
from each side, and a bias. Both sides start from the same weights and take the same float32 gradients and settings.

Where both sides compute the same, exit code 1 says that they do not (`must`): plain AdamW, 8-bit AdamW and momentum
with the peer's blocks of 256, GaLore and APOLLO with our projections lent to theirs. Where they do not, why:

- bitsandbytes: the same 256 values, but on a CPU its code is not the nearest for 0.15 % of first and 3 % of second
  moments (measured; off by at most 3e-5 of a block's largest). Lion takes a sign, which such a code can turn.
- torchao, 4-bit: its second moment has a scale for each block of 128, ours one for each row and each column (rank-1, as
  published); first moments have the same map and blocks.
- GaLore: theirs takes singular vectors, ours another orthonormal basis of nearly the same subspace, of a range finder;
  Adam is not invariant under a rotation of its coordinates.
- APOLLO: each draws its own random projection, of which ours is not kept; and theirs limits the growth of the update's
  norm before it corrects the bias of the moments, ours after it.

    python experiments/optimizer_peers.py --steps=20 --seeds=1
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import _peer_pairs
import _peers
import _report
import numpy as np
from absl import app, flags

INPUTS, HIDDEN, OUTPUTS = 256, 512, 256
COLUMNS = (
    _report.Column("optimizer", "optimizer"),
    _report.Column("peer", "beside"),
    _report.Column("our_bytes", "state, bytes a parameter", "number"),
    _report.Column("peer_bytes", "peer's", "number"),
    _report.Column("difference", "weights apart", "number"),
    _report.Column("our_loss", "loss", "number"),
    _report.Column("peer_loss", "peer's", "number"),
    _report.Column("spread", "spread of seeds", "number"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_integer("steps", 100, "Updates.")
    flags.DEFINE_integer("seeds", 3, "Problems, and projections, of which the losses are a mean.")
    flags.DEFINE_float("rate", 3e-3, "Learning rate; Lion's and momentum's are a third.")
    flags.DEFINE_float("weight_decay", 0.01, "Decoupled weight decay.")
    flags.DEFINE_integer("rank", 32, "Rank of GaLore and APOLLO.")
    flags.DEFINE_integer("refresh_every", 50, "Updates between two projections.")
    flags.DEFINE_string("out_dir", "out/optimizer_peers", "Folder for the CSV file.")


class Problem:
    """A regression by a network of one hidden layer.

    Args:
      seed: of the data, of the weights, and of the batches.
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.seed = seed
        self.inputs = rng.standard_normal((1024, INPUTS))
        teacher = rng.standard_normal((INPUTS, 16)) @ rng.standard_normal((16, OUTPUTS)) / INPUTS**0.5
        self.targets = np.tanh(self.inputs @ teacher / 4) + 0.1 * rng.standard_normal((1024, OUTPUTS))
        self.weights = {
            "first": _draw(rng, INPUTS, HIDDEN),
            "bias": np.zeros(HIDDEN, np.float32),
            "second": _draw(rng, HIDDEN, OUTPUTS),
        }

    def loss(self, weights: _peers.Weights) -> float:
        """Return the mean squared error on all data."""
        hidden = np.tanh(self.inputs @ weights["first"] + weights["bias"])
        return float(np.mean((hidden @ weights["second"] - self.targets) ** 2))

    def grads(self, weights: _peers.Weights, step: int) -> dict[str, np.ndarray]:
        """Return the gradients of half the squared error a sample on the batch of 128 of one step, float32."""
        rows = np.random.default_rng((self.seed, step)).choice(len(self.inputs), 128, replace=False)
        inputs = self.inputs[rows]
        hidden = np.tanh(inputs @ weights["first"] + weights["bias"])
        error = (hidden @ weights["second"] - self.targets[rows]) / len(rows)
        back = (error @ weights["second"].T) * (1 - hidden**2)
        found = {"first": inputs.T @ back, "bias": back.sum(0), "second": hidden.T @ error}
        return {name: value.astype(np.float32) for name, value in found.items()}


def _draw(rng: Any, rows: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)


def run(
    pair: Any, settings: Any, problem: Problem, steps: int, recorded: Sequence[_peers.Weights] | None = None
) -> tuple[_peers.Ours, _peers.Theirs]:
    """Take the steps on both sides, side by side; return both sides.

    Args:
      pair: which optimizers.
      settings: what they are given.
      problem: where they start.
      steps: how many.
      recorded: the gradients of each step; None for each side's own.
    """
    mine = _peers.Ours(pair.ours(settings), problem.weights)
    theirs = _peers.Theirs(lambda parameters: pair.theirs(parameters, settings, mine), problem.weights)
    for step in range(steps):
        for side in (mine, theirs):
            side.step(problem.grads(side.weights, step) if recorded is None else recorded[step])
    return mine, theirs


def record(problem: Problem, settings: Any, steps: int) -> list[_peers.Weights]:
    """Return the gradients along the way of optax's AdamW."""
    side, found = _peers.Ours(_peer_pairs.plain_pairs()[0].ours(settings), problem.weights), []
    for step in range(steps):
        found.append(problem.grads(side.weights, step))
        side.step(found[-1])
    return found


def apart(ours: _peers.Weights, theirs: _peers.Weights, start: _peers.Weights) -> float:
    """Return the largest distance of two arrays of weights, relative to how far theirs moved from the start."""
    moved = {name: np.linalg.norm(theirs[name] - first) for name, first in start.items()}
    return float(max(np.linalg.norm(ours[name] - theirs[name]) / moved[name] for name in start))


def row_of(pair: Any, settings: Any, recorded: Sequence[_peers.Weights], problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the figures of one pair, or why there are none.

    Args:
      pair: which optimizers.
      settings: what they are given.
      recorded: gradients of the first problem, one for each step.
      problems: on which losses are reached.
    """
    row: dict[str, Any] = {"optimizer": pair.name, "peer": pair.peer, "must": pair.must}
    if pair.peer not in _peers.versions():
        return {**row, "note": "not installed"}
    row["peer"] += f" {_peers.versions()[pair.peer]}"
    first, steps = problems[0], len(recorded)
    try:
        mine, theirs = run(pair, settings, first, steps, recorded)
        runs = [run(pair, dataclasses.replace(settings, seed=one.seed), one, steps) for one in problems]
    except (AssertionError, ImportError, NotImplementedError, OSError, RuntimeError) as error:
        return {**row, "note": f"does not run here: {str(error).splitlines()[0]}"}
    size = sum(value.size for value in first.weights.values())
    losses = [
        [one.loss(side.weights) for one, side in zip(problems, sides, strict=True)] for sides in zip(*runs, strict=True)
    ]
    return row | {
        "our_bytes": mine.state_bytes() / size,
        "peer_bytes": theirs.state_bytes() / size,
        "difference": apart(mine.weights, theirs.weights, first.weights),
        "our_loss": statistics.mean(losses[0]),
        "peer_loss": statistics.mean(losses[1]),
        "spread": max(max(side) - min(side) for side in losses),
    }


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name every pair that computes the same and does not end the same."""
    known = [row for row in rows if row["must"] is not None and "difference" in row]
    return [
        f"{row['optimizer']} beside {row['peer']}: the weights are {row['difference']:.2g} apart, at most {row['must']}"
        for row in known
        if not row["difference"] <= row["must"]
    ]


def main(argv: Sequence[str]) -> int:
    """Run all pairs and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    _peers.quiet()
    problems = [Problem(seed) for seed in range(values.seeds)]
    settings = _peer_pairs.Settings(values.rate, values.weight_decay, values.rank, values.refresh_every)
    recorded = record(problems[0], settings, values.steps)
    for pair in _peer_pairs.pairs():
        rows.append(row_of(pair, settings, recorded, problems))
        _report.write_csv(pathlib.Path(values.out_dir) / "optimizer_peers.csv", rows)
    _report.print_table(COLUMNS, rows, f"{values.steps} updates, {values.seeds} seeds, on the CPU", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
