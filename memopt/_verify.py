"""Closing the loop: a plan is compiled, its peak compared with the budget, and another one chosen where it is over.

A program (one step, one signature) and the arguments of a call come in; the program goes out settled on a rung whose
compiled peak fits, with one line in the log, or a `BudgetError` that says what would help. Plans are only chosen here,
never made.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from memopt import _rungs
from memopt._budget import resolve_budget
from memopt._cost import aval_bytes
from memopt._errors import BudgetError, format_bytes
from memopt._measure import Memory, compile_lowered, lower_for
from memopt._program import Program, as_shape
from memopt._target import devices
from memopt._timeline import simulate

logger = logging.getLogger("memopt")

#: How often a plan is made again after a compiled peak over the budget.
REPLANS = 3
#: A smallest predicted peak up to this much over the budget is still compiled: predictions may be that far off.
_PREDICTION_SLACK = 1.15
#: A plan predicted up to this much over the budget is compiled first where it repeats less, by this share of the step.
_NEAR, _WORTH = 1.015, 0.0025
#: So is one that fits but for holes of the heap: without them it is predicted so far below the budget, with them so
#: much larger, and it repeats less by this share of the step. Where holes are large, half of such plans have none.
_PACKED, _HOLES, _LUCKY_WORTH = 0.975, 1.08, 0.03
#: After one that missed, the next is smaller by this factor without holes, or by this one as predicted.
_SMALLER, _CALMER = 0.995, 0.97
#: How many are tried of the first kind and of the second; a near one is likelier to fit.
_NEARS, _HOPES = 2, 3
_LISTED = 8


def plan_program(program: Program, arguments: list[Any], *, verified: bool) -> None:
    """Choose a rung for a program by prediction; one that is planned already is left alone.

    Args:
        program: what to plan.
        arguments: the leaves of the call; they are live, but no other step's memory.
        verified: whether the choice is compiled afterwards, so that a near miss may be tried.

    Raises:
        BudgetError: no rung is predicted to fit.
    """
    if program.index is not None or program.budget_bytes is not None:
        return
    settings = program.settings
    if settings.is_plain:
        return
    program.budget_bytes = resolve_budget(
        settings.budget,
        target=settings.target,
        reserve_bytes=settings.reserve_bytes,
        baseline_peak_bytes=lambda: program.ladder.rungs[0].predicted_peak_bytes,
        arguments=[*arguments, *getattr(program.closed_jaxpr, "consts", ())],
    )
    if program.budget_bytes is None:
        if settings.plan is not None or settings.always_rewrites:
            program.index = program.ladder.choose(None)
        return
    try:
        program.index = _first_choice(program, verified)
    except BudgetError:
        _forget(program)  # nothing is half-done: the next call plans again
        raise


def _first_choice(program: Program, verified: bool) -> int:
    assert program.budget_bytes is not None
    index = program.ladder.choose(program.budget_bytes, program.measured)
    if index is not None:
        return index
    smallest, peak_bytes = _by_peak(program)[0]
    if verified and smallest not in program.measured and peak_bytes <= _PREDICTION_SLACK * program.budget_bytes:
        return smallest
    raise budget_error(program, smallest, peak_bytes)


def _by_peak(program: Program) -> list[tuple[int, int]]:
    """Return the rungs with their peaks, measured where known, smallest first."""
    peaks = [program.measured.get(index, rung.predicted_peak_bytes) for index, rung in enumerate(program.ladder.rungs)]
    first = getattr(program.ladder, "first", 0)
    return sorted((item for item in enumerate(peaks) if item[0] >= first), key=lambda item: item[1])


def settle(program: Program, args: tuple, kwargs: Mapping[str, Any]) -> jax.stages.Compiled | None:
    """Compile a planned program and plan again while its peak is over the budget, three times at most.

    Args:
        program: a planned program; `run`, `index`, `measured` and `memory` are set.
        args, kwargs: the arguments of the call, or shapes.

    Returns:
        The compiled step.

    Raises:
        BudgetError: the compiled peak of each rung tried is over the budget.
    """
    reasons: list[str] = []
    attempts = 0
    left = {"near": _NEARS, "holed": _HOPES}
    try:
        while True:
            chosen, program.index = program.index, _hopeful(program, left)
            hopeful = program.index != chosen
            compiled, memory = compile_rung(program, args, kwargs)
            if _fits(program, memory):
                break
            reasons.append(f"{format_bytes(memory.peak_bytes)} compiled was over")
            program.index = _next_choice(program, -1 if hopeful else attempts)
            attempts += not hopeful
    except BudgetError:
        _forget(program)
        raise
    program.memory, program.run = memory, program.caller
    log_plan(program, reasons)
    return compiled


def _hopeful(program: Program, left: dict[str, int]) -> int | None:
    """Return the rung to compile first: the chosen one, or another that may fit and repeats less.

    `left` says how many of each kind may still be tried, and is counted down here.

    Predictions are means over layouts of the heap: a plan predicted a little over the budget often fits, and one with
    large holes compiles with or without them. A plan is compiled once and run many times. Where no plan is predicted to
    fit, what it repeats does not matter.
    """
    index, budget = program.index, program.budget_bytes
    if index is None or budget is None:
        return index
    ladder, first = program.ladder, getattr(program.ladder, "first", 0)
    chosen, step_flops = ladder.rung(index), getattr(getattr(ladder, "step", None), "baseline_flops", 0.0)
    over = program.measured.get(index, chosen.predicted_peak_bytes) > budget
    tried = [ladder.rung(other) for other in program.measured]
    packed_bytes = _SMALLER * min((rung.packed_peak_bytes for rung in tried), default=math.inf)
    calm_bytes = _CALMER * min((rung.predicted_peak_bytes for rung in tried), default=math.inf)
    spares = range(len(ladder.rungs), len(ladder.rungs) + len(ladder.spares))
    for other in sorted([*range(first, index), *spares], key=lambda other: ladder.rung(other).recompute_flops):
        rung = ladder.rung(other)
        saved = chosen.recompute_flops - rung.recompute_flops
        near = rung.predicted_peak_bytes <= _NEAR * budget and saved > _WORTH * step_flops
        another = rung.packed_peak_bytes <= packed_bytes or rung.predicted_peak_bytes <= calm_bytes
        holed = another and _PACKED * budget >= rung.packed_peak_bytes < rung.predicted_peak_bytes / _HOLES
        holed = holed and (over or saved > _LUCKY_WORTH * step_flops)
        kind = "near" if near and left["near"] else "holed" if holed and left["holed"] else None
        if kind is not None and other not in program.measured:
            left[kind] -= 1
            return other
    return index


def compile_rung(program: Program, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, Memory]:
    """Compile the chosen rung and note its peak; the executable is the one that a later call runs."""
    lowered = lower_rung(program, args, kwargs)
    compiled, memory = compile_lowered(lowered, program.settings.target)
    if program.index is not None and memory.peak_bytes is not None:
        over = program.budget_bytes is not None and not memory.fits
        least = program.budget_bytes + 1 if over and program.budget_bytes is not None else 0
        program.measured[program.index] = max(memory.peak_bytes, least)
    return compiled, memory


def lower_rung(program: Program, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Lower the chosen rung for the program's target."""
    keep_shardings(program)
    args, kwargs = program.place(args, kwargs, as_shape)
    return lower_for(program.settings.target, program.jitted(program.index), args, kwargs)


def compile_plain(program: Program) -> tuple[Any, Memory]:
    """Compile the plain step of a sharded program, once; None and a `Memory` where it is out of memory."""
    if program.plain_compiled is None:
        target = program.settings.target
        if target.attached and target.platform == jax.default_backend():
            lowered = program.traced.lower()
        else:
            with jax.default_device(devices(target)[0]):
                lowered = program.traced.lower(lowering_platforms=(target.lowering_platform,))
        program.plain_compiled = compile_lowered(lowered, target)
    return program.plain_compiled


def plain_step(program: Program) -> Any:
    """Return the compiled plain step; None where it is out of memory, or the target has no compiler here."""
    target = program.settings.target
    return None if target.platform == "gpu" and not target.attached else compile_plain(program)[0]


def keep_shardings(program: Program) -> None:
    """Make the rewritten step return the shardings that the plain step returns.

    Costs nothing but where arguments are sharded and XLA chooses the shardings of the outputs: there the plain step is
    compiled once. Where that runs out of memory, XLA chooses for the rewritten step too.
    """
    if program.out_shardings is not None or not program.leaves_shardings_open or program.runs_plain:
        return
    compiled, memory = compile_plain(program)
    if compiled is None:
        logger.info("%s: the plain step is out of memory; XLA chooses the outputs' shardings", program.describe())
        return
    program.out_shardings = compiled.output_shardings
    if memory.peak_bytes is not None:
        program.measured[0] = memory.peak_bytes


def _fits(program: Program, memory: Memory) -> bool:
    if program.budget_bytes is None:
        return True
    return memory.fits and memory.peak_bytes is not None and memory.peak_bytes <= program.budget_bytes


def _next_choice(program: Program, attempt: int) -> int:
    """Choose again after a miss; where nothing is expected to fit then, the smallest rung is still tried."""
    assert program.budget_bytes is not None
    measured = program.measured
    index = program.ladder.choose(program.budget_bytes, _expected(program, of=1 if attempt == REPLANS - 1 else 2))
    if index is None:
        index = _without_forms(program)
    if index is None:
        index = next((rung for rung, _ in _by_peak(program) if rung not in measured), None)
    if attempt == REPLANS or index is None:
        best = min(measured, key=measured.__getitem__)
        raise budget_error(program, best, measured[best])
    return index


def _without_forms(program: Program) -> int | None:
    """Return the cheapest spare without exact forms that is predicted to fit, where those that were tried have some.

    On the hull they are beaten by plans with forms, whose peaks are predicted less well. One is tried; those predicted
    a little over the budget, which `_hopeful` may have tried before, do not count.
    """
    ladder, budget = program.ladder, program.budget_bytes
    spares = getattr(ladder, "spares", ())
    if budget is None or not any(_rungs.has_forms(ladder.rung(index)) for index in program.measured):
        return None
    fitting = [
        len(ladder.rungs) + i
        for i, rung in enumerate(spares)
        if not _rungs.has_forms(rung) and rung.predicted_peak_bytes <= budget
    ]
    if not program.measured.keys().isdisjoint(fitting):
        return None
    return min(fitting, key=lambda i: ladder.rung(i).recompute_flops, default=None)


def _expected(program: Program, of: int = 1) -> dict[int, int]:
    """Return the peak of each rung: measured, or predicted and corrected by an error that was measured near it.

    Rungs near each other hold most of the same values, and the compiler's layout wastes about the same bytes on them;
    but one in a few has a hole of its own. So the smallest error of the nearest `of` is taken.
    """
    rungs = program.ladder.rungs
    measured = {index: peak for index, peak in program.measured.items() if index < len(rungs)}
    errors = {index: peak - rungs[index].predicted_peak_bytes for index, peak in measured.items()}
    found = dict(measured)
    if not measured:
        return found
    for index, rung in enumerate(rungs):
        if index not in measured:
            nearest = sorted(errors, key=lambda other: (abs(other - index), -other))[:of]
            found[index] = rung.predicted_peak_bytes + min(errors[other] for other in nearest)
    return found


def _forget(program: Program) -> None:
    """Undo the choice, so that a later call with more room plans again; the measured peaks stay known."""
    program.index, program.budget_bytes, program.run = None, None, None


def log_plan(program: Program, reasons: list[str]) -> None:
    """Write the one line of a plan."""
    rung, memory = program.rung, program.memory
    parts = [
        f"budget {format_bytes(program.budget_bytes)}",
        f"plain predicted {format_bytes(program.ladder.rungs[0].predicted_peak_bytes)}",
        f"plan predicted {format_bytes(rung.predicted_peak_bytes)}",
    ]
    if memory is not None:
        parts.append(f"compiled {format_bytes(memory.peak_bytes)} in {memory.compile_seconds or 0:.1f} s")
        if program.transfers[0]:
            (logger.warning if program.transfers[1] else logger.info)(program.transfers[0])
        if memory.xla_remat_ops:
            parts.append(f"{memory.xla_remat_ops} operations repeated by XLA itself")
    parts.append(f"{rung.recompute_flops:.3g} FLOPs repeated")
    if reasons:
        parts.append(f"planned again {len(reasons)} times: {', '.join(reasons)}")
    logger.info("%s for %s: %s", program.describe(), program.settings.target, ", ".join(parts))


def budget_error(program: Program, index: int, smallest_peak_bytes: int) -> BudgetError:
    """Return the error that no plan fits, with what is alive at the smallest peak, and what would help."""
    assert program.budget_bytes is not None
    advice = _error_advice(program) + _compiler_advice(program, index, smallest_peak_bytes) + donation_advice(program)
    return BudgetError(program.budget_bytes, smallest_peak_bytes, _alive(program, index), advice)


def _error_advice(program: Program) -> list[str]:
    """Say what error of the gradients would have to be allowed, where plans were refused for theirs."""
    budget = program.budget_bytes
    fitting = [r for r in getattr(program.ladder, "refused", ()) if r.predicted_peak_bytes <= budget]
    if not fitting:
        return []
    least = min(fitting, key=lambda rung: rung.harm)
    figure, words = least.step.sensitivity.figure(least.harm) * 1.001, least.step.sensitivity.words(least.harm)
    peak = format_bytes(least.predicted_peak_bytes)
    return [f"Allow a larger error (total_error={figure:.4g}): {words} is predicted of a plan of {peak}."]


def _compiler_advice(program: Program, index: int, peak_bytes: int) -> list[str]:
    """Say where XLA:CPU, which does not order what stands outside loops for memory, is what misses the budget."""
    predicted = program.ladder.rung(index).predicted_peak_bytes
    if program.settings.target.platform != "cpu" or peak_bytes <= _PREDICTION_SLACK * predicted:
        return []
    return [
        f"Plan for the device that is to run the step (target=...): XLA:CPU took {format_bytes(peak_bytes)} for a plan "
        f"predicted at {format_bytes(predicted)}, because outside loops it does not order operations to save memory. "
        "On the CPU, scan over the layers, or accept the plan by verify=False."
    ]


def _alive(program: Program, index: int) -> list[str]:
    jaxpr = program.ladder.rung(index).jaxpr()
    timeline = simulate(jaxpr, donated=program.donated, target=program.settings.target, local=program.local)
    found = [(live.bytes, f"{live.name} {live.source}".strip() or _unnamed(live)) for live in timeline.alive()]
    arguments = sum(map(aval_bytes, program.argument_avals))
    ranked = sorted([(arguments, "arguments"), *found], key=lambda item: -item[0])
    return [f"{format_bytes(size)} {text}" for size, text in ranked[:_LISTED] if size]


def _unnamed(live: Any) -> str:
    """Say what a value is that no equation of its computation makes."""
    return f"{live.aval.str_short(short_dtypes=True)} that a loop takes in"


def donation_advice(program: Program) -> list[str]:
    """Say which arguments could be donated, and how many bytes each of them would free, largest first.

    An argument helps by the leaves whose shape and dtype an output has that no donated leaf takes already.
    """
    avals, closed = program.closed_jaxpr.in_avals, len(program.closed_over)
    free = Counter(map(_buffer, program.closed_jaxpr.out_avals))
    free.subtract(_buffer(aval) for aval, donated in zip(avals, program.donated, strict=True) if donated)
    paths = jax.tree_util.tree_leaves_with_path(program.traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
    saved: Counter[str] = Counter()
    here = program.argument_avals[closed:]
    for (path, info), aval, local in zip(paths, avals[closed:], here, strict=True):
        if not info.donated and free[_buffer(aval)] > 0:
            free[_buffer(aval)] -= 1
            saved[_argument(path)] += aval_bytes(local)
    return [f"Donate {name}: {format_bytes(size)} less." for name, size in saved.most_common() if size]


def _buffer(aval: Any) -> tuple:
    return getattr(aval, "shape", None), str(getattr(aval, "dtype", None))


def _argument(path: tuple) -> str:
    """Name the argument that a leaf of `(args, kwargs)` belongs to."""
    place, *rest = path
    if not rest:
        return "the arguments"
    key = getattr(rest[0], "idx", getattr(rest[0], "key", rest[0]))
    return f"argument {key} (donate_argnums={key})" if place.idx == 0 else f"argument {key!r} (donate_argnames={key!r})"
