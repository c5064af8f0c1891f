"""The sharding pass's attention over a split sequence: a ring, or an all-to-all, in place of what XLA would gather.

In: a flat step, a mesh, which of its axes split the sequence, the batch and heads. Out: the step with every attention
that is proven to be one computed under `shard_map`, forward and backward. What cannot be is left to XLA, which brings
keys and values together, with a sentence. It runs before anything else looks at attention.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from memopt import _compat as c
from memopt._contract import Context, Rewritten
from memopt._plan import Decision
from memopt.passes import _attention_call, _context_ring, _match_attention
from memopt.passes._exchange import Walk
from memopt.passes._kernel_edit import Edit
from memopt.passes._match import OUTER, Node, Space
from memopt.passes._match_attention import Found

FORMS = ("ring", "ulysses", "gather")
_CODE = {
    "ring": (_context_ring.ring_forward, _context_ring.ring_backward),
    "ulysses": (_context_ring.ulysses_forward, _context_ring.ulysses_backward),
}


@dataclasses.dataclass(frozen=True)
class ContextAttention:
    """Replace attention by a form for sequences that are split over devices; a part of `Shard`.

    Args:
        mesh: the mesh.
        context: its axes that split the sequence.
        batch: those that split the batch.
        tensor: those that split heads, where they divide.
        form: `"ring"` or `"ulysses"`.
    """

    mesh: Mesh
    context: tuple[str, ...]
    batch: tuple[str, ...]
    tensor: tuple[str, ...]
    form: str

    stage: ClassVar[int] = 5
    optional: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return f"shard: {self.form} attention"

    def propose(self, survey: Any) -> tuple[()]:
        """Propose nothing: this pass rewrites."""
        return ()

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with attention over a split sequence, or None where there is none and nothing to say."""
        work = _Work(self)
        base = work.level(c.open_jaxpr(closed))
        if not work.rows and not work.left:
            return None
        out = closed if not work.rows else c.close(base, c.jaxpr_consts(closed))
        return Rewritten(out, tuple(work.rows), tuple(work.left))


class _Work(Walk):
    """One rewrite of a step by attention over a split sequence."""

    def __init__(self, part: ContextAttention):
        super().__init__()
        self.part = part

    def space(self, jaxpr: Any, pair: tuple[int, int] | None, quiet: bool) -> Any:
        """Return a level with its attentions exchanged."""
        eqns = jaxpr.eqns if pair is None else c.open_jaxpr(jaxpr.eqns[pair[0]].params["jaxpr"]).eqns
        if not any(eqn.primitive.name == "exp" for eqn in eqns):
            return jaxpr
        space = Space(jaxpr, pair)
        edit = Edit(space)
        for node, found in _match_attention.find(space):
            if pair is None or node.side != OUTER:
                self._take(space, edit, node, found, quiet)
        return edit.done()

    def _take(self, space: Space, edit: Edit, node: Node, found: Found | str, quiet: bool) -> None:
        if not isinstance(found, str):
            call = _attention_call.make(space, found, "cpu")
            try:
                call = dataclasses.replace(call, code=Split(self.part, call))
            except NotImplementedError as error:
                found = str(error)
        if isinstance(found, str):
            self.leave(node, found, quiet)
            return
        edit.replace(call, found.out)
        self.rows.append(self._row(node.eqn, bool(found.grads), len(self.rows)))

    def _row(self, eqn: Any, backward: bool, number: int) -> Decision:
        aval, module = eqn.outvars[0].aval, str(c.name_stack(eqn))
        passes = "forward and backward" if backward else "forward"
        reason = f"{self.part.form} over {', '.join(self.part.context)}, {passes}, equal on random inputs"
        size = math.prod(aval.shape) * aval.dtype.itemsize
        return Decision(f"{module}/attention.{number}".lstrip("/"), module, c.user_source(eqn), size, "kernel", reason)


class Split:
    """Attention with `forward` and `backward` as kernels have them, over operands that are split over devices.

    Raises:
        NotImplementedError: this attention has no such form.
        ValueError: sizes do not divide.
    """

    def __init__(self, part: ContextAttention, call: Any):
        spec, found = call.spec, call.found
        if call.masks or found.scores.biases:
            raise NotImplementedError("its mask or bias is an array: keys and values are brought together instead")
        (outer, rows, heads, _), (_, columns, kv_heads, _) = (
            [math.prod(atom.size for atom in axis) for axis in found.orders[name]] for name in ("q", "k")
        )
        self.ways = math.prod(part.mesh.shape[a] for a in part.context)
        if rows != columns and spec.hides:
            raise NotImplementedError(f"{rows} queries and {columns} keys under a mask: brought together instead")
        if rows % self.ways or columns % self.ways:
            raise NotImplementedError(f"{rows} queries and {columns} keys do not divide over {self.ways} devices")
        self.axis, self.spec, self.mesh = part.context, spec, part.mesh
        self.heads = _dividing(part.mesh, part.tensor, heads, kv_heads)
        self.batch = _dividing(part.mesh, part.batch, outer)
        if part.form == "ulysses":
            split = math.prod(part.mesh.shape[a] for a in self.heads)
            _check_heads(heads // split, kv_heads // split, self.ways)
        self.ahead, self.back = _CODE[part.form]

    def forward(self, form: Any, spec: Any, q: Any, k: Any, v: Any, bias: Any, extras: Any) -> tuple[Any, Any]:
        """Return the output and the log-sum-exp."""
        run = functools.partial(self.ahead, spec, self.axis, self.ways)
        return self._mapped(run, (self._rows,) * 3, (self._rows, self._lse))(self._places, q, k, v)

    def backward(self, form: Any, spec: Any, q: Any, k: Any, v: Any, bias: Any, extras: Any, *saved: Any) -> Any:
        """Return the gradients of q, k and v, and None for the bias."""
        run = functools.partial(self.back, spec, self.axis, self.ways)
        specs = (self._rows,) * 4 + (self._lse, self._rows)
        return *self._mapped(run, specs, (self._rows,) * 3)(self._places, q, k, v, *saved), None

    @property
    def _places(self) -> jax.Array:
        """The number of each device along the sequence."""
        return jax.lax.iota(jnp.int32, self.ways)

    @property
    def _rows(self) -> PartitionSpec:
        return PartitionSpec(*(axes or None for axes in (self.batch, self.axis, self.heads)), None)

    @property
    def _lse(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, self.heads or None, None, self.axis)

    def _mapped(self, run: Any, in_specs: Any, out_specs: Any) -> Any:
        in_specs = PartitionSpec(self.axis), *in_specs
        return jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _dividing(mesh: Mesh, axes: tuple[str, ...], *sizes: int) -> tuple[str, ...]:
    """Return the axes where their devices divide all sizes, else none."""
    ways = math.prod(mesh.shape[a] for a in axes)
    return axes if all(size % ways == 0 for size in sizes) else ()


def _check_heads(heads: int, kv_heads: int, ways: int) -> None:
    if heads % ways == 0 and (kv_heads % ways == 0 or ways % kv_heads == 0):
        return
    near = max(n for n in range(1, ways + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))
    raise ValueError(
        f"Ulysses splits heads over the devices of a sequence: {heads} heads with {kv_heads} key heads do not divide "
        f"over {ways}. Nearest: {near} devices along that axis, or attention='ring'."
    )
