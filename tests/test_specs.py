"""The device table: known public figures, the rules for float32 and 8-bit types, and what the CPU is measured to be."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from memopt._calibrate import calibrate
from memopt._specs import DeviceSpec, spec_for
from memopt._target import Target

KINDS = ["tpu:v4", "tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:7x", "gpu:a100", "gpu:h100", "gpu:h200", "gpu:b200"]


@pytest.mark.parametrize("text", KINDS)
def test_each_kind_has_plausible_figures_and_names_its_source(text):
    spec = spec_for(Target.parse(text))
    platform, kind = text.split(":")
    assert spec.platform == platform and kind in spec.name
    assert 10e9 < spec.memory_bytes < 300e9
    assert 5e11 < spec.memory_bytes_per_second < 1e13
    assert 1e14 < spec.matmul_rate("bfloat16") < 3e15
    assert spec.vector_flops_per_second < spec.matmul_rate("bfloat16") / 10
    assert spec.host_bytes_per_second < spec.link_bytes_per_second < spec.memory_bytes_per_second
    assert ".com" in spec.source


@pytest.mark.parametrize(
    ("text", "bf16", "gb_per_second"),
    [
        ("tpu:v5e", 197e12, 819e9),
        ("tpu:v5p", 459e12, 2765e9),
        ("tpu:v6e", 918e12, 1638e9),
        ("gpu:a100", 312e12, 2039e9),
    ],
)
def test_public_figures(text, bf16, gb_per_second):
    spec = spec_for(Target.parse(text))
    assert (spec.matmul_rate("bfloat16"), spec.memory_bytes_per_second) == pytest.approx((bf16, gb_per_second))


@pytest.mark.parametrize("text", ["tpu:v4", "tpu:7x"])
def test_kinds_of_two_devices_a_chip_count_half_a_chip(text):
    chip = {"tpu:v4": 275e12, "tpu:7x": 2307e12}[text]
    assert spec_for(Target.parse(text)).matmul_rate("bfloat16") == chip / 2


def test_precision_changes_float32_only():
    spec = spec_for(Target.parse("tpu:v5e"))
    bf16 = spec.matmul_rate("bfloat16")
    assert spec.matmul_rate("float32") == spec.matmul_rate("float32", "DEFAULT") == bf16
    assert spec.matmul_rate("float32", "HIGH") == pytest.approx(bf16 / 3)
    assert spec.matmul_rate("float32", "HIGHEST") == pytest.approx(bf16 / 6)
    assert spec.matmul_rate("bfloat16", "HIGHEST") == bf16


def test_8_bit_floats_share_one_rate_and_unknown_types_the_default():
    spec = spec_for(Target.parse("gpu:h100"))
    assert spec.matmul_rate("float8_e4m3fn") == spec.matmul_rate("float8_e5m2") == spec.matmul_rate("int8")
    assert spec.matmul_rate("complex64") == spec.matmul_flops_per_second["default"]


def test_unknown_attached_kind_says_that_its_figures_are_assumed():
    spec = spec_for(Target("gpu", "geforce-rtx-4090"))
    assert spec.name == "geforce-rtx-4090"
    assert spec.memory_bytes_per_second == spec_for(Target.parse("gpu:a100")).memory_bytes_per_second
    assert spec.source == "assumed: no figures are held for geforce-rtx-4090; those of a100 stand in"


def test_unknown_platform_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match="No device figures for platform 'npu' of npu; use cpu, tpu or gpu"):
        spec_for(Target("npu"))


def test_specs_are_shared_and_hashable():
    spec = spec_for(Target.parse("tpu:v5e:2x2"))
    assert spec is spec_for(Target.parse("tpu:v5e"))
    assert hash(spec) == hash(dataclasses.replace(spec))
    assert spec.without_memory() is spec.without_memory()
    assert 1.0 / spec.without_memory().memory_bytes_per_second == 0.0


def test_cpu_is_measured_once():
    spec = spec_for(Target.parse("cpu"))
    assert isinstance(spec, DeviceSpec) and spec is spec_for(Target.parse("cpu"))
    assert calibrate() is calibrate()
    assert spec.platform == "cpu" and spec.memory_bytes > 2**30
    assert 1e9 < spec.matmul_rate("float32") < 1e14
    assert 1e8 < spec.memory_bytes_per_second < 1e13
    assert 1 <= spec.transcendental_weight < 1000
    assert "measured" in spec.source


def test_calibration_leaves_nothing_in_a_trace():
    def function(x):
        calibrate.cache_clear()
        assert calibrate().vector_flops_per_second > 0
        return x + 1

    jaxpr = jax.make_jaxpr(function)(jnp.float32(0))
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["add"]
