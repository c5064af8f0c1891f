"""The builders: a plan's decisions turned into a jaxpr.

In: a `Graph` and, for each time segment, the operations that are run again there (and the storage alternatives that
passes chose). Out: a closed jaxpr with the same inputs and outputs as the step. Values that are not run again are kept:
at one level simply by being read later, across a pair of loops by being stacked by the first and sliced by the second.
Repeats are placed right before their first use and guarded by `optimization_barrier`, tied to the latest value made, so
that XLA neither merges nor hoists them. It decides nothing. Dead code is dropped at the end, inside loops too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memopt import _compat as c
from memopt import _fusion, _segments
from memopt import _graph as g


def apply(graph: g.Graph, repeats: Mapping[int, frozenset[int]]) -> tuple[Any, dict[Any, int]]:
    """Return the rewritten closed jaxpr and the time segment of each of its variables.

    Args:
      graph: the survey of the step.
      repeats: segment number -> ids of the operations run again in that segment, for what is read there.

    Returns:
      `(closed jaxpr, {variable: segment})`; variables of loop bodies are among them.
    """
    builder = _Builder(graph, repeats)
    body = builder.region(graph.top)
    base = c.open_jaxpr(graph.closed)
    jaxpr = c.rebuild(base, outvars=body.outs, eqns=body.eqns)
    jaxpr, _ = c.dce(jaxpr)
    return c.close(jaxpr, c.jaxpr_consts(graph.closed)), builder.bin_of


class _Body:
    """One region while it is built anew."""

    def __init__(self, region: g.Region):
        self.region = region
        self.eqns: list[Any] = []
        self.local: dict[int, Any] = {}  # value of a source region -> the variable that brings it into this body
        self.clones: dict[int, tuple[int, Any]] = {}  # value -> first segment of its latest repeat, its variable
        self.new_consts: list[tuple[Any, Any]] = []  # (variable, value outside or a literal)
        self.new_xs: list[tuple[Any, Any]] = []  # (variable, value outside, a literal or the stacked variable itself)
        self.outs: list[Any] = []
        self.pending: list[tuple[int, g.Op, _Body]] = []  # loops whose outputs are settled when the region is done
        self.latest: Any = None  # the variable made last by an original operation that XLA materialises

    @property
    def touched(self) -> bool:
        return self.region.changed or bool(self.region.sources or self.clones or self.new_consts or self.new_xs)


class _Builder:
    def __init__(self, graph: g.Graph, repeats: Mapping[int, frozenset[int]]):
        self.graph = graph
        self.repeats = repeats
        self.chains = _segments.chains(graph, repeats)
        self.extra: dict[int, dict[int, Any]] = {}  # loop -> {body value: variable of its new stack}
        self.bin_of: dict[Any, int] = {}

    def region(self, region: g.Region) -> _Body:
        body = _Body(region)
        for op in region.ops:
            self._op(body, op)
        last = region.bins[-1] if len(region.bins) else -1
        outvars = c.open_jaxpr(region.jaxpr).outvars
        body.outs = [v if o is None else self._read(body, o, last) for v, o in zip(outvars, region.outs, strict=True)]
        for position, op, inner in body.pending:
            body.eqns[position] = self._finish_loop(body.eqns[position], op, inner)
        return body

    def _op(self, body: _Body, op: g.Op) -> None:
        eqn = op.eqn
        invars = [
            v if o is None or i in op.mapped else self._read(body, o, op.bin)
            for i, (v, o) in enumerate(zip(eqn.invars, op.inputs, strict=True))
        ]
        if op.bodies:
            eqn = self._with_bodies(body, op, invars)
        elif any(a is not b for a, b in zip(invars, eqn.invars, strict=True)):
            eqn = c.replace_eqn(eqn, invars=invars)
        body.eqns.append(eqn)
        for var in eqn.outvars:
            self.bin_of[var] = op.bin
        if eqn.primitive.name not in _fusion.ELEMENTWISE:
            body.latest = next((v for v in eqn.outvars if not isinstance(v, c.DropVar)), body.latest)

    def _with_bodies(self, body: _Body, op: g.Op, invars: list[Any]) -> Any:
        inner = [self.region(r) for r in op.bodies]
        name = op.eqn.primitive.name
        if name == "scan":
            eqn = self._loop(body, op, invars, inner[0])
            body.pending.append((len(body.eqns), op, inner[0]))
            return eqn
        if not any(_changed(b) for b in inner):
            return c.replace_eqn(op.eqn, invars=invars)
        key = g._BODY_PRIMITIVES[name]
        new = tuple(_closed_like(b.region.jaxpr, b, b.outs) for b in inner)
        params = dict(op.eqn.params, **{key: new if isinstance(op.eqn.params[key], tuple) else new[0]})
        return c.replace_eqn(op.eqn, invars=invars, params=params)

    def _loop(self, body: _Body, op: g.Op, invars: list[Any], inner: _Body) -> Any:
        """Return the loop's equation with its new operands; its body follows in `_finish_loop`."""
        num_consts, num_carry = c.scan_layout(op.eqn)
        first_xs = num_consts + num_carry
        consts = [v for i, v in enumerate(invars[:num_consts]) if i not in op.mapped]
        consts += [self._read(body, o, op.bin) if isinstance(o, int) else o for _, o in inner.new_consts]
        xs = [v for i, v in enumerate(invars) if i >= first_xs and i not in op.mapped]
        xs += [self._read(body, o, op.bin) if isinstance(o, int) else o for _, o in inner.new_xs]
        return c.replace_eqn(op.eqn, invars=consts + invars[num_consts:first_xs] + xs)

    def _finish_loop(self, eqn: Any, op: g.Op, inner: _Body) -> Any:
        extra = self.extra.get(op.id, {})
        if not extra and not _changed(inner):
            return eqn
        num_consts, num_carry = c.scan_layout(op.eqn)
        first_xs = num_consts + num_carry
        old = c.open_jaxpr(op.bodies[0].jaxpr).invars
        consts = [v for i, v in enumerate(old[:num_consts]) if i not in op.mapped] + [v for v, _ in inner.new_consts]
        xs = [v for i, v in enumerate(old) if i >= first_xs and i not in op.mapped] + [v for v, _ in inner.new_xs]
        outs = inner.outs + [self.graph.values[v].var for v in extra]
        invars = consts + list(old[num_consts:first_xs]) + xs
        jaxpr = _closed_like(op.bodies[0].jaxpr, inner, outs, invars)
        params = c.scan_params(op.eqn, jaxpr, len(consts), num_carry)
        return c.replace_eqn(eqn, outvars=[*eqn.outvars, *extra.values()], params=params,
                             effects=eqn.effects)

    def _read(self, body: _Body, value: int, segment: int) -> Any:
        """Return the variable that holds a value for a reader in this segment, repeating operations where planned."""
        item = self.graph.values[value]
        here = item.region == body.region.id
        if item.op is not None and item.op.id in self.repeats.get(segment, ()):
            if not here or item.op.bin < segment:
                return self._clone(body, value, segment) or self._repeat(body, item.op, segment, value)
        if here:
            return item.var
        if value not in body.local:
            body.local[value] = self._bring(body, item)
        return body.local[value]

    def _clone(self, body: _Body, value: int, segment: int) -> Any | None:
        """Return the variable of a repeat that this segment shares with an earlier one, if there is one."""
        first, var = body.clones.get(value, (None, None))
        return var if first == self.chains[self.graph.values[value].op.id, segment] else None

    def _bring(self, body: _Body, item: g.Value) -> Any:
        """Make a source region's value readable in this body: by constant, by slice, or by a stack of it."""
        var = c.Var(item.aval)
        maker = self.graph.regions[item.region].op
        if item.kind in (g.CONST_IN, g.XS_IN):
            outer = maker.inputs[item.operand]
            new = body.new_consts if item.kind == g.CONST_IN else body.new_xs
            new.append((var, maker.eqn.invars[item.operand] if outer is None else outer))
        elif item.kind == g.INVAR:
            raise AssertionError("a closed-over constant of a loop body was not hoisted")
        else:
            body.new_xs.append((var, self._stack(maker, item)))
        return var

    def _stack(self, maker: g.Op, item: g.Value) -> Any:
        position = self.graph.out_position(maker, item.id)
        if position is not None and not isinstance(maker.eqn.outvars[position], c.DropVar):
            return maker.eqn.outvars[position]
        extra = self.extra.setdefault(maker.id, {})
        if item.id not in extra:
            extra[item.id] = c.Var(c.stacked_aval(item.aval, maker.eqn.params["length"]))
            self.bin_of[extra[item.id]] = maker.bin
        return extra[item.id]

    def _repeat(self, body: _Body, op: g.Op, segment: int, value: int) -> Any:
        """Run an operation again here, with all repeats that it needs, as one guarded batch; return a value's."""
        batch = self._batch(body, op, segment)
        guarded = self._guard(body, batch, segment)
        for one in batch:
            invars = [
                v if o is None else guarded.get(o) or self._read(body, o, segment)
                for v, o in zip(one.eqn.invars, one.inputs, strict=True)
            ]
            outvars = [v if isinstance(v, c.DropVar) else c.Var(v.aval) for v in one.eqn.outvars]
            body.eqns.append(c.replace_eqn(one.eqn, invars=invars, outvars=outvars))
            for o, var in zip(one.outputs, outvars, strict=True):
                body.clones[o] = (self.chains[one.id, segment], var)
                self.bin_of[var] = segment
        return body.clones[value][1]

    def _batch(self, body: _Body, op: g.Op, segment: int) -> list[g.Op]:
        planned = self.repeats[segment]
        order: dict[int, g.Op] = {}
        stack = [op]
        while stack:
            one = stack.pop()
            if one.id in order:
                continue
            order[one.id] = one
            for o in one.inputs:
                maker = None if o is None else self.graph.values[o].op
                if maker is None or maker.id not in planned:
                    continue
                if maker.region != body.region.id or maker.bin < segment:
                    if self._clone(body, o, segment) is None:
                        stack.append(maker)
        return sorted(order.values(), key=lambda one: one.id)

    def _guard(self, body: _Body, batch: list[g.Op], segment: int) -> dict[int, Any]:
        """Pass what the batch reads from outside through a barrier, tied to the latest original value."""
        if body.region.sources and all(one.region != body.region.id for one in batch):
            return {}  # a loop body of its own: there is nothing to merge with
        made = {o for one in batch for o in one.outputs}
        outside = dict.fromkeys(o for one in batch for o in one.inputs if o is not None and o not in made)
        for o in list(outside):
            if any(self._read(body, o, segment) is var for _, var in (body.clones.get(o, (0, None)),)):
                del outside[o]  # a repeat already, behind a barrier of its own
        if not outside:
            return {}
        invars = [self._read(body, o, segment) for o in outside]
        tied = [body.latest] if body.latest is not None and all(body.latest is not v for v in invars) else []
        eqn, outvars = c.barrier_eqn(invars + tied, batch[0].eqn)
        body.eqns.append(eqn)
        for var in outvars:
            self.bin_of[var] = segment
        return dict(zip(outside, outvars, strict=False))


def _changed(body: _Body) -> bool:
    if body.touched:
        return True
    old = c.open_jaxpr(body.region.jaxpr)
    return len(old.eqns) != len(body.eqns) or any(a is not b for a, b in zip(old.eqns, body.eqns, strict=True))


def _closed_like(old: Any, body: _Body, outs: list[Any], invars: list[Any] | None = None) -> Any:
    jaxpr = c.rebuild(c.open_jaxpr(old), invars=invars, outvars=outs, eqns=body.eqns)
    return c.close(jaxpr, c.jaxpr_consts(old)) if isinstance(old, c.ClosedJaxpr) else jaxpr
