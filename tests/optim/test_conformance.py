"""One suite for all optimizers of `memopt.optim`: in comes a table of them, out goes what each of them promises.

Shapes, dtypes, compositions and odd trees are checked on shapes alone, which compiles nothing; convergence, sharding
and the number of compilations by running. An optimizer that is exported and not in the table fails.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import memopt

optim = memopt.optim
#: Optax itself adds a float32 learning rate to bfloat16 updates.
pytestmark = pytest.mark.loose_promotion


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer: how to make it for small matrices, and what is known of it.

    Attributes:
      make: the alias.
      settings: arguments that small shapes need.
      static: arguments that `optax.inject_hyperparams` must leave alone.
      rate: a learning rate for the shared problem.
      batched: a stack of matrices is updated as its matrices are, one by one.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    settings: dict
    static: tuple[str, ...]
    rate: float = 0.05
    batched: bool = True

    def __call__(self, learning_rate=None, **more):
        """Make it."""
        return self.make(self.rate if learning_rate is None else learning_rate, **{**self.settings, **more})


EIGHT = {"min_size": 32, "block": 64}
CODES = ("min_size", "block", "seed")
LOW = ("rank", "refresh_every", "seed")
CASES = {
    "galore": Case(optim.galore, {"rank": 4, "refresh_every": 8}, (*LOW, "power_iterations"), 0.2, False),
    "galore_8bit": Case(
        optim.galore,
        {"rank": 4, "refresh_every": 8, "inner": optim.scale_by_adam_8bit(min_size=8, block=16)},
        (*LOW, "power_iterations", "inner"),
        0.2,
        False,
    ),
    "q_galore": Case(
        optim.q_galore,
        {"rank": 4, "refresh_every": 8, "block": 16, "queue": 2},
        (*LOW, "power_iterations", "block", "queue"),
        0.2,
        False,
    ),
    "apollo": Case(optim.apollo, {"rank": 4, "refresh_every": 8, "norm_growth": None}, LOW, 0.05, False),
    "apollo_mini": Case(optim.apollo_mini, {"scale": 1.0}, LOW, 0.05, False),
    "dct_low_rank": Case(optim.dct_low_rank, {"rank": 4, "refresh_every": 4}, LOW, 0.1),
    "adam_8bit": Case(optim.adam_8bit, EIGHT, CODES),
    "adamw_8bit": Case(optim.adamw_8bit, EIGHT, CODES),
    "adamw_4bit": Case(optim.adamw_4bit, EIGHT, CODES),
    "momentum_8bit": Case(optim.momentum_8bit, EIGHT, CODES),
    "lion_8bit": Case(optim.lion_8bit, EIGHT, CODES, 0.02),
    "muon": Case(optim.muon, {}, ("steps", "seed", "consistent_rms"), 0.1),
    "muon_8bit": Case(optim.muon_8bit, EIGHT, ("steps", "consistent_rms", *CODES), 0.1),
    "came": Case(optim.came, {}, ("seed",), 0.1),
    "adam_mini": Case(optim.adam_mini, {}, ("seed",)),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

SHAPES = {
    "scalar": (),
    "vector": (7,),
    "one": (1,),
    "none": (0, 6),
    "kernel": (6, 10),
    "square": (8, 8),
    "embedding": (12, 8),
    "layers": {"kernel": (3, 8, 12), "bias": (3, 12)},
    "filter": (2, 3, 6, 10),
}


def odd_tree(dtype=jnp.float32):
    """Return shapes of 0-D to 4-D leaves, empty ones, stacked matrices and stacked vectors."""
    is_shape = lambda value: isinstance(value, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), SHAPES, is_leaf=is_shape)


def one_update(optimizer, params, **extra):
    """Return the state before, the updates and the state after one update, as shapes."""
    state = jax.eval_shape(optimizer.init, params)
    update = functools.partial(optimizer.update, **extra)
    updates, after = jax.eval_shape(update, params, state, params)
    return state, updates, after


def same(first, second) -> bool:
    """Say whether two trees have equal structures, shapes, dtypes and weak types: then nothing compiles twice."""
    kind = lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type)  # noqa: E731
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        kind(one) == kind(two) for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def kinds(tree):
    """Return the shape and dtype of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_every_exported_optimizer_is_in_the_table():
    cores = {name for name in optim.__all__ if name.startswith("scale_by_")}
    helpers = {"MezoState", "MezoStep", "mezo", "int8_apply_updates", "int8_decode", "int8_weights"}
    aliases = set(optim.__all__) - cores - helpers - {"stochastic_rounding"}
    assert aliases == {case.make.__name__ for case in CASES.values()}


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_shapes_dtypes_and_state_stay(case, dtype):
    params = odd_tree(dtype)
    state, updates, after = one_update(case(), params)
    assert kinds(updates) == kinds(params)
    assert same(state, after)


@every
@pytest.mark.parametrize("params", [{}, (), {"a": None, "b": {}}], ids=["dict", "tuple", "nested"])
def test_empty_trees(case, params):
    state, updates, after = one_update(case(), params)
    assert updates == params and same(state, after)


@every
def test_extra_arguments_are_taken(case):
    params = odd_tree()
    state, updates, after = one_update(case(), params, value=jnp.zeros(()), unknown=1)
    assert kinds(updates) == kinds(params) and same(state, after)


def test_shapes_that_depend_on_a_traced_number_are_refused():
    with pytest.raises(TypeError, match="rank.*has to be a Python int.*static_args"):
        jax.eval_shape(lambda rank: optim.galore(0.1, rank=rank).init(odd_tree()), 4)


def _first_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def _labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


COMPOSED = {
    "clip": lambda case: optax.chain(optax.clip_by_global_norm(1.0), case()),
    "schedule": lambda case: case(optax.cosine_decay_schedule(0.1, 10)),
    "masked": lambda case: optax.masked(case(), _first_kernel),
    "multi_transform": lambda case: optax.multi_transform({True: case(), False: optax.sgd(0.1)}, _labels),
    "inject_hyperparams": lambda case: optax.inject_hyperparams(case.make, static_args=case.static)(
        case.rate, **case.settings
    ),
    "stochastic_rounding": lambda case: case(stochastic_rounding=True),
    "weight_decay": lambda case: case(weight_decay=0.1, mask=_first_kernel),
}


@every
@pytest.mark.parametrize("compose", COMPOSED.values(), ids=COMPOSED)
def test_composes(case, compose):
    params = odd_tree(jnp.bfloat16)  # what widens it is seen; float32 would hide it
    state, updates, after = one_update(compose(case), params)
    assert kinds(updates) == kinds(params)
    assert same(state, after)


@every
def test_composes_with_multi_steps(case):
    params = odd_tree()
    optimizer = optax.MultiSteps(case(), 2)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert kinds(updates) == kinds(params) and same(state, after)


def problem(seed=0):
    """Return parameters and a loss with its minimum at zero: two layers' worth of least squares, well conditioned."""
    keys = jax.random.split(jax.random.key(seed), 4)
    target = {"w": jax.random.normal(keys[0], (2, 8, 12)) / 2, "bias": jax.random.normal(keys[1], (12,)) / 2}
    inputs = jax.random.normal(keys[2], (2, 64, 8))
    goal = jnp.einsum("lbi,lio->lbo", inputs, target["w"]) + target["bias"]
    params = jax.tree.map(jnp.zeros_like, target)

    def loss(params):
        made = jnp.einsum("lbi,lio->lbo", inputs, params["w"]) + params["bias"]
        return jnp.mean(jnp.square(made - goal))

    return params, loss


@every
def test_converges_and_compiles_once(case):
    params, loss = problem()
    optimizer = case(optax.linear_schedule(case.rate, 0.0, 150), **({"weight_decay": 0.0}))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    state, first = optimizer.init(params), None
    for _ in range(150):
        params, state, value = step(params, state)
        first = value if first is None else first
    assert float(loss(params)) < 0.05 * float(first)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.batched], ids=[n for n, c in CASES.items() if c.batched]
)
def test_a_stack_is_a_batch_of_matrices(case):
    stack = {"kernel": jax.random.normal(jax.random.key(1), (3, 8, 128))}
    apart = {f"kernel{i}": stack["kernel"][i] for i in range(3)}
    optimizer = case(0.1, **({"refresh_every": 1} if "refresh_every" in case.settings else {}))

    def twice(grads):
        state = optimizer.init(grads)
        _, state = optimizer.update(grads, state, grads)
        return optimizer.update(jax.tree.map(jnp.sin, grads), state, grads)[0]

    together, alone = jax.jit(twice)(stack), jax.jit(twice)(apart)
    expected = np.stack([alone[f"kernel{i}"] for i in range(3)])
    np.testing.assert_allclose(together["kernel"], expected, rtol=2e-5, atol=1e-6)


def mesh_of_eight():
    """Return a mesh of the eight faked devices."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@every
def test_sharded_state_stays_sharded(case):
    mesh = mesh_of_eight()
    place = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))  # noqa: E731
    grads = jax.random.normal(jax.random.key(0), (2, 128, 256))
    params = {"kernel": jax.device_put(grads, place(None, "data", "model"))}
    optimizer = case()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    updates, after = update(params, state, params)
    _, again = update(params, after, params)
    assert updates["kernel"].sharding.is_equivalent_to(params["kernel"].sharding, 3)
    large = [leaf for leaf in jax.tree.leaves(after) if leaf.size >= 4096]
    assert all(not leaf.sharding.is_fully_replicated for leaf in large)
    for one, two in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True):
        assert one.sharding.is_equivalent_to(two.sharding, one.ndim)
    alone, _ = jax.jit(optimizer.update)({"kernel": grads}, optimizer.init({"kernel": grads}), {"kernel": grads})
    np.testing.assert_allclose(np.asarray(updates["kernel"]), np.asarray(alone["kernel"]), rtol=2e-3, atol=2e-4)


class LinenModel(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        """Apply them."""
        return nn.Dense(8)(nn.relu(nn.Dense(16)(x)))


@every
def test_in_a_linen_step(case):
    model, x = LinenModel(), jnp.ones((4, 8))

    def step(state, x):
        grads = jax.grad(lambda params: jnp.mean(state.apply_fn({"params": params}, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    state = jax.eval_shape(
        lambda params: train_state.TrainState.create(apply_fn=model.apply, params=params, tx=case()), params
    )
    after = jax.eval_shape(step, state, x)
    assert same(state.opt_state, after.opt_state) and kinds(state.params) == kinds(after.params)


class NnxModel(nnx.Module):
    """Two linear layers."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        """Apply them."""
        return self.down(nnx.relu(self.up(x)))


@pytest.fixture(scope="module")
def nnx_model():
    """Give a model; it is copied, not changed."""
    return NnxModel(nnx.Rngs(0))


@every
def test_in_an_nnx_step(case, nnx_model):
    model = nnx.clone(nnx_model)
    optimizer = nnx.Optimizer(model, case(), wrt=nnx.Param)
    before = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.state(optimizer))]

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer, jnp.ones((4, 8)))
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.state(optimizer))] == before
    assert not np.allclose(model.up.kernel[...], nnx_model.up.kernel[...])


@every
def test_state_keeps_its_dtypes_where_gradients_have_others(case):
    params, grads = odd_tree(jnp.float32), odd_tree(jnp.bfloat16)
    state = jax.eval_shape(case().init, params)
    _, after = jax.eval_shape(case().update, grads, state, params)
    assert same(state, after)
