"""State bytes of every optimizer on the Llamas of GaLore's paper, from shapes alone, beside what the papers publish.

In: flags. Out: a table, a CSV file and a picture of weights plus optimizer state for each model and optimizer, and a
table of the rows that GaLore's paper prints. Nothing is allocated, compiled or run.

Our accounting: every array of the parameters and of the optimizer's state counts, with the basis, scales and counters
of each. Parameters and plain state are bfloat16; second moments of factored optimizers, scales and norms are float32.
Embedding and output head are apart (untied). Layers are stacked. GB is 10**9 bytes, GiB is 2**30.

Why it differs from the papers: they do not say which tables they count, nor GB from GiB. In the authors' script the
embedding and the head are not projected and keep plain Adam: that is the row "GaLore", larger than what they print.
With both tables projected ("GaLore, tables too") it is smaller: the printed value lies between. Their AdamW row is ours
in GiB for 350M (2.06), and within 4 % of ours in GB or GiB for the others. No number here is tuned to theirs.

    python experiments/state_table.py --models=60m,1b
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import _report
from absl import app, flags

GB = 10**9

#: Zhao et al. 2024, table 2, "GB" for weights plus optimizer state in BF16, and table 1's formula for what is counted.
PUBLISHED = {
    "60m": {"AdamW": 0.36, "GaLore": 0.24},
    "130m": {"AdamW": 0.76, "GaLore": 0.52},
    "350m": {"AdamW": 2.06, "GaLore": 1.22},
    "1b": {"AdamW": 7.80, "GaLore": 4.38},
}
#: Optimizer state alone of LLaMA-7B, "G", as APOLLO's project page gives it (projection at rank 256 for APOLLO).
PUBLISHED_STATE = {"AdamW, 8-bit": 13.0, "GaLore, 8-bit": 4.9, "APOLLO, rank 256": 1.6, "APOLLO-Mini": 0.0}


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of one Llama of GaLore's paper (table 5 and the authors' configurations), and its rank there.

    Args:
        layers, width, hidden: blocks, features, features of the MLP.
        rank: GaLore's.
        vocabulary: tokens.
    """

    layers: int
    width: int
    hidden: int
    rank: int
    vocabulary: int = 32_000


MODELS = {
    "60m": Model(8, 512, 1376, 128),
    "130m": Model(12, 768, 2048, 256),
    "350m": Model(24, 1024, 2736, 256),
    "1b": Model(24, 2048, 5461, 512),
    "7b": Model(32, 4096, 11008, 1024),
}


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("models", list(MODELS), "Models to count.")
    flags.DEFINE_string("out_dir", "out/state_table", "Folder for the CSV files and the picture.")


def parameters(model: Model) -> dict[str, Any]:
    """Return the shapes of a model's parameters in bfloat16, layers stacked."""
    import jax
    import jax.numpy as jnp

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    n, d, f = model.layers, model.width, model.hidden
    square = {name: {"kernel": array(n, d, d)} for name in ("q", "k", "v", "o")}
    wide = {name: {"kernel": array(n, d, f)} for name in ("gate", "up")}
    norms = {name: {"scale": array(n, d)} for name in ("norm_1", "norm_2")}
    blocks = {**square, **wide, "down": {"kernel": array(n, f, d)}, **norms}
    tables = {"embedding": array(model.vocabulary, d), "lm_head": array(d, model.vocabulary)}
    return {"blocks": blocks, "norm": {"scale": array(d)}, **tables}


def _in_blocks(path: str, leaf: Any) -> bool:
    """Say whether a leaf is a matrix of the blocks: what the authors' script projects."""
    return "blocks" in path and "kernel" in path


def optimizers(rank: int) -> dict[str, Callable[[], Any]]:
    """Return every optimizer by the name that the table prints; ours and optax's side by side."""
    import jax.numpy as jnp
    import optax

    from memopt import optim

    low = {"rank": rank, "where": _in_blocks}
    return {
        "SGD": lambda: optax.sgd(1e-3),
        "AdamW": lambda: optax.adamw(1e-3),
        "optax Lion": lambda: optax.lion(1e-3, mu_dtype=jnp.bfloat16),
        "optax Adafactor": lambda: optax.adafactor(1e-3),
        "optax SM3": lambda: optax.sm3(1e-3),
        "optax GaLore": lambda: optax.contrib.galore(1e-3, rank=rank),
        "GaLore": lambda: optim.galore(1e-3, **low),
        "GaLore, tables too": lambda: optim.galore(1e-3, rank=rank),
        "GaLore, 8-bit": lambda: optim.galore(1e-3, optim.scale_by_adam_8bit(), **low),
        "Q-GaLore": lambda: optim.q_galore(1e-3, **low),
        "APOLLO": lambda: optim.apollo(1e-3, **low),
        "APOLLO, rank 256": lambda: optim.apollo(1e-3, rank=256, where=_in_blocks),
        "APOLLO-Mini": lambda: optim.apollo_mini(1e-3, where=_in_blocks),
        "DCT low rank": lambda: optim.dct_low_rank(1e-3, **low),
        "AdamW, 8-bit": lambda: optim.adamw_8bit(1e-3),
        "AdamW, 4-bit": lambda: optim.adamw_4bit(1e-3),
        "momentum, 8-bit": lambda: optim.momentum_8bit(1e-3),
        "Lion, 8-bit": lambda: optim.lion_8bit(1e-3),
        "Muon": lambda: optim.muon(1e-3),
        "Muon, 8-bit": lambda: optim.muon_8bit(1e-3),
        "CAME": lambda: optim.came(1e-3),
        "Adam-mini": lambda: optim.adam_mini(1e-3),
        "MeZO": lambda: None,
    }


def tree_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree of shapes."""
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def rows(names: Sequence[str]) -> list[dict[str, Any]]:
    """Count all optimizers on the named models."""
    import jax

    from memopt import optim

    made = []
    for name in names:
        params = parameters(MODELS[name])
        weights, count = tree_bytes(params), sum(leaf.size for leaf in jax.tree.leaves(params))
        for label, make in optimizers(MODELS[name].rank).items():
            optimizer = make()
            state = optim.mezo(len, 1e-3).init(params) if optimizer is None else jax.eval_shape(optimizer.init, params)
            state_bytes = tree_bytes(state) - (weights if optimizer is None else 0)
            made.append(_row(name, label, count, weights, state_bytes))
        stored = jax.eval_shape(optim.int8_weights, params)
        state = jax.eval_shape(optimizers(MODELS[name].rank)["Q-GaLore"]().init, params)
        made.append(_row(name, "Q-GaLore, int8 weights", count, tree_bytes(stored), tree_bytes(state)))
    return made


def _row(name: str, label: str, count: int, weights: int, state_bytes: int) -> dict[str, Any]:
    total = weights + state_bytes
    published = PUBLISHED.get(name, {}).get(label, PUBLISHED.get(name, {}).get(label.partition(",")[0]))
    published = published if label in ("AdamW", "GaLore", "GaLore, tables too") else None
    return {
        "model": name,
        "optimizer": label,
        "parameters": count,
        "weight_bytes": weights,
        "state_bytes": state_bytes,
        "bytes_a_parameter": state_bytes / count,
        "total_gb": total / GB,
        "total_gib": total / _report.GIB,
        "published_gb": published,
        "ratio": None if published is None else total / GB / published,
        "state_gb": state_bytes / GB,
        "published_state_gb": PUBLISHED_STATE.get(label) if name == "7b" else None,
    }


COLUMNS = (
    _report.Column("model", "Llama"),
    _report.Column("optimizer", "optimizer"),
    _report.Column("state_bytes", "state", "bytes"),
    _report.Column("bytes_a_parameter", "bytes a parameter", "number"),
    _report.Column("total_gb", "weights + state, GB", "number"),
    _report.Column("total_gib", "GiB", "number"),
    _report.Column("published_gb", "published, GB", "number"),
    _report.Column("ratio", "ours / published", "number"),
    _report.Column("state_gb", "state, GB", "number"),
    _report.Column("published_state_gb", "published", "number"),
)


def draw(made: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the state's bytes a parameter of the largest model."""
    last = [row for row in made if row["model"] == made[-1]["model"]]
    last.sort(key=lambda row: row["bytes_a_parameter"])
    with _report.figure(path, size=(8, 6)) as (_, axis):
        axis.barh(
            [row["optimizer"] for row in last], [row["bytes_a_parameter"] for row in last], color=_report.COLORS[0]
        )
        axis.set_xlabel("bytes of optimizer state a parameter")
        axis.set_title(f"Llama {last[0]['model']}, bfloat16")


def main(argv: Sequence[str]) -> None:
    """Count, print, write, draw."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    unknown = [name for name in values.models if name not in MODELS]
    if unknown:
        raise app.UsageError(f"no model {unknown}: choose among {list(MODELS)}")
    made, folder = rows(values.models), pathlib.Path(values.out_dir)
    _report.print_table(COLUMNS, made, "Weights and optimizer state from shapes alone")
    print(f"made with {_report.environment()}")
    _report.write_csv(folder / "state_table.csv", made)
    draw(made, folder / "state_table.png")


if __name__ == "__main__":
    define_flags()
    app.run(main)
