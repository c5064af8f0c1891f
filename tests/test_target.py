"""Targets: text in, text out, devices, limits, meshes, and a sentence for everything that is wrong."""

import importlib.metadata
import os

import jax
import jax.numpy as jnp
import pytest

from memopt import _target
from memopt._errors import TargetError
from memopt._target import Target, check_libtpu, devices, limit_bytes, mesh


@pytest.mark.parametrize(
    ("text", "target", "canonical"),
    [
        ("cpu", Target("cpu"), "cpu"),
        ("tpu:v5e", Target("tpu", "v5e", "1x1", attached=False), "tpu:v5e:1x1"),
        ("tpu:v5e:2x2", Target("tpu", "v5e", "2x2", attached=False), "tpu:v5e:2x2"),
        (" TPU:V6E:8x8 ", Target("tpu", "v6e", "8x8", attached=False), "tpu:v6e:8x8"),
        ("tpu:v5e:2x2x1", Target("tpu", "v5e", "2x2", attached=False), "tpu:v5e:2x2"),
        ("tpu:v5p", Target("tpu", "v5p", "1x1x1", attached=False), "tpu:v5p:1x1x1"),
        ("tpu:v4:2x2", Target("tpu", "v4", "2x2x1", attached=False), "tpu:v4:2x2x1"),
        ("tpu:7x", Target("tpu", "tpu7x", "1x1x1", attached=False), "tpu:tpu7x:1x1x1"),
        ("gpu:h100", Target("gpu", "h100", None, attached=False), "gpu:h100"),
    ],
)
def test_parse_and_print(text, target, canonical):
    assert Target.parse(text) == target
    assert str(target) == canonical
    assert Target.parse(canonical) == target
    assert Target.parse(target) is target


def test_parse_none_is_the_attached_device():
    assert Target.parse(None) == Target("cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Unknown target ''. Write platform"),
        ("abc", "Unknown target 'abc'. Write platform"),
        ("tpu:v5e:2x2:1", "Unknown target 'tpu:v5e:2x2:1'"),
        ("tpu:v5e:", "Unknown target 'tpu:v5e:'"),
        ("cpu:x86", "the CPU has no kinds or topologies. Write 'cpu'."),
        ("tpu", "names no kind and no TPU is attached. Write 'tpu:v5e'"),
        ("tpu:v9", "Unknown TPU kind 'v9' in target 'tpu:v9'. Known: v4, v5e, v5p, v6e, tpu7x."),
        ("tpu:v5e:2", "Unreadable topology '2' in target 'tpu:v5e:2'. Write chips along each side: 2x2."),
        ("tpu:v5p:0x1", "Unreadable topology '0x1' in target 'tpu:v5p:0x1'. Write chips along each side: 2x2x1."),
        ("tpu:v5e:2x2x2", "v5e chips form a plane. Write 2x2."),
        ("tpu:v5e:attached", "no TPU is attached. Write 'tpu:v5e' to compile ahead of time."),
        ("gpu", "names no kind and no GPU is attached. Write 'gpu:h100'"),
        ("gpu:x1", "Unknown GPU kind 'x1' in target 'gpu:x1'. Known: a100, h100, h200, b200."),
        ("gpu:h100:8", "GPU targets have no topology. Write 'gpu:h100'."),
    ],
)
def test_parse_names_the_value_and_the_remedy(text, message):
    with pytest.raises(TargetError) as raised:
        Target.parse(text)
    assert message in str(raised.value)


def test_parse_refuses_other_types():
    with pytest.raises(TypeError, match="text such as 'tpu:v5e:2x2', a Target or None; got 3"):
        Target.parse(3)


def test_cpu_devices_and_limit():
    assert devices(Target("cpu")) == tuple(jax.devices("cpu"))
    assert limit_bytes(Target("cpu")) is None


@pytest.mark.parametrize(
    ("device_kind", "kind"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6e", "v6e"), ("TPU7x", "tpu7x"), ("TPU v99 max", "v99-max")],
)
def test_names_of_attached_tpus(device_kind, kind):
    assert _target._tpu_kind(device_kind) == kind


@pytest.mark.parametrize(
    ("device_kind", "kind"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA L4", "nvidia-l4")],
)
def test_names_of_attached_gpus(device_kind, kind):
    assert _target._gpu_kind(device_kind) == kind


class FakeGpu:
    """An attached GPU, as far as a target looks at it."""

    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def memory_stats(self):
        return {"bytes_limit": 60 * 2**30}


def test_attached_gpu(monkeypatch):
    monkeypatch.setattr(_target.jax, "devices", lambda platform=None: [FakeGpu()])
    attached = Target("gpu", "h100", None, attached=True)
    assert Target.parse("gpu") == Target.parse("gpu:h100") == attached
    assert not Target.parse("gpu:a100").attached
    assert limit_bytes(attached) == 60 * 2**30


def test_gpu_that_is_not_attached_does_not_compile():
    target = Target.parse("gpu:h100")
    assert not target.compiles
    assert limit_bytes(target) is None
    with pytest.raises(TargetError, match="'gpu:h100' is not attached.*predictions, not compiled"):
        devices(target)


def test_missing_libtpu(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(TargetError, match=r'libtpu, which is not installed. Run: pip install "jax\[tpu\]=='):
        check_libtpu()


@pytest.mark.parametrize(("installed", "good"), [("0.0.42", False), ("0.0.42.9", True), ("0.0.420.1", False)])
def test_libtpu_version(monkeypatch, installed, good):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    if good:
        check_libtpu()
    else:
        with pytest.raises(TargetError, match=rf"libtpu {installed} is installed, but JAX .* pins 0\.0\.42\.\*\. Run"):
            check_libtpu()


def test_libtpu_is_unchecked_where_jax_pins_none(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    check_libtpu()


def test_the_pin_of_this_jax_is_readable():
    assert _target._pinned_libtpu(importlib.metadata.requires("jax")) is not None


def test_quiet_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("TPU_MIN_LOG_LEVEL", "0")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    _target._quiet_libtpu()
    assert (os.environ["TPU_MIN_LOG_LEVEL"], os.environ["TPU_SKIP_MDS_QUERY"]) == ("0", "1")


def test_a_machine_with_a_tpu_keeps_its_environment(monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(_target.jax, "default_backend", lambda: "tpu")
    _target._quiet_libtpu()
    assert "TPU_SKIP_MDS_QUERY" not in os.environ


def test_mesh_on_attached_devices():
    count = len(jax.devices("cpu"))
    built = mesh("cpu", (1, count), ("data", "model"))
    assert (dict(built.shape), built.size) == ({"data": 1, "model": count}, count)


def test_mesh_errors():
    count = len(jax.devices("cpu"))
    with pytest.raises(ValueError, match=rf"has {3 * count} devices, target 'cpu' has {count}. Choose a shape"):
        mesh("cpu", (3, count), ("a", "b"))
    with pytest.raises(ValueError, match="one name per axis"):
        mesh("cpu", (count,), ("a", "b"))


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("text", "count"),
    [("tpu:v5e", 1), ("tpu:v5e:1x2", 2), ("tpu:v5e:3x5", 15), ("tpu:v6e:8x8", 64), ("tpu:v5p", 1), ("tpu:7x:2x2", 8)],
)
def test_tpu_devices(text, count):
    found = devices(Target.parse(text))
    assert len(found) == count
    assert _target._tpu_kind(found[0].device_kind) == Target.parse(text).kind


@pytest.mark.tpu_aot
def test_tpu_mesh():
    assert mesh("tpu:v5e:2x4", (2, 4), ("data", "model")).devices.shape == (2, 4)


@pytest.mark.tpu_aot
def test_topology_that_libtpu_refuses():
    with pytest.raises(TargetError, match="libtpu cannot describe target 'tpu:v5e:99999x99999'"):
        devices(Target.parse("tpu:v5e:99999x99999"))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_limits_are_the_compilers(kind):
    target = Target.parse(f"tpu:{kind}")
    tebibytes = jax.jit(lambda x: jnp.broadcast_to(x[:, None], (2**20, 2**20)))
    with jax.default_device(devices(target)[0]):
        lowered = tebibytes.trace(jax.ShapeDtypeStruct((2**20,), jnp.float32)).lower(lowering_platforms=("tpu",))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        lowered.compile()
    named_gib = float(str(raised.value).split("available HBM (")[1].split("G)")[0])
    assert 0 <= named_gib - limit_bytes(target) / 2**30 < 0.011
