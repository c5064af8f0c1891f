"""`Shard(strategy="auto")` beside rules written by hand, on the same devices: peak and collectives, as compiled.

The rules are those that MaxText's users start from: the embedding dimension of every weight is split over `fsdp`;
heads, MLP and vocabulary over `tensor`; the batch over `fsdp`. They are given to `jax.jit` as `NamedSharding`s of the
arguments and the new state, what each module returns is constrained by the rules for activations (without
`--activations` that too is left to XLA's partitioner), and each block is under `jax.checkpoint`. "auto" is then given
the smallest peak of these as its budget, and compiled too. Seconds are predicted from the collectives of each compiled
program by one tariff. Rows that are finished are kept in the output folder. No TPU is needed and nothing runs.

    python experiments/sharding_rules.py --case=llama_8b:v5e:4x4 --tensor_ways=1,4
"""

from __future__ import annotations

import gc
import pathlib
import re
from typing import Any

import _report
import _sharded
from absl import app, flags

#: The logical axes of each weight's last two dimensions, by the name of its module.
LOGICAL = {
    "embedding": ("vocab", "embed"),
    "q": ("embed", "heads"),
    "k": ("embed", "heads"),
    "v": ("embed", "heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "head": ("embed", "vocab"),
}
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
#: The logical axis of the last dimension of what a module returns; the first is the batch, the second the length.
ACTIVATIONS = {name: axes[1] for name, axes in LOGICAL.items()} | dict.fromkeys(("embed", "norm"), "embed")
ACTIVATION_RULES = RULES | {"embed": "tensor"}
FIGURES = ("fits", "peak_bytes", "xla_remat_ops", "compile_seconds")
COLUMNS = (
    _report.Column("rules", "shardings"),
    _report.Column("mesh", "mesh"),
    _report.Column("fits", "fits"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
    _report.Column("state_bytes", "state", "bytes"),
    _report.Column("collective_seconds", "collectives, predicted", "seconds"),
    _report.Column("sent_bytes", "sent", "bytes"),
    _report.Column("repeated_share", "repeated FLOPs", "percent"),
    _report.Column("xla_remat_ops", "XLA remat ops", "number"),
    _report.Column("note", "note"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_string("case", "llama_8b:v5e:4x4", "Step and mesh, as model:kind:topology.")
    flags.DEFINE_list("tensor_ways", ["1", "4"], "Devices along `tensor` of each mesh; the others are along `fsdp`.")
    flags.DEFINE_bool("activations", True, "Constrain activations by hand too, else the state and the batch alone.")
    flags.DEFINE_string("remat", "nothing", "The jax.checkpoint policy of each block: nothing, dots_no_batch, qkvo.")
    flags.DEFINE_integer("batch", None, "Sequences in all; None for one on each device.")
    flags.DEFINE_integer("length", 2048, "Tokens of one sequence.")
    flags.DEFINE_integer("layers", None, "Layers; None for the model's own.")
    flags.DEFINE_string("out_dir", "out/sharding_rules", "Folder for the CSV file.")


def spec_of(path: str, rank: int) -> tuple[str | None, ...]:
    """Return the mesh axes of a leaf of the state by its path: scalars, norms and counts are whole everywhere."""
    names = re.findall(r"\w+", path)
    name = next((n for n in reversed(names) if n in LOGICAL), None)
    if name is None or rank < 2 or names[-1] not in ("kernel", "embedding"):
        return (None,) * rank
    return (*(None,) * (rank - 2), *(RULES[axis] for axis in LOGICAL[name]))


def placed(state: Any, batch: Any, mesh: Any) -> tuple[Any, Any]:
    """Return the shardings of a state and a batch by the rules."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def place(path: Any, leaf: Any) -> Any:
        return NamedSharding(mesh, PartitionSpec(*spec_of(jax.tree_util.keystr(path), len(leaf.shape))))

    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.tree_util.tree_map_with_path(place, state), jax.tree.map(lambda _: rows, batch)


def constrained(step: Any, mesh: Any) -> Any:
    """Return a step whose modules' results are constrained by the rules for activations."""
    import flax.linen as nn
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def constrain(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        made = method(*args, **kwargs)
        name = re.sub(r"_\w+$", "", context.module.name or "")
        if name not in ACTIVATIONS or getattr(made, "ndim", 0) != 3:
            return made
        spec = PartitionSpec("fsdp", None, ACTIVATION_RULES[ACTIVATIONS[name]])
        return jax.lax.with_sharding_constraint(made, NamedSharding(mesh, spec))

    def run(state: Any, batch: Any) -> Any:
        with nn.intercept_methods(constrain):
            return step(state, batch)

    return run


def row_by_hand(case: str, ways: int, options: Any) -> dict[str, Any]:
    """Return the figures of the step under the rules on one mesh."""
    import jax

    import memopt

    model, _, topology = case.partition(":")
    target = f"tpu:{topology}"
    devices = _sharded.devices_of(target)
    mesh = memopt.mesh(target, (devices // ways, ways), ("fsdp", "tensor"))
    batch = options.batch or devices
    step, args, jit_options = _sharded.step_of(model, batch, options.length, options.layers, options.remat)
    places = placed(*args, mesh)
    rules = f"by hand, {options.remat} saved" + ("" if options.activations else ", activations left to XLA")
    row: dict[str, Any] = {"rules": rules, "mesh": f"fsdp={devices // ways}, tensor={ways}"}
    row["state_bytes"] = _sharded.state_bytes(args[0], places[0])[0]
    plain = _sharded.step_of(model, batch, options.length, options.layers)
    row["repeated_share"] = repeated_share(plain, (step, args))
    settings = {"in_shardings": places, "out_shardings": (places[0], None)} | jit_options
    kept = Kept(jax.jit(constrained(step, mesh) if options.activations else step, **settings))
    memory = memopt.measure(kept, *args, target=target)
    row |= {name: getattr(memory, name) for name in FIGURES}
    return row | (_sharded.compiled_sends(memopt.collectives(kept.compiled), target) if memory.fits else {})


def repeated_share(plain: Any, checkpointed: Any) -> float:
    """Return the FLOPs that a step repeats, as a part of the plain step's; each comes with its own arguments.

    A training state brings its model along: one step over the other's arguments would be the other step.
    """
    import jax

    import memopt

    flops = [memopt.matmul_flops(jax.make_jaxpr(fn)(*args)) for fn, args, *_ in (plain, checkpointed)]
    return flops[1] / flops[0] - 1


class Kept:
    """A jitted step that remembers its compiled program: one compilation then gives figures and text.

    Args:
      jitted: a function wrapped by `jax.jit`.
    """

    def __init__(self, jitted: Any):
        self.stage, self.compiled = jitted, None

    def trace(self, *args: Any, **kwargs: Any) -> Kept:
        """Trace, as `jax.jit(...).trace`."""
        return self._next(self.stage.trace(*args, **kwargs))

    def lower(self, *args: Any, **kwargs: Any) -> Kept:
        """Lower, as a traced function's `lower`."""
        return self._next(self.stage.lower(*args, **kwargs))

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        """Compile, as a lowered function's `compile`, and remember the result."""
        self.compiled = self.stage.compile(*args, **kwargs)
        return self.compiled

    def _next(self, stage: Any) -> Kept:
        self.stage = stage
        return self


def row_of_auto(case: str, budget: int | None, options: Any) -> dict[str, Any]:
    """Return the figures of the plain step under `"auto"`, with at most this peak."""
    import memopt

    model, _, topology = case.partition(":")
    target = f"tpu:{topology}"
    devices = _sharded.devices_of(target)
    mesh = memopt.mesh(target, (devices,), ("data",))
    step, args, jit_options = _sharded.step_of(model, options.batch or devices, options.length, options.layers)
    passes = [*memopt.passes.default(), memopt.passes.Shard(mesh, strategy="auto")]
    planned = memopt.optimize(step, passes=passes, target=target, budget=budget, **jit_options)
    row: dict[str, Any] = {"rules": "auto"}
    try:
        compiled = planned.lower(*args).compile()
    except memopt.BudgetError as error:
        return row | {"fits": False, "note": f"no plan fits: {error.smallest_peak_bytes} bytes at least"}
    memory, plan = planned.measure(*args), planned.plan(*args)
    chosen = next(d.name for d in plan.decisions if d.name.startswith("shard/auto/"))
    row |= {name: getattr(memory, name) for name in FIGURES}
    row |= {"mesh": chosen.removeprefix("shard/auto/"), "repeated_share": plan.recompute_flops / plan.baseline_flops}
    row["state_bytes"] = _sharded.state_bytes(args[0], planned.shardings(*args)[0][0])[0]
    row["planning_seconds"] = plan.planning_seconds
    return row | _sharded.compiled_sends(memopt.collectives(compiled), target)


def verdict(auto: dict[str, Any], by_hand: list[dict[str, Any]]) -> str:
    """Say whether "auto" takes no more memory and sends for no longer than each set of rules that fits."""
    worse = [
        row["mesh"]
        for row in by_hand
        if row["fits"]
        and not (
            auto.get("fits")
            and auto["peak_bytes"] <= row["peak_bytes"]
            and auto["collective_seconds"] <= row["collective_seconds"]
        )
    ]
    return f"more than by hand on {'; '.join(worse)}" if worse else "no more than any of them"


def main(_: Any) -> None:
    """Compile the step under the rules on every mesh, then under "auto"."""
    options, folder = flags.FLAGS, pathlib.Path(flags.FLAGS.out_dir)
    names = ("remat", "activations", "batch", "length", "layers")
    settings = {name: getattr(options, name) for name in names} | {"environment": _report.environment(commit=False)}
    cache = _report.Cache(folder / "rows.json", settings)
    rows: list[dict[str, Any]] = []
    for ways in map(int, options.tensor_ways):
        key = f"{options.case} {ways}"
        rows.append(cache.get(key) or row_by_hand(options.case, ways, options))
        cache.put(key, rows[-1])
        print(rows[-1], flush=True)
        _report.write_csv(folder / "rules.csv", rows)
        gc.collect()
    budget = min((row["peak_bytes"] for row in rows if row["fits"]), default=None)
    key = f"{options.case} auto {budget}"
    auto = cache.get(key) or row_of_auto(options.case, budget, options)
    cache.put(key, auto)
    print(auto, flush=True)
    auto["note"] = auto.get("note") or verdict(auto, rows)
    rows.append(auto)
    _report.write_csv(folder / "rules.csv", rows)
    _report.print_table(COLUMNS, rows, f"{options.case}, per device ({_report.environment()})")


if __name__ == "__main__":
    define_flags()
    app.run(main)
