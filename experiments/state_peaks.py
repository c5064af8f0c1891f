"""What do small states save? The compiled peak of one step with AdamW, and with each pass and each optimizer.

In: flags; a reference step, as shapes. Out: for each variant the bytes of the state, the compiled arguments,
temporaries and peak, what the peak falls by beside what the state falls by, and the compile time beside AdamW's; a
table, a CSV file and a picture. Exit code 1 where a peak falls by less than the state does, or compiling takes more
than twice AdamW's CPU time. No variant repeats anything. A run that was stopped goes on where it was.

    python experiments/state_peaks.py --step=llama_1b --small --variants=adamw,adamw_8bit,pass_int8
"""

import dataclasses
import gc
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import _report
import jax
from absl import app, flags

LONGEST_COMPILE = 2.0
LEAST_SAVED = 0.95  # of what the state saves; a heap has holes of a few per cent
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
    _report.Column("compile_cpu_seconds", "CPU time of it", "seconds"),
    _report.Column("compile_ratio", "of AdamW's", "percent"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_string("step", "llama_1b", "Reference step.")
    flags.DEFINE_list("variants", list(variants(512)), "What to compile; the first is what others are compared with.")
    flags.DEFINE_integer("rank", 512, "Of low-rank states.")
    flags.DEFINE_bool("small", False, "Use the small form.")
    flags.DEFINE_bool("tiny", False, "Use the tiny form, to try the script.")
    flags.DEFINE_list("sizes", [], "Sizes of the model to change, such as width=512,heads=8.")
    flags.DEFINE_string("target", "tpu:v5p:1x1", "What to compile for: a chip on which the plain step fits.")
    flags.DEFINE_string("out_dir", "out/state_peaks", "Folder for the CSV file and the picture.")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to keep the state: an optimizer (None for the step's own AdamW), and passes."""

    optimizer: Callable[[], Any] | None = None
    passes: Callable[[], list[Any]] = list


def variants(rank: int) -> dict[str, Variant]:
    """Return the variants by name, AdamW first."""
    import optax

    from memopt import optim, passes

    rate, decay = 3e-4, 0.1
    low = ("galore", "q_galore", "apollo", "dct_low_rank")
    rest = ("adamw_8bit", "adamw_4bit", "adam_mini", "came", "muon", "muon_8bit", "lion_8bit", "apollo_mini")
    made = {"adamw": Variant()}
    made |= {n: Variant(lambda n=n: getattr(optim, n)(rate, weight_decay=decay)) for n in rest}
    made |= {n: Variant(lambda n=n: getattr(optim, n)(rate, rank=rank, weight_decay=decay)) for n in low}
    made |= {"adafactor": Variant(lambda: optax.adafactor(rate)), "lion": Variant(lambda: optax.lion(rate))}
    codecs = {
        "int8": ("dynamic8", "dynamic8-unsigned"),
        "int4": ("dynamic4", "rank1-linear4"),
    }
    for name, (mu, nu) in codecs.items():
        both = (passes.CompressState(mu, "*.mu*"), passes.CompressState(nu, "*.nu*"))
        made[f"pass_{name}"] = Variant(passes=lambda both=both: list(both))
    made["pass_low_rank"] = Variant(passes=lambda: [passes.LowRankState(rank=rank)])
    made["pass_host"] = Variant(passes=lambda: [passes.Offload(state="*opt_state*")])
    made["pass_fused"] = Variant(passes=lambda: [passes.FuseUpdate()])
    made["pass_fused_host"] = Variant(passes=lambda: [passes.FuseUpdate(), passes.Offload(state="*opt_state*")])
    return made


def row_of(name: str, variant: Variant, target: str, step_name: str, **form: Any) -> dict[str, Any]:
    """Return the figures of one variant."""
    import memopt
    from memopt.models import steps

    optimizer = None if variant.optimizer is None else variant.optimizer()
    step, (state, batch), options = steps.reference_step(step_name, layers="scan", optimizer=optimizer, **form)
    made = memopt.optimize(step, target=target, passes=variant.passes(), **options)
    state = made.compress(state)
    made.plan(state, batch)
    begin = time.process_time()  # of all cores: other programs do not add to it
    memory = made.measure(state, batch)
    return {
        "variant": name,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(state)),
        "argument_bytes": memory.argument_bytes,
        "temp_bytes": memory.temp_bytes,
        "peak_bytes": memory.peak_bytes,
        "host_bytes": memory.host_temp_bytes,
        "compile_seconds": memory.compile_seconds,
        "compile_cpu_seconds": time.process_time() - begin,
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row what it saves beside the first one."""
    first = rows[0]
    for row in rows[1:]:
        row["saved_bytes"] = first["peak_bytes"] - row["peak_bytes"]
        row["state_saved_bytes"] = first["state_bytes"] - row["state_bytes"]
        row["compile_ratio"] = row["compile_cpu_seconds"] / first["compile_cpu_seconds"]


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw arguments and temporaries on each other, one bar a variant."""
    with _report.figure(path) as (_, axes):
        base = [row["argument_bytes"] / _report.GIB for row in rows]
        rest = [row["temp_bytes"] / _report.GIB for row in rows]
        axes.bar(range(len(rows)), base, color=_report.COLORS[0], label="arguments")
        axes.bar(range(len(rows)), rest, bottom=base, color=_report.COLORS[1], label="temporaries")
        axes.set_xticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set_ylabel("GiB")
        axes.set_title("One step, by how its state is kept")
        axes.tick_params(axis="x", rotation=60)
        axes.legend()


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name every variant whose peak falls by less than its arguments, or that compiles too long."""
    found = []
    for row in rows[1:]:
        less = rows[0]["argument_bytes"] - row["argument_bytes"]
        if row["saved_bytes"] < LEAST_SAVED * less:
            found.append(f"{row['variant']}: the peak falls by {row['saved_bytes']:,} bytes, the arguments by {less:,}")
        if row["compile_ratio"] > LONGEST_COMPILE:
            found.append(f"{row['variant']}: compiling takes {row['compile_ratio']:.1f} times as long")
    return found


def main(argv: Sequence[str]) -> int:
    """Compile each variant and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    known, folder = variants(values.rank), pathlib.Path(values.out_dir)
    if unknown := [name for name in values.variants if name not in known]:
        raise app.UsageError(f"no variant {unknown[0]!r}: choose from {', '.join(known)}")
    settings = {key: values[key].value for key in ("step", "rank", "small", "tiny", "sizes", "target")}
    form = {"small": values.small, "tiny": values.tiny}
    form |= {name: int(size) for name, size in (pair.split("=") for pair in values.sizes)}
    cache = _report.Cache(folder / "rows.json", settings)
    for name in values.variants:
        row = cache.get(name)
        if row is None:
            row = row_of(name, known[name], values.target, values.step, **form)
            cache.put(name, row)
        rows.append(row)
        gc.collect()
        compare(rows)
        _report.write_csv(folder / "state_peaks.csv", rows)
    draw(folder / "state_peaks.png", rows)
    sizes = f" with {', '.join(values.sizes)}" if values.sizes else ""
    _report.print_table(COLUMNS, rows, f"{values.step}{sizes}, compiled for {values.target}", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
