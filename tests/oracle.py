"""An exact oracle for small graphs: in come operations, bytes and a budget; out comes the cheapest schedule's cost.

It is Checkmate's formulation (Jain et al., MLSys 2020, section 4) as a mixed integer program over all time steps with
recomputation allowed, solved by HiGHS through SciPy. The same accounting measures any jaxpr (``measure_jaxpr``), so
that a planner can be held against it. Nothing here knows how a planner works.

The accounting, exactly. Stage ``t`` ends with the first computation of operation ``t``; within a stage any earlier
operation may be repeated, in order. A value is live from the moment its operation runs until after its last reader in
that stage, or to the end of the stage if the next stage needs it stored. While an operation runs, all its inputs and
its output are live together. Final outputs must be held at the end. Free values (arguments) cost no bytes and are there
always.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse


@dataclass(frozen=True)
class Op:
    """One operation: it reads ``inputs`` (numbers of earlier operations), takes ``seconds`` and makes ``size_bytes``.

    ``free_inputs`` names the arguments that it reads, which are always there.
    """

    inputs: tuple[int, ...]
    size_bytes: int
    seconds: float
    free_inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Operations in topological order and which of them are results; ``n_forward`` is where the backward ones begin."""

    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    n_forward: int = 0

    @property
    def seconds(self) -> float:
        """The cost of running every operation once."""
        return sum(op.seconds for op in self.ops)


@dataclass(frozen=True)
class Answer:
    """What the solver found: ``seconds`` is None without a schedule; ``bound_seconds`` holds even when time ran out.

    ``feasible`` is None where the time limit left it open; ``runs`` is the order in which operations run.
    """

    feasible: bool | None
    seconds: float | None
    bound_seconds: float
    proven: bool
    runs: tuple[int, ...] = ()


def plain_peak_bytes(graph: Graph) -> int:
    """Return the peak when every operation runs once, in order."""
    return peak_bytes(graph, range(len(graph.ops)))


def peak_bytes(graph: Graph, runs: Sequence[int]) -> int:
    """Return the peak of a schedule (operations, repeats allowed) when each copy is dropped after its last reader.

    Raises:
      ValueError: if an operation runs before its inputs exist or a result is never made.
    """
    made, last = {}, {}
    for time, number in enumerate(runs):
        for source in graph.ops[number].inputs:
            if source not in made:
                raise ValueError(f"operation {number} at time {time} reads {source}, which has not run; run it before")
            last[made[source]] = time
        made[number] = time
    for number in graph.outputs:
        if number not in made:
            raise ValueError(f"result {number} is never made; run it")
        last[made[number]] = len(runs)
    return _peak([(graph.ops[number].size_bytes, time, last.get(time, time)) for time, number in enumerate(runs)])


def _peak(lives: list[tuple[int, int, int]]) -> int:
    """The largest sum of bytes over time for (bytes, first time, last time), both ends included."""
    if not lives:
        return 0
    change = np.zeros(max(end for _, _, end in lives) + 2, dtype=np.int64)
    for size, start, end in lives:
        change[start] += size
        change[end + 1] -= size
    return int(np.cumsum(change).max())


def cost_seconds(graph: Graph, runs: Sequence[int]) -> float:
    """Return what a schedule costs."""
    return sum(graph.ops[number].seconds for number in runs)


def brute_force(graph: Graph, budget_bytes: int) -> float | None:
    """Return the cheapest cost within the budget over all schedules, by shortest path over sets of held values.

    A state is which operations are held and how far the first runs have come; exponential, for up to about ten
    operations. Operations first run in the order given, as in the mixed integer program.
    """
    n, seen, queue = len(graph.ops), set(), [(0.0, 0, 0)]
    while queue:
        cost, held, done = heapq.heappop(queue)
        if (held, done) in seen:
            continue
        seen.add((held, done))
        if done == n and all(held >> k & 1 for k in graph.outputs):
            return cost
        for after, number in _moves(graph, held, done, budget_bytes):
            new_done = max(done, number + 1) if number >= 0 else done
            added = graph.ops[number].seconds if number >= 0 else 0.0
            heapq.heappush(queue, (cost + added, after, new_done))
    return None


def _moves(graph: Graph, held: int, done: int, budget_bytes: int) -> list[tuple[int, int]]:
    moves = [(held & ~(1 << k), -1) for k in range(done) if held >> k & 1]
    for number in range(min(done + 1, len(graph.ops))):
        after = held | 1 << number
        ready = not held >> number & 1 and all(held >> k & 1 for k in graph.ops[number].inputs)
        if ready and sum(op.size_bytes for k, op in enumerate(graph.ops) if after >> k & 1) <= budget_bytes:
            moves.append((after, number))
    return moves


def solve(graph: Graph, budget_bytes: int, *, time_limit_seconds: float = 60.0) -> Answer:
    """Return the cheapest schedule within the budget.

    Args:
      graph: up to about 15 operations (30 with a time limit).
      budget_bytes: most bytes live at once, results included, arguments not.
      time_limit_seconds: when to give up; the answer then holds a bound.

    Source: Jain et al., "Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization", MLSys 2020,
    eq. 1-8.
    """
    program = _Program(graph, budget_bytes)
    result = optimize.milp(
        program.costs,
        constraints=program.constraints(),
        integrality=program.integrality,
        bounds=optimize.Bounds(program.low, program.high),
        options={"time_limit": time_limit_seconds},
    )
    if result.status == 2:
        return Answer(False, None, np.inf, True)
    bound = max(graph.seconds, float(result.mip_dual_bound)) if result.mip_dual_bound is not None else graph.seconds
    if result.x is None:
        return Answer(None, None, bound, False)
    runs = program.runs(result.x)
    return Answer(True, cost_seconds(graph, runs), bound, result.status == 0, runs)


class _Program:
    """The variables and constraints.

    R[t, i]: operation i runs in stage t. S[t, i]: its value is held when stage t begins. F[t, i, k]: the value of i is
    freed in stage t just after k ran (k reads i, or is i). U[t, k]: bytes while k runs in stage t, as an expression of
    the others. Frontier-advancing: R[t, t] = 1, and neither R nor S exist for i > t (S not for i = t).
    """

    def __init__(self, graph: Graph, budget_bytes: int):
        self.graph, self.n, self.budget_bytes = graph, len(graph.ops), budget_bytes
        self.number: dict[tuple, int] = {}
        readers = [[k for k, op in enumerate(graph.ops) if i in op.inputs] for i in range(self.n)]
        for t in range(self.n):
            for i in range(t + 1):
                self.number["R", t, i] = len(self.number)
                if i < t:
                    self.number["S", t, i] = len(self.number)
                for k in [i, *readers[i]]:
                    if k <= t:
                        self.number["F", t, i, k] = len(self.number)
        self.readers, count = readers, len(self.number)
        self.costs = np.zeros(count)
        for t in range(self.n):
            for i in range(t + 1):
                self.costs[self.number["R", t, i]] = graph.ops[i].seconds
        self.low, self.high = np.zeros(count), np.ones(count)
        self.integrality = np.array([key[0] != "F" for key in self.number], dtype=float)
        for t in range(self.n):
            self.low[self.number["R", t, t]] = 1.0
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def constraints(self) -> optimize.LinearConstraint:
        for t in range(self.n):
            for i in range(t + 1):
                self._causality(t, i)
                for k in [i, *self.readers[i]]:
                    if k <= t:
                        self._freeing(t, i, k)
            self._memory(t)
        for i in self.graph.outputs:
            self._row([(("R", self.n - 1, i), 1.0), (("S", self.n - 1, i), 1.0)], 1.0, np.inf)
        data = [(r, c, v) for r, (row, _, _) in enumerate(self.rows) for c, v in row.items()]
        r, c, v = (np.array(x) for x in zip(*data, strict=True))
        matrix = sparse.csr_matrix((v, (r, c)), shape=(len(self.rows), len(self.number)))
        return optimize.LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows])

    def _row(self, terms: list[tuple[tuple, float]], low: float, high: float) -> None:
        row: dict[int, float] = {}
        for key, factor in terms:
            if key in self.number:
                row[self.number[key]] = row.get(self.number[key], 0.0) + factor
        self.rows.append((row, low, high))

    def _causality(self, t: int, i: int) -> None:
        for source in self.graph.ops[i].inputs:
            self._row([(("R", t, source), 1.0), (("S", t, source), 1.0), (("R", t, i), -1.0)], 0.0, np.inf)
        if i < t:
            self._row([(("R", t - 1, i), 1.0), (("S", t - 1, i), 1.0), (("S", t, i), -1.0)], 0.0, np.inf)

    def _freeing(self, t: int, i: int, k: int) -> None:
        """F may be 1 when k runs, nothing later in this stage reads i, and the next stage does not hold i.

        It need not be: freeing only helps.
        """
        later = [j for j in self.readers[i] if k < j <= t]
        hold = self._kept(t, i)
        if hold is None:
            self._row([(("F", t, i, k), 1.0)], 0.0, 0.0)
            return
        blockers = [(("R", t, j), 1.0) for j in later] + ([(hold, 1.0)] if hold else [])
        self._row([(("F", t, i, k), 1.0), (("R", t, k), -1.0)], -np.inf, 0.0)
        for key, _ in blockers:
            self._row([(("F", t, i, k), 1.0), (key, 1.0)], -np.inf, 1.0)

    def _kept(self, t: int, i: int) -> tuple | None:
        """The variable that keeps i past stage t; an empty key if none can, None for a result in the last stage."""
        if t + 1 < self.n:
            return ("S", t + 1, i)
        return None if i in self.graph.outputs else ()

    def _memory(self, t: int) -> None:
        size = [op.size_bytes for op in self.graph.ops]
        held = [(("S", t, i), float(size[i])) for i in range(t)]
        for k in range(t + 1):
            held.append((("R", t, k), float(size[k])))
            self._row(held, -np.inf, float(self.budget_bytes))
            held = held + [(("F", t, i, k), -float(size[i])) for i in {k, *self.graph.ops[k].inputs}]

    def runs(self, x: np.ndarray) -> tuple[int, ...]:
        """Return the operations in the order in which the solution runs them."""
        return tuple(i for t in range(self.n) for i in range(t + 1) if x[self.number["R", t, i]] > 0.5)
