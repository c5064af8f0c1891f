"""The survey of the house: every value and operation of a step, with its home, in one numbered graph.

In: an inlined closed jaxpr. Out: a `Graph` of regions (the top level and each loop, branch or `shard_map` body),
operations and values, in which equal computations are one value (value numbering), and in which what reads residuals of
an earlier loop or branch is paired with it (`_paired`): inside the reading body, a slice of the stack *is* the other
body's value, so a user's own recomputation there and the original become one node. It measures and decides nothing, and
changes no jaxpr.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from memopt import _carried, _paired
from memopt import _compat as c

INVAR, CONST_IN, CARRY_IN, XS_IN, MADE = "input", "body's constant", "loop carry", "loop slice", "made"


@dataclasses.dataclass(slots=True, eq=False)
class Value:
    """One value of the step: its variable, the region it lives in and how it comes to be."""

    id: int
    var: Any
    region: int
    kind: str
    op: Op | None = None  # the operation that makes it (kind MADE)
    operand: int | None = None  # position among the operands of what has the body (kinds CONST_IN, CARRY_IN, XS_IN)

    @property
    def aval(self) -> Any:
        return self.var.aval


@dataclasses.dataclass(slots=True, eq=False)
class Op:
    """One equation: the ids of what it reads (None for a literal) and makes, its place, and its bodies."""

    id: int
    region: int
    index: int
    eqn: Any
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    bodies: list[Region] = dataclasses.field(default_factory=list)
    mapped: frozenset[int] = frozenset()  # operand positions that the body reads through its source regions instead
    feeds: list[Op] = dataclasses.field(default_factory=list)  # later operations whose bodies read this one's bodies
    bin: int = -1  # the time segment it runs in, numbered over all regions
    twins: list[tuple[int, Any]] = dataclasses.field(default_factory=list)  # regions, equations that are one with it


@dataclasses.dataclass(slots=True, eq=False)
class Region:
    """One body of equations that runs `trips` times in all."""

    id: int
    jaxpr: Any
    parent: int | None
    op: Op | None
    trips: int
    env: dict[Any, int] = dataclasses.field(default_factory=dict)
    ops: list[Op] = dataclasses.field(default_factory=list)
    outs: list[int | None] = dataclasses.field(default_factory=list)
    sources: list[int] = dataclasses.field(default_factory=list)  # regions whose values this body may read by slice
    held: dict[int, Any] = dataclasses.field(default_factory=dict)  # a source's value -> what holds it here already
    changed: bool = False  # equations were merged away by value numbering
    numbers: dict[Any, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    bins: range = range(0)


class Graph:
    """All regions, operations and values of an inlined step.

    Args:
      closed: closed jaxpr, inlined (`memopt._inline.inline`).
      nested: whether a loop is paired with one in the body that the body around it reads, too.

    Values that are equal by construction share one id, within a region and between a loop body and the bodies that it
    feeds. `needs` of an operation are its `inputs` at positions that are not `mapped`.
    """

    def __init__(self, closed: Any, *, nested: bool = True):
        self.closed = closed
        self.nested = nested
        self.regions: list[Region] = []
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.top = self._region(closed, None, None, 1, {})

    def _value(self, var: Any, region: int, kind: str, op: Op | None = None, operand: int | None = None) -> int:
        self.values.append(Value(len(self.values), var, region, kind, op, operand))
        return len(self.values) - 1

    def _region(self, closed, parent, op, trips, shared, roles=None, held=None) -> Region:
        jaxpr = c.open_jaxpr(closed)
        region = Region(len(self.regions), closed, parent, op, trips)
        self.regions.append(region)
        for var in jaxpr.constvars:
            region.env[var] = self._value(var, region.id, INVAR)
        for i, var in enumerate(jaxpr.invars):
            kind = INVAR if roles is None else roles[i]
            place = None if op is None else i + _paired.first_operand(op.eqn)
            region.env[var] = shared[i] if i in shared else self._value(var, region.id, kind, operand=place)
        homes = {self.values[v].region for v in shared.values()}
        region.sources = sorted(homes - {region.id})
        tables = [region.numbers, *(self.regions[s].numbers for s in region.sources)]
        for eqn in jaxpr.eqns:
            self._op(region, eqn, tables)
            for var in eqn.outvars if held else ():
                if var in held:
                    region.env[var] = held[var]
                    region.held.setdefault(held[var], var)
        region.outs = [None if isinstance(v, c.Literal) else region.env[v] for v in jaxpr.outvars]
        return region

    def _op(self, region: Region, eqn: Any, tables: list[dict]) -> None:
        inputs = tuple(None if isinstance(v, c.Literal) else region.env[v] for v in eqn.invars)
        key = None if eqn.effects else _number_key(eqn, inputs)
        for table in tables if key is not None else ():
            if key in table and self._has_all(table[key], eqn):
                region.env.update(zip(eqn.outvars, table[key], strict=True))
                region.changed = True
                self._twin(region, eqn, table[key])
                return
        op = Op(len(self.ops), region.id, len(region.ops), eqn, inputs, ())
        self.ops.append(op)
        region.ops.append(op)
        op.outputs = tuple(self._value(v, region.id, MADE, op) for v in eqn.outvars)
        region.env.update(zip(eqn.outvars, op.outputs, strict=True))
        if key is not None:
            region.numbers[key] = op.outputs
        self._bodies(region, op)

    def _twin(self, region: Region, eqn: Any, outputs: tuple[int, ...]) -> None:
        maker = self.values[outputs[0]].op if outputs else None
        if maker is not None:
            maker.twins.append((region.id, eqn))

    def _has_all(self, outputs: tuple[int, ...], eqn: Any) -> bool:
        """Whether an equal computation made earlier did not drop a result that this one hands on."""
        pairs = zip(outputs, eqn.outvars, strict=True)
        return not any(isinstance(self.values[o].var, c.DropVar) and not isinstance(v, c.DropVar) for o, v in pairs)

    def _bodies(self, region: Region, op: Op) -> None:
        found = _paired.bodies(op.eqn)
        if not found:
            return
        shared, makers = _paired.inputs_from(self, region, op)
        held: dict[Any, int] = {}
        for maker in makers:
            if op.eqn.primitive.name == "scan":
                self._share_rows(op, maker, held)
            maker.feeds.append(op)
        op.mapped = _paired.mapped(op, shared)
        trips = region.trips * op.eqn.params.get("length", 1)
        for one, known in zip(found, shared, strict=True):
            op.bodies.append(self._region(one, region.id, op, trips, known, _roles(op, one), held))

    def _share_rows(self, op: Op, maker: Op, held: dict[Any, int]) -> None:
        """Let rows of carried stacks, as they were before the loop, be the maker's slices of the same arrays."""
        num_consts, num_carry = c.scan_layout(op.eqn)
        first_xs = num_consts + num_carry
        counters = {i for i in range(first_xs, len(op.inputs)) if self._is_iota(op.inputs[i])}
        first = sum(c.scan_layout(maker.eqn))
        slices = {v: i for i, v in enumerate(maker.inputs) if v is not None and i >= first}
        invars = c.open_jaxpr(maker.bodies[0].jaxpr).invars
        for var, carry in _carried.old_rows(op.eqn, counters):
            outer = op.inputs[num_consts + carry]
            if outer in slices:
                inner = maker.bodies[0].env[invars[slices[outer]]]
                if self.values[inner].region == maker.bodies[0].id:
                    held[var] = inner

    def _is_iota(self, value: int | None) -> bool:
        maker = None if value is None else self.values[value].op
        return maker is not None and maker.eqn.primitive.name == "iota" and len(self.values[value].aval.shape) == 1

    def out_position(self, maker: Op, inner: int) -> int | None:
        """Return the position among an operation's outputs at which it hands out this value of a body already."""
        start = c.scan_layout(maker.eqn)[1] if maker.eqn.primitive.name == "scan" else 0
        outs = next(body.outs for body in maker.bodies if body.id == self.values[inner].region)
        return next((i for i in range(start, len(outs)) if outs[i] == inner), None)


def _roles(op: Op, body: Any) -> list[str]:
    """Return how each input of a body comes in."""
    total = len(c.open_jaxpr(body).invars)
    if op.eqn.primitive.name != "scan":
        return [INVAR if op.eqn.primitive.name == "while" else CONST_IN] * total
    num_consts, num_carry = c.scan_layout(op.eqn)
    return [CONST_IN] * num_consts + [CARRY_IN] * num_carry + [XS_IN] * (total - num_consts - num_carry)


def _number_key(eqn: Any, inputs: tuple[int | None, ...]) -> Any | None:
    """Return a hashable key that equal computations share, or None where one cannot be made."""
    if eqn.primitive.name in ("optimization_barrier", "rng_uniform"):
        return None
    literals = tuple(_literal_key(v) for v in eqn.invars if isinstance(v, c.Literal))
    params = tuple((k, _param_key(v)) for k, v in eqn.params.items())
    key = (eqn.primitive, params, inputs, literals, tuple(str(v.aval) for v in eqn.outvars) if not inputs else None)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _literal_key(literal: Any) -> Any:
    return (str(literal.aval), repr(literal.val))


def _param_key(value: Any) -> Any:
    """Keep apart what Python calls equal but JAX does not: 0.0 and -0.0, 1 and True and 1.0; jaxprs by identity."""
    if isinstance(value, float):
        return ("float", repr(value))
    if c.is_jaxpr(value):
        return ("jaxpr", id(value))
    if isinstance(value, (tuple, list)):
        return tuple(_param_key(v) for v in value)
    return (type(value), value)
