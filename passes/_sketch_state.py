"""The pocket of the state that holds gradient norms: one leaf of it, with the norms beside it.

In: a state, and what a step has to keep norms of. Out: the state with its first array in a `WithNorms`; the step over
such a state, which sees the array alone and hands the norms on as they are, for the rewrite to put new ones in their
place. Which values there are norms of is asked of the step (`_sketch_sites`). Nothing here knows what a norm is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memopt import _compat as c
from memopt import _graph as g
from memopt import _inline, _stored
from memopt.passes import _sketch_norms as ledger
from memopt.passes import _sketch_sites as sites


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaf", "sketch_norms", "sketch_count"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class WithNorms:
    """A leaf of the state, with what a cached sketch carries from step to step; a plain pytree of arrays.

    Attributes:
      leaf: the leaf itself.
      sketch_norms: by the name of a value, the norm of each sample's gradient the last time that it was seen: float32
        `[samples]`, in a scanned stack `[layers, samples]`; negative where it was not seen yet. None in a state with
        which a step is only asked what it keeps norms of.
      sketch_count: uint32 scalar, the number of steps so far; random numbers come from it.
    """

    leaf: Any
    sketch_norms: Mapping[str, Any] | None
    sketch_count: Any


class Answer(Exception):
    """What a step answers when it is asked which values it keeps norms of: `{name: layers or None}`."""

    def __init__(self, layers: dict[str, int | None], why: list[Any]):
        super().__init__("the step was only asked what it keeps norms of")
        self.layers, self.why = layers, why


def is_with_norms(node: Any) -> bool:
    """Say whether a node of a pytree holds norms."""
    return isinstance(node, WithNorms)


def compress(pass_: Any, state: Any, ask: Callable[[Any], None] | None) -> Any:
    """Return a state, or shapes of one, with fresh norms beside its first array; one that has norms as it is.

    Raises:
      ValueError: the step was not given, it has no value to keep norms of, or the state has no array.
    """
    nodes, tree = _stored.flatten(state, is_with_norms)
    values = [node for _, node in nodes]
    if any(map(is_with_norms, values)):
        return state
    if ask is None:
        raise ValueError(f"{pass_!r} looks at the step: call step.compress(state, *args) with the arguments of a call.")
    first = next((i for i, v in enumerate(values) if hasattr(v, "shape") and hasattr(v, "dtype")), None)
    if first is None:
        raise ValueError(f"{pass_!r} keeps norms beside an array of the state, and this state has none.")

    def beside(norms: Any, count: Any) -> Any:
        node = WithNorms(values[first], norms, count)
        return tree.unflatten([node if i == first else v for i, v in enumerate(values)])

    try:
        ask(beside(None, None))
    except Answer as answer:
        layers, why = answer.layers, answer.why
    if not layers:
        reasons = "; ".join(dict.fromkeys(f"{one.what}: {one.why}" for one in why))
        raise ValueError(
            f"{pass_!r} finds no value that a weight's gradient alone reads{': ' if reasons else ''}{reasons}. Leave "
            "samples out to sketch without norms."
        )
    make = functools.partial(_fresh, pass_.samples, layers)
    return beside(*(jax.eval_shape(make) if _stored.is_shape(values[first]) else make()))


def _fresh(samples: int, layers: Mapping[str, int | None]) -> tuple[dict[str, Any], Any]:
    return {name: ledger.fresh(samples, count) for name, count in layers.items()}, jnp.zeros((), jnp.uint32)


def decompress(state: Any) -> Any:
    """Return a state without its norms."""
    nodes, tree = _stored.flatten(state, is_with_norms)
    return tree.unflatten([node.leaf if is_with_norms(node) else node for _, node in nodes])


def over(pass_: Any, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step over a state with norms.

    Raises (when called):
      TypeError: no argument holds norms.
      ValueError: the step returns no new value of the leaf beside which they are.
    """

    @functools.wraps(fn, updated=())
    def step(*args: Any, **kwargs: Any) -> Any:
        nodes, tree = _stored.flatten((args, kwargs), is_with_norms)
        found = [(path, node) for path, node in nodes if is_with_norms(node)]
        name = getattr(fn, "__name__", "step")
        if len(found) != 1:
            raise TypeError(
                f"{name} takes a state with the norms of {pass_!r}: call state = {name}.compress(state, *args) once "
                f"before the loop, with the arguments of a call; {len(found)} were given."
            )
        path, node = found[0]
        plain = [n.leaf if is_with_norms(n) else n for _, n in nodes]
        plain_args, plain_kwargs = _stored.with_leaves((args, kwargs), tree, plain, is_with_norms)
        if node.sketch_norms is None:
            raise _asked(pass_, fn, plain_args, plain_kwargs)
        results, out_tree = jax.tree_util.tree_flatten_with_path(fn(*plain_args, **plain_kwargs))
        places = _stored.new_values([(path, node.leaf)], results)
        if not places:
            where = jax.tree_util.keystr(path[1:])
            raise ValueError(
                f"{name} returns no new value of {where}, beside which the norms of {pass_!r} are. Compress a part of "
                "the state that it returns."
            )
        leaves = [leaf for _, leaf in results]
        leaves[places[0]] = WithNorms(leaves[places[0]], node.sketch_norms, node.sketch_count)
        return out_tree.unflatten(leaves)

    return step


def _asked(pass_: Any, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Answer:
    """Trace the plain step, and return what it would keep norms of."""
    nodes, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    traced = [i for i, (_, leaf) in enumerate(nodes) if isinstance(leaf, jax.Array)]

    def flat(*leaves: Any) -> Any:
        given = dict(zip(traced, leaves, strict=True))
        new_args, new_kwargs = tree.unflatten([given.get(i, leaf) for i, (_, leaf) in enumerate(nodes)])
        return fn(*new_args, **new_kwargs)

    shapes = [jax.ShapeDtypeStruct(nodes[i][1].shape, nodes[i][1].dtype) for i in traced]
    closed = _inline.inline(jax.make_jaxpr(flat)(*shapes))
    closed = c.close(c.dce(closed)[0], c.jaxpr_consts(closed))
    paths = [jax.tree_util.keystr(nodes[i][0][1:]) for i in traced]
    found, left = sites.find(pass_, g.Graph(closed), sites.batch_of(pass_, paths, shapes)[1])
    return Answer({site.name: site.layers for site in found}, left)
