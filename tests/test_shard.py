"""Tests of the sharding pass: what it finds on dataflow, equality on eight faked devices, the collectives, errors."""

import collections

import jax
import numpy as np
import pytest

import memopt
from memopt import _compat as c
from memopt._collectives import totals
from memopt.models.steps import concrete, reference_step
from memopt.passes import Shard, _shard_flow, _shard_places, _shard_roles
from tests.shard_steps import BATCH, HIDDEN, LAYERS, LENGTH, STRATEGIES, WIDTH, WORDS, flat_of, make_step, mesh_of

pytestmark = pytest.mark.loose_promotion


def roles_of(step, args):
    flat, context = flat_of(step, args)
    flow = _shard_flow.Flow(flat)
    return flow, _shard_roles.roles(flow, context.paths, context.out_paths), context


def test_roles_of_a_plain_step():
    step, args = make_step()
    flow, roles, context = roles_of(step, args)
    kinds = dict(zip(context.paths, roles.kinds, strict=True))
    assert {kind for path, kind in kinds.items() if path.startswith("[0][0]")} == {"parameter"}
    assert {kind for path, kind in kinds.items() if path.startswith("[0][1]")} == {"moment"}
    assert {kind for path, kind in kinds.items() if path.startswith("[1]")} == {"batch"}
    inside = [v for v, (_, dims) in roles.gradients.items() if dims == (1, 2)]
    assert sorted(v.aval.shape for v in inside) == [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    assert len({roles.gradients[v][0] for v in inside}) == 2


@pytest.mark.parametrize("name", ["gpt2", "llama_1b", "unet_2d"])
def test_roles_of_a_train_state(name):
    step, args, _ = reference_step(name, tiny=True)
    _, roles, context = roles_of(step, args)
    for path, kind in zip(context.paths, roles.kinds, strict=True):
        expected = "batch" if path.startswith("[1]") else "moment" if "mu" in path or "nu" in path else "parameter"
        assert kind == ("other" if path.endswith((".step", ".count")) else expected), path


@pytest.mark.parametrize("name", ["llama_1b", "llama_4l"])
def test_columns_and_rows_of_a_llama(name):
    step, args, _ = reference_step(name, tiny=True, batch=4)
    flat, context = flat_of(step, args)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    placed = Shard(mesh, "tensor").rewrite(flat, context).shardings.arguments
    split = {"q": -1, "k": -1, "v": -1, "gate": -1, "up": -1, "o": -2, "down": -2, "head": -1, "embed": -2}
    seen = set()
    for path, sharding, var in zip(context.paths, placed, c.open_jaxpr(flat).invars, strict=True):
        own = next((n for n in split if f"['{n}']['kernel']" in path or f"['{n}']['embedding']" in path), None)
        if own is not None and ".params" in path:
            seen.add(own)
            spec = (*sharding.spec, *[None] * (var.aval.ndim - len(sharding.spec)))
            assert [d - var.aval.ndim for d, axis in enumerate(spec) if axis] == [split[own]], path
    assert seen == set(split)


QUICK = [("zero2", True), ("zero3", True), ("zero3", False), ("zero3+tensor+sequence", True), ("hierarchical", True)]
CASES = [
    pytest.param(strategy, scan, marks=() if (strategy, scan) in QUICK else pytest.mark.slow)
    for strategy in STRATEGIES
    for scan in (True, False)
]


@pytest.mark.parametrize("strategy, scan", CASES)
def test_same_results_on_a_mesh(strategy, scan):
    fn, args = make_step(scan)
    passes = [Shard(mesh_of(strategy), strategy, least_elements=64)]
    step, plain = memopt.optimize(fn, passes=passes), jax.jit(fn)
    (ours, batch), theirs = args, args[0]
    for _ in range(3):
        ours, loss = step(ours, batch)
        theirs, expected = plain(theirs, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
    assert len(step._core._programs) <= 3 and len(set(map(id, step._core._programs.values()))) == 1
    placed = step.shardings(*args)[0][0]
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(placed), strict=True):
        assert one.sharding.is_equivalent_to(two, one.ndim)


SENT = {  # all-gathers, reduce-scatters, all-reduces of arrays, all-to-alls: of how many elements, each times its runs
    "data": (0, 0, "params", 0),
    "zero1": ("params", "embed + head", "blocks", 0),  # what only the split update reads is scattered by XLA itself
    "zero2": ("params", "params - embed", 0, "rows"),
    "zero3": ("blocks + head", "params - embed", 0, "2 rows"),  # with no budget the gathered weights are kept
    "zero3 in less memory": ("2 blocks + 2 head", "params - embed", 0, "2 rows"),
}


@pytest.mark.parametrize("strategy", SENT)
def test_collectives_are_what_the_strategy_promises(strategy):
    fn, args = make_step()
    name = strategy.split()[0]
    passes = [Shard(mesh_of(name), name, least_elements=64)]
    least = min(point.peak_bytes for point in memopt.optimize(fn, passes=passes).frontier(*args)[1:])
    budget = least if "less" in strategy else None
    step = memopt.optimize(fn, passes=passes, budget=budget, verify=False)
    found = memopt.collectives(step.lower(*args).compile())
    blocks, embed, head = 2 * LAYERS * WIDTH * HIDDEN, WORDS * WIDTH, WIDTH * WORDS
    sizes = {"params": blocks + embed + head, "params - embed": blocks + head, "2 blocks + 2 head": 2 * (blocks + head)}
    sizes |= {"blocks": blocks, "blocks + head": blocks + head, "embed + head": embed + head}
    sizes |= {"rows": BATCH * LENGTH * WIDTH // 8, "2 rows": 2 * BATCH * LENGTH * WIDTH // 8, 0: 0}
    small = 4 * BATCH * LENGTH + 1  # the token indices, the scale's gradient and the loss
    got = collections.Counter()
    for one in found:
        if one.whole_bytes >= small:
            got[one.kind] += one.whole_bytes // 4 * one.times
            assert one.ways == 8
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    assert tuple(got[kind] for kind in kinds) == tuple(sizes[size] for size in SENT[strategy])
    assert totals(found)["all-reduce"][0] >= 1  # the loss


BLOCKS, HEAD, ROWS = 2 * LAYERS * WIDTH * HIDDEN, WIDTH * WORDS, BATCH * LENGTH * WIDTH
#: Elements sent by kind and devices in a group, each times its runs; what is smaller than a part of a weight left out.
BETWEEN = {
    # Weights and gradients over the inner four; new parameters, a quarter each, over the outer two.
    "hierarchical": {
        ("all-gather", 4): BLOCKS + HEAD,
        ("reduce-scatter", 4): BLOCKS + HEAD,
        ("all-gather", 2): (BLOCKS + 2 * HEAD) // 4 + ROWS // 4,
        ("reduce-scatter", 2): HEAD // 4,
        ("all-to-all", 4): 2 * ROWS // 8,
    },
    # No weight moves: partial sums of each layer, forward and backward, of the looked-up rows and of the head's.
    "tensor": {("all-reduce", 8): (2 * LAYERS + 2) * ROWS},
    # The same sums on a quarter of the rows, scattered along the sequence and gathered again: no all-reduce is left.
    "zero3+tensor+sequence": {
        ("reduce-scatter", 2): (2 * LAYERS + 2) * ROWS // 4,  # looked-up rows have a quarter of their features
        ("all-reduce", 2): 0,
        ("reduce-scatter", 4): BLOCKS // 2 + HEAD // 2,
        ("all-gather", 4): BLOCKS // 2 + HEAD // 2,  # the table of words stays where it is
    },
}


@pytest.mark.parametrize("strategy", BETWEEN)
def test_collectives_between_the_devices_of_each_axis(strategy):
    fn, args = make_step()
    step = memopt.optimize(fn, passes=[Shard(mesh_of(strategy), strategy, least_elements=64)], verify=False)
    got = collections.Counter()
    for one in memopt.collectives(step.lower(*args).compile()):
        if one.whole_bytes // 4 > BATCH * LENGTH:
            got[one.kind, one.ways] += one.whole_bytes // 4 * one.times
    promised = BETWEEN[strategy]
    small = {key: size for key, size in got.items() if key not in promised}
    assert {key: got[key] for key in promised} == promised
    assert strategy == "zero3+tensor+sequence" or not small


@pytest.mark.parametrize("strategy", ["zero3", "tensor", "zero3+tensor+sequence"])
def test_predicted_collectives_are_near_what_is_compiled(strategy):
    fn, args = make_step()
    passes = [Shard(mesh_of(strategy), strategy, least_elements=64)]
    least = min(point.peak_bytes for point in memopt.optimize(fn, passes=passes).frontier(*args)[1:])
    budget = least if strategy == "zero3" else None  # gathers of weights are counted as if none is kept
    step = memopt.optimize(fn, passes=passes, budget=budget, verify=False)
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    rows = {d.name: d.value_bytes for d in step.plan(*args).decisions}
    predicted = sum(rows.get(f"shard/{kind}", 0) for kind in kinds)
    compiled = sum(one.sent_bytes for one in memopt.collectives(step.lower(*args).compile()))
    assert predicted == pytest.approx(compiled, rel=0.3)


def test_state_per_device_is_a_share_of_the_total():
    fn, args = make_step()
    step = memopt.optimize(fn, passes=[Shard(mesh_of("zero3"), "zero3", least_elements=0)], donate_argnums=0)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(args))
    assert step.measure(*args).argument_bytes == pytest.approx(total / 8, rel=0.05)
    placed = jax.device_put(args, step.shardings(*args)[0])
    for leaf in jax.tree.leaves(placed):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


def test_weights_are_gathered_in_both_loops_and_not_kept():
    fn, args = make_step()
    flat, context = flat_of(fn, args)
    closed = Shard(mesh_of("zero3"), "zero3", least_elements=64).rewrite(flat, context).closed
    loops = [eqn for eqn in c.open_jaxpr(closed).eqns if eqn.primitive.name == "scan"]
    assert len(loops) == 2
    for loop in loops:
        body = c.open_jaxpr(loop.params["jaxpr"])
        gathers = [
            e for e in body.eqns if e.primitive.name == "sharding_constraint" and not any(e.params["sharding"].spec)
        ]
        assert sorted(e.outvars[0].aval.shape for e in gathers) == [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
        kept = {v for e in gathers for v in e.outvars}
        assert not kept.intersection(v for v in body.outvars if not isinstance(v, c.Literal))


def test_users_shardings_are_kept():
    fn, args = make_step()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    own = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    state, batch = args
    state[0]["embed"] = jax.device_put(state[0]["embed"], own)
    state[0]["head"] = jax.device_put(state[0]["head"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    step = memopt.optimize(fn, passes=[Shard(mesh, "zero1")])
    new, _ = step(state, batch)
    assert new[0]["embed"].sharding.is_equivalent_to(own, 2)
    assert new[0]["head"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    "strategy, shape, names, words",
    [
        ("zero4", (8,), ("data",), "Unknown sharding strategy 'zero4'"),
        ("zero1+zero3", (8,), ("data",), "in two ways"),
        ("zero3+tensor", (8,), ("data",), r"needs 2 mesh axes.*\(4, 2\)"),
        ({"tensor": "modell"}, (8,), ("data",), "names axis 'modell'"),
        ({"tensors": "data"}, (8,), ("data",), "Unknown strategy part 'tensors'"),
    ],
)
def test_a_strategy_that_the_mesh_has_no_axes_for(strategy, shape, names, words):
    with pytest.raises(ValueError, match=words):
        Shard(jax.make_mesh(shape, names), strategy)


def test_no_mesh():
    with pytest.raises(TypeError, match=r"Shard takes a jax.sharding.Mesh"):
        Shard(8)


def test_sizes_that_do_not_divide():
    fn, (state, batch) = make_step()
    odd = jax.tree.map(lambda x: x[:12], batch)
    with pytest.raises(ValueError, match=r"batch of 12 .*8 devices.*Nearest: a batch of 16, or 6 devices"):
        memopt.optimize(fn, passes=[Shard(mesh_of("zero3"))]).plan(state, odd)
    short = jax.tree.map(lambda x: x[:, :6], batch)
    context = Shard(jax.make_mesh((2, 4), ("data", "context")), "data+context")
    with pytest.raises(ValueError, match=r"divisor 6 does not divide over 4 devices.*Nearest: 2 devices"):
        memopt.optimize(fn, passes=[context]).plan(state, short)


def test_a_strategy_that_cannot_apply():
    step, args, _ = reference_step("unet_2d", tiny=True, batch=8)
    mesh = jax.make_mesh((4, 2), ("data", "context"))
    with pytest.raises(ValueError, match=r"no token input \[batch, length\]"):
        memopt.optimize(step, passes=[Shard(mesh, "data+context")]).plan(*args)
    step, args, _ = reference_step("llama_1b", tiny=True, batch=8)
    three = jax.make_mesh((5,), ("model",), devices=jax.devices()[:5])
    with pytest.raises(ValueError, match=r"over 5 devices.*Nearest"):
        memopt.optimize(step, passes=[Shard(three, "tensor")]).plan(*args)


def test_what_is_gathered_is_one_more_alternative_of_the_cut():
    fn, args = make_step()
    passes = [Shard(mesh_of("zero3"), "zero3", least_elements=64)]
    points = memopt.optimize(fn, passes=passes).frontier(*args)[1:]  # without the step as written
    least = min(point.peak_bytes for point in points)
    assert least < max(point.peak_bytes for point in points)
    plan = memopt.optimize(fn, passes=passes, budget=least).plan(*args)
    again = [d for d in plan.decisions if d.choice == "recompute"]
    assert len(again) >= 2 and all("sharding_constraint" in d.name for d in again)


def run_ten(step, plain, args):
    (ours, batch), theirs = args, args[0]
    for _ in range(10):
        ours, loss = step(ours, batch)
        theirs, expected = plain(theirs, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "name, layers", [("gpt2", "scan"), ("gpt2", "unrolled"), ("llama_1b", "scan"), ("unet_2d", None)]
)
def test_ten_steps_of_the_zoo(name, layers, strategy):
    if name == "unet_2d" and ("sequence" in strategy or "context" in strategy):
        pytest.skip("images have no sequence")
    fn, args, _ = reference_step(name, tiny=True, batch=16, layers=layers)
    shape, names = STRATEGIES[strategy]
    if strategy == "tensor":
        shape = (2,)
    mesh = jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])
    step = memopt.optimize(fn, passes=[Shard(mesh, strategy, least_elements=64)])
    run_ten(step, jax.jit(fn), concrete(args))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3", "zero3+tensor"])
def test_ten_steps_of_an_nnx_model(strategy):
    from flax import nnx

    from memopt.models.gpt2_nnx import nnx_step

    fn, ours, _ = nnx_step(tiny=True, batch=16, seed=0)
    theirs = nnx_step(tiny=True, batch=16, seed=0)[1]
    step = memopt.optimize(fn, passes=[Shard(mesh_of(strategy), strategy, least_elements=64)])
    plain = nnx.jit(fn)
    for _ in range(10):
        np.testing.assert_allclose(step(*ours), plain(*theirs), rtol=1e-5)
    for one, two in zip(jax.tree.leaves(nnx.state(ours[0])), jax.tree.leaves(nnx.state(theirs[0])), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-5)


def test_places_hold_no_activations_without_a_batch_axis():
    fn, args = make_step()
    flat, context = flat_of(fn, args)
    flow = _shard_flow.Flow(flat)
    roles = _shard_roles.roles(flow, context.paths, context.out_paths)
    rules = Shard(mesh_of("tensor"), "tensor")._rules(flow, roles, context)
    found = _shard_places.places(flow, roles, rules)
    assert not any("data" in axes for specs in found.made.values() for spec in specs for axes in spec)


def test_kernels_of_a_step_to_be_sharded_are_plain_jax():
    step, args, _ = reference_step("llama_1b", tiny=True, batch=8)
    mesh = memopt.mesh("tpu:v5e:2x4", (8,), ("data",))
    passes = [*memopt.passes.default(), Shard(mesh, "zero3")]
    jaxpr = memopt.optimize(step, passes=passes, target="tpu:v5e:2x4").trace(*args).jaxpr
    assert "pallas_call" not in {eqn.primitive.name for eqn in all_eqns(jaxpr)}


def all_eqns(jaxpr):
    for eqn in c.open_jaxpr(jaxpr).eqns:
        yield eqn
        for _, _, body in c.subjaxprs(eqn.params):
            yield from all_eqns(body)
