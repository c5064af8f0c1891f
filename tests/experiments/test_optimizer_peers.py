"""The comparison with others' optimizers is fair where it needs none of them: problem, distances, sentences."""

import jax.numpy as jnp
import numpy as np
import optax
import optimizer_peers
import pytest
from _peer_pairs import Settings, pairs, plain_pairs, projections
from _peers import Ours, versions

from memopt import optim

SETTINGS = Settings(rate=1e-2, weight_decay=0.01, rank=8, every=50)


@pytest.fixture(scope="module")
def problem():
    return optimizer_peers.Problem(0)


def batch_loss(problem, weights, step):
    """The loss whose gradient a step takes: half the squared error a sample."""
    rows = np.random.default_rng((0, step)).choice(len(problem.inputs), 128, replace=False)
    hidden = np.tanh(problem.inputs[rows] @ weights["first"] + weights["bias"])
    return 0.5 * np.sum((hidden @ weights["second"] - problem.targets[rows]) ** 2) / 128


@pytest.mark.parametrize("name", ["first", "bias", "second"])
def test_gradients_are_those_of_the_loss(problem, name):
    weights = {key: value.astype(np.float64) for key, value in problem.weights.items()}
    grads = problem.grads(weights, 3)
    way = np.random.default_rng(1).standard_normal(weights[name].shape)
    ends = [batch_loss(problem, weights | {name: weights[name] + sign * 1e-5 * way}, 3) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(np.sum(grads[name] * way), rel=1e-4)


@pytest.mark.loose_promotion
def test_our_projections_are_what_apollo_projects_with():
    shapes = {"bias": (16,), "left": (12, 16), "right": (16, 12)}
    found = projections(optim.apollo(1.0, rank=4, seed=3), shapes)
    assert {name: basis.shape for name, basis in found.items()} == {"left": (12, 4), "right": (12, 4)}
    rng = np.random.default_rng(0)
    grads = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    mine = Ours(optim.apollo(1.0, rank=4, seed=3), grads)
    mine.step(grads)
    low = {name: np.asarray(mine.state[0].leaves[f"['{name}']"].mu) / 0.1 for name in found}
    np.testing.assert_allclose(low["left"], found["left"].T @ grads["left"], atol=1e-5)
    np.testing.assert_allclose(low["right"], grads["right"] @ found["right"], atol=1e-5)


@pytest.mark.loose_promotion
def test_our_side_takes_the_steps_of_optax_and_counts_all_its_bytes():
    weights = {"w": np.ones((4, 8), np.float32)}
    mine = Ours(optax.adamw(0.1), weights)
    updates, _ = optax.adamw(0.1).update({"w": jnp.ones((4, 8))}, optax.adamw(0.1).init(weights), weights)
    np.testing.assert_allclose(mine.step(weights)["w"], weights["w"] + updates["w"], rtol=1e-6)
    assert mine.state_bytes() == 2 * 4 * 32 + 4


def test_distances_are_relative_to_the_way_and_the_largest_counts():
    start = {"a": np.zeros(4), "b": np.ones(4)}
    theirs = {"a": np.full(4, 2.0), "b": np.ones(4) + 0.1}
    ours = {"a": np.full(4, 2.2), "b": np.ones(4) + 0.15}
    assert optimizer_peers.apart(ours, theirs, start) == pytest.approx(0.5)


def test_only_pairs_that_compute_the_same_can_miss():
    row = {"optimizer": "x", "peer": "y", "must": 0.01, "difference": 0.02}
    assert len(optimizer_peers.misses([row])) == 1
    assert len(optimizer_peers.misses([row | {"difference": float("nan")}])) == 1
    assert not optimizer_peers.misses([row | {"must": None}, row | {"difference": 0.01}, {"must": 0.01}])


def test_a_peer_that_is_not_there_is_a_row_that_says_so(problem, monkeypatch):
    monkeypatch.setattr(optimizer_peers._peers, "versions", dict)
    for pair in pairs():
        row = optimizer_peers.row_of(pair, SETTINGS, [], [problem])
        assert row["note"] == "not installed" and "difference" not in row
    assert set(versions()) <= {pair.peer for pair in pairs()}


def test_a_peer_that_does_not_run_is_a_row_that_says_why(problem, monkeypatch):
    def refuse(*_):
        raise AssertionError("not compiled with CUDA enabled\nand more")

    monkeypatch.setattr(optimizer_peers._peers, "versions", lambda: {"torch": "1"})
    monkeypatch.setattr(optimizer_peers._peers, "Theirs", refuse)
    row = optimizer_peers.row_of(plain_pairs()[0], SETTINGS, [problem.weights], [problem])
    assert row["note"] == "does not run here: not compiled with CUDA enabled"
