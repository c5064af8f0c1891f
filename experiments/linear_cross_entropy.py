"""How much memory does a vocabulary head with its loss take: naive, in checkpointed chunks, and `linear_cross_entropy`?

In: flags. Out: a table of the compiler's figures at the head of Gemma 2 2B and at 4,096 x 128,256, a CSV file, and exit
code 1 where a figure misses what is asked of it. Nothing is run: libtpu compiles ahead of time.

    python experiments/linear_cross_entropy.py --rows=gemma --forms=kernel
"""

import functools
import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import _report
from absl import app, flags

MIB = 2**20
GEMMA = (8_192, 2_304, 256_000)
CHUNKED_LIMIT_BYTES = {4_096: 2_820 * MIB, 8_192: 2_884 * MIB, 16_384: 3_012 * MIB, 32_768: 3_268 * MIB}
FORMS = ("kernel", "lean", "chunked", "naive")
COLUMNS = (
    _report.Column("head", "tokens x dim x vocabulary"),
    _report.Column("target", "target"),
    _report.Column("form", "form"),
    _report.Column("forward_temp_bytes", "forward temporaries", "bytes"),
    _report.Column("peak_bytes", "forward + backward peak", "bytes"),
    _report.Column("over_bytes", "beyond arguments and outputs", "bytes"),
    _report.Column("limit_bytes", "asked for", "bytes"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("rows", ["gemma", *map(str, CHUNKED_LIMIT_BYTES)], "`gemma`, or numbers of tokens of the table.")
    flags.DEFINE_list("forms", list(FORMS), f"Any of {', '.join(FORMS)}.")
    flags.DEFINE_bool("tiny", False, "Use tiny shapes, to try the script.")
    flags.DEFINE_string("out_dir", "out/linear_cross_entropy", "Folder for the CSV file.")


def loss_of(form: str, hidden: Any, weight: Any, labels: Any) -> Any:
    """Return the loss of each token in one of the forms compared."""
    import jax.numpy as jnp

    from memopt.pallas_kernels import linear_cross_entropy

    if form in ("kernel", "lean"):
        implementation = {"kernel": None, "lean": "lean"}[form]
        return linear_cross_entropy(hidden, weight, labels, implementation=implementation)
    if form == "naive":
        return _naive(hidden, weight, labels)
    rows = min(1_024, hidden.shape[0])
    hidden = hidden.reshape(-1, rows, hidden.shape[1])
    return jnp.concatenate([_scanned(hidden, weight, labels.reshape(-1, rows)).reshape(-1)])


def _naive(hidden: Any, weight: Any, labels: Any) -> Any:
    import jax.numpy as jnp
    import optax

    logits = jnp.dot(hidden, weight, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _scanned(hidden: Any, weight: Any, labels: Any) -> Any:
    import jax

    chunk = jax.checkpoint(_naive)
    return jax.lax.scan(lambda _, x: (None, chunk(x[0], weight, x[1])), None, (hidden, labels))[1]


def row_of(form: str, shape: tuple[int, int, int], target: str) -> dict[str, Any]:
    """Return the compiler's figures of one form at one shape, bfloat16."""
    import jax
    import jax.numpy as jnp

    import memopt

    tokens, dim, vocab = shape
    types = ((tokens, dim), jnp.bfloat16), ((dim, vocab), jnp.bfloat16), ((tokens,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*kind) for kind in types]
    loss = functools.partial(loss_of, form)
    forward = memopt.measure(loss, *arguments, target=target)
    both = memopt.measure(jax.value_and_grad(_mean_of(loss), (0, 1)), *arguments, target=target)
    return {
        "head": f"{tokens} x {dim} x {vocab}",
        "target": target,
        "form": form,
        "forward_temp_bytes": forward.temp_bytes,
        "peak_bytes": both.peak_bytes,
        "over_bytes": None if both.peak_bytes is None else both.peak_bytes - 2 * (tokens + vocab) * dim * 2,
    }


def _mean_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: loss(*arguments).mean()


def table_of(rows: Sequence[str], tiny: bool) -> list[tuple[tuple[int, int, int], str, int | None]]:
    """Return `(shape, target, limit on the peak in bytes or None)` for each row asked for."""
    found: list[tuple[tuple[int, int, int], str, int | None]] = []
    for row in rows:
        if row == "gemma":
            tokens, dim, vocab = (256, 128, 1_000) if tiny else GEMMA
            found.append(((tokens, dim, vocab), "tpu:v5e:1x1", 2 * (tokens + vocab) * dim * 2 + 64 * MIB))
        else:
            shape = (256, 128, 1_000) if tiny else (int(row), 4_096, 128_256)
            found.append((shape, "tpu:v5p:1x1x1", CHUNKED_LIMIT_BYTES.get(int(row))))
    return found


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name every kernel that takes more than is asked of it."""
    found = []
    for row in (row for row in rows if row["form"] == "kernel"):
        if row["limit_bytes"] is not None and not (row["peak_bytes"] or 0) < row["limit_bytes"]:
            found.append(f"{row['head']} peaks at {_report.format_bytes(row['peak_bytes'])}")
        if row["forward_temp_bytes"] > 8 * MIB:
            found.append(f"{row['head']} forward takes {_report.format_bytes(row['forward_temp_bytes'])}")
    return found


def main(argv: Sequence[str]) -> int:
    """Compile every form at every shape and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    for shape, target, limit in table_of(values.rows, values.tiny):
        for form in values.forms:
            rows.append(row_of(form, shape, target) | {"limit_bytes": limit})
            gc.collect()
            _report.write_csv(pathlib.Path(values.out_dir) / "linear_cross_entropy.csv", rows)
    _report.print_table(COLUMNS, rows, "A linear head with its loss, bfloat16", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
