"""Random training steps through the planner and forced repeats: the generator's promises, wrong rewrites caught.

``MEMOPT_RANDOM_PROGRAMS`` says how many programs run (30 by default, 1,000 or more in CI).
"""

import os

import jax
import jax.extend.core as jex
import numpy as np
import pytest

from memopt._fingerprint import jaxpr_digest
from tests import eager, forced, random_programs, rewrite_checks
from tests.random_layers import LAYERS
from tests.random_models import WRAPPERS
from tests.random_steps import STEPS

COUNT = int(os.environ.get("MEMOPT_RANDOM_PROGRAMS", "30"))


def damaged(closed: jex.ClosedJaxpr, damage) -> jex.ClosedJaxpr:
    """Replace the first equation that ``damage`` answers for, searching from the last one."""
    eqns = list(closed.jaxpr.eqns)
    for i in reversed(range(len(eqns))):
        new = damage(eqns[i])
        if new is not None:
            eqns[i] = new
            return jex.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)
    return closed


def swap_operands(eqn):
    """Turn ``a - b`` of equal types into ``b - a``."""
    a = [v.aval for v in eqn.invars]
    if eqn.primitive.name == "sub" and a[0].shape == a[1].shape and a[0].dtype == a[1].dtype == np.float32:
        return eqn.replace(invars=eqn.invars[::-1])
    return None


def drop_contribution(eqn):
    """Turn ``a + b`` of equal types into ``a + a``: one contribution is lost."""
    a = [v.aval for v in eqn.invars]
    if eqn.primitive.name in ("add", "add_any") and a[0] == a[1] and a[0].dtype == np.float32:
        return eqn.replace(invars=[eqn.invars[0], eqn.invars[0]])
    return None


def checked(seed: int) -> list[str]:
    """What is wrong with a program's rewrite, with the seed in what it raises."""
    try:
        return random_programs.check_program(seed, forced.drawn(seed))
    except Exception as error:  # noqa: BLE001 (whatever it is, it is raised again, with the seed)
        error.add_note(random_programs.make_program(seed).description)
        raise


@pytest.mark.parametrize("start", range(0, COUNT, 10))
def test_values_are_kept(start):
    wrong = [line for seed in range(start, min(start + 10, COUNT)) for line in checked(seed)]
    assert wrong == []


@pytest.mark.parametrize("option", ["compiled", "optimised", "gradient", "batched"])
def test_the_deep_checks_accept_what_is_right(option):
    assert random_programs.check_program(3, forced.forced(0.5), **{option: True}) == []


@pytest.mark.parametrize("damage", [swap_operands, drop_contribution])
def test_wrong_rewrites_are_caught(damage):
    caught = changed = 0
    for seed in (0, *range(2, 12)):  # seed 1 ends in a sum of two gradients that are zero: dropping one changes nothing
        program = random_programs.make_program(seed)
        closed = jax.make_jaxpr(program.fn)(*program.args)
        wrong = damaged(closed, damage)
        if wrong is not closed:
            changed += 1
            found = random_programs.check_program(
                seed, lambda c, d=damage: damaged(c, d), compiled=False, optimised=False, gradient=False, batched=False
            )
            caught += bool(found)
    assert changed >= 7 and caught >= changed - 1  # what is dropped may be zero: in seed 8 nothing changes


def test_keys_stacked_by_a_loop_of_no_trips():
    closed = jax.make_jaxpr(lambda k: jax.lax.scan(lambda h, k: (h, k), jax.numpy.float32(0), k)[1])(
        jax.random.split(jax.random.key(0), 0)
    )
    (keys,) = eager.evaluate(closed, jax.random.split(jax.random.key(0), 0))
    assert keys.shape == (0,) and keys.dtype == jax.random.key(0).dtype


def test_what_jax_cannot_run_is_no_program():
    dropped, kept = random_programs.make_program(301072), random_programs.make_program(7)
    assert rewrite_checks.can_run(jax.make_jaxpr(kept.fn)(*kept.args))
    assert not rewrite_checks.can_run(jax.make_jaxpr(dropped.fn)(*dropped.args))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(dropped.fn).lower(*dropped.args)


def test_wrong_types_are_caught():
    def swap_results(closed):
        return jex.ClosedJaxpr(closed.jaxpr.replace(outvars=closed.jaxpr.outvars[::-1]), closed.consts)

    closed = jax.make_jaxpr(lambda x: (x * 2, x[0]))(np.ones(3, np.float32))
    assert "result 0" in rewrite_checks.type_differences(closed, swap_results(closed))[0]
    weak = jax.make_jaxpr(lambda x: x)(2.0)
    strong = jax.make_jaxpr(lambda x: x)(np.float32(2.0))
    assert "weak type" in rewrite_checks.type_differences(weak, strong)[0]


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (np.float32([1, 2]), np.float32([1, 2.00001]), ""),
        (np.float32([1, 2]), np.float32([1, 2.0001]), "tolerance 1e-05"),
        (np.int32([1, 2]), np.int32([1, 3]), "1 of 2 elements differ"),
        (np.float32([1]), np.float32([[1]]), "instead of"),
        (np.float32([1, np.nan]), np.float32([1, np.nan]), ""),
        (np.float32([1, np.inf]), np.float32([1, 5]), "not finite"),
    ],
)
def test_differences(a, b, says):
    line = rewrite_checks.difference(a, b)
    assert says in line and bool(line) == bool(says)


def test_a_seed_is_one_program():
    first, second = random_programs.make_program(11), random_programs.make_program(11)
    assert first.description == second.description
    digests = {jaxpr_digest(jax.make_jaxpr(one.fn)(*one.args)) for one in (first, second)}
    assert len(digests) == 1


def test_the_programs_are_what_they_should_be():
    programs = [random_programs.make_program(seed) for seed in range(1000)]
    seen = frozenset().union(*(p.features for p in programs))
    assert not (set(LAYERS) | set(WRAPPERS) | set(STEPS)) - seen
    trained = sum(any(STEPS[n].differentiates for n in p.features & set(STEPS)) for p in programs)
    scanned = sum(bool(p.features & {"scan", "scan_reverse", "scan_remat", "scan_unroll", "nested"}) for p in programs)
    assert trained >= 600 and scanned >= 333


@pytest.mark.parametrize("seed", [2, 5, 8])
def test_values_are_finite(seed):
    program = random_programs.make_program(seed)
    leaves = jax.tree_util.tree_leaves(program.args)
    for value in eager.evaluate(jax.make_jaxpr(program.fn)(*program.args), *leaves):
        if not jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            assert np.all(np.isfinite(np.asarray(value).astype(np.float64)))


@pytest.mark.parametrize("seed", [1, 4, 9])
def test_evaluation_equals_jit(seed):
    program = random_programs.make_program(seed)
    closed = jax.make_jaxpr(program.fn)(*program.args)
    leaves = jax.tree_util.tree_leaves(program.args)
    expected = jax.jit(jex.jaxpr_as_fun(closed))(*leaves)
    wide = 2e-2 if "bf16" in program.features else 1e-4
    pairs = zip(expected, eager.evaluate(closed, *leaves), strict=True)
    assert [line for a, b in pairs if (line := rewrite_checks.difference(a, b, wide))] == []
