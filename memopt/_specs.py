"""Device figures that the cost model divides by: rates, bandwidths and memory of one JAX device.

Comes in: a `memopt._target.Target`. Goes out: a frozen `DeviceSpec`. This module holds public figures and touches no
device; the CPU's figures are measured by `memopt._calibrate` when first asked for.

All rates are dense ones (no structured sparsity). Two of them need a word:

- float32 matmuls. JAX's default precision on TPU multiplies float32 operands in one bfloat16 pass, so "float32" is the
  bfloat16 rate; "high" takes 3 passes and "highest" 6. On GPU the default is TF32, "highest" the plain float32 units.
- vector operations. On TPU no rate is published; it is 8 x 128 lanes x 4 units x cores x clock, with the clock from the
  published matmul rate (or 1.75 GHz where the number of matrix units is not published). On GPU it is half of the
  published float32 rate, which counts a multiply-add as two.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping

from memopt._calibrate import calibrate
from memopt._target import Target

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """Figures of one JAX device.

    Attributes:
        name: "v5e", "h100", ... or "cpu".
        platform: "tpu", "gpu" or "cpu".
        memory_bytes: memory of the device, in bytes.
        memory_bytes_per_second: peak bandwidth of that memory.
        matmul_flops_per_second: dense rate by operand dtype name; "float8" stands for all 8-bit floats, "float32_high"
            and "float32_highest" for these precisions, "default" for every other dtype.
        vector_flops_per_second: rate of cheap element-wise operations.
        host_bytes_per_second: one direction of the link to the host's memory.
        link_bytes_per_second: one direction of all links to other devices, 0.0 without any.
        source: where the figures are from.
        transcendental_weight: cheap operations that one exp, log, tanh or erf takes the time of.
    """

    name: str
    platform: str
    memory_bytes: int
    memory_bytes_per_second: float
    matmul_flops_per_second: Mapping[str, float] = dataclasses.field(hash=False)
    vector_flops_per_second: float
    host_bytes_per_second: float
    link_bytes_per_second: float
    source: str
    transcendental_weight: float = 10.0

    def matmul_rate(self, dtype: str, precision: str | None = None) -> float:
        """Return the dense FLOPs per second of a matmul.

        Args:
            dtype: name of the operands' dtype, such as "bfloat16".
            precision: "DEFAULT", "HIGH", "HIGHEST" or None, which only change float32.
        """
        rates = self.matmul_flops_per_second
        if dtype == "float32" and precision in ("HIGH", "HIGHEST"):
            dtype = f"float32_{precision.lower()}"
        elif dtype.startswith("float8"):
            dtype = "float8"
        return rates.get(dtype, rates["default"])

    def without_memory(self) -> "DeviceSpec":
        """Return the same device with memory that takes no time, for code that runs out of on-chip memory."""
        return _without_memory(self)


@functools.lru_cache(maxsize=64)
def _without_memory(spec: DeviceSpec) -> DeviceSpec:
    return dataclasses.replace(spec, memory_bytes_per_second=float("inf"))


def spec_for(target: Target) -> DeviceSpec:
    """Return the figures of one JAX device of a target.

    The first call for the CPU measures it, about a second; the others cost nothing.

    Args:
        target: device kind by name; an attached kind that is not in the table gets the figures of its platform's
            oldest entry, and says so in `source`.

    Returns:
        The same object for the same kind.

    Raises:
        ValueError: a platform that has no table ("cpu", "tpu" and "gpu" have).

    Example:
        >>> spec_for(Target.parse("tpu:v5e")).memory_bytes_per_second
        819000000000.0
    """
    if target.platform == "cpu":
        return _cpu_spec()
    if target.platform not in _OLDEST:
        raise ValueError(f"No device figures for platform {target.platform!r} of {target}; use cpu, tpu or gpu.")
    kind = target.kind or ""
    return _SPECS[target.platform].get(kind) or _assumed_spec(target.platform, kind)


@functools.lru_cache(maxsize=1)
def _cpu_spec() -> DeviceSpec:
    figures = calibrate()
    rates = figures.matmul_flops_per_second
    single = rates["float32"]
    return DeviceSpec(
        name="cpu",
        platform="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_bytes_per_second=figures.memory_bytes_per_second,
        matmul_flops_per_second={**rates, "float64": single / 2, "default": single},
        vector_flops_per_second=figures.vector_flops_per_second,
        host_bytes_per_second=figures.memory_bytes_per_second,
        link_bytes_per_second=0.0,
        source="measured on this machine when first used",
        transcendental_weight=figures.transcendental_weight,
    )


@functools.lru_cache(maxsize=32)
def _assumed_spec(platform: str, kind: str) -> DeviceSpec:
    oldest = _SPECS[platform][_OLDEST[platform]]
    source = f"assumed: no figures are held for {kind or 'this device'}; those of {oldest.name} stand in"
    return dataclasses.replace(oldest, name=kind or oldest.name, source=source)


def _tpu(
    name: str,
    *,
    gib: float,
    gb_per_second: float,
    bf16: float,
    int8: float,
    fp8: float,
    vector: float,
    host: float,
    link: float,
    source: str,
) -> DeviceSpec:
    """Make an entry from published units: GiB, GB/s, TFLOP/s, and GB/s in one direction."""
    rates = {"bfloat16": bf16, "float32": bf16, "float32_high": bf16 / 3, "float32_highest": bf16 / 6}
    rates |= {"int8": int8, "uint8": int8, "int4": int8, "float8": fp8, "float16": bf16, "default": bf16 / 6}
    return _entry(name, "tpu", int(gib * _GIB), gb_per_second, rates, vector, host, link, source)


def _gpu(
    name: str,
    *,
    gb: float,
    gb_per_second: float,
    bf16: float,
    tf32: float,
    fp32: float,
    fp64: float,
    int8: float,
    fp8: float,
    host: float,
    link: float,
    source: str,
) -> DeviceSpec:
    """Make an entry from published units: GB, GB/s, TFLOP/s, and GB/s in one direction."""
    rates = {"bfloat16": bf16, "float16": bf16, "float32": tf32, "float32_high": tf32 / 3, "float32_highest": fp32}
    rates |= {"float64": fp64, "int8": int8, "uint8": int8, "float8": fp8, "default": fp32}
    return _entry(name, "gpu", int(gb * 1e9), gb_per_second, rates, fp32 / 2, host, link, source)


def _entry(
    name: str,
    platform: str,
    memory: int,
    gb_per_second: float,
    tera: dict[str, float],
    vector: float,
    host: float,
    link: float,
    source: str,
) -> DeviceSpec:
    rates = {dtype: rate * 1e12 for dtype, rate in tera.items()}
    return DeviceSpec(name, platform, memory, gb_per_second * 1e9, rates, vector * 1e12, host * 1e9, link * 1e9, source)


_CLOUD = "cloud.google.com/tpu/docs"
_TPU_LINKS = "ICI one direction, all ports"
_TPU_HOST = "host link: PCIe as given in 'How to Scale Your Model', chapter 2"
_NVIDIA = "nvidia.com datasheet"
_GPU_LINKS = "NVLink and PCIe one direction"

_TPU_SPECS = (
    _tpu(
        "v4",
        gib=16,
        gb_per_second=600,
        bf16=137.5,
        int8=137.5,
        fp8=137.5,
        vector=4.3,
        host=8,
        link=150,
        source=f"{_CLOUD}/v4, half a chip (a chip is two devices); {_TPU_LINKS}; {_TPU_HOST}",
    ),
    _tpu(
        "v5e",
        gib=16,
        gb_per_second=819,
        bf16=197,
        int8=393,
        fp8=197,
        vector=6.2,
        host=16,
        link=200,
        source=f"{_CLOUD}/v5e; {_TPU_LINKS}; {_TPU_HOST}",
    ),
    _tpu(
        "v5p",
        gib=95,
        gb_per_second=2765,
        bf16=459,
        int8=918,
        fp8=459,
        vector=14.3,
        host=16,
        link=600,
        source=f"{_CLOUD}/v5p; {_TPU_LINKS}; {_TPU_HOST}",
    ),
    _tpu(
        "v6e",
        gib=32,
        gb_per_second=1638,
        bf16=918,
        int8=1836,
        fp8=918,
        vector=7.2,
        host=32,
        link=400,
        source=f"{_CLOUD}/v6e; {_TPU_LINKS}; {_TPU_HOST}",
    ),
    _tpu(
        "tpu7x",
        gib=96,
        gb_per_second=3690,
        bf16=1153.5,
        int8=1153.5,
        fp8=2307,
        vector=7.2,
        host=16,
        link=300,
        source=f"{_CLOUD}/tpu7x, half a chip (a chip is two devices); int8 not published, taken as bfloat16; "
        f"{_TPU_LINKS}; host link not published, taken as v6e's for a chip",
    ),
)
_GPU_SPECS = (
    _gpu(
        "a100",
        gb=80,
        gb_per_second=2039,
        bf16=312,
        tf32=156,
        fp32=19.5,
        fp64=19.5,
        int8=624,
        fp8=312,
        host=32,
        link=300,
        source=f"{_NVIDIA} A100 80GB SXM; no fp8 units, taken as bfloat16; {_GPU_LINKS}",
    ),
    _gpu(
        "h100",
        gb=80,
        gb_per_second=3350,
        bf16=989.4,
        tf32=494.7,
        fp32=66.9,
        fp64=66.9,
        int8=1978.9,
        fp8=1978.9,
        host=64,
        link=450,
        source=f"{_NVIDIA} H100 SXM; {_GPU_LINKS}",
    ),
    _gpu(
        "h200",
        gb=141,
        gb_per_second=4800,
        bf16=989.4,
        tf32=494.7,
        fp32=66.9,
        fp64=66.9,
        int8=1978.9,
        fp8=1978.9,
        host=64,
        link=450,
        source=f"{_NVIDIA} H200 SXM; {_GPU_LINKS}",
    ),
    _gpu(
        "b200",
        gb=180,
        gb_per_second=8000,
        bf16=2250,
        tf32=1100,
        fp32=80,
        fp64=40,
        int8=4500,
        fp8=4500,
        host=64,
        link=900,
        source=f"{_NVIDIA} Blackwell architecture brief, HGX B200 (180 GB as in DGX B200); {_GPU_LINKS}",
    ),
)
_SPECS = {
    "tpu": {spec.name: spec for spec in _TPU_SPECS},
    "gpu": {spec.name: spec for spec in _GPU_SPECS},
}
_OLDEST = {"tpu": "v4", "gpu": "a100"}
