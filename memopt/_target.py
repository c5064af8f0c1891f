"""Targets: which device a step is compiled for, written as `"tpu:v5e:2x2"`.

Text comes in (or None for the attached device); a `Target`, its JAX devices, its memory limit and its meshes go out.
TPU targets need no TPU: XLA compiles for them ahead of time through libtpu, which this module alone loads, quietly.
It compiles nothing itself and touches no environment variable before a TPU target is really asked for.
"""

import functools
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from memopt._bytes import GIB
from memopt._errors import TargetError


@dataclass(frozen=True)
class _TpuKind:
    dimensions: int  # of the chip grid
    device_kind: str  # what jax.Device.device_kind says
    limit_gib: float  # per JAX device


# The limits are the compiler's: what "exceeds available HBM (...)" names when a 1Mi x 1Mi f32 broadcast is compiled
# for one chip, the smaller of libtpu 0.0.42.1 and 0.0.50.1 (they differ by 0.01). A v4 and a 7x chip are two devices.
_TPU_KINDS = {
    "v4": _TpuKind(3, "TPU v4", 15.25),
    "v5e": _TpuKind(2, "TPU v5 lite", 15.75),
    "v5p": _TpuKind(3, "TPU v5", 95.73),
    "v6e": _TpuKind(2, "TPU v6 lite", 31.24),
    "tpu7x": _TpuKind(3, "TPU7x", 94.74),
}
_TPU_ALIASES = {"7x": "tpu7x", "v7x": "tpu7x", "v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e"}
_GPU_KINDS = ("a100", "h100", "h200", "b200")
_ATTACHED = "attached"  # the topology of a TPU that is plugged in: "tpu:v5e:attached"

_QUIET_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Target:
    """A device, or a grid of devices, to compile for.

    Args:
        platform: `"cpu"`, `"tpu"` or `"gpu"`.
        kind: `"v5e"`, `"h100"`, ...; None on the CPU.
        topology: chips along each dimension, `"2x2"`; None where it has no meaning.
        attached: True to compile for `jax.devices()` of this platform, False to compile ahead of time.

    Example:
        >>> str(Target.parse("tpu:v5e"))
        'tpu:v5e:1x1'
    """

    platform: str
    kind: str | None = None
    topology: str | None = None
    attached: bool = True

    @staticmethod
    def parse(text: "str | Target | None") -> "Target":
        """Read a target.

        Args:
            text: `platform[:kind[:topology]]`, None for the attached default device, or a `Target`, returned as it is.

        Returns:
            The target, with the default topology of its kind (one chip) filled in. No TPU compiler is loaded.

        Raises:
            TargetError: unknown platform, kind or topology, or a device that is not attached and has to be.
            TypeError: `text` is none of the three.

        Example:
            >>> Target.parse("tpu:v5p:2x2")
            Target(platform='tpu', kind='v5p', topology='2x2x1', attached=False)
        """
        if isinstance(text, Target):
            return text
        if text is None:
            return _attached_target(jax.default_backend())
        if not isinstance(text, str):
            raise TypeError(f"A target is text such as 'tpu:v5e:2x2', a Target or None; got {text!r}.")
        platform, *rest = text.strip().lower().split(":")
        parser = _PARSERS.get(platform)
        if parser is None or len(rest) > 2 or "" in rest:
            raise TargetError(
                f"Unknown target {text!r}. Write platform[:kind[:topology]], as 'cpu', 'tpu:v5e:2x2' or 'gpu:h100'."
            )
        return parser(text, rest)

    def __str__(self) -> str:
        return ":".join(part for part in (self.platform, self.kind, self.topology) if part)

    @property
    def compiles(self) -> bool:
        """Whether XLA can compile for this target here; if not, figures for it are predictions ("not compiled")."""
        return self.attached or self.platform == "tpu"

    @property
    def lowering_platform(self) -> str:
        """The name that JAX's lowering knows the platform by: `"cpu"`, `"tpu"`, `"cuda"` or `"rocm"`."""
        return _gpu_lowering_platform() if self.platform == "gpu" else self.platform


def _parse_cpu(text: str, rest: Sequence[str]) -> Target:
    if rest:
        raise TargetError(f"Unknown target {text!r}: the CPU has no kinds or topologies. Write 'cpu'.")
    return Target("cpu")


def _parse_gpu(text: str, rest: Sequence[str]) -> Target:
    attached = _attached_target_or_none("gpu")
    if not rest:
        if attached is None:
            raise TargetError(f"Target {text!r} names no kind and no GPU is attached. Write 'gpu:h100', for example.")
        return attached
    if len(rest) == 2:
        raise TargetError(f"Unknown target {text!r}: GPU targets have no topology. Write 'gpu:{rest[0]}'.")
    if attached is not None and attached.kind == rest[0]:
        return attached
    if rest[0] not in _GPU_KINDS:
        raise TargetError(f"Unknown GPU kind {rest[0]!r} in target {text!r}. Known: {', '.join(_GPU_KINDS)}.")
    return Target("gpu", rest[0], None, attached=False)


def _parse_tpu(text: str, rest: Sequence[str]) -> Target:
    if not rest:
        attached = _attached_target_or_none("tpu")
        if attached is None:
            raise TargetError(f"Target {text!r} names no kind and no TPU is attached. Write 'tpu:v5e', for example.")
        return attached
    kind = _TPU_ALIASES.get(rest[0], rest[0])
    if kind not in _TPU_KINDS:
        raise TargetError(f"Unknown TPU kind {rest[0]!r} in target {text!r}. Known: {', '.join(_TPU_KINDS)}.")
    if len(rest) == 2 and rest[1] == _ATTACHED:
        return _attached_tpu_of_kind(text, kind)
    return Target("tpu", kind, _topology(text, kind, rest[1] if len(rest) == 2 else "1x1"), attached=False)


_PARSERS = {"cpu": _parse_cpu, "gpu": _parse_gpu, "tpu": _parse_tpu}


def _topology(text: str, kind: str, topology: str) -> str:
    dimensions = _TPU_KINDS[kind].dimensions
    remedy = "2x2" if dimensions == 2 else "2x2x1"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise TargetError(
            f"Unreadable topology {topology!r} in target {text!r}. Write chips along each side: {remedy}."
        )
    chips = topology.split("x")
    if len(chips) == 2 and dimensions == 3:
        chips.append("1")
    if len(chips) > dimensions and chips.pop() != "1":
        raise TargetError(f"Topology {topology!r} in target {text!r}: {kind} chips form a plane. Write {remedy}.")
    return "x".join(chips)


def _attached_target_or_none(platform: str) -> Target | None:
    try:
        return _attached_target(platform)
    except TargetError:
        return None


def _attached_tpu_of_kind(text: str, kind: str) -> Target:
    attached = _attached_target_or_none("tpu")
    if attached is None or attached.kind != kind:
        found = "no TPU" if attached is None else str(attached)
        raise TargetError(f"Target {text!r}: {found} is attached. Write 'tpu:{kind}' to compile ahead of time.")
    return attached


def _attached_target(platform: str) -> Target:
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as error:
        raise TargetError(f"No {platform} is attached: {error}") from error
    if device.platform == "tpu":
        return Target("tpu", _tpu_kind(device.device_kind), _ATTACHED)
    if device.platform in ("gpu", "cuda", "rocm"):
        return Target("gpu", _gpu_kind(device.device_kind))
    return Target(device.platform)


def _tpu_kind(device_kind: str) -> str:
    names = {entry.device_kind.lower(): kind for kind, entry in _TPU_KINDS.items()}
    names |= {"tpu v5e": "v5e", "tpu v5p": "v5p", "tpu v6e": "v6e"}
    return names.get(device_kind.lower(), device_kind.lower().replace("tpu ", "").replace(" ", "-"))


def _gpu_kind(device_kind: str) -> str:
    lowered = device_kind.lower()
    known = (kind for kind in _GPU_KINDS if re.search(rf"\b{kind}\b", lowered))
    return next(known, re.sub(r"[^a-z0-9]+", "-", lowered).strip("-"))


def _gpu_lowering_platform() -> str:
    return "rocm" if jax.default_backend() == "gpu" and "rocm" in jax.devices()[0].client.platform_version else "cuda"


def devices(target: Target) -> tuple[Any, ...]:
    """List the JAX devices of a target; the first TPU target of a process loads libtpu, about a second.

    Args:
        target: what to list. All hosts of a topology are included.

    Returns:
        Devices, attached ones or descriptions that can be compiled for. A chip of v4 and 7x is two of them.

    Raises:
        TargetError: libtpu is missing or not the one that JAX pins, it does not know the topology, or the target is a
            GPU that is not attached.

    Example:
        >>> len(devices(Target.parse("cpu"))) >= 1
        True
    """
    if target.attached:
        return tuple(jax.devices(target.platform))
    if target.platform == "tpu":
        return _topology_devices(target)
    raise TargetError(
        f"Target '{target}' is not attached, and XLA compiles for a GPU only where one is attached. "
        "Plan for it (predictions, not compiled), or measure for a TPU target such as 'tpu:v5e'."
    )


@functools.lru_cache(maxsize=32)
def _topology_devices(target: Target) -> tuple[Any, ...]:
    check_libtpu()
    _quiet_libtpu()
    assert target.topology is not None
    chips = [int(side) for side in target.topology.split("x")] + [1]
    # A host of these kinds holds 2x2 chips unless told otherwise, and an odd side is not divisible by 2.
    bounds = tuple(2 if side % 2 == 0 else 1 for side in chips[:2]) + (1,)
    name = f"{target.kind}:{target.topology}"
    try:
        return tuple(
            topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=bounds).devices
        )
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(f"libtpu cannot describe target '{target}': {error}") from error


def _quiet_libtpu() -> None:
    """Keep libtpu from asking a metadata server, logging, and locking; a machine with a real TPU is left alone."""
    if jax.default_backend() != "tpu":
        for name, value in _QUIET_TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def check_libtpu() -> None:
    """Make sure that the libtpu that JAX pins is installed; another one compiles small programs and crashes later.

    Raises:
        TargetError: libtpu is missing or of another version; the message holds the command that installs it.
    """
    pinned = _pinned_libtpu(importlib.metadata.requires("jax") or ())
    remedy = f'Run: pip install "jax[tpu]=={jax.__version__}"'
    try:
        installed = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError as error:
        raise TargetError(f"TPU targets need libtpu, which is not installed. {remedy}") from error
    if pinned and not re.fullmatch(re.escape(pinned).replace(r"\*", r".*"), installed):
        raise TargetError(f"libtpu {installed} is installed, but JAX {jax.__version__} pins {pinned}. {remedy}")


def _pinned_libtpu(requirements: Sequence[str]) -> str | None:
    """Return the version pattern (`"0.0.42.*"`) that `jax[tpu]` requires, or None where it pins none."""
    matches = (re.match(r"libtpu\s*\(?==\s*([\w.*]+)", requirement) for requirement in requirements)
    return next((match[1] for match in matches if match), None)


def limit_bytes(target: Target) -> int | None:
    """Return the memory of one JAX device of a target that a compiled step may use, in bytes.

    Args:
        target: the target.

    Returns:
        On an attached GPU or TPU the allocator's `bytes_limit`; ahead of time the limit of the TPU compiler (v5e
        15.75 GiB, not the published 16 GB); None on the CPU and for GPUs that are not attached.

    Example:
        >>> limit_bytes(Target.parse("tpu:v5e")) / 2**30
        15.75
    """
    if target.attached and target.platform != "cpu":
        statistics = devices(target)[0].memory_stats() or {}
        if "bytes_limit" in statistics:
            return int(statistics["bytes_limit"])
    kind = _TPU_KINDS.get(target.kind or "") if target.platform == "tpu" else None
    return None if kind is None else int(kind.limit_gib * GIB)


def mesh(target: "str | Target | None", shape: Sequence[int], names: Sequence[str]) -> Mesh:
    """Build a mesh over all devices of a target, to shard the shapes of a step that is compiled ahead of time.

    Args:
        target: as in `memopt.optimize`.
        shape: devices along each axis; their product is the number of JAX devices of the target.
        names: the name of each axis.

    Returns:
        A `jax.sharding.Mesh`; on attached devices in the order that suits their links.

    Raises:
        TargetError: as in `devices`.
        ValueError: `shape` does not use all devices, or has another length than `names`.

    Example:
        >>> import jax, memopt
        >>> memopt.mesh("cpu", (len(jax.devices("cpu")),), ("data",)).axis_names
        ('data',)
    """
    parsed = Target.parse(target)
    found = devices(parsed)
    if len(shape) != len(names):
        raise ValueError(f"A mesh needs one name per axis; got shape {tuple(shape)} and names {tuple(names)}.")
    if math.prod(shape) != len(found):
        raise ValueError(
            f"Mesh shape {tuple(shape)} has {math.prod(shape)} devices, target '{parsed}' has {len(found)}. "
            "Choose a shape whose product is that number, or another topology."
        )
    return Mesh(np.asarray(found).reshape(tuple(shape)), tuple(names))
