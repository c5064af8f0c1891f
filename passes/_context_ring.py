"""Attention over a sequence that is split over devices: what one device does, around a ring or after an all-to-all.

In: the parts of q, k and v that one device of a `shard_map` holds, and the settings of the whole attention. Out: its
part of the result and of the log-sum-exp, or of the gradients. Blocks are computed by the pure-JAX form of the kernels;
partial results are merged exactly. It knows no jaxpr, and no mesh but the axis that it stands in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memopt.pallas_kernels.attention import lean
from memopt.pallas_kernels.attention.spec import Extras, Spec

Axis = tuple[str, ...]


class Round(NamedTuple):
    """A run of rounds that are alike: devices see keys of earlier devices (`past`), or of later ones (`future`).

    `first` is the round's number, which is also the distance of the keys; `count` how many there are; `hops` how far
    keys move after each, 0 after the last. Settings are None where every pair is hidden.
    """

    first: int
    count: int
    past: Spec | None
    future: Spec | None
    hops: int


# The ring.


def ring_forward(
    spec: Spec, axis: Axis, ways: int, place: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[Any, Any]:
    """Compute one device's rows of an attention, the keys and values of the others passing by.

    Memory: a device holds its own parts, and keys and values of one more device. Sent: keys and values, once for each
    other device that is seen.

    Args:
        spec: the settings of the whole attention.
        axis, ways: mesh axes along which the sequence is split, and the devices along them.
        place: int32 `[1]`, the device's own number along them; an operand, so that the work has no effect that would
            keep it from being run again.
        q, k, v: the device's parts, `[batch, length / ways, heads, dim]`, in the order of the axis.

    Returns:
        Its part of the output and of the log-sum-exp, as `lean.forward` returns them.

    Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
    """
    merged = _forward(spec, q, k, v)
    held = (k, v)

    def turn(state: Any, distance: Any, rounds: Round) -> Any:
        merged, held = state
        onward = _move(held, axis, ways, rounds.hops)
        attend = [None if s is None else lambda m, s=s: _merge(m, _forward(s, q, *held)) for s in rounds[2:4]]
        return _either(place[0] >= distance, attend, merged), onward

    first, rest = _rounds(spec, ways, q.shape[1])
    state = merged, _move(held, axis, ways, first.hops)
    for rounds in rest:
        state = _repeat(turn, state, rounds)
    out, lse = state[0]
    return out.astype(q.dtype), lse


def ring_backward(
    spec: Spec, axis: Axis, ways: int, place: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cotangent: Any
) -> tuple[Any, Any, Any]:
    """Compute one device's part of the gradients; those of keys and values travel with them, and then home.

    Args:
        spec, axis, ways, place, q, k, v: as in `ring_forward`.
        out, lse: what it returned.
        cotangent: of the output.

    Returns:
        Gradients shaped and typed like q, k and v.
    """

    def gradients(spec: Spec, held: Any) -> Any:
        return lean.backward(spec, q, *held, None, Extras(), out, lse, cotangent, wide=True)

    def add(spec: Spec, state: Any) -> Any:
        held, sums = state
        return jax.tree.map(jnp.add, sums, gradients(spec, held))

    def turn(state: Any, distance: Any, rounds: Round) -> Any:
        held, (dq, *home) = state
        onward = _move(held, axis, ways, rounds.hops)
        some = [None if s is None else lambda x, s=s: add(s, (held, x)) for s in rounds[2:4]]
        dq, *home = _either(place[0] >= distance, some, (dq, *home))
        return onward, (dq, *_move(tuple(home), axis, ways, rounds.hops))

    first, rest = _rounds(spec, ways, q.shape[1])
    dq, *home = gradients(spec, (k, v))
    state = _move((k, v), axis, ways, first.hops), (dq, *_move(tuple(home), axis, ways, first.hops))
    for rounds in rest:
        state = _repeat(turn, state, rounds)
    dq, *home = state[1]
    last = rest[-1].first + rest[-1].count - 1 if rest else 0
    dk, dv = _move(tuple(home), axis, ways, (ways - last) % ways)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _rounds(spec: Spec, ways: int, length: int) -> tuple[Round, list[Round]]:
    """Return the round with a device's own keys, and the later ones in which any device sees any pair, in runs."""
    seen = []
    for t in range(1, ways):
        past, future = (_shifted(spec, by * length, length) for by in (t, t - ways))
        if past is not None or future is not None:
            seen.append((t, past, future))
    hops = [b - a for a, b in zip([0, *(t for t, *_ in seen)], [t for t, *_ in seen], strict=False)] + [0]
    runs: list[Round] = []
    for (t, past, future), after in zip(seen, hops[1:], strict=True):
        before = runs[-1] if runs else None
        if before is not None and before[2:] == (past, future, after) and after == 1:
            runs[-1] = before._replace(count=before.count + 1)
        else:
            runs.append(Round(t, 1, past, future, after))
    return Round(0, 1, spec, spec, hops[0]), runs


def _shifted(spec: Spec, by: int, length: int) -> Spec | None:
    """Return settings for keys that lie `by` before the queries: None where all pairs are hidden, no bound where none.

    Both are blocks of one length.
    """
    right = spec.offset + by if spec.causal else None
    bounds = [(None, right)] if spec.causal else []
    if spec.window is not None:
        left, ahead = spec.window
        bounds.append((None if left is None else left - by, None if ahead is None else ahead + by))
    sides = [side for bound in bounds for side in bound if side is not None]
    if any(side <= -length for side in sides):
        return None
    kept = [tuple(None if s is None or s >= length - 1 else s for s in bound) for bound in bounds]
    lefts, rights = ([b[i] for b in kept if b[i] is not None] for i in (0, 1))
    window = (min(lefts, default=None), None) if lefts else None
    return dataclasses.replace(spec, causal=bool(rights), offset=min(rights, default=0), window=window)


def _repeat(turn: Callable[[Any, Any, Round], Any], state: Any, rounds: Round) -> Any:
    """Run a round, or a run of them as a loop."""
    if rounds.count == 1:
        return turn(state, jnp.int32(rounds.first), rounds)
    numbers = jnp.arange(rounds.first, rounds.first + rounds.count, dtype=jnp.int32)
    return lax.scan(lambda state, distance: (turn(state, distance, rounds), None), state, numbers)[0]


def _either(earlier: Any, work: Sequence[Callable | None], state: Any) -> Any:
    """Do the work for keys of an earlier device, or for those of a later one."""
    past, future = (one or (lambda state: state) for one in work)
    return lax.cond(earlier, past, future, state)


def _move(arrays: Any, axis: Axis, ways: int, hops: int) -> Any:
    """Send arrays to the device that is `hops` further along the ring."""
    if not hops:
        return arrays
    pairs = [(i, (i + hops) % ways) for i in range(ways)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), arrays)


def _forward(spec: Spec, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    return lean.forward(spec, q, k, v, None, Extras(), wide=True)


def _merge(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    """Merge two attentions of the same rows over different keys.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    (out_1, lse_1), (out_2, lse_2) = one, other
    top = jnp.maximum(lse_1[:, :, 0], lse_2[:, :, 0])
    sums = [
        jnp.exp(lse[:, :, 0] - top) * jnp.where(jnp.isinf(lse[:, :, 1]), 0, jnp.exp(lse[:, :, 1]))
        for lse in (lse_1, lse_2)
    ]
    total = sums[0] + sums[1]
    empty = total == 0
    total = jnp.where(empty, 1, total)
    shares = [(s / total).swapaxes(1, 2)[..., None] for s in sums]
    rest = jnp.where(empty, jnp.inf, jnp.log(total))
    return out_1 * shares[0] + out_2 * shares[1], jnp.stack([top, rest], axis=2)


# The all-to-all.


def ulysses_forward(spec: Spec, axis: Axis, ways: int, place: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """Compute one device's rows of an attention, by way of all rows of some heads.

    Memory: a device holds the whole sequence of `heads / ways` heads. Sent: q, k, v and the output, once each. Where
    there are fewer key heads than devices, they are repeated first.

    Args and returns: as in `ring_forward`.

    Source: Jacobs et al. 2023, "DeepSpeed Ulysses".
    """
    q, k, v = (_to_heads(x, axis, ways) for x in (q, k, v))
    out, lse = lean.forward(spec, q, k, v, None, Extras())
    return _to_rows(out, axis), lax.all_to_all(lse, axis, 3, 1, tiled=True)


def ulysses_backward(
    spec: Spec, axis: Axis, ways: int, place: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cotangent: Any
) -> tuple[Any, Any, Any]:
    """Compute one device's part of the gradients; arguments and results as in `ring_backward`."""
    heads = [_to_heads(x, axis, ways) for x in (q, k, v)]
    out, cotangent = _to_heads(out, axis, ways), _to_heads(cotangent, axis, ways)
    lse = lax.all_to_all(lse, axis, 1, 3, tiled=True)
    grads = lean.backward(spec, *heads, None, Extras(), out, lse, cotangent)
    found = [_to_rows(g, axis) for g in grads]
    return tuple(_unrepeated(g, x) for g, x in zip(found, (q, k, v), strict=True))


def _to_heads(x: Any, axis: Axis, ways: int) -> Any:
    heads = x.shape[2]
    x = jnp.repeat(x, ways // heads, axis=2) if heads < ways else x
    return lax.all_to_all(x, axis, 2, 1, tiled=True)


def _to_rows(x: Any, axis: Axis) -> Any:
    return lax.all_to_all(x, axis, 1, 2, tiled=True)


def _unrepeated(grad: Any, x: Any) -> Any:
    """Sum the gradients of heads that were repeated."""
    if grad.shape == x.shape:
        return grad
    batch, length, heads, dim = x.shape
    return grad.reshape(batch, length, heads, -1, dim).sum(axis=3, dtype=jnp.float32).astype(x.dtype)
