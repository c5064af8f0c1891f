"""Train a byte-level GPT twice from one seed: plain `jax.jit`, then `memopt.optimize` within a memory budget.

In: flags, and the sources of Python's standard library as text. Out: live progress, a table of memory, time and loss of
both runs, a CSV file and a picture of the memory timelines; exit code 1 where the budget is missed or the losses
differ. Each run is a process of its own, so that its peak resident memory is its own. Only memopt's public API is used.

The defaults suit two CPU cores; for a GPU or TPU name other sizes:

    python experiments/train_lm.py --platform=tpu --batch=64 --length=1024 --layers=12 --width=768 --dtype=bfloat16
"""

import dataclasses
import json
import math
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import _report
import _text
from absl import app, flags
from rich import progress as rich_progress

#: Largest relative difference of two losses that float arithmetic in another order explains after a few dozen steps.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hold what both runs share; see the flags of the same names."""

    steps: int
    batch: int
    length: int
    layers: int
    width: int
    heads: int
    dtype: str
    learning_rate: float
    seed: int
    temp_fraction: float
    platform: str
    out_dir: str
    text_dir: str


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_integer("steps", 20, "Training steps of each run.", lower_bound=2)
    flags.DEFINE_integer("batch", 8, "Windows of text in a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 512, "Bytes in a window.", lower_bound=1)
    flags.DEFINE_integer("layers", 7, "Transformer blocks, scanned.", lower_bound=1)
    flags.DEFINE_integer("width", 128, "Width of the residual stream.", lower_bound=1)
    flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", sorted(TOLERANCE), "Compute dtype.")
    flags.DEFINE_float("learning_rate", 1e-3, "AdamW's learning rate.")
    flags.DEFINE_integer("seed", 0, "Seed of parameters and batches.")
    flags.DEFINE_float("temp_fraction", 0.4, "Budget: arguments, outputs, and this share of the plain temporaries.")
    flags.DEFINE_string("platform", "cpu", "JAX platform to train on; empty for the attached accelerator.")
    flags.DEFINE_string("out_dir", "out/train_lm", "Folder for the CSV file, the picture and the runs' own files.")
    flags.DEFINE_string("text_dir", "", "Folder of Python sources to train on; empty for the standard library.")
    flags.DEFINE_enum("role", "", ["", "plain", "memopt"], "Internal: be the process of one run.")
    flags.DEFINE_integer("budget_bytes", None, "Internal: budget of the run with memopt.")


def make_state(settings: Settings) -> Any:
    """Return the training state: parameters from the seed, AdamW's moments at zero."""
    import jax
    import jax.numpy as jnp

    from memopt.models import gpt2, states

    config = gpt2.GPT2Config(
        vocabulary=256,
        length=settings.length,
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        dtype=jnp.dtype(settings.dtype),
    )
    model = gpt2.GPT2(config)
    optimizer = states.adamw(settings.learning_rate)

    def init(key: Any) -> Any:
        params = model.init(key, jnp.zeros((1, settings.length), jnp.int32))["params"]
        state = states.TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
        return state.replace(step=jnp.zeros((), jnp.int32))

    return jax.jit(init)(jax.random.key(settings.seed))


def make_batch(settings: Settings, text: Any, step: int) -> dict[str, Any]:
    """Return the batch of one step: `tokens` and `labels`, both `int32[batch, length]`."""
    windows = _text.batch(text, step=step, size=settings.batch, length=settings.length, seed=settings.seed)
    return {"tokens": windows[:, :-1], "labels": windows[:, 1:]}


#: XLA:CPU hands some fusions to a kernel library, and what that allocates is in none of the compiler's figures. Both
#: runs do without it, so that the table's compiled bytes are all there are.
NO_LIBRARY_KERNELS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def make_step(role: str, budget_bytes: int | None) -> Any:
    """Return the training step of one run: the same function, jitted or optimized."""
    import jax

    import memopt
    from memopt.models import states

    options = NO_LIBRARY_KERNELS if jax.default_backend() == "cpu" else None
    if role == "plain":
        return jax.jit(states.language_step, donate_argnums=0, compiler_options=options)
    return memopt.optimize(states.language_step, budget=budget_bytes, donate_argnums=0, compiler_options=options)


def rss_bytes() -> int:
    """Return the resident memory of this process now, or its highest so far where the system tells no more."""
    return _resident_bytes() or peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Return the highest resident memory of this process so far; the kernel notes it a little late."""
    scale = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, _resident_bytes())


def _resident_bytes() -> int:
    """Return what the kernel says of this process now, 0 where it does not."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def train(settings: Settings, step: Callable[..., Any], label: str) -> tuple[dict[str, Any], Any]:
    """Run all steps and return the run's own figures and the last state.

    Resident memory is read before the first step (which compiles, too) and its peak after the last one.
    """
    text = _text.load("train", folder=settings.text_dir or None)
    state = make_state(settings)
    figures: dict[str, Any] = {"losses": [], "step_seconds": [], "rss_before_bytes": rss_bytes()}
    with Progress(label, settings.steps, settings.batch * settings.length) as progress:
        for index in range(settings.steps):
            batch = make_batch(settings, text, index)
            start = time.perf_counter()
            state, loss = step(state, batch)
            figures["losses"].append(float(loss))
            figures["step_seconds"].append(time.perf_counter() - start)
            progress.update(figures["losses"][-1], figures["step_seconds"][-1])
    figures["rss_peak_bytes"] = peak_rss_bytes()
    return figures, state


class Progress:
    """Show step, loss, tokens a second and time left; a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str, steps: int, tokens: int):
        self._label, self._steps, self._tokens, self._done = label, steps, tokens, 0
        self._seconds: list[float] = []
        self._console = _report.console()
        texts = ("{task.description}", "step {task.completed}/{task.total}", "{task.fields[note]}")
        columns = (texts[0], rich_progress.BarColumn(20), *texts[1:])
        live = self._console.is_terminal
        self._bar = rich_progress.Progress(*columns, console=self._console, disable=not live)
        self._task = self._bar.add_task(label, total=steps, note="compiling")

    def __enter__(self) -> "Progress":
        self._bar.start()
        if self._bar.disable:
            self._console.print(f"{self._label}: compiling, then {self._steps} steps")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, loss: float, seconds: float) -> None:
        """Count one step; the first one, which compiles, is left out of speed and time left."""
        self._done += 1
        self._seconds += [seconds] if self._done > 1 else []
        note = f"loss {loss:.3f}"
        if self._seconds:
            pace = statistics.fmean(self._seconds[-8:])
            note += f"  {self._tokens / pace:,.0f} tokens/s  {pace * (self._steps - self._done):.0f} s left"
        self._bar.update(self._task, completed=self._done, note=note)
        if self._bar.disable and (self._done % max(1, self._steps // 6) == 0 or self._done == self._steps):
            self._console.print(f"{self._label}: step {self._done}/{self._steps}  {note}")


def run_role(settings: Settings, role: str, budget_bytes: int | None) -> int:
    """Be the process of one run: train, then write figures, plan and timeline to the output folder."""
    import jax

    if settings.platform:
        jax.config.update("jax_platforms", settings.platform)
    import memopt

    step = make_step(role, budget_bytes)
    try:
        figures, state = train(settings, step, {"plain": "plain jax.jit", "memopt": "memopt"}[role])
    except memopt.BudgetError as error:
        print(f"The budget cannot be met: {error}", file=sys.stderr)
        return 1
    args = (state, make_batch(settings, _text.load("train", folder=settings.text_dir or None), 0))
    memory = memopt.measure(step, *args)
    figures["memory"] = {key: getattr(memory, key) for key in ("temp_bytes", "peak_bytes")}
    figures["device_peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if role == "memopt":
        figures["plan"] = _plan_figures(step.plan(*args))
    explanation = memopt.explain(step, *args)
    figures["predicted_peak_bytes"] = explanation.peak_bytes
    _file(settings, role, "timeline").write_text(explanation.to_json(), encoding="utf-8")
    _file(settings, role, "run").write_text(json.dumps(figures), encoding="utf-8")
    return 0


def _plan_figures(plan: Any) -> dict[str, Any]:
    keys = ("predicted_peak_bytes", "baseline_flops", "recompute_flops", "predicted_overhead", "planning_seconds")
    return {key: getattr(plan, key) for key in keys}


def _file(settings: Settings, role: str, kind: str) -> pathlib.Path:
    return pathlib.Path(settings.out_dir) / f"{role}_{kind}.json"


def spawn(settings: Settings, role: str, extra: Sequence[str] = (), *, own_flags: bool = True) -> dict[str, Any] | None:
    """Run one role in a process of its own, with this process's flags or with `extra` alone; None where it failed."""
    result = _file(settings, role, "run")
    result.unlink(missing_ok=True)
    call = [
        sys.executable,
        str(pathlib.Path(__file__).resolve()),
        *(sys.argv[1:] if own_flags else []),
        f"--role={role}",
        *extra,
    ]
    if subprocess.run(call, check=False).returncode or not result.exists():
        return None
    return json.loads(result.read_text(encoding="utf-8"))


def budget_of(plain: dict[str, Any], temp_fraction: float) -> int:
    """Return the budget in bytes: the plain compiled peak with only a share of its temporaries."""
    memory = plain["memory"]
    return memory["peak_bytes"] - memory["temp_bytes"] + int(temp_fraction * memory["temp_bytes"])


def loss_difference(plain: dict[str, Any], ours: dict[str, Any]) -> float:
    """Return the largest relative difference between the losses of two runs, infinite where one is not a number."""
    pairs = zip(plain["losses"], ours["losses"], strict=True)
    worst = [abs(a - b) / max(abs(a), 1e-12) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs]
    return max(worst)


def problems(plain: dict[str, Any], ours: dict[str, Any], budget_bytes: int, dtype: str) -> list[str]:
    """Return one sentence for each promise that a pair of runs breaks; an empty list is success."""
    found = []
    peak_bytes = ours["memory"]["peak_bytes"]
    if peak_bytes > budget_bytes:
        texts = _report.format_bytes(peak_bytes), _report.format_bytes(budget_bytes)
        found.append(f"The compiled peak of {texts[0]} is over the budget of {texts[1]}.")
    difference = loss_difference(plain, ours)
    if not difference <= TOLERANCE[dtype]:
        found.append(f"The losses differ by {difference:.2g}, more than {TOLERANCE[dtype]:g} for {dtype}.")
    return found


def table(plain: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the comparison as rows `what`, `plain`, `memopt`, `change` with raw values and their `style`."""
    plan = ours["plan"]
    above = [run["rss_peak_bytes"] - run["rss_before_bytes"] for run in (plain, ours)]
    seconds = [statistics.median(run["step_seconds"][1:]) for run in (plain, ours)]
    rows = [
        ("compiled peak", "bytes", plain["memory"]["peak_bytes"], ours["memory"]["peak_bytes"]),
        ("compiled temporaries", "bytes", plain["memory"]["temp_bytes"], ours["memory"]["temp_bytes"]),
        ("predicted peak", "bytes", plain["predicted_peak_bytes"], plan["predicted_peak_bytes"]),
        ("process peak RSS", "bytes", plain["rss_peak_bytes"], ours["rss_peak_bytes"]),
        ("  above RSS before step 1", "bytes", *above),
        ("device peak in use", "bytes", plain["device_peak_bytes"], ours["device_peak_bytes"]),
        ("step time, median", "seconds", *seconds),
        ("matmul FLOPs of a step", "flops", plan["baseline_flops"], plan["baseline_flops"] + plan["recompute_flops"]),
        ("  of these recomputed", "flops", 0, plan["recompute_flops"]),
        ("last loss", "number", plain["losses"][-1], ours["losses"][-1]),
    ]
    named = [dict(zip(("what", "style", "plain", "memopt"), row, strict=True)) for row in rows if row[2] is not None]
    return [row | {"change": row["memopt"] / row["plain"] - 1 if row["plain"] else None} for row in named]


def report(settings: Settings, plain: dict[str, Any], ours: dict[str, Any], budget_bytes: int) -> None:
    """Print the table and write it, with the picture, to the output folder."""
    out, folder, rows = _report.console(), pathlib.Path(settings.out_dir), table(plain, ours)
    shown = [row | {key: _report.format_value(row[key], row["style"]) for key in ("plain", "memopt")} for row in rows]
    shown = [row | {"change": "" if row["change"] is None else f"{100 * row['change']:+.1f} %"} for row in shown]
    headings = {"what": "", "plain": "plain jax.jit", "memopt": "memopt", "change": "change"}
    columns = [_report.Column(key, heading) for key, heading in headings.items()]
    out.print()
    _report.print_table(columns, shown, f"Budget {_report.format_bytes(budget_bytes)}", out)
    plan, compiled = ours["plan"], ours["memory"]["peak_bytes"]
    out.print(f"  largest loss difference      {loss_difference(plain, ours):.1e} (relative, {settings.steps} steps)")
    out.print(f"  predicted / compiled peak    {plan['predicted_peak_bytes'] / compiled:.3f}")
    out.print(f"  planned in                   {_report.format_seconds(plan['planning_seconds'])}")
    out.print(f"  made with                    {_report.environment()}", soft_wrap=True)
    _report.write_csv(folder / "train_lm.csv", rows)
    draw(settings, budget_bytes)
    out.print(f"  written to                   {folder}/train_lm.csv, {folder}/train_lm.png", soft_wrap=True)


def draw(settings: Settings, budget_bytes: int) -> None:
    """Draw both memory timelines side by side, coloured alike by module."""
    import memopt

    texts = [_file(settings, role, "timeline").read_text(encoding="utf-8") for role in ("plain", "memopt")]
    both = [memopt.Explanation.from_json(text) for text in texts]
    modules = list(dict.fromkeys([*both[0].top_modules(5), *both[1].top_modules(4)]))[:8]
    with _report.figure(pathlib.Path(settings.out_dir) / "train_lm.png", columns=2, size=(12, 4.8), sharey=True) as (
        drawing,
        axes,
    ):
        for axis, explanation, title in zip(axes, both, ("plain jax.jit", "memopt"), strict=True):
            explanation.plot(axis, modules=modules, legend=False)
            axis.axhline(budget_bytes / _report.MIB, color="black", linestyle="--", linewidth=1)
            axis.set_title(f"{title}: predicted peak {_report.format_bytes(explanation.peak_bytes)}")
        axes[1].set_ylabel("")
        axes[1].annotate(
            "budget",
            (1, budget_bytes / _report.MIB),
            xycoords=("axes fraction", "data"),
            ha="right",
            xytext=(0, 3),
            textcoords="offset points",
        )
        named = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        drawing.legend(list(named.values())[::-1], list(named)[::-1], loc="outside right upper", title="module")


def main(argv: Sequence[str]) -> int:
    """Run one role, or both roles and the report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values = flags.FLAGS
    settings = Settings(**{field.name: values[field.name].value for field in dataclasses.fields(Settings)})
    pathlib.Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
    if values.role:
        return run_role(settings, values.role, values.budget_bytes)
    plain = spawn(settings, "plain")
    if plain is None:
        return _fail("The plain run failed; its message is above.")
    budget_bytes = budget_of(plain, settings.temp_fraction)
    ours = spawn(settings, "memopt", [f"--budget_bytes={budget_bytes}"])
    if ours is None:
        return _fail("The run with memopt failed; its message is above.")
    report(settings, plain, ours, budget_bytes)
    found = problems(plain, ours, budget_bytes, settings.dtype)
    return _fail(" ".join(found)) if found else 0


def _fail(message: str) -> int:
    print(f"FAILED: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    define_flags()
    app.run(main)
