"""The cloakroom: other forms of values, traced once, and the rule for who may read them back.

In: a graph and the `Store`s chosen for its values. Out: for each stored value its `Form` (encode and decode as flat
jaxprs), their equations over fresh variables wherever the builders want them, and which readers take a decoded value.
It places nothing and chooses nothing.

The rule: what is exact (`error` 0) may be decoded for every reader in a later place. What is lossy is decoded for the
backward pass alone, which is what JAX transposed: `transpose` stands before `jvp` in the transforms of an operation's
name stack, its loops' included. Dataflow cannot tell it: the gradient of a loss does not read the loss. Every other
reader gets the value itself, and never a repeat that starts from a lossy form, directly or through other repeats. So
losses, metrics and running statistics are those of the plain step, and only gradients, and what is made of them, carry
the error. A form that is right for some readers alone says which, and no repeat starts from it. An operation that JAX
did not mark, such as a gradient written by hand, counts as forward.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _graph as g
from memopt import _inline
from memopt._contract import Store


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A traced `Store`.

    Attributes:
      encode: open jaxpr without constants, of the value and what it reads; its outputs are the encoded leaves.
      decode: one of the leaves; its output is the value again.
      lossy: whether the decoded value may differ.
      readers: the operations that it serves; None where it serves all.
    """

    encode: Any
    decode: Any
    lossy: bool
    readers: frozenset[int] | None = None


_TRACED: weakref.WeakKeyDictionary[g.Graph, dict[int, tuple[Store, Form]]] = weakref.WeakKeyDictionary()


class Marks:
    """Which operations of a graph are of the backward pass, by the transforms that JAX notes on them."""

    def __init__(self, graph: g.Graph):
        self.graph = graph
        self._backward: dict[int, bool] = {}

    def is_backward(self, op: g.Op | None) -> bool:
        """Say whether an operation, and all that are one with it, are of the backward pass; the step's outputs not."""
        if op is None:
            return False
        if op.id not in self._backward:
            places = [(op.region, op.eqn), *op.twins]
            self._backward[op.id] = all(self._is_transposed(region, eqn) for region, eqn in places)
        return self._backward[op.id]

    def serves(self, store: Store, reader: g.Op | None) -> bool:
        """Say whether a reader in a later place may take a value from this form of it."""
        if store.readers is not None and (reader is None or reader.id not in store.readers):
            return False
        return store.error <= 0.0 or self.is_backward(reader)

    def _is_transposed(self, region: int, eqn: Any) -> bool:
        return c.is_transposed([*self._around(region), *c.transforms(eqn)])

    def _around(self, region: int) -> list[str]:
        loop = self.graph.regions[region].op
        return [] if loop is None else [*self._around(loop.region), *c.transforms(loop.eqn)]


class Forms:
    """The forms of one plan.

    Args:
      graph: the step.
      stores: value -> the form that it is kept in.
      repeated: the operations that the plan runs again anywhere.
    """

    def __init__(self, graph: g.Graph, stores: Mapping[int, Store], repeated: frozenset[int]):
        self.graph = graph
        self.marks = Marks(graph)
        self.of = {value: _traced(graph, store) for value, store in stores.items()}
        self.lossy_repeats: set[int] = set()  # operations whose repeats start from a lossy form
        if any(form.lossy for form in self.of.values()):
            for op in sorted(repeated):
                if any(self._is_lossy(v) for v in graph.ops[op].inputs if v is not None):
                    self.lossy_repeats.add(op)

    def _is_lossy(self, value: int) -> bool:
        maker = self.graph.values[value].op
        stored = value in self.of and self.of[value].lossy and self.of[value].readers is None
        return stored or (maker is not None and maker.id in self.lossy_repeats)

    def may_repeat(self, op: g.Op, reader: g.Op | None) -> bool:
        """Say whether a reader may take the result of this operation's repeat."""
        return op.id not in self.lossy_repeats or self.marks.is_backward(reader)

    def for_reader(self, value: int, reader: g.Op | None, *, repeat: bool = False) -> Form | None:
        """Return the form that a reader, or a repeat for it, decodes a value from; None: it reads the value itself."""
        form = self.of.get(value)
        if form is None or (form.lossy and not self.marks.is_backward(reader)):
            return None
        if form.readers is not None and (repeat or reader is None or reader.id not in form.readers):
            return None
        return form


def emit(jaxpr: Any, operands: Sequence[Any], like: Any) -> tuple[list[Any], list[Any]]:
    """Return a jaxpr's equations over these operands, every other variable a new one, and its results.

    Args:
      jaxpr: open jaxpr without constants.
      operands: a variable or literal for each input.
      like: an equation whose name stack they get, or None.
    """
    env = dict(zip(jaxpr.invars, operands, strict=True))
    eqns = []
    for eqn in jaxpr.eqns:
        invars = [v if isinstance(v, c.Literal) else env[v] for v in eqn.invars]
        outvars = [v if isinstance(v, c.DropVar) else c.Var(v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outvars, strict=True))
        new = c.replace_eqn(eqn, invars=invars, outvars=outvars)
        eqns.append(new if like is None else c.with_name(new, c.name_stack(like)))
    return eqns, [v if isinstance(v, c.Literal) else env[v] for v in jaxpr.outvars]


def refusal(graph: g.Graph, store: Store) -> str | None:
    """Return why a value cannot be kept in another form, or None where it can."""
    item = graph.values[store.value]
    if item.kind not in (g.MADE, g.CARRY_IN):
        return "it is read from an argument that is there anyway"
    if not c.guardable(item.var):
        return "it is no array"
    if c.is_local(item.aval):
        return "it is one device's part of a sharded value"
    return None


def _traced(graph: g.Graph, store: Store) -> Form:
    known = _TRACED.setdefault(graph, {})
    if id(store) not in known:
        known[id(store)] = store, _trace(store, [graph.values[v].aval for v in (store.value, *store.reads)])
    return known[id(store)][1]


def _trace(store: Store, avals: Sequence[Any]) -> Form:
    """Trace both functions.

    Raises:
      ValueError: they have effects, or do not give back the value's shape and dtype.
    """
    aval = avals[0]
    values = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    encode, leaves = jax.make_jaxpr(store.encode, return_shape=True)(*values)
    decode, back = jax.make_jaxpr(store.decode, return_shape=True)(leaves)
    if encode.effects or decode.effects:
        raise ValueError(f"The form {store.name!r} has effects: encode and decode have to be pure.")
    if getattr(back, "shape", None) != aval.shape or back.dtype != aval.dtype:
        raise ValueError(f"The form {store.name!r} decodes {aval.str_short()} to {back}: it has to give back the same.")
    return Form(flat(encode), flat(decode), store.error > 0.0, store.readers)


def flat(closed: Any) -> Any:
    """Return an open jaxpr without plain calls, dead code and constants: they become literals."""
    flat = _inline.inline(closed)
    base, _ = c.dce(flat)
    consts = zip(base.constvars, c.jaxpr_consts(flat), strict=True)
    known = {var: c.Literal(np.asarray(value), var.aval) for var, value in consts}

    def new(atoms: Sequence[Any]) -> list[Any]:
        return [v if isinstance(v, c.Literal) else known.get(v, v) for v in atoms]

    eqns = [c.replace_eqn(eqn, invars=new(eqn.invars)) for eqn in base.eqns]
    return c.rebuild(base, constvars=[], eqns=eqns, outvars=new(base.outvars))
