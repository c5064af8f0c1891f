"""When a low-rank optimizer makes its bases anew: spread over matrices, seldom where the subspace stands still.

In come small stacks of gradients, out go the counts at which each basis changed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memopt.optim import scale_by_dct_low_rank, scale_by_galore, scale_by_q_galore
from memopt.optim._leaves import describe
from memopt.optim._projection import due_range, orthonormal, range_basis, refresh_offsets


def test_refreshes_are_spread_over_all_matrices():
    shapes = [(2, 6, 8), (5,), (6, 8), (3, 6, 8)]
    leaves = describe([np.zeros(shape) for shape in shapes])[0]
    offsets = refresh_offsets(leaves, [True, False, True, True], 12)
    assert [offset.tolist() for offset in offsets] == [[0, 2], [], [4], [6, 8, 10]]
    together = refresh_offsets(leaves, [True, False, True, True], 3)
    assert [offset.tolist() for offset in together] == [[0, 0], [], [1], [1, 2, 2]]


def test_due_ranges():
    offsets = np.array([1, 1, 2], np.int32)
    found = [tuple(map(int, due_range(offsets, jnp.int32(count), 4))) for count in range(6)]
    assert [list(range(*pair)) for pair in found] == [[0, 1, 2], [0, 1], [2], [], [], [0, 1]]


def changes(optimizer, grads, bases, steps):
    """Return for each update the matrices of a stack whose basis changed."""
    update = jax.jit(optimizer.update)
    state, found, old = optimizer.init(grads(0)), [], None
    for count in range(steps):
        _, state = update(grads(count), state)
        new = np.asarray(bases(state))
        found.append([] if old is None else [i for i in range(len(new)) if not np.allclose(new[i], old[i])])
        old = new
    return found


@pytest.mark.loose_promotion
def test_galore_refreshes_one_matrix_at_a_time():
    grads = lambda count: {"w": jax.random.normal(jax.random.key(count), (4, 6, 8))}  # noqa: E731
    found = changes(scale_by_galore(rank=2, refresh_every=4), grads, lambda state: state.projectors["['w']"], 9)
    assert found == [[], [1], [2], [3], [0], [1], [2], [3], [0]]


@pytest.mark.loose_promotion
def test_q_galore_waits_longer_where_the_subspace_stands_still():
    still = jnp.outer(jnp.arange(1.0, 7.0), jnp.ones(8)) + 0.01 * jax.random.normal(jax.random.key(9), (6, 8))

    def grads(count):
        return {"w": jnp.stack([still, jax.random.normal(jax.random.key(count), (6, 8))])}

    optimizer = scale_by_q_galore(optax.identity(), rank=2, refresh_every=4, block=6, queue=2, threshold=0.9)
    state, update = optimizer.init(grads(0)), jax.jit(optimizer.update)
    for count in range(30):
        _, state = update(grads(count), state)
    gap = state.projectors["['w']"].gap.tolist()
    assert gap[0] >= 8 and gap[1] == 4


def test_dct_leaves_take_turns():
    def grads(count):
        return [jax.random.normal(jax.random.key(count + 100 * i), (6, 8)) for i in range(2)]

    optimizer = scale_by_dct_low_rank(rank=2, refresh_every=3)
    found = changes(optimizer, grads, lambda state: np.stack([leaf.columns for leaf in state.leaves.values()]), 8)
    assert found[0] == [] and all(0 not in now for now in found[1:3]) and all(1 not in now for now in found[2:4])
    assert any(0 in found[count] for count in (3, 6)) and any(1 in found[count] for count in (1, 4, 7))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_range_finder_finds_the_dominant_directions(side):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 20)))[0] for size in (20, 30))
    matrix = (u * 0.5 ** np.arange(20)) @ v.T
    basis = np.asarray(range_basis(jnp.asarray(matrix, jnp.float32), 4, jax.random.key(0), side, 2))
    wanted = (u if side == "left" else v)[:, :4]
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    overlap = np.linalg.svd(wanted.T @ basis, compute_uv=False)
    assert overlap.min() > 0.97
    assert abs(basis[:, 0] @ wanted[:, 0]) > 0.98


def test_a_zero_gradient_has_a_basis():
    basis = range_basis(jnp.zeros((6, 8)), 3, jax.random.key(0), "left", 1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)


def test_orthonormal_columns_are_those_of_a_qr_up_to_signs():
    columns = jax.random.normal(jax.random.key(0), (60, 12))
    basis, wanted = np.asarray(orthonormal(columns)), np.linalg.qr(np.asarray(columns))[0]
    np.testing.assert_allclose(basis, wanted * np.sign((basis * wanted).sum(0)), atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x * 10.0 ** -jnp.arange(12.0)[None],  # what is left of a column is mostly rounding
        lambda x: x[:, :1] + 1e-4 * x,  # nearly parallel
        lambda x: x.at[:, 5].set(2 * x[:, 4]).at[:, 7].set(0.0),
        lambda x: x[:12] * 1e-20,
        jnp.ones_like,
        jnp.zeros_like,
    ],
    ids=["graded", "parallel", "dependent", "square", "ones", "zeros"],
)
def test_columns_are_orthonormal_whatever_they_were(make):
    columns = make(jax.random.normal(jax.random.key(0), (60, 12)))
    basis = np.asarray(jax.jit(orthonormal)(columns))
    np.testing.assert_allclose(basis.T @ basis, np.eye(12), atol=3e-6)
