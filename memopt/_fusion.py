"""Which values XLA really puts in memory, and which only ever live inside a fused kernel.

In comes a `Graph` (or a jaxpr), out goes the set of values that get a buffer. Every rule is a named fact about XLA's
fusion; what differs between backends stands in one table. It may not look at time: when a buffer is alive is the
timeline's business.
"""

from __future__ import annotations

from typing import Any

from memopt import _timeline_graph as tg

#: Element-wise and data-movement operations that XLA computes inside the kernel of whoever reads them.
CHEAP = frozenset(
    "abs add add_any and broadcast_in_dim ceil clamp complex conj convert_element_type copy div eq expand_dims floor "
    "ge gt imag integer_pow iota is_finite le lt max min mul ne neg not or pad real reduce_precision reshape rev "
    "round select_n shift_left shift_right_arithmetic shift_right_logical sign slice square sub transpose xor "
    "dynamic_slice concatenate rem nextafter population_count clz full empty".split()
)
#: Element-wise operations that XLA does not repeat for each reader.
EXPENSIVE = frozenset(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p "
    "logistic pow rsqrt sin sinh sqrt tan tanh random_bits threefry2x32 random_fold_in random_split random_seed "
    "erf_inv igamma polygamma".split()
)
#: Operations that take their element-wise producers into their own kernel.
ABSORBING = frozenset(
    "dot_general conv_general_dilated reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor "
    "argmax argmin dynamic_update_slice scatter scatter-add scatter_add gather select_and_gather_add "
    "reduce_window reduce_window_sum reduce_window_max cumsum cumlogsumexp cummax cummin cumprod".split()
)
ELEMENTWISE = CHEAP | EXPENSIVE


def materialised(jaxpr: Any, platform: str) -> set[Any]:
    """Return the variables of `jaxpr` that XLA puts in memory, its arguments included.

    Args:
      jaxpr: an open or closed jaxpr; bodies of its loops are not entered.
      platform: `"tpu"`, `"cpu"` or `"gpu"`.

    Returns:
      The set of variables of this jaxpr that get a buffer.
    """
    graph = tg.flatten(getattr(jaxpr, "jaxpr", jaxpr), platform)
    kept = stored(graph)
    return {var for var, value in graph.number.items() if value in kept}


def stored(graph: tg.Graph) -> set[int]:
    """Return the values of `graph` that get a buffer; arguments always do."""
    kept = set(graph.inputs) | {v for v in graph.outputs if v >= 0} | graph.forced
    for index in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[index]
        for value in op.outs:
            if value not in kept and not _fuses(graph, op, value):
                kept.add(value)
    return kept


def _fuses(graph: tg.Graph, op: tg.Op, value: int) -> bool:
    readers = graph.uses[value]
    if not readers:
        return True
    if op.name not in ELEMENTWISE:
        return False
    if any(graph.ops[r].name not in ELEMENTWISE and graph.ops[r].name not in ABSORBING for r in readers):
        return False
    return True
