"""Exact forms that are tried when the search is over: no plan is larger, results are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _late, _search
from memopt._network import Choice
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes import Lossless, Remat, default
from tests import eager

TARGET = Target.parse("cpu")


def masked(ws, keeps, x):
    """Layers whose masks come from outside a cheap computation: repeating them would take a matmul."""

    def layer(h, w):
        return jnp.where(h @ w > 0.3, jnp.sin(h) * 0.9, h * 0.5), None

    return jnp.sum(jax.lax.scan(layer, x, ws)[0] * keeps)


def arguments():
    rng = np.random.default_rng(0)
    ws = rng.standard_normal((24, 128, 128)).astype(np.float32) / 11
    return ws, rng.standard_normal((4096, 128)).astype(np.float32), rng.standard_normal((4096, 128)).astype(np.float32)


def ladder(passes):
    closed = jax.make_jaxpr(jax.value_and_grad(masked, argnums=2))(*arguments())
    return make_ladder(closed, donated=[False] * 3, target=TARGET, passes=passes)


def test_masks_that_a_plan_keeps_are_bits_and_change_nothing():
    without, with_forms = ladder([Remat()]), ladder([Remat(), Lossless()])
    stored = [rung for rung in with_forms.rungs if rung.choice.stores]
    assert stored and {s.name for rung in stored for s in rung.choice.stores.values()} == {"bits"}
    for rung in without.rungs:
        assert any(
            other.predicted_peak_bytes <= rung.predicted_peak_bytes and other.recompute_flops <= rung.recompute_flops
            for other in with_forms.rungs
        )
    want = eager.evaluate(without.step.closed, *arguments())
    for got in zip(want, eager.evaluate(stored[-1].closed, *arguments()), strict=True):
        np.testing.assert_array_equal(*got)


def test_each_kind_is_tried_alone_and_small_savings_are_not():
    step = ladder([Remat(), Lossless()]).step
    late = _late.smallest(_late.forms(step))
    assert late and all(s.late and s.error == 0.0 for s in late.values())
    found = _late.choices(step, Choice({}), 1 << 20, late)
    assert len(found) == 1 and found[0].stores
    assert _late.choices(step, Choice({}), 1 << 50, late) == []
    assert _late.choices(step, found[0], 1 << 20, late) == []  # all it keeps is stored already


def test_steps_without_masks_are_planned_as_before(monkeypatch):
    def loss(ws, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), x, ws)[0])

    closed = jax.make_jaxpr(jax.grad(loss))(*arguments()[:2])
    scored = []
    score = _search.Search.score
    monkeypatch.setattr(_search.Search, "score", lambda self, *args: scored.append(args) or score(self, *args))
    counts = []
    for passes in ([Remat()], [Remat(), Lossless()]):
        scored.clear()
        make_ladder(closed, donated=[False] * 2, target=TARGET, passes=passes)
        counts.append(len(scored))
    assert counts[0] == counts[1]


def test_the_default_passes_hold_lossless():
    assert Lossless() in default()


@pytest.mark.parametrize("passes", [[Lossless()]])
def test_alone_it_is_part_of_every_cut(passes):
    found = ladder(passes)
    assert _late.forms(found.step) == []
    assert found.rungs[-1].choice.stores
