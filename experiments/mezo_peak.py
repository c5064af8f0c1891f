"""MeZO's memory: the compiled peak of its step beside that of the forward pass, for GPT-2 124M.

In: flags. Out: a row for each method, a table and a CSV file; exit code 1 where the peak of the plain method is over
the forward pass's plus the largest leaf. Nothing is run: shapes are compiled ahead of time.

    python experiments/mezo_peak.py --methods=sgd --target=tpu:v5e:1x1
"""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

COLUMNS = (
    _report.Column("what", "step"),
    _report.Column("argument_bytes", "arguments", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("over_bytes", "over the forward pass", "bytes"),
    _report.Column("leaves", "largest leaves", "number"),
    _report.Column("compile_seconds", "compiled in", "seconds"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_string("step", "gpt2", "Reference step.")
    flags.DEFINE_bool("small", False, "Its small form.")
    flags.DEFINE_bool("tiny", False, "Its form for tests.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_list("methods", ["sgd"], "MeZO methods: sgd, momentum, adam.")
    flags.DEFINE_string("out_dir", "out/mezo_peak", "Folder for the CSV file.")


def forward_of(name: str, small: bool, tiny: bool) -> tuple[Any, Any, Any]:
    """Return the loss function of a reference step, and the shapes of its parameters and its batch."""
    from memopt.models import common, steps

    _, (state, batch), _ = steps.reference_step(name, small=small, tiny=tiny)
    apply_fn = state.apply_fn

    def loss_fn(params: Any, batch: Any) -> Any:
        return common.mean_cross_entropy(apply_fn({"params": params}, batch["tokens"]), batch["labels"])

    return loss_fn, state.params, batch


def rows(name: str, small: bool, tiny: bool, target: str, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Compile the forward pass and a MeZO step of each method, and return their figures."""
    import jax

    import memopt

    loss_fn, params, batch = forward_of(name, small, tiny)
    leaf_bytes = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    forward = memopt.measure(loss_fn, params, batch, target=target)
    made = [row("forward pass", forward, forward, leaf_bytes)]
    for method in methods:
        step = memopt.optim.mezo(loss_fn, 1e-6, method=method)
        state = jax.eval_shape(step.init, params)
        figures = memopt.measure(step, state, batch, target=target, donate_argnums=0)
        made.append(row(f"MeZO, {method}", figures, forward, leaf_bytes))
    return made


def row(what: str, memory: Any, forward: Any, leaf_bytes: int) -> dict[str, Any]:
    """Return one row; `leaves` is what is over the forward pass, in units of the largest leaf."""
    keys = ("argument_bytes", "temp_bytes", "peak_bytes", "compile_seconds")
    over = memory.peak_bytes - forward.peak_bytes
    figures = {key: getattr(memory, key) for key in keys}
    return {"what": what, **figures, "over_bytes": over, "leaves": over / leaf_bytes, "leaf_bytes": leaf_bytes}


def main(argv: Sequence[str]) -> int:
    """Measure, print, write."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    made = rows(values.step, values.small, values.tiny, values.target, values.methods)
    _report.print_table(COLUMNS, made, f"{values.step} on {values.target}")
    print(f"made with {_report.environment()}")
    _report.write_csv(pathlib.Path(values.out_dir) / "mezo_peak.csv", made)
    plain = [one for one in made if one["what"] == "MeZO, sgd"]
    if any(one["leaves"] > 1 for one in plain):
        print("FAILED: MeZO needs more than the forward pass and one leaf", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
