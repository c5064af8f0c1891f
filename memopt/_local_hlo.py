"""The reading desk: shapes that one device holds, read from a compiled program's text.

In: the optimized HLO of a step. Out: for an operation of its jaxpr, by name stack, primitive and global shapes, the
shapes of its results on one device, where the text tells them. Nothing here compiles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]

_INSTRUCTION = re.compile(r'^\s*(?:ROOT\s+)?%?[\w.\-]+ = (\(.*?\)|\S+) [\w\-]+\(.*op_name="([^"]*)"', re.MULTILINE)
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")


def parts(text: str) -> dict[str, list[tuple[list[str], list[Shape]]]]:
    """Return primitive name -> the name stack and result shapes of every instruction that was made for it."""
    found: dict[str, list[tuple[list[str], list[Shape]]]] = {}
    for results, op_name in _INSTRUCTION.findall(text):
        *stack, primitive = op_name.split("/")
        shapes = [tuple(int(size) for size in dims.split(",") if size) for dims in _SHAPE.findall(results)]
        found.setdefault(primitive, []).append((stack, shapes))
    return found


def find(
    known: Mapping[str, list[tuple[list[str], list[Shape]]]], stack: str, primitive: str, shapes: Sequence[Shape]
) -> list[Shape] | None:
    """Return the shapes of an operation's results on one device, the largest where instructions differ; None if untold.

    Args:
      known: what `parts` made.
      stack: the operation's name stack, those of the equations around it joined to its own.
      primitive: its name.
      shapes: its results' global shapes.
    """
    path = [part for part in stack.split("/") if part]
    fitting = [
        local for around, local in known.get(primitive, ()) if _within(path, around) and _fits(shapes, local)
    ]
    return max(fitting, key=lambda local: sum(map(_size, local)), default=None)


def _size(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _within(path: Sequence[str], around: Sequence[str]) -> bool:
    """Say whether the parts of one path occur in another, in order."""
    rest = iter(around)
    return all(part in rest for part in path)


def _fits(shapes: Sequence[Shape], local: Sequence[Shape]) -> bool:
    """Say whether each local shape is the global one with dimensions divided by whole numbers."""
    if len(shapes) != len(local):
        return False
    pairs = [(whole, part) for whole, part in zip(shapes, local, strict=True)]
    return all(
        len(whole) == len(part) and all(p and -(-w // -(-w // p)) == p for w, p in zip(whole, part, strict=True))
        for whole, part in pairs
    )
