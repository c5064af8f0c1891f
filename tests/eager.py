"""Evaluate a jaxpr one primitive at a time: in come a closed jaxpr and leaves, out go its results.

XLA spends a second on a small training step; here loops, branches and calls run in Python, so all that is compiled is
single primitives at few shapes, kept from program to program. It is the meaning of the jaxpr with nothing reordered:
recomputation is bitwise the same. Effects run as often as the program says. Nothing here knows of planners or of
memopt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

MOST_TRIPS = 10_000


def evaluate(closed: Any, *args: Any) -> list[Any]:
    """Return the results of a jaxpr (closed, or open without constants)."""
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    variables = [*jaxpr.constvars, *jaxpr.invars]
    env = {v: _array(x, v.aval) for v, x in zip(variables, [*consts, *args], strict=True)}
    for eqn in jaxpr.eqns:
        values = [_literal(v) if isinstance(v, jex.Literal) else env[v] for v in eqn.invars]
        run = RULES.get(eqn.primitive.name, _bind)
        env.update(zip(eqn.outvars, run(eqn, values), strict=True))
    return [_literal(v) if isinstance(v, jex.Literal) else env[v] for v in jaxpr.outvars]


def _literal(literal: Any) -> np.ndarray:
    return np.asarray(literal.val, dtype=literal.aval.dtype)


def _array(x: Any, aval: Any) -> Any:
    return np.asarray(x, dtype=aval.dtype) if isinstance(x, bool | int | float) else x


def _bind(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    out = eqn.primitive.bind(*values, **eqn.params)
    return out if eqn.primitive.multiple_results else [out]


def _call(eqn: Any, values: Sequence[Any]) -> list[Any]:
    body = eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["jaxpr"]
    return evaluate(body, *values)


def _cond(eqn: Any, values: Sequence[Any]) -> list[Any]:
    branches = eqn.params["branches"]
    return evaluate(branches[int(np.clip(int(values[0]), 0, len(branches) - 1))], *values[1:])


def _while(eqn: Any, values: Sequence[Any]) -> list[Any]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body, carry = values[:first], values[first : first + second], list(values[first + second :])
    for _ in range(MOST_TRIPS):
        if not bool(evaluate(eqn.params["cond_jaxpr"], *test, *carry)[0]):
            return carry
        carry = evaluate(eqn.params["body_jaxpr"], *body, *carry)
    raise RuntimeError(f"a while loop ran {MOST_TRIPS} times")


def scan_layout(eqn: Any) -> tuple[int, int]:
    """Return how many constants and carries a scan has: counts up to JAX 0.11, flat trees from 0.12 on."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def _scan(eqn: Any, values: Sequence[Any]) -> list[Any]:
    length, (n_consts, n_carry) = eqn.params["length"], scan_layout(eqn)
    consts, carry, xs = values[:n_consts], list(values[n_consts : n_consts + n_carry]), values[n_consts + n_carry :]
    order = range(length)[::-1] if eqn.params["reverse"] else range(length)
    xs, rows = [_rows(x) for x in xs], {}
    for i in order:
        out = evaluate(eqn.params["jaxpr"], *consts, *carry, *[row(i) for row in xs])
        carry, rows[i] = out[:n_carry], out[n_carry:]
    stacks = [_stack([rows[i][k] for i in range(length)], v.aval) for k, v in enumerate(eqn.outvars[n_carry:])]
    return [*carry, *stacks]


def _rows(x: Any) -> Callable[[int], Any]:
    if _is_key(x):
        data, kind = np.asarray(jax.random.key_data(x)), jax.random.key_impl(x)
        return lambda i: jax.random.wrap_key_data(data[i], impl=kind)
    data = np.asarray(x)
    return lambda i: data[i, ...]


def _stack(rows: list[Any], aval: Any) -> Any:
    if not rows:
        return jnp.zeros(aval.shape, aval.dtype)  # also of keys
    return jnp.stack(rows) if _is_key(rows[0]) else np.stack([np.asarray(r) for r in rows])


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _numpy(function: Callable[..., Any]) -> Callable[[Any, Sequence[Any]], Sequence[Any]]:
    return lambda eqn, values: _in_numpy(function, eqn, values)


def _in_numpy(function: Callable[..., Any], eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    aval = eqn.outvars[0].aval
    if any(_is_key(v) for v in values) or jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return _bind(eqn, values)
    with np.errstate(all="ignore"):
        out = function(eqn.params, *map(np.asarray, values))
    return [np.asarray(out).astype(aval.dtype, copy=False).reshape(aval.shape)]


def _broadcast(params: dict[str, Any], x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for here, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[here] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _slice(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    steps = params["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]


def _select(params: dict[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.where(which, cases[1], cases[0]) if len(cases) == 2 else np.choose(which, cases)


def _dot(params: dict[str, Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first, second = [next(letters) for _ in a.shape], [next(letters) for _ in b.shape]
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        second[j] = first[i]
    batch = [first[i] for i in left_batch]
    free = [x for i, x in enumerate(first) if i not in (*left, *left_batch)]
    free += [x for i, x in enumerate(second) if i not in (*right, *right_batch)]
    spec = f"{''.join(first)},{''.join(second)}->{''.join(batch + free)}"
    wide = np.result_type(a.dtype, np.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
    return np.einsum(spec, a.astype(wide), b.astype(wide))


def _pad(params: dict[str, Any], x: np.ndarray, fill: np.ndarray) -> np.ndarray:
    for axis, (low, high, inner) in enumerate(params["padding_config"]):
        wide = x.shape[axis] + inner * max(x.shape[axis] - 1, 0)
        shape = [*x.shape]
        shape[axis] = max(low, 0) + wide + max(high, 0)
        out, place = np.full(shape, fill, x.dtype), [slice(None)] * x.ndim
        place[axis] = slice(max(low, 0), max(low, 0) + wide, inner + 1)
        out[tuple(place)] = x
        place[axis] = slice(max(-low, 0), shape[axis] - max(-high, 0))
        x = out[tuple(place)]
    return x


def _iota(params: dict[str, Any], *_: np.ndarray) -> np.ndarray:
    sizes = [1] * len(params["shape"])
    sizes[params["dimension"]] = -1
    line = np.arange(params["shape"][params["dimension"]]).reshape(sizes)
    return np.broadcast_to(line, params["shape"])


def _split(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    if _is_key(values[0]):
        return _bind(eqn, values)
    return np.split(np.asarray(values[0]), np.cumsum(eqn.params["sizes"])[:-1], axis=eqn.params["axis"])


def _cumsum(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    flipped = np.flip(x, params["axis"]) if params["reverse"] else x
    out = np.cumsum(flipped, axis=params["axis"], dtype=x.dtype)
    return np.flip(out, params["axis"]) if params["reverse"] else out


def _floats(function: Callable[..., Any]) -> Callable[[Any, Sequence[Any]], Sequence[Any]]:
    """As ``_numpy``, for floats alone: NumPy divides and raises integers otherwise than XLA."""

    def run(eqn, values):
        real = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
        return _in_numpy(function, eqn, values) if real else _bind(eqn, values)

    return run


def _convert(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    kinds = [jnp.issubdtype(v.aval.dtype, jnp.integer) or v.aval.dtype == bool for v in (*eqn.invars, *eqn.outvars)]
    return _bind(eqn, values) if kinds == [False, True] else _in_numpy(lambda _, x: x, eqn, values)


def _argmax(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return np.argmax(x, axis=params["axes"][0])


RULES: dict[str, Callable[[Any, Sequence[Any]], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "eval_jaxpr": _call,
    "core_call": _call,
    "checkpoint": _call,
    "remat2": _call,
    "remat": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "custom_vjp_call_jaxpr": _call,
    **{
        name: _numpy(lambda _, *xs, f=f: f(*xs))
        for name, f in {
            "add": np.add,
            "add_any": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "neg": np.negative,
            "sin": np.sin,
            "cos": np.cos,
            "exp": np.exp,
            "tanh": np.tanh,
            "sqrt": np.sqrt,
            "square": np.square,
            "gt": np.greater,
            "lt": np.less,
            "ge": np.greater_equal,
            "le": np.less_equal,
            "eq": np.equal,
            "ne": np.not_equal,
            "stop_gradient": np.asarray,
            "copy": np.asarray,
            "max": np.maximum,
            "min": np.minimum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": np.invert,
            "abs": np.abs,
            "sign": np.sign,
            "floor": np.floor,
            "is_finite": np.isfinite,
        }.items()
    },
    **{
        name: _floats(lambda _, *xs, f=f: f(*xs))
        for name, f in {
            "div": np.divide,
            "log": np.log,
            "log1p": np.log1p,
            "expm1": np.expm1,
            "rem": np.fmod,
            "pow": np.power,
            "rsqrt": lambda x: 1 / np.sqrt(x),
            "logistic": lambda x: 1 / (1 + np.exp(-x)),
        }.items()
    },
    "integer_pow": _floats(lambda params, x: x ** params["y"]),
    "dot_general": _numpy(_dot),
    "pad": _numpy(_pad),
    "iota": _numpy(_iota),
    "cumsum": _numpy(_cumsum),
    "argmax": _numpy(_argmax),
    "split": _split,
    "convert_element_type": _convert,
    "rev": _numpy(lambda params, x: np.flip(x, params["dimensions"])),
    "expand_dims": _numpy(lambda _, x: x),
    "reduce_max": _numpy(lambda params, x: np.max(x, axis=params["axes"])),
    "clamp": _numpy(lambda _, low, x, high: np.clip(x, low, high)),
    "broadcast_in_dim": _numpy(_broadcast),
    "slice": _numpy(_slice),
    "select_n": _numpy(_select),
    "reshape": _numpy(lambda _, x, *sizes: x),
    "squeeze": _numpy(lambda _, x: x),
    "transpose": _numpy(lambda params, x: np.transpose(x, params["permutation"])),
    "reduce_sum": _numpy(lambda params, x: np.sum(x, axis=params["axes"])),
    "concatenate": _numpy(lambda params, *xs: np.concatenate(xs, axis=params["dimension"])),
}
"""What runs in Python or NumPy, which needs no compilation; everything else is bound as it stands."""
