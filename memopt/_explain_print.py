"""The printed form of an `Explanation`: three short tables and the advice.

In: an `Explanation`. Out: text, plain enough for a log file. Nothing is computed here but sums for the tables.
"""

from __future__ import annotations

import collections
import io
import re
from collections.abc import Sequence
from typing import Any

from memopt._errors import format_bytes
from memopt._explain_walk import Alive, general, short
from memopt._plan import told_dropped

_WIDTH = 170
_ROWS = 16
_WIDE = {"why it is kept": 44}


def text(explanation: Any) -> str:
    """Return the whole explanation as text."""
    from rich import console as rich_console

    out = rich_console.Console(file=io.StringIO(), width=_WIDTH, highlight=False, markup=False, emoji=False)
    out.print(_heading(explanation))
    out.print(_figures(explanation))
    out.print(_alive(explanation.alive))
    if explanation.sharding:
        out.print(_sharding(explanation.sharding))
    for line in told_dropped(explanation.dropped):
        out.print(line)
    if explanation.advice:
        out.print("What would help, most bytes first (they overlap):")
    for item in explanation.advice[:8]:
        out.print(f"  {format_bytes(-item.bytes):>11}  {item.text}")
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def _heading(explanation: Any) -> str:
    limit_bytes = explanation.limit_bytes
    verdict = ""
    if limit_bytes is not None:
        fits = explanation.peak_bytes <= limit_bytes
        verdict = f", which {'fits' if fits else 'does not fit'} the limit of {format_bytes(limit_bytes)}"
    return f"Predicted peak on {explanation.target}: {format_bytes(explanation.peak_bytes)}{verdict}."


def _table(headings: Sequence[str], right: Sequence[int], title: str = "") -> Any:
    from rich import box
    from rich import table as rich_table

    table = rich_table.Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=True)
    for index, heading in enumerate(headings):
        table.add_column(
            heading, justify="right" if index in right else "left", overflow="fold", min_width=_WIDE.get(heading)
        )
    return table


def _figures(explanation: Any) -> Any:
    compiled = explanation.compiled
    table = _table(["", "predicted", *(["compiled"] if compiled else [])], right=(1, 2))
    names = {"argument": "arguments", "output": "outputs", "alias": "aliased", "temp": "temporaries", "peak": "peak"}
    for key, name in names.items():
        row = [name, format_bytes(getattr(explanation, f"{key}_bytes"))]
        table.add_row(*row, *([format_bytes(compiled[f"{key}_bytes"])] if compiled else []))
    return table


def _alive(alive: Sequence[Alive]) -> Any:
    headings = ["bytes", "kind", "values", "module", "made by", "at", "why it is kept", "repeat"]
    table = _table(headings, right=(0, 7), title="Alive at the predicted peak, largest first")
    groups = _grouped(alive)
    for group in groups[:_ROWS]:
        table.add_row(*_row(group))
    rest = [item for group in groups[_ROWS:] for item in group]
    if rest:
        table.add_row(format_bytes(sum(item.bytes for item in rest)), "", f"{len(rest)} smaller ones", *[""] * 5)
    return table


def _sharding(rows: Sequence[Any]) -> Any:
    table = _table(["what", "bytes", "how", "per device, and why"], right=(1,), title="Sharding")
    for row in rows:
        size = format_bytes(row.value_bytes) if row.value_bytes else ""
        table.add_row(row.name.removeprefix("shard/"), size, row.choice, row.reason)
    return table


def _grouped(alive: Sequence[Alive]) -> list[list[Alive]]:
    """Join leaves of one argument tree, and values that one line of one module (of each layer) makes, largest first."""
    groups: dict[tuple, list[Alive]] = {}
    for item in alive:
        source = short(item.source)
        tree = _tree(item)
        key = (item.kind, general(item.module), tree or source or item.operation)
        groups.setdefault(key, []).append(item)
    return sorted(groups.values(), key=lambda group: -sum(item.bytes for item in group))


def _tree(item: Alive) -> str:
    """Return the tree that an argument's leaf is part of: `[0].params` of `argument [0].params['w']`."""
    found = re.match(r"argument (\[[^\]]*\](?:\.\w+)?)", item.operation)
    return found[1] if found else ""


def _row(group: Sequence[Alive]) -> list[str]:
    forms = collections.Counter(f"{item.dtype}{list(item.shape)}".replace(" ", "") for item in group if item.dtype)
    values = [f"{count} x {form}" if count > 1 else form for form, count in forms.most_common(2)]
    made_by = ", ".join(dict.fromkeys(item.operation for item in group))
    if group[0].kind == "argument":
        values, made_by = [f"{len(group)} leaves"], f"argument {_tree(group[0])}"
    others = f" (+{more} more)" if (more := len({item.why for item in group}) - 1) else ""
    size = format_bytes(sum(item.bytes for item in group))
    return [
        size,
        group[0].kind,
        "\n".join(values),
        general(group[0].module),
        made_by,
        short(group[0].source),
        group[0].why + others,
        _price(group),
    ]


def _price(group: Sequence[Alive]) -> str:
    if group[0].repeat_flops is None:
        return ""
    flops = sum(item.repeat_flops or 0 for item in group)
    return f"{flops / 1e9:,.2f} GFLOP" if flops >= 1e7 else "no matmul"
