"""What do the pure-JAX forms of attention and linear cross-entropy do to a process on the CPU, beside naive ones?

In: flags. Out: forward and backward run for real, each form and length in a process of its own: the process's peak
resident memory and the median time of a run; a table, a CSV file and a picture. Exit
code 1 where the lean form takes more memory at any length, or more time from 2,048 tokens on.

    python experiments/cpu_kernels.py --lengths=1024,2048
"""

import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import _report
from absl import app, flags

FAST_FROM = 2_048
COLUMNS = (
    _report.Column("kind", "what"),
    _report.Column("length", "tokens", "number"),
    _report.Column("naive_rss_bytes", "process peak, naive", "bytes"),
    _report.Column("lean_rss_bytes", "lean", "bytes"),
    _report.Column("naive_seconds", "time, naive", "seconds"),
    _report.Column("lean_seconds", "lean", "seconds"),
    _report.Column("time_ratio", "lean / naive", "number"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("kinds", ["attention", "loss"], "What to run: attention, loss.")
    flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192"], "Numbers of tokens.")
    flags.DEFINE_integer("runs", 5, "Runs of each form, of which the median counts.")
    flags.DEFINE_integer("heads", 4, "Heads of the attention, 64 wide, causal, float32.")
    flags.DEFINE_integer("vocabulary", 16_384, "Vocabulary of the loss, 512 wide, float32.")
    flags.DEFINE_string("case", "", "Internal: the case that this process runs, as kind:form:length.")
    flags.DEFINE_string("out_dir", "out/cpu_kernels", "Folder for the CSV file and the picture.")


def attention_case(form: str, length: int, heads: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return gradients of a causal attention as a function, and its arguments."""
    import jax
    import jax.numpy as jnp

    from memopt.pallas_kernels import attention

    def naive(q: Any, k: Any, v: Any) -> Any:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.125
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    def lean(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, is_causal=True, implementation="lean")

    chosen = {"naive": naive, "lean": lean}[form]
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = tuple(jax.random.normal(key, (1, length, heads, 64)) for key in keys)
    return jax.grad(lambda *arrays: jnp.sin(chosen(*arrays)).sum(), (0, 1, 2)), arrays


def loss_case(form: str, length: int, vocabulary: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return gradients of a linear head with its loss as a function, and its arguments."""
    import jax
    import optax

    from memopt.pallas_kernels import linear_cross_entropy

    def naive(hidden: Any, weight: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels)

    def lean(hidden: Any, weight: Any, labels: Any) -> Any:
        return linear_cross_entropy(hidden, weight, labels, implementation="lean")

    chosen = {"naive": naive, "lean": lean}[form]
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = jax.random.normal(keys[0], (length, 512)), jax.random.normal(keys[1], (512, vocabulary)) * 0.05
    labels = jax.random.randint(keys[2], (length,), 0, vocabulary)
    return jax.grad(lambda *arrays: chosen(*arrays).mean(), (0, 1)), (*arrays, labels)


def run_case(kind: str, form: str, length: int, values: Any) -> dict[str, Any]:
    """Run one case in this process and return its figures."""
    import jax

    make = {"attention": (attention_case, values.heads), "loss": (loss_case, values.vocabulary)}
    function, arrays = make[kind][0](form, length, make[kind][1])
    compiled = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    seconds = []
    for _ in range(values.runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rss_bytes": peak, "seconds": statistics.median(seconds), "all_seconds": seconds}


def spawn(case: str) -> dict[str, Any]:
    """Run a case in a process of its own.

    Raises:
        RuntimeError: it failed; its message is on the terminal.
    """
    call = [sys.executable, str(pathlib.Path(__file__).resolve()), *sys.argv[1:], f"--case={case}"]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run of {case} failed")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(kind: str, length: int) -> dict[str, Any]:
    """Return both forms' figures of one kind at one length."""
    naive, lean = (spawn(f"{kind}:{form}:{length}") for form in ("naive", "lean"))
    return {
        "kind": kind,
        "length": length,
        **{f"{form}_{key}": figures[key] for form, figures in (("naive", naive), ("lean", lean)) for key in naive},
        "time_ratio": lean["seconds"] / naive["seconds"],
    }


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name every row in which the lean form takes more."""
    found = []
    for row in rows:
        name = f"{row['kind']} of {row['length']} tokens"
        if row["lean_rss_bytes"] >= row["naive_rss_bytes"]:
            found.append(f"{name}: the lean form takes no less memory")
        if row["length"] >= FAST_FROM and row["time_ratio"] > 1:
            found.append(f"{name}: the lean form takes {row['time_ratio']:.2f} of the naive one's time")
    return found


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw process peaks and times against the length."""
    with _report.figure(path, columns=2, size=(10.0, 4.2)) as (_, axes):
        for color, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
            chosen = [row for row in rows if row["kind"] == kind]
            for form, line in (("naive", "--"), ("lean", "-")):
                style = {"color": _report.COLORS[color], "linestyle": line, "marker": "o", "label": f"{kind}, {form}"}
                lengths = [row["length"] for row in chosen]
                axes[0].plot(lengths, [row[f"{form}_rss_bytes"] / _report.GIB for row in chosen], **style)
                axes[1].plot(lengths, [row[f"{form}_seconds"] for row in chosen], **style)
        for one, label in zip(axes, ("peak of the process (GiB)", "forward and backward (s)"), strict=True):
            one.set_xscale("log", base=2)
            one.set(xlabel="tokens", ylabel=label)
        axes[1].set_yscale("log")
        axes[0].legend()


def main(argv: Sequence[str]) -> int:
    """Run every case and print what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, out, rows = flags.FLAGS, _report.console(), []
    if values.case:
        kind, form, length = values.case.split(":")
        print(json.dumps(run_case(kind, form, int(length), values)))
        return 0
    folder = pathlib.Path(values.out_dir)
    for kind in values.kinds:
        for length in values.lengths:
            rows.append(row_of(kind, int(length)))
            _report.write_csv(folder / "cpu_kernels.csv", rows)
    draw(folder / "cpu_kernels.png", rows)
    _report.print_table(COLUMNS, rows, "Forward and backward on this machine's CPU", out)
    out.print(f"  made with {_report.environment()}", soft_wrap=True)
    for sentence in misses(rows):
        out.print(f"MISSED: {sentence}", soft_wrap=True)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
