"""The scales for errors: what each lossy form of each value does to a step's gradients, on a real batch.

In: a step with arrays as arguments, and the passes that propose forms. Out: a `Sensitivity`, a table that prints, goes
to JSON and back, and that a pass takes to say how much harm its forms do. The step is traced once and one program is
compiled for all values and forms (`_probe`); it runs once for each of them. Nothing is planned here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from memopt import _compat as c
from memopt import _hessian, _probe
from memopt._contract import Store
from memopt._dispatch import Core
from memopt._errors import format_bytes
from memopt._fingerprint import graph_digest
from memopt._optimize import BoundOptimized, Optimized, optimize
from memopt._step import Step

KINDS = ("gradient", "gauss-newton", "hessian")
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one form of one value does.

    Attributes:
      value: the value's name, as in `memopt.Plan.decisions`; values inside a loop stand for all of its runs.
      form: the form's name, such as `"int4"`.
      value_bytes: bytes of the value, over all runs.
      stored_bytes: bytes of the form, over all runs.
      harm: what it does where the backward pass reads it as the step is written: the squared relative error of the
        gradient, measured (`"gradient"`) or expected (`"gauss-newton"`), or for `"hessian"` Omega, in units of the
        loss. None where there is none: the loss does not depend on the value.
      repeated_harm: the same where whatever can be repeated from it is repeated, up to the end of its block; None where
        no pass repeats.
      trace: mean trace of the matrix with respect to the value, as the step is written; None for `"gradient"`.
      trace_error: standard error of that estimate.
    """

    value: str
    form: str
    value_bytes: int
    stored_bytes: int
    harm: float | None
    repeated_harm: float | None = None
    trace: float | None = None
    trace_error: float | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity:
    """How much each form of each value harms a step; what `memopt.sensitivity` returns.

    Attributes:
      kind: `"gradient"`, `"gauss-newton"` or `"hessian"`.
      step: digest of the step that was measured, as its passes and its target prepare it.
      rows: a `Measured` for each value and form.

    Example:
      >>> import jax, jax.numpy as jnp, memopt
      >>> loss = lambda w, x: jnp.sum(jnp.sin(jnp.sin(x @ w)) ** 2)
      >>> w, x = jnp.eye(64), jnp.linspace(-1.0, 1.0, 128 * 64).reshape(128, 64)
      >>> found = memopt.sensitivity(jax.value_and_grad(loss), w, x, passes=[memopt.passes.Compress("int8")])
      >>> 0 < max(row.harm for row in found.rows) < 1e-3
      True
      >>> memopt.Sensitivity.from_json(found.to_json()) == found
      True
    """

    kind: str
    step: str
    rows: tuple[Measured, ...]

    def __repr__(self) -> str:
        sha = hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
        return f"Sensitivity(kind={self.kind!r}, {len(self.rows)} forms, {sha})"

    def __str__(self) -> str:
        title = "Omega of HAWQ-V2" if self.kind == "hessian" else "relative gradient error"
        table = Table(title=f"{title} of each form by itself, the largest value first")
        for name in ("value", "bytes", "form", "stored", "as written", "where repeats start from it"):
            table.add_column(name, overflow="fold")
        for row in sorted(self.rows, key=lambda row: -row.value_bytes):
            harms = ["-" if x is None else f"{self.figure(x):.3g}" for x in (row.harm, row.repeated_harm)]
            sizes = format_bytes(row.value_bytes), format_bytes(row.stored_bytes)
            table.add_row(row.value, sizes[0], row.form, sizes[1], *harms)
        out = io.StringIO()
        Console(file=out, width=140, highlight=False).print(table)
        return out.getvalue()

    def of(self, graph: Any) -> Mapping[tuple[str, str], Measured] | None:
        """Return the rows by value and form; None where another step, or another form of it, was measured."""
        if graph_digest(graph) != self.step:
            return None
        return {(row.value, row.form): row for row in self.rows}

    def figure(self, harm: float) -> float:
        """Return a harm as a reader takes it: the relative error, not its square; Omega as it is."""
        return harm if self.kind == "hessian" else math.sqrt(harm)

    def harm(self, figure: float) -> float:
        """Return the harm of a figure: what `figure` undoes."""
        return figure if self.kind == "hessian" else figure**2

    def words(self, harm: float) -> str:
        """Return a harm in words."""
        what = "an Omega (HAWQ-V2)" if self.kind == "hessian" else "a relative gradient error"
        return f"{what} of {self.figure(harm):.3g}"

    def to_json(self) -> str:
        """Return the table as a JSON string, for `Sensitivity.from_json`."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"memopt_sensitivity": _FORMAT, "kind": self.kind, "step": self.step, "rows": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> Sensitivity:
        """Read a table that `to_json` wrote.

        Raises:
          ValueError: the text is none.
        """
        try:
            data = json.loads(text)
            if data["memopt_sensitivity"] != _FORMAT or data["kind"] not in KINDS:
                raise ValueError(f"its format is {data['memopt_sensitivity']!r} and its kind {data['kind']!r}")
            return Sensitivity(data["kind"], str(data["step"]), tuple(Measured(**row) for row in data["rows"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"This is no saved sensitivity ({error}): measure again, and save it with Sensitivity.to_json()."
            ) from error


def sensitivity(
    fn: Callable[..., Any],
    *args: Any,
    passes: Sequence[Any] | None = None,
    kind: str = "gradient",
    target: Any = None,
    loss: str | None = None,
    samples: int = 8,
    seed: int = 0,
    **kwargs: Any,
) -> Sensitivity:
    """Measure what every lossy form that the passes propose does to a step's gradients, on this very batch.

    Takes the memory of the step as written (nothing is saved while measuring) and the time of one compilation and of a
    step for each value and form; twice that where one of the passes repeats. All layers of a scanned stack are one
    value. The result goes to the pass, as in `memopt.passes.Compress(codecs, sensitivity=result)`.

    - `kind="gradient"`: the backward pass reads this value in this form and all else exactly, and the harm is
      `|g' - g|^2 / |g|^2` over all gradients together. Gradients are found by dataflow: what the backward pass makes
      for others than itself, so a training step that returns parameters alone is measured as well. Where a pass
      repeats, each form is measured once more with everything repeated from it that could be.
    - `kind="hessian"`: Omega of HAWQ-V2, the mean trace of the loss's Hessian with respect to the value, times
      `|Q(x) - x|^2`, by Hutchinson's estimator `z . H z` with Rademacher vectors `z`. It tells (twice) what the loss
      would change by if the *forward* pass read the form, which it never does here: a stand-in. Before a minimum a
      trace can be negative, and its size is taken. Local derivatives, which the loss does not depend on, have none and
      are left exact.
    - `kind="gauss-newton"`: the same form for what does happen: the mean trace of half the Hessian of the squared
      relative error of the gradient, which is its Gauss-Newton matrix `J.T J / |g|^2`, times `|Q(x) - x|^2`. That is
      the error to expect where a form's errors have no direction, from `samples` derivatives of the step for a value,
      whatever the number of forms.

    Args:
      fn: the step, as in `memopt.optimize`, or a step that `memopt.optimize` made, with its own passes and target.
      *args, **kwargs: its arguments, arrays: parameters as they are after some steps, and a batch.
      passes: as in `memopt.optimize`; the same list measures and plans.
      kind: one of these.
      target: the target that will be planned for, which decides how the step is prepared; it is run on the attached
        device.
      loss: for `"hessian"` the path of the loss in the step's result, such as `"[0]"`; None where the step returns one
        scalar of floats that its forward pass makes.
      samples: random vectors for each value, not for `"gradient"`.
      seed: of these vectors.

    Returns:
      The `memopt.Sensitivity`.

    Raises:
      ValueError: an unknown kind; passes that propose no lossy form for this step; no gradient, or no loss, is found.
      TypeError: arguments are shapes, not arrays.

    Example:
      >>> import jax, jax.numpy as jnp, memopt
      >>> loss = lambda w, x: jnp.sum(jnp.sin(jnp.sin(x @ w)) ** 2)
      >>> w, x = jnp.eye(64), jnp.linspace(-1.0, 1.0, 128 * 64).reshape(128, 64)
      >>> found = memopt.sensitivity(jax.value_and_grad(loss), w, x, passes=[memopt.passes.Compress(("int8", "int2"))])
      >>> harm = {(row.value, row.form): row.harm for row in found.rows}
      >>> harm["cos.0", "int8"] < harm["cos.0", "int2"]
      True

    Source: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020 (arXiv
    1911.03852), section 3; gradients of a real batch as the measure: Liu et al., "GACT", ICML 2022, section 4.

    Limits: one batch, at one point of training, in the precision of its gradients; a mean over several is the caller's.
    Harms of several values add up where their errors are independent. Gradients that a loop uses up inside
    (`FuseUpdate`) are not seen. Sharded steps are measured whole, not a device's part. Forms for some readers alone
    (`Sketch`) are not measured.
    """
    if kind not in KINDS:
        raise ValueError(f"A sensitivity is of one of the kinds {', '.join(map(repr, KINDS))}, not {kind!r}.")
    step, leaves, out_paths = _step(fn, args, kwargs, passes, target)
    stores = [s for s in step.stores if s.error > 0.0 and s.readers is None]
    if not step.repeatable:
        read = {value for value, _ in step.survey.read_later({})}
        stores = [s for s in stores if s.value in read]
    if kind != "gradient":
        stores = [s for s in stores if _probe.is_reached(step.survey.graph, s.value)]
    if not stores:
        raise ValueError("These passes propose no lossy form for this step. Give passes=[memopt.passes.Compress(...)].")
    drawn = {"samples": samples, "seed": seed}
    if kind == "hessian":
        place = _loss(step, out_paths, loss)
        harms = [_traced(one) for one in _hessian.loss_traces(step.survey, stores, place, leaves, **drawn)]
    else:
        results = _gradients(step)
        repeats = [{}, _probe.everything(step.survey, step.repeatable)][: 2 if step.repeatable else 1]
        if kind == "gradient":
            found = [[{"harm": x} for x in _errors(step, stores, results, leaves, plan)] for plan in repeats]
        else:
            gauge = functools.partial(_hessian.gradient_traces, step.survey, stores, results, leaves)
            found = [list(map(_traced, gauge(plan, **drawn))) for plan in repeats]
        harms = [one | {"repeated_harm": again["harm"]} for one, again in zip(found[0], found[-1], strict=True)]
        harms = harms if step.repeatable else found[0]
    rows = tuple(_row(step, store, harm) for store, harm in zip(stores, harms, strict=True))
    return Sensitivity(kind, graph_digest(step.survey.graph), rows)


def _step(fn: Any, args: tuple, kwargs: dict, passes: Any, target: Any) -> tuple[Step, list[Any], tuple[str, ...]]:
    """Return the step as it is planned, the leaves of the arguments, and the paths of its results."""
    if isinstance(fn, BoundOptimized):
        fn, first = fn.__func__.for_instance(fn.__self__)
        args = (*first, *args)
    own = isinstance(fn, Optimized)
    if own and (passes is not None or target is not None):
        raise ValueError("passes and target cannot change a step that memopt.optimize made. Give them to it.")
    optimized = fn if own else optimize(fn, passes=passes, target=target)

    def asked(core: Core, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        return core.traced(*args, **kwargs)

    program, leaves = optimized._ask(asked, args, kwargs)
    shapes = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    if shapes:
        raise TypeError(f"An error is measured on arrays, and {shapes[0]} is the shape of one. Give a real batch.")
    given = [_unmeasured(one) for one in program.passes]
    context = program.context
    step = Step(program.closed_jaxpr, program.settings.target, given, None, None, context=context)
    if step.survey is None:
        raise ValueError("No pass proposes anything. Give passes=[memopt.passes.Compress(...)].")
    return step, [*program.closed_over, *leaves], context.out_paths


def _unmeasured(one: Any) -> Any:
    """Return a pass as it is before anything was measured for it."""
    measured = {name: None for name in ("sensitivity", "total_error") if getattr(one, name, None) is not None}
    return dataclasses.replace(one, **measured) if measured else one


def _loss(step: Step, out_paths: Sequence[str], path: str | None) -> int:
    """Return the value that is the loss."""
    graph = step.survey.graph
    gradients = set(_probe.gradients(graph))
    places = {out_paths[i]: v for i, v in enumerate(graph.top.outs) if v is not None}
    floats = {p: v for p, v in places.items() if jnp.issubdtype(graph.values[v].aval.dtype, jnp.floating)}
    scalars = {p: v for p, v in floats.items() if graph.values[v].aval.shape == () and v not in gradients}
    scalars = {p: _probe.source(graph, v) for p, v in scalars.items()}
    if path is not None and path in scalars:
        return scalars[path]
    if path is None and len(scalars) == 1:
        return next(iter(scalars.values()))
    listed = ", ".join(map(repr, scalars)) or "none"
    raise ValueError(
        f"The loss is one of the step's results that are scalars of floats: {listed}. Name it with loss=..., or return "
        "it (jax.value_and_grad)."
    )


def _traced(found: Any) -> dict[str, Any]:
    omega, trace, spread = (None, None, None) if found is None else found
    return {"harm": omega, "trace": trace, "trace_error": spread}


def _gradients(step: Step) -> list[int]:
    """Return the gradients of a step."""
    results = _probe.gradients(step.survey.graph)
    if not results:
        raise ValueError("No gradient is found that leaves the backward pass. Give a step over jax.grad of a loss.")
    return results


def _errors(
    step: Step, stores: Sequence[Store], results: Sequence[int], leaves: Sequence[Any], repeats: Mapping
) -> list[float]:
    """Return the squared relative error of the gradient with each form by itself."""
    run = jax.jit(c.as_function(_probe.switched(step.survey, stores, results, repeats)))
    exact = run(*leaves, np.int32(_probe.EXACT))
    found = [np.asarray(_squares(run(*leaves, np.int32(i)), exact), np.float64) for i in range(len(stores))]
    reached = np.any([errors > 0 for errors in found], axis=0)  # a result that no form reaches is no gradient of it
    norm = float(np.asarray(_squares(exact), np.float64)[reached].sum())
    return [float(errors.sum()) / norm if norm > 0 else 0.0 for errors in found]


@jax.jit
def _squares(found: Sequence[Any], exact: Sequence[Any] | None = None) -> list[Any]:
    """Return the sum of squares of each array, or of each difference."""
    wide = [x.astype(np.promote_types(x.dtype, np.float32)) for x in found]
    if exact is not None:
        wide = [x - y.astype(x.dtype) for x, y in zip(wide, exact, strict=True)]
    return [(x * x).sum() for x in wide]


def _row(step: Step, store: Store, harms: Mapping[str, float]) -> Measured:
    survey = step.survey
    trips = survey.graph.regions[survey.graph.values[store.value].region].trips
    sizes = survey.bytes_of_value(store.value) * trips, store.bytes * trips
    return Measured(step.names.value(store.value), store.name, *sizes, **harms)
