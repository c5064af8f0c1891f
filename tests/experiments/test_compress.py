"""Tests of what the table of codecs counts: in come jaxprs and rows, out go bytes and shares."""

import types

import compress
import jax
import jax.numpy as jnp


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


def test_plans_are_compared_that_repeat_the_same():
    def points(*pairs):
        return [types.SimpleNamespace(recompute_flops=flops, peak_bytes=peak) for flops, peak in pairs]

    base, coded = points((0, 90), (10, 80), (30, 60), (50, 40)), points((5, 70), (10, 50), (20, 45), (60, 20))
    found = compress.matched(base, coded, 40)
    assert [(p.recompute_flops, p.peak_bytes) for p in found] == [(10, 80), (10, 50)]  # 30 and 20 are not the same
    nearest = compress.matched(points((5, 90)), points((3, 50)), 40)
    assert [p.recompute_flops for p in nearest] == [5, 3]  # nothing repeats the same
