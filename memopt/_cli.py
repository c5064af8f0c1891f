"""The command `memopt`: explain, plan, measure and check a step from a shell or a CI job.

`module:function`, a factory of `(step, args)` or `(step, args, options)`, comes in; a table on standard output and an
exit status go out: 0 done, 1 memory grew or no plan fits, 2 an error, told in one sentence on standard error. All the
work is done by the public functions of memopt, imported when a subcommand needs them.
"""

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memopt._errors import BudgetError

_JIT_OPTIONS = tuple(
    ["donate_argnums", "donate_argnames", "static_argnums", "static_argnames"]
    + ["in_shardings", "out_shardings", "compiler_options"]
)
# Wrong input of every kind, a step that cannot be traced, a file that cannot be read. Others keep their traceback.
_TOLD_IN_ONE_SENTENCE = (ValueError, TypeError, NotImplementedError, LookupError, AttributeError, ImportError, OSError)


class UsageError(ValueError):
    """A command line that cannot be carried out."""


@dataclass(frozen=True)
class Subject:
    """What a factory returned: the step, its arguments, the options of `memopt.optimize`; `--target` is in them."""

    step: Callable[..., Any]
    args: tuple
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def optimized(self) -> bool:
        return all(callable(getattr(self.step, name, None)) for name in ("plan", "measure"))

    @property
    def compile_options(self) -> dict[str, Any]:
        """The options that `memopt.measure` and `memopt.explain` take: those of `jax.jit`, and the target."""
        return {name: value for name, value in self.options.items() if name in (*_JIT_OPTIONS, "target")}

    @property
    def asks_for_plan(self) -> bool:
        """Whether the options hold something that only `memopt.optimize` understands, such as a budget."""
        return bool(self.options.keys() - self.compile_options.keys())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after `memopt`; None for those of the process.

    Returns:
        The exit status: 0 done, 1 memory grew or no plan fits the budget, 2 an error.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BudgetError as error:
        print(f"memopt: {error}", file=sys.stderr)
        return 1
    except _TOLD_IN_ONE_SENTENCE as error:
        if arguments.traceback:
            raise
        print(f"memopt: error: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    if type(error).__module__.startswith("memopt") or type(error) in (ValueError, TypeError):
        return text or repr(error)
    return f"{type(error).__name__}: {text} (--traceback shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memopt", description="Where the memory of a JAX training step goes.")
    commands = parser.add_subparsers(required=True, metavar="command")
    explain = _command(commands, "explain", _explain, "what is alive at the peak, by module and source line")
    _mesh_options(explain)
    explain.add_argument("--png", metavar="FILE", help="write the timeline as a picture")
    plan = _command(commands, "plan", _plan, "what would be stored, repeated or moved; nothing is compiled")
    _mesh_options(plan)
    plan.add_argument("others", nargs="*", metavar="module:function", help="further signatures, saved in one file")
    plan.add_argument("--save", metavar="FILE", help="write the plan as JSON, those of several signatures together")
    measure = _command(commands, "measure", _measure, "the compiler's figures; with a budget, of the optimized step")
    measure.add_argument("--save", metavar="FILE", help="write the figures as JSON")
    check = _command(commands, "check", _check, "compare with stored figures or a stored plan; exit 1 when memory grew")
    check.add_argument("stored", nargs="?", metavar="FILE", help="figures or a plan, from --save")
    check.add_argument("--save", metavar="FILE", help="write the figures as JSON, instead of or after comparing")
    check.add_argument("--tolerance", type=_tolerance, default=0.01, metavar="1%", help="growth to let pass (1%%)")
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{name}: {text}.")
    command.add_argument("factory", metavar="module:function", help="returns (step, args) or (step, args, options)")
    command.add_argument("--target", help="'cpu', 'tpu:v5e:2x2', 'gpu:h100'; the attached device otherwise")
    command.add_argument("--budget", help="bytes, '14GiB' or '60%%' of the plain step's peak")
    command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _mesh_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mesh", metavar="data=4,model=4", help="run the step on all devices of the target, sharded")
    command.add_argument("--strategy", help="of memopt.passes.Shard, such as 'zero3+tensor' (default: 'auto')")


def _sharded(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the sharding pass that `--mesh` and `--strategy` ask for among the passes."""
    text, strategy = getattr(arguments, "mesh", None), getattr(arguments, "strategy", None)
    if text is None:
        if strategy is not None:
            raise UsageError("--strategy needs a --mesh, such as --mesh data=4,model=4.")
        return {}
    import memopt

    mesh = memopt.mesh(options.get("target"), *_read_mesh(text))
    passes = options.get("passes")
    passes = memopt.passes.default() if passes is None else list(passes)
    return {"passes": [*passes, memopt.passes.Shard(mesh, strategy=strategy or "auto")]}


def _read_mesh(text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Read `"data=4,model=4"`."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name.strip().isidentifier() and size.strip().isdigit() and int(size) for name, _, size in parts):
        raise UsageError(f"Unreadable mesh {text!r}: write axes with their devices, such as data=4,model=4.")
    return tuple(int(size) for _, _, size in parts), tuple(name.strip() for name, _, _ in parts)


def _tolerance(text: str) -> float:
    """Read `"1%"` or `"0.01"`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"unreadable tolerance {text!r}: write 1% or 0.01")
    return value


def load(arguments: argparse.Namespace, factory: str | None = None) -> Subject:
    """Call the factory that a command line names.

    Args:
        arguments: with `factory`, `target` and `budget`.
        factory: the name, where it is another one than `arguments.factory`.

    Returns:
        The step with its arguments, and its options with `--target` and `--budget` put over them.

    Raises:
        UsageError: the name is unreadable, leads nowhere, or the factory returns something else than it should.
    """
    factory = factory or arguments.factory
    subject = _subject(factory, _factory(factory)())
    given = {name: getattr(arguments, name) for name in ("target", "budget") if getattr(arguments, name) is not None}
    asked = {name for name in ("target", "budget", "mesh", "strategy") if getattr(arguments, name, None) is not None}
    if subject.optimized and (asked or subject.options):
        names = ", ".join(sorted({f"--{name}" for name in asked} | set(subject.options)))
        raise UsageError(f"{factory} returns an optimized step, which {names} cannot change: return a plain one.")
    options = subject.options | given
    return Subject(subject.step, subject.args, options | _sharded(arguments, options))


def _factory(name: str) -> Callable[[], Any]:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"Unreadable factory {name!r}: write module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"Cannot import {module_name!r} ({error}): give a module on the path or in this folder."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UsageError(f"Module {module_name!r} has no function {attribute!r}; it has: {', '.join(names) or 'none'}.")
    return factory


def _subject(name: str, result: Any) -> Subject:
    match result:
        case (step, (tuple() | list()) as args) if callable(step):
            return Subject(step, tuple(args))
        case (step, (tuple() | list()) as args, dict() as options) if callable(step):
            return Subject(step, tuple(args), options)
    raise UsageError(f"{name} must return (step, args) or (step, args, options), args a tuple; got {_shape(result)}.")


def _shape(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(item).__name__ for item in result)})"
    return type(result).__name__


def _optimized(subject: Subject) -> Any:
    if subject.optimized:
        return subject.step
    import memopt

    return memopt.optimize(subject.step, **subject.options)


def _explain(arguments: argparse.Namespace) -> int:
    import memopt

    subject = load(arguments)
    if subject.optimized or subject.asks_for_plan:
        explanation = _optimized(subject).explain(*subject.args)
    else:
        explanation = memopt.explain(subject.step, *subject.args, **subject.compile_options)
    print(explanation)
    if arguments.png:
        explanation.to_png(arguments.png)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    import memopt

    plans = []
    for factory in [arguments.factory, *arguments.others]:
        subject = load(arguments, factory)
        plans.append(_optimized(subject).plan(*subject.args))
        print(f"{factory}\n{plans[-1]}" if arguments.others else plans[-1])
    _save(arguments.save, plans[0].to_json if len(plans) == 1 else lambda: memopt.Plans(tuple(plans)).to_json())
    return 0


def _measured(subject: Subject) -> Any:
    from memopt._measure import measure

    if subject.optimized or subject.asks_for_plan:
        return _optimized(subject).measure(*subject.args)
    return measure(subject.step, *subject.args, **subject.compile_options)


def _measure(arguments: argparse.Namespace) -> int:
    from memopt._check import figures_to_json

    memory = _measured(load(arguments))
    print(memory)
    _save(arguments.save, lambda: figures_to_json(memory))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    if arguments.stored is None and arguments.save is None:
        raise UsageError("Nothing to check against: give a stored FILE, or --save FILE to write one.")
    if arguments.stored is None:
        return _measure(arguments)
    from memopt import _check as check

    text = Path(arguments.stored).read_text(encoding="utf-8")
    if not check.is_figures(text):
        return _check_plan(arguments, text)
    memory = _measured(load(arguments))
    verdict = check.compare_figures(text, memory, arguments.tolerance)
    print(verdict)
    _save(arguments.save, lambda: check.figures_to_json(memory))
    return int(verdict.grew)


def _check_plan(arguments: argparse.Namespace, text: str) -> int:
    import memopt
    from memopt._check import compare_plans

    subject, stored = load(arguments), memopt.Plans.from_json(text)
    plain = _optimized(subject)
    before = stored.plans[0] if len(stored.plans) == 1 else stored.for_arguments(*plain.asked_for(*subject.args))
    if not subject.optimized and before.budget_bytes is not None:
        subject = Subject(subject.step, subject.args, {"budget": before.budget_bytes} | subject.options)
    plan = _optimized(subject).plan(*subject.args)
    verdict = compare_plans(before, plan, arguments.tolerance)
    print(verdict)
    _save(arguments.save, plan.to_json if len(stored.plans) == 1 else lambda: stored.with_plan(plan).to_json())
    return int(verdict.grew)


def _save(path: str | None, text: Callable[[], str]) -> None:
    if path is not None:
        Path(path).write_text(text(), encoding="utf-8")
        print(f"saved to {path}")


if __name__ == "__main__":
    sys.exit(main())
