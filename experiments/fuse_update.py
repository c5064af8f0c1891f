"""Do gradients still pile up? A scanned step as written and with its updates inside the backward loop.

In: flags; reference steps, as shapes. Out: for each step the compiled temporaries and peak, plain and with `FuseUpdate`
alone (nothing is repeated), and the share of the stacked gradients' bytes that is gone; a table, a CSV file and a
picture. Exit code 1 where less than 80 % is gone.

    python experiments/fuse_update.py --steps=gpt2 --small --optimizer=galore
"""

import gc
import pathlib
from collections.abc import Sequence
from typing import Any

import _report
from absl import app, flags

LEAST = 0.8
COLUMNS = (
    _report.Column("step", "step"),
    _report.Column("optimizer", "optimizer"),
    _report.Column("gradient_bytes", "stacked gradients", "bytes"),
    _report.Column("plain_temp_bytes", "temporaries, plain", "bytes"),
    _report.Column("temp_bytes", "fused", "bytes"),
    _report.Column("share", "gradients gone", "percent"),
    _report.Column("plain_peak_bytes", "peak, plain", "bytes"),
    _report.Column("peak_bytes", "fused", "bytes"),
    _report.Column("plain_compile_seconds", "compiling, plain", "seconds"),
    _report.Column("compile_seconds", "fused", "seconds"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("steps", ["llama_1b"], "Reference steps; their layers are a scan.")
    flags.DEFINE_enum("optimizer", "adamw", ["adamw", "galore", "muon"], "Its update; GaLore's rank is 512.")
    flags.DEFINE_bool("small", False, "Use the small forms.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_string("target", "tpu:v5p:1x1", "What to compile for: a chip on which the plain step fits.")
    flags.DEFINE_string("out_dir", "out/fuse_update", "Folder for the CSV file and the picture.")


def transform(optimizer: str) -> Any:
    """Return an optimizer by name; None is the reference steps' own."""
    from memopt import optim

    return {"adamw": None, "galore": optim.galore(1e-3, rank=512), "muon": optim.muon(1e-3)}[optimizer]


def row_of(name: str, target: str, optimizer: str, **form: bool) -> dict[str, Any]:
    """Return the figures of one step, plain and with its updates fused."""
    import memopt
    from memopt.models import steps

    step, args, options = steps.reference_step(name, layers="scan", optimizer=transform(optimizer), **form)
    plain = memopt.measure(step, *args, target=target, **options)
    fused = memopt.optimize(step, target=target, passes=[memopt.passes.FuseUpdate()], **options)
    memory = fused.measure(*args)
    gradients = sum(row.value_bytes for row in fused.plan(*args).decisions if row.choice == "fuse_update")
    return {
        "step": name,
        "optimizer": optimizer,
        "gradient_bytes": gradients,
        "plain_temp_bytes": plain.temp_bytes,
        "temp_bytes": memory.temp_bytes,
        "share": (plain.temp_bytes - memory.temp_bytes) / max(gradients, 1),
        "plain_peak_bytes": plain.peak_bytes,
        "peak_bytes": memory.peak_bytes,
        "plain_compile_seconds": plain.compile_seconds,
        "compile_seconds": memory.compile_seconds,
    }


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name every step of whose gradients too much is left."""
    return [f"{row['step']}: {row['share']:.0%} of the gradients are gone" for row in rows if row["share"] < LEAST]


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw temporaries beside each other, with the gradients' bytes as a line."""
    with _report.figure(path) as (_, axes):
        for i, row in enumerate(rows):
            values = [row["plain_temp_bytes"] / _report.MIB, row["temp_bytes"] / _report.MIB]
            axes.bar([i - 0.2, i + 0.2], values, width=0.35, color=_report.COLORS[:2])
            level = values[0] - row["gradient_bytes"] / _report.MIB
            axes.hlines(level, i - 0.4, i + 0.4, color=_report.COLORS[7], linestyle="--")
        axes.set_xticks(range(len(rows)), [row["step"] for row in rows])
        axes.set_ylabel("temporaries, MiB")
        axes.set_title("Plain and with fused updates; dashed: plain without its stacked gradients")


def main(argv: Sequence[str]) -> int:
    """Compile each step twice and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    folder = pathlib.Path(values.out_dir)
    for name in values.steps:
        rows.append(row_of(name, values.target, values.optimizer, small=values.small, tiny=values.tiny))
        gc.collect()
        _report.write_csv(folder / "fuse_update.csv", rows)
    draw(folder / "fuse_update.png", rows)
    _report.print_table(COLUMNS, rows, f"Compiled for {values.target}", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
