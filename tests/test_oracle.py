"""The oracle against hand-solved chains, against brute force, and the harness against planners of known quality."""

import jax.extend.core as jex
import numpy as np
import pytest

from tests import oracle, oracle_graphs


def chain(n: int) -> oracle.Graph:
    """A chain of n forward operations and their n gradients, all of 10 bytes and 1 s; gradient i reads value i."""
    ops = [oracle.Op((i - 1,) if i else (), 10, 1.0) for i in range(n)]
    for i in reversed(range(n)):
        ops.append(oracle.Op(tuple(sorted({i, len(ops) - 1})), 10, 1.0))
    return oracle.Graph(tuple(ops), (len(ops) - 1,), n)


@pytest.mark.parametrize(
    ("n", "budget_bytes", "seconds"),
    [
        (3, 40, 6.0),
        (3, 30, 7.0),
        (3, 20, None),
        (4, 50, 8.0),
        (4, 40, 9.0),
        (4, 30, 11.0),
        (5, 60, 10.0),
        (5, 50, 11.0),
        (5, 40, 12.0),
        (5, 30, 16.0),
        (5, 29, None),
    ],
)
def test_hand_solved_chains(n, budget_bytes, seconds):
    answer = oracle.solve(chain(n), budget_bytes)
    assert answer.proven and answer.feasible is (seconds is not None)
    assert answer.seconds == seconds == oracle.brute_force(chain(n), budget_bytes)
    if seconds is not None:
        assert oracle.peak_bytes(chain(n), answer.runs) <= budget_bytes
        assert answer.bound_seconds == pytest.approx(seconds)


def test_a_five_node_forward_chain_needs_two_values():
    graph = oracle.Graph(tuple(oracle.Op((i - 1,) if i else (), 10, 1.0) for i in range(5)), (4,))
    assert oracle.plain_peak_bytes(graph) == 20
    assert oracle.solve(graph, 20).seconds == 5.0
    assert oracle.solve(graph, 19).feasible is False


def test_results_are_counted_to_the_end():
    graph = oracle.Graph((oracle.Op((), 10, 1.0), oracle.Op((), 10, 1.0), oracle.Op((), 10, 1.0)), (0, 1, 2))
    assert oracle.plain_peak_bytes(graph) == 30
    assert oracle.solve(graph, 29).feasible is False and oracle.brute_force(graph, 29) is None


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_equals_brute_force(seed, share):
    graph = oracle_graphs.random_graph(seed, 5 + seed % 3)
    budget_bytes = oracle_graphs.budget_of(graph, share)
    assert oracle.solve(graph, budget_bytes).seconds == pytest.approx(oracle.brute_force(graph, budget_bytes))


def test_time_limit_leaves_a_bound():
    graph = oracle_graphs.random_graph(3, 30)
    answer = oracle.solve(graph, oracle_graphs.budget_of(graph, 0.3), time_limit_seconds=0.5)
    assert answer.bound_seconds >= graph.seconds * 0.999
    assert answer.seconds is None or answer.seconds >= answer.bound_seconds * 0.999


def test_a_schedule_that_reads_too_early_is_an_error():
    with pytest.raises(ValueError, match="operation 1 at time 0 reads 0, which has not run; run it before"):
        oracle.peak_bytes(chain(3), [1])
    with pytest.raises(ValueError, match="result 5 is never made; run it"):
        oracle.peak_bytes(chain(3), [0])


@pytest.mark.parametrize("seed", range(6))
def test_the_jaxpr_has_the_graphs_peak_and_cost(seed):
    graph = oracle_graphs.random_graph(seed, 8 + seed)
    closed = oracle_graphs.to_jaxpr(graph)
    assert len(closed.jaxpr.eqns) == len(graph.ops)
    peak_bytes, seconds = oracle_graphs.measure_jaxpr(closed)
    assert peak_bytes == oracle.plain_peak_bytes(graph)
    assert seconds == pytest.approx(graph.seconds)


def test_small_graphs_run():
    graph = oracle_graphs.random_graph(1, 8, unit=4)
    free = [np.ones(s.shape, s.dtype) for pair in oracle_graphs.free_arguments(graph, 4) for s in pair]
    results = jex.jaxpr_as_fun(oracle_graphs.to_jaxpr(graph, 4))(*free)
    assert [r.size * 4 for r in results] == [graph.ops[i].size_bytes for i in graph.outputs]


def scheduled(closed: jex.ClosedJaxpr, runs: tuple[int, ...]) -> jex.ClosedJaxpr:
    """The jaxpr with its equations run in a given order, repeats allowed: what a perfect planner would make."""
    env, eqns, old = {}, [], closed.jaxpr.eqns
    for number in runs:
        eqn = old[number]
        fresh = [jex.Var(v.aval) for v in eqn.outvars]
        eqns.append(
            eqn.replace(
                invars=[env.get(v, v) if not isinstance(v, jex.Literal) else v for v in eqn.invars], outvars=fresh
            )
        )
        env.update(zip(eqn.outvars, fresh, strict=True))
    outvars = [env[v] for v in closed.jaxpr.outvars]
    return jex.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns, outvars=outvars), closed.consts)


def test_the_harness_tells_good_planners_from_bad():
    def best(closed, budget_bytes):
        return scheduled(closed, oracle.solve(graph, budget_bytes).runs)

    rows = []
    for seed in range(5):
        graph = oracle_graphs.random_graph(seed, 9)
        rows.append(oracle_graphs.compare(best, seed, 9, 0.4))
    good = oracle_graphs.summarise(rows)
    assert good["possible"] > 0 and good["feasible"] == 1.0 and abs(good["p95"]) < 1e-6
    lazy = oracle_graphs.summarise([oracle_graphs.compare(lambda closed, _: closed, s, 9, 0.4) for s in range(5)])
    assert lazy["feasible"] == 0.0 and lazy["median"] == np.inf
