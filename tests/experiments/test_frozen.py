"""Tests of what the table of frozen weights promises: its trainings are the same training, and its verdict can fail."""

import frozen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt.models import steps

pytestmark = pytest.mark.loose_promotion  # Flax and Optax promote


@pytest.mark.once
def test_both_ways_to_train_adapters_are_the_same_training():
    losses = []
    for training in (frozen.ADAPTERS, frozen.DROPPED):
        step, args, _ = frozen.build(training, "scan", "tiny", ["qkv"], rank=2)
        filled = steps.concrete(dict(zip(("params", "opt_state", "batch"), args, strict=True)))
        params, state, batch = (filled[name] for name in ("params", "opt_state", "batch"))
        run = jax.jit(step)
        for _ in range(2):
            new, state, loss = run(params, state, batch)
            losses.append(float(loss))
            for (path, old), leaf in zip(
                jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new), strict=True
            ):
                if "lora" not in jax.tree_util.keystr(path):
                    np.testing.assert_array_equal(old, leaf)
            params = new
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-6)


def test_adapters_stand_beside_the_named_layers_alone():
    _, (params, _, _), _ = frozen.build(frozen.ADAPTERS, "scan", "tiny", ["out"], rank=2)
    found = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert [name for name in found if "lora" in name] == [
        "['blocks']['attn']['out']['lora_a']", "['blocks']['attn']['out']['lora_b']"
    ]  # fmt: skip
    assert (
        params["blocks"]["attn"]["out"]["lora_b"].shape == (2, 2, 32)
        and params["wte"]["embedding"].dtype == jnp.float32
    )


def test_a_plan_that_keeps_more_for_dropped_gradients_misses():
    rows = [
        {"row": "memopt", "layers": "scan", "training": frozen.ADAPTERS, "residual_bytes": 5, "flops": 9.0},
        {"row": "memopt", "layers": "scan", "training": frozen.DROPPED, "residual_bytes": 5, "flops": 9.0},
        {"row": "plain", "layers": "scan", "training": frozen.DROPPED, "residual_bytes": 50, "flops": 90.0},
    ]
    assert not frozen.misses(rows)
    rows[1]["residual_bytes"] = 6
    assert frozen.misses(rows)
