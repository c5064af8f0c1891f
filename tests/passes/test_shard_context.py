"""Attention over a split sequence: ring and all-to-all against one device, what they send, what they leave."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import memopt
from memopt import _compat as c
from memopt._collectives import totals
from memopt.models.steps import concrete, reference_step
from memopt.pallas_kernels.attention import reference
from memopt.pallas_kernels.attention.spec import Extras, Spec
from memopt.passes import Shard, _context_ring

pytestmark = pytest.mark.loose_promotion

BATCH, LENGTH, HEADS, KV_HEADS, DIM, WAYS = 2, 32, 8, 4, 8, 4
SPECS = {
    "full": Spec(scale=0.3),
    "causal": Spec(scale=0.3, causal=True),
    "capped": Spec(scale=0.3, causal=True, soft_cap=2.0),
    "shifted": Spec(scale=0.3, causal=True, offset=11),
    "behind": Spec(scale=0.3, causal=True, offset=-9),
    "window": Spec(scale=0.3, causal=True, window=(5, None)),
    "both ways": Spec(scale=0.3, window=(10, 3)),
    "wide window": Spec(scale=0.3, causal=True, window=(17, None)),
}


def operands(kv_heads=KV_HEADS):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(BATCH, LENGTH, n, DIM) for n in (HEADS, kv_heads, kv_heads, HEADS)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def split(form, spec, q, k, v, cotangent):
    """Return output and gradients, on eight devices of which four split the sequence."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, WAYS), ("data", "context"))
    ahead = getattr(_context_ring, f"{form}_forward")
    back = getattr(_context_ring, f"{form}_backward")
    rows, lse = P("data", "context"), P("data", None, None, "context")

    def run(place, q, k, v, cotangent):
        out, lse = ahead(spec, ("context",), WAYS, place, q, k, v)
        return out, *back(spec, ("context",), WAYS, place, q, k, v, out, lse, cotangent), lse

    specs = (P("context"), *(rows,) * 4)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(*(rows,) * 4, lse), check_vma=False)
    return mapped(jnp.arange(WAYS, dtype=jnp.int32), q, k, v, cotangent)[:4]


QUICK = [("ring", "causal"), ("ring", "both ways"), ("ulysses", "causal")]
EVERY = [
    pytest.param(form, name, marks=() if (form, name) in QUICK else pytest.mark.slow)
    for form in ("ring", "ulysses")
    for name in SPECS
]


@pytest.mark.parametrize("form, name", EVERY)
def test_values_and_gradients_are_those_of_one_device(form, name):
    spec, (q, k, v, cotangent) = SPECS[name], operands()
    expected, pull = jax.vjp(lambda *x: reference.attention(spec, *x, None, Extras()), q, k, v)
    found = split(form, spec, q, k, v, cotangent)
    for ours, theirs in zip(found, (expected, *pull(cotangent)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fewer_key_heads_than_devices_are_repeated():
    spec, (q, k, v, cotangent) = SPECS["causal"], operands(kv_heads=2)
    expected, pull = jax.vjp(lambda *x: reference.attention(spec, *x, None, Extras()), q, k, v)
    for ours, theirs in zip(split("ulysses", spec, q, k, v, cotangent), (expected, *pull(cotangent)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, runs",
    [
        ("full", [(1, 2), (3, 1)]),
        ("causal", [(1, 2), (3, 1)]),
        ("window", [(1, 1)]),
        ("both ways", [(1, 1), (2, 1), (3, 1)]),
        ("wide window", [(1, 1), (2, 1), (3, 1)]),
    ],
)
def test_rounds_that_no_device_needs_are_left_out(name, runs):
    first, rest = _context_ring._rounds(SPECS[name], WAYS, LENGTH // WAYS)
    assert [(r.first, r.count) for r in rest] == [r for r in runs if _is_seen(name, r[0])]
    hops = [first.hops] + [r.hops for r in rest for _ in range(r.count)]
    assert hops[-1] == 0 and sum(hops) == rest[-1].first + rest[-1].count - 1


def _is_seen(name, distance):
    """Say, from the mask itself, whether any device sees a pair at this distance along the ring."""
    rows, columns = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    keep = np.ones((LENGTH, LENGTH), bool)
    spec, size = SPECS[name], LENGTH // WAYS
    keep &= columns <= rows + spec.offset if spec.causal else keep
    for left, right in [spec.window] if spec.window else []:
        keep &= columns >= rows - left
        keep &= columns <= rows + right if right is not None else keep
    blocks = keep.reshape(WAYS, size, WAYS, size).any(axis=(1, 3))
    return any(blocks[i, (i - distance) % WAYS] for i in range(WAYS))


def llama(batch=4, **options):
    fn, args, _ = reference_step("llama_1b", tiny=True, batch=batch, **options)
    return fn, args


CASES = [("ring", (2, 4)), ("ulysses", (4, 2)), ("gather", (2, 4))]


@pytest.mark.parametrize(
    "form, shape", [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])]
)
def test_a_llama_with_its_sequence_split(form, shape):
    fn, args = llama()
    args = concrete(args)
    mesh = jax.make_mesh(shape, ("data", "context"))
    passes = [*memopt.passes.default(), Shard(mesh, "zero3+context", least_elements=64, attention=form)]
    step, plain = memopt.optimize(fn, passes=passes), jax.jit(fn)
    (ours, batch), theirs = args, args[0]
    for _ in range(2):
        ours, loss = step(ours, batch)
        theirs, expected = plain(theirs, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), ours, theirs)
    sent = totals(memopt.collectives(step.lower(*args).compile()))
    layers, ways = 2, mesh.shape["context"]
    # Forward: keys and values, ways - 1 times. Backward: the same, and two gradients all the way round.
    rounds = layers * (4 * (ways - 1) + 2 * ways) if form == "ring" else 0
    assert sent.get("collective-permute", (0, 0))[0] == rounds
    names = collections.Counter(eqn.primitive.name for eqn in all_eqns(step.trace(*args).jaxpr))
    assert bool(names["ppermute"]) == (form == "ring") and bool(names["all_to_all"]) == (form == "ulysses")
    assert any(d.choice == "kernel" and f"{form} over context" in d.reason for d in step.plan(*args).decisions) == (
        form != "gather"
    )


def test_state_is_split_over_data_and_sequence():
    fn, args = llama()
    step = memopt.optimize(fn, passes=[Shard(jax.make_mesh((2, 4), ("data", "context")), "zero3+context", 0)])
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[0]))
    held = sum(
        int(np.prod(s.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf, s in zip(jax.tree.leaves(args[0]), jax.tree.leaves(step.shardings(*args)[0][0]), strict=True)
    )
    assert held == pytest.approx(state / 8, rel=0.05)


def test_a_mesh_of_one_axis_splits_the_sequence_alone():
    fn, args = llama(batch=1)
    plan = memopt.optimize(fn, passes=[Shard(jax.make_mesh((8,), ("context",)), "zero3+context")]).plan(*args)
    assert any("ring over context" in d.reason for d in plan.decisions)


def test_an_array_mask_is_left_to_xla_with_the_reason():
    def loss(w, batch):
        h = jnp.take(w, batch["tokens"], axis=0)
        scores = jnp.where(batch["mask"][:, None, :] > 0, jnp.einsum("bqd,bkd->bqk", h, h * 2) * 0.5, -1e30)
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), h * 3).sum()

    w = jnp.ones((16, 8)) * 0.1
    tokens = jnp.zeros((4, 32), jnp.int32)

    def step(w, batch):
        value, grad = jax.value_and_grad(loss)(w, batch)
        return w - grad, value

    passes = [Shard(jax.make_mesh((2, 4), ("data", "context")), "data+context")]
    plan = memopt.optimize(step, passes=passes).plan(w, {"tokens": tokens, "mask": tokens + 1})
    assert any("its mask or bias is an array" in note for note in plan.notes)


def test_heads_that_do_not_divide():
    fn, args = llama(batch=1)
    mesh = jax.make_mesh((8,), ("context",))
    with pytest.raises(ValueError, match=r"4 heads with 2 key heads do not divide over 8. Nearest: 4 devices"):
        memopt.optimize(fn, passes=[Shard(mesh, "context", attention="ulysses")]).plan(*args)


def test_an_unknown_form():
    with pytest.raises(ValueError, match=r"Unknown attention='rings'. Give one of ring, ulysses, gather"):
        Shard(jax.make_mesh((8,), ("context",)), "context", attention="rings")


def all_eqns(jaxpr):
    for eqn in c.open_jaxpr(jaxpr).eqns:
        yield eqn
        for _, _, body in c.subjaxprs(eqn.params):
            yield from all_eqns(body)
