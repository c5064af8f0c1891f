"""Explain names what is alive at the peak, why, what repeating it costs, and what would help."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from memopt import _explain_plot, _explain_walk
from memopt._explain import Explanation, explain
from memopt._timeline import simulate
from memopt.models.steps import reference_step

LENGTH, ROWS, WIDTH = 6, 512, 256
LAYER_BYTES = ROWS * WIDTH * 4


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def layer(x, weight):
    with jax.named_scope("mlp"):
        return jnp.tanh(jnp.sin(x @ weight)), None


def loss(weights, x):
    with jax.named_scope("net"):
        x, _ = jax.lax.scan(layer, x, weights)
    return jnp.sum(x * x)


def step(weights, x):
    value, grads = jax.value_and_grad(loss)(weights, x)
    return weights - 0.1 * grads, value


ARGS = (shape(LENGTH, WIDTH, WIDTH), shape(ROWS, WIDTH))


@functools.cache
def explained() -> Explanation:
    return explain(step, *ARGS, target="cpu")


def residuals(explanation):
    return [item for item in explanation.alive if item.kind == "residual"]


def test_a_stacked_residual_carries_the_module_and_line_that_made_it_inside_the_loop():
    stacked = [item for item in residuals(explained()) if item.shape == (LENGTH, ROWS, WIDTH)]
    assert stacked
    assert {item.module for item in stacked} == {"net/mlp", "net"}  # the carry is saved by the loop itself
    assert all("test_explain.py" in item.source for item in stacked)
    assert all(item.bytes == LENGTH * LAYER_BYTES for item in stacked)


def test_a_residual_names_the_backward_equation_that_reads_it():
    stacked = [item for item in residuals(explained()) if item.shape == (LENGTH, ROWS, WIDTH)]
    assert all(item.why.startswith("read last by backward ") and "in a loop" in item.why for item in stacked)
    assert any("of net/mlp" in item.why for item in stacked)


def test_repeating_costs_the_matmuls_back_to_what_is_alive():
    prices = sorted({item.repeat_flops for item in residuals(explained()) if item.shape == (LENGTH, ROWS, WIDTH)})
    whole = 2 * LENGTH * ROWS * WIDTH * WIDTH
    assert prices[0] == 0  # the tanh of what is kept, or a carry
    assert prices[-1] == whole


def test_temporaries_alive_at_the_peak_make_up_the_predicted_temporaries():
    explanation = explained()
    assert sum(explanation.by_module().values()) == pytest.approx(explanation.temp_bytes, rel=0.1)
    assert max(sample.temp_bytes for sample in explanation.timeline) == explanation.temp_bytes


def test_the_timeline_shows_every_iteration_of_a_loop():
    heights = [sample.temp_bytes for sample in explained().timeline]
    loops = [sample.equation for sample in explained().timeline]
    assert max(loops.count(index) for index in set(loops)) >= LENGTH
    assert min(heights) < max(heights)


def test_loops_inside_a_shard_map_are_shown_with_their_module_and_iterations():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(specs[0], specs[0]), check_vma=False)
    explanation = explain(mapped, *ARGS, target="cpu")
    assert explanation.temp_bytes >= explained().temp_bytes
    assert "net/mlp" in explanation.by_module()
    loops = [sample.equation for sample in explanation.timeline]
    assert max(loops.count(index) for index in set(loops)) >= LENGTH


def test_a_matmul_moved_behind_a_loop_may_have_a_dead_equation_there():
    def late(a, b, x, weights):
        late_product = jnp.tanh(x @ a) @ b
        y, _ = jax.lax.scan(layer, jnp.sin(x @ a), weights)
        jnp.cos(y @ a)
        return jnp.sum(late_product) + jnp.sum(y)

    square = shape(WIDTH, WIDTH)
    explanation = explain(late, square, square, *reversed(ARGS), target="cpu")
    assert explanation.temp_bytes >= 2 * LAYER_BYTES


def test_an_argument_that_an_output_could_reuse_is_advised_to_be_donated():
    donations = [item for item in explained().advice if item.text.startswith("Donate")]
    assert [item.text for item in donations] == [
        "Donate argument 0 (donate_argnums=0): 1 of 1 leaves can hold an output."
    ]
    assert donations[0].bytes == LENGTH * WIDTH * WIDTH * 4


def test_a_donated_argument_is_not_advised_again():
    explanation = explain(step, *ARGS, target="cpu", donate_argnums=0)
    assert not [item for item in explanation.advice if item.text.startswith("Donate")]
    assert explanation.alias_bytes == LENGTH * WIDTH * WIDTH * 4
    assert explanation.peak_bytes == explained().peak_bytes - explanation.alias_bytes


def test_a_jitted_function_brings_its_donation():
    assert explain(jax.jit(step, donate_argnums=0), *ARGS, target="cpu").alias_bytes == LENGTH * WIDTH * WIDTH * 4


def test_a_keyword_argument_is_named_in_the_advice():
    text = explain(lambda *, x: x + 1, x=shape(64, 64), target="cpu").advice[0].text
    assert text == "Donate argument 'x' (donate_argnames='x'): 1 of 1 leaves can hold an output."


def test_a_large_constant_closed_over_is_found():
    table = jnp.ones((1024, 512))
    explanation = explain(lambda x: x @ table, shape(8, 1024), target="cpu")
    assert [item.bytes for item in explanation.alive if item.kind == "constant"] == [2 * 2**20]
    assert any(
        item.text.startswith("Pass the constant float32[1024, 512] as an argument") for item in explanation.advice
    )


def test_advice_comes_in_order_of_bytes():
    sizes = [item.bytes for item in explained().advice]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) >= 3


def test_a_plain_inference_function_is_explained():
    explanation = explain(lambda w, x: jax.lax.scan(layer, x, w)[0], *ARGS, target="cpu")
    assert explanation.peak_bytes >= explanation.argument_bytes + explanation.output_bytes
    assert not [item for item in residuals(explanation) if "backward" in item.why]


def test_json_brings_back_the_same_explanation():
    assert Explanation.from_json(explained().to_json()) == explained()


@pytest.mark.parametrize("text", ["[]", "{}", json.dumps({"version": 2})])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="no explanation of version 1"):
        Explanation.from_json(text)


def test_it_prints_what_a_reader_asks_for():
    text = str(explained())
    assert text.startswith("Predicted peak on cpu: ")
    for words in ("net/mlp", "test_explain.py", "residual", "What would help", "Donate argument 0", "GFLOP"):
        assert words in text


def test_compiling_puts_the_compilers_figures_beside_the_predicted_ones():
    explanation = explain(step, *ARGS, target="cpu", compile=True)
    assert explanation.compiled is not None
    assert explanation.compiled["peak_bytes"] > explanation.compiled["argument_bytes"]
    assert " compiled" in str(explanation) and " compiled" not in str(explained())


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "timeline.png"
    explained().to_png(path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    "stack, path",
    [
        ("transpose(jvp(GPT2))/blocks/while/body/attn", "GPT2/blocks/attn"),
        ("jvp(GPT2)/GPT2._scanned/blocks/attn/bqhd,bkhd->bhqk", "GPT2/blocks/attn"),
        ("jit(step)/vmap(jvp(net))/checkpoint/rematted_computation/mlp", "step/net/mlp"),
        ("", ""),
    ],
)
def test_module_paths_have_their_wrappers_taken_off(stack, path):
    assert _explain_walk.module_path(stack) == path


def test_equal_layers_are_one_module():
    assert _explain_walk.general("GPT2/block_11/attn") == "GPT2/block_*/attn"
    assert _explain_walk.general("net/blocks/0/mlp2") == "net/blocks/*/mlp2"


def test_groups_of_a_picture_split_the_largest_module_first():
    sizes = {"net/a/x": 500, "net/a/y": 400, "net/b": 300, "net/tiny": 1, "": 10}
    assert _explain_plot.top_modules(sizes, limit=3) == ["net/a/x", "net/a/y", "net/b"]
    assert _explain_plot.top_modules(sizes, limit=2) == ["net/a", "net/b"]
    assert _explain_plot.group_of("net/a/x", ["net/a", "net"]) == "net/a"
    assert _explain_plot.group_of("", ["net"]) == _explain_plot.NO_MODULE
    assert _explain_plot.group_of("elsewhere", ["net"]) == _explain_plot.OTHER


@pytest.mark.loose_promotion
def test_a_step_with_checkpoints_is_explained_with_their_barriers():
    """Without them its recomputations would be merged with what they repeat: 18 % more were then predicted here."""
    step, shapes, _ = reference_step("vit_b", layers="unrolled", remat="dots", small=True)
    written = simulate(jax.jit(step).trace(*shapes).jaxpr, target="tpu:v5e")
    assert explain(step, *shapes, target="tpu:v5e").peak_bytes == written.peak_bytes
