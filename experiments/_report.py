"""What every experiment prints and writes: tables, CSV files, pictures, one look for all of them.

In: plain rows and numbers that an experiment already has. Out: a table on the terminal, a CSV file, a PNG, a JSON
cache of finished rows. It knows nothing of JAX steps and may not compile, trace or measure anything.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich import console as rich_console
from rich import table as rich_table

MIB = 2**20
GIB = 2**30

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
_PACKAGES = ("memopt", "jax", "jaxlib", "libtpu", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Column:
    """Describe one column: the key of its value in a row, its heading, and how a value is printed.

    `style` is one of "text", "bytes" (MiB or GiB as fits), "flops", "seconds", "percent" (of a fraction), "number".
    """

    key: str
    heading: str
    style: str = "text"


def console(width: int | None = None) -> rich_console.Console:
    """Return the console that experiments print on, at least 150 columns wide where output is no terminal."""
    if width is None and not sys.stdout.isatty():
        width = max(150, int(os.environ.get("COLUMNS", "0") or 0))
    return rich_console.Console(width=width, highlight=False, soft_wrap=False)


def format_bytes(value: float | None) -> str:
    """Return bytes as text in MiB (2**20), or in GiB (2**30) from one GiB on; a dash for None."""
    if value is None:
        return "-"
    if abs(value) >= GIB:
        return f"{value / GIB:,.2f} GiB"
    if abs(value) >= MIB / 10:
        return f"{value / MIB:,.1f} MiB"
    return f"{value:,.0f} B"


def format_flops(value: float | None) -> str:
    """Return a count of floating point operations as text with a decimal prefix; a dash for None."""
    if value is None:
        return "-"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= scale:
            return f"{value / scale:,.2f} {unit}FLOP"
    return f"{value:,.0f} FLOP"


def format_seconds(value: float | None) -> str:
    """Return seconds as text, in milliseconds below one second; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1e3:.1f} ms"


def format_value(value: Any, style: str) -> str:
    """Return a value as text in one of the styles of `Column`.

    Raises:
      ValueError: if the style is not one of them.
    """
    if style == "text":
        return "-" if value is None else str(value)
    if style not in _FORMATS:
        raise ValueError(f"unknown column style {style!r}: use 'text' or one of {sorted(_FORMATS)}")
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    return _FORMATS[style](value)


_FORMATS = {
    "bytes": format_bytes,
    "flops": format_flops,
    "seconds": format_seconds,
    "percent": lambda value: f"{100 * value:.1f} %",
    "number": lambda value: f"{value:,.4g}",
}


def print_table(
    columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], title: str, out: rich_console.Console | None = None
) -> None:
    """Print rows as one table; a row may lack a key, and prints a dash there."""
    table = rich_table.Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.heading, justify="left" if column.style == "text" else "right")
    for row in rows:
        table.add_row(*(format_value(row.get(column.key), column.style) for column in columns))
    (out or console()).print(table)


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file with raw values (bytes, FLOPs, seconds), columns in order of first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=keys, restval="")
        writer.writeheader()
        writer.writerows(rows)


def environment(commit: bool = True) -> str:
    """Return one line that names what made a figure: versions, Python, machine, and the git commit if there is one."""
    parts = [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    parts += [f"Python {platform.python_version()}", f"{platform.machine()} with {os.cpu_count()} cores"]
    found = _commit() if commit else None
    return ", ".join(parts + ([f"commit {found}"] if found else []))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = pathlib.Path(__file__).resolve().parent
    try:
        call = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def figure(
    path: pathlib.Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.0, 4.6), **kwargs: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure and its axes in the common look, then write it as a PNG.

    Args:
      path: where the PNG goes; its folder is made.
      rows, columns: the grid of axes; one axes object if both are 1, an array otherwise.
      size: inches.
      **kwargs: passed to `matplotlib.pyplot.subplots`, as `sharey=True`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_LOOK):
        drawing, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", **kwargs)
        try:
            yield drawing, axes
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing.savefig(path)
        finally:
            pyplot.close(drawing)


_LOOK = {
    "savefig.dpi": 150,
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}


class Cache:
    """Keep the finished rows of a long experiment in one JSON file, so that it can be stopped and continued.

    The file holds the settings that made it; other settings start from nothing, so that rows of two runs never mix.

    Args:
      path: the JSON file; made at the first row.
      settings: what the rows depend on (versions, sizes, target), JSON values.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
        self._path = path
        self._settings = dict(settings)
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] == self._settings:
                self._rows = stored["rows"]

    def get(self, key: str) -> dict[str, Any] | None:
        """Return a copy of the finished row of this key, or None."""
        row = self._rows.get(key)
        return None if row is None else dict(row)

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Store a finished row and write the file, whole or not at all."""
        self._rows[key] = dict(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps({"settings": self._settings, "rows": self._rows}, indent=1), encoding="utf-8")
        draft.replace(self._path)
