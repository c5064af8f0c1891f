"""The builders: a plan's decisions turned into a jaxpr.

In: a `Graph`, for each time segment the operations that are run again there, and the forms in which values are stored.
Out: a closed jaxpr with the same inputs and outputs as the step. Values that are not run again are kept: at one level
simply by being read later, across a pair of loops by being stacked by the first and sliced by the second. A stored
value is encoded right after it is made, and its leaves are kept in its place. Repeats and decodings are placed right
before their first use and guarded by `optimization_barrier`, tied to the latest value made, so that XLA neither merges
nor hoists them. It decides nothing. Dead code is dropped at the end, inside loops too.

Who reads a stored value back (`_forms`): readers in the segment that makes it, and the step's outputs, take the value
itself. Others decode it; but where the form is lossy, only the backward pass does. A repeat that starts from a lossy
form feeds the backward pass alone, too: the forward result is that of the step as written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from memopt import _compat as c
from memopt import _cost, _forms, _handover, _pairs, _segments, _settled
from memopt import _graph as g
from memopt._contract import Store


def apply(
    graph: g.Graph,
    repeats: Mapping[int, frozenset[int]],
    stores: Mapping[int, Store] | None = None,
    chains: Mapping[tuple[int, int], int] | None = None,
    decodings: dict[int, int] | None = None,
) -> tuple[Any, dict[Any, int]]:
    """Return the rewritten closed jaxpr and the time segment of each variable that is new in it.

    Args:
      graph: the survey of the step.
      repeats: segment number -> ids of the operations run again in that segment, for what is read there.
      stores: value -> the form that it is kept in; all others are kept as they are.
      chains: `_segments.chains` of the repeats, where the caller has them.
      decodings: where given, filled with how many times each stored value is read back.

    Returns:
      `(closed jaxpr, {variable: segment})`; variables of loop bodies are among them. The segments of the step's own
      variables are the same in every plan (`_settled`).

    Raises:
      ValueError: a form has effects, or does not give back the shape and dtype of its value.
    """
    chains = _segments.chains(graph, repeats) if chains is None else chains
    builder = Builder(graph, repeats, stores or {}, chains)
    body = builder.region(graph.top, None)
    builder.finish(body)
    if decodings is not None:
        decodings.update(builder.decodings)
    base = c.open_jaxpr(graph.closed)
    jaxpr = c.without_dead(c.rebuild(base, outvars=body.outs, eqns=body.eqns))
    return c.close(jaxpr, c.jaxpr_consts(graph.closed)), builder.bin_of


class _Body:
    """One region while it is built anew."""

    def __init__(self, region: g.Region, parent: _Body | None):
        self.region = region
        self.parent = parent  # the body that holds what this one is a body of
        self.eqns: list[Any] = []
        self.local = dict(region.held)  # value of a source region -> the variable that brings it into this body
        self.clones: dict[int, tuple[int, Any]] = {}  # value -> first segment of its latest repeat, its variable
        self.decoded: dict[int, tuple[int, Any, int]] = {}  # value -> segment of its last reader, its variable, where
        self.leaves: dict[int, list[Any]] = {}  # value of a source region -> what brings its leaves into this body
        self.new_consts: list[tuple[Any, Any]] = []  # (variable, value outside, a literal or the variable itself)
        self.new_xs: list[tuple[Any, Any]] = []  # and those that come in as slices
        self.specs: dict[Any, Any] = {}  # variable that comes in anew -> its layout, where this is a `shard_map`
        self.lifted: dict[tuple[int, Any], Any] = {}  # source region, its variable -> what brings it into this body
        self.outs: list[Any] = []
        self.pending: list[tuple[int, g.Op, list[_Body]]] = []  # operations whose bodies are settled when all are built
        self.latest: Any = None  # the variable made last that XLA materialises and that later matmuls wait for

    @property
    def touched(self) -> bool:
        return self.region.changed or bool(self.region.sources or self.clones or self.new_consts or self.new_xs)


class Builder:
    """One plan while it is built; `_probe` builds measurements with it."""

    def __init__(
        self,
        graph: g.Graph,
        repeats: Mapping[int, frozenset[int]],
        stores: Mapping[int, Store],
        chains: Mapping[tuple[int, int], int],
    ):
        self.graph = graph
        self.repeats = repeats
        self.chains = chains
        self.forms = _forms.Forms(graph, stores, frozenset().union(*repeats.values()))
        self.leaves: dict[int, list[Any]] = {}  # stored value -> the leaves where it is made
        self.extra: dict[int, dict[tuple[int, Any], Any]] = {}  # operation -> {(region, variable): what hands it out}
        self.bin_of: dict[Any, int] = {}
        self.stores = stores
        self.decodings: dict[int, int] = {}  # stored value -> how many times it is read back
        self.settled, _ = _settled.tables(graph)

    def region(self, region: g.Region, parent: _Body | None) -> _Body:
        body = _Body(region, parent)
        for value in self.forms.of:
            if self.graph.values[value].op is None and self.graph.values[value].region == region.id:
                self._encode(body, value)
        self._ops(body)
        outvars = c.open_jaxpr(region.jaxpr).outvars
        body.outs = [v if o is None else self._out(body, o) for v, o in zip(outvars, region.outs, strict=True)]
        return body

    def finish(self, body: _Body) -> None:
        """Give what has bodies its new operands and results, once it is known what later bodies ask of them."""
        for position, op, inner in body.pending:
            for one in inner:
                self.finish(one)
            eqn = body.eqns[position]
            extra = [(home, var, out) for (home, var), out in self.extra.get(op.id, {}).items()]
            if extra or any(map(_changed, inner)):
                body.eqns[position] = _handover.rebuild(eqn, op, inner, extra)

    def _out(self, body: _Body, value: int) -> Any:
        """Return the variable of a region's output: what is made here is handed out itself, not read back."""
        region = body.region
        last = region.bins[-1] if len(region.bins) else -1
        if self.graph.values[value].region == region.id and not self._repeats(body, value, last, None):
            return self.graph.values[value].var
        return self._read(body, value, last, region.op)

    def _ops(self, body: _Body) -> None:
        """Add a region's operations in order: as they are, in one piece, where the plan changes nothing they read."""
        table, ops = self.settled[body.region.id], body.region.ops
        for place, first, last in table.runs:
            if self.forms.of:
                touched = range(first, last)
            elif place in self.repeats:
                planned = self.repeats[place]
                touched = [
                    i for i in range(first, last) if table.eqns[i] is None or not planned.isdisjoint(table.makers[i])
                ]
            else:
                touched = table.open[bisect_left(table.open, first) : bisect_left(table.open, last)]
            for i in touched:
                body.eqns += table.eqns[first:i]
                body.latest = table.latest[i]
                self._op(body, ops[i])
                first = i + 1
            body.eqns += table.eqns[first:last]
        body.latest = table.latest[-1]

    def _op(self, body: _Body, op: g.Op) -> None:
        eqn = op.eqn
        invars = [
            v if o is None or i in op.mapped else self._read(body, o, op.bin, op)
            for i, (v, o) in enumerate(zip(eqn.invars, op.inputs, strict=True))
        ]
        if op.bodies:
            inner = [self.region(r, body) for r in op.bodies]
            eqn = self._with_operands(body, op, invars, inner)
            body.pending.append((len(body.eqns), op, inner))
        elif any(a is not b for a, b in zip(invars, eqn.invars, strict=True)):
            eqn = c.replace_eqn(eqn, invars=invars)
        body.eqns.append(eqn)
        for value in op.outputs:
            if value in self.forms.of:
                self._encode(body, value)

    def _with_operands(self, body: _Body, op: g.Op, invars: list[Any], inner: list[_Body]) -> Any:
        """Return an equation with its new operands; its bodies follow in `finish`."""
        consts = [self._outside_of(body, o, op) for one in inner for _, o in one.new_consts]
        xs = [self._outside_of(body, o, op) for one in inner for _, o in one.new_xs]
        return c.replace_eqn(op.eqn, invars=_handover.operands(op, invars, consts, xs))

    def _outside_of(self, body: _Body, outer: Any, op: g.Op) -> Any:
        return self._read(body, outer, op.bin, op) if isinstance(outer, int) else outer

    def _read(self, body: _Body, value: int, segment: int, reader: g.Op | None, *, repeat: bool = False) -> Any:
        """Return the variable that holds a value for a reader in this segment, repeated or read back where planned."""
        item = self.graph.values[value]
        if self._repeats(body, value, segment, reader):
            return self._clone(body, value, segment) or self._repeat(body, item.op, segment, value, reader)
        here = item.region == body.region.id
        if not here or self._made(item) < segment:
            form = self.forms.for_reader(value, reader, repeat=repeat)
            if form is not None:
                return self._decode(body, value, segment, form)
        if here:
            return item.var
        if value not in body.local:
            body.local[value] = self._bring(body, item)
        return body.local[value]

    def _repeats(self, body: _Body, value: int, segment: int, reader: g.Op | None) -> bool:
        """Say whether a reader in this segment takes a value from a repeat."""
        op = self.graph.values[value].op
        if op is None or op.id not in self.repeats.get(segment, ()):
            return False
        return (op.region != body.region.id or op.bin < segment) and self.forms.may_repeat(op, reader)

    def _made(self, item: g.Value) -> int:
        return self.graph.regions[item.region].bins[0] if item.op is None else item.op.bin

    def _encode(self, body: _Body, value: int) -> None:
        """Make the leaves of a stored value right here; those that nothing reads are dropped with other dead code."""
        item = self.graph.values[value]
        like = None if item.op is None else item.op.eqn
        read = [self.graph.values[v].var for v in (value, *self.stores[value].reads)]
        eqns, self.leaves[value] = _forms.emit(self.forms.of[value].encode, read, like)
        self._emit(body, eqns, self._made(item))

    def _decode(self, body: _Body, value: int, segment: int, form: _forms.Form) -> Any:
        """Read a stored value back from its leaves; readers in segments near each other share it (`_is_apart`)."""
        before, var, at = body.decoded.get(value, (None, None, 0))
        if before is None or segment - before > _segments.near(body.region) or self._is_apart(body, value, at):
            item = self.graph.values[value]
            like = body.region.ops[0].eqn if item.op is None else item.op.eqn
            leaves = self._leaves(body, value)
            here = item.region == body.region.id
            if here or before is not None:
                kept = {i: v for i, v in enumerate(leaves) if not isinstance(v, c.Literal) and c.guardable(v)}
                if not here:  # one tells two readings apart; of the others XLA then takes slices where it decodes them
                    kept = dict(sorted(kept.items(), key=lambda leaf: _cost.aval_bytes(leaf[1].aval))[:1])
                guarded = self._barrier(body, kept, like, segment)
                leaves = [guarded.get(i, v) for i, v in enumerate(leaves)]
            eqns, (var,) = _forms.emit(form.decode, leaves, like)
            self._emit(body, eqns, segment)
            self.decodings[value] = self.decodings.get(value, 0) + 1
            at = len(body.eqns)
        body.decoded[value] = segment, var, at
        return var

    def _is_apart(self, body: _Body, value: int, at: int) -> bool:
        """Say whether a value is better read back again than held: since then something larger was made.

        Scores stand between the readers of what attention is made of: XLA would hold it decoded beside them. So it
        would up to a gradient of weights, which it runs late, whatever their order here.
        """
        if self.stores[value].again_seconds is None:
            return False
        size = _cost.aval_bytes(self.graph.values[value].aval)
        return any(_cost.aval_bytes(v.aval) > size for eqn in body.eqns[at:] for v in eqn.outvars)

    def _emit(self, body: _Body, eqns: list[Any], segment: int) -> None:
        body.eqns += eqns
        self.bin_of.update((var, segment) for eqn in eqns for var in eqn.outvars)

    def _leaves(self, body: _Body, value: int) -> list[Any]:
        """Return a stored value's leaves, brought into this body by stacks of theirs."""
        item = self.graph.values[value]
        if item.region == body.region.id:
            return self.leaves[value]
        if value not in body.leaves:
            body.leaves[value] = [self._bring_leaf(body, item, v) for v in self.leaves[value]]
        return body.leaves[value]

    def _bring_leaf(self, body: _Body, item: g.Value, leaf: Any) -> Any:
        if isinstance(leaf, c.Literal):
            return leaf
        return self._bring(body, item) if leaf is item.var else self._import(body, item.region, leaf)

    def _clone(self, body: _Body, value: int, segment: int) -> Any | None:
        """Return the variable of a repeat that this segment shares with an earlier one, if there is one."""
        first, var = body.clones.get(value, (None, None))
        return var if first == self.chains[self.graph.values[value].op.id, segment] else None

    def _bring(self, body: _Body, item: g.Value) -> Any:
        """Make a source region's value readable in this body: by constant, by slice, or by what hands it out there."""
        maker = self.graph.regions[item.region].op
        if item.kind in (g.CONST_IN, g.XS_IN):
            outer = maker.inputs[item.operand]
            atom = maker.eqn.invars[item.operand] if outer is None else outer
            return self._new_input(body, item.aval, atom, maker, item.operand)
        if item.kind == g.INVAR:
            raise AssertionError("a closed-over constant of a body was not hoisted")
        position = self.graph.out_position(maker, item.id)
        if position is None or not _handover.hands_out(maker.eqn, position, item.aval):
            return self._import(body, item.region, item.var)
        here = maker.region == body.parent.region.id
        atom = maker.eqn.outvars[position] if here else maker.outputs[position]
        return self._new_input(body, item.aval, atom, maker, None)

    def _new_input(self, body: _Body, aval: Any, outer: Any, maker: g.Op, operand: int | None) -> Any:
        """Return a new input of a body, for one of its maker's operands or for what its maker hands out."""
        var = c.Var(aval if operand is not None else _handover.brought_aval(maker.eqn, aval))
        sliced = _handover.slices(maker.eqn) if operand is None else operand in _handover.sliced(maker.eqn)
        (body.new_xs if sliced else body.new_consts).append((var, outer))
        body.specs[var] = _handover.layout(maker.eqn, operand, aval)
        if var.aval.shape == aval.shape:
            return var
        scalar = c.Var(aval)
        body.eqns.append(_pairs.reshape(var, scalar, maker.eqn))
        return scalar

    def _import(self, body: _Body, home: int, var: Any) -> Any:
        """Return what brings a variable of a source region into this body, handed out by its operation for that."""
        if body.region.id == home:
            return var
        key = home, var  # JAX traces a function once: bodies of several operations may hold the same variables
        if key not in body.lifted:
            maker = self.graph.regions[home].op
            extra = self.extra.setdefault(maker.id, {})
            if key not in extra:
                extra[key] = c.Var(_handover.handed_aval(maker.eqn, var.aval))
                self.bin_of[extra[key]] = maker.bin
            outer = self._import(body.parent, maker.region, extra[key])
            body.lifted[key] = self._new_input(body, var.aval, outer, maker, None)
        return body.lifted[key]

    def _repeat(self, body: _Body, op: g.Op, segment: int, value: int, reader: g.Op | None) -> Any:
        """Run an operation again here, with all planned repeats that it needs, as one guarded batch."""
        batch = self._batch(body, op, segment)
        guarded = self._guard(body, batch, segment, reader)
        for one in batch:
            invars = [
                v if o is None else guarded.get(o) or self._read(body, o, segment, reader, repeat=True)
                for v, o in zip(one.eqn.invars, one.inputs, strict=True)
            ]
            outvars = [v if isinstance(v, c.DropVar) else c.Var(v.aval) for v in one.eqn.outvars]
            body.eqns.append(c.replace_eqn(one.eqn, invars=invars, outvars=outvars))
            for o, var in zip(one.outputs, outvars, strict=True):
                self.bin_of[var] = segment
                body.clones[o] = (self.chains[one.id, segment], self._repeated(body, o, var, segment))
        return body.clones[value][1]

    def _repeated(self, body: _Body, value: int, var: Any, segment: int) -> Any:
        """Return the variable that readers of a repeat take: a place for measurements (`_probe`) to step in."""
        return var

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

    def _guard(self, body: _Body, batch: list[g.Op], segment: int, reader: g.Op | None) -> dict[int, Any]:
        """Pass what the batch reads from outside through a barrier, tied to the latest original value."""
        own = body.region.op is not None and body.region.op.eqn.primitive.name != "shard_map"
        if own and body.region.sources and all(one.region != body.region.id for one in batch):
            return {}  # a loop body of its own: there is nothing to merge with
        return self._barrier(body, self._outside(body, batch, segment, reader), batch[0].eqn, segment)

    def _barrier(self, body: _Body, outside: Mapping[int, Any], like: Any, segment: int) -> dict[int, Any]:
        """Return the variables behind barriers, one for each set of mesh axes that they vary over."""
        guarded: dict[int, Any] = {}
        groups: dict[frozenset, dict[int, Any]] = {}
        for o, var in outside.items():
            groups.setdefault(c.vma(var.aval), {})[o] = var
        for vma, group in groups.items():
            invars = list(group.values())
            latest = body.latest
            tied = latest is not None and c.vma(latest.aval) == vma and all(latest is not v for v in invars)
            eqn, outvars = c.barrier_eqn(invars + [latest] * tied, like)
            self._emit(body, [eqn], segment)
            guarded.update(zip(group, outvars, strict=False))
        return guarded

    def _outside(self, body: _Body, batch: list[g.Op], segment: int, reader: g.Op | None) -> dict[int, Any]:
        """Return the values to guard with their variables.

        Left out are repeats and what was read back (behind barriers of their own), but for the second repeat of an
        operation, and the index of a `cond`, which loses its derivative rule behind a barrier.
        """
        made = {o for one in batch for o in one.outputs}
        again = not made.isdisjoint(body.clones)  # one repeat of many: two of the same operands would be merged
        made |= {one.inputs[0] for one in batch if one.eqn.primitive.name == "cond"}
        found: dict[int, Any] = {}
        for o in dict.fromkeys(o for one in batch for o in one.inputs if o is not None and o not in made):
            var = self._read(body, o, segment, reader, repeat=True)
            behind = [table[o][1] for table in (body.clones, body.decoded) if o in table]
            if (again or all(var is not v for v in behind)) and c.guardable(var):
                found[o] = var
        return found


def _changed(body: _Body) -> bool:
    if body.touched:
        return True
    old = c.open_jaxpr(body.region.jaxpr)
    return len(old.eqns) != len(body.eqns) or any(a is not b for a, b in zip(old.eqns, body.eqns, strict=True))
