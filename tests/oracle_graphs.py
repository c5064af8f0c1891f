"""Hold a planner against the exact oracle: in comes a planner, out comes how far it is from the best schedule.

Random graphs look like a forward and a backward pass. ``to_jaxpr`` makes each operation one atomic equation (an
undifferentiated ``custom_vjp_call`` around one ``dot_general``) with the graph's bytes and FLOPs, at sizes at which
compute, not bandwidth, is the cost on any device. Such jaxprs are for planning; ``unit=4`` makes small ones that run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests import oracle

UNIT = 4096
FLOPS_PER_SECOND = 1e14
Plan = Callable[[jex.ClosedJaxpr, int], jex.ClosedJaxpr]
"""``plan(jaxpr, budget_bytes)``; it raises when it finds no plan."""


@dataclass(frozen=True)
class Comparison:
    """One graph at one budget: the planner's measured peak and cost beside the oracle's."""

    seed: int
    budget_bytes: int
    answer: oracle.Answer
    peak_bytes: int | None
    seconds: float | None

    @property
    def feasible(self) -> bool:
        """Whether the planner met the budget."""
        return self.peak_bytes is not None and self.peak_bytes <= self.budget_bytes

    @property
    def excess(self) -> float:
        """How much more the planner's schedule costs than the oracle's, as a fraction."""
        return self.seconds / self.answer.seconds - 1.0


def random_graph(seed: int, n_ops: int, unit: int = UNIT) -> oracle.Graph:
    """Return a forward-backward-like graph: a chain with skips, then gradients that read forward values.

    Args:
      seed: the same seed gives the same graph.
      n_ops: how many operations, at least 2.
      unit: sizes are multiples of ``4 * unit**2`` bytes, costs of ``2 * unit**3`` FLOPs.
    """
    rng = np.random.default_rng(seed)
    forward = n_ops // 2
    sources = [
        sorted({i - 1, int(rng.integers(0, i)) if rng.random() < 0.3 else i - 1}) if i else [] for i in range(forward)
    ]
    for k in range(n_ops - forward):
        read = {forward + k - 1} if forward + k else set()
        mirror = forward - 1 - k
        read |= {mirror} if mirror >= 0 and rng.random() < 0.9 else set()
        read |= {int(rng.integers(0, forward))} if forward and rng.random() < 0.2 else set()
        sources.append(sorted(read))
    columns, depths = rng.choice([1, 1, 2, 3, 4], n_ops), rng.choice([1, 2, 4, 8], n_ops)
    ops = tuple(
        oracle.Op(tuple(s), int(4 * unit * unit * c), float(2 * unit**3 * c * d / FLOPS_PER_SECOND), (i,))
        for i, (s, c, d) in enumerate(zip(sources, columns, depths, strict=True))
    )
    return oracle.Graph(ops, _outputs(sources), forward)


def _outputs(sources: list[list[int]]) -> tuple[int, ...]:
    read = {i for s in sources for i in s}
    return tuple(i for i in range(len(sources)) if i not in read)


@jax.custom_vjp
def _atom(values, left, right):
    first = sum((x[0, 0] for x in values), jnp.float32(0))
    return lax.dynamic_update_slice(left @ right, first[None, None], (0, 0))


def _atom_forward(values, left, right):
    raise NotImplementedError("the graph is joint already; it is not differentiated")


def _atom_backward(saved, ct):
    raise NotImplementedError("the graph is joint already; it is not differentiated")


_atom.defvjp(_atom_forward, _atom_backward)


def to_jaxpr(graph: oracle.Graph, unit: int = UNIT) -> jex.ClosedJaxpr:
    """Return the graph as a jaxpr of one atomic equation an operation; its arguments are two free matrices for each."""
    return jax.make_jaxpr(lambda free: _run(graph, free))(free_arguments(graph, unit))


def free_arguments(graph: oracle.Graph, unit: int = UNIT) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """Return the shapes of the free matrices: ``[unit, depth]``, ``[depth, columns]`` for each operation, float32."""
    free = []
    for op in graph.ops:
        columns = op.size_bytes // (4 * unit)
        depth = max(round(op.seconds * FLOPS_PER_SECOND / (2 * unit * columns)), 1)
        free.append(tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((unit, depth), (depth, columns))))
    return free


def _run(graph: oracle.Graph, free: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    made: list[jax.Array] = []
    for op, (left, right) in zip(graph.ops, free, strict=True):
        made.append(_atom([made[i] for i in op.inputs], left, right))
    return [made[i] for i in graph.outputs]


def measure_jaxpr(closed: jex.ClosedJaxpr) -> tuple[int, float]:
    """Return peak bytes and seconds of a jaxpr by the oracle's accounting, equation after equation in its order.

    Arguments and constants cost nothing; a value lives from its equation to its last reader, results to the end; an
    ``optimization_barrier`` passes its operands on without a copy. Seconds are those of the ``dot_general`` FLOPs.
    """
    owner: dict[Any, Any] = {}
    made: dict[Any, tuple[int, int]] = {}
    last: dict[Any, int] = {}
    for time, eqn in enumerate(closed.jaxpr.eqns):
        _use([v for v in eqn.invars if not isinstance(v, jex.Literal)], owner, last, time)
        if eqn.primitive.name == "optimization_barrier":
            owner.update({o: owner.get(i, i) for o, i in zip(eqn.outvars, eqn.invars, strict=True)})
            continue
        made.update({v: (v.aval.size * v.aval.dtype.itemsize, time) for v in eqn.outvars})
    _use([v for v in closed.jaxpr.outvars if not isinstance(v, jex.Literal)], owner, last, len(closed.jaxpr.eqns))
    peak = oracle._peak([(size, time, last.get(v, time)) for v, (size, time) in made.items()])
    return peak, dot_flops(closed.jaxpr) / FLOPS_PER_SECOND


def _use(variables: list[Any], owner: dict[Any, Any], last: dict[Any, int], time: int) -> None:
    for v in variables:
        last[owner.get(v, v)] = time


def dot_flops(jaxpr: Any) -> float:
    """Return the FLOPs of every ``dot_general``, calls included; a loop is an error, for these graphs have none."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("scan", "while", "cond"):
            raise ValueError(f"{eqn.primitive.name}: these graphs have no loops; the planner must not add any")
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            total += 2.0 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
        total += sum(dot_flops(getattr(body, "jaxpr", body)) for body in jex.jaxprs_in_params(eqn.params))
    return total


def compare(plan: Plan, seed: int, n_ops: int, share: float, *, time_limit_seconds: float = 20.0) -> Comparison:
    """Run the planner and the oracle on one random graph, at a share of what lies between its two extremes.

    ``share`` 0 is the largest operation alone, 1 the plain peak.
    A planner that raises ``ValueError`` or ``RuntimeError`` (so also ``BudgetError``) found no plan.
    """
    graph = random_graph(seed, n_ops)
    budget_bytes = budget_of(graph, share)
    answer = oracle.solve(graph, budget_bytes, time_limit_seconds=time_limit_seconds)
    try:
        peak_bytes, seconds = measure_jaxpr(plan(to_jaxpr(graph), budget_bytes))
    except (ValueError, RuntimeError):
        peak_bytes, seconds = None, None
    return Comparison(seed, budget_bytes, answer, peak_bytes, seconds)


def budget_of(graph: oracle.Graph, share: float) -> int:
    """Return a budget between what some operation needs by itself (0) and the plain peak (1)."""
    least = max(op.size_bytes + sum(graph.ops[i].size_bytes for i in op.inputs) for op in graph.ops)
    return int(least + share * (oracle.plain_peak_bytes(graph) - least))


def summarise(rows: list[Comparison]) -> dict[str, float]:
    """Return how often the planner is feasible where the oracle is, and quantiles of its excess cost there."""
    possible = [row for row in rows if row.answer.feasible]
    excess = [row.excess for row in possible if row.feasible]
    return {
        "graphs": len(rows),
        "possible": len(possible),
        "feasible": len(excess) / max(len(possible), 1),
        "median": float(np.median(excess)) if excess else np.inf,
        "p95": float(np.quantile(excess, 0.95)) if excess else np.inf,
    }
