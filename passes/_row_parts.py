"""The carpenter: values of the forward pass that the backward pass reads as first rows and as rows made again.

In: equations of the forward pass, and how many rows it hands on. Out: which large matrix products can be cut so, what
follows from them by cheap operations, and the equations that the backward pass reads in their place. What cannot be cut
into rows is handed on whole. It knows no link and no budget, and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from memopt import _compat as c
from memopt import _forms, _pairs, _scopes
from memopt.passes import _row_cuts


class Forward:
    """What the forward pass makes: which values have rows of their own, and which are made again from which.

    Args:
      eqns: its equations.
      seed: a loop's carry, whose rows are those of its longest axis but the last; None at a level of its own, where
        sums of two branches are handed on whole, as a layer's input is in a loop.
      constants: what is there in the backward pass, too.
      is_wanted: whether a product's equation may be cut.

    Attributes:
      axis: variable -> the axis of its rows.
      products: large matrix products whose rows are made from the same rows of their operands.
      derived: what cheap operations make of products.
      fixed: what cheap operations make of constants alone.
    """

    def __init__(self, eqns: Sequence[Any], seed: Any, constants: Sequence[Any], is_wanted: Callable[[Any], bool]):
        self.is_wanted, self.has_carry = is_wanted, seed is not None
        self.maker = {v: eqn for eqn in eqns for v in eqn.outvars}
        self.axis: dict[Any, int] = {}
        self.length = 0 if seed is None else self._seeded(seed)
        self.products: set[Any] = set()
        self.derived: set[Any] = set()
        self.fixed: set[Any] = set()
        self.constants = set(constants)
        self.sources: dict[Any, frozenset] = {}
        for eqn in eqns:
            self._see(eqn)

    def _seeded(self, var: Any) -> int:
        shape = var.aval.shape
        self.axis[var] = max(range(len(shape) - 1), key=lambda i: shape[i])
        return shape[self.axis[var]]

    def _see(self, eqn: Any) -> None:
        read = [v for v in eqn.invars if not isinstance(v, c.Literal)]
        if _row_cuts.is_cheap(eqn) and all(v in self.constants or v in self.fixed for v in read):
            self.fixed.update(eqn.outvars)
            return
        axis = _row_cuts.axis_of(eqn, [None if isinstance(v, c.Literal) else self.axis.get(v) for v in eqn.invars])
        if axis is None or eqn.outvars[0].aval.shape[axis] != self.length:
            self._start(eqn)
            return
        self.axis.update((v, axis) for v in eqn.outvars)
        if eqn.primitive.name == _row_cuts.MATMUL:
            if self.is_wanted(eqn):
                self.products.update(eqn.outvars)
            return
        found = [self.sources.get(v, frozenset([v])) for v in read if v in self.axis]
        joins = not self.has_carry and eqn.primitive.name == "add" and len(set(found)) > 1
        if not joins and any(v in self.products or v in self.derived for v in read):
            self.derived.update(eqn.outvars)
        if not joins:
            self.sources.update((v, frozenset().union(*found)) for v in eqn.outvars)

    def _start(self, eqn: Any) -> None:
        """Take up the rows of what does not treat them alone, such as a kernel or an embedding."""
        for v in eqn.outvars:
            if not c.guardable(v) or len(v.aval.shape) < 3 or not jnp.issubdtype(v.aval.dtype, jnp.floating):
                continue
            if not self.length:
                self.length = self._seeded(v)
            elif max(v.aval.shape[:-1]) == self.length:
                self._seeded(v)


class Backward:
    """Equations of the backward pass that read whole values made of first rows and of rows made again.

    Args:
      forward: what the forward pass makes.
      count: how many rows it hands on.
    """

    def __init__(self, forward: Forward, count: int):
        self.forward, self.count = forward, count
        self.eqns: list[Any] = []
        self.heads: dict[Any, tuple[Any, list[Any]]] = {}  # product -> the variable of its first rows, their equation
        self.handed: dict[Any, Any] = {}  # forward variable -> what holds it whole in the backward pass
        self._full: dict[Any, Any] = {}
        self._tail: dict[Any, Any] = {}
        self._parts: dict[tuple[Any, int], Any] = {}

    def hand(self, var: Any) -> Any:
        """Return what holds a forward value in the backward pass."""
        raise NotImplementedError

    def hand_head(self, var: Any) -> Any:
        """Return what holds first rows in the backward pass."""
        return var

    def is_remade(self, var: Any) -> bool:
        """Say whether the backward pass makes a value again, from products or as it is."""
        return var in self.forward.products or var in self.forward.derived

    def full(self, var: Any) -> Any:
        """Return a forward value as the backward pass has it."""
        if isinstance(var, c.Literal):
            return var
        f = self.forward
        if not self.is_remade(var) and var not in f.fixed:
            if var not in self.handed:
                self.handed[var] = self.hand(var)
            return self.handed[var]
        if var not in self._full:
            if var in f.products:
                parts = [self.hand_head(self._head(var)), self.tail(var)]
                self._full[var] = self._emit(jax.lax.concatenate_p, parts, var.aval, var, dimension=f.axis[var])
            elif _is_root(f.maker[var]):
                self._full[var] = self._root(f.maker[var], tuple(var.aval.shape), var)
            else:
                eqn = f.maker[var]
                self._again(eqn, [self.full(v) for v in eqn.invars], eqn.params, self._full)
        return self._full[var]

    def _root(self, eqn: Any, shape: tuple[int, ...], like: Any) -> Any:
        """Make a constant in two steps: made as in the forward pass, it would be taken for one that waits for this."""
        if eqn.primitive.name == "iota":
            axis = eqn.params["dimension"]
            params = {"dtype": eqn.params["dtype"], "shape": (shape[axis],), "dimension": 0, "sharding": None}
            one = self._emit(jax.lax.iota_p, [], like.aval.update(shape=(shape[axis],)), like, **params)
            dims = (axis,)
        else:
            ones, dims = (1,) * len(shape), tuple(range(len(shape)))
            params = {"shape": ones, "broadcast_dimensions": (), "sharding": None}
            scalar = [self.full(v) for v in eqn.invars]
            one = self._emit(jax.lax.broadcast_in_dim_p, scalar, like.aval.update(shape=ones), like, **params)
        params = {"shape": shape, "broadcast_dimensions": dims, "sharding": None}
        return self._emit(jax.lax.broadcast_in_dim_p, [one], like.aval.update(shape=shape), like, **params)

    def tail(self, var: Any) -> Any:
        """Return the rows of a value that the forward pass does not hand on."""
        f = self.forward
        if var not in self._tail:
            if self.is_remade(var):
                eqn, rows = f.maker[var], f.length - self.count
                cut = _row_cuts.cut(eqn, f.axis[var], rows)
                operands = [self._rows(v, axis) for v, axis in zip(eqn.invars, cut.operands, strict=True)]
                self._again(eqn, operands, cut.params, self._tail)
            else:
                self._tail[var] = self._last(self.full(var), f.axis[var], var)
        return self._tail[var]

    def _rows(self, var: Any, axis: int | None) -> Any:
        """Return an operand for the rows that are made again: whole, or its last rows along an axis."""
        f = self.forward
        if axis is None or isinstance(var, c.Literal):
            return self.full(var)
        if f.axis.get(var) == axis:
            return self.tail(var)
        if (var, axis) not in self._parts:
            cut = _row_cuts.cut(f.maker[var], axis, f.length - self.count) if var in f.fixed else None
            if cut is None:
                self._parts[var, axis] = self._last(self.full(var), axis, var)
            else:  # of a constant as many rows as are needed; as a whole it would be taken for the forward pass's own
                shape = tuple(var.aval.shape)
                out = c.Var(var.aval.update(shape=(*shape[:axis], f.length - self.count, *shape[axis + 1 :])))
                operands = [self._rows(v, a) for v, a in zip(f.maker[var].invars, cut.operands, strict=True)]
                eqn = c.replace_eqn(f.maker[var], invars=operands, outvars=[out], params=cut.params)
                self.eqns.append(self.placed(eqn))
                self._parts[var, axis] = out
        return self._parts[var, axis]

    def _again(self, eqn: Any, operands: list[Any], params: dict[str, Any], known: dict[Any, Any]) -> None:
        """Run an operation again, on all rows or on the last ones."""
        outvars = []
        for v in eqn.outvars:
            shape = v.aval.shape
            if known is self._tail:
                axis = self.forward.axis[v]
                shape = (*shape[:axis], self.forward.length - self.count, *shape[axis + 1 :])
            outvars.append(c.DropVar(v.aval) if isinstance(v, c.DropVar) else c.Var(v.aval.update(shape=shape)))
        known.update(zip(eqn.outvars, outvars, strict=True))
        self.eqns.append(self.placed(c.replace_eqn(eqn, invars=operands, outvars=outvars, params=params)))

    def _last(self, whole: Any, axis: int, var: Any) -> Any:
        shape = tuple(var.aval.shape)
        return self._sliced(whole, axis, self.count, shape[axis], var)

    def _sliced(self, whole: Any, axis: int, start: int, stop: int, like: Any) -> Any:
        shape = tuple(whole.aval.shape)
        bounds = {"start_indices": [0] * len(shape), "limit_indices": list(shape)}
        bounds["start_indices"][axis], bounds["limit_indices"][axis] = start, stop
        params = {name: tuple(values) for name, values in bounds.items()}
        aval = whole.aval.update(shape=(*shape[:axis], stop - start, *shape[axis + 1 :]))
        return self._emit(jax.lax.slice_p, [whole], aval, like, strides=None, **params)

    def _emit(self, primitive: Any, operands: list[Any], aval: Any, like: Any, **params: Any) -> Any:
        """Add an equation with the source information of what makes a forward value."""
        eqn, out = _pairs.op(primitive, operands, aval, self.forward.maker.get(like, self.like), **params)
        self.eqns.append(self.placed(eqn))
        return out

    def placed(self, eqn: Any) -> Any:
        """Return an equation with the name stack of the backward pass, where it stands beside the forward one."""
        return eqn

    def _head(self, var: Any) -> Any:
        """Return the variable of a product's first rows, which the forward pass makes."""
        if var not in self.heads:
            axis, shape = self.forward.axis[var], tuple(var.aval.shape)
            maker, shapes = self.forward.maker[var], jax.ShapeDtypeStruct(shape, var.aval.dtype)
            first = jax.make_jaxpr(lambda x: _first(x, axis, self.count))(shapes)
            (eqn,), (head,) = _forms.emit(_forms.flat(first), [var], maker)
            self.heads[var] = head, eqn
        return self.heads[var][0]

    def read(self, eqns: Sequence[Any], mapped: dict[Any, Any]) -> None:
        """Copy the backward pass, with values in the place of those that it does not keep."""
        for eqn in eqns:
            self.like = eqn
            if any(self._is_replaced(v, mapped) for v in eqn.invars):
                self.before(eqn)
                new = [self.full(mapped[v]) if self._is_replaced(v, mapped) else v for v in eqn.invars]
                eqn = c.replace_eqn(eqn, invars=new)
            self.eqns.append(eqn)

    def with_heads(self, eqns: Sequence[Any]) -> list[Any]:
        """Return equations with those of first rows, each right after what makes the product."""
        after = {id(self.forward.maker[var]): [] for var in self.heads}
        for var, (_, eqn) in self.heads.items():
            after[id(self.forward.maker[var])].append(eqn)
        return [new for eqn in eqns for new in (eqn, *after.get(id(eqn), ()))]

    def before(self, eqn: Any) -> None:
        """Prepare for the values that an equation of the backward pass reads."""

    def _is_replaced(self, var: Any, mapped: dict[Any, Any]) -> bool:
        return not isinstance(var, c.Literal) and var in mapped and self.is_remade(mapped[var])


def _is_root(eqn: Any) -> bool:
    """Say whether an operation makes an array of several axes of nothing, or of one number."""
    if len(eqn.outvars[0].aval.shape) < 2 or any(v.aval.shape for v in eqn.invars):
        return False
    return eqn.primitive.name == "iota" or (eqn.primitive.name == "broadcast_in_dim" and len(eqn.invars) == 1)


def _first(x: Any, axis: int, count: int) -> Any:
    with jax.named_scope(_scopes.ROWS):
        return jax.lax.slice_in_dim(x, 0, count, axis=axis)
