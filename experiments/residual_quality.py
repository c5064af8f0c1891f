"""Quality of residuals in few bits: gradients on a real batch, then short trainings, for every codec and sketch.

In: flags; the sources of Python's standard library for a byte-level GPT, scikit-learn's digits for a vision
transformer. Out: for each way of storing what the backward pass reads the cosine between its gradient and the exact one
and their relative distance, then the loss on held-out data after training with it, its spread over the seeds and its
gap to exact training; two tables and CSV files. Everything that a forward pass keeps is stored (`always=True`, nothing
repeated); of sketches, all that weight gradients alone read. All trainings see the same batches and start from the same
parameters. Norms of samples are kept where samples have numbers: of the digits; they are those that the form itself
has found. Exit code 1 where a form stores nothing (before any training), and where int8 does not end within the seeds'
spread of exact training.

The digits need the extra `bench` (`pip install -e '.[bench]'`); `--models=gpt` does without. The defaults are a reduced
form, of minutes on one core. The long form:

    python experiments/residual_quality.py --width=128 --depth=4 --length=128 --steps=1000
"""

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import _report
import _text
import numpy as np
from absl import app, flags

#: Ways to store, as a pass: codecs by name, sketches as kind:ratio; kind:ratio:norms keeps gradient norms of samples.
FORMS = (
    "int8",
    "fp8-e4m3",
    "fp8-e5m2",
    "int4",
    "int4-asymmetric-stochastic",
    "int2-asymmetric-stochastic",
    "derivative4",
    "derivative2",
    "derivative-mask",
    "rmm:0.5",
    "rmm:0.1",
    "wta:0.5",
    "wta:0.1",
    "wta:0.5:norms",
    "wta:0.1:norms",
)
GRADIENTS = (
    _report.Column("model", "model"),
    _report.Column("form", "residuals as"),
    _report.Column("stored", "stored", "number"),
    _report.Column("kept_bytes", "of residual bytes", "bytes"),
    _report.Column("cosine", "cosine", "number"),
    _report.Column("error", "relative error", "percent"),
    _report.Column("loss_error", "loss differs by", "number"),
)
TRAININGS = (
    _report.Column("model", "model"),
    _report.Column("form", "residuals as"),
    _report.Column("loss", "held-out loss, nats", "number"),
    _report.Column("spread", "spread of seeds", "number"),
    _report.Column("gap", "gap to exact", "number"),
    _report.Column("gap_spread", "spread of gaps", "number"),
    _report.Column("seconds", "took", "seconds"),
)


def define_flags() -> None:
    """Define the flags; called when this file runs as a script, never at import."""
    flags.DEFINE_list("models", ["gpt", "vit"], "gpt, vit or both.")
    flags.DEFINE_list("forms", list(FORMS), "Codecs by name, sketches as kind:ratio or kind:ratio:norms.")
    flags.DEFINE_list("train", ["int8", "int4", "int2", "derivative4", "rmm:0.5", "wta:0.5"], "Forms to train with.")
    flags.DEFINE_integer("width", 64, "Features.")
    flags.DEFINE_integer("depth", 2, "Layers.")
    flags.DEFINE_integer("heads", 4, "Attention heads.")
    flags.DEFINE_integer("length", 64, "Bytes of a sequence (gpt).")
    flags.DEFINE_integer("batch", 16, "Sequences or images a step.")
    flags.DEFINE_integer("steps", 150, "Steps of a training.")
    flags.DEFINE_integer("seeds", 3, "Seeds of each training: of parameters and batches.")
    flags.DEFINE_integer("warm", 50, "Steps of exact training before gradients are compared.")
    flags.DEFINE_float("rate", 1e-3, "Learning rate of AdamW.")
    flags.DEFINE_string("out_dir", "out/residual_quality", "Folder for the CSV files.")


def make_pass(form: str, samples: int = 0) -> Any:
    """Return the pass of a form: `Sketch` for `kind:ratio`, else `Compress` of everything that is kept.

    Args:
      form: a way to store.
      samples: how many samples the data has, for forms that keep norms of them; their numbers are the last argument.
    """
    import memopt

    kind, *more = form.split(":")
    if not more:
        return memopt.passes.Compress(form, always=True)
    norms = {"samples": samples, "ids": "[4]"} if keeps_norms(form) else {}
    return memopt.passes.Sketch(kind, ratio=float(more[0]), always=True, **norms)


def keeps_norms(form: str) -> bool:
    """Say whether a form keeps gradient norms of samples from step to step."""
    return form.endswith(":norms")


class Gpt:
    """The byte-level GPT and its data: windows of a text, which have no numbers."""

    samples = 0

    def __init__(self, values: Any):
        from memopt.models import gpt2

        sizes = {"layers": values.depth, "width": values.width, "heads": values.heads, "length": values.length}
        self.values = values
        self.model = gpt2.GPT2(gpt2.GPT2Config(vocabulary=256, dtype="float32", **sizes))
        self.text = {split: _text.load(split, max_bytes=1 << 22) for split in _text.SPLITS}

    def batch(self, split: str, step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and labels of one step."""
        sizes = {"size": self.values.batch, "length": self.values.length}
        windows = _text.batch(self.text[split], step=step, seed=seed, **sizes)
        return windows[:, :-1], windows[:, 1:]


class Vit:
    """The vision transformer and scikit-learn's 8 x 8 digits, one in five of them held out."""

    def __init__(self, values: Any):
        try:
            from sklearn import datasets
        except ImportError as error:
            raise app.UsageError(
                "--models=vit needs scikit-learn: pip install -e '.[bench]', or --models=gpt"
            ) from error

        from memopt.models import vit

        sizes = {"layers": values.depth, "width": values.width, "heads": values.heads}
        self.values = values
        self.model = vit.ViT(vit.ViTConfig(image=8, patch=2, classes=10, scan=True, dtype="float32", **sizes))
        digits = datasets.load_digits()
        images = np.repeat(digits.images[..., None] / 8.0 - 1.0, 3, axis=-1).astype(np.float32)
        held = np.arange(len(images)) % 5 == 0
        labels = digits.target.astype(np.int32)
        self.data = {"train": (images[~held], labels[~held]), "validation": (images[held], labels[held])}
        self.samples = int((~held).sum())

    def batch(self, split: str, step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return images and labels of one step."""
        chosen = self.numbers(split, step, seed)
        return tuple(array[chosen] for array in self.data[split])

    def numbers(self, split: str, step: int, seed: int) -> np.ndarray:
        """Return which images a step sees."""
        chosen = np.random.default_rng((seed, step)).integers(0, len(self.data[split][0]), self.values.batch)
        return chosen.astype(np.int32)


MODELS: dict[str, Callable[[Any], Any]] = {"gpt": Gpt, "vit": Vit}


class Remembering:
    """The loss and its gradient from rows that are drawn by the norms of earlier calls.

    Args:
      step: a step over norms, parameters, inputs, labels and numbers of samples.
      fresh: its norms before the first call.
    """

    def __init__(self, step: Callable[..., Any], fresh: Any):
        self.step, self.fresh, self.norms = step, fresh, fresh

    def __call__(self, *args: Any) -> tuple[Any, Any]:
        self.norms, loss, grads = self.step(self.norms, *args)
        return loss, grads


class Bench:
    """One model: its gradient, exact or with residuals in another form, and trainings with it."""

    def __init__(self, name: str, values: Any):
        import optax

        self.values, self.task = values, MODELS[name](values)
        self.optimizer = optax.adamw(values.rate, weight_decay=0.0)
        self.known: dict[str, tuple[Callable[..., Any], Any]] = {}

    def loss(self, params: Any, inputs: Any, labels: Any) -> Any:
        """Return the mean cross-entropy."""
        from memopt.models import common

        return common.mean_cross_entropy(self.task.model.apply({"params": params}, inputs), labels)

    def start(self, seed: int) -> tuple[Any, Any]:
        """Return parameters and the optimizer's state."""
        import jax

        inputs, _ = self.task.batch("train", 0, 0)
        params = jax.jit(self.task.model.init)(jax.random.key(seed), inputs)["params"]
        return params, self.optimizer.init(params)

    @functools.cached_property
    def grad(self) -> Callable[..., Any]:
        """The loss and its gradient, not compiled."""
        import jax

        return jax.value_and_grad(self.loss)

    def stored(self, form: str) -> tuple[Callable[..., Any], Any]:
        """Return the loss and its gradient with residuals in this form, and the plan; made once."""
        import memopt

        if form not in self.known and keeps_norms(form):
            self.known[form] = self.remembering(form)
        if form not in self.known:
            args = (self.start(0)[0], *self.task.batch("train", 0, 0))
            planned = memopt.optimize(self.grad, target="cpu", passes=[make_pass(form)], verify=False)
            self.known[form] = planned, planned.plan(*args)
        return self.known[form]

    def remembering(self, form: str) -> tuple[Remembering, Any]:
        """Return the loss and its gradient in a form that keeps norms of samples, and the plan."""
        import jax.numpy as jnp

        import memopt

        def step(norms: Any, params: Any, inputs: Any, labels: Any, numbers: Any) -> tuple[Any, Any, Any]:
            return norms, *self.grad(params, inputs, labels)

        planned = memopt.optimize(step, target="cpu", passes=[make_pass(form, self.task.samples)], verify=False)
        args = (self.start(0)[0], *self.task.batch("train", 0, 0), self.task.numbers("train", 0, 0))
        norms = jnp.zeros(())
        norms = planned.compress(norms, norms, *args)
        return Remembering(planned, norms), planned.plan(norms, *args)

    def fed(self, grad: Callable[..., Any], step: int, seed: int) -> tuple[Any, ...]:
        """Return what a gradient takes at a step of training beside the parameters."""
        batch = self.task.batch("train", step, seed)
        return (*batch, self.task.numbers("train", step, seed)) if isinstance(grad, Remembering) else batch

    def advance(self, grad: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled training step over this gradient."""
        import jax
        import optax

        @jax.jit
        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = self.optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            return update(params, state, grad(params, *batch)[1])

        return step

    def train(self, grad: Callable[..., Any], seed: int, steps: int) -> Any:
        """Return the parameters after so many steps."""
        step, (params, state) = self.advance(grad), self.start(seed)
        if isinstance(grad, Remembering):
            grad.norms = grad.fresh
        for i in range(steps):
            params, state = step(params, state, self.fed(grad, i, seed))
        return params

    def watched(self, exact: Callable[..., Any], grads: Sequence[Remembering], steps: int) -> Any:
        """Return the parameters after so many exact steps, which these gradients have seen as well."""

        def grad(*args: Any) -> Any:
            for one in grads:
                one(*args)
            return exact(*args[:3])

        watching = Remembering(lambda norms, *args: (norms, *grad(*args)), None)
        return self.train(watching if grads else exact, 0, steps)

    def held_out(self, params: Any) -> float:
        """Return the loss on held-out data."""
        import jax

        loss = jax.jit(self.loss)
        return statistics.fmean(float(loss(params, *self.task.batch("validation", i, 12345))) for i in range(16))


def compared(exact: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """Return the cosine of two gradients, the relative distance, and by how much the losses differ."""
    import jax

    want, got = (
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(g)]) for _, g in (exact, found)
    )
    norms = float(np.linalg.norm(want)), float(np.linalg.norm(got))
    return {
        "cosine": float(want @ got) / max(norms[0] * norms[1], 1e-300),
        "error": float(np.linalg.norm(got - want)) / max(norms[0], 1e-300),
        "loss_error": abs(float(found[0]) - float(exact[0])),
    }


def summary(losses: Sequence[float], exact: Sequence[float]) -> dict[str, float]:
    """Return the mean, the spread over seeds, and the gap to exact training, seed by seed."""
    gaps = [a - b for a, b in zip(losses, exact, strict=True)]
    return {
        "loss": statistics.fmean(losses),
        "spread": max(losses) - min(losses),
        "gap": statistics.fmean(gaps),
        "gap_spread": max(gaps) - min(gaps),
    }


def gradient_rows(name: str, bench: Bench, forms: Sequence[str], warm: int) -> list[dict[str, Any]]:
    """Compare gradients at parameters that were trained a little."""
    import jax

    exact = jax.jit(bench.grad)
    params = bench.watched(exact, [bench.stored(form)[0] for form in forms if keeps_norms(form)], warm)
    want, rows = exact(params, *bench.task.batch("train", warm, 0)), []
    for form in forms:
        grad, plan = bench.stored(form)
        kept = [d for d in plan.decisions if d.choice in names_of(plan)]
        row = {"model": name, "form": form, "stored": len(kept), "kept_bytes": sum(d.value_bytes for d in kept)}
        rows.append(row | compared(want, grad(params, *bench.fed(grad, warm, 0))))
        print(f"{name} {form}: cosine {rows[-1]['cosine']:.6f}, error {rows[-1]['error']:.4f}", flush=True)
    return rows


def training_rows(name: str, bench: Bench, forms: Sequence[str], steps: int, seeds: int) -> list[dict[str, Any]]:
    """Train exactly and with each form."""
    import jax

    rows, exact = [], []
    for form in ("exact", *forms):
        begin = time.perf_counter()
        grad = jax.jit(bench.grad) if form == "exact" else bench.stored(form)[0]
        losses = [bench.held_out(bench.train(grad, seed, steps)) for seed in range(seeds)]
        exact = exact or losses
        took = {"seconds": time.perf_counter() - begin}
        runs = {f"seed {seed}": loss for seed, loss in enumerate(losses)}
        rows.append({"model": name, "form": form} | summary(losses, exact) | took | runs)
        print(f"{name} {form}: {rows[-1]['loss']:.4f}, gap {rows[-1]['gap']:+.4f}", flush=True)
    return rows


def names_of(plan: Any) -> set[str]:
    """Return what a plan calls the forms in which it stores values, those that a rewrite made included."""
    return {d.choice for d in plan.decisions} - {"keep", "recompute"}


def possible(bench: Bench, forms: Sequence[str]) -> list[str]:
    """Return the forms that a model's data allows: norms are kept of samples that have numbers."""
    return [form for form in forms if bench.task.samples or not keeps_norms(form)]


def empty(bench: Bench, forms: Sequence[str]) -> list[str]:
    """Return the forms in which nothing of a model is stored: training with them would be exact training."""
    return [form for form in dict.fromkeys(forms) if not names_of(bench.stored(form)[1])]


def far(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the models that int8 trains worse than exactly by more than the seeds' spread."""
    spread = {row["model"]: row["spread"] for row in rows if row["form"] == "exact"}
    return [r["model"] for r in rows if r["form"] == "int8" and r["gap"] > max(spread[r["model"]], r["spread"])]


def main(argv: Sequence[str]) -> int:
    """Compare, train, print and write."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a flag, see --help")
    values, folder = flags.FLAGS, pathlib.Path(flags.FLAGS.out_dir)
    gradients, trainings = [], []
    for name in values.models:
        bench = Bench(name, values)
        forms, train = possible(bench, values.forms), possible(bench, values.train if values.steps else ())
        nothing = empty(bench, [*forms, *train])
        if nothing:
            print(f"FAILED: of {name} nothing is stored as {', '.join(nothing)}: leave it out", file=sys.stderr)
            return 1
        gradients += gradient_rows(name, bench, forms, values.warm)
        _report.write_csv(folder / "gradients.csv", gradients)
        if values.steps:
            trainings += training_rows(name, bench, train, values.steps, values.seeds)
            _report.write_csv(folder / "trainings.csv", trainings)
    size = f"{values.depth} layers of {values.width}, batches of {values.batch}"
    _report.print_table(GRADIENTS, gradients, f"Gradients after {values.warm} steps, {size}")
    if trainings:
        _report.print_table(TRAININGS, trainings, f"{values.steps} steps, {values.seeds} seeds, {size}")
    _report.console().print(f"  made with {_report.environment()}", soft_wrap=True)
    missed = far(trainings)
    if missed:
        print(f"FAILED: int8 is not within the seeds' spread: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
