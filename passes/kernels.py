"""Kernels in place of naive attention, vocabulary losses, gated MLPs and norms, found by dataflow in a step.

In: a flat jaxpr, already differentiated. Out: an equal one in which scores, logits and hidden activations never exist
whole, with a row for each replacement and a sentence for each near miss. Forward and backward are recognised and
replaced together; a pair of loops is looked at as one, so that what the kernel's backward pass reads is stacked in
place of scores and weights. It may not change anything whose forward and backward pass were not shown to equal the
definition.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from memopt import _compat as c
from memopt._contract import Context, Rewritten
from memopt._plan import Decision
from memopt.passes import (
    _attention_call,
    _loss_call,
    _match_attention,
    _match_loss,
    _match_mlp,
    _match_norm,
    _mlp_call,
    _norm_call,
)
from memopt.passes._exchange import Walk
from memopt.passes._kernel_edit import Edit
from memopt.passes._match import OUTER, Space

_KINDS = {
    "attention": "attention",
    "losses": "losses",
    "gated_mlps": "gated MLPs",
    "norms": "norms",
}  # in the order of `parts`
_LEAST_BYTES, _LEAST_SHARE = 64 * 2**20, 0.05  # of the hidden activations of a gated MLP worth a kernel


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Replace naive attention, matmuls into a cross-entropy and gated MLPs by kernels that hold a tile at a time.

    On TPU and GPU they are Pallas kernels, elsewhere, for shapes that these cannot serve, and in steps with shardings
    pure JAX that computes a tile at a time.

    Memory: of an attention, output and two floats a row and head are kept for the backward pass, in place of scores,
    weights and masks; of a loss, one float a token in place of logits; of a gated MLP, rows and weights in place of
    hidden activations. Cost: the backward pass computes scores, logits and hidden activations again; blocks that a
    causal or windowed mask hides are skipped. Exact: only sums are reassociated, and roundings of scores, logits and
    hidden activations to half precision are dropped.

    Found are a softmax between two products with any layout, scale, cast, `where` masks, added biases, soft cap and
    grouped heads; any way of writing the cross-entropy of integer labels, summed, averaged, masked or weighted; and
    SwiGLU, GeGLU and ReGLU between three products; each only when the backward pass is exactly its own: the region is
    evaluated on small random inputs.

    The planner takes all, attention and losses, attention alone, or none: a causal attention costs fewer FLOPs than
    the plain one, as hidden blocks are skipped; another one, a loss, and a gated MLP, are taken where the budget asks
    for their memory.

    Args:
        attention: replace attention.
        losses: replace matmuls into a cross-entropy.
        gated_mlps: replace gated MLPs; None for those whose hidden activations are much: the five arrays of them that
            a backward pass holds at least 64 MiB and a twentieth of the step's arguments. In a step that is
            partitioned over devices None replaces none: the pure-JAX form walks along the features that devices split.
        norms: replace RMSNorm and LayerNorm. Not in the default: `Remat` keeps the same bytes, rows alone, at no FLOPs.

    Example:
        >>> import memopt
        >>> memopt.passes.Kernels(losses=False).name
        'Kernels: attention, gated MLPs'

    Source: Dao 2023, "FlashAttention-2"; Wijmans et al. 2024, "Cut your losses in large-vocabulary language models";
    Shazeer 2020, "GLU variants improve transformer".

    Limits: dropout inside attention, learned biases, a bias of the head or of an MLP, smoothed labels, and scores,
    weights, logits or hidden activations that something else reads are left as they are.
    """

    stage: ClassVar[int] = 10
    optional: ClassVar[bool] = True

    attention: bool = True
    losses: bool = True
    gated_mlps: bool | None = None
    norms: bool = False

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        kinds = [_KINDS[field] for field in self._on()]
        return "Kernels" if len(kinds) >= 3 else f"Kernels: {', '.join(kinds)}"

    def _on(self) -> list[str]:
        return [field for field in _KINDS if getattr(self, field) is not False]

    def parts(self) -> list[Kernels]:
        """Return one pass for each kind of kernel, in the order in which the planner takes them."""
        off = dict.fromkeys(_KINDS, False)
        return [Kernels(**{**off, field: getattr(self, field)}) for field in self._on()]

    def propose(self, survey: Any) -> tuple[()]:
        """Propose nothing: this pass rewrites."""
        return ()

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with every proven pattern replaced, or None where there is none and nothing to say."""
        if context.partitioned and self._on() == ["gated_mlps"] and self.gated_mlps is None:
            return None
        platform = "cpu" if context.partitioned else getattr(context.target, "platform", "cpu")
        given = sum(aval.size * aval.dtype.itemsize for aval in closed.in_avals)
        least_bytes = 0 if self.gated_mlps else max(_LEAST_BYTES, _LEAST_SHARE * given)
        work = _Work(platform, self, least_bytes, _parts(closed, context), getattr(context.target, "kind", None))
        base = work.level(c.open_jaxpr(closed))
        if not work.rows and not work.left:
            return None
        out = closed if not work.rows else c.close(base, c.jaxpr_consts(closed))
        return Rewritten(out, tuple(work.rows), tuple(work.left))


class _Work(Walk):
    """One rewrite of a step by kernels."""

    def __init__(
        self, platform: str, settings: Kernels, least_bytes: float, parts: _loss_call.Parts | None, kind: str | None
    ):
        super().__init__()
        self.parts, self.kind = parts, kind
        self.platform, self.settings, self.least_bytes = platform, settings, least_bytes

    def swept(self, jaxpr: Any) -> Any:
        """Return a level without what nothing reads any more, or what a replaced norm was made of is found again."""
        return c.without_dead(jaxpr) if self.settings.norms else jaxpr

    def space(self, jaxpr: Any, pair: tuple[int, int] | None, quiet: bool) -> Any:
        """Return a level, or a pair of its loops, with kernels in it."""
        eqns = jaxpr.eqns if pair is None else c.open_jaxpr(jaxpr.eqns[pair[0]].params["jaxpr"]).eqns
        settings = self.settings
        softmax = (settings.attention or settings.losses) and any(eqn.primitive.name == "exp" for eqn in eqns)
        gated = settings.gated_mlps is not False and _match_mlp.may_be_in(eqns, self.least_bytes)
        norms = settings.norms and _match_norm.may_be_in(eqns)
        if not softmax and not gated and not norms:
            return jaxpr
        space = Space(jaxpr, pair)
        edit = Edit(space)
        if softmax and settings.attention:
            tokens = 1 if self.parts is None else self.parts.tokens
            device = {"platform": self.platform, "parts": tokens, "kind": self.kind}
            make = functools.partial(_attention_call.make, space, **device)
            for call in self._calls(space, _match_attention.find(space), make, quiet, "attention"):
                edit.replace(call, call.found.out)
                self.rows.append(_row(space, call, len(self.rows)))
        if pair is None and settings.losses:
            self._losses(space, edit, quiet)
        if gated:
            make = functools.partial(_mlp_call.make, space, platform=self.platform)
            for call in self._calls(space, _match_mlp.find(space, self.least_bytes), make, quiet, "gated MLP"):
                edit.replace(call, call.found.out)
                if call.found.second is not None:
                    edit.join(*call.found.second)
                self.rows.append(_mlp_row(space, call, len(self.rows)))
        if norms:
            make = functools.partial(_norm_call.make, space, platform=self.platform)
            for call in self._calls(space, _match_norm.find(space), make, quiet, "norm"):
                edit.replace(call, call.found.out)
                self.rows.append(_norm_row(space, call, len(self.rows)))
        return edit.done()

    def _calls(self, space: Space, matches: Any, make: Callable[..., Any], quiet: bool, what: str) -> Iterator[Any]:
        """Yield a call for each match that lies in this level or in the pair's bodies; note the near misses."""
        for node, found in matches:
            if space.pair is not None and node.side == OUTER:
                continue
            if isinstance(found, str):
                self.leave(node, found, quiet, what)
            else:
                yield make(found)

    def _losses(self, space: Space, edit: Edit, quiet: bool) -> None:
        for node, found in _match_loss.find(space):
            if not isinstance(found, str):
                try:
                    call = _loss_call.make(space, found, self.platform, self.parts)
                except NotImplementedError as error:
                    found = str(error)
            if isinstance(found, str):
                self.leave(node, found, quiet, "loss")
                continue
            edit.replace(call, found.loss)
            self.rows.append(_loss_row(call, len(self.rows)))


def _parts(closed: Any, context: Context) -> _loss_call.Parts | None:
    """Return into how many parts values are split, None in a step of one device."""
    if not context.partitioned:
        return None
    given: dict[tuple[int, ...], tuple[int, ...]] = {}
    users = () if context.shardings is None else context.shardings.arguments
    for aval, sharding in zip(closed.in_avals, users, strict=False):
        if sharding is not None and len(sharding.device_set) > 1:
            local = sharding.shard_shape(aval.shape)
            ways = tuple(size // max(part, 1) for size, part in zip(aval.shape, local, strict=True))
            given[aval.shape] = max(ways, given.get(aval.shape, ways))
    return _loss_call.Parts(context.partitioned, context.feature_parts, given)


def _module(eqn: Any) -> str:
    return str(c.name_stack(eqn))


def _row(space: Space, call: _attention_call.Call, number: int) -> Decision:
    eqn = call.found.softmax.eqn
    aval = eqn.outvars[0].aval
    size = math.prod(aval.shape) * aval.dtype.itemsize
    spec = call.spec
    kind = "causal" if spec.causal and spec.offset == 0 else "masked" if spec.hides or call.masks else "full"
    passes = "forward and backward" if call.found.grads else "forward"
    name = f"{_module(eqn)}/attention.{number}".lstrip("/")
    reason = f"{kind} attention, {passes}, equal on random inputs; {call.note}"
    return Decision(name, _module(eqn), c.user_source(eqn), size, "kernel", reason)


def _loss_row(call: _loss_call.Call, number: int) -> Decision:
    eqn = call.found.product.eqn
    aval = eqn.outvars[0].aval
    passes = "forward and backward" if call.found.grads else "forward"
    name = f"{_module(eqn)}/linear_cross_entropy.{number}".lstrip("/")
    reason = f"cross-entropy of a product, {passes}, equal on random inputs; {call.note}"
    size = math.prod(aval.shape) * aval.dtype.itemsize
    return Decision(name, _module(eqn), c.user_source(eqn), size, "kernel", reason)


def _mlp_row(space: Space, call: _mlp_call.Call, number: int) -> Decision:
    eqn, aval = call.found.out.eqn, space.avals[call.found.hidden]
    passes = "forward and backward" if call.found.grads else "forward"
    name = f"{_module(eqn)}/gated_mlp.{number}".lstrip("/")
    reason = f"gated MLP ({call.found.activation}), {passes}, equal on random inputs; {call.note}"
    size = math.prod(aval.shape) * aval.dtype.itemsize
    return Decision(name, _module(eqn), c.user_source(eqn), size, "kernel", reason)


def _norm_row(space: Space, call: _norm_call.Call, number: int) -> Decision:
    eqn, aval = call.found.out.eqn, space.avals[call.found.x]
    passes = "forward and backward" if call.found.grads else "forward"
    name = f"{_module(eqn)}/norm.{number}".lstrip("/")
    reason = f"{'layer' if call.spec.centered else 'RMS'} norm, {passes}, equal on random inputs; {call.note}"
    size = math.prod(aval.shape) * aval.dtype.itemsize
    return Decision(name, _module(eqn), c.user_source(eqn), size, "kernel", reason)
