"""The reading desk: shapes that one device holds, read from a compiled program's text.

In: the optimized HLO of a step. Out: for an operation of its jaxpr, by name stack, primitive and global shapes, the
shapes of its results on one device, where the text tells them. Nothing here compiles.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

Shape = tuple[int, ...]
Parts = dict[tuple[tuple[str, ...], str], list[list[Shape]]]

_INSTRUCTION = re.compile(r'^\s*(?:ROOT\s+)?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(.*op_name="([^"]*)"', re.MULTILINE)
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")
#: What lowering puts between name scopes.
_PLUMBING = re.compile(
    r"^(?:while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|checkpoint|rematted_computation|p?jit\(.*\)|)$"
)
#: Instructions that carry another operation's name: what the partitioner and the layouts add.
_ADDED = frozenset(
    "all-gather all-reduce all-to-all collective-permute reduce-scatter copy bitcast parameter constant tuple fusion "
    "get-tuple-element dynamic-slice dynamic-update-slice broadcast reshape transpose while conditional call slice pad "
    "iota partition-id all-gather-start all-gather-done all-reduce-start all-reduce-done copy-start copy-done".split()
)
#: Operations whose own instruction is among these; their shardings follow from their neighbours'.
SHAPING = frozenset(
    "broadcast_in_dim reshape squeeze expand_dims transpose slice pad dynamic_slice dynamic_update_slice iota copy "
    "split "
    "concatenate scan while cond optimization_barrier sharding_constraint".split()
)


def parts(text: str) -> Parts:
    """Return (module path, primitive) -> the result shapes of every instruction that was made for it."""
    found: Parts = {}
    for results, opcode, op_name in _INSTRUCTION.findall(text):
        if opcode not in _ADDED:
            *stack, primitive = op_name.split("/")
            shapes = [tuple(int(size) for size in dims.split(",") if size) for dims in _SHAPE.findall(results)]
            found.setdefault((_path(stack), primitive), []).append(shapes)
    return found


def find(known: Parts, stack: str, primitive: str, shapes: Sequence[Shape]) -> list[Shape] | None:
    """Return the shapes of an operation's results on one device; None where the text does not tell.

    Args:
      known: what `parts` made.
      stack: the operation's name stack, those of the equations around it joined to its own.
      primitive: its name.
      shapes: its results' global shapes.

    Where instructions differ the shapes that most of them have count, of those the largest.
    """
    if primitive in SHAPING:
        return None
    counts = collections.Counter(
        tuple(local) for local in known.get((_path(stack.split("/")), primitive), ()) if _fits(shapes, local)
    )
    best = max(counts, key=lambda local: (counts[local], sum(map(math.prod, local))), default=None)
    return None if best is None else list(best)


def _path(stack: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for part in stack if not _PLUMBING.match(part))


def _fits(shapes: Sequence[Shape], local: Sequence[Shape]) -> bool:
    """Say whether each local shape is the global one with dimensions divided by whole numbers."""
    if len(shapes) != len(local):
        return False
    pairs = [(whole, part) for whole, part in zip(shapes, local, strict=True)]
    return all(
        len(whole) == len(part) and all(p and -(-w // -(-w // p)) == p for w, p in zip(whole, part, strict=True))
        for whole, part in pairs
    )
