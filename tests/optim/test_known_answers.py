"""Each optimizer against its published algorithm, written again in NumPy for small matrices.

What comes in are a few gradients, what goes out is the update of the second step, so that moments, corrections and
whatever is carried between steps count. The references use nothing of the package but its random numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

from memopt._codecs_maps import Dynamic, RankOne, dynamic_values
from memopt.optim import (
    adam_8bit,
    scale_by_adam_4bit,
    scale_by_adam_8bit,
    scale_by_adam_mini,
    scale_by_apollo,
    scale_by_apollo_mini,
    scale_by_came,
    scale_by_dct_low_rank,
    scale_by_galore,
    scale_by_lion_8bit,
    scale_by_momentum_8bit,
    scale_by_muon,
    scale_by_muon_8bit,
    scale_by_q_galore,
)
from memopt.optim._apollo import random_projection
from memopt.optim._dct import best_columns, carry_over, cosine_columns
from memopt.optim._encoded import encoded_zeros
from memopt.optim._leaves import describe

B1, B2, EPS = 0.9, 0.999, 1e-8


def gradients(shape, count=2, seed=0):
    """Return a few random gradients."""
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


def run(optimizer, grads, name="kernel"):
    """Return the last update and the state after it."""

    def all_steps(grads):
        state = optimizer.init({name: grads[0]})
        for grad in grads:
            updates, state = optimizer.update({name: grad}, state)
        return updates[name], state

    return jax.jit(all_steps)(grads)


class Adam:
    """Adam in float64, with a hook on what is stored."""

    def __init__(self, shape, keep_mu=lambda value: value, keep_nu=lambda value: value):
        self.mu, self.nu, self.count = np.zeros(shape), np.zeros(shape), 0
        self.keep_mu, self.keep_nu = keep_mu, keep_nu

    def __call__(self, grad):
        """Return the direction."""
        self.count += 1
        mu = B1 * self.mu + (1 - B1) * grad
        nu = B2 * self.nu + (1 - B2) * grad**2
        self.mu, self.nu = self.keep_mu(mu), self.keep_nu(nu)
        return mu / (1 - B1**self.count) / (np.sqrt(nu / (1 - B2**self.count)) + EPS)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["left", "right"])
def test_galore(shape):
    grads = gradients(shape)
    update, state = run(scale_by_galore(rank=3, scale=0.25), grads)
    basis = np.asarray(state.projectors["['kernel']"], np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    left = shape[0] < shape[1]
    low = [basis.T @ grad if left else grad @ basis for grad in grads]
    adam = Adam(low[0].shape)
    direction = [adam(one) for one in low][-1]
    expected = 0.25 * (basis @ direction if left else direction @ basis.T)
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_galore_gives_back_a_gradient_of_low_rank(side):
    rng = np.random.default_rng(0)
    stack = np.einsum("lmr,lrn->lmn", rng.standard_normal((3, 8, 2)), rng.standard_normal((3, 2, 12))).astype(
        np.float32
    )
    update, _ = run(scale_by_galore(optax.identity(), rank=2, scale=1.0, side=side), [stack])
    np.testing.assert_allclose(update, stack, rtol=1e-4, atol=1e-4)


@pytest.mark.loose_promotion
def test_q_galore_stores_the_basis_in_four_bits():
    grads = gradients((16, 24))
    update, state = run(scale_by_q_galore(optax.scale_by_adam(), rank=8, scale=1.0, block=8), grads)
    stored = state.projectors["['kernel']"]
    basis = np.asarray(stored.bases.codec.decode(stored.bases), np.float64)
    assert stored.bases.codes.nbytes == 16 * 8 // 2
    assert len(np.unique(np.round(basis[0], 6))) <= 16
    adam = Adam((8, 24))
    direction = [adam(basis.T @ grad) for grad in grads][-1]
    np.testing.assert_allclose(update, basis @ direction, rtol=1e-4, atol=1e-5)


def apollo_reference(grads, basis, limit, tensor):
    """Zhu et al. 2024, algorithm 1, for a matrix with more columns than rows."""
    adam, norm, update = Adam((basis.shape[1], grads[0].shape[1])), None, None
    for grad in grads:
        low = basis.T @ grad
        direction = adam(low)
        axis = None if tensor else 0
        factor = np.linalg.norm(direction, axis=axis) / (np.linalg.norm(low, axis=axis) + 1e-8)
        update = grad * factor
        size = np.linalg.norm(update)
        if norm is not None and size > limit * norm:
            update *= limit * norm / size
        norm = np.linalg.norm(update)
    return update


@pytest.mark.parametrize("limit", [1.01, 1e9], ids=["limited", "free"])
def test_apollo(limit):
    small, large = gradients((6, 10))
    grads = [0.1 * small, 3 * large]
    update, state = run(scale_by_apollo(rank=3, norm_growth=limit), grads)
    leaf = describe({"kernel": grads[0]})[0][0]
    basis = np.asarray(random_projection(leaf, 3, 0, jnp.int32(0)), np.float64)
    expected = apollo_reference(grads, basis, limit, tensor=False)
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.leaves["['kernel']"].norm, np.linalg.norm(expected), rtol=1e-4)


def test_apollo_mini():
    grads = gradients((6, 10))
    update, _ = run(scale_by_apollo_mini(), grads)
    leaf = describe({"kernel": grads[0]})[0][0]
    basis = np.asarray(random_projection(leaf, 1, 0, jnp.int32(0)), np.float64)
    np.testing.assert_allclose(update, 128**0.5 * apollo_reference(grads, basis, 1.01, tensor=True), rtol=1e-4)


def test_apollo_draws_its_projection_anew_each_period():
    leaf = describe({"kernel": np.zeros((6, 10), np.float32)})[0][0]
    first, same, other = (np.asarray(random_projection(leaf, 400, 0, jnp.int32(n))) for n in (0, 0, 1))
    assert (first == same).all() and not np.allclose(first, other)
    np.testing.assert_allclose(first @ first.T, np.eye(6), atol=0.25)


def test_cosine_columns_are_scipys_inverse_transform():
    basis = scipy.fft.idct(np.eye(7), norm="ortho", axis=0)
    made = cosine_columns(jnp.array([[0, 3], [1, 6]]), 7, jnp.float32)
    np.testing.assert_allclose(made, [basis[:, [0, 3]], basis[:, [1, 6]]], atol=1e-6)


def test_moments_move_with_the_columns_that_stay():
    moment = jnp.array([[10.0, 20.0, 30.0]])
    moved = carry_over(moment, jnp.array([1, 4, 6]), jnp.array([0, 1, 6]))
    np.testing.assert_allclose(moved, [[0.0, 10.0, 30.0]])


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["wide", "tall"])
def test_dct(shape):
    grads = gradients(shape)
    update, state = run(scale_by_dct_low_rank(rank=3), grads)
    tall = [grad.T if shape[0] < shape[1] else grad for grad in grads]
    basis = scipy.fft.idct(np.eye(6), norm="ortho", axis=0)
    columns = np.sort(np.argsort(-np.linalg.norm(tall[0] @ basis, axis=0))[:3])
    assert state.leaves["['kernel']"].columns.tolist() == columns.tolist()
    chosen, adam = basis[:, columns], Adam((10, 3))
    expected = [adam(one @ chosen) for one in tall][-1] @ chosen.T
    np.testing.assert_allclose(update, expected.T if shape[0] < shape[1] else expected, rtol=1e-4, atol=1e-5)


def test_best_columns_find_a_cosine():
    wave = np.cos(np.pi * (2 * np.arange(8) + 1) * 5 / 16)[None].astype(np.float32)
    assert best_columns(jnp.asarray(wave), 1).tolist() == [5]


def nearest(values, table):
    """Round to the nearest value of a table."""
    return table[np.abs(values[..., None] - table).argmin(-1)]


def block_wise(values, table, block):
    """Store values in blocks of the last axis, scaled by the largest magnitude (Dettmers et al. 2022, equation 4)."""
    cut = values.reshape(*values.shape[:-1], -1, block)
    scale = np.abs(cut).max(-1, keepdims=True)
    return (nearest(cut / scale, table) * scale).reshape(values.shape)


def rank_one(values, table):
    """Store values scaled by the smaller of row and column maximum (Li et al. 2023, section 4.2)."""
    scale = np.minimum(values.max(1, keepdims=True), values.max(0, keepdims=True))
    return nearest(values / scale, table) * scale


def test_adam_8bit():
    grads = gradients((8, 256), 3)
    update, _ = run(scale_by_adam_8bit(block=128, min_size=1), grads)
    signed, unsigned = dynamic_values(8, True), dynamic_values(8, False)
    adam = Adam((8, 256), lambda mu: block_wise(mu, signed, 128), lambda nu: block_wise(nu, unsigned, 128))
    np.testing.assert_allclose(update, [adam(grad) for grad in grads][-1], rtol=2e-3, atol=2e-3)
    exact = Adam((8, 256))
    assert np.abs(update - [exact(grad) for grad in grads][-1]).max() > 5e-3, "the reference does not see the codes"


def test_adam_4bit():
    grads = gradients((8, 256), 3)
    update, _ = run(scale_by_adam_4bit(min_size=1), grads)
    linear = (np.arange(16) + 1) / 16
    adam = Adam((8, 256), lambda mu: block_wise(mu, dynamic_values(4, True), 128), lambda nu: rank_one(nu, linear))
    expected = [adam(grad) for grad in grads][-1]
    close = np.isclose(update, expected, rtol=2e-3, atol=2e-3)
    assert close.mean() > 0.999, "all but values halfway between two codes"


def test_the_dynamic_map_is_the_published_one():
    values = dynamic_values(8, True)
    assert len(values) == 256 and values[127] == 0 and values[-1] == 1
    np.testing.assert_allclose(values[128], 0.55e-6)
    np.testing.assert_allclose(values[129:131], [3.25e-6, 7.75e-6])
    np.testing.assert_allclose(values[0], -(0.1 + 0.9 * 63.5 / 64))


@pytest.mark.parametrize(
    ("codec", "shape"),
    [(Dynamic(8), (300,)), (Dynamic(8, False), (2, 64, 130)), (RankOne(4), (8, 256)), (RankOne(4), (9,))],
)
def test_encoded_zeros_are_encoded_zeros(codec, shape):
    made = encoded_zeros(codec, shape, jnp.float32, np.zeros(shape, np.float32))
    wanted = jax.jit(lambda: codec.encode(jnp.zeros(shape)))()
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == two.dtype and not one.weak_type
        np.testing.assert_array_equal(one, two)


def test_momentum_and_lion_8bit():
    grads = [np.sign(grad) for grad in gradients((8, 128), 3)]
    update, _ = run(scale_by_momentum_8bit(0.5, block=128, min_size=1), grads)
    np.testing.assert_allclose(update, 0.25 * grads[0] + 0.5 * grads[1] + grads[2], atol=0.02)
    update, _ = run(scale_by_lion_8bit(block=128, min_size=1), grads)
    mu = 0.99 * 0.01 * grads[0] + 0.01 * grads[1]
    np.testing.assert_allclose(update, np.sign(0.9 * mu + 0.1 * grads[2]))


def test_small_leaves_and_stable_embeddings_stay_plain():
    params = {"embedding": jnp.zeros((64, 128)), "kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)}
    plain, stable = (jax.eval_shape(adam_8bit(0.1, stable_embedding=on).init, params)[0].leaves for on in (False, True))
    assert [hasattr(plain[f"['{name}']"].mu, "codes") for name in params] == [True, True, False]
    assert [hasattr(stable[f"['{name}']"].mu, "codes") for name in params] == [False, True, False]
    assert stable["['embedding']"].mu.dtype == jnp.float32


def newton_schulz(matrix):
    """Jordan et al. 2024, for a matrix with no more rows than columns."""
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("optimizer", "tolerance"), [(scale_by_muon(), 2e-3), (scale_by_muon_8bit(min_size=1), 0.1)], ids=["f32", "8bit"]
)
def test_muon(optimizer, tolerance):
    grads = gradients((6, 128))
    update, _ = run(optimizer, grads)
    momentum = np.zeros((6, 128))
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
    expected = 0.2 * 128**0.5 * newton_schulz(0.95 * momentum + 0.05 * grads[-1])
    assert np.abs(update - expected).max() < tolerance * np.abs(expected).max()
    values = np.linalg.svd(update, compute_uv=False) / (0.2 * 128**0.5)
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_leaves_tables_and_vectors_to_adam():
    grads = gradients((6, 10))
    for name in ("embedding", "bias"):
        update, _ = run(scale_by_muon(), grads, name)
        adam = Adam((6, 10))
        np.testing.assert_allclose(update, [adam(grad) for grad in grads][-1], rtol=1e-4, atol=1e-5)


def came_reference(grads):
    """Luo et al. 2023, algorithm 2."""
    row, column, row_u, column_u, mu = (np.zeros(n) for n in (6, 10, 6, 10, (6, 10)))
    for grad in grads:
        squares = grad**2 + 1e-30
        row, column = 0.999 * row + 0.001 * squares.mean(1), 0.999 * column + 0.001 * squares.mean(0)
        update = grad / np.sqrt(np.outer(row, column) / row.mean())
        update /= max(1, np.sqrt((update**2).mean()))
        mu = 0.9 * mu + 0.1 * update
        unstable = (update - mu) ** 2 + 1e-16
        row_u, column_u = 0.9999 * row_u + 1e-4 * unstable.mean(1), 0.9999 * column_u + 1e-4 * unstable.mean(0)
        step = mu / np.sqrt(np.outer(row_u, column_u) / row_u.mean())
    return step


def test_came():
    grads = gradients((6, 10))
    update, _ = run(scale_by_came(), grads)
    np.testing.assert_allclose(update, came_reference(grads), rtol=2e-3)


MINI = {
    "kernel": lambda squares: squares.mean(0, keepdims=True) + 0 * squares,
    "embedding": lambda squares: squares.mean(1, keepdims=True) + 0 * squares,
    "bias": lambda squares: squares.mean(1, keepdims=True) + 0 * squares,
    "query": lambda squares: np.repeat(squares.reshape(6, 2, 5).mean((0, 2)), 5)[None] + 0 * squares,
}


@pytest.mark.parametrize("name", MINI)
def test_adam_mini(name):
    grads = gradients((6, 10))
    update, _ = run(scale_by_adam_mini(heads={"*query*": 2} if name == "query" else None), grads, name)
    mu, nu = np.zeros((6, 10)), np.zeros((6, 10))
    for grad in grads:
        mu, nu = B1 * mu + (1 - B1) * grad, B2 * nu + (1 - B2) * MINI[name](grad**2)
    expected = mu / (1 - B1**2) / (np.sqrt(nu / (1 - B2**2)) + EPS)
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-6)


def test_adam_mini_names_what_it_does_not_find():
    with pytest.raises(ValueError, match=r"'\*q\*', which no parameter matches.*kernel"):
        scale_by_adam_mini(heads={"*q*": 2}).init({"kernel": jnp.zeros((4, 4))})
    with pytest.raises(ValueError, match="no 3 equal heads"):
        scale_by_adam_mini(heads={"*kernel*": 3}).init({"kernel": jnp.zeros((4, 4))})
