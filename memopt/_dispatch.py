"""The core of the decorator: a pure step over pytrees, one program per signature, found and run with little overhead.

Arguments come in, the step's results go out. The first call of a signature traces the step once, has it planned and
compiled; later ones compare identities and go to the jitted function. Under a transformation the rewritten jaxpr runs
in place. How a plan is chosen is decided in `_verify.py`.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import jax

from memopt import _compat_frontend as compat
from memopt import _nnx
from memopt._errors import BudgetError, TargetError
from memopt._measure import Memory
from memopt._program import Program, Settings
from memopt._signature import JitOptions, Signature, Statics
from memopt._verify import compile_rung, keep_shardings, logger, lower_rung, plain_step, plan_program, settle


class NeedsNnx(Exception):
    """The arguments hold nnx objects: the step has to go through `_nnx.NnxStep`."""


class Core:
    """A pure step with its programs.

    Args:
        plain: the step as `jax.jit` made it, with the same options.
        options: these options.
        settings: what to plan for.
        pure: whether nnx objects have been split off already.
    """

    def __init__(self, plain: Any, options: JitOptions, settings: Settings, *, pure: bool = False):
        self.plain, self.options, self.settings, self.pure = plain, options, settings, pure
        self.fn: Callable[..., Any] = compat.jitted_function(plain)
        self._statics = Statics(plain)
        self._programs: dict[tuple, Program] = {}
        self._latest: Program | None = None
        self._lock = threading.RLock()
        self._told = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_disabled():
            return self._run_plain(args, kwargs)
        signature = Signature.of(*self._statics.split(args, kwargs))
        if signature.inside_transform:
            return self._inline(signature, args, kwargs)
        latest = self._latest
        if latest is not None and latest.run is not None and signature.same_program(latest.signature):
            signature.leaves = []  # no hold on the arrays
            latest.signature = signature
            run = latest.run
        else:
            run = self._first_call(signature, args, kwargs)
        try:
            return run(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            _explain_deleted(getattr(self.fn, "__name__", "the step"), error, args, kwargs)
            raise

    def _run_plain(self, args: tuple, kwargs: dict) -> Any:
        if not self.pure and _nnx.has_objects((args, kwargs)):
            raise NeedsNnx
        return self.plain(*args, **kwargs)

    def _first_call(self, signature: Signature, args: tuple, kwargs: dict) -> Any:
        """Find or make the program, settle it, and return the function to call."""
        self._check_callable()
        with self._lock:
            program = self._program(signature, args, kwargs)
            if program.run is None:
                self._settle(program, signature.leaves, args, kwargs)
            program.signature = signature.without_leaves()
            self._latest = program
        return program.run

    def _settle(self, program: Program, leaves: list[Any], args: tuple, kwargs: dict) -> Any:
        """Plan and, where asked for, compile; return the compiled step or None where nothing was compiled."""
        while True:
            try:
                return self._settle_choice(program, leaves, args, kwargs)
            except BudgetError:
                if not program.take_runner_up():
                    raise

    def _settle_choice(self, program: Program, leaves: list[Any], args: tuple, kwargs: dict) -> Any:
        plan_program(program, leaves, verified=self.settings.verify)
        if program.index is None:
            self._tell_unplanned()
            program.run = self.plain
            return None
        if self.settings.verify:
            return settle(program, args, kwargs)
        keep_shardings(program)
        program.run = program.caller
        return None

    def _tell_unplanned(self) -> None:
        if not self._told and not self.settings.is_plain:
            self._told = True
            name = getattr(self.fn, "__name__", "step")
            target = self.settings.target
            logger.info("%s: no budget, and %s has no limit: nothing is planned, the step runs plain", name, target)

    def _check_callable(self) -> None:
        target = self.settings.target
        if not target.attached:
            raise TargetError(
                f"Target '{target}' is not attached, so the step cannot run there. Plan, measure or lower it from "
                "shapes (.plan, .measure, .lower(...).compile()), or leave target out to run on the attached device."
            )

    def _program(self, signature: Signature, args: tuple, kwargs: dict) -> Program:
        try:
            found = self._programs.get(signature.key())
        except TypeError:  # an unhashable static argument, or no JAX type: JAX's own trace says which
            self._trace(args, kwargs)
            raise
        if found is None:
            found = next((one for one in self._programs.values() if one.takes(signature)), None)
            if found is not None:
                self._programs[signature.key()] = found
        if found is None:
            if not self.pure and _nnx.has_objects((args, kwargs)):
                raise NeedsNnx
            found = self._new_program(signature, args, kwargs)
            self._programs[signature.key()] = found
        return found

    def _new_program(self, signature: Signature, args: tuple, kwargs: dict) -> Program:
        traced = self._trace(args, kwargs)
        program = Program(self.plain, self.fn, self.options, self.settings, signature.without_leaves(), traced)
        program.compile_plain = functools.partial(plain_step, program)
        return program

    def _trace(self, args: tuple, kwargs: dict) -> Any:
        with _nnx.explained_errors(), _nnx.module_scopes():
            return self.plain.trace(*args, **kwargs)

    def _inline(self, signature: Signature, args: tuple, kwargs: dict) -> Any:
        """Run the rewritten jaxpr under the transformation that is going on; nothing is compiled."""
        with self._lock:
            program = self._inline_program(signature, args, kwargs)
            plan_program(program, [], verified=False)
        if program.index is None:
            return self.plain(*args, **kwargs)
        return program.evaluate(signature.leaves, program.jaxpr)

    def _inline_program(self, signature: Signature, args: tuple, kwargs: dict) -> Program:
        """Find the program, or make one that is not kept where the step closes over the outer tracers."""
        program = self._program(signature, args, kwargs)
        if program.closed_over:
            del self._programs[signature.key()]
        return program

    def unplanned(self, *args: Any, **kwargs: Any) -> Program:
        """Return the program of these arguments or shapes, traced and not planned."""
        with self._lock:
            return self._program(Signature.of(*self._statics.split(args, kwargs)), args, kwargs)

    def traced(self, *args: Any, **kwargs: Any) -> tuple[Program, list[Any]]:
        """Return the program of these arguments, traced and not planned, and their leaves, which it does not hold."""
        with self._lock:
            signature = Signature.of(*self._statics.split(args, kwargs))
            return self._program(signature, args, kwargs), signature.leaves

    def planned(self, *args: Any, **kwargs: Any) -> Program:
        """Return the program of these arguments or shapes, planned and not compiled."""
        return self._planned(args, kwargs, verified=False)

    def _planned(self, args: tuple, kwargs: dict, *, verified: bool) -> Program:
        with self._lock:
            signature = Signature.of(*self._statics.split(args, kwargs))
            program = self._program(signature, args, kwargs)
            plan_program(program, signature.leaves, verified=verified)
            return program

    def compiled(self, *args: Any, **kwargs: Any) -> tuple[Program, jax.stages.Compiled]:
        """Return the program of these arguments or shapes with its compiled step, verified where that is asked for."""
        with self._lock:
            signature = Signature.of(*self._statics.split(args, kwargs))
            program = self._program(signature, args, kwargs)
            result = None if program.run is not None else self._settle(program, signature.leaves, args, kwargs)
            return program, lower_rung(program, args, kwargs).compile() if result is None else result

    def measured(self, *args: Any, **kwargs: Any) -> Memory:
        """Return the compiler's figures of the rewritten step; of a step that misses its budget too."""
        program = self.planned(*args, **kwargs)
        with self._lock:
            if program.memory is None:
                program.memory = compile_rung(program, args, kwargs)[1]
        return program.memory

    def lowered(self, *args: Any, **kwargs: Any) -> Any:
        """Return JAX's `Lowered` of the rewritten step, planned and not compiled.

        Compiling it verifies the budget, so a plan that is predicted a little over it will do, as it does for a call.
        """
        return lower_rung(self._planned(args, kwargs, verified=self.settings.verify), args, kwargs)


def _explain_deleted(name: str, error: Exception, args: tuple, kwargs: dict) -> None:
    """Raise an error that names the deleted array, where a call failed because one was given to it."""
    if "deleted" not in str(error):
        return
    for (place, *rest), leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            path = ("args" if place.idx == 0 else "kwargs") + jax.tree_util.keystr(tuple(rest))
            raise (ValueError if isinstance(error, ValueError) else RuntimeError)(
                f"{path} of {name}, {leaf.aval.str_short()}, is deleted: it was donated to an earlier call. Pass what "
                "that call returned in its place, or do not donate the argument."
            ) from error


def is_disabled() -> bool:
    """Whether `MEMOPT_DISABLE` in the environment, or `jax.disable_jit`, asks for the plain step."""
    return os.environ.get("MEMOPT_DISABLE", "0") not in ("", "0") or jax.config.jax_disable_jit
