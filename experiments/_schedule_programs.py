"""The attention programs whose schedules are compared, and the worker that compiles them and counts their kernels.

In: lines of JSON on standard input, each a program: who made it, length, head size, mask, block sizes. Out: a line of
JSON each: cycles and matmul slots of its kernels, forward and backward, or why it has none. It runs as a process of its
own, because libtpu takes the folder of its dumps from the environment when it starts.
"""

from __future__ import annotations

import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import _schedule
import numpy as np

#: Block sizes that are tried for each: queries x keys.
BLOCKS = ((512, 512), (512, 1024), (1024, 512), (1024, 1024), (1024, 2048), (2048, 1024))
SYSTEMS = ("memopt", "flash", "splash", "splash fused", "tokamax")
_BACKWARD = re.compile(r"bwd|backward|dkv|dq|grad")


def program(config: dict[str, Any], gradients: bool = True) -> tuple[Callable[..., Any], list[Any]]:
    """Return a function of q, k, v (and with gradients of the cotangent) and their shapes, in bfloat16."""
    import jax
    import jax.numpy as jnp

    shape = (config["heads"], config["length"], config["head_dim"])
    shape = {"memopt": (1, shape[1], shape[0], shape[2]), "flash": (1, *shape)}.get(config["system"], shape)
    forward = _makers()[config["system"]](config)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def both(q, k, v, cotangent):
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(cotangent)

    return (both, [x] * 4) if gradients else (forward, [x] * 3)


def _makers() -> dict[str, Callable[[dict[str, Any]], Callable[..., Any]]]:
    return {"memopt": _memopt, "flash": _flash, "splash": _splash, "splash fused": _splash, "tokamax": _tokamax}


def _memopt(config: dict[str, Any]) -> Callable[..., Any]:
    from memopt.pallas_kernels import attention

    blocks = tuple(config["blocks"]) if config["blocks"] else None
    return lambda q, k, v: attention(q, k, v, is_causal=config["causal"], implementation="tpu", blocks=blocks)


def _flash(config: dict[str, Any]) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    rows, columns = config["blocks"]
    forward = {"block_q": rows, "block_k_major": columns, "block_k": columns, "block_b": 1}
    keys = {"block_q_major_dkv": rows, "block_k_major_dkv": columns, "block_k_dkv": columns, "block_q_dkv": rows}
    queries = {"block_k_major_dq": columns, "block_k_dq": columns, "block_q_dq": rows}
    sizes, scale = flash.BlockSizes(**forward, **keys, **queries), config["head_dim"] ** -0.5
    return lambda q, k, v: flash.flash_attention(q, k, v, causal=config["causal"], sm_scale=scale, block_sizes=sizes)


def _splash(config: dict[str, Any]) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (rows, columns), length = config["blocks"], config["length"]
    make = masks.CausalMask if config["causal"] else masks.FullMask
    fused = config["system"] == "splash fused"
    sizes = {"block_q": rows, "block_kv": columns, "block_kv_compute": columns}
    sizes |= {"block_q_dkv": rows, "block_kv_dkv": columns, "block_kv_dkv_compute": columns}
    sizes |= {} if fused else {"block_q_dq": rows, "block_kv_dq": columns}
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([make((length, length)) for _ in range(config["heads"])]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
    )
    return lambda q, k, v: kernel((q * config["head_dim"] ** -0.5).astype(q.dtype), k, v)


def _tokamax(config: dict[str, Any]) -> Callable[..., Any]:
    """Return tokamax's splash attention, as its own settings have it; it stands in no public module yet."""
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks
    except ImportError as error:
        raise NotImplementedError(f"tokamax is not there: pip install '.[peers]' ({error})") from error
    (rows, columns), length = config["blocks"], config["length"]
    make = masks.CausalMask if config["causal"] else masks.FullMask
    sizes = {"block_q": rows, "block_kv": columns, "block_kv_compute": columns}
    sizes |= {"block_q_dkv": rows, "block_kv_dkv": columns, "block_kv_dkv_compute": columns}
    kernel = splash.make_splash_mha_single_device(make((length, length)), config=splash.SplashConfig(**sizes))
    return lambda q, k, v: kernel((q * config["head_dim"] ** -0.5).astype(q.dtype), k, v)


# Compiling.


def compiled_counts(fn: Callable[..., Any], args: list[Any], target: str, folder: str) -> dict[str, _schedule.Count]:
    """Compile a function for one chip, and return the count of each of its kernels by name.

    Args:
        fn: the function.
        args: shapes of its arguments.
        target: such as "v5e".
        folder: where libtpu dumps what it compiles; emptied here.
    """
    import jax
    from jax.experimental import topologies

    shape = "1x1x1" if target in ("v4", "v5p") else "1x1"
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{target}:{shape}", chips_per_host_bounds=(1, 1, 1)
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in args]
    for old in pathlib.Path(folder).iterdir():
        old.unlink()
    with jax.default_device(topology.devices[0]):
        traced = jax.jit(fn).trace(*args)
        lowered = traced.lower(lowering_platforms=("tpu",))
    tables = scalar_tables(traced.jaxpr)
    lowered.compile()
    found = {}
    for name, bundles, use in _dumped(folder):
        kernel = max((one for one in tables if one in name), key=len, default="")  # XLA adds to the names
        found[name] = _schedule.count(bundles, use, tables.get(kernel, {}))
    return found


def _dumped(folder: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, bundles and utilization of each kernel in a folder of dumps."""
    for path in sorted(glob.glob(f"{glob.escape(folder)}/*-schedule-analysis_final_bundles.txt")):
        stem = re.sub(r"-\d+-schedule-analysis_final_bundles\.txt$", "", path)
        name = re.sub(r"^\d+-", "", pathlib.Path(stem).name)
        if "tpu_custom_call" not in pathlib.Path(path).read_text() or name == "TLP":
            continue
        escaped = glob.escape(stem)
        (bundles,) = (p for p in glob.glob(f"{escaped}-*-final_bundles.txt") if "schedule-analysis" not in p)
        (use,) = glob.glob(f"{escaped}-*-final_hlo-static-per-bundle-utilization.txt")
        yield name, pathlib.Path(bundles).read_text(), pathlib.Path(use).read_text()


def scalar_tables(closed: Any) -> dict[str, dict[int, np.ndarray]]:
    """Return, by the names of a jaxpr's kernels, those of their operands that are integers known before it runs.

    What follows from constants alone is computed here: the lists of blocks of some systems are.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    _known(closed, [None] * len(closed.jaxpr.invars), found)
    return found


def _known(closed: Any, arguments: list[Any], found: dict[str, dict[int, np.ndarray]]) -> list[Any]:
    """Evaluate what is known of a jaxpr, note the known operands of its kernels, and return its results, or None."""
    from jax.extend import core

    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *arguments], strict=True))
    read = lambda one: one.val if isinstance(one, core.Literal) else values.get(one)  # noqa: E731
    for eqn in closed.jaxpr.eqns:
        given = [read(one) for one in eqn.invars]
        inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        inner = None if eqn.primitive.name == "scan" else inner  # its body sees slices, not what it is given
        made: list[Any] = [None] * len(eqn.outvars)
        if eqn.primitive.name == "pallas_call":
            arrays = {i: np.asarray(one) for i, one in enumerate(given) if one is not None}
            whole = {i: one for i, one in arrays.items() if one.dtype.kind in "iu" and one.dtype.itemsize in (1, 4)}
            found[eqn.params["name"] or ""] = {i: _schedule.words(one) for i, one in whole.items()}
        elif isinstance(inner, core.ClosedJaxpr) and len(inner.jaxpr.invars) == len(given):
            made = _known(inner, given, found)
        elif all(one is not None for one in given) and not eqn.effects:
            made = eqn.primitive.bind(*given, **eqn.params)
            made = list(made) if eqn.primitive.multiple_results else [made]
        values.update(zip(eqn.outvars, made, strict=True))
    return [read(one) for one in closed.jaxpr.outvars]


def row(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return a program's count of its forward and of its backward kernels, or why there is none.

    Where the backward kernels do not compile, the forward one is counted alone.
    """
    found: dict[str, Any] = dict(config)
    for gradients in (True, False):
        try:
            counts = compiled_counts(*program(config, gradients), config["target"], folder)
        except (ValueError, NotImplementedError, RuntimeError, _schedule.Unknown) as error:
            why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            found["backward" if gradients else "forward"] = {"note": why}
            continue
        found |= {name: _added(counts, name == "backward") for name in (["forward", "backward"][: 1 + gradients])}
        return found
    return found


def _added(counts: dict[str, _schedule.Count], backward: bool) -> dict[str, Any]:
    """Return the sum over the kernels of one pass."""
    counts = {name: one for name, one in counts.items() if bool(_BACKWARD.search(name)) == backward}
    cycles = sum(one.cycles for one in counts.values())
    use = sum(one.matmul_use * one.cycles for one in counts.values()) / max(cycles, 1)
    return {"cycles": cycles, "use": use, "kernels": sorted(counts)} if counts else {"note": "no kernel was found"}


def main() -> None:
    """Answer the lines of standard input."""
    sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != pathlib.Path(__file__).parent.parent]
    folder = os.environ["MEMOPT_SCHEDULE_DUMP"]
    for line in sys.stdin:
        print("row " + json.dumps(row(json.loads(line), folder)), flush=True)


class Worker:
    """A process with a folder of dumps of its own that counts programs, one after another; started at the first.

    Example:
        >>> with Worker() as worker:
        ...     pass
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="memopt-schedule-")
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def count(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the counts of one program, see `row`.

        Raises:
            RuntimeError: the process ended.
        """
        process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(config) + "\n")
        process.stdin.flush()
        line = next((one for one in process.stdout if one.startswith("row ")), None)
        if line is None:
            raise RuntimeError(f"the worker ended at {config}: run {__file__} by hand to see why")
        return json.loads(line[4:])

    def _started(self) -> subprocess.Popen[str]:
        dumps = f"--xla_jf_dump_to={self._folder} --xla_jf_dump_llo_text=true"
        dumps += " --xla_jf_dump_llo_pass_label_regex=.*final.*"  # the other passes' are 300 MB a program
        more = {"LIBTPU_INIT_ARGS": dumps, "MEMOPT_SCHEDULE_DUMP": self._folder, "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, __file__],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | more,
        )


if __name__ == "__main__":
    main()
