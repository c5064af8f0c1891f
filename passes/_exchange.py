"""The walk through a step that exchanges patterns for calls: every level, every pair of loops, every body.

In: a flat jaxpr. Out: the jaxpr after a `space` method has looked at each level and each pair, with rows and sentences
for the plan. What is looked for, and what takes its place, is decided by who inherits.
"""

from __future__ import annotations

from typing import Any

from memopt import _compat as c
from memopt import _pairs
from memopt._contract import Left
from memopt._plan import Decision
from memopt.passes._match import Node


class Walk:
    """One rewrite of a step: what it did so far, for the plan."""

    def __init__(self):
        self.rows: list[Decision] = []
        self.left: list[Left] = []
        self.seen: set[Any] = set()  # near misses that are listed already

    def space(self, jaxpr: Any, pair: tuple[int, int] | None, quiet: bool) -> Any:
        """Return a level with the exchanges made in it, or in a pair of its loops; `quiet`: near misses are known."""
        raise NotImplementedError

    def swept(self, jaxpr: Any) -> Any:
        """Return a level as it is to be looked at after its pairs: by default as it is."""
        return jaxpr

    def level(self, jaxpr: Any, quiet: bool = False) -> Any:
        """Return a level rewritten: its own operations, its pairs of loops, then the bodies inside."""
        jaxpr = self.space(jaxpr, None, quiet)
        paired: set[Any] = set()  # results of loops that were looked at in pairs
        for index in range(len(jaxpr.eqns)):
            pair = _pairs.find(jaxpr, index)
            if pair is not None and len(pair.readers) == 1:
                jaxpr = self.space(jaxpr, (index, pair.readers[0]), quiet)
                paired.update(v for i in (index, pair.readers[0]) for v in jaxpr.eqns[i].outvars)
        jaxpr = self.swept(jaxpr) if paired else jaxpr
        eqns = [self._bodies(eqn, quiet or any(v in paired for v in eqn.outvars)) for eqn in jaxpr.eqns]
        changed = any(a is not b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        return c.rebuild(jaxpr, eqns=eqns) if changed else jaxpr

    def _bodies(self, eqn: Any, quiet: bool) -> Any:
        if eqn.primitive.name not in ("scan", "cond", "while"):
            return eqn
        params = dict(eqn.params)
        for key, position, body in c.subjaxprs(eqn.params):
            inner = self.level(c.open_jaxpr(body), quiet)
            if inner is c.open_jaxpr(body):
                continue
            new = c.close(inner, c.jaxpr_consts(body))
            if position is None:
                params[key] = new
            else:
                items = list(params[key])
                items[position] = new
                params[key] = type(eqn.params[key])(items)
        same = all(params[key] is eqn.params[key] for key in params)
        return eqn if same else c.replace_eqn(eqn, params=params)

    def leave(self, node: Node, why: str, quiet: bool, what: str = "attention") -> None:
        """Note the reason against a near miss, once."""
        key = (c.user_source(node.eqn), why)
        if not quiet and key not in self.seen:
            self.seen.add(key)
            self.left.append(Left(f"{what} at {key[0] or c.name_stack(node.eqn) or 'an unnamed place'}", why))
