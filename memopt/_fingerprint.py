"""The seal: one digest for the structure of a jaxpr, equal in every process that traces the same step.

In: a jaxpr. Out: a hexadecimal digest over primitives, parameters, types and the wiring of variables, bodies included.
Source lines, names and object addresses are left out, so that moving code does not void a saved plan.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from memopt import _compat as c

_ADDRESS = re.compile(r"0x[0-9a-f]+|id=\d+")


def jaxpr_digest(closed: Any) -> str:
    """Return the digest of a closed or open jaxpr."""
    return _digest(closed, {})


def _digest(jaxpr: Any, cache: dict[int, str]) -> str:
    if id(jaxpr) in cache:
        return cache[id(jaxpr)]
    base = c.open_jaxpr(jaxpr)
    sha = hashlib.sha256()
    number: dict[Any, int] = {}
    for var in (*base.constvars, *base.invars):
        number[var] = len(number)
        sha.update(str(var.aval).encode())
    for eqn in base.eqns:
        sha.update(eqn.primitive.name.encode())
        sha.update(_atoms(eqn.invars, number))
        for key in sorted(eqn.params):
            sha.update(f"{key}={_text(eqn.params[key], cache)};".encode())
        for var in eqn.outvars:
            number[var] = len(number)
            sha.update(str(var.aval).encode())
    sha.update(_atoms(base.outvars, number))
    cache[id(jaxpr)] = sha.hexdigest()[:32]
    return cache[id(jaxpr)]


def _atoms(atoms: Any, number: dict[Any, int]) -> bytes:
    return ",".join(repr(v.val) if isinstance(v, c.Literal) else str(number[v]) for v in atoms).encode()


def _text(value: Any, cache: dict[int, str]) -> str:
    if c.is_jaxpr(value):
        return _digest(value, cache)
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_text(v, cache) for v in value) + ")"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return _ADDRESS.sub("", repr(value))
