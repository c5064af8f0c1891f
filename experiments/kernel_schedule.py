"""How good are the attention kernels' schedules? A static count of cycles beside JAX's flash and splash, and tokamax.

In: flags; lengths, head sizes, masks and TPU kinds. Out: for each the cycles and the share of matmul slots that the
compiler's final bundles have, forward and backward, of each system at the best of the printed block sizes; a table and
a CSV file. Regions count as often as the scalar unit's own control flow runs them, alike for all. It is a static count,
not a time: waits for DMA and memory are not in it, nor is what XLA does between kernels. Exit code 1 where memopt's
count is above the best other one in a row, or above 0.9 of it in the median.

    python experiments/kernel_schedule.py --lengths=2048 --head_dims=128 --targets=v5e
"""

import itertools
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import _report
import _schedule_programs as programs
from absl import app, flags

COLUMNS = (
    _report.Column("target", "target"),
    _report.Column("pass", "pass"),
    _report.Column("length", "length", "number"),
    _report.Column("head_dim", "head size", "number"),
    _report.Column("mask", "mask"),
    _report.Column("system", "system"),
    _report.Column("best", "best blocks"),
    _report.Column("cycles", "static cycles", "number"),
    _report.Column("use", "matmul slots used", "percent"),
    _report.Column("ratio", "memopt / this"),
    _report.Column("note", "note"),
)
_CASE = ("target", "pass", "length", "head_dim", "causal")


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("lengths", ["2048", "4096", "8192", "16384", "32768"], "Lengths of queries and keys.")
    flags.DEFINE_list("head_dims", ["64", "128"], "Head sizes.")
    flags.DEFINE_list("masks", ["causal", "full"], "Masks.")
    flags.DEFINE_list("passes", ["forward", "backward"], "Passes.")
    flags.DEFINE_list("targets", ["v5e", "v6e"], "TPU kinds.")
    flags.DEFINE_list("systems", list(programs.SYSTEMS), "Whose kernels.")
    flags.DEFINE_list("blocks", ["x".join(map(str, b)) for b in programs.BLOCKS], "Block sizes, queries x keys.")
    flags.DEFINE_integer("heads", 2, "Heads; cycles grow with them.")
    flags.DEFINE_string("out_dir", "out/kernel_schedule", "Folder for the CSV file.")


def configs(values: Any) -> Iterator[dict[str, Any]]:
    """Yield every program that the flags ask for; the forward pass of fused splash is that of splash."""
    blocks = [[int(n) for n in one.split("x")] for one in values.blocks]
    cases = itertools.product(values.targets, values.passes, values.lengths, values.head_dims, values.masks)
    for (target, which, length, head_dim, mask), system, block in itertools.product(cases, values.systems, blocks):
        if max(block) > int(length) or (which == "forward" and system == "splash fused"):
            continue
        one = {"target": target, "pass": which, "length": int(length), "head_dim": int(head_dim)}
        yield one | {"causal": mask == "causal", "system": system, "blocks": block, "heads": values.heads}


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, of each case and system, the row with the fewest cycles, with memopt's ratio to it."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (*(row[name] for name in _CASE), row["system"])
        if "cycles" not in found.get(key, {}) or row.get("cycles", float("inf")) < found[key]["cycles"]:
            found[key] = row
    made = []
    for row in found.values():
        ours = found.get((*(row[name] for name in _CASE), "memopt"), {}).get("cycles")
        ratio = f"{ours / row['cycles']:.3f}" if ours and row.get("cycles") and row["system"] != "memopt" else None
        size = "x".join(map(str, row["blocks"])) if "cycles" in row else None
        made.append(row | {"best": size, "ratio": ratio, "mask": "causal" if row["causal"] else "full"})
    return made


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each case in which another system has fewer cycles, and one for the median."""
    sentences, ratios = [], []
    for case in dict.fromkeys(tuple(row[name] for name in _CASE) for row in rows):
        here = [row for row in rows if tuple(row[name] for name in _CASE) == case]
        ours = [row["cycles"] for row in here if row["system"] == "memopt" and "cycles" in row]
        others = [(row["cycles"], row["system"]) for row in here if row["system"] != "memopt" and "cycles" in row]
        if not ours or not others:
            sentences.append(f"{_named(case)}: {'memopt' if not ours else 'the others'} could not be counted")
            continue
        least, system = min(others)
        ratios.append(ours[0] / least)
        if ours[0] > least:
            sentences.append(f"{_named(case)}: {ours[0]:,} cycles, {system} {least:,} ({ratios[-1]:.3f})")
    if ratios and (middle := statistics.median(ratios)) > 0.9:
        sentences.append(f"the median is {middle:.3f} of the best other one: 0.9 is asked")
    return sentences


def _named(case: tuple[Any, ...]) -> str:
    target, which, length, head_dim, causal = case
    return f"{target} {which}, length {length}, head size {head_dim}, {'causal' if causal else 'full'}"


def main(argv: Sequence[str]) -> int:
    """Count every program and print the best of each system."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    for row in programs.answers(list(configs(values))):
        rows.append(row)
        _report.write_csv(pathlib.Path(values.out_dir) / "kernel_schedule.csv", rows)
    chosen = best(rows)
    _report.print_table(COLUMNS, chosen, f"Static count of cycles, not a time ({values.heads} heads, bfloat16)", out)
    out.print(f"  block sizes tried, queries x keys: {', '.join(values.blocks)}", soft_wrap=True)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(chosen):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(chosen) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
