"""The reference steps: shapes and dtypes of the full ones, and tiny ones that run and learn."""

import jax
import jax.numpy as jnp
import optax
import pytest

from memopt.models import steps

pytestmark = pytest.mark.loose_promotion

FAST = {"xla_backend_optimization_level": 0}
SAME_TINY_FORM = ("gpt_bytes",)
TABLE = [
    ("gpt2", (8, 1_024), jnp.float32, jnp.bfloat16),
    ("llama_1b", (1, 2_048), jnp.bfloat16, jnp.bfloat16),
    ("llama_4l", (4, 2_048), jnp.bfloat16, jnp.bfloat16),
    ("vit_b", (128, 224, 224, 3), jnp.float32, jnp.bfloat16),
]


def primitives(jaxpr):
    """Give the names of all primitives of a jaxpr, inner ones included."""
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                names += primitives(getattr(inner, "jaxpr", inner))
    return names


@pytest.mark.parametrize(("name", "shape", "param_dtype", "dtype"), TABLE)
def test_reference_steps_have_the_sizes_of_the_table(name, shape, param_dtype, dtype):
    step, (state, batch), options = steps.reference_step(name)
    inputs = batch.get("tokens", batch.get("images"))
    assert inputs.shape == shape and options == {"donate_argnums": (0,)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(param_dtype)}
    adam = next(part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
    assert {leaf.dtype for leaf in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(param_dtype)}
    logits = jax.eval_shape(state.apply_fn, {"params": state.params}, inputs)
    assert logits.dtype == dtype
    new, loss = jax.eval_shape(step, state, batch)
    assert loss.shape == () and loss.dtype == jnp.float32
    types = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, new)]
    assert types[0] == types[1]


@pytest.mark.parametrize("name", [name for name in steps.FAMILIES if name not in SAME_TINY_FORM])
def test_a_tiny_step_learns_its_batch_and_moves_its_statistics(name):
    adam = optax.adam(1e-2)
    step, args, _ = steps.reference_step(name, tiny=True, optimizer=adam)
    first, batch = steps.concrete(args)
    run = jax.jit(step).lower(first, batch).compile(FAST)
    state, losses = first, []
    for _ in range(10):
        state, loss = run(state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.98 * losses[0] and int(state.step) == 10
    assert hasattr(state, "batch_stats") == (name in ("resnet", "unet_3d"))
    if hasattr(state, "batch_stats"):
        moved = jax.tree.map(lambda old, new: bool(jnp.any(old != new)), first.batch_stats, state.batch_stats)
        assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_dropout_changes_from_step_to_step_and_repeats_from_its_key(name):
    step, args, _ = steps.reference_step(name, tiny=True, dropout=0.5, optimizer=optax.sgd(0.0))
    state, batch = steps.concrete(args)
    run = jax.jit(step, compiler_options=FAST)
    after, first = run(state, batch)
    assert float(run(state, batch)[1]) == float(first)
    assert float(run(after, batch)[1]) != float(first)


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
@pytest.mark.parametrize("policy", steps.POLICIES)
def test_a_checkpoint_policy_is_added_to_the_blocks(layers, policy):
    step, args, _ = steps.reference_step("gpt2", tiny=True, layers=layers, remat=policy)
    plain, same_args, _ = steps.reference_step("gpt2", tiny=True, layers=layers)
    assert [leaf.shape for leaf in jax.tree.leaves(args)] == [leaf.shape for leaf in jax.tree.leaves(same_args)]
    found, expected = (primitives(jax.make_jaxpr(f)(*a).jaxpr) for f, a in ((step, args), (plain, same_args)))
    assert any(name in ("remat2", "checkpoint") for name in found)
    assert not any(name in ("remat2", "checkpoint") for name in expected)


def test_a_checkpoint_policy_changes_no_value():
    results = []
    for policy in (None, "qkvo"):
        step, args, _ = steps.reference_step("llama_1b", tiny=True, remat=policy)
        results.append(jax.jit(step, compiler_options=FAST)(*steps.concrete(args)))
    (plain, plain_loss), (kept, kept_loss) = results
    assert float(plain_loss) == pytest.approx(float(kept_loss), rel=1e-6)
    for left, right in zip(jax.tree.leaves(plain.params), jax.tree.leaves(kept.params), strict=True):
        assert jnp.allclose(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", steps.FAMILIES)
def test_every_block_can_be_wrapped(name):
    step, args, _ = steps.reference_step(name, tiny=True, remat="nothing")
    found = primitives(jax.make_jaxpr(step)(*args).jaxpr)
    assert any(primitive in ("remat2", "checkpoint") for primitive in found)


def test_small_forms_and_overrides():
    _, (state, batch), _ = steps.reference_step("llama_4l", small=True, batch=2, length=64, depth=3)
    assert batch["tokens"].shape == (2, 64)
    assert sum(name.startswith("block_") for name in state.params) == 3
    assert state.params["embed"]["embedding"].shape == (8_192, 2_048)


@pytest.mark.parametrize(("axis", "shape"), [("batch", (5, 32)), ("length", (2, 5))])
def test_sizes_for_a_search(axis, shape):
    state, batch = steps.make_args("gpt2", axis, tiny=True)(5)
    assert batch["tokens"].shape == shape and state.step.shape == ()


def test_concrete_repeats_from_its_seed():
    args = steps.reference_step("gpt2", tiny=True, dropout=0.1)[1]
    first, again, other = (steps.concrete(args, seed) for seed in (0, 0, 1))
    tokens = [batch["tokens"] for _, batch in (first, again, other)]
    assert (tokens[0] == tokens[1]).all() and (tokens[0] != tokens[2]).any()
    assert jax.tree.structure(first) == jax.tree.structure(args)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (first, args)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("gpt5", {}, ValueError, "no reference step named 'gpt5': choose one of gpt2, "),
        ("gpt2", {"layers": "rolled"}, ValueError, "layers='rolled' is unknown: choose 'scan' or 'unrolled'"),
        ("resnet", {"layers": "scan"}, ValueError, "resnet has no scan form: pass layers='unrolled'"),
        ("lstm", {"layers": "unrolled"}, ValueError, "lstm has no unrolled form: pass layers='scan'"),
        ("gpt2", {"remat": "all"}, ValueError, "no policy named 'all': choose one of nothing, "),
        ("gpt2", {"lenght": 8}, TypeError, "GPT2Config has no field lenght: choose from dropout, "),
    ],
)
def test_what_cannot_be_built_is_named(name, options, error, message):
    with pytest.raises(error, match=message):
        steps.reference_step(name, tiny=True, **options)
