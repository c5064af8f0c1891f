"""The seal: what a plan was made for, equal in every process that traces the same step.

In: a jaxpr, a graph, settings. Out: a fingerprint, one text for each thing that has to be equal, and the sentence that
says what differs between two. The digest of a jaxpr goes over primitives, parameters, types and the wiring of
variables, bodies included; source lines, names and object addresses are left out, so that moving code does not void a
saved plan.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from memopt import _compat as c

_ADDRESS = re.compile(r"0x[0-9a-f]+|id=\d+")


def fingerprint(closed: Any, target: Any, passes: Any, local: Any = None) -> dict[str, str]:
    """Return what identifies a step for a saved plan: JAX's version, target, passes, arguments, the jaxpr's structure.

    Of a sharded step (`local`) also the mesh and how the arguments are split.
    """
    import jax

    found = {
        "jax version": jax.__version__,
        "target": str(target),
        "passes": ", ".join(sorted(map(repr, passes))),
        "arguments": arguments(closed),
        "jaxpr": jaxpr_digest(closed),
    }
    if local is not None:
        found["shardings"] = local.describe(closed)
    return found


def arguments(closed: Any) -> str:
    """Return the types of a step's arguments in one text."""
    return "; ".join(str(aval) for aval in closed.in_avals)


def arguments_in(text: str) -> list[str]:
    """Return the single types in a text of `arguments`."""
    return text.split("; ") if text else []


def difference(saved: Mapping[str, str], asked: Mapping[str, str]) -> str:
    """Say in words what of a saved fingerprint is not as asked for; an empty text where nothing is."""
    for field, value in asked.items():
        was = saved.get(field)
        if was == value:
            continue
        if was is None:
            return f"it does not hold its {field}, so an older memopt wrote it"
        if field == "arguments":
            return _between_arguments(arguments_in(was), arguments_in(value))
        if field == "graph":
            return f"memopt numbered its operations in another way (its {field} is {was}, and this one's is {value})"
        return f"its {field} is {was}, and this one's is {value}"
    return ""


def _between_arguments(was: list[str], now: list[str]) -> str:
    if len(was) != len(now):
        return f"its arguments are {len(was)} arrays, and this one's are {len(now)}"
    i = next(i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b)
    return f"its arguments differ: number {i} of them is {was[i]}, and this one's is {now[i]}"


def graph_digest(graph: Any) -> str:
    """Return a text for how a graph numbers operations, values and time segments: a plan holds such numbers."""
    sha = hashlib.sha256()
    for op in graph.ops:
        sha.update(f"{op.eqn.primitive.name},{op.region},{op.bin},{op.inputs},{op.outputs};".encode())
    return f"{len(graph.ops)} operations, {sha.hexdigest()[:32]}"


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
