"""Measure: programs whose every byte is known, aliasing, sharding, nnx, and running out of memory."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from memopt import _measure
from memopt._errors import TargetError
from memopt._measure import Memory, compile_lowered, count_remat_ops, lower_for, measure, memory_of, memory_of_error
from memopt._target import Target, devices, mesh

MATRIX_BYTES = 256 * 256 * 4
TARGETS = [None, pytest.param("tpu:v5e", marks=pytest.mark.tpu_aot)]


def shape(*sizes, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def double(x):
    return x * 2


@pytest.mark.parametrize("target", TARGETS)
def test_every_byte_of_a_known_program(target):
    memory = measure(double, shape(256, 256), target=target)
    assert (memory.argument_bytes, memory.output_bytes) == (MATRIX_BYTES, MATRIX_BYTES)
    assert (memory.alias_bytes, memory.temp_bytes, memory.host_temp_bytes) == (0, 0, 0)
    assert memory.peak_bytes == 2 * MATRIX_BYTES
    assert memory.fits and memory.xla_remat_ops == 0 and memory.compile_seconds > 0
    assert memory.target == str(Target.parse(target))
    assert memory.limit_bytes == (None if target is None else 63 * 2**28)


@pytest.mark.parametrize("target", TARGETS)
def test_donated_argument_is_aliased(target):
    memory = measure(double, shape(256, 256), target=target, donate_argnums=0)
    assert (memory.alias_bytes, memory.peak_bytes, memory.unused_donations) == (MATRIX_BYTES, MATRIX_BYTES, ())


@pytest.mark.parametrize("target", TARGETS)
def test_unused_donation_is_reported_and_no_warning_escapes(target):
    memory = measure(lambda x, y: x.sum() + y, shape(256, 256), shape(), target=target, donate_argnums=0)
    assert memory.alias_bytes == 0
    assert memory.unused_donations == ("float32[256,256]",)


def two_products(x):
    return (jnp.sin(x @ x) @ x).sum()


NO_LIBRARY = {"xla_cpu_experimental_ynn_fusion_type": ""}


def test_temporaries_count_towards_the_peak():
    # Each product is a temporary while the next operation reads it: two matrices at once.
    memory = measure(two_products, shape(256, 256), compiler_options=NO_LIBRARY)
    assert memory.temp_bytes == 2 * MATRIX_BYTES
    assert memory.peak_bytes == 3 * MATRIX_BYTES + 4
    assert memory.library_fusions == 0 and "library" not in str(memory)


def test_library_fusions_are_told():
    memory = measure(two_products, shape(256, 256))
    if memory.temp_bytes < 2 * MATRIX_BYTES:
        assert memory.library_fusions > 0
        assert "temporaries inside are not counted" in str(memory)


def test_other_warnings_pass():
    def warns(x):
        warnings.warn("mind the step", UserWarning, stacklevel=1)
        return x

    with pytest.warns(UserWarning, match="mind the step"):
        measure(warns, shape(8))


@pytest.mark.parametrize("target", TARGETS)
def test_static_arguments_and_keywords(target):
    def step(x, count, *, mode):
        return jnp.concatenate([x] * count) if mode == "repeat" else x

    options = {"static_argnums": 1, "static_argnames": "mode"}
    memory = measure(step, shape(1024), 3, mode="repeat", target=target, **options)
    assert (memory.argument_bytes, memory.output_bytes) == (4096, 3 * 4096)


@pytest.mark.parametrize("target", TARGETS)
def test_a_jitted_function_brings_its_options(target):
    @functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
    def step(x, factor):
        return x * factor

    assert measure(step, jnp.ones(1024), 3, target=target).alias_bytes == 4096


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_without_arguments(target):
    assert measure(lambda: jnp.ones(1024) * 2, target=target).output_bytes == 4096


@pytest.mark.tpu_aot
def test_arrays_committed_elsewhere_count_as_shapes():
    array = jax.device_put(jnp.ones(5), jax.devices("cpu")[1])
    memory = measure(double, array, target="tpu:v5e")
    assert memory.argument_bytes == memory.output_bytes == 512  # 20 bytes, padded as only a TPU pads them


def test_an_array_committed_to_a_device_is_measured_there():
    assert measure(double, jax.device_put(jnp.ones(1024), jax.devices("cpu")[1])).peak_bytes == 2 * 4096


def test_sharded_arguments_are_counted_per_device():
    sharding = NamedSharding(mesh("cpu", (len(jax.devices("cpu")),), ("data",)), PartitionSpec("data"))
    memory = measure(double, shape(8, 1024, sharding=sharding))
    assert memory.argument_bytes == 8 * 4096 // len(jax.devices("cpu"))


@pytest.mark.tpu_aot
def test_sharded_tpu_arguments_are_counted_per_device():
    sharding = NamedSharding(mesh("tpu:v5e:2x2", (4,), ("data",)), PartitionSpec("data"))
    memory = measure(lambda x, y: x + y[None], shape(8, 1024, sharding=sharding), shape(1024), target="tpu:v5e:2x2")
    assert (memory.argument_bytes, memory.output_bytes) == (2 * 4096 + 4096, 2 * 4096)


@pytest.mark.tpu_aot
def test_shardings_inside_the_options_use_the_whole_topology():
    sharding = NamedSharding(mesh("tpu:v5e:2x2", (4,), ("data",)), PartitionSpec("data"))
    memory = measure(double, shape(8, 1024), target="tpu:v5e:2x2", in_shardings=sharding, out_shardings=sharding)
    assert memory.peak_bytes == 2 * 2 * 4096


@pytest.mark.tpu_aot
def test_arguments_sharded_over_another_target():
    sharding = NamedSharding(mesh("cpu", (len(jax.devices("cpu")),), ("data",)), PartitionSpec("data"))
    arguments = {"w": shape(8, 1024, sharding=sharding)}
    with pytest.raises(
        TargetError, match=r"Argument \[0\]\['w'\] is sharded over cpu devices, but target 'tpu:v5e:1x1'"
    ):
        measure(lambda p: p["w"], arguments, target="tpu:v5e")


def test_arguments_sharded_over_an_abstract_mesh():
    sharding = NamedSharding(jax.sharding.AbstractMesh((8,), ("data",)), PartitionSpec("data"))
    with pytest.raises(TargetError, match=r"Argument \[0\] is sharded over an abstract mesh.*memopt.mesh\('cpu'"):
        measure(double, shape(8, 1024, sharding=sharding))


@pytest.mark.tpu_aot
def test_arguments_in_host_memory_stay_there():
    device = devices(Target.parse("tpu:v5e"))[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    memory = measure(
        lambda x: jax.device_put(x, jax.memory.Space.Device) * 2, shape(256, 256, sharding=host), target="tpu:v5e"
    )
    assert (memory.argument_bytes, memory.output_bytes) == (0, MATRIX_BYTES)


@pytest.mark.parametrize("target", TARGETS)
def test_typed_keys_are_arguments(target):
    memory = measure(lambda key: jax.random.uniform(key, (1024,)), jax.random.key(0), target=target)
    assert memory.output_bytes == 4096


@pytest.mark.parametrize("target", TARGETS)
def test_nnx_modules_beside_static_and_keyword_arguments(target):
    def step(model, mode, *, x):
        return model(x) if mode == "call" else x

    model = nnx.Linear(128, 128, use_bias=False, rngs=nnx.Rngs(0))
    memory = measure(step, model, "call", x=shape(8, 128), target=target, static_argnums=1)
    assert memory.argument_bytes == 128 * 128 * 4 + 8 * 128 * 4


def test_a_gpu_that_is_not_attached():
    with pytest.raises(TargetError, match="'gpu:h100' is not attached"):
        measure(double, shape(8), target="gpu:h100")


def nnx_step(model, optimizer, x):
    loss, gradients = nnx.value_and_grad(lambda m: m(x).sum())(model)
    optimizer.update(model, gradients)
    return loss


def nnx_arguments():
    model = nnx.Linear(128, 128, use_bias=False, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param), shape(8, 128)


@pytest.mark.loose_promotion
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("jitted", [False, True])
def test_nnx_modules_are_arguments_and_outputs(target, jitted):
    options = {"donate_argnums": (0, 1)}
    step = nnx.jit(nnx_step, **options) if jitted else nnx_step
    memory = measure(step, *nnx_arguments(), target=target, **({} if jitted else options))
    state_bytes = 2 * 128 * 128 * 4
    assert state_bytes <= memory.argument_bytes <= state_bytes + 8 * 128 * 4 + 8192
    assert memory.alias_bytes >= state_bytes


@pytest.mark.loose_promotion
@pytest.mark.tpu_aot
def test_what_nnx_arguments_share_is_counted_once():
    model, _, x = nnx_arguments()
    memory = measure(lambda m, same, x: m(x).sum() + same(x).sum(), model, model, x, target="tpu:v5e")
    assert memory.argument_bytes == 128 * 128 * 4 + 8 * 128 * 4


@pytest.mark.tpu_aot
def test_out_of_memory_is_a_result():
    memory = measure(lambda x: jnp.broadcast_to(x[:, None], (2**20, 2**20)), shape(2**20), target="tpu:v5e")
    assert not memory.fits
    assert (memory.peak_bytes, memory.limit_bytes) == (2**42, 63 * 2**28)
    assert memory.argument_bytes is None and memory.temp_bytes is None
    assert "4096.00 GiB" in str(memory) and "unknown" in str(memory)


OLD = "Ran out of memory in memory space hbm. Used 16.51G of 15.75G hbm. Exceeded hbm capacity by 780.37M."
NEW = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    "HLO temporaries ({size}) exceeds available HBM ({limit}). HLO module: jit_f."
)


@pytest.mark.parametrize(
    ("text", "peak_bytes", "limit_bytes"),
    [
        (OLD, int(16.51 * 2**30), int(15.75 * 2**30)),
        (NEW.format(size="4.00T", limit="15.75G"), 2**42, int(15.75 * 2**30)),
        (NEW.format(size="512.25M", limit="96.0K"), int(512.25 * 2**20), 96 * 1024),
        (NEW.format(size="1000", limit="10"), 1000, 10),
        (NEW.replace("HLO temporaries", "arguments").format(size="2.5GiB", limit="1.5G"), 5 * 2**29, 3 * 2**29),
    ],
)
def test_out_of_memory_texts(text, peak_bytes, limit_bytes):
    memory = memory_of_error(text, Target("cpu"), 0.5)
    assert (memory.peak_bytes, memory.limit_bytes, memory.fits) == (peak_bytes, limit_bytes, False)
    assert memory.compile_seconds == 0.5


class FailsToCompile:
    """A lowered program whose compilation fails with a given message."""

    def __init__(self, text):
        self.text = text

    def compile(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError(self.text)


def test_out_of_memory_has_no_compiled_step():
    compiled, memory = compile_lowered(FailsToCompile(OLD), Target("cpu"))
    assert compiled is None and not memory.fits


@pytest.mark.parametrize("text", ["INTERNAL: boom", "Ran out of memory in memory space vmem. Used 20M of 16M vmem."])
def test_other_failures_of_the_compiler_are_raised(text):
    with pytest.raises(jax.errors.JaxRuntimeError, match=text.split(".")[0]):
        compile_lowered(FailsToCompile(text), Target("cpu"))


def test_the_steps_one_by_one():
    target = Target.parse("cpu")
    lowered = lower_for(target, jax.jit(double), (shape(1024),))
    compiled, memory = compile_lowered(lowered, target)
    again = memory_of(compiled, limit_bytes=8191)
    assert (memory.peak_bytes, memory.fits) == (8192, True)
    assert (again.peak_bytes, again.fits, again.compile_seconds) == (8192, False, None)
    assert memory_of(compiled, limit_bytes=8192).fits


def test_compiler_options_reach_the_compiler():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        measure(double, shape(8), compiler_options={"xla_no_such_option": True})


def test_a_backend_without_memory_analysis():
    class Compiled:
        def memory_analysis(self):
            return None

    with pytest.raises(NotImplementedError, match="no memory analysis. Measure for 'cpu' or a TPU target."):
        memory_of(Compiled())


def test_remat_instructions_are_counted():
    text = """HloModule jit_f, is_scheduled=true
%fused_computation.7.remat (param_0: f32[8]) -> f32[8] {
  %multiply.1.remat2 = f32[8]{0} multiply(%param_0, %param_0)
  ROOT %add.2 = f32[8]{0} add(%multiply.1.remat2, %param_0)
}
ENTRY %main {
  %fusion.3.remat = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused_computation.7.remat
  ROOT fusion.4.remat.1 = f32[8]{0} fusion(%fusion.3.remat), metadata={op_name="x.remat = y"}
  %copy.remat_done = f32[8]{0} copy(%fusion.3.remat)
  %rematted = f32[8]{0} copy(%p)
}
"""
    assert count_remat_ops(text) == 4


def test_a_table_is_printed():
    memory = Memory(2**20, 2**21, 2**20, 2**22, 2**10, 6 * 2**20, 2**30, True, 3, 1.25, ("f32[8]",), "cpu")
    lines = str(memory).splitlines()
    assert lines[0] == "memory per device on cpu"
    assert "  peak                   6.0 MiB" in lines
    assert "  aliased               -1.0 MiB" in lines
    assert [line.split()[-1] for line in lines[-2:]] == ["s", "f32[8]"]
    assert any("XLA remat ops" in line for line in lines) and any("host temporaries" in line for line in lines)


class OptimizedStep:
    """What measure needs of a step that memopt.optimize made."""

    target = "cpu"
    memory = Memory(1, 1, 0, 0, 0, 2, None, True, 0, 0.1)

    def plan(self, *args):
        raise AssertionError("not needed")

    def measure(self, *args):
        return dataclasses.replace(self.memory, argument_bytes=args[0])


def test_an_optimized_step_measures_itself():
    assert measure(OptimizedStep(), 7).argument_bytes == 7
    assert measure(OptimizedStep(), 7, target="cpu").argument_bytes == 7


@pytest.mark.parametrize("given", [{"target": "tpu:v5e"}, {"donate_argnums": 0}])
def test_an_optimized_step_takes_no_options(given):
    with pytest.raises(ValueError, match="cannot change a step that memopt.optimize made. Give them to"):
        measure(OptimizedStep(), 7, **given)


def test_nothing_is_run():
    ran = []

    def step(x):
        jax.debug.callback(lambda: ran.append(1))
        return x

    measure(step, jnp.ones(8))
    jax.effects_barrier()
    assert not ran


def test_has_nnx():
    assert _measure.has_nnx({"a": (1, nnx.Rngs(0))})
    assert not _measure.has_nnx({"a": (1, jnp.ones(3)), "b": None})
