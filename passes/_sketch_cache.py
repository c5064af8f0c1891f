"""The bookkeeper of a cached sketch: finds what weight gradients alone read, and rewrites a step to sample it.

In: a flat step whose state holds gradient norms by sample (`_sketch_state`). Out: an equal step but for gradients of
weights: where a layer's input is made, rows of it are drawn by their norms times those of their samples' gradients; the
weight's gradient is made from these rows alone; and the norms that the backward pass finds are written to the state. In
a pair of loops rows go from the first loop to the second as stacks, and norms come out of the second. All is found on
dataflow; how rows are drawn is the business of `_sketch_norms`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _compat as c
from memopt import _cost, _forms, _scopes
from memopt import _graph as g
from memopt._contract import Context, Left, Rewritten
from memopt._plan import Decision
from memopt.passes import _sketch_norms as ledger
from memopt.passes._sketch_sites import Site, batch_of, find

_NORMS = re.compile(r"\.sketch_norms\['(.*)'\]$")


def rewritten(pass_: Any, closed: Any, context: Context) -> Rewritten:
    """Return the step with rows kept by cached norms, wherever its state holds norms of them."""
    if context.shardings is not None or context.partitioned:
        return Rewritten(closed, left=(Left("The norm cache", "rows are not drawn across devices"),))
    base, graph = c.open_jaxpr(closed), g.Graph(closed)
    norms = {m[1]: i for i, path in enumerate(context.paths) if (m := _NORMS.search(path))}
    count = next((i for i, path in enumerate(context.paths) if path.endswith(".sketch_count")), -1)
    handed = {i: k for i in (*norms.values(), count) for k, v in enumerate(base.outvars) if v is base.invars[i]}
    if not norms or len(handed) != len(norms) + 1:
        why = "its norms do not come to the step as they are stored: another pass keeps them in a form of its own"
        return Rewritten(closed, left=(Left("The norm cache", why),))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
    numbers, batch = batch_of(pass_, context.paths, shapes)
    sites, left = find(pass_, graph, batch)
    kept = [s for s in sites if s.name in norms and _is_of(s, pass_.samples, shapes[norms[s.name]])]
    left += [Left(f"The norm cache of {s.name}", "the state holds no norms of it") for s in sites if s not in kept]
    builder = _Builder(pass_, graph, base, None if numbers is None else base.invars[numbers])
    builder.start(base.invars[count])
    outvars = list(base.outvars)
    for number, site in enumerate(kept):
        outvars[handed[norms[site.name]]] = builder.keep(site, base.invars[norms[site.name]], number)
    outvars[handed[count]] = builder.next_count
    new = c.close(builder.finished(outvars), c.jaxpr_consts(closed))
    rows = tuple(_row(builder.graph, site) for site in kept)
    return Rewritten(new, rows, tuple(left), max((s.rows.error for s in kept), default=0.0))


def _is_of(site: Site, samples: int, shape: Any) -> bool:
    want = (samples,) if site.layers is None else (site.layers, samples)
    return tuple(shape.shape) == want


def _row(graph: g.Graph, site: Site) -> Decision:
    item, rows, trips = graph.values[site.value], site.rows, site.layers or 1
    like = item.op if item.op is not None else site.readers[0]
    size = _cost.aval_bytes(item.aval) * trips
    stored = rows.rank * (rows.features * np.dtype(rows.dtype).itemsize + 4) * trips
    reason = f"{rows.rank} of {rows.rows} rows, drawn by their norms and the cached ones of their samples' gradients"
    return Decision(site.name, site.name, c.user_source(like.eqn), size, "wta", reason, stored)


class _Body:
    """What is added to one body of equations."""

    def __init__(self):
        self.after: dict[int | None, list[Any]] = {}  # id of an equation -> what follows it; None: what comes first
        self.instead: dict[int, list[Any]] = {}  # id of an equation -> what stands in its place
        self.xs: list[tuple[Any, Any]] = []  # (stack outside, slice inside)
        self.ys: list[tuple[Any, Any]] = []  # (value inside, stack outside)

    def equations(self, jaxpr: Any, loop: Callable[[Any], Any]) -> list[Any]:
        """Return the equations of a body with all that was added; `loop` rebuilds those with bodies of their own."""
        eqns = list(self.after.get(None, []))
        for eqn in jaxpr.eqns:
            eqns += self.instead.get(id(eqn)) or [loop(eqn)]
            eqns += self.after.get(id(eqn), [])
        return eqns


class _Builder:
    """The rewrite of one step."""

    def __init__(self, pass_: Any, graph: g.Graph, base: Any, numbers: Any):
        self.pass_, self.graph, self.base, self.numbers = pass_, graph, base, numbers
        self.top, self.loops = _Body(), {}
        self.next_count: Any = None

    def start(self, count: Any) -> None:
        """Count the step, and make the batch's numbers where no argument holds them."""
        self.next_count, self.key = self._first(_counted(self.pass_.seed), [count])
        if self.numbers is None:
            (self.numbers,) = self._first(lambda: (jnp.arange(self.pass_.samples, dtype=jnp.int32),), [])

    def _first(self, fn: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
        eqns, outs = _traced(fn, operands, None)
        self.top.after.setdefault(None, []).extend(eqns)
        return outs

    def _in(self, op: g.Op) -> _Body:
        return self.loops.setdefault(id(op.eqn), _Body())

    def keep(self, site: Site, norms: Any, number: int) -> Any:
        """Keep rows of one value, and return the variable of its norms after the step."""
        found, keys = self._first(_prepared(number, site.layers), [norms, self.numbers, self.key])
        first, second = (self.top, self.top) if site.loops is None else map(self._in, site.loops)
        if site.loops is not None:
            found, keys = self._sliced(first, found), self._sliced(first, keys)
        leaves = self._draw(first, site, found, keys)
        if site.loops is not None:
            stacks = [self._stacked(first, v, site.layers) for v in leaves]
            leaves = [self._sliced(second, v) for v in stacks]
        squares = self._contract(second, site, leaves)
        if site.loops is not None:
            squares = self._stacked(second, squares, site.layers)
        eqns, (new,) = _traced(lambda *a: (ledger.written(*a),), [norms, self.numbers, squares], None)
        last = site.readers[-1] if site.loops is None else site.loops[1]
        self.top.after.setdefault(id(last.eqn), []).extend(eqns)
        return new

    def _sliced(self, body: _Body, stack: Any) -> Any:
        inner = c.Var(c.row_aval(stack.aval))
        body.xs.append((stack, inner))
        return inner

    def _stacked(self, body: _Body, value: Any, length: int) -> Any:
        outer = c.Var(c.stacked_aval(value.aval, length))
        body.ys.append((value, outer))
        return outer

    def _draw(self, body: _Body, site: Site, norms: Any, key: Any) -> list[Any]:
        """Draw rows right after their value is made."""
        item = self.graph.values[site.value]
        like = self.graph.regions[item.region].ops[0].eqn if item.op is None else item.op.eqn
        eqns, leaves = _traced(_marked(site.rows.kept), [item.var, norms, key], like)
        body.after.setdefault(None if item.op is None else id(item.op.eqn), []).extend(eqns)
        return leaves

    def _contract(self, body: _Body, site: Site, leaves: list[Any]) -> Any:
        """Make the weights' gradients from rows alone, and return the squared norms of the samples' gradients."""
        squares = None
        for reader in site.readers:
            side = reader.inputs.index(site.value)
            fn = _gradient(site.rows, reader.eqn.params, side, reader.eqn.outvars[0].aval)
            extra = [] if squares is None else [squares]
            operands = [*leaves, reader.eqn.invars[1 - side], *extra]
            eqns, (out, squares) = _traced(fn, operands, reader.eqn)
            body.instead[id(reader.eqn)] = [_renamed(one, out, reader.eqn.outvars[0]) for one in eqns]
        return squares

    def finished(self, outvars: Sequence[Any]) -> Any:
        """Return the step with all that was added, without dead code."""
        eqns = self.top.equations(self.base, self._loop)
        return c.dce(c.rebuild(self.base, eqns=eqns, outvars=list(outvars)))[0]

    def _loop(self, eqn: Any) -> Any:
        body = self.loops.get(id(eqn))
        if body is None:
            return eqn
        closed = eqn.params["jaxpr"]
        inner = c.open_jaxpr(closed)
        new = c.rebuild(
            inner,
            eqns=body.equations(inner, lambda one: one),
            invars=[*inner.invars, *(v for _, v in body.xs)],
            outvars=[*inner.outvars, *(v for v, _ in body.ys)],
        )
        params = c.scan_params(eqn, c.close(new, c.jaxpr_consts(closed)), *c.scan_layout(eqn))
        invars = [*eqn.invars, *(v for v, _ in body.xs)]
        return c.replace_eqn(eqn, invars=invars, outvars=[*eqn.outvars, *(v for _, v in body.ys)], params=params)


def _traced(fn: Callable[..., Any], operands: Sequence[Any], like: Any) -> tuple[list[Any], list[Any]]:
    """Return a function of arrays as equations over variables, and its results."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands]
    eqns, outs = _forms.emit(_forms.flat(jax.make_jaxpr(fn)(*shapes)), operands, like)
    if like is not None:
        eqns = [c.with_source(one, like.source_info.replace(name_stack=c.name_stack(one))) for one in eqns]
    return eqns, outs


def _renamed(eqn: Any, old: Any, new: Any) -> Any:
    """Return an equation that makes another variable in the place of one."""
    return c.replace_eqn(eqn, outvars=[new if v is old else v for v in eqn.outvars]) if old in eqn.outvars else eqn


def _marked(fn: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any) -> Any:
        with jax.named_scope(_scopes.SKETCH):
            return fn(*args)

    return marked


def _counted(seed: int) -> Callable[..., Any]:
    def counted(count: Any) -> tuple[Any, Any]:
        return count + jnp.uint32(1), jax.random.key_data(jax.random.fold_in(jax.random.key(seed), count))

    return counted


def _prepared(number: int, layers: int | None) -> Callable[..., Any]:
    """Return a function that reads a batch's norms, and makes a key for a value, or for each of its layers."""

    def prepared(norms: Any, numbers: Any, key_data: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)
        keys = key if layers is None else jax.random.split(key, layers)
        return ledger.read(norms, numbers), jax.random.key_data(keys)

    return prepared


def _gradient(rows: ledger.Rows, params: dict[str, Any], side: int, aval: Any) -> Callable[..., Any]:
    """Return a function that makes a weight's gradient from rows, and adds up the samples' squared norms."""
    axes = tuple(params["dimension_numbers"][0][1 - side])
    numbers = (((0,), (0,)), ((), ()))
    how = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}

    def gradient(kept: Any, index: Any, y: Any, *before: Any) -> tuple[Any, Any]:
        pair = (kept, rows.picked(y, axes, index))
        made = jax.lax.dot_general(*(pair if side == 0 else pair[::-1]), numbers, **how)
        return made.reshape(aval.shape).astype(aval.dtype), sum(before, start=rows.squares(y, axes))

    return gradient
