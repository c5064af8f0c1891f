"""From a predicted timeline to named values: what is alive when, made where, read by whom, repeated at what price.

In: an inlined closed jaxpr and its `Timeline`. Out: the values alive at the peak (`Alive`) and the bytes of each module
path along the step (`Sample`), loops unrolled for the eye. It predicts nothing itself, compiles nothing, and knows
neither advice nor pictures.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from memopt import _compat as c
from memopt._cost import matmul_flops

#: Iterations of a loop that a timeline shows; more look no different.
SHOWN_TRIPS = 12
#: Points of one computation (the step, a loop's body) at which a timeline is sampled.
SHOWN_POINTS = 96

_WRAPPER = re.compile(r"\b(?:jvp|transpose|vmap|jit|pjit|checkpoint|remat\d*|custom_[a-z_]*)\(([^()]*)\)")
_PLUMBING = frozenset({"", "while", "body", "cond", "scan", "checkpoint", "rematted_computation", *c.CLOSED_CALLS})
#: Methods that linen names (`GPT2.head`) and the formulas that einsum names (`bhqk,bkhd->bqhd`).
_NO_MODULE = re.compile(r"^\w+\.\w+$|->")


@dataclasses.dataclass(frozen=True)
class Alive:
    """One value that is alive at the predicted peak.

    Args:
        module: path of the module that made it, as `"GPT2/blocks/attn"`; empty outside modules.
        operation: the primitive that made it.
        source: `file:line` in the user's code.
        shape, dtype: of the whole buffer; stacked over the iterations where a loop saved it.
        bytes: of the buffer, padded as the target pads.
        kind: "argument", "output", "residual", "transient" or "constant".
        why: why it is kept, in words.
        repeat_flops: matmul FLOPs to make it again from what else is alive; None where that has no meaning.
    """

    module: str
    operation: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    kind: str
    why: str
    repeat_flops: float | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """The temporaries at one point of the step: the step's equation there, all bytes, and the bytes of each module."""

    equation: int
    temp_bytes: int
    module_bytes: dict[str, int]


def module_path(stack: str) -> str:
    """Return a name stack as a module path: `jvp(...)`, `transpose(...)` and the like taken off, loops left out.

    Example:
        >>> module_path("transpose(jvp(GPT2))/blocks/while/body/attn")
        'GPT2/blocks/attn'
    """
    previous = None
    while previous != stack:
        previous, stack = stack, _WRAPPER.sub(r"\1", stack)
    parts = [part for part in stack.split("/") if part not in _PLUMBING and not _NO_MODULE.search(part)]
    kept = [part for i, part in enumerate(parts) if i == 0 or part != parts[i - 1]]
    return "/".join(kept)


class Walk:
    """Read the values of one computation's timeline; loops' bodies are walks of their own.

    Args:
        jaxpr: the open jaxpr of the computation.
        timeline: its `Timeline`.
        stack: the name stack around it, of the loop that holds it.
        trips: how often it runs.
        backward: whether it is part of the backward pass.
    """

    def __init__(self, jaxpr: Any, timeline: Any, stack: str = "", trips: int = 1, backward: bool = False):
        self.jaxpr, self.timeline, self.stack, self.trips, self.backward = jaxpr, timeline, stack, trips, backward
        self.inner = {i: self._body(jaxpr.eqns[i], inner) for i, inner in timeline.inner.items()}
        self._made_by = _makers(jaxpr)
        self._named: dict[tuple[int, int, str], tuple[str, str, str]] = {}

    def own(self, index: int) -> list[tuple[Any, Walk]]:
        """Return what is alive at equation `index`, without the values inside its body."""
        found = list(self.timeline.alive(index))
        if index in self.inner:
            body = self.inner[index].timeline
            for item in body.alive(body.peak_index):
                if item in found:
                    found.remove(item)
        return [(item, self) for item in self._with_variables(found)]

    def _with_variables(self, found: Sequence[Any]) -> list[Any]:
        """Give each entry its variable; where the timeline names none, equal shapes are told apart by their order."""
        seen: collections.Counter = collections.Counter()
        out = []
        for item in found:
            if item.var is None and 0 <= item.made_at < len(self.jaxpr.eqns):
                key = (item.made_at, item.aval.shape, item.aval.dtype)
                eqn, place = self.jaxpr.eqns[item.made_at], seen[key]
                same = [v for v in eqn.outvars if (v.aval.shape, v.aval.dtype) == key[1:]]
                seen[key] += 1
                item = dataclasses.replace(item, var=same[min(place, len(same) - 1)] if same else None)
            out.append(item)
        return out

    def at_peak(self) -> list[tuple[Any, Walk]]:
        """Return what is alive at the peak, bodies entered, each value with the walk that holds it."""
        index = self.timeline.peak_index
        found = self.own(index) if self.jaxpr.eqns else []
        if index in self.inner:
            found += [pair for pair in self.inner[index].at_peak() if pair[0].kind not in ("argument", "output")]
        return found

    def samples(self) -> list[Sample]:
        """Return the timeline in order, each loop's body repeated up to `SHOWN_TRIPS` times."""
        found: list[Sample] = []
        for index in self._points():
            alive, bytes_here = self.own(index), collections.Counter()
            if not alive and not self.timeline.usage[index]:
                continue  # another name for a buffer: nothing runs here
            for item, _ in alive:
                if item.kind in ("residual", "transient"):
                    bytes_here[self.describe(item)[0]] += item.bytes
            temp_bytes = int(self.timeline.usage[index])
            if index in self.inner:
                found += self._loop(index, temp_bytes, bytes_here)
            else:
                found.append(Sample(index, temp_bytes, dict(bytes_here)))
        return found

    def _loop(self, index: int, temp_bytes: int, around: collections.Counter) -> list[Sample]:
        body = self.inner[index]
        outer_bytes = temp_bytes - body.timeline.temp_bytes
        once = [
            Sample(index, outer_bytes + item.temp_bytes, dict(around + collections.Counter(item.module_bytes)))
            for item in body.samples()
        ]
        return once * min(body.trips, SHOWN_TRIPS)

    def _body(self, eqn: Any, timeline: Any) -> Walk:
        around = _around(eqn, timeline.body)
        length = math.prod(e.params["length"] for e in around if e.primitive.name == "scan")
        stack = functools.reduce(_join, [str(c.name_stack(e)) for e in around], self.stack)
        return Walk(timeline.body, timeline, stack, length, self._in_backward(eqn))

    def is_residual(self, item: Any) -> bool:
        """Whether a value is made by the forward pass and read by the backward pass."""
        if not 0 <= item.made_at < len(self.jaxpr.eqns) or not 0 <= item.last_used_at < len(self.jaxpr.eqns):
            return False
        maker, reader = self.jaxpr.eqns[item.made_at], self.jaxpr.eqns[item.last_used_at]
        return not self._in_backward(maker) and self._in_backward(reader)

    def _in_backward(self, eqn: Any) -> bool:
        return self.backward or _is_backward(eqn, str(c.name_stack(eqn)))

    def _points(self) -> Sequence[int]:
        count = len(self.jaxpr.eqns)
        if count <= SHOWN_POINTS:
            return range(count)
        even = {round(i * (count - 1) / (SHOWN_POINTS - 1)) for i in range(SHOWN_POINTS)}
        loops = sorted(self.inner, key=lambda i: -self.inner[i].timeline.temp_bytes)[:SHOWN_POINTS]
        return sorted(even | {self.timeline.peak_index, *loops})

    def describe(self, item: Any) -> tuple[str, str, str]:
        """Return the module path, the operation and the source line that made a value."""
        key = (item.made_at, id(item.var), item.kind)
        if key not in self._named:
            self._named[key] = self._describe(item)
        return self._named[key]

    def _describe(self, item: Any) -> tuple[str, str, str]:
        if item.made_at < 0 or item.made_at >= len(self.jaxpr.eqns):
            return "", item.kind, item.source
        eqn, stack = self.jaxpr.eqns[item.made_at], self.stack
        var = item.var
        while (inner := _inside(eqn, var)) is not None:
            stack = _join(stack, str(c.name_stack(eqn)))
            eqn, var = inner
        return module_path(_join(stack, str(c.name_stack(eqn)))), eqn.primitive.name, c.user_source(eqn) or item.source

    def reader(self, item: Any) -> str:
        """Say which equation reads a value last, bodies of loops entered."""
        if not 0 <= item.last_used_at < len(self.jaxpr.eqns):
            return "the end of the step"
        eqn, stack = self.jaxpr.eqns[item.last_used_at], self.stack
        var, backward, loop = item.var, False, ""
        while True:
            backward = backward or _is_backward(eqn, _join(stack, str(c.name_stack(eqn))))
            inner = _last_reader(eqn, var)
            if inner is None:
                break
            stack, loop = _join(stack, str(c.name_stack(eqn))), " in a loop"
            eqn, var = inner
        module, source = module_path(_join(stack, str(c.name_stack(eqn)))), short(c.user_source(eqn))
        words = [eqn.primitive.name + loop, f"of {module}" if module else "", f"({source})" if source else ""]
        return ("backward " if backward else "") + " ".join(word for word in words if word)

    def repeat_flops(self, item: Any, alive: set[Any]) -> float | None:
        """Return the matmul FLOPs that make a value again from arguments and from `alive` variables."""
        if not 0 <= item.made_at < len(self.jaxpr.eqns):
            return None
        eqn = self.jaxpr.eqns[item.made_at]
        var = item.var
        if var is None:
            return None
        trips = self.trips
        inner = _body_output(eqn, var)
        if inner is None:
            return trips * _chain_flops(self._made_by, var, alive - {var})
        body, outvar, body_alive = inner[0], inner[1], set(_stacked_alive(eqn, alive - {var}))
        return trips * eqn.params["length"] * _chain_flops(_makers(body), outvar, body_alive - {outvar})


def general(module: str) -> str:
    """Return a module path with the numbers of layers left open, so that equal layers are one.

    Example:
        >>> general("GPT2/block_11/attn")
        'GPT2/block_*/attn'
    """
    return re.sub(r"(?:(?<=_)|(?<=/)|^)\d+(?=/|$)", "*", module)


def short(source: str) -> str:
    """Return `folder/file.py:line` of a longer path with column and function name.

    Example:
        >>> short("/home/me/net/model.py:12:4 (Block.__call__)")
        'net/model.py:12'
    """
    return re.sub(r"^((?:[^/]*/)*?)((?:[^/]+/)?[^/:]+(?::\d+)?)(?::\d+)?(?: \(.*\))?$", r"\2", source)


def _is_backward(eqn: Any, stack: str) -> bool:
    return "transpose(" in stack or (eqn.primitive.name == "scan" and eqn.params["reverse"])


def _last_reader(eqn: Any, var: Any) -> tuple[Any, Any] | None:
    """Return the last equation in a scan's body that reads an operand of the scan, and the body's variable for it."""
    place = next((i for i, v in enumerate(eqn.invars) if v is var), None)
    if eqn.primitive.name != "scan" or place is None:
        return None
    body = c.open_jaxpr(eqn.params["jaxpr"])
    readers = [e for e in body.eqns if any(v is body.invars[place] for v in e.invars)]
    return (readers[-1], body.invars[place]) if readers else None


def _around(eqn: Any, body: Any) -> list[Any]:
    """Return the equations around a body, from `eqn` inwards: a loop may stand inside a `shard_map` or a call."""
    for _, _, sub in c.subjaxprs(eqn.params):
        if c.open_jaxpr(sub) is body:
            return [eqn]
        for inner in c.open_jaxpr(sub).eqns:
            if found := _around(inner, body):
                return [eqn, *found]
    return []


def _join(outer: str, inner: str) -> str:
    return "/".join(part for part in (outer, inner) if part)


def _body_output(eqn: Any, var: Any) -> tuple[Any, Any] | None:
    """Return the body and the body's own variable behind an output of a scan."""
    if eqn.primitive.name != "scan" or var is None:
        return None
    body = c.open_jaxpr(eqn.params["jaxpr"])
    return body, body.outvars[next(i for i, v in enumerate(eqn.outvars) if v is var)]


def _inside(eqn: Any, var: Any) -> tuple[Any, Any] | None:
    """Return the equation in a scan's body that makes an output of the scan, and its variable."""
    inner = _body_output(eqn, var)
    if inner is None:
        return None
    maker = next((e for e in inner[0].eqns if any(v is inner[1] for v in e.outvars)), None)
    return None if maker is None else (maker, inner[1])


def _stacked_alive(eqn: Any, alive: set[Any]) -> Iterator[Any]:
    body = c.open_jaxpr(eqn.params["jaxpr"])
    for outer, inner in zip(eqn.outvars, body.outvars, strict=True):
        if outer in alive and not isinstance(inner, c.Literal):
            yield inner


def _makers(jaxpr: Any) -> dict[Any, Any]:
    return {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}


def _chain_flops(makers: dict[Any, Any], var: Any, alive: set[Any]) -> float:
    todo, done, total = [var], set(), 0.0
    while todo:
        eqn = makers.get(todo.pop())
        if eqn is None or id(eqn) in done:
            continue
        done.add(id(eqn))
        total += matmul_flops(eqn)
        todo += [v for v in eqn.invars if not isinstance(v, c.Literal) and v not in alive]
    return total
