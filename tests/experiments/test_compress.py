"""Tests of what the table of codecs counts: in come jaxprs and rows, out go bytes and shares."""

import types

import compress
import jax
import jax.numpy as jnp
import pytest

import memopt
from memopt.models import steps


def test_stacks_that_a_reverse_loop_reads_are_counted():
    def loss(w, x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c * w), None), x, None, length=5)[0].sum()

    closed = jax.make_jaxpr(jax.grad(loss))(jnp.ones(16), jnp.ones(16))
    assert compress.stacked_bytes(closed) % (5 * 16 * 4) == 0 < compress.stacked_bytes(closed)
    assert compress.stacked_bytes(jax.make_jaxpr(loss)(jnp.ones(16), jnp.ones(16))) == 0


def test_a_row_says_how_much_of_what_is_saved_temporaries_fall_by():
    base = {"residual_bytes": 100, "temp_bytes": 300}
    found = compress.compared(base, {"residual_bytes": 50, "temp_bytes": 255})
    assert (found["residual_share"], found["fall_share"]) == (0.5, 0.9)
    assert "fall_share" not in compress.compared(base, base)


def test_the_smallest_plan_within_some_flops_is_taken():
    points = [
        types.SimpleNamespace(recompute_flops=f, peak_bytes=p) for f, p in ((5, 90), (10, 80), (30, 60), (50, 40))
    ]
    assert [compress.smallest(points, most).peak_bytes for most in (50, 40, 10, 1)] == [40, 60, 80, 90]


@pytest.mark.slow
@pytest.mark.loose_promotion
def test_a_plan_in_few_bits_repeats_what_the_base_repeats():
    built, target = steps.reference_step("gpt2", layers="scan", tiny=True), "tpu:v5e:1x1"
    remat = [memopt.passes.Remat()]
    most = 0.1 * memopt.matmul_flops(jax.jit(built[0]).trace(*built[1]).jaxpr)
    base = compress.least(built, remat, target, most, {})
    passes = [*remat, memopt.passes.Compress("int4", always=True)]
    want = base.plan(*built[1])
    plan = compress.coded(built, passes, target, base).plan(*built[1])
    assert 0 < want.recompute_flops <= plan.recompute_flops
    names = {d.name for d in want.decisions if d.choice == "recompute"}
    assert names and not [d.name for d in plan.decisions if d.name in names and d.choice == "int4"]
    assert "int4" in {d.choice for d in plan.decisions}
