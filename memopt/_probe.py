"""The test bench: a step built so that single values can be disturbed, and what that does read off.

In: the graph of a step and values of it. Out: closed jaxprs, one for all values and forms. `switched` is the step with
one more input, a number that says which value the backward pass reads from which form; its results are the gradients.
`shifted` is the forward pass with one more input for each value, which is added to it; its result is the loss. In
`leaning` the backward pass alone reads the sums; its results are the gradients. `made` is the step with the values
themselves as results. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _apply, _forms, _handover, _segments
from memopt import _compat as c
from memopt import _graph as g
from memopt._contract import Store
from memopt._survey import Survey

#: The selector of the step with every value exact.
EXACT = -1


def switched(
    survey: Survey, stores: Sequence[Store], results: Sequence[int], repeats: Mapping[int, frozenset[int]]
) -> Any:
    """Return the step as `(*arguments, number) -> results`, in which form `number` of the list is in use, alone.

    Args:
      survey: the step.
      stores: lossy forms of values, each for all of the backward pass.
      results: values of the top region.
      repeats: what is run again where. Repeats start from the form that is in use, and serve the backward pass.

    Returns:
      A closed jaxpr; the number is an `int32`, and `EXACT` uses none.
    """
    number = c.Var(c.ShapedArray((), np.dtype(np.int32)))
    builder = _Switched(survey.graph, repeats, stores, number)
    return builder.built(results, [number])


def shifted(survey: Survey, values: Sequence[int], result: int) -> tuple[Any, list[Any]]:
    """Return the step as `(*arguments, *shifts) -> [result]`, where shifts are added to values as they are made.

    Everything reads the sum, also what the step returns. A value in loops has a shift for each run, along new leading
    axes.

    Returns:
      The closed jaxpr, and the shapes of the shifts (`jax.ShapeDtypeStruct`).
    """
    return _with_shifts(_Shifted(survey.graph, values), values, [result])


def leaning(
    survey: Survey, values: Sequence[int], results: Sequence[int], repeats: Mapping[int, frozenset[int]]
) -> tuple[Any, list[Any]]:
    """Return the step as `(*arguments, *shifts) -> results`; the backward pass alone reads values with their shifts.

    As `switched` and `shifted` otherwise.
    """
    return _with_shifts(_Leaning(survey.graph, repeats, values), values, results)


def _with_shifts(builder: _Leaning, values: Sequence[int], results: Sequence[int]) -> tuple[Any, list[Any]]:
    inputs = [c.Var(_stacked(builder.graph, v)) for v in values]
    builder.inputs = dict(zip(values, inputs, strict=True))
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]
    return builder.built(results, inputs), shapes


def made(survey: Survey, values: Sequence[int]) -> Any:
    """Return the step as `(*arguments) -> values`; a value in loops has its runs along new leading axes."""
    return _apply_nothing(survey.graph).built(values, [])


def everything(survey: Survey, repeatable: Mapping[int, float]) -> dict[int, frozenset[int]]:
    """Return the plan that runs all again, in every later place, but for what a step narrows to at the end of a block.

    So what is wrong with a value goes as far as repeats could carry it within its loop's body or its block.
    """
    graph, marks = survey.graph, _forms.Marks(survey.graph)
    allowed = {op.id for op in graph.ops if op.id in repeatable and not marks.is_backward(op)} - block_ends(graph)
    found: dict[int, frozenset[int]] = {}
    for place, region in enumerate(survey.region_of_bin):
        here = {op.id for op in region.ops if op.bin < place}
        there = {op.id for s in region.sources for op in graph.regions[s].ops}
        if ops := (here | there) & allowed:
            found[place] = frozenset(ops)
    return found


def block_ends(graph: g.Graph) -> frozenset[int]:
    """Return the operations of the forward pass outside loops whose one result is all that is read after them."""
    marks = _forms.Marks(graph)
    last = max((op.bin for op in graph.top.ops if not marks.is_backward(op)), default=0)
    return frozenset(_segments.necks(graph, last))


def gradients(graph: g.Graph) -> list[int]:
    """Return the gradients of a step, found by dataflow: what its backward pass makes for others than itself.

    These are the floats of the top region that the backward pass makes (what JAX marks as transposed, and loops that
    hold such operations) and that something else reads, such as an optimizer, or the step returns.
    """
    marks = _forms.Marks(graph)

    def is_backward(op: g.Op | None) -> bool:
        return op is not None and (
            marks.is_backward(op) or any(is_backward(one) for body in op.bodies for one in body.ops)
        )

    backward = {op.id: is_backward(op) for op in graph.top.ops}
    read = {v for op in graph.top.ops if not backward[op.id] for v in op.inputs} | set(graph.top.outs)
    found = []
    for value in sorted(v for v in read if v is not None and jnp.issubdtype(graph.values[v].aval.dtype, jnp.floating)):
        maker = graph.values[source(graph, value)].op
        if maker is not None and backward[maker.id]:
            found.append(value)
    return found


def source(graph: g.Graph, value: int) -> int:
    """Return the value that barriers hand on as this one: what preparing a step puts before a backward loop."""
    op = graph.values[value].op
    while op is not None and op.eqn.primitive.name == "optimization_barrier":
        value = op.inputs[op.outputs.index(value)]
        op = graph.values[value].op
    return value


def is_reached(graph: g.Graph, value: int) -> bool:
    """Say whether shifts can be brought to a value, and its runs to the top: loops and branches lie between."""
    op = graph.regions[graph.values[value].region].op
    while op is not None:
        if op.eqn.primitive.name not in ("scan", "cond"):
            return False
        op = graph.regions[op.region].op
    return True


def _stacked(graph: g.Graph, value: int) -> Any:
    """Return the type of a value with its runs along leading axes, the outermost loop's first."""
    aval, op = graph.values[value].aval, graph.regions[graph.values[value].region].op
    aval = c.ShapedArray(aval.shape, aval.dtype)
    while op is not None:
        aval = c.stacked_aval(aval, op.eqn.params["length"]) if op.eqn.primitive.name == "scan" else aval
        op = graph.regions[op.region].op
    return aval


class _Bench(_apply.Builder):
    """A builder that brings inputs into bodies and hands values of bodies out."""

    def __init__(self, graph: g.Graph, repeats: Mapping[int, frozenset[int]], stores: Mapping[int, Store]):
        super().__init__(graph, repeats, stores, _segments.chains(graph, repeats))
        self.brought: dict[tuple[int, Any], Any] = {}  # region, input -> its variable there

    def built(self, results: Sequence[int], inputs: Sequence[Any]) -> Any:
        """Return the closed jaxpr with these further inputs and these values as its results, and nothing else."""
        body = self.region(self.graph.top, None)
        outs = [self._to_top(self.graph.values[v].region, self._var(v)) for v in results]
        self.finish(body)
        base = c.open_jaxpr(self.graph.closed)
        jaxpr = c.rebuild(base, invars=[*base.invars, *inputs], outvars=outs, eqns=body.eqns)
        return c.close(c.without_dead(jaxpr), c.jaxpr_consts(self.graph.closed))

    def _var(self, value: int) -> Any:
        return self.graph.values[value].var

    def _to_top(self, region: int, var: Any) -> Any:
        """Return what hands a variable of a body out to the top."""
        while region != self.graph.top.id:
            maker = self.graph.regions[region].op
            extra = self.extra.setdefault(maker.id, {})
            if (region, var) not in extra:
                extra[region, var] = c.Var(_handover.handed_aval(maker.eqn, var.aval))
            region, var = maker.region, extra[region, var]
        return var

    def _inside(self, body: Any, top: Any, *, sliced: bool) -> Any:
        """Return an input's variable in a body: as it is, or sliced by the loops around it."""
        if body.parent is None:
            return top
        key = body.region.id, top
        if key not in self.brought:
            outer = self._inside(body.parent, top, sliced=sliced)
            sliced = sliced and body.region.op.eqn.primitive.name == "scan"
            self.brought[key] = c.Var(c.row_aval(outer.aval) if sliced else outer.aval)
            (body.new_xs if sliced else body.new_consts).append((self.brought[key], outer))
        return self.brought[key]


def _apply_nothing(graph: g.Graph) -> _Bench:
    return _Bench(graph, {}, {})


class _Switched(_Bench):
    """Values are kept exact, and go through a form where they are read, if the number says so."""

    def __init__(self, graph: g.Graph, repeats: Mapping, stores: Sequence[Store], number: Any):
        by_value: dict[int, dict[int, Store]] = {}
        for i, store in enumerate(stores):
            by_value.setdefault(store.value, {})[i] = store
        plain = {v: Store(v, 0.0, 0, _same, _same, error=1.0) for v in by_value}
        super().__init__(graph, repeats, plain)
        self.number = number
        self.decoders = {v: _decoder(graph.values[v].aval, forms) for v, forms in by_value.items()}

    def _decode(self, body: Any, value: int, segment: int, form: Any) -> Any:
        if value not in body.decoded:
            var = self._switch(body, value, self._leaves(body, value)[0], segment)
            body.decoded[value] = segment, var, len(body.eqns)
        return body.decoded[value][1]

    def _repeated(self, body: Any, value: int, var: Any, segment: int) -> Any:
        return self._switch(body, value, var, segment) if value in self.decoders else var

    def _switch(self, body: Any, value: int, var: Any, segment: int) -> Any:
        item = self.graph.values[value]
        like = body.region.ops[0].eqn if item.op is None else item.op.eqn
        number = self._inside(body, self.number, sliced=False)
        eqns, (out,) = _forms.emit(self.decoders[value], [var, number], like)
        self._emit(body, eqns, segment)
        return out


def _same(x: Any) -> Any:
    return x


def _decoder(aval: Any, forms: Mapping[int, Store]) -> Any:
    """Return an open jaxpr `(value, number) -> value as the form of that number gives it back`."""
    branches = [lambda x: jnp.asarray(x, aval.dtype)]
    branches += [lambda x, one=one: one.decode(one.encode(x)) for one in forms.values()]

    def decode(x: Any, number: Any) -> Any:
        place = np.int32(0)
        for branch, own in enumerate(forms, start=1):
            place = jnp.where(number == np.int32(own), np.int32(branch), place)
        return jax.lax.switch(place, branches, x)

    shapes = jax.ShapeDtypeStruct(aval.shape, aval.dtype), jax.ShapeDtypeStruct((), np.int32)
    return _forms.flat(jax.make_jaxpr(decode)(*shapes))


class _Leaning(_Bench):
    """Values with something added to them where the backward pass reads them, or what is repeated from them."""

    def __init__(self, graph: g.Graph, repeats: Mapping, values: Sequence[int]):
        super().__init__(graph, repeats, {v: Store(v, 0.0, 0, _same, _same, error=1.0) for v in values})
        self.inputs: dict[int, Any] = {}  # value -> its shifts, an input of the step

    def _encode(self, body: Any, value: int) -> None:
        item = self.graph.values[value]
        like = body.region.ops[0].eqn if item.op is None else item.op.eqn
        adding = _forms.flat(jax.make_jaxpr(jnp.add)(*[jax.ShapeDtypeStruct(item.aval.shape, item.aval.dtype)] * 2))
        eqns, (var,) = _forms.emit(adding, [item.var, self._inside(body, self.inputs[value], sliced=True)], like)
        self._emit(body, eqns, self._made(item))
        self.leaves[value] = [var]

    def _repeated(self, body: Any, value: int, var: Any, segment: int) -> Any:
        return self._leaves(body, value)[0] if value in self.inputs else var


class _Shifted(_Leaning):
    """Values with something added to them as they are made: everything reads the sum."""

    def __init__(self, graph: g.Graph, values: Sequence[int]):
        super().__init__(graph, {}, values)

    def _is_shifted(self, body: Any, value: int) -> bool:
        return value in self.leaves and self.graph.values[value].region == body.region.id

    def _var(self, value: int) -> Any:
        return self.leaves[value][0] if value in self.leaves else super()._var(value)

    def _out(self, body: Any, value: int) -> Any:
        return self.leaves[value][0] if self._is_shifted(body, value) else super()._out(body, value)

    def _read(self, body: Any, value: int, segment: int, reader: Any, *, repeat: bool = False) -> Any:
        if self._is_shifted(body, value):
            return self.leaves[value][0]
        return super()._read(body, value, segment, reader, repeat=repeat)
