"""Random training steps: in comes a seed, out comes a function, its arguments and what it holds, always the same ones.

A program draws layers (``random_layers``), wraps them (checkpoint, jit, cond, scan, vmap, custom_vjp, ...), stacks them
(unrolled, scanned, nested) and puts one of a dozen steps on top (SGD, momentum, Adam, accumulation, GAN, gradient
penalty, MAML, ...). ``check_program`` holds a rewrite against it. Nothing here knows how a planner works.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from tests import rewrite_checks
from tests.random_layers import LAYERS
from tests.random_models import WRAPPERS, Model, stopped
from tests.random_steps import STEPS, draw_step

FORWARD_ONLY = frozenset({"whiles"})


@dataclass(frozen=True)
class Program:
    """One random step: ``fn(*args)``; ``features`` names what it holds; ``donate_argnums`` may be given up."""

    seed: int
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate_argnums: tuple[int, ...]
    features: frozenset[str]
    description: str


# ---- drawing --------------------------------------------------------------------------------------------------------


def _draw_model(rng: np.random.Generator) -> tuple[Model, frozenset[str]]:
    stacks = ["unrolled", "scan", "scan_reverse", "scan_remat", "scan_unroll", "nested"]
    stack = str(rng.choice(stacks, p=[0.55, 0.15, 0.08, 0.1, 0.04, 0.08]))
    names = [str(n) for n in rng.choice(list(LAYERS), size=int(rng.choice([1, 2, 3], p=[0.5, 0.4, 0.1])))]
    wraps = [str(w) for w in rng.choice(list(WRAPPERS), size=len(names), p=_wrapper_odds())]
    length = int(rng.integers(2, 4)) if stack in ("unrolled", "nested") else int(rng.choice([0, 1, 2, 3, 3, 5]))
    layers = tuple(WRAPPERS[w](LAYERS[n]) for n, w in zip(names, wraps, strict=True))
    model = Model(
        layers,
        stack,
        length,
        4,
        int(rng.choice([4, 8], p=[0.8, 0.2])),
        5,
        str(rng.choice(["xent", "onehot", "square"])),
        str(rng.choice(["dense", "embed"])),
    )
    if stack == "scan_unroll" and length < 2:
        model = replace(model, stack="scan")
    return model, frozenset(names) | frozenset(wraps) | {model.stack, model.loss, model.inputs, f"length_{length}"}


def _wrapper_odds() -> np.ndarray:
    odds = np.ones(len(WRAPPERS))
    odds[:2] = len(WRAPPERS) / 3
    return odds / odds.sum()


def make_params(rng: np.random.Generator, model: Model):
    """Draw the parameters: a list of layers when unrolled, stacked ones when scanned."""
    lead = {"unrolled": (), "nested": (model.length, 2)}.get(model.stack, (model.length,))
    layers = [_layer_params(rng, model.width, lead) for _ in range(model.length if model.stack == "unrolled" else 1)]
    return {
        "in": _normal(rng, model.width, model.width),
        "embed": _normal(rng, 7, model.width),
        "head": _normal(rng, model.width, model.classes),
        "layers": layers if model.stack == "unrolled" else layers[0],
    }


def _layer_params(rng: np.random.Generator, width: int, lead: tuple[int, ...]) -> dict[str, np.ndarray]:
    shapes = {"w": (width, width), "u": (width, width), "b": (width,), "g": (width,)}
    return {name: _normal(rng, *lead, *shape) for name, shape in shapes.items()}


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / np.sqrt(max(shape[-1], 1))).astype(np.float32)


def make_batch(rng: np.random.Generator, model: Model) -> dict[str, np.ndarray]:
    """Draw one batch: floats, integers, bools and a step number."""
    return {
        "x": _normal(rng, model.rows, model.width) * np.float32(2),
        "tokens": rng.integers(0, 7, model.rows, dtype=np.int32),
        "labels": rng.integers(0, model.classes, model.rows, dtype=np.int32),
        "mask": rng.random(model.rows) < 0.7,
        "step": np.int32(rng.integers(0, 5)),
    }


def make_program(seed: int) -> Program:
    """Return the program of ``seed``; the same seed gives the same program in every process."""
    rng = np.random.default_rng(seed)
    name = draw_step(rng)
    model, features = _draw_model(rng)
    if name == "forward_mode" and "custom_vjp" in features:
        name = "sgd"
    if FORWARD_ONLY & features and STEPS[name].differentiates:
        model = replace(model, layers=tuple(map(stopped, model.layers)))
    key = jax.random.key(seed) if rng.random() < 0.6 else jax.random.PRNGKey(seed)
    rate = 0.1 if rng.random() < 0.5 else np.float32(0.1)
    args = (STEPS[name].state(make_params(rng, model)), make_batch(rng, model), key, rate)
    fn = functools.partial(STEPS[name].step, model)
    donated = (0,) if STEPS[name].donates else ()
    return Program(seed, fn, args, donated, features | {name}, f"seed {seed}: {name} {sorted(features)}")


def check_program(seed: int, rewrite: rewrite_checks.Rewrite, **options: Any) -> list[str]:
    """Return what is wrong with the rewritten program of ``seed``: an empty list when nothing is.

    Args:
      seed: which program.
      rewrite: the planner under test, closed jaxpr to closed jaxpr.
      **options: as in ``rewrite_checks.check``; those of ``depth(seed)`` unless given.
    """
    program = make_program(seed)
    options = {**depth(seed), **options}
    wrong = rewrite_checks.check(program.fn, program.args, rewrite, loose="bf16" in program.features, **options)
    return [f"{program.description}: {line}" for line in wrong]


def depth(seed: int) -> dict[str, bool]:
    """Return how thoroughly a seed is checked, beside being evaluated.

    One in 100 is compiled, one in 200 each is optimised, differentiated and batched.
    """
    rest = seed % 200
    return {"compiled": seed % 100 == 0, "optimised": rest == 7, "gradient": rest == 17, "batched": rest == 27}


def through_optimize(optimize: Callable[..., Any], seed: int, budget: str) -> rewrite_checks.Rewrite:
    """Return a rewrite that ignores its jaxpr and traces the program of ``seed`` through ``memopt.optimize``.

    The budget ``"smallest"`` is the smallest peak on the step's frontier: these programs are so small that a share of
    the plain peak is mostly met by no plan, or by the plain step.
    """
    program = make_program(seed)
    step = optimize(program.fn, budget=budget.replace("smallest", "100%"), donate_argnums=program.donate_argnums)
    if budget == "smallest":
        least = min(point.peak_bytes for point in step.frontier(*program.args))
        step = optimize(program.fn, budget=least, donate_argnums=program.donate_argnums)
    return lambda closed: step.trace(*program.args).jaxpr
