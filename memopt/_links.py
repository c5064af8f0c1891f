"""The wiring plan: how many bytes a second a device sends along one axis of a mesh.

In: a target, the devices along an axis and in all. Out: a bandwidth. Public figures alone; no device is touched.

A TPU chip has two links along each side of its torus: four on v5e and v6e (a plane), six on v4, v5p and 7x (a cube). An
axis of a mesh that spans k of the torus's d sides uses k of d parts of the chip's links ("How to Scale Your Model",
chapters 2 and 3; cloud.google.com/tpu/docs, system architecture). Eight GPUs of a host share NVLink; beyond it each has
a 400 Gbit/s network card (NVIDIA DGX H100 datasheet).
"""

from __future__ import annotations

import math

from memopt._specs import spec_for
from memopt._target import Target

_PLANES = frozenset({"v5e", "v6e"})
_GPUS_OF_A_HOST = 8
_NETWORK_BYTES_PER_SECOND = 50e9


def axis_bytes_per_second(target: Target, ways: int, devices: int) -> float:
    """Return the bytes that one device sends in a second, in a ring along one axis of a mesh.

    Args:
      target: the target.
      ways: devices along the axis.
      devices: devices of the whole mesh.

    Returns:
      Bytes per second, one direction, all links that the axis spans. On the CPU, where devices share the memory, a
      quarter of its bandwidth: a device there is for tests.

    Example:
      >>> axis_bytes_per_second(Target.parse("tpu:v5e:4x4"), 4, 16)
      100000000000.0
    """
    spec = spec_for(target)
    if target.platform == "cpu":
        return spec.memory_bytes_per_second / 4
    if target.platform == "gpu":
        return spec.link_bytes_per_second if ways <= _GPUS_OF_A_HOST else _NETWORK_BYTES_PER_SECOND
    sides = 2 if target.kind in _PLANES else 3
    if ways <= 1 or devices <= 1:
        return spec.link_bytes_per_second
    spanned = min(sides, max(1, round(sides * math.log(ways) / math.log(devices))))
    return spec.link_bytes_per_second * spanned / sides
