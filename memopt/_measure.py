"""Measure: the compiler's own memory figures of a step, for the attached device or ahead of time.

A function with arguments (arrays or shapes) and a target come in, a `Memory` goes out. The optimizer uses the same
three steps one by one: `lower_for`, `compile_lowered`, `memory_of`. Nothing here runs the step, plans, or rewrites.
"""

import contextlib
import dataclasses
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

from memopt._bytes import format_bytes
from memopt._compat_memory import HostShape
from memopt._errors import TargetError
from memopt._target import Target, devices
from memopt._target import limit_bytes as target_limit_bytes


@dataclass(frozen=True)
class Memory:
    """The compiler's figures for one compiled step, in bytes per JAX device.

    `peak_bytes` is arguments + outputs − aliased + temporaries. XLA's own `peak_memory_in_bytes` is not used: on the
    CPU it leaves the temporaries out.

    Args:
        argument_bytes, output_bytes: buffers of the arguments and of the outputs; None where compiling ran out of
            memory, like every other figure that the compiler does not tell then.
        alias_bytes: outputs that use the buffer of a donated argument.
        temp_bytes: temporaries on the device.
        host_temp_bytes: temporaries in host memory (offloaded values).
        peak_bytes: the compiled peak; out of memory, the size that the compiler names.
        limit_bytes: what a step may use on this device, None where there is no limit (CPU).
        fits: whether the peak is within the limit.
        xla_remat_ops: instructions that XLA's own rematerialization added.
        compile_seconds: wall-clock time of the compilation, lowering not included.
        unused_donations: donated arguments (`"float32[8,128]"`) that no output can reuse, as JAX warns. For a sharded
            step XLA decides later: compare `alias_bytes` there.
        target: the target that was compiled for, as text.
        library_fusions: on the CPU, fusions that XLA hands to a kernel library (`__ynn_fusion`), which allocates what
            lies inside them when it runs: no figure here counts that (measured: 64 MiB told, 194 MiB taken). The
            compiler option `xla_cpu_experimental_ynn_fusion_type=""` keeps them away.

    Example:
        >>> import jax, jax.numpy as jnp, memopt
        >>> memory = memopt.measure(jnp.sin, jax.ShapeDtypeStruct((1024,), jnp.float32), target="cpu")
        >>> memory.argument_bytes, memory.output_bytes, memory.peak_bytes, memory.fits
        (4096, 4096, 8192, True)
    """

    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    temp_bytes: int | None
    host_temp_bytes: int | None
    peak_bytes: int | None
    limit_bytes: int | None
    fits: bool
    xla_remat_ops: int | None
    compile_seconds: float | None
    unused_donations: tuple[str, ...] = ()
    target: str = ""
    library_fusions: int = 0

    def __str__(self) -> str:
        rows = [
            ("arguments", format_bytes(self.argument_bytes)),
            ("outputs", format_bytes(self.output_bytes)),
            ("aliased", format_bytes(None if self.alias_bytes is None else -self.alias_bytes)),
            ("temporaries", format_bytes(self.temp_bytes)),
            ("peak", format_bytes(self.peak_bytes)),
            ("limit", "none" if self.limit_bytes is None else format_bytes(self.limit_bytes)),
            ("fits", "yes" if self.fits else "no"),
        ]
        if self.host_temp_bytes:
            rows.append(("host temporaries", format_bytes(self.host_temp_bytes)))
        if self.xla_remat_ops:
            rows.append(("XLA remat ops", str(self.xla_remat_ops)))
        if self.library_fusions:
            rows.append(("library fusions", f"{self.library_fusions} (temporaries inside are not counted)"))
        if self.compile_seconds is not None:
            rows.append(("compiled in", f"{self.compile_seconds:.1f} s"))
        rows += [("donated, not used", text) for text in self.unused_donations]
        title = f"memory per device{f' on {self.target}' if self.target else ''}"
        return "\n".join([title, *(f"  {name:<18}{value:>12}" for name, value in rows)])


def measure(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    compiler_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Memory:
    """Compile a step and return the compiler's memory figures; nothing is run and no argument is donated.

    Costs one trace and one compilation, and no memory for arguments that are given as shapes.

    Args:
        fn: a function, one wrapped by `jax.jit` or `nnx.jit` (it brings its options), or a `memopt.optimize`d step.
        *args: arrays, `jax.ShapeDtypeStruct`s (with a `NamedSharding` where sharded), nnx modules, static values.
        target: None for the attached device, else `platform[:kind[:topology]]`. A step without shardings is compiled
            for one device of the topology.
        donate_argnums, donate_argnames, static_argnums, static_argnames, in_shardings, out_shardings,
            compiler_options: as in `jax.jit`.
        **kwargs: keyword arguments of the step. A step with an argument of one of the names above needs a lambda.

    Returns:
        `Memory`. A step too large to compile is a result too: `fits` is False and `peak_bytes` what the compiler names.

    Raises:
        TargetError: unknown target, libtpu missing or of the wrong version, arguments sharded over other devices.
        ValueError: options for a step that `memopt.optimize` made; they belong there.

    Example:
        >>> import jax, jax.numpy as jnp, memopt
        >>> memopt.measure(lambda x: x + 1, jax.ShapeDtypeStruct((1024,), jnp.float32), donate_argnums=0).peak_bytes
        4096

    Limits: on the CPU backend the temporaries of unrolled steps say little about other devices.
    """
    options = {
        "donate_argnums": donate_argnums,
        "donate_argnames": donate_argnames,
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
        "in_shardings": in_shardings,
        "out_shardings": out_shardings,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if is_optimized(fn):
        return _measure_optimized(fn, args, kwargs, target, {**options, **(compiler_options or {})})
    parsed = Target.parse(target)
    jitted = as_jitted(fn, args, kwargs, options)
    with captured_donations() as unused:
        lowered = lower_for(parsed, jitted, args, kwargs)
    _, memory = compile_lowered(lowered, parsed, compiler_options)
    return dataclasses.replace(memory, unused_donations=tuple(unused))


def is_optimized(fn: Callable[..., Any]) -> bool:
    """Tell whether a function is a step that `memopt.optimize` made: one with its own `plan` and `measure`."""
    return all(callable(getattr(fn, name, None)) for name in ("plan", "measure"))


def _measure_optimized(fn: Any, args: tuple, kwargs: dict, target: str | Target | None, options: dict) -> Memory:
    own = getattr(fn, "target", None)
    if options or (target is not None and (own is None or Target.parse(target) != Target.parse(own))):
        given = sorted(options) + ([f"target={target}"] if target is not None else [])
        raise ValueError(f"{given} cannot change a step that memopt.optimize made. Give them to memopt.optimize.")
    return fn.measure(*args, **kwargs)


def as_jitted(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Return `fn` as something with `.trace`: itself where it is jitted already, else through `jax.jit` or `nnx.jit`.

    Args:
        fn: any function.
        args, kwargs: its arguments; nnx objects among them choose `nnx.jit`.
        options: options of `jax.jit`. With none, a function that is jitted already is returned as it is.

    Returns:
        A jitted function.
    """
    if not options and callable(getattr(fn, "trace", None)) and callable(getattr(fn, "lower", None)):
        return fn
    return _jit_for(args, kwargs)(fn, **options)


def _jit_for(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    return sys.modules["flax.nnx"].jit if has_nnx((args, dict(kwargs))) else jax.jit


def has_nnx(tree: Any) -> bool:
    """Tell whether a pytree holds nnx objects (modules, optimizers, RNG streams); flax is not imported for it."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    kinds = (nnx.Module, nnx.Optimizer, nnx.Rngs, nnx.RngStream, nnx.Variable)
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds)))


def lower_for(target: Target, jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Trace and lower a jitted function for a target.

    Args:
        target: where to compile. Values without sharding go to its first device, or with the sharded ones.
        jitted: a function wrapped by `jax.jit` or `nnx.jit`, or anything else with `.trace`.
        args, kwargs: arrays, shapes, nnx objects, static values. For another device than the attached one, arrays
            count as shapes; their `NamedSharding`s are kept and must be over devices of the target.

    Returns:
        A `jax.stages.Lowered`.

    Raises:
        TargetError: the target cannot be compiled for here, or an argument is sharded over devices of another one.
    """
    placed = devices(target)
    arguments = (tuple(args), dict(kwargs or {}))
    _check_shardings(target, arguments)
    if target.attached and target.platform == jax.default_backend():
        lowered = jitted.trace(*arguments[0], **arguments[1]).lower()
    else:
        positional, keywords = _uncommitted(arguments, placed[0])
        traced = jitted.trace(*positional, **keywords)
        # Only lowering may see the foreign device: while tracing, JAX may put constants on the default one.
        with jax.default_device(placed[0]):
            lowered = traced.lower(lowering_platforms=(target.lowering_platform,))
    return getattr(lowered, "lowered", lowered)  # nnx wraps JAX's


def _check_shardings(target: Target, arguments: Any) -> None:
    expected = devices(target)[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            continue
        concrete = isinstance(sharding.mesh, jax.sharding.Mesh)
        if not concrete or not _same_kind(sharding, expected):
            over = f"{sharding.mesh.devices.flat[0].device_kind} devices" if concrete else "an abstract mesh"
            raise TargetError(
                f"Argument {jax.tree_util.keystr(path[1:])} is sharded over {over}, but target '{target}' has "
                f"{expected.device_kind} devices. Give the target of that mesh, or build it with "
                f"memopt.mesh('{target}', shape, names)."
            )


def _same_kind(sharding: jax.sharding.Sharding, expected: Any) -> bool:
    device = next(iter(sharding.device_set))
    return (device.platform, device.device_kind) == (expected.platform, expected.device_kind)


def _uncommitted(arguments: Any, expected: Any) -> Any:
    """Replace arrays by their shapes, keeping shardings over devices of the kind expected, and what is on the host."""

    def shape_of(leaf: Any) -> Any:
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            return leaf
        sharding = leaf.sharding
        away = sharding is not None and sharding.memory_kind == "pinned_host"
        if sharding is not None and not _same_kind(sharding, expected):
            sharding = SingleDeviceSharding(expected, memory_kind="pinned_host") if away else None
        weak_type = getattr(leaf, "weak_type", False)  # typed PRNG keys have none
        kind = HostShape if away else jax.ShapeDtypeStruct
        return kind(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak_type)

    if not has_nnx(arguments):
        return jax.tree.map(shape_of, arguments)
    nnx = sys.modules["flax.nnx"]
    structure, state = nnx.split(arguments)  # keeps what is shared between arguments shared
    return nnx.merge(structure, jax.tree.map(shape_of, state))


@contextlib.contextmanager
def captured_donations() -> Iterator[list[str]]:
    """Collect JAX's "donated buffers were not usable" warnings raised inside, and pass every other warning on.

    Yields:
        A list that holds, after the block, one `"float32[8,128]"` per donated argument that no output can reuse.
    """
    unused: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield unused
    for entry in caught:
        text = str(entry.message)
        if text.startswith("Some donated buffers were not usable"):
            unused += re.findall(r"[a-z]\w*\[[^\]]*\]", text.splitlines()[0])
        else:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno, source=entry.source)


def compile_lowered(
    lowered: Any, target: Target, compiler_options: Mapping[str, Any] | None = None
) -> tuple[jax.stages.Compiled | None, Memory]:
    """Compile, and turn "out of memory" into figures.

    Args:
        lowered: a `jax.stages.Lowered`, as from `lower_for`.
        target: what it was lowered for; gives the limit.
        compiler_options: as in `jax.stages.Lowered.compile`.

    Returns:
        The compiled step and its `Memory`; None and a `Memory` with `fits=False` where the compiler ran out of memory.

    Raises:
        jax.errors.JaxRuntimeError: any other failure of the compiler (a kernel out of VMEM among them).
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(compiler_options) if compiler_options else None)
    except jax.errors.JaxRuntimeError as error:
        memory = memory_of_error(str(error), target, time.perf_counter() - start)
        if memory is None:
            raise
        return None, memory
    seconds = time.perf_counter() - start
    memory = memory_of(compiled, target_limit_bytes(target), seconds)
    return compiled, dataclasses.replace(memory, target=str(target))


def memory_of(
    compiled: jax.stages.Compiled, limit_bytes: int | None = None, compile_seconds: float | None = None
) -> Memory:
    """Read the memory figures of a compiled step.

    Args:
        compiled: from `jax.jit(...).lower(...).compile()`, or nnx's.
        limit_bytes: what the peak is compared with, in bytes; None for no limit.
        compile_seconds: passed through.

    Returns:
        The figures, per JAX device.

    Raises:
        NotImplementedError: the backend has no memory analysis.
    """
    compiled = getattr(compiled, "compiled", compiled)  # nnx wraps JAX's
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("This backend gives no memory analysis. Measure for 'cpu' or a TPU target.")
    argument_bytes, output_bytes = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    alias_bytes, temp_bytes = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    peak_bytes = argument_bytes + output_bytes - alias_bytes + temp_bytes
    hlo_text = compiled.as_text() or ""
    return Memory(
        argument_bytes=argument_bytes,
        output_bytes=output_bytes,
        alias_bytes=alias_bytes,
        temp_bytes=temp_bytes,
        host_temp_bytes=analysis.host_temp_size_in_bytes,
        peak_bytes=peak_bytes,
        limit_bytes=limit_bytes,
        fits=limit_bytes is None or peak_bytes <= limit_bytes,
        xla_remat_ops=count_remat_ops(hlo_text),
        compile_seconds=compile_seconds,
        library_fusions=len(re.findall(r'"kind":\s*"__(?:ynn|xnn|onednn)_fusion"', hlo_text)),
    )


def count_remat_ops(hlo_text: str) -> int:
    """Count the instructions of an HLO text that XLA's own rematerialization made (`.remat` in their names)."""
    return len(re.findall(r"^\s*(?:ROOT\s+)?%?[\w.\-]*\.remat[\w.\-]*\s*=", hlo_text, re.MULTILINE))


# "Ran out of memory on HBM, the total memory required for HLO temporaries (16.51G) exceeds available HBM (15.75G)."
# "Ran out of memory in memory space hbm. Used 16.51G of 15.75G hbm."
_SIZE = r"\(?([\d.]+)\s*([KMGTP]?)i?B?\)?"
_OUT_OF_MEMORY = (
    re.compile(rf"required for [^(]*{_SIZE} exceeds available HBM {_SIZE}", re.IGNORECASE),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE),
)


def memory_of_error(text: str, target: Target, compile_seconds: float | None = None) -> Memory | None:
    """Read the size that the compiler names when a program does not fit a device.

    Args:
        text: the message of the compiler's error.
        target: what was compiled for.
        compile_seconds: passed through.

    Returns:
        A `Memory` with `fits=False`, or None where the message is about something else.
    """
    match = next((found for pattern in _OUT_OF_MEMORY if (found := pattern.search(text))), None)
    if match is None:
        return None
    table_bytes = target_limit_bytes(target)
    return Memory(
        argument_bytes=None,
        output_bytes=None,
        alias_bytes=None,
        temp_bytes=None,
        host_temp_bytes=None,
        peak_bytes=_size_bytes(match[1], match[2]),
        limit_bytes=_size_bytes(match[3], match[4]) if table_bytes is None else table_bytes,
        fits=False,
        xla_remat_ops=None,
        compile_seconds=compile_seconds,
        target=str(target),
    )


def _size_bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGTP".index(unit.upper() or " "))
