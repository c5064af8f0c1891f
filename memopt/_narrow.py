"""The narrow door: what reads a few elements of a widened array reads them before it is widened.

In: an inlined closed jaxpr. Out: an equal one in which a `gather`, `slice` or `dynamic_slice` of
`convert_element_type(x)` is the cast of the same read of `x`, where the cast widens. A cast goes element by element, so
no result changes. It matters because XLA fuses a cast into every reader but these: a cross-entropy that gathers its
labels' logits in float32 makes it hold all logits in float32 beside the bfloat16 ones. Everything else stays as it is.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from memopt import _compat as c

_READS = frozenset({"gather", "slice", "dynamic_slice"})


def narrow(closed: Any) -> Any:
    """Return an equal closed jaxpr whose reads of widened arrays come before the cast, in nested bodies too."""
    base = c.open_jaxpr(closed)
    eqns, changed = _narrowed(base)
    if not changed:
        return closed
    jaxpr = c.rebuild(base, eqns=eqns)
    return c.close(jaxpr, c.jaxpr_consts(closed)) if isinstance(closed, c.ClosedJaxpr) else jaxpr


def _narrowed(base: Any) -> tuple[list[Any], bool]:
    casts: dict[Any, Any] = {}
    out: list[Any] = []
    changed = False
    for eqn in base.eqns:
        inside = c.map_bodies(eqn, narrow)
        eqn, changed = inside, changed or inside is not eqn
        name = eqn.primitive.name
        if name == "convert_element_type" and _widens(eqn):
            casts[eqn.outvars[0]] = eqn
        elif name in _READS and eqn.invars[0] in casts and _fills_alike(eqn):
            out += _moved(eqn, casts[eqn.invars[0]])
            changed = True
            continue
        out.append(eqn)
    return out, changed


def _widens(eqn: Any) -> bool:
    """Whether a cast is from a narrower floating dtype to a wider one, and says nothing of shardings."""
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if isinstance(eqn.invars[0], c.Literal) or eqn.params.get("sharding") is not None:
        return False
    return jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating) and old.itemsize < new.itemsize


def _fills_alike(eqn: Any) -> bool:
    """Whether what lies out of bounds reads the same in both dtypes: NaN, the default, does."""
    fill = eqn.params.get("fill_value")
    return fill is None or fill != fill


def _moved(read: Any, cast: Any) -> list[Any]:
    """Return the read of what the cast casts, and the cast of what was read."""
    source, (result,) = cast.invars[0], read.outvars
    early = c.Var(result.aval.update(dtype=source.aval.dtype, weak_type=source.aval.weak_type))
    return [
        c.replace_eqn(read, invars=[source, *read.invars[1:]], outvars=[early]),
        c.replace_eqn(cast, invars=[early], outvars=[result]),
    ]
