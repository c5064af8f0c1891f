"""Tests of steps over Flax nnx objects: they behave as under `nnx.jit`, and their modules get name scopes."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from memopt import _nnx
from memopt._optimize import optimize
from memopt._scopes import module_path

pytestmark = pytest.mark.loose_promotion  # Flax and Optax promote
BUDGET = "1GiB"
TX = optax.sgd(1e-2, momentum=0.9)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.mlp = MLP(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.mlp(self.norm(x)))


class Model(nnx.Module):
    def __init__(self, rngs, layers):
        self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
        self.head = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.tied = self.head

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.tied(self.head(x))


def make(layers=1):
    model = Model(nnx.Rngs(0), layers)
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


def train(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss


X = jnp.linspace(-1, 1, 12).reshape(3, 4)


def assert_same_state(one, two):
    assert nnx.graphdef(one) == nnx.graphdef(two)
    ours, plain = nnx.to_pure_dict(nnx.state(one)), nnx.to_pure_dict(nnx.state(two))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit])
def test_a_training_step_is_that_of_nnx_jit(wrap):
    traces = []

    def counted(model, optimizer, x):
        traces.append(1)
        return train(model, optimizer, x)

    step, plain = optimize(wrap(counted), budget=BUDGET, passes=[]), nnx.jit(train)
    (one, opt_one), (two, opt_two) = make(), make()
    for _ in range(3):
        np.testing.assert_allclose(step(one, opt_one, X), plain(two, opt_two, X), rtol=1e-5)
    assert len(traces) == 1
    assert_same_state((one, opt_one), (two, opt_two))
    assert int(opt_one.step[...]) == 3
    assert int(one.blocks[0].dropout.rngs.count[...]) == 3
    assert one.head is one.tied


def test_new_attributes_and_structure_are_written_back():
    @optimize(budget=BUDGET, passes=[])
    def step(model, x):
        model.seen = nnx.Variable(x.sum())
        model.extra = nnx.Linear(4, 2, rngs=nnx.Rngs(3))
        return model.extra(x)

    model = MLP(nnx.Rngs(0))
    out = step(model, X)
    assert model.seen[...] == X.sum()
    np.testing.assert_allclose(model.extra(X), out, rtol=1e-6)


def test_objects_are_made_and_returned_inside():
    @optimize(budget=BUDGET, passes=[])
    def step(model, rngs):
        return model, MLP(rngs), rngs.params()

    model, rngs = MLP(nnx.Rngs(0)), nnx.Rngs(1)
    same, other, _ = step(model, rngs)
    assert same is model
    assert isinstance(other, MLP)
    assert int(rngs.default.count[...]) > 0


def test_donation_and_jit_options():
    step = optimize(train, budget=BUDGET, passes=[], donate_argnums=(0, 1))
    model, optimizer = make()
    assert step.measure(model, optimizer, X).alias_bytes > 0
    kernel = model.head.kernel[...]
    step(model, optimizer, X)
    assert kernel.is_deleted()
    step(model, optimizer, X)

    brought = optimize(nnx.jit(lambda m, n: m.down(jnp.ones((n, 8))), static_argnums=1), budget=BUDGET, passes=[])
    assert brought(model.blocks[0].mlp, 2).shape == (2, 4)
    assert brought(model.blocks[0].mlp, 3).shape == (3, 4)


def test_tree_mode_of_nnx_jit():
    step = optimize(nnx.jit(train, graph=False), budget=BUDGET, passes=[])

    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.mlp = MLP(rngs)

        def __call__(self, x):
            return self.mlp(x)

    model = Plain(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = model.mlp.up.kernel[...]
    step(model, optimizer, X)
    assert not (model.mlp.up.kernel[...] == before).all()


def test_a_changed_module_that_is_closed_over_is_an_error():
    model = MLP(nnx.Rngs(0))
    counter = nnx.Variable(jnp.zeros(()))

    @optimize(budget=BUDGET, passes=[])
    def step(x):
        counter[...] = counter[...] + 1
        return model(x)

    with pytest.raises(ValueError, match="changes an nnx object that it closes over.*Pass the object as an argument"):
        step(X)
    assert optimize(model, budget=BUDGET, passes=[])(X).shape == (3, 4)  # reading is fine: constants


class Learner(nnx.Module):
    def __init__(self, rngs):
        self.mlp = MLP(rngs)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    @optimize(budget=BUDGET, passes=[])
    def learn(self, x, *, scale=1.0):
        self.count[...] += 1
        return self.mlp(x) * scale


def test_methods_of_modules():
    learner = Learner(nnx.Rngs(0))
    for _ in range(2):
        learner.learn(X, scale=2.0)
    assert learner.count[...] == 2
    assert learner.learn.measure(X, scale=2.0).peak_bytes > 0
    assert learner.count[...] == 2


def test_asking_changes_nothing_and_shapes_are_enough():
    step = optimize(train, budget=BUDGET, passes=[])
    model, optimizer = make()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    step.trace(model, optimizer, X)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    abstract = nnx.eval_shape(lambda: make())
    assert step.measure(*abstract, X).peak_bytes == step.measure(model, optimizer, X).peak_bytes


def test_functional_steps_stay_plain():
    model = MLP(nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @optimize(budget=BUDGET, passes=[], donate_argnums=0)
    def step(state, x):
        loss = lambda state: (nnx.merge(graphdef, state)(x) ** 2).mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    assert {"up", "down"} <= paths(step, state, X)
    new, value = step(state, X)
    assert step._nnx is None
    assert value.shape == ()
    assert isinstance(nnx.merge(graphdef, new), MLP)


def test_under_transformations():
    step = optimize(lambda m, x: m(x), budget=BUDGET, passes=[])
    model = MLP(nnx.Rngs(0))
    plain = nnx.jit(lambda m, x: m(x))(model, X)  # compiled too: alone, each operation rounds by itself
    np.testing.assert_allclose(nnx.jit(step.__call__)(model, X), plain, rtol=1e-6)
    mapped = nnx.vmap(step.__call__, in_axes=(None, 0))
    np.testing.assert_allclose(mapped(model, X), model(X), rtol=1e-5, atol=1e-6)


def paths(step, *args):
    found = set()

    def walk(jaxpr, outer):
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            here = f"{outer}/{eqn.source_info.name_stack}"
            found.add(module_path(here))
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        walk(inner, here)

    walk(step.trace(*args).jaxpr, "")
    return found


def test_name_scopes_by_attribute_path():
    found = paths(optimize(train, budget=BUDGET, passes=[]), *make(2), X)
    expected = {f"blocks/{i}/{name}" for i in (0, 1) for name in ("norm", "mlp/up", "mlp/down", "mlp", "dropout")}
    assert expected | {"head"} <= found
    assert not any("blocks/0/blocks" in path for path in found)
    assert "memopt" not in Model.__call__.__code__.co_filename


def test_name_scopes_through_nnx_scan_and_remat():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @functools.partial(nnx.vmap, in_axes=0)
            def create(key):
                return MLP(nnx.Rngs(key))

            self.layers = create(jax.random.split(rngs.params(), 3))

        def __call__(self, x):
            @nnx.remat
            def forward(layer, x):
                return layer(x)

            return nnx.scan(lambda x, layer: (forward(layer, x), None), in_axes=(nnx.Carry, 0))(x, self.layers)[0]

    def step(model, x):
        return nnx.grad(lambda m: (m(x) ** 2).mean())(model)

    found = {path.replace("checkpoint/", "").replace("rematted_computation/", "") for path in paths(
        optimize(step, budget=BUDGET, passes=[]), Stack(nnx.Rngs(0)), X
    )}  # fmt: skip
    assert any(path.endswith("layers/up") for path in found), found


def test_scopes_leave_classes_as_they_were_also_in_threads_and_after_errors():
    before = {cls: dict(vars(cls)) for cls in (MLP, Block, Model, nnx.Linear)}
    inside, release, seen = threading.Event(), threading.Event(), []

    def other():
        inside.wait(10)
        seen.append(jax.make_jaxpr(MLP(nnx.Rngs(0)))(X))
        release.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(RuntimeError, match="stop"), _nnx.module_scopes():
        with _nnx.module_scopes():
            pass
        inside.set()
        assert release.wait(30)
        raise RuntimeError("stop")
    thread.join()
    assert {str(eqn.source_info.name_stack) for eqn in seen[0].eqns} == {""}
    for cls, attributes in before.items():
        assert dict(vars(cls)) == attributes
