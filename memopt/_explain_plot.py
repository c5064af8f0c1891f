"""The picture of a memory timeline: which module holds how much memory at which point of the step.

In: sampled bytes per module path (from `memopt._explain`) and matplotlib axes. Out: a stacked area, its peak marked. It
chooses colours and labels only; it knows nothing of jaxprs, and matplotlib is imported at the first picture.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

OTHER = "other"
NO_MODULE = "outside modules"
FIXED = "arguments and outputs"
#: Okabe and Ito's colours, which stay apart for colour-blind readers; arguments and the rest are grey.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#332288")
FIXED_COLOR, OTHER_COLOR = "#D0D0D0", "#8A8A8A"
_MIB = 2**20


def top_modules(module_bytes: Mapping[str, int], limit: int = 7) -> list[str]:
    """Choose the module paths that a picture tells apart, by splitting the largest group until there are enough.

    Args:
        module_bytes: bytes of each full module path.
        limit: most groups.

    Returns:
        Paths, largest first. A full path belongs to the longest of them that it starts with.

    Example:
        >>> top_modules({"net/a/x": 5, "net/a/y": 4, "net/b": 3}, limit=3)
        ['net/a/x', 'net/a/y', 'net/b']
    """
    groups, closed = _grouped(module_bytes, {""}), {NO_MODULE}
    while open_ := [path for path in groups if path not in closed]:
        largest = max(open_, key=lambda path: (groups[path], path))
        closed.add(largest)
        children = {_child(path, largest) for path in module_bytes if path != largest and _under(path, largest)}
        split = _grouped(module_bytes, (set(groups) - {NO_MODULE}) | children - {""})
        if len(_large(split)) <= limit:
            groups = split
    return sorted(_large(groups), key=lambda path: (-groups[path], path))


def _large(groups: Mapping[str, int]) -> list[str]:
    """Return the groups that a picture can show: at least 2 % of all bytes."""
    return [path for path, size in groups.items() if path and size >= 0.02 * sum(groups.values())]


def group_of(path: str, modules: Iterable[str]) -> str:
    """Return the longest of `modules` that a module path lies under, `"other"` where there is none."""
    if not path:
        return NO_MODULE
    return max((module for module in modules if _under(path, module)), key=len, default=OTHER)


def _grouped(module_bytes: Mapping[str, int], modules: set[str]) -> dict[str, int]:
    found: collections.Counter[str] = collections.Counter()
    for path, size in module_bytes.items():
        found[group_of(path, modules)] += size
    return dict(found)


def _under(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + "/")


def _child(path: str, parent: str) -> str:
    depth = len(parent.split("/")) if parent else 0
    return "/".join(path.split("/")[: depth + 1])


def plot(
    axes: Any, samples: Sequence[tuple[int, Mapping[str, int]]], fixed_bytes: int, modules: Sequence[str], legend: bool
) -> None:
    """Draw a stacked area over the step on matplotlib axes, in MiB, with the peak marked.

    Args:
        axes: matplotlib axes.
        samples: bytes of temporaries and bytes of each module path, in the step's order.
        fixed_bytes: bytes that are there all the time, drawn at the bottom.
        modules: paths told apart; the rest is "other".
        legend: draw one beside the axes.
    """
    layers = _layers(samples, modules)
    where = np.linspace(0, 100, len(samples))
    fixed = np.full(len(samples), fixed_bytes / _MIB)
    heights = [fixed, *(layers[name] / _MIB for name in layers)]
    hues = (OTHER_COLOR if name == OTHER else COLORS[i % len(COLORS)] for i, name in enumerate(layers))
    colors = [FIXED_COLOR, *hues]
    axes.stackplot(where, heights, labels=[FIXED, *layers], colors=colors, step="mid", linewidth=0)
    total = np.sum(heights, axis=0)
    _mark_peak(axes, where, total)
    axes.set(xlim=(0, 100), ylim=(0, max(axes.get_ylim()[1], 1.18 * total.max())))
    axes.set(xlabel="position in the step (%), loops unrolled", ylabel="predicted memory (MiB)")
    if legend:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False
        )


def _mark_peak(axes: Any, where: np.ndarray, total: np.ndarray) -> None:
    peak = int(total.argmax())
    side = "left" if where[peak] < 15 else "right" if where[peak] > 85 else "center"
    axes.plot(where[peak], total[peak], marker="v", color="black", markersize=6, clip_on=False, zorder=5)
    axes.annotate(
        f"peak {total[peak]:,.0f} MiB", (where[peak], total[peak]), xytext=(0, 7), textcoords="offset points", ha=side
    )


def _layers(samples: Sequence[tuple[int, Mapping[str, int]]], modules: Sequence[str]) -> dict[str, np.ndarray]:
    """Return one row of bytes for each group, scaled so that a column sums to the predicted temporaries."""
    names = [*(name for name in modules if name not in (NO_MODULE, OTHER)), NO_MODULE, OTHER]
    rows = {name: np.zeros(len(samples)) for name in names}
    for index, (temp_bytes, module_bytes) in enumerate(samples):
        named = sum(module_bytes.values())
        scale = min(1.0, temp_bytes / named) if named else 0.0
        for path, size in module_bytes.items():
            rows[group_of(path, modules)][index] += scale * size
        rows[OTHER][index] += max(0, temp_bytes - named)
    floor = 0.01 * max((temp_bytes for temp_bytes, _ in samples), default=0)
    return {name: row for name, row in rows.items() if row.max(initial=0) > floor or name in modules}
