"""Every odd corner through a rewrite: values, types, and how often the host is called."""

import jax
import jax.extend.core as jex
import pytest

from tests import corners, forced, rewrite_checks

CORNERS = list(corners.corners())


REWRITES = {"half": forced.forced(0.5, 1), "all": forced.forced(1.0), "planned": forced.smallest}


@pytest.mark.parametrize("name", CORNERS)
def test_a_corner_is_kept(name):
    corner = corners.corners()[name]
    assert rewrite_checks.check(corner.fn, corner.args, REWRITES["half"], loose=corner.loose) == []


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", ["all", "planned"])
@pytest.mark.parametrize("name", CORNERS)
def test_a_corner_is_kept_by_other_rewrites(name, rewrite):
    corner = corners.corners()[name]
    assert rewrite_checks.check(corner.fn, corner.args, REWRITES[rewrite], loose=corner.loose) == []


@pytest.mark.parametrize("name", [n for n, c in corners.corners().items() if c.gradient])
def test_a_corner_is_kept_by_transformations(name):
    corner = corners.corners()[name]
    wrong = rewrite_checks.check(
        corner.fn, corner.args, REWRITES["half"], compiled=False, gradient=True, batched=corner.batched
    )
    assert wrong == []


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("name", [n for n, c in corners.corners().items() if c.calls])
def test_effects_happen_as_often_as_written(name, rewrite):
    corner = corners.corners()[name]
    assert calls(REWRITES[rewrite], corner) == corner.calls


def test_a_repeated_effect_is_caught():
    def twice(closed):
        eqns = [e.replace() for e in closed.jaxpr.eqns for _ in range(2 if e.primitive.name == "debug_callback" else 1)]
        return jex.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)

    assert calls(twice, corners.corners()["debug_print"]) == 2


def calls(rewrite, corner) -> int:
    """How often the host is called when the rewritten program runs once."""
    new = rewrite(jax.make_jaxpr(corner.fn)(*corner.args))
    corners.CALLS.clear()
    jax.block_until_ready(jax.jit(jex.jaxpr_as_fun(new))(*jax.tree_util.tree_leaves(corner.args)))
    jax.effects_barrier()
    return corners.CALLS["host"]
