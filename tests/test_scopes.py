"""Tests of the marks and of module paths."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from memopt._scopes import check_patterns, keep, mark_of, match_path, module_path, recompute


def stacks(fn, *args):
    """The name stacks of all equations, nested ones included, each joined to those around it."""
    found = []

    def walk(jaxpr, outer):
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            here = f"{outer}/{eqn.source_info.name_stack}"
            found.append((eqn.primitive.name, here))
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        walk(inner, here)

    walk(jax.make_jaxpr(fn)(*args), "")
    return found


def marks(fn, *args, primitive):
    return {mark_of(stack) for name, stack in stacks(fn, *args) if name == primitive}


def test_functions_are_marked_also_through_grad_and_scan():
    inner = keep(jnp.sin)

    @recompute
    def block(x):
        return inner(jnp.exp(x))

    def loss(x):
        return jax.lax.scan(lambda c, _: (block(c), None), x, None, length=3)[0].sum()

    grad = jax.grad(loss)
    assert marks(grad, jnp.ones(4), primitive="exp") == {"recompute"}
    assert marks(grad, jnp.ones(4), primitive="sin") == {"keep"}
    assert marks(grad, jnp.ones(4), primitive="cos") == {"keep"}
    assert marks(jnp.sin, 1.0, primitive="sin") == {None}
    assert block.__name__ == "block"


@pytest.mark.loose_promotion
def test_a_linen_class_keeps_its_name_and_its_parameters():
    class MLP(nn.Module):
        features: int = 4

        @nn.compact
        def __call__(self, x):
            return nn.tanh(nn.Dense(self.features)(x))

    class Model(nn.Module):
        block: type

        @nn.compact
        def __call__(self, x):
            return self.block()(self.block(features=2)(x))

    marked = recompute(MLP)
    x = jnp.ones((2, 3))
    plain_variables = Model(MLP).init(jax.random.key(0), x)
    variables = Model(marked).init(jax.random.key(0), x)
    assert jax.tree.structure(variables) == jax.tree.structure(plain_variables)
    assert set(variables["params"]) == {"MLP_0", "MLP_1"}
    assert (Model(marked).apply(variables, x) == Model(MLP).apply(plain_variables, x)).all()
    assert marks(Model(marked).apply, variables, x, primitive="tanh") == {"recompute"}
    assert marks(Model(MLP).apply, variables, x, primitive="tanh") == {None}


def test_decorated_linen_and_nnx_classes_and_methods():
    @keep
    class Linen(nn.Module):
        def setup(self):
            self.dense = nn.Dense(3)

        def __call__(self, x):
            return jnp.tanh(self.dense(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)

        @recompute
        def inner(self, x):
            return jnp.sin(self.linear(x))

        def __call__(self, x):
            return jnp.tanh(self.inner(x))

    marked = keep(Nnx)
    x = jnp.ones((2, 3))
    variables = Linen().init(jax.random.key(0), x)
    assert marks(Linen().apply, variables, x, primitive="tanh") == {"keep"}
    model = marked(nnx.Rngs(0))
    assert isinstance(model, Nnx)
    assert marks(model, x, primitive="sin") == {"recompute"}
    assert marks(model, x, primitive="tanh") == {"keep"}
    assert marks(Nnx(nnx.Rngs(0)), x, primitive="tanh") == {None}


def test_marking_something_else_is_an_error():
    with pytest.raises(TypeError, match="memopt.keep marks functions, methods and Flax module classes; got 3"):
        keep(3)

    class Bare:
        pass

    with pytest.raises(TypeError, match="Bare has none. Mark a method"):
        recompute(Bare)


def test_module_paths_have_no_transforms_and_no_marks():
    assert module_path("transpose(jvp(GPT))/blocks/0/mlp") == "GPT/blocks/0/mlp"
    assert module_path("transpose(jvp(vmap(GPT)))/vmap(memopt.keep)/mlp") == "GPT/mlp"
    assert module_path("transpose(jvp())/mlp") == "mlp"
    assert module_path("") == ""
    assert mark_of("GPT/mlp") is None


def test_patterns():
    assert match_path("*/mlp", "jvp(GPT)/blocks/0/mlp")
    assert match_path("GPT/blocks/[01]/*", "GPT/blocks/1/attention/query")
    assert not match_path("mlp", "GPT/mlp")
    assert not match_path("*/MLP", "GPT/mlp")
    check_patterns(["*/mlp"], ["jvp(GPT)/mlp"])


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'\*/mpl' matches no module path.*nearest are: 'GPT/mlp'"):
        check_patterns(["*/mlp", "*/mpl"], ["jvp(GPT)/mlp", ""])
    with pytest.raises(ValueError, match="none: the step sets no name scopes"):
        check_patterns(["x"], [""])
