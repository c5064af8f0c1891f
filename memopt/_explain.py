"""Explain: the answer to "why am I out of memory", from the predicted timeline of a step.

In: a function with its arguments (arrays or shapes), a target, the options of `jax.jit`. Out: an `Explanation` that
prints, draws itself and turns into JSON. It traces and predicts; it compiles only where asked, and it changes nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from memopt import _compat as c
from memopt import _explain_plot, _frozen, _inline, _local, _timeline
from memopt._cost import aval_bytes, padded_bytes
from memopt._errors import format_bytes
from memopt._explain_walk import Alive, Sample, Walk, general, short
from memopt._graph import Graph
from memopt._measure import as_jitted, is_optimized, measure
from memopt._plan import Decision
from memopt._target import Target, limit_bytes

#: Saved constants smaller than this are not worth a line.
_CONSTANT_BYTES = 2**20
_STORED_SAMPLES = 600
_JIT_OPTIONS = (
    "donate_argnums", "donate_argnames", "static_argnums", "static_argnames", "in_shardings", "out_shardings"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Advice:
    """One thing to do, and the bytes that it can save at most."""

    bytes: int
    text: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Where the memory of one step goes; all figures are predictions, in bytes per JAX device.

    Args:
        target: what the step was explained for.
        argument_bytes, output_bytes, alias_bytes, temp_bytes, peak_bytes: as in `Memory`.
        limit_bytes: what fits on the device; None where there is no limit.
        alive: what is alive at the peak, largest first.
        advice: what would help, most bytes first.
        timeline: temporaries along the step, by module path.
        compiled: the compiler's own figures where asked for: the fields of `Memory`.
        sharding: where a pass shards the step: what is split how, what is whole and why, what collectives send.
        dropped: what would be kept if frozen arguments were trained, and why it is not, largest first.

    Example:
        >>> import jax, memopt
        >>> x = jax.ShapeDtypeStruct((256, 256), "float32")
        >>> explanation = memopt.explain(lambda x: (x @ x).sum(), x, target="cpu")
        >>> explanation.argument_bytes
        262144
        >>> memopt.Explanation.from_json(explanation.to_json()) == explanation
        True
    """

    target: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    alive: tuple[Alive, ...]
    advice: tuple[Advice, ...]
    timeline: tuple[Sample, ...]
    compiled: dict[str, Any] | None = None
    sharding: tuple[Decision, ...] = ()
    dropped: tuple[Decision, ...] = ()

    def to_json(self) -> str:
        """Return the whole explanation as a JSON string."""
        return json.dumps({"version": 1, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Explanation:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no explanation, or one of another version of the format.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("version", None) != 1:
            raise ValueError("This JSON is no explanation of version 1. Make it anew: memopt.explain(...).to_json().")
        fields["alive"] = tuple(Alive(**item | {"shape": tuple(item["shape"])}) for item in fields["alive"])
        fields["advice"] = tuple(Advice(**item) for item in fields["advice"])
        for name in ("sharding", "dropped"):
            fields[name] = tuple(Decision(**item) for item in fields.get(name, ()))
        fields["timeline"] = tuple(Sample(**item) for item in fields["timeline"])
        return cls(**fields)

    def by_module(self) -> dict[str, int]:
        """Return the bytes alive at the peak by module path, arguments and outputs left out, largest first."""
        found: collections.Counter[str] = collections.Counter()
        for item in self.alive:
            if item.kind in ("residual", "transient"):
                found[item.module] += item.bytes
        return dict(found.most_common())

    def top_modules(self, limit: int = 7) -> list[str]:
        """Return the module paths that a picture of the timeline tells apart, largest first."""
        found: collections.Counter[str] = collections.Counter()
        for sample in self.timeline:
            for module, size in sample.module_bytes.items():
                found[module] = max(found[module], size)
        return _explain_plot.top_modules(found, limit)

    def plot(self, axes: Any, modules: Sequence[str] | None = None, legend: bool = True) -> None:
        """Draw the timeline on matplotlib axes.

        Args:
            axes: matplotlib axes.
            modules: module paths to tell apart, in the order of their colours, as `top_modules` returns them; pass
                those of another explanation to colour both alike.
            legend: draw the legend beside the axes.
        """
        samples = [(sample.temp_bytes, sample.module_bytes) for sample in self.timeline]
        fixed_bytes = self.peak_bytes - self.temp_bytes
        _explain_plot.plot(axes, samples, fixed_bytes, self.top_modules() if modules is None else modules, legend)

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the timeline: memory over the step, coloured by module, the peak marked.

        Raises:
            OSError: the file cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        self.plot(axes)
        axes.set_title(f"Predicted memory on {self.target}: {format_bytes(self.peak_bytes)}", loc="left", weight="bold")
        figure.savefig(os.fspath(path), format="png", dpi=150)

    def __str__(self) -> str:
        from memopt import _explain_print

        return _explain_print.text(self)


def explain(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target | None = None,
    compile: bool = False,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    compiler_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say what is alive at the peak of a step, why, and what would help, most bytes first.

    Costs one trace and a fraction of a second; compiles nothing unless asked, and allocates nothing.

    Args:
        fn: a function, one wrapped by `jax.jit` or `nnx.jit`, or a `memopt.optimize`d step: then what its plan makes of
            it is explained (`step.explain` explains the plain step).
        *args: arrays, `jax.ShapeDtypeStruct`s, nnx modules, static values.
        target: None for the attached device (the step's own for an optimized one), else `platform[:kind[:topology]]`.
        compile: compile the step too, and print the compiler's figures beside the predicted ones.
        donate_argnums, donate_argnames, static_argnums, static_argnames, in_shardings, out_shardings,
            compiler_options: as in `jax.jit`.
        **kwargs: keyword arguments of the step.

    Returns:
        An `Explanation`; print it, or draw it with `.to_png(path)`.

    Raises:
        TargetError: the target is unknown, or cannot be used here.
        ValueError: options for a step that is jitted with options of its own.

    Example:
        >>> import jax, memopt
        >>> x = jax.ShapeDtypeStruct((1024, 1024), "float32")
        >>> memopt.explain(lambda x: x + 1, x, target="cpu").advice[0].text
        'Donate argument 0 (donate_argnums=0): 1 of 1 leaves can hold an output.'

    Limits: predicted without compiling, so a peak may be off by some percent; `compile=True` shows by how much.
    """
    values = (donate_argnums, donate_argnames, static_argnums, static_argnames, in_shardings, out_shardings)
    options = {name: value for name, value in zip(_JIT_OPTIONS, values, strict=True) if value is not None}
    traced = as_jitted(fn, args, kwargs, options).trace(*args, **kwargs)
    parsed = Target.parse(fn.target if target is None and is_optimized(fn) else target)
    compiled = None
    if compile:
        memory = measure(fn, *args, target=target, compiler_options=compiler_options, **options, **kwargs)
        compiled = dataclasses.asdict(memory)
    leaves = [getattr(leaf, "sharding", None) for leaf in jax.tree_util.tree_leaves((args, kwargs))]
    known = len(leaves) == len(getattr(traced, "traced", traced).jaxpr.in_avals)
    return explain_traced(traced, parsed, compiled, _local.Shardings(tuple(leaves)) if known else None)


def explain_program(program: Any) -> Explanation:
    """Explain the plain step of a program of `memopt.optimize`, or the sharded one where a pass shards it.

    Args:
        program: traced, with the settings that hold its target.

    Returns:
        An `Explanation`.
    """
    if program.placed is None:
        return explain_traced(program.traced, program.settings.target, shardings=program.shardings)
    ladder, args_info = program.ladder, getattr(program.traced, "traced", program.traced).args_info
    sharded = types.SimpleNamespace(jaxpr=ladder.step.outcome.closed, args_info=args_info)
    found = explain_traced(sharded, program.settings.target, shardings=program.placed)
    rows = [row for row in (*ladder.rows, *ladder.step.outcome.rows) if row.name.startswith("shard/")]
    return dataclasses.replace(found, sharding=tuple(rows))


def explain_traced(
    traced: Any, target: Target, compiled: dict[str, Any] | None = None, shardings: Any = None
) -> Explanation:
    """Explain a step that is traced already.

    Args:
        traced: a `jax.stages.Traced`, or anything with its `jaxpr` and `args_info`.
        target: what to explain it for.
        compiled: the compiler's figures to show beside, the fields of `Memory`.
        shardings: of a sharded step, `memopt._local.Shardings`: the step is explained as one device sees it.

    Returns:
        An `Explanation`.
    """
    traced = getattr(traced, "traced", traced)  # nnx wraps JAX's
    closed = _inline.inline(traced.jaxpr, respect_checkpoint=True)  # it is compiled with its barriers
    local = None if shardings is None else _local.local_shapes(closed, shardings)
    closed = closed if local is None else local.twin(closed)
    jaxpr = c.open_jaxpr(closed)
    names, donated = _arguments(traced, len(jaxpr.invars))
    timeline = _timeline.simulate(closed, donated=donated, target=target)
    walk = Walk(jaxpr, timeline)
    temporaries = _rooted(_alive_temporaries(walk))
    fixed = [*_alive_arguments(jaxpr, names, donated, target), *_alive_outputs(timeline), *_alive_constants(closed)]
    alive = sorted([*fixed, *temporaries], key=lambda item: -item.bytes)
    free = _donatable(jaxpr, names, donated, target)
    roots = _roots(item.module for item in temporaries)
    return Explanation(
        target=str(target),
        argument_bytes=timeline.argument_bytes,
        output_bytes=timeline.output_bytes,
        alias_bytes=timeline.alias_bytes,
        temp_bytes=timeline.temp_bytes,
        peak_bytes=timeline.peak_bytes,
        limit_bytes=limit_bytes(target),
        alive=tuple(alive),
        advice=tuple(sorted([*free, *_advice(alive)], key=lambda item: -item.bytes)),
        timeline=tuple(_shortened([_reroot(sample, roots) for sample in walk.samples()])),
        compiled=compiled,
        dropped=_dropped(closed, names, target),
    )


def _dropped(closed: Any, names: Sequence[str], target: Target) -> tuple[Decision, ...]:
    """Return rows of what is not kept because only gradients of frozen arguments would read it."""
    flat = _inline.inline(closed)
    graph = Graph(c.close(c.dce(flat)[0], c.jaxpr_consts(flat)))
    return _frozen.find(graph, names, lambda v: padded_bytes(graph.values[v].aval, target.platform)).dropped


def _arguments(traced: Any, count: int) -> tuple[list[str], list[bool]]:
    """Return the name of each flat argument (`0.params['w']`) and whether it is donated."""
    info = getattr(traced, "args_info", None)
    leaves = jax.tree_util.tree_leaves_with_path(info, is_leaf=lambda x: hasattr(x, "donated"))
    if info is None or len(leaves) != count:
        return [f"[0][{i}]" for i in range(count)], [False] * count
    return [jax.tree_util.keystr(path[1:]) for path, _ in leaves], [bool(leaf.donated) for _, leaf in leaves]


def _alive_arguments(jaxpr: Any, names: Sequence[str], donated: Sequence[bool], target: Target) -> list[Alive]:
    found = []
    for var, name, given in zip(jaxpr.invars, names, donated, strict=True):
        why = "argument, donated" if given else "argument, not donated: it stays until the step ends"
        found.append(_alive(var.aval, padded_bytes(var.aval, target.platform), "argument", why, f"argument {name}"))
    return found


def _alive_outputs(timeline: Any) -> list[Alive]:
    size = timeline.output_bytes - timeline.alias_bytes
    why = "outputs that reuse no donated argument"
    return [Alive("", "outputs", "", (), "", size, "output", why, None)] if size else []


def _alive_constants(closed: Any) -> list[Alive]:
    values = [v for v in c.jaxpr_consts(closed) if getattr(v, "nbytes", 0) >= _CONSTANT_BYTES]
    why = "closed over, so saved inside the program"
    return [_alive(jax.typeof(v), aval_bytes(jax.typeof(v)), "constant", why, "constant") for v in values]


def _alive(aval: Any, size: int, kind: str, why: str, operation: str) -> Alive:
    return Alive("", operation, "", tuple(aval.shape), str(aval.dtype), size, kind, why, None)


def _alive_temporaries(walk: Walk) -> list[Alive]:
    """Return residuals and transients at the peak, with their reason and the price of repeating them."""
    pairs = [(item, here) for item, here in walk.at_peak() if item.kind in ("residual", "transient")]
    kept: dict[int, set] = collections.defaultdict(set)
    for item, here in pairs:
        kept[id(here)].add(item.var)
    return [_alive_temporary(item, here, kept[id(here)]) for item, here in pairs]


def _alive_temporary(item: Any, walk: Walk, kept: set[Any]) -> Alive:
    module, operation, source = walk.describe(item)
    kind = "residual" if walk.is_residual(item) else "transient"
    repeat = walk.repeat_flops(item, kept) if kind == "residual" else None
    shape, dtype = tuple(item.aval.shape), str(item.aval.dtype)
    why = f"read last by {walk.reader(item)}"
    return Alive(module, operation, source, shape, dtype, item.bytes, kind, why, repeat)


def _roots(paths: Iterable[str]) -> tuple[str, frozenset[str]]:
    """Return the root that most paths start with, and the names right below it."""
    parts = [path.split("/") for path in paths if path]
    if not parts:
        return "", frozenset()
    root = collections.Counter(part[0] for part in parts).most_common(1)[0][0]
    return root, frozenset(part[1] for part in parts if part[0] == root and len(part) > 1)


def _under_root(path: str, roots: tuple[str, frozenset[str]]) -> str:
    """Complete a path that a loop's hoisted operation lost the beginning of: `blocks/attn` to `GPT2/blocks/attn`."""
    return f"{roots[0]}/{path}" if path and path.split("/")[0] in roots[1] and path.split("/")[0] != roots[0] else path


def _rooted(alive: list[Alive]) -> list[Alive]:
    roots = _roots(item.module for item in alive)
    return [dataclasses.replace(item, module=_under_root(item.module, roots)) for item in alive]


def _reroot(sample: Sample, roots: tuple[str, frozenset[str]]) -> Sample:
    found: collections.Counter[str] = collections.Counter()
    for path, size in sample.module_bytes.items():
        found[general(_under_root(path, roots))] += size
    return dataclasses.replace(sample, module_bytes=dict(found))


def _shortened(samples: list[Sample]) -> list[Sample]:
    """Keep the highest sample of each stretch, so that a long timeline stays readable and its peak stays in it."""
    width = math.ceil(len(samples) / _STORED_SAMPLES) if samples else 1
    stretches = [samples[i : i + width] for i in range(0, len(samples), width)]
    return [max(stretch, key=lambda sample: sample.temp_bytes) for stretch in stretches]


def _donatable(jaxpr: Any, names: Sequence[str], donated: Sequence[bool], target: Target) -> list[Advice]:
    """Advise to donate the arguments whose leaves match an output that no donated leaf takes."""
    free = collections.Counter(_form(v.aval) for v in jaxpr.outvars)
    free.subtract(_form(v.aval) for v, given in zip(jaxpr.invars, donated, strict=True) if given)
    found: dict[str, list[int]] = collections.defaultdict(list)
    count = collections.Counter(_argument_of(name) for name in names)
    for var, name, given in zip(jaxpr.invars, names, donated, strict=True):
        if not given and free[_form(var.aval)] > 0:
            free[_form(var.aval)] -= 1
            found[_argument_of(name)].append(padded_bytes(var.aval, target.platform))
    return [
        Advice(
            sum(sizes),
            f"Donate argument {_donation(name)}: {len(sizes)} of {count[name]} leaves can hold an output.",
        )
        for name, sizes in found.items()
    ]


def _form(aval: Any) -> tuple[tuple[int, ...], str]:
    return tuple(getattr(aval, "shape", ())), str(getattr(aval, "dtype", ""))


def _argument_of(name: str) -> str:
    """Return the argument that a leaf's path starts with: its place, or its quoted name."""
    return name[1:].split("]")[0] if name.startswith("[") else name


def _donation(argument: str) -> str:
    option = "donate_argnums" if argument.isdigit() else "donate_argnames"
    return f"{argument} ({option}={argument})"


def _advice(alive: Sequence[Alive]) -> list[Advice]:
    """Advise on residuals by module, on constants and on the largest transient."""
    found = []
    residuals: dict[str, list[Alive]] = collections.defaultdict(list)
    for item in alive:
        if item.kind == "residual":
            residuals[general(item.module)].append(item)
    for module, items in residuals.items():
        flops = sum(item.repeat_flops or 0 for item in items)
        price = f"at most {flops / 1e9:,.1f} GFLOP of matmuls" if flops >= 1e8 else "almost no matmuls"
        text = f"Repeat what {module or 'code outside modules'} keeps for the backward pass ({price}): memopt.optimize."
        found.append(Advice(sum(item.bytes for item in items), text))
    for item in alive:
        if item.kind == "constant":
            what = f"the constant {item.dtype}{list(item.shape)}"
            found.append(Advice(item.bytes, f"Pass {what} as an argument: closed over, it is saved in the program."))
    transients = [item for item in alive if item.kind == "transient"]
    if transients:
        largest = max(transients, key=lambda item: item.bytes)
        parts = [
            f"{largest.dtype}{list(largest.shape)}",
            largest.module and f"of {largest.module}",
            short(largest.source),
        ]
        what = " ".join(part for part in parts if part)
        found.append(Advice(largest.bytes, f"Shrink the transient {what}: smaller microbatches or a fused kernel."))
    return found
