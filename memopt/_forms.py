"""The wardrobe: the operations that put a value into another form, and back.

In: a `Store` and the value's type. Out: its `encode` and `decode` as equations without calls, traced once for each type,
and copies of them over given variables. It places nothing and chooses nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from memopt import _compat as c
from memopt import _inline, _pairs
from memopt._contract import Store


def encode(store: Store, var: Any, like: Any, eqns: list[Any]) -> list[Any]:
    """Emit the encoding of a variable, with the source information of another equation; return its leaves."""
    return _emit(_traced(store, var.aval)[0], [var], like, eqns)


def decode(store: Store, aval: Any, leaves: Sequence[Any], like: Any, eqns: list[Any]) -> Any:
    """Emit the decoding of the leaves into a value of this type; return its variable."""
    (out,) = _emit(_traced(store, aval)[1], leaves, like, eqns)
    if isinstance(out, c.Literal) or bool(getattr(out.aval, "weak_type", False)) != aval.weak_type:
        params = {"new_dtype": aval.dtype, "weak_type": aval.weak_type, "sharding": None}
        eqn, out = _pairs.op(jax.lax.convert_element_type_p, [out], aval, like, **params)
        eqns.append(eqn)
    return out


def problem(aval: Any) -> str | None:
    """Say why values of this type cannot be kept in another form; None where they can."""
    if type(aval) is not c.ShapedArray or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return "it is no plain array"
    return "it differs between the devices of a `shard_map`" if c.vma(aval) else None


def _traced(store: Store, aval: Any) -> tuple[Any, Any]:
    return _trace(store.encode, store.decode, store.name, tuple(aval.shape), np.dtype(aval.dtype))


@functools.lru_cache(maxsize=1024)
def _trace(
    encode: Callable[[Any], Any], decode: Callable[[Any], Any], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[Any, Any]:
    """Return both functions as inlined closed jaxprs over leaves."""
    value = jax.ShapeDtypeStruct(shape, dtype)
    made, form = jax.make_jaxpr(encode, return_shape=True)(value)
    leaves, tree = jax.tree_util.tree_flatten(form)
    back = jax.make_jaxpr(lambda *xs: decode(jax.tree_util.tree_unflatten(tree, xs)))(*leaves)
    found = [(tuple(a.shape), np.dtype(a.dtype)) for a in back.out_avals]
    if found != [(shape, dtype)]:
        text = ", ".join(f"{d}{list(s)}" for s, d in found) or "nothing"
        raise ValueError(f"The form {name!r} decodes {dtype}{list(shape)} to {text}: it must give the same type back.")
    if made.effects or back.effects:
        raise ValueError(f"The form {name!r} has effects: encode and decode must be pure functions of arrays.")
    return _inline.inline(made), _inline.inline(back)


def _emit(closed: Any, operands: Sequence[Any], like: Any, eqns: list[Any]) -> list[Any]:
    """Append the equations of a jaxpr over these operands, all variables fresh; return what it returns.

    Constants become literals, so that the equations can stand in any body.
    """
    jaxpr = _pairs.fresh(c.open_jaxpr(closed))
    consts = [c.Literal(np.asarray(x), v.aval) for v, x in zip(jaxpr.constvars, c.jaxpr_consts(closed), strict=True)]
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))
    for eqn in jaxpr.eqns:
        new = c.replace_eqn(eqn, invars=[_read(env, v) for v in eqn.invars])
        eqns.append(new.replace(source_info=like.source_info))
    return [_read(env, v) for v in jaxpr.outvars]


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return atom if isinstance(atom, c.Literal) else env.get(atom, atom)
