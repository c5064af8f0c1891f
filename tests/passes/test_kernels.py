"""Naive attention is found however it is written, replaced with equal values and gradients, or left with a reason.

In: the table of `attention_patterns`, and steps with loops. The structure is asserted on equations: no array of scores
is left anywhere.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _compat as c
from memopt import _inline
from memopt._contract import Context
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.models import steps
from memopt.pallas_kernels.attention import tpu, tpu_backward
from memopt.passes.kernels import Kernels
from memopt.passes.remat import Remat
from tests import eager
from tests.passes.attention_patterns import BATCH, DIM, HEADS, LENGTH, TABLE, WIDTH, Pattern


def _step(pattern: Pattern):
    """Return a training-like step around a pattern, and its arguments: gradients of a loss by all weights."""
    random = np.random.default_rng(0)
    sizes = (HEADS, pattern.kv_heads, pattern.kv_heads)
    weights = [jnp.asarray(random.normal(size=(WIDTH, n * DIM)), jnp.float32) for n in sizes]
    x = jnp.asarray(random.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
    valid = jnp.asarray(random.random((BATCH, LENGTH)) < 0.6).at[1].set(False)

    def loss(weights, x, valid):
        q, k, v = ((x @ w).reshape(BATCH, LENGTH, -1, DIM) for w in weights)
        out = pattern.apply(q, k, v, valid) if pattern.pads else pattern.apply(q, k, v)
        return (jnp.sin(out) * jnp.arange(out.size).reshape(out.shape).astype(jnp.float32)).mean()

    return jax.value_and_grad(loss), (weights, x, valid)


def _flat(step, arguments):
    flat = _inline.inline(jax.make_jaxpr(step)(*arguments))
    return c.close(c.dce(flat)[0], c.jaxpr_consts(flat))


def _rewritten(closed, target=None):
    result = Kernels().rewrite(closed, Context(target=target))
    if result is None or not result.rows:
        return result, closed
    flat = _inline.inline(result.closed)
    flat = c.close(c.dce(flat)[0], c.jaxpr_consts(flat))
    c.check(flat)
    return result, flat


def _primitives(jaxpr):
    for eqn in c.open_jaxpr(jaxpr).eqns:
        yield eqn.primitive.name
        for _, _, body in c.subjaxprs(eqn.params):
            yield from _primitives(body)


def _equal(before, after, arguments, tolerance=2e-6):
    leaves = jax.tree.leaves(arguments)
    for plain, kernel in zip(eager.evaluate(before, *leaves), eager.evaluate(after, *leaves), strict=True):
        plain, kernel = np.asarray(plain, np.float64), np.asarray(kernel, np.float64)
        assert np.abs(plain - kernel).max() <= tolerance * max(np.abs(plain).max(), 1e-6)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("pattern", TABLE, ids=lambda pattern: pattern.name)
def test_what_is_found_and_what_is_left(pattern):
    before = _flat(*_step(pattern))
    result, after = _rewritten(before)
    if pattern.left is None:
        assert result is not None and len(result.rows) == 1, result and result.left
        assert result.left == ()
        assert "scan" in set(_primitives(after)) and "scan" not in set(_primitives(before))
    elif pattern.left:
        assert result is not None and result.rows == () and len(result.left) == 1
        assert re.search(pattern.left, result.left[0].why), result.left
    else:
        assert result is None


@pytest.mark.loose_promotion
@pytest.mark.parametrize("pattern", [p for p in TABLE if p.left is None], ids=lambda pattern: pattern.name)
def test_values_and_gradients_are_equal(pattern):
    step, arguments = _step(pattern)
    before = _flat(step, arguments)
    _, after = _rewritten(before)
    _equal(before, after, arguments, 5e-2 if "half" in pattern.name else 5e-6)


def test_a_table_row_of_each_kind_is_enough():
    assert sum(p.left is None for p in TABLE) >= 25
    assert sum(p.left is not None for p in TABLE) >= 5


def _scanned(apply):
    """Return the gradient of a loss through three scanned layers."""

    def loss(weights, x):
        def layer(x, w):
            q, k, v = ((x @ w[i]).reshape(BATCH, LENGTH, HEADS, DIM) for i in range(3))
            return x + apply(q, k, v).reshape(x.shape), None

        return jnp.sin(jax.lax.scan(layer, x, weights)[0]).sum()

    random = np.random.default_rng(0)
    weights = jnp.asarray(random.normal(size=(3, 3, WIDTH, WIDTH)) * 0.3, jnp.float32)
    return jax.value_and_grad(loss), (weights, jnp.asarray(random.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32))


def _scores_in(jaxpr):
    """Return the shapes of arrays that hold a value for every pair of positions, in any body; masks apart."""
    found = []
    for eqn in c.open_jaxpr(jaxpr).eqns:
        shapes = [v.aval.shape for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        found += [shape for shape in shapes if shape.count(LENGTH) >= 2 and len(shape) >= 5]
        for _, _, body in c.subjaxprs(eqn.params):
            found += _scores_in(body)
    return found


def test_a_pair_of_loops_stacks_outputs_in_place_of_weights():
    step, arguments = _scanned(TABLE[0].apply)
    before = _flat(step, arguments)
    result, after = _rewritten(before)
    assert [row.choice for row in result.rows] == ["kernel"]
    stacked = [v.aval.shape for eqn in c.open_jaxpr(after).eqns if eqn.primitive.name == "scan" for v in eqn.outvars]
    assert (3, BATCH, HEADS, LENGTH, LENGTH) in [
        v.aval.shape for eqn in c.open_jaxpr(before).eqns if eqn.primitive.name == "scan" for v in eqn.outvars
    ]
    assert not [shape for shape in stacked if shape.count(LENGTH) >= 2]
    _equal(before, after, arguments, 5e-6)


def test_a_checkpointed_layer_in_a_loop_is_one_attention():
    step, arguments = _scanned(jax.checkpoint(TABLE[0].apply))
    before = _flat(step, arguments)
    result, after = _rewritten(before)
    assert len(result.rows) == 1
    _equal(before, after, arguments, 5e-6)


def _naive(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.125)
    return jnp.sin(jnp.einsum("bhqk,bkhd->bqhd", weights, v)).sum()


@pytest.mark.parametrize("target", ["tpu:v5e:1x1", "gpu:h100"])
def test_the_platform_decides_on_the_kernel(target):
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    result, after = _rewritten(_flat(jax.grad(_naive, (0, 1, 2)), (q, q, q)), Target.parse(target))
    assert f"{target[:3]} kernel" in result.rows[0].reason
    assert list(_primitives(after)).count("pallas_call") == {"tpu": 2, "gpu": 3}[target[:3]]


def test_kernels_are_laid_out_for_the_kind_of_the_target(monkeypatch):
    asked = []
    for module, name in ((tpu, "forward"), (tpu_backward, "backward")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, run=run: asked.append((run.__name__, args[-1])) or run(*args))
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    _rewritten(_flat(jax.grad(_naive, (0, 1, 2)), (q, q, q)), Target.parse("tpu:v6e:1x1"))
    assert set(asked) == {("forward", "v6e"), ("backward", "v6e")}


def test_what_a_kernel_cannot_serve_gets_the_pure_form_and_the_row_says_why():
    step, arguments = _step(TABLE[0])
    result, _ = _rewritten(_flat(step, arguments), Target.parse("tpu:v5e:1x1"))
    assert "pure JAX: a head size of 4" in result.rows[0].reason


def test_a_forward_pass_alone_is_replaced():
    q = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, HEADS, DIM))
    before = _flat(lambda q: TABLE[0].apply(jnp.sin(q), jnp.cos(q), q * 2), (q,))
    result, after = _rewritten(before)
    assert "forward," in result.rows[0].reason
    _equal(before, after, (q,))


@pytest.mark.loose_promotion
def test_the_planner_takes_causal_attention_for_fewer_flops_and_the_loss_for_memory():
    step, args, _ = steps.reference_step("gpt2", small=True, depth=2, vocabulary=32_768)
    closed = jax.jit(step).trace(*args).jaxpr
    assert [p.name for p in Kernels().parts()] == ["Kernels: attention", "Kernels: losses", "Kernels: gated MLPs"]
    assert Kernels().parts()[0] == Kernels(losses=False, gated_mlps=False)
    ladder = make_ladder(closed, donated=(), target=Target.parse("tpu:v5e:1x1"), passes=[Remat(), Kernels()])
    roomy, tight = (ladder.plan(i) for i in (1, len(ladder.rungs) - 1))
    assert roomy.rewrites == ("Kernels: attention",)
    assert roomy.recompute_flops < 0  # hidden blocks are skipped
    assert tight.rewrites == ("Kernels: attention", "Kernels: losses")
    assert tight.predicted_peak_bytes < roomy.predicted_peak_bytes
