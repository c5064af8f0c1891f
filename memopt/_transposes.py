"""The mirror: matmuls give their results as they are read, not transposed first.

In: a flat closed jaxpr. Out: an equal one, in which a transpose of a transpose is one transpose or none, and a
transpose that exchanges the two sides of a `dot_general` is the `dot_general` of its operands exchanged. JAX writes the
gradient of every weight as a product and a transpose. XLA folds that transpose into the layout of what follows, and may
then copy parameters and moments of the largest matrices into that layout and back. The products and their sums are the
same.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

from memopt import _compat as c


def fold(closed: Any) -> Any:
    """Return an equal closed jaxpr with transposes of transposes and of matmuls folded, in nested bodies too."""
    base = c.open_jaxpr(closed)
    folder = _Folder(base)
    for eqn in base.eqns:
        folder.add(c.map_bodies(eqn, fold))
    if not folder.changed and all(a is b for a, b in zip(folder.eqns, base.eqns, strict=True)):
        return closed
    jaxpr = c.rebuild(base, eqns=folder.live(), outvars=folder.read(base.outvars))
    return c.close(jaxpr, c.jaxpr_consts(closed)) if isinstance(closed, c.ClosedJaxpr) else jaxpr


class _Folder:
    """The equations so far, with what makes each value, and what it is another name of."""

    def __init__(self, base: Any):
        self.eqns: list[Any] = []
        self.changed = False
        self._makers: dict[Any, Any] = {}
        self._renamed: dict[Any, Any] = {}
        self._uses = Counter(v for e in base.eqns for v in e.invars if not isinstance(v, c.Literal))
        self._uses.update(v for v in base.outvars if not isinstance(v, c.Literal))
        self._folded: set[Any] = set()  # results that nobody reads any more

    def read(self, atoms: Any) -> list[Any]:
        return [v if isinstance(v, c.Literal) else self._renamed.get(v, v) for v in atoms]

    def add(self, eqn: Any) -> None:
        invars = self.read(eqn.invars)
        if any(a is not b for a, b in zip(invars, eqn.invars, strict=True)):
            eqn = c.replace_eqn(eqn, invars=invars)
        if eqn.primitive.name == "transpose":
            eqn = self._merged(eqn)
            if eqn is None:
                return
            eqn = self._exchanged(eqn)
        self.eqns.append(eqn)
        self._makers.update(dict.fromkeys(eqn.outvars, eqn))

    def live(self) -> list[Any]:
        return [e for e in self.eqns if len(e.outvars) != 1 or e.outvars[0] not in self._folded]

    def _merged(self, eqn: Any) -> Any | None:
        """Return a transpose of a transpose as one; None where it is none, and its result another name."""
        inner = self._makers.get(eqn.invars[0])
        if inner is None or inner.primitive.name != "transpose":
            return eqn
        permutation = tuple(inner.params["permutation"][d] for d in eqn.params["permutation"])
        source = inner.invars[0]
        self._give_up(inner.outvars[0], source)
        if permutation == tuple(range(len(permutation))) and source.aval == eqn.outvars[0].aval:
            self._renamed[eqn.outvars[0]] = source
            self._uses[source] += self._uses[eqn.outvars[0]] - 1
            return None
        return c.replace_eqn(eqn, invars=[source], params={**eqn.params, "permutation": permutation})

    def _give_up(self, value: Any, source: Any) -> None:
        """Let one reader of a value read its source instead."""
        self.changed = True
        self._uses[source] += 1
        self._uses[value] -= 1
        if not self._uses[value]:
            self._folded.add(value)
            self._uses[source] -= 1

    def _exchanged(self, eqn: Any) -> Any:
        """Return the matmul with its operands exchanged, where that is what the transpose makes of it."""
        dot = self._makers.get(eqn.invars[0])
        if dot is None or dot.primitive.name != "dot_general" or self._uses[dot.outvars[0]] != 1:
            return eqn
        if dot.params.get("out_sharding") is not None or tuple(eqn.params["permutation"]) != _exchange(dot):
            return eqn
        if isinstance(dot.params.get("precision"), jax.lax.DotAlgorithm):
            return eqn  # it may say different things of the two sides
        (contract, other_contract), (batch, other_batch) = dot.params["dimension_numbers"]
        numbers = ((other_contract, contract), (other_batch, batch))
        self._folded.add(dot.outvars[0])
        self.changed = True
        params = {**dot.params, "dimension_numbers": numbers, "precision": _swapped(dot.params.get("precision"))}
        return c.replace_eqn(dot, invars=dot.invars[::-1], outvars=eqn.outvars, params=params)


def _exchange(dot: Any) -> tuple[int, ...]:
    """Return the permutation of a matmul's result that exchanges what comes from its left and its right side."""
    (contract, other_contract), (batch, _) = dot.params["dimension_numbers"]
    both = len(batch)
    left = dot.invars[0].aval.ndim - len(contract) - both
    right = dot.invars[1].aval.ndim - len(other_contract) - both
    return (*range(both), *range(both + left, both + left + right), *range(both, both + left))


def _swapped(precision: Any) -> Any:
    return precision[::-1] if isinstance(precision, tuple) and len(precision) == 2 else precision
