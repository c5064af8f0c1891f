"""Experiments on sharded steps: what they count by themselves, and the rules that they hold "auto" against."""

import types

import _sharded
import jax
import numpy as np
import pytest
import sharding
import sharding_devices
import sharding_rules
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import memopt
from memopt import _compat as c
from memopt._collectives import Collective


def mesh_of(*shape):
    names = ("fsdp", "tensor")[: len(shape)]
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)


def test_bytes_of_a_state_on_one_device():
    mesh = mesh_of(4, 2)
    state = {"w": jax.ShapeDtypeStruct((8, 6), np.float32), "count": jax.ShapeDtypeStruct((), np.int32)}
    places = {"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), "count": NamedSharding(mesh, PartitionSpec())}
    assert _sharded.state_bytes(state, places) == (2 * 3 * 4 + 4, 8 * 6 * 4 + 4)


@pytest.mark.parametrize("devices, topology", sharding_devices.TOPOLOGIES.items())
def test_topologies_have_their_devices(devices, topology):
    assert _sharded.devices_of(f"tpu:v5p:{topology}") == devices


def test_plans_that_are_held_over_meshes():
    written, quick, small, smallest = plans = [
        types.SimpleNamespace(predicted_overhead=seconds, predicted_peak_bytes=peak)
        for seconds, peak in ((0.0, 90), (0.1, 70), (0.1, 60), (0.4, 20))
    ]
    assert sharding.held_plan(plans, "nothing_repeated") is small and sharding.held_plan(plans, "least") is smallest
    assert sharding.held_plan([written, quick], "nothing_repeated") is quick


def test_one_device_holds_all_of_a_state():
    assert _sharded.state_bytes({"w": jax.ShapeDtypeStruct((8, 6), np.float32)}) == (192, 192)


def test_ticks_are_few_powers_of_two_around_the_values():
    assert sharding_devices.gib_ticks([3.0, 17.0]) == [2, 4, 8, 16, 32]
    wide = sharding_devices.gib_ticks([0.09, 92.0])
    assert wide[0] <= 0.09 and wide[-1] >= 92 and len(wide) <= 9


@pytest.mark.loose_promotion
def test_what_a_plan_says_of_its_collectives():
    step, args = memopt_llama()[:2]
    shard = memopt.passes.Shard(mesh_of(8), strategy="zero3")
    plan = memopt.optimize(step, passes=[shard], target="cpu").plan(*args)
    again = memopt.Plan.from_json(plan.to_json())
    found = _sharded.predicted_sends(again)
    rows = [d for d in plan.decisions if d.collective_seconds is not None]
    assert len(rows) > 1 and found["predicted_sent_bytes"] == sum(d.value_bytes for d in rows)
    assert found["predicted_collective_seconds"] == sum(d.collective_seconds for d in rows) > 0
    assert found["predicted_all-gather_bytes"] > 0


def test_what_a_program_sends_is_summed_by_kind():
    sent = [Collective("all-gather", "a", 800, 8, 2), Collective("all-reduce", "b", 80, 8, 1)]
    found = _sharded.compiled_sends(sent, "cpu")
    assert found["sent_bytes"] == 1400 + 140 and found["all-gather_count"] == 2 and found["all-reduce_bytes"] == 140
    assert found["collective_seconds"] == pytest.approx(sum(one.seconds("cpu") for one in sent))


def test_rules_split_the_embedding_dimension_over_fsdp_and_the_others_over_tensor():
    step, args, _ = memopt_llama()
    placed, batch = sharding_rules.placed(*args, mesh_of(4, 2))
    specs = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(placed)}
    for name, expected in {
        "['embed']['embedding']": ("tensor", "fsdp"),
        "['q']['kernel']": (None, "fsdp", "tensor"),
        "['o']['kernel']": (None, "tensor", "fsdp"),
        "['down']['kernel']": (None, "tensor", "fsdp"),
        "['head']['kernel']": ("fsdp", "tensor"),
    }.items():
        found = [spec for path, spec in specs.items() if path.endswith(name)]
        assert len(found) == 3 and set(found) == {PartitionSpec(*expected)}, name  # a weight and two moments
    assert not any(any(spec) for path, spec in specs.items() if "scale" in path or "count" in path)
    assert {s.spec for s in jax.tree.leaves(batch)} == {PartitionSpec("fsdp")}


def memopt_llama(**options):
    from memopt.models.steps import reference_step

    return reference_step("llama_1b", tiny=True, batch=8, **options)


@pytest.mark.loose_promotion
def test_rules_for_activations_reach_every_module_that_has_one():
    step, args, _ = memopt_llama(remat="nothing")
    mesh = mesh_of(4, 2)
    count = constraints_of(jax.make_jaxpr(sharding_rules.constrained(step, mesh))(*args))
    assert constraints_of(jax.make_jaxpr(lambda *args: step(*args))(*args)) == 0
    # of a block: q, k, v, o, gate, up, down and two norms, forward and again; beside: embed, norm and head
    assert count >= 2 * 9 + 3


def constraints_of(jaxpr):
    """Count the constraints in a jaxpr, bodies included."""
    eqns = c.open_jaxpr(jaxpr).eqns
    inside = sum(constraints_of(body) for eqn in eqns for _, _, body in c.subjaxprs(eqn.params))
    return inside + sum(eqn.primitive.name == "sharding_constraint" for eqn in eqns)


@pytest.mark.loose_promotion
def test_a_checkpointed_step_repeats_flops():
    plain, checkpointed = memopt_llama(), memopt_llama(remat="nothing")
    assert sharding_rules.repeated_share(plain, plain) == 0 < sharding_rules.repeated_share(plain, checkpointed) < 1


def test_one_compilation_gives_figures_and_the_program():
    place = NamedSharding(mesh_of(8), PartitionSpec("fsdp"))
    kept = sharding_rules.Kept(jax.jit(lambda x: x + x.sum(), in_shardings=place))
    memory = memopt.measure(kept, jax.ShapeDtypeStruct((64,), np.float32), target="cpu")
    assert memory.argument_bytes == 32 and memory.fits
    assert [one.kind for one in memopt.collectives(kept.compiled)] == ["all-reduce"]


def test_the_verdict_names_the_rules_that_are_better():
    auto = {"fits": True, "peak_bytes": 10, "collective_seconds": 2.0}
    good = {"mesh": "a", "fits": True, "peak_bytes": 10, "collective_seconds": 2.0}
    small, quick = good | {"mesh": "b", "peak_bytes": 9}, good | {"mesh": "c", "collective_seconds": 1.0}
    over = {"mesh": "d", "fits": False}
    assert sharding_rules.verdict(auto, [good, over]) == "no more than any of them"
    assert sharding_rules.verdict(auto, [good, small, quick]) == "more than by hand on b; c"
    assert sharding_rules.verdict({"fits": False}, [good]).endswith("a")
