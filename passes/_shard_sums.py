"""The sharding pass's adding machine: which gradients of weights are added up whole before each device takes its part.

In: a step's `Flow` and `Rules`, and a gradient. Out: whether it is one for which that takes less memory. Nothing is
decided of other values, and nothing is changed here.

XLA:TPU may cut a matmul whose result is added up and scattered into one for each device around a ring, where it takes
that for quicker than a reduce-scatter (on 16 chips of v5e in one axis it does, on 4 not). Each of these reads an array
that one matmul would compute in its own kernel. Behind logits that array is as large as they are, and they wait beside
it for what reads them last: with 8,192 tokens of 128,256 words on a device 1.96 GiB more, for a gradient of 501 MiB.
"""

from __future__ import annotations

import math
from typing import Any

from memopt import _fusion
from memopt.passes._shard_flow import ELEMENTWISE, Flow, is_var
from memopt.passes._shard_rules import Rules, Spec

#: What hands values on in another shape or order.
_SHAPED = frozenset("reshape transpose squeeze expand_dims broadcast_in_dim optimization_barrier".split())
#: What adds to few elements of an array, and makes an array of few numbers or none.
_FEW, _SPREAD = frozenset({"scatter-add", "scatter_add"}), frozenset({"broadcast_in_dim", "iota"})


def is_added_up_whole(flow: Flow, gradient: Any, whole: Spec, kept: Spec, rules: Rules) -> bool:
    """Say whether a gradient is added up whole: what its matmul reads would take more, and is made of a product alone.

    Args:
      flow, rules: what the step is, and how its values are split.
      gradient: a weight's gradient.
      whole: how it is split while its weight is used.
      kept: how it is kept, after a reduce-scatter over the one axis that splits tokens; sums over two are left alone.
    """
    scattered = {a for axes in kept for a in axes if rules.sizes[a] > 1} - {a for axes in whole for a in axes}
    added = {a for a in (*rules.layout.batch, *rules.layout.context) if rules.sizes[a] > 1}
    if len(added) != 1 or scattered != added:
        return False
    size = _bytes(gradient, whole, rules)
    for product in products(flow, gradient):
        for var in filter(is_var, flow.makers[product][0].invars):
            made_of = sources(flow, var)
            is_behind_one = len(made_of) == 1 and made_of != [var] and products(flow, var) == made_of
            if is_behind_one and _bytes(var, rules.value(var), rules) >= size:
                return True
    return False


def products(flow: Flow, var: Any) -> list[Any]:
    """Return the results of matmuls among a variable's sources."""
    return [one for one in sources(flow, var) if _maker(flow, one) in _fusion.MATMULS]


def sources(flow: Flow, var: Any) -> list[Any]:
    """Return the values of a variable's size that element-wise operations make it of, in one body.

    Arrays that repeat few numbers are none, nor are those of few numbers among zeros.
    """
    found, seen, todo = [], {var}, [var]
    while todo:
        one = todo.pop()
        name = _maker(flow, one)
        operands = list(filter(is_var, flow.makers[one][0].invars)) if name else []
        alike = [v for v in operands if v.aval.size == var.aval.size]
        if not alike and name in _SPREAD:
            continue
        if name not in ELEMENTWISE and name not in _SHAPED and name not in _FEW:
            found.append(one)
            continue
        todo += [v for v in alike if v not in seen]
        seen.update(alike)
    return found


def _maker(flow: Flow, var: Any) -> str:
    return flow.makers[var][0].primitive.name if var in flow.makers else ""


def _bytes(var: Any, spec: Spec, rules: Rules) -> float:
    ways = rules.count([axis for axes in spec for axis in axes])
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize / ways
