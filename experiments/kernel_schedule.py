"""How good are the attention kernels' schedules? A static count of cycles beside JAX's flash and splash, and tokamax.

In: flags; lengths, head sizes, masks and TPU kinds. Out: for each the cycles and the share of matmul slots that the
compiler's final bundles have, forward (as in training: the log-sum-exp is kept) and backward, of memopt at the block
sizes that it chooses itself and of each other system at its best of the printed ones; a table, a CSV file and a cache
of finished rows. All sizes are counted at one length; at the next one those that were within `--slack` of the best,
because edges of a mask weigh less than that more from a length to its double. Regions count as often as the scalar
unit's own control flow runs them, alike for all. It is a static count, not a time: waits for DMA and memory are not in
it, nor is what XLA does between kernels. Exit code 1 where memopt's count is above the best other one in a row, or
above 0.9 of it in the median.

    python experiments/kernel_schedule.py --lengths=2048 --head_dims=128 --targets=v5e
"""

import functools
import hashlib
import importlib.metadata
import itertools
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
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
PASSES = ("forward", "backward")
_CASE = ("target", "pass", "length", "head_dim", "causal")
Row = dict[str, Any]


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("lengths", ["2048", "4096", "8192", "16384", "32768"], "Lengths of queries and keys.")
    flags.DEFINE_list("head_dims", ["64", "128"], "Head sizes.")
    flags.DEFINE_list("masks", ["causal", "full"], "Masks.")
    flags.DEFINE_list("targets", ["v5e", "v6e"], "TPU kinds.")
    flags.DEFINE_list("systems", list(programs.SYSTEMS), "Whose kernels.")
    flags.DEFINE_list("blocks", ["x".join(map(str, b)) for b in programs.BLOCKS], "Block sizes, queries x keys.")
    flags.DEFINE_list("memopt_blocks", [], "Block sizes for memopt's kernels; none: those it chooses itself.")
    flags.DEFINE_integer("all_at", 4096, "The length, or the next one asked for, at which all sizes are counted.")
    flags.DEFINE_float("slack", 1.1, "How far from the best a size is still counted at the next length.")
    flags.DEFINE_integer("heads", 2, "Heads; cycles grow with them.")
    flags.DEFINE_string("out_dir", "out/kernel_schedule", "Folder for the CSV file and finished rows.")


def cases(values: Any) -> Iterator[Row]:
    """Yield what the flags ask for, without lengths: target, head size, mask, heads."""
    for target, head_dim, mask in itertools.product(values.targets, values.head_dims, values.masks):
        yield {"target": target, "head_dim": int(head_dim), "causal": mask == "causal", "heads": values.heads}


def chain(lengths: Sequence[int], all_at: int) -> list[tuple[int, int | None]]:
    """Return the lengths in the order in which they are counted, each with the one that its candidates come from.

    Example:
        >>> chain([8, 2, 4], 4)
        [(4, None), (2, 4), (8, 4)]
    """
    found = sorted(lengths)
    first = next((i for i, one in enumerate(found) if one >= all_at), len(found) - 1)
    below = [(found[i], found[i + 1]) for i in range(first - 1, -1, -1)]
    return [(found[first], None), *below, *((found[i], found[i - 1]) for i in range(first + 1, len(found)))]


def counted(values: Any, case: Row, count: Callable[[Row], Row]) -> Iterator[Row]:
    """Yield the rows of a case, a pass each: all block sizes at one length, and those near the best at the others."""
    blocks = [[int(n) for n in one.split("x")] for one in values.blocks]
    own: list[Any] = [[int(n) for n in one.split("x")] for one in values.memopt_blocks] or [None]
    ours = [("memopt", size) for size in own] if "memopt" in values.systems else []
    others = list(itertools.product((one for one in values.systems if one != "memopt"), blocks))
    rows: dict[int, list[Row]] = {}
    for length, before in chain([int(one) for one in values.lengths], values.all_at):
        theirs = others if before is None else near(rows[before], values.slack)
        rows[length] = []
        for system, size in [*ours, *theirs]:
            if size is None or max(size) <= length:
                made = split(count(case | {"length": length, "system": system, "blocks": size}))
                rows[length] += made
                yield from made


def split(row: Row) -> list[Row]:
    """Return the rows of both passes of a program."""
    shared = {name: one for name, one in row.items() if name not in PASSES}
    return [shared | {"pass": name} | row.get(name, {"note": "was not reached"}) for name in PASSES]


def near(rows: Sequence[Row], slack: float) -> list[tuple[str, list[int]]]:
    """Return systems and block sizes within a factor of the best other one in a pass."""
    rows, least = [row for row in rows if row["system"] != "memopt"], dict.fromkeys(PASSES, float("inf"))
    for row in rows:
        least[row["pass"]] = min(least[row["pass"]], row.get("cycles", float("inf")))
    kept = [row for row in rows if "cycles" in row and row["cycles"] <= slack * least[row["pass"]]]
    found = dict.fromkeys((row["system"], tuple(row["blocks"])) for row in kept)
    return [(system, list(size)) for system, size in found]


def best(rows: Sequence[Row]) -> list[Row]:
    """Return, of each case and system, the row with the fewest cycles, with memopt's ratio to it."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (*(row[name] for name in _CASE), row["system"])
        if "cycles" not in found.get(key, {}) or row.get("cycles", float("inf")) < found[key]["cycles"]:
            found[key] = row
    made = []
    for row in found.values():
        ours = found.get((*(row[name] for name in _CASE), "memopt"), {}).get("cycles")
        ratio = f"{ours / row['cycles']:.3f}" if ours and row.get("cycles") and row["system"] != "memopt" else None
        size = ("x".join(map(str, row["blocks"])) if row["blocks"] else "its own") if "cycles" in row else None
        made.append(row | {"best": size, "ratio": ratio, "mask": "causal" if row["causal"] else "full"})
    return sorted(made, key=lambda row: [str(row[name]) if name != "length" else f"{row[name]:9}" for name in _CASE])


def ratios(rows: Sequence[Row]) -> dict[tuple[Any, ...], tuple[int, int, str] | None]:
    """Return of each case memopt's cycles, the fewest of the others and whose they are; None where one is missing."""
    found: dict[tuple[Any, ...], tuple[int, int, str] | None] = {}
    for case in dict.fromkeys(tuple(row[name] for name in _CASE) for row in rows):
        here = [row for row in rows if tuple(row[name] for name in _CASE) == case and "cycles" in row]
        ours = [row["cycles"] for row in here if row["system"] == "memopt"]
        others = [(row["cycles"], row["system"]) for row in here if row["system"] != "memopt"]
        found[case] = (min(ours), *min(others)) if ours and others else None
    return found


def misses(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each case in which another system has fewer cycles, and one for the median."""
    sentences, found = [], ratios(rows)
    for case, one in found.items():
        if one is None:
            sentences.append(f"{_named(case)}: memopt or all others could not be counted")
        elif one[0] > one[1]:
            sentences.append(f"{_named(case)}: {one[0]:,} cycles, {one[2]} {one[1]:,} ({one[0] / one[1]:.3f})")
    if any(found.values()) and (middle := _median(found)) > 0.9:
        sentences.append(f"the median is {middle:.3f} of the best other one: 0.9 is asked")
    return sentences


def _median(found: dict[tuple[Any, ...], tuple[int, int, str] | None]) -> float:
    return statistics.median(one[0] / one[1] for one in found.values() if one)


def _named(case: tuple[Any, ...]) -> str:
    target, which, length, head_dim, causal = case
    return f"{target} {which}, length {length}, head size {head_dim}, {'causal' if causal else 'full'}"


def _digest() -> str:
    """Return a digest of memopt's kernels, of which its rows are."""
    from memopt import pallas_kernels

    found = hashlib.sha256()
    for path in sorted(pathlib.Path(pallas_kernels.__file__).parent.glob("attention/*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _cached(cache: _report.Cache, worker: programs.Worker, config: Row) -> Row:
    name = f"memopt {_digest()}" if config["system"] == "memopt" else config["system"]
    key = " ".join(str(x) for x in (*(v for k, v in sorted(config.items()) if k != "system"), name))
    if (row := cache.get(key)) is None:
        cache.put(key, row := worker.count(config))
    return row


def _peers() -> str:
    try:
        return f"tokamax {importlib.metadata.version('tokamax')}"
    except importlib.metadata.PackageNotFoundError:
        return "no tokamax"


def main(argv: Sequence[str]) -> int:
    """Count every program and print the best of each system."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    folder = pathlib.Path(values.out_dir)
    cache = _report.Cache(folder / "rows.json", {"made with": f"{_report.environment(commit=False)}, {_peers()}"})
    with programs.Worker() as worker:
        for case in cases(values):
            for row in counted(values, case, functools.partial(_cached, cache, worker)):
                rows.append(row)
                _report.write_csv(folder / "kernel_schedule.csv", rows)
    chosen = best(rows)
    _report.print_table(COLUMNS, chosen, f"Static count of cycles, not a time ({values.heads} heads, bfloat16)", out)
    if any(found := list(ratios(chosen).values())):
        parts = [one[0] / one[1] for one in found if one]
        out.print(f"  {len(parts)} cases; memopt / best other: {min(parts):.3f} to {max(parts):.3f}, ", end="")
        out.print(f"median {statistics.median(parts):.3f}")
    out.print(f"  block sizes tried, queries x keys: {', '.join(values.blocks)}", soft_wrap=True)
    out.print(f"  made with {_report.environment()}, {_peers()}", soft_wrap=True)
    for sentence in misses(chosen):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(chosen) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
