"""Frozen weights: what fine-tuning with adapters alone keeps, against fine-tuning of everything, compiled for a TPU.

In: flags; GPT-2 as shapes, plain and with low-rank adapters (LoRA) added to its dense layers from outside. Out: for
each form of the layers and each training (all weights; gradients of the adapters alone; all gradients taken and those
of the frozen weights dropped by `optax.set_to_zero`) a row for the plain step and one for memopt's plan that repeats no
FLOPs: bytes of the stacks that forward loops hand to backward ones, compiled temporaries, and what the plan names as
not kept. A table and a CSV file; exit code 1 where a plan for dropped gradients keeps more than one that takes none.

    python experiments/frozen.py --small
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import _report
import compress
from absl import app, flags

COLUMNS = (
    _report.Column("layers", "layers"),
    _report.Column("training", "training"),
    _report.Column("row", "row"),
    _report.Column("flops", "step", "flops"),
    _report.Column("residual_bytes", "stacks", "bytes"),
    _report.Column("dropped_bytes", "named as not kept", "bytes"),
    _report.Column("temp_bytes", "temporaries", "bytes"),
    _report.Column("peak_bytes", "compiled peak", "bytes"),
)
FULL, ADAPTERS, DROPPED = "all weights", "adapters", "all, frozen dropped"


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("layers", ["scan", "unrolled"], "Forms of the layers.")
    flags.DEFINE_list("adapted", ["qkv", "out"], "Names of the dense layers that have adapters.")
    flags.DEFINE_integer("rank", 16, "Rank of the adapters.", lower_bound=1)
    flags.DEFINE_bool("small", False, "Use the small forms.")
    flags.DEFINE_bool("tiny", False, "Use the tiny forms, to try the script.")
    flags.DEFINE_bool("compile", True, "Compile; otherwise predictions alone.")
    flags.DEFINE_string("target", "tpu:v5e:1x1", "What to compile for.")
    flags.DEFINE_string("out_dir", "out/frozen", "Folder for rows and the CSV file.")


def adapters(names: Sequence[str], rank: int) -> contextlib.AbstractContextManager:
    """Return a context in which Flax's dense layers of these names add the product of two narrow matrices.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685), section 4.1.
    """
    import flax.linen as nn

    def added(call: Any, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        out, dense = call(*args, **kwargs), context.module
        if not isinstance(dense, nn.Dense) or dense.name not in names or context.method_name != "__call__":
            return out
        down = dense.param("lora_a", nn.initializers.normal(0.02), (args[0].shape[-1], rank), dense.param_dtype)
        up = dense.param("lora_b", nn.initializers.zeros, (rank, dense.features), dense.param_dtype)
        return out + args[0].astype(out.dtype) @ down.astype(out.dtype) @ up.astype(out.dtype)

    return nn.intercept_methods(added)


def build(training: str, layers: str, form: str, names: Sequence[str], rank: int) -> tuple:
    """Return a step of `(params, state, batch)`, the shapes of its arguments, and the options of `jax.jit`."""
    import jax
    import optax

    from memopt.models import common, steps

    _, (_, batch), _ = steps.reference_step("gpt2", layers=layers, small=form == "small", tiny=form == "tiny")
    kind = steps.FAMILIES["gpt2"]
    config = {"small": kind.small, "tiny": kind.tiny}.get(form, kind.full)
    model = kind.model(dataclasses.replace(config, scan=layers == "scan"))
    scope = contextlib.nullcontext if training == FULL else lambda: adapters(names, rank)

    def init() -> Any:
        with scope():
            return model.init(jax.random.key(0), jax.numpy.zeros((1, 8), "int32"))["params"]

    def loss_fn(params: Any, batch: Any) -> Any:
        with scope():
            return common.mean_cross_entropy(model.apply({"params": params}, batch["tokens"]), batch["labels"])

    def is_adapter(path: Any, leaf: Any) -> bool:
        return "lora" in jax.tree_util.keystr(path)

    params = jax.eval_shape(init)
    labels = jax.tree_util.tree_map_with_path(lambda *one: "train" if is_adapter(*one) else "freeze", params)
    optimizer = optax.adamw(3e-4)
    if training == DROPPED:
        optimizer = optax.multi_transform({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    chosen = [training != ADAPTERS or is_adapter(*one) for one in leaves]

    def split(params: Any) -> tuple[list, list]:
        flat = jax.tree.leaves(params)
        return tuple([v for v, c in zip(flat, chosen, strict=True) if c is wanted] for wanted in (True, False))

    def join(trained: list, frozen: list) -> Any:
        trained, frozen = iter(trained), iter(frozen)
        return jax.tree.unflatten(tree, [next(trained if c else frozen) for c in chosen])

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        if training == DROPPED:
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss
        trained, frozen = split(params)
        loss, grads = jax.value_and_grad(lambda trained: loss_fn(join(trained, frozen), batch))(trained)
        updates, state = optimizer.update(grads, state, trained)
        return join(optax.apply_updates(trained, updates), frozen), state, loss

    state = jax.eval_shape(optimizer.init, params if training == DROPPED else split(params)[0])
    return step, (params, state, batch), {"donate_argnums": (0, 1)}


def plain_row(built: tuple, target: str, compiles: bool) -> dict[str, Any]:
    """Return the figures of the step as written."""
    import jax

    import memopt

    step, args, options = built
    closed = jax.jit(step).trace(*args).jaxpr
    row = {"row": "plain", "flops": memopt.matmul_flops(closed), "residual_bytes": compress.stacked_bytes(closed)}
    return row | (_figures(memopt.measure(step, *args, target=target, **options)) if compiles else {})


def planned_row(built: tuple, target: str, compiles: bool) -> dict[str, Any]:
    """Return the figures of the plan of `Remat` with the smallest predicted peak that repeats no FLOPs."""
    import memopt

    step, args, options = built
    common = dict(target=target, passes=[memopt.passes.Remat()], verify=False, **options)
    points = memopt.optimize(step, budget="100%", **common).frontier(*args)
    planned = memopt.optimize(step, budget=compress.smallest(points, 0.0).peak_bytes, **common)
    plan, closed = planned.plan(*args), planned.trace(*args).jaxpr
    row = {
        "row": "memopt",
        "flops": memopt.matmul_flops(closed),
        "residual_bytes": compress.stacked_bytes(closed),
        "dropped_bytes": sum(row.value_bytes for row in plan.dropped),
        "dropped": [f"{row.name}: {row.reason}" for row in plan.dropped],
        "predicted_peak_bytes": plan.predicted_peak_bytes,
    }
    return row | (_figures(planned.measure(*args)) if compiles else {})


def misses(rows: Sequence[dict[str, Any]]) -> bool:
    """Say whether a plan for gradients that are taken and dropped keeps more than one for gradients never taken."""
    planned = {(row["layers"], row["training"]): row for row in rows if row["row"] == "memopt"}
    pairs = [(row, planned.get((layers, ADAPTERS))) for (layers, kind), row in planned.items() if kind == DROPPED]
    return any(
        other is not None and (row["residual_bytes"] > other["residual_bytes"] or row["flops"] > other["flops"])
        for row, other in pairs
    )


def _figures(memory: Any) -> dict[str, Any]:
    return {key: getattr(memory, key) for key in ("temp_bytes", "peak_bytes", "xla_remat_ops", "compile_seconds")}


def main(argv: Sequence[str]) -> int:
    """Make every row that is not there yet, then print and write all."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, rows = flags.FLAGS, []
    folder = pathlib.Path(values.out_dir)
    form = "tiny" if values.tiny else "small" if values.small else "full"
    keys = ("target", "compile", "adapted", "rank")
    settings = {"form": form, "made with": _report.environment(commit=False)} | {k: values[k].value for k in keys}
    cache = _report.Cache(folder / "rows.json", settings)
    for layers in values.layers:
        for training in (FULL, ADAPTERS, DROPPED):
            built = build(training, layers, form, values.adapted, values.rank)
            for name, make in (("plain", plain_row), ("memopt", planned_row)):
                key = f"{layers}|{training}|{name}"
                if cache.get(key) is None:
                    _report.console().print(f"{layers}, {training}: {name} ...")
                    row = {"layers": layers, "training": training} | make(built, values.target, values.compile)
                    cache.put(key, row)
                rows.append(cache.get(key))
            _report.write_csv(folder / "frozen.csv", rows)
    _report.print_table(COLUMNS, rows, f"GPT-2 with frozen weights, compiled for {values.target}, {form} forms")
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
