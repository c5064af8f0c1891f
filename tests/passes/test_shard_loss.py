"""The vocabulary loss of a sharded step: slices within each device's part, equal results, and what is sent for it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import memopt
from memopt import _compat as c
from memopt._searching import context_for
from memopt.models.steps import concrete, reference_step
from memopt.passes import Kernels, Shard, _loss_call
from memopt.passes.kernels import Kernels as Pass
from tests.shard_steps import mesh_of

BATCH, LENGTH, WIDTH, WORDS, CHUNK = 16, 8, 16, 1040, 96
HEAD_BYTES = 4 * WIDTH * WORDS
#: Strategies that split features, and their devices along the axis of features.
PARTS = {"tensor": 8, "zero3+tensor": 2, "zero3+tensor+sequence": 2}


@dataclasses.dataclass(frozen=True)
class Losses:
    """The kernels' losses alone, whatever the budget."""

    stage: ClassVar[int] = Pass.stage
    optional: ClassVar[bool] = False
    name: ClassVar[str] = "losses"

    def propose(self, survey: Any) -> tuple[()]:
        """Propose nothing."""
        return ()

    def rewrite(self, closed: Any, context: Any) -> Any:
        """Return the step with its loss exchanged."""
        return Kernels(attention=False, gated_mlps=False).rewrite(closed, context)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Walk the vocabulary in slices of `CHUNK` words, with a rest at the end."""
    monkeypatch.setattr(_loss_call, "chunk_size", lambda tokens, vocab: min(vocab, CHUNK))


def make_step(words=WORDS, tied=False):
    """Return a step whose loss is all there is of it, or with the head as a table of words, and its arguments."""

    def loss_of(params, batch):
        hidden = params["head"][batch["labels"]] if tied else batch["hidden"]
        logits = jnp.tanh(hidden @ params["first"]) @ (params["head"].T if tied else params["head"])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1))

    def step(params, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    keys = jax.random.split(jax.random.key(0), 4)
    head = jax.random.normal(keys[0], (words, WIDTH)) * 0.3
    params = {"head": head if tied else head.T, "first": jax.random.normal(keys[1], (WIDTH, WIDTH))}
    hidden = jax.random.normal(keys[2], (BATCH, LENGTH, WIDTH))
    labels = jax.random.randint(keys[3], (BATCH, LENGTH), 0, words)
    return step, (params, {"labels": labels} if tied else {"hidden": hidden, "labels": labels})


def sharded(step, strategy, **settings):
    passes = [Losses(), Shard(mesh_of(strategy), strategy, least_elements=64)]
    return memopt.optimize(step, passes=passes, verify=False, **settings)


def loss_row(planned, args):
    return next(d for d in planned.plan(*args).decisions if "linear_cross_entropy" in d.name)


def assert_equal_steps(planned, step, args):
    ours, theirs, plain = args[0], args[0], jax.jit(step)
    for _ in range(3):
        ours, loss = planned(ours, args[1])
        theirs, expected = plain(theirs, args[1])
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", ["zero3", *PARTS, "zero2+context"])
def test_the_loss_of_a_sharded_step_equals_that_of_one_device(strategy, tied):
    step, args = make_step(tied=tied)
    planned = sharded(step, strategy)
    assert_equal_steps(planned, step, args)
    parts = PARTS.get(strategy)
    assert ("in slices of" in loss_row(planned, args).reason) is (parts is not None)
    assert parts is None or f"of {parts} parts" in loss_row(planned, args).reason


@pytest.mark.loose_promotion
@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama_1b", marks=pytest.mark.slow)])
def test_the_loss_of_a_zoo_model_equals_that_of_one_device(name):
    step, args, _ = reference_step(name, tiny=True, batch=16)
    args = concrete(args)
    planned = sharded(step, "zero3+tensor+sequence")
    assert "in slices of 2 parts" in loss_row(planned, args).reason
    ours, loss = planned(*args)
    theirs, expected = jax.jit(step)(*args)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-5)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("strategy", ["zero3", "zero3+tensor+sequence", "tensor"])
def test_a_slice_of_the_head_is_all_that_is_brought_together_at_a_time(strategy):
    step, args = make_step()
    found = memopt.collectives(sharded(step, strategy).lower(*args).compile())
    gathers = [one for one in found if one.kind == "all-gather"]
    assert max((one.whole_bytes for one in gathers), default=0) <= max(4 * CHUNK * WIDTH, 4 * BATCH * LENGTH * WIDTH)
    ways = PARTS.get(strategy, 1)
    slices = [one for one in gathers if one.whole_bytes != 4 * WIDTH * WIDTH and one.times > 1]
    rest = HEAD_BYTES // ways // (4 * WIDTH) % CHUNK * 4 * WIDTH
    whole = HEAD_BYTES // ways - rest
    assert sum(one.whole_bytes * one.times for one in slices) == (0 if strategy == "tensor" else 2 * whole)
    # No logit is sent: of sums over the vocabulary a number a token, of the gradients rows and parameters once.
    sums = sum(one.whole_bytes * one.times for one in found if one.kind in ("all-reduce", "reduce-scatter"))
    rows = 4 * BATCH * LENGTH
    assert sums <= HEAD_BYTES + rows * WIDTH * 2 + 8 * rows


@pytest.mark.tpu_aot
@pytest.mark.parametrize("strategy, ways", [("zero3", 1), ("zero3+tensor+sequence", 2)])
def test_on_tpus_too_a_slice_alone_is_brought_together(strategy, ways, monkeypatch):
    """XLA:CPU takes a gather of the whole weight out of the loop; XLA:TPU runs it for each slice."""
    monkeypatch.setattr(_loss_call, "chunk_size", lambda tokens, vocab: min(vocab, 512))
    width, words = 256, 8192
    step, (params, batch) = make_step()
    shapes = {"head": (width, words), "first": (width, width), "hidden": (BATCH, 256, width), "labels": (BATCH, 256)}

    def shaped(path, x):
        return jax.ShapeDtypeStruct(shapes[path[-1].key], x.dtype)

    args = jax.tree_util.tree_map_with_path(shaped, (params, batch))
    shape, names = ((4,), ("data",)) if ways == 1 else ((2, 2), ("data", "model"))
    mesh = memopt.mesh("tpu:v5e:2x2", shape, names)
    passes = [Losses(), Shard(mesh, strategy, least_elements=64)]
    planned = memopt.optimize(step, passes=passes, target="tpu:v5e:2x2", verify=False)
    found = memopt.collectives(planned.lower(*args).compile())
    slices = [one for one in found if one.kind == "all-gather" and one.times > 1]
    assert {one.whole_bytes for one in slices} == {2 * 512 * width}  # matmuls of float32 take bfloat16
    assert sum(one.times for one in slices) == 2 * words // ways // 512


@pytest.mark.loose_promotion
@pytest.mark.parametrize("strategy", ["zero3+tensor", "zero3+tensor+sequence"])
def test_no_logit_is_sent_without_kernels_either(strategy):
    step, args = make_step()
    planned = memopt.optimize(step, passes=[Shard(mesh_of(strategy), strategy, least_elements=64)], verify=False)
    found = memopt.collectives(planned.lower(*args).compile())
    assert max(one.whole_bytes for one in found) <= HEAD_BYTES // 2  # of the logits one device has twice as much
    assert_equal_steps(planned, step, args)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("rows", [None, "data"])
def test_a_head_that_comes_sharded_is_sliced_within_its_parts(rows):
    step, args = make_step()
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    places = {"head": P(rows, "model"), "first": P()}, {"hidden": P("data"), "labels": P("data")}
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), args, places)
    planned = memopt.optimize(step, passes=[Losses()], verify=False)
    found = memopt.collectives(planned.lower(*placed).compile())
    assert max((one.whole_bytes for one in found if one.kind == "all-gather"), default=0) <= 4 * CHUNK * WIDTH
    np.testing.assert_allclose(planned(*placed)[1], jax.jit(step)(*args)[1], rtol=1e-6)


@pytest.mark.loose_promotion
def test_a_vocabulary_that_does_not_divide_is_said():
    step, args = make_step(words=1041)
    planned = sharded(step, "zero3+tensor+sequence")
    assert "a vocabulary of 1041 does not divide over 2 devices" in loss_row(planned, args).reason
    assert_equal_steps(planned, step, args)


@pytest.mark.loose_promotion
def test_features_are_split_along_the_vocabulary():
    step, args = make_step()
    placed = sharded(step, "zero3+tensor+sequence").shardings(*args)[0][0]["head"]
    assert placed.spec == P("data", "model")


def test_each_choice_of_a_search_has_its_own_parts():
    @dataclasses.dataclass(frozen=True)
    class Split:
        partitions: int
        feature_parts: int = 1

    known = memopt._contract.Context(target=None)
    assert (context_for([Split(4, 2)], known).partitioned, context_for([Split(4, 2)], known).feature_parts) == (4, 2)
    assert Shard(mesh_of("zero3+tensor"), "zero3+tensor").feature_parts == 2
    assert Shard(mesh_of("zero3"), "zero3").feature_parts == Shard(mesh_of("zero3"), "auto").feature_parts == 1


def test_no_array_of_the_step_is_as_large_as_the_logits():
    step, args = make_step()
    jaxpr = sharded(step, "zero3+tensor+sequence").trace(*args).jaxpr
    assert max(v.aval.size for eqn in _eqns(jaxpr) for v in eqn.outvars) < BATCH * LENGTH * WORDS


def _eqns(jaxpr):
    for eqn in c.open_jaxpr(jaxpr).eqns:
        yield eqn
        for _, _, body in c.subjaxprs(eqn.params):
            yield from _eqns(body)
