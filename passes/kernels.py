"""Kernels in place of naive attention and vocabulary losses, found by dataflow in a differentiated step.

In: a flat jaxpr. Out: an equal one in which scores and logits never exist whole, with a row for each replacement and a
sentence for each near miss. Forward and backward are recognised and replaced together; a pair of loops is looked at as
one, so that what the kernel's backward pass reads is stacked in place of scores and weights. It may not change anything
whose forward and backward pass were not shown to equal the definition.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

from memopt import _compat as c
from memopt._contract import Context, Rewritten
from memopt.passes import _attention_call, _exchange, _loss_call


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Replace naive attention, and matmuls into a cross-entropy, by kernels that never hold scores or logits.

    On TPU and GPU they are Pallas kernels, elsewhere, for shapes that these cannot serve, and in steps with shardings
    pure JAX that computes a tile at a time.

    Memory: of an attention, output and two floats a row and head are kept for the backward pass, in place of scores,
    weights and masks; of a loss, one float a token in place of logits. Cost: the backward pass computes scores and
    logits again; blocks that a causal or windowed mask hides are skipped. Exact: only sums are reassociated, and
    roundings of scores and logits to half precision are dropped.

    Found are a softmax between two products with any layout, scale, cast, `where` masks, added biases, soft cap and
    grouped heads, and any way of writing the cross-entropy of integer labels, summed, averaged, masked or weighted,
    each only when the backward pass is exactly its own: the region is evaluated on small random inputs.

    The planner takes both, attention alone, or neither: a causal attention costs fewer FLOPs than the plain one, as
    hidden blocks are skipped; another one, and a loss, are taken where the budget asks for their memory.

    Args:
        attention: replace attention.
        losses: replace matmuls into a cross-entropy.

    Example:
        >>> import memopt
        >>> memopt.passes.Kernels(losses=False).name
        'Kernels: attention'

    Source: Dao 2023, "FlashAttention-2"; Wijmans et al. 2024, "Cut your losses in large-vocabulary language models".

    Limits: dropout inside attention, learned biases, a bias of the head, smoothed labels, and scores, weights or logits
    that something else reads are left as they are.
    """

    stage: ClassVar[int] = 10
    optional: ClassVar[bool] = True

    attention: bool = True
    losses: bool = True

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "Kernels" if self.attention == self.losses else f"Kernels: {'attention' if self.attention else 'losses'}"

    def parts(self) -> list[Kernels]:
        """Return one pass for each kind of kernel, in the order in which the planner takes them."""
        found = [Kernels(losses=False)] if self.attention else []
        return [*found, Kernels(attention=False)] if self.losses else found

    def propose(self, survey: Any) -> tuple[()]:
        """Propose nothing: this pass rewrites."""
        return ()

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with every proven attention replaced, or None where there is none and nothing to say."""
        platform = "cpu" if context.partitioned else getattr(context.target, "platform", "cpu")
        work = _exchange.Exchange(
            attention=functools.partial(_attention, platform) if self.attention else None,
            losses=functools.partial(_loss, platform) if self.losses else None,
        )
        base = work.level(c.open_jaxpr(closed))
        if not work.rows and not work.left:
            return None
        out = closed if not work.rows else c.close(base, c.jaxpr_consts(closed))
        return Rewritten(out, tuple(work.rows), tuple(work.left))


def _attention(platform: str, space: Any, found: Any) -> Any:
    return _attention_call.make(space, found, platform)


def _loss(platform: str, space: Any, found: Any) -> Any:
    return _loss_call.make(space, found, platform)
