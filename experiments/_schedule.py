"""Static cycles of a TPU kernel: its final bundles, each as often as the scalar unit's own control flow runs it.

In: the compiler's dump of a kernel (`final_bundles` and `static-per-bundle-utilization`), and the arrays of its scalar
operands. Out: bundles run, and slots of the matmul units used in them. Scalar instructions are evaluated, one grid step
after another: loop trips, skipped blocks, first and last steps follow from them. Stalls (DMA waits, bank conflicts) are
in no bundle and not in the count: it is not a time. A branch on what is computed from vectors is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

DELAY = 4  # bundles after a branch that run in any case
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_WORD = 2**32


class Unknown(Exception):
    """The control flow depends on what this count does not know."""


@dataclasses.dataclass(frozen=True)
class Count:
    """What one run of a kernel takes.

    Attributes:
        cycles: bundles run.
        matmul_slots: slots of matmul units used in them.
        matmul_units: slots that a bundle has.
        steps: trips of the outermost loop.
    """

    cycles: int
    matmul_slots: int
    matmul_units: int
    steps: int

    @property
    def matmul_use(self) -> float:
        """The share of matmul slots that is used."""
        return self.matmul_slots / max(self.matmul_units * self.cycles, 1)


@dataclasses.dataclass
class _Bundle:
    scalar: list[tuple[str, str, list[str], str | None]]  # result, operation, operands, predicate
    phis: list[tuple[str, list[str]]]
    branch: tuple[str | None, int] | None  # predicate, region
    header: bool


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An operand of the kernel, or its address."""

    index: int


@dataclasses.dataclass(frozen=True)
class _Place:
    """An address: an allocation and an offset in words."""

    name: str
    offset: int


def count(bundles: str, utilization: str, tables: Mapping[int, np.ndarray], limit: int = 50_000_000) -> Count:
    """Count one run of a kernel.

    Args:
        bundles: text of `*final_bundles.txt`.
        utilization: text of `*final_hlo-static-per-bundle-utilization.txt`.
        tables: position of an operand in scalar memory -> its values.
        limit: bundles after which a run is given up.

    Raises:
        Unknown: a branch depends on something that was not evaluated.
    """
    code, regions = _parse(bundles)
    units, slots = _matmul(utilization)
    if len(slots) != len(code):
        raise ValueError(f"{len(code)} bundles, and figures for {len(slots)} of them")
    ran = _Machine(code, regions, tables).run(limit)
    headers = [i for i, bundle in enumerate(code) if bundle.header]
    steps = ran[headers[0]] if headers else 1
    return Count(sum(ran), sum(n * used for n, used in zip(ran, slots, strict=True)), units, steps)


def _matmul(text: str) -> tuple[int, list[int]]:
    head, rows = text.split("UTILIZATION:")
    names, numbers = (line for line in head.splitlines() if "MXU" in line or re.fullmatch(r"[\s\d]+", line))
    at = [name.strip() for name in names.split(",")].index("MXU")
    return int(numbers.split()[at]), [int(line.split()[at]) for line in rows.splitlines() if line.strip()]


# The text.


def _parse(text: str) -> tuple[list[_Bundle], dict[int, int]]:
    """Return the bundles, and the place of the first bundle of each region."""
    starts = list(_BUNDLE.finditer(text))
    code, regions = [], {}
    for place, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
        part = text[start.start() : end.start() if end else len(text)]
        for number in _REGION.findall(part):
            regions.setdefault(int(number), place)
        code.append(_bundle(part[start.end() - start.start() :], "LB" in start.group()))
    return code, regions


def _bundle(text: str, header: bool) -> _Bundle:
    body = _COMMENT.sub("", text)
    body = body[body.find("{") + 1 : body.rfind("}")] if "{" in body else ""
    found = _Bundle([], [], None, header)
    for one in body.split(";;"):
        result, _, rest = one.strip().partition(" = ")
        name, _, operands = rest.strip().partition(" ")
        if name == "sbr.rel":
            predicate = re.search(r"\((!?%\w+)\)", operands)
            region = re.search(r"region(\d+)", operands)
            found.branch = predicate and predicate.group(1), int(region.group(1))
        elif name == "sphi":
            found.phis.append((result.strip(), [x.strip() for x in operands.split(",")]))
        elif result.lstrip().startswith("%") and _is_scalar(result, name):
            found.scalar.append((result.strip(), name, *_operands(operands)))
    return found


def _is_scalar(result: str, name: str) -> bool:
    return bool(re.match(r"%[sp]\d", result.strip())) or name == "sst" or name.endswith("to_smem")


def _operands(text: str) -> tuple[list[str], str | None]:
    """Return operands and the predicate; one of the form `(p, old)` stays an operand: old is kept where p is false."""
    text = text.strip()
    text = re.sub(r"^\[(thread|resolvable)[^\]]*\]\s*", "", text)
    alone = re.match(r"\((!?%\w+)\),?\s*", text)
    predicate = alone.group(1) if alone else None
    text = text[alone.end() :] if alone else text
    return [x.strip() for x in re.split(r",(?![^(\[]*[)\]])", text)], predicate


# The machine.


class _Machine:
    """Runs the scalar instructions of a kernel."""

    def __init__(self, code: list[_Bundle], regions: dict[int, int], tables: Mapping[int, np.ndarray]):
        self.code, self.regions, self.tables = code, regions, tables
        self.values: dict[str, Any] = {}
        self.memory: dict[tuple[str, int], Any] = {}
        self.filled: dict[str, np.ndarray] = {}
        self.busy = [len(code)] * (len(code) + 1)  # the next bundle from each on with anything to evaluate
        for place in range(len(code) - 1, -1, -1):
            one = code[place]
            self.busy[place] = place if one.scalar or one.phis or one.branch else self.busy[place + 1]

    def run(self, limit: int) -> list[int]:
        """Return how often each bundle ran."""
        ran, place, total = [0] * len(self.code), 0, 0
        target: tuple[int, int] | None = None  # bundles to go, and where to
        came_back, idle = False, [0] * (len(self.code) + 1)  # differences of how often stretches ran
        while place < len(self.code):
            if target is None and (end := self.busy[place]) > place:  # nothing to evaluate up to there
                idle[place], idle[end] = idle[place] + 1, idle[end] - 1
                total, place = total + end - place, end
                continue
            bundle = self.code[place]
            ran[place] += 1
            total += 1
            if total > limit:
                raise Unknown(f"the kernel ran for more than {limit:,} bundles")
            if bundle.phis:
                self._phis(bundle, came_back)
                came_back = False
            self._scalars(bundle)
            if bundle.branch is not None and self._taken(bundle.branch):
                target = DELAY + 1, self.regions[bundle.branch[1]]
            place += 1
            if target is not None:
                target = target[0] - 1, target[1]
                if target[0] == 0:
                    came_back, place, target = target[1] < place, target[1], None
        return [one + more for one, more in zip(ran, itertools.accumulate(idle[:-1]), strict=True)]

    def _taken(self, branch: tuple[str | None, int]) -> bool:
        if branch[0] is None:
            return True
        value = self._predicate(branch[0])
        if value is None:
            raise Unknown(f"a branch to region {branch[1]} depends on {branch[0]}, which was not evaluated")
        return value

    def _phis(self, bundle: _Bundle, came_back: bool) -> None:
        made = {result: self._value(operands[1 if came_back else 0]) for result, operands in bundle.phis}
        self.values.update(made)

    def _scalars(self, bundle: _Bundle) -> None:
        """Evaluate a bundle. All reads come before all writes to memory; results may be read in the same bundle."""
        waiting, stores = list(bundle.scalar), []
        while waiting:
            still = {result for result, *_ in waiting}
            ready = [one for one in waiting if not any(n in still and n != one[0] for n in _names(one))] or waiting
            for one in ready:
                stores += self._one(*one)
            waiting = [one for one in waiting if one[0] not in {r for r, *_ in ready}]
        for write in stores:
            write()

    def _one(self, result: str, name: str, operands: list[str], predicate: str | None) -> list[Callable[[], None]]:
        if predicate is not None and self._predicate(predicate) is False:
            return []
        if name == "sst":
            where, _, what = operands[-1].rpartition(" ")
            place, value = self._address(where), self._value(what)
            return [] if place is None else [lambda: self.memory.__setitem__((place.name, place.offset), value)]
        if name.endswith("to_smem"):
            source, place = self._value(operands[0]), self._value(operands[2])
            if isinstance(source, _Operand) and isinstance(place, _Place) and source.index in self.tables:
                return [lambda: self.filled.__setitem__(place.name, self.tables[source.index])]
            return []
        self.values[result] = self._result(name, operands)
        return []

    def _result(self, name: str, operands: list[str]) -> Any:
        if name.startswith("inlined_call_operand"):
            place = int(re.search(r"index: (\d+)", ",".join(operands)).group(1))
            is_number = "shape: s32[]" in ",".join(operands) and place in self.tables
            return int(self.tables[place][0]) % _WORD if is_number else _Operand(place)
        if operands[0].startswith("(") and "," in operands[0]:
            chosen, old = (x.strip() for x in operands[0][1:-1].split(","))
            take = self._predicate(chosen)
            if take is None:
                return None
            return self._result(name, operands[1:]) if take else self._value(old)
        if name == "sld":
            place = self._address(operands[0])
            return None if place is None else self._load(place)
        values = [self._value(x) for x in operands]
        if name == "scalar_select":
            return None if values[0] is None else values[1] if values[0] else values[2]
        if name in ("smov", "pmov") or name.startswith("int_to_ptr"):
            return values[0]
        if name == "sshll.u32" and isinstance(values[0], _Operand):
            return values[0]
        return self._arithmetic(name, values)

    def _arithmetic(self, name: str, values: list[Any]) -> Any:
        operation, _, kind = name.partition(".")
        if operation == "por" and True in values:
            return True
        if operation in ("pand", "pnand") and False in values:
            return operation == "pnand"
        if any(not isinstance(v, int | np.integer) for v in values):
            return None
        values = [int(v) for v in values]
        if operation == "scmp":
            test, sign = kind.split(".")[:2]
            return _COMPARE[test](*(_signed(v) if sign == "s32" else v % _WORD for v in values))
        made = _OPERATIONS.get(operation)
        if made is None:
            return None
        return bool(made(*values)) if operation.startswith("p") else made(*values) % _WORD

    def _load(self, place: _Place) -> Any:
        if (place.name, place.offset) in self.memory:
            return self.memory[place.name, place.offset]
        words = self.filled.get(place.name)
        return int(words[place.offset]) % _WORD if words is not None and 0 <= place.offset < len(words) else None

    def _address(self, text: str) -> _Place | None:
        """Return the place that `[smem:[a + b]]` names."""
        inner = re.fullmatch(r"\[smem:\[(.*)\]\]", text)
        if inner is None:
            return None
        name, offset = None, 0
        for part in inner.group(1).split(" + "):
            value = _Place(part[1:], 0) if part.startswith("#") else self._value(part)
            if isinstance(value, _Place):
                name, offset = value.name, offset + value.offset
            elif isinstance(value, int):
                offset += _signed(value)
            else:
                return None
        return None if name is None else _Place(name, offset)

    def _value(self, text: str) -> Any:
        if text.startswith("%"):
            return self.values.get(text)
        if text.startswith("!%"):
            return self._predicate(text)
        if text.startswith("[#"):
            return _Place(text[2:-1], 0)
        number = text.removeprefix("$")
        return int(number, 0) if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", number) else None

    def _predicate(self, text: str) -> bool | None:
        value = self.values.get(text.lstrip("!"))
        return None if value is None else bool(value) != text.startswith("!")


def _names(one: tuple[str, str, list[str], str | None]) -> list[str]:
    found = re.findall(r"%\w+", " ".join(one[2]))
    return [*found, one[3].lstrip("!")] if one[3] else found


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
_OPERATIONS: dict[str, Callable[..., int]] = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "smin": lambda a, b: min(a % _WORD, b % _WORD),
    "smax": lambda a, b: max(_signed(a), _signed(b)),
    "sshll": lambda a, b: a << (b % 32),
    "sshrl": lambda a, b: (a % _WORD) >> (b % 32),
    "sshra": lambda a, b: _signed(a) >> (b % 32),
    "por": lambda a, b: a or b,
    "pand": lambda a, b: a and b,
    "pxor": lambda a, b: bool(a) != bool(b),
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pneg": lambda a: not a,
}


# Scalar operands as they lie in scalar memory.


def words(array: np.ndarray) -> np.ndarray:
    """Return an integer array as the 32-bit words of scalar memory.

    A number is a word, and 32-bit arrays of one axis lie in order. Bytes of two axes and more are packed four rows to a
    word, in tiles of 4 x 128 over the last two axes; 32-bit arrays of two axes and more have rows of a multiple of 128
    words.
    """
    if array.ndim == 0 or (array.dtype.itemsize == 4 and array.ndim == 1):
        return array.astype(np.int64).reshape(-1)
    rows, columns = array.shape[-2:] if array.ndim > 1 else (1, array.shape[0])
    planes = array.reshape(-1, rows, columns).astype(np.int64)
    each = 4 // array.dtype.itemsize
    padded = np.zeros((len(planes), -(-rows // each) * each, -(-columns // 128) * 128), np.int64)
    padded[:, :rows, :columns] = planes
    tiles = padded.reshape(len(planes), padded.shape[1] // each, each, padded.shape[2] // 128, 128)
    bits = 8 * array.dtype.itemsize
    packed = sum((tiles[:, :, i] & (2**bits - 1)) << (bits * i) for i in range(each))
    return packed.reshape(-1)
