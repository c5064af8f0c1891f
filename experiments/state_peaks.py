"""What do passes over the state save? The compiled peak of one step with AdamW, plain and with each of them.

In: flags; a reference step, as shapes. Out: for each variant the bytes of the state, the compiled arguments,
temporaries and peak, what the peak falls by beside what the state falls by, and the compile time beside plain's; a
table, a CSV file and a picture. No variant repeats anything.

    python experiments/state_peaks.py --step=llama_1b --small --variants=plain,int8
"""

import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import _report
import jax
from absl import app, flags

COLUMNS = (
    _report.Column("variant", "state"),
    _report.Column("state_bytes", "bytes of it", "bytes"),
    _report.Column("argument_bytes", "arguments", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("saved_bytes", "peak falls by", "bytes"),
    _report.Column("state_saved_bytes", "state by", "bytes"),
    _report.Column("host_bytes", "temporaries on the host", "bytes"),
    _report.Column("compile_seconds", "compiling", "seconds"),
    _report.Column("compile_ratio", "of plain's", "percent"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_string("step", "llama_1b", "Reference step.")
    flags.DEFINE_list("variants", list(variants()), "What to compile.")
    flags.DEFINE_bool("small", False, "Use the small form.")
    flags.DEFINE_bool("tiny", False, "Use the tiny form, to try the script.")
    flags.DEFINE_string("target", "tpu:v5p:1x1", "What to compile for: a chip on which the plain step fits.")
    flags.DEFINE_string("out_dir", "out/state_peaks", "Folder for the CSV file and the picture.")


def variants() -> dict[str, Callable[[], list[Any]]]:
    """Return the variants: a name, and what makes its passes."""
    import memopt

    p = memopt.passes
    return {
        "plain": list,
        "fused": lambda: [p.FuseUpdate()],
        "int8": lambda: [p.CompressState("dynamic8", "*.mu*"), p.CompressState("dynamic8-unsigned", "*.nu*")],
        "int4": lambda: [p.CompressState("dynamic4", "*.mu*"), p.CompressState("rank1-linear4", "*.nu*")],
        "low_rank": lambda: [p.LowRankState(rank=512)],
        "host": lambda: [p.Offload(state="*opt_state*")],
    }


def row_of(name: str, passes: Sequence[Any], case: Any, target: str) -> dict[str, Any]:
    """Return the figures of one variant."""
    import memopt

    step, (state, batch), options = case
    made = memopt.optimize(step, target=target, passes=list(passes), **options)
    state = made.compress(state)
    memory = made.measure(state, batch)
    return {
        "variant": name,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(state)),
        "argument_bytes": memory.argument_bytes,
        "temp_bytes": memory.temp_bytes,
        "peak_bytes": memory.peak_bytes,
        "host_bytes": memory.host_temp_bytes,
        "compile_seconds": memory.compile_seconds,
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row what it saves beside the first one."""
    first = rows[0]
    for row in rows[1:]:
        row["saved_bytes"] = first["peak_bytes"] - row["peak_bytes"]
        row["state_saved_bytes"] = first["state_bytes"] - row["state_bytes"]
        row["compile_ratio"] = row["compile_seconds"] / first["compile_seconds"]


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw arguments and temporaries on each other, one bar a variant."""
    with _report.figure(path) as (_, axes):
        base = [row["argument_bytes"] / _report.GIB for row in rows]
        rest = [row["temp_bytes"] / _report.GIB for row in rows]
        axes.bar(range(len(rows)), base, color=_report.COLORS[0], label="arguments")
        axes.bar(range(len(rows)), rest, bottom=base, color=_report.COLORS[1], label="temporaries")
        axes.set_xticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set_ylabel("GiB")
        axes.set_title("One step with AdamW, by how its state is stored")
        axes.legend()


def main(argv: Sequence[str]) -> None:
    """Compile each variant and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    from memopt.models import steps

    values, out, rows = flags.FLAGS, _report.console(), []
    known, folder = variants(), pathlib.Path(values.out_dir)
    if unknown := [name for name in values.variants if name not in known]:
        raise app.UsageError(f"no variant {unknown[0]!r}: choose from {', '.join(known)}")
    case = steps.reference_step(values.step, layers="scan", small=values.small, tiny=values.tiny)
    for name in values.variants:
        rows.append(row_of(name, known[name](), case, values.target))
        gc.collect()
        compare(rows)
        _report.write_csv(folder / "state_peaks.csv", rows)
    draw(folder / "state_peaks.png", rows)
    _report.print_table(COLUMNS, rows, f"{values.step}, compiled for {values.target}", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
