"""The post room: which collectives a compiled program sends, how often, and how many bytes.

In: a compiled program (optimized HLO). Out: a list of `Collective`s, loops multiplied out, and their sums by kind. An
all-reduce of which every reader takes its own slice is a reduce-scatter in all but name (XLA:CPU writes it so), and is
told apart; XLA:TPU puts the slice of a reduce-scatter into the all-reduce's own computation, and any other all-reduce
is sent whole, whoever slices it. XLA:TPU spreads one collective over several fusions of a chain, loops among them, to
overlap it with compute: it is counted once. Nothing here compiles; the seconds of a collective alone are predicted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from memopt import _target
from memopt._links import axis_bytes_per_second

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s*(?:\([^)]*\).*)?->.*\{\s*$|^(?:ENTRY\s+)?%?([\w.\-]+) \{\s*$")
_LINE = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|condition|called_computation)=%?([\w.\-]+)|calls=\{([^}]*)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_TILES = re.compile(r"\{[\d,]*:T\(")  # layouts of XLA:TPU
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\([^,]*, (?:\S+ )?%?([\w.\-]+)\), direction=LT")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{")
_ITEM_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "s4": 4, "u4": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      name: the instruction's name.
      whole_bytes: bytes of the array, as if brought together: the result of an all-gather, what a reduce-scatter takes.
      ways: devices in one group.
      times: how often it runs in one step.
      op_name: the path of the operation that it was made for.

    Example:
      >>> Collective("all-gather", "ag", 800, 8, 2).sent_bytes
      1400
    """

    kind: str
    name: str
    whole_bytes: int
    ways: int
    times: int
    op_name: str = ""

    @property
    def sent_bytes(self) -> int:
        """Bytes that one device sends in one step, by the ring algorithms: an all-reduce sends everything twice."""
        share = 1.0 if self.kind == "collective-permute" else (self.ways - 1) / max(self.ways, 1)
        return int(self.whole_bytes * share * (2 if self.kind == "all-reduce" else 1) * self.times)

    def seconds(self, target: Any) -> float:
        """Predict how long it takes to send these bytes: all runs of one step, on public rates of the links.

        Args:
          target: as in `memopt.optimize`; its devices are those of the program.

        Returns:
          Seconds. Latencies are not counted, nor what is sent while something else is computed.

        Example:
          >>> Collective("all-gather", "ag", 800, 8, 2).seconds("cpu") > 0
          True
        """
        parsed = _target.Target.parse(target)
        return self.sent_bytes / axis_bytes_per_second(parsed, self.ways, len(_target.devices(parsed)))


def collectives(compiled: Any) -> list[Collective]:
    """List the collectives of a compiled program; reads its text, compiles and runs nothing.

    Args:
      compiled: a compiled step, as from `step.lower(*args).compile()`, or its `as_text()`.

    Returns:
      One entry for each array that an instruction sends, loops multiplied out where their trip count is known.

    Example:
      >>> import jax, memopt
      >>> memopt.collectives(jax.jit(lambda x: x + 1).lower(1.0).compile())
      []
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    bodies = _computations(text)
    times = _times(bodies)
    readers = _readers(text, bodies)
    found: list[Collective] = []
    pieces: dict[str, list[Collective]] = {}
    for body, lines in bodies.items():
        if body not in times:
            continue
        for line in lines:
            read = list(_read(line, lines, readers(body), times[body]))
            channel = _CHANNEL.search(line) if read and "chain_id" in line else None
            if channel is None:
                found += read
            elif channel[1] not in pieces or times[body] < pieces[channel[1]][0].times:
                pieces[channel[1]] = read
    return [*found, *(one for read in pieces.values() for one in read)]


def totals(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Return, for each kind that is there, how many run in a step and how many bytes one device sends for them."""
    sums = {kind: [0, 0] for kind in KINDS}
    for one in found:
        sums[one.kind][0] += one.times
        sums[one.kind][1] += one.sent_bytes
    return {kind: (count, sent) for kind, (count, sent) in sums.items() if count}


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = _HEADER.match(line) if not line.startswith(" ") else None
        if header:
            name = header[1] or header[2]
            lines = bodies.setdefault(f"ENTRY {name}" if line.startswith("ENTRY") else name, [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _times(bodies: Mapping[str, list[str]]) -> dict[str, int]:
    """Return how often each computation that the program reaches runs in one step."""
    times: dict[str, int] = {}
    todo = [(name, 1) for name in bodies if name.startswith("ENTRY ")]
    while todo:
        name, count = todo.pop()
        times[name] = times.get(name, 0) + count
        for line in bodies[name]:
            trips = _trips(line, bodies)
            todo += [(called, count * trips) for called in _called(line) if called in bodies]
    return times


def _readers(text: str, bodies: Mapping[str, list[str]]) -> Callable[[str], Mapping[str, list[str]] | None]:
    """Return in which computations, beside its own, slices of one's all-reduces count; None: not even in its own."""
    if _TILES.search(text) is None:
        return lambda body: bodies
    lines = (line for body in bodies.values() for line in body if " fusion(" in line)
    kernels = {called for line in lines for called in _called(line)}
    return lambda body: {} if body in kernels else None


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """Return how often a loop runs: as the compiler says, else by a condition that compares a counter with a constant.

    XLA:TPU says nothing, and its counters start at zero and go up by one.
    """
    known, condition = _TRIPS.search(line), _CONDITION.search(line)
    if known or condition is None:
        return int(known[1]) if known else 1
    lines = bodies.get(condition[1], ())
    constants = {m[1]: int(m[2]) for one in lines if (m := _CONSTANT.match(one))}
    root = next((m for one in lines if (m := _LESS.search(one))), None)
    return constants.get(root[1], 1) if root else 1


def _called(line: str) -> Iterator[str]:
    for match in (*_CALLED.finditer(line), *_BRANCHES.finditer(line)):
        for group in match.groups():
            yield from (part.strip().lstrip("%") for part in (group or "").split(",") if part.strip())


def _read(line: str, lines: list[str], bodies: Mapping[str, list[str]] | None, times: int) -> Iterator[Collective]:
    match = _LINE.match(line)
    if match is None:
        return
    name, results, opcode, rest = match.groups()
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return
    arrays = [_bytes(*array) for array in _ARRAY.findall(results)]
    if opcode.endswith("-start") and kind != "all-reduce":
        arrays = _started(arrays)
    ways = _ways(rest)
    label = re.search(r'op_name="([^"]*)"', rest)
    if kind == "reduce-scatter":
        arrays = [size * ways for size in arrays]
    if kind == "all-to-all" and len(arrays) > 1:
        arrays = [sum(arrays)]  # one array in as many parts as there are devices
    sliced = kind == "all-reduce" and bodies is not None
    parts = _parts(name, lines) if sliced else {}
    for i, size in enumerate(arrays):
        scattered = sliced and _is_scattered(parts.get(i, name), lines, bodies)
        yield Collective("reduce-scatter" if scattered else kind, name, size, ways, times, label[1] if label else "")


def _parts(name: str, lines: list[str]) -> dict[int, str]:
    """Return the names of the elements of an instruction's tuple."""
    pattern = re.compile(rf"%?([\w.\-]+) = .* get-tuple-element\((?:.*\s)?%?{re.escape(name)}\), index=(\d+)")
    return {int(match[2]): match[1] for line in lines if (match := pattern.search(line))}


def _started(arrays: list[int]) -> list[int]:
    """Return the results among what an asynchronous start holds: operands, results, then flags of a few bytes."""
    data = [size for size in arrays if size > 4] or arrays
    return data[len(data) // 2 :]


def _bytes(kind: str, dims: str) -> int:
    bits = _ITEM_BITS.get(kind) or int(re.sub(r"\D", "", kind.split("e")[0]) or 32)
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8


def _ways(rest: str) -> int:
    listed, iota, mesh = _LISTED.search(rest), _IOTA.search(rest), _MESH.search(rest)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        return math.prod(_part(axis, sizes) for axis in mesh[2].split(",") if axis.strip())
    if iota:
        return int(iota[2])
    if listed:
        return len(listed[1].split(","))
    return 2 if _PAIRS.search(rest) else 1


def _part(axis: str, sizes: Mapping[str, int]) -> int:
    """Return the devices along an axis of a mesh, or along a part of it (`'axis_0':(2)4` is four)."""
    name = re.search(r"'([^']*)'(?::\(\d+\)(\d+))?", axis)
    return 1 if name is None else int(name[2] or sizes.get(name[1], 1))


def _is_scattered(name: str, lines: list[str], bodies: Mapping[str, list[str]], deep: int = 0) -> bool:
    """Say whether every reader of a value takes a slice of it that depends on the device."""
    pattern = re.compile(rf"[(,]\s*(?:[^\s,(]+\s+)?%?{re.escape(name)}(?=[,)])")
    readers = [line for line in lines if pattern.search(line.split(" = ", 1)[-1])]
    return bool(readers) and all(_takes_slice(line, name, lines, bodies, deep) for line in readers)


def _takes_slice(line: str, name: str, lines: list[str], bodies: Mapping[str, list[str]], deep: int) -> bool:
    match = _LINE.match(line)
    if match is None or deep > 4:
        return False
    if match[3] == "dynamic-slice":
        return True
    if match[3] in ("copy", "bitcast", "transpose", "reshape"):
        return _is_scattered(match[1], lines, bodies, deep + 1)
    called = next(iter(_called(line)), None)
    if match[3] not in ("fusion", "call") or called not in bodies:
        return False
    operands = [part.split()[-1].lstrip("%") for part in match[4].split(")", 1)[0].split(",") if part.strip()]
    inner = [_parameter(bodies[called], i) for i, operand in enumerate(operands) if operand == name]
    return all(one is not None and _is_scattered(one, bodies[called], bodies, deep + 1) for one in inner)


def _parameter(lines: list[str], number: int) -> str | None:
    found = (re.match(rf"^\s*(?:ROOT\s+)?%?([\w.\-]+) = .* parameter\({number}\)", line) for line in lines)
    return next((match[1] for match in found if match), None)
