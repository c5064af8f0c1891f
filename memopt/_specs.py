"""Device figures that the cost model divides by: rates, bandwidths and memory of one JAX device.

Comes in: a `memopt._target.Target`. Goes out: a frozen `DeviceSpec`. This module holds public figures and touches no
device; the CPU's figures are measured by `memopt._calibrate` when first asked for.
"""

import dataclasses
import functools
from collections.abc import Mapping


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
