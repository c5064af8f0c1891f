"""GPT-2 and Llama compute the same scanned, unrolled and in nnx, and see only the past."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from memopt.models import common, gpt2, gpt2_nnx, llama, steps

pytestmark = pytest.mark.loose_promotion

FAST = {"xla_backend_optimization_level": 0}
MODELS = [(gpt2.GPT2, gpt2.GPT2_TINY), (llama.Llama, llama.LLAMA_TINY)]


@pytest.fixture
def tokens(getkey):
    """Give two sequences of 12 tokens."""
    return jax.random.randint(getkey(), (2, 12), 0, 256)


def filled(model, tokens):
    """Give a model variables without compiling its initialization."""
    return steps.concrete(jax.eval_shape(model.init, jax.random.key(0), tokens))


def jit(fn):
    """Compile quickly, for one run."""
    return jax.jit(fn, compiler_options=FAST)


def pair(model, config):
    """Give the scanned and the unrolled form of a model."""
    return model(config), model(dataclasses.replace(config, scan=False))


@pytest.mark.parametrize(("model", "config"), MODELS)
def test_scanned_equals_unrolled(model, config, tokens):
    scanned, unrolled = pair(model, config)
    params = filled(unrolled, tokens)["params"]
    stacked = common.stack_layers(params)
    expected = jit(unrolled.apply)({"params": params}, tokens)
    got = jit(scanned.apply)({"params": stacked}, tokens)
    assert expected.shape == (2, 12, 256)
    assert jnp.allclose(got, expected, rtol=1e-5, atol=1e-6)
    back = common.unstack_layers(stacked)
    assert jax.tree.all(jax.tree.map(lambda left, right: bool((left == right).all()), back, dict(params)))


@pytest.mark.parametrize(("model", "config"), MODELS)
def test_a_position_sees_only_the_past(model, config, tokens):
    module = model(config)
    variables = filled(module, tokens)
    apply = jit(module.apply)
    before, after = apply(variables, tokens), apply(variables, tokens.at[:, 7].add(1) % 256)
    assert jnp.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not jnp.allclose(before[:, 7:], after[:, 7:], atol=1e-6)


def test_rotation_depends_on_the_distance_alone(getkey):
    table = llama.rotation_table(8, 16, 10_000.0, jnp.float32)
    q, k = (jnp.tile(jax.random.normal(getkey(), (1, 1, 1, 16)), (1, 8, 1, 1)) for _ in range(2))
    scores = jnp.einsum("bqhd,bkhd->qk", llama.rotate(q, table), llama.rotate(k, table))
    assert jnp.allclose(jnp.diag(scores, -3), scores[3, 0], atol=1e-4)
    assert not jnp.allclose(scores[3, 0], scores[4, 0], atol=1e-4)


def test_nnx_equals_linen(tokens):
    linen = gpt2.GPT2(dataclasses.replace(gpt2.GPT2_TINY, scan=False))
    params = filled(linen, tokens)["params"]
    model = gpt2_nnx.from_linen(gpt2.GPT2_TINY, params)
    expected = jit(linen.apply)({"params": params}, tokens)
    assert jnp.allclose(nnx.jit(type(model).__call__)(model, tokens), expected, rtol=1e-5, atol=1e-6)
    assert common.parameter_count(nnx.state(model, nnx.Param)) == common.parameter_count(params)


def test_nnx_step_changes_its_objects_and_learns():
    step, (model, optimizer, batch), options = gpt2_nnx.nnx_step(tiny=True, seed=0, optimizer=optax.adam(1e-2))
    run = nnx.jit(step, **options)
    losses = [float(run(model, optimizer, batch)) for _ in range(6)]
    assert losses[-1] < 0.98 * losses[0] and int(optimizer.step[...]) == 6


def test_nnx_dropout_counts_on():
    step, args, _ = gpt2_nnx.nnx_step(tiny=True, seed=0, dropout=0.5, optimizer=optax.sgd(0.0))
    run = nnx.jit(step)
    assert float(run(*args)) != float(run(*args))


def test_nnx_step_from_shapes_allocates_nothing():
    _, args, options = gpt2_nnx.nnx_step()
    leaves = jax.tree.leaves(nnx.state(args[0], nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves) and options == {"donate_argnums": (0, 1)}
    assert args[2]["tokens"].shape == (8, 1_024)
    assert common.parameter_count(leaves) == 124_439_808 + (50_304 - 50_257) * 768


def test_layers_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="no block_0 among .*scan=False"):
        common.stack_layers({"blocks": 1})
    with pytest.raises(ValueError, match="no blocks among .*scan=True"):
        common.unstack_layers({"block_0": 1})
