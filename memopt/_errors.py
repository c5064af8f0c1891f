"""Errors that memopt raises on purpose: the vocabulary in which it says no.

Figures and plain text come in, exceptions whose message is full sentences go out. This module imports nothing of
JAX, and of memopt only how sizes are written, so that every other module may import it.
"""

from collections.abc import Sequence

from memopt._bytes import format_bytes


class TargetError(ValueError):
    """An unknown target, or one that cannot be compiled for on this machine; the message holds the remedy.

    Example:
        >>> import memopt
        >>> try:
        ...     memopt.mesh("tpu:v9", (1,), ("data",))
        ... except memopt.TargetError as error:
        ...     print(error)
        Unknown TPU kind 'v9' in target 'tpu:v9'. Known: v4, v5e, v5p, v6e, tpu7x.
    """


class BudgetError(RuntimeError):
    """No plan fits the budget.

    Args:
        budget_bytes: the budget that was asked for, in bytes.
        smallest_peak_bytes: the smallest peak that any plan reached, in bytes.
        alive: what is alive at that peak, one line of text each, largest first.
        advice: what would help and by how much, one sentence each, best first.

    Example:
        >>> from memopt import BudgetError
        >>> error = BudgetError(2**20, 3 * 2**20, ["2.0 MiB params"], ["Donate argument 0: -1.0 MiB."])
        >>> str(error).splitlines()[0]
        'No plan fits the budget of 1.0 MiB: the smallest peak is 3.0 MiB, 2.0 MiB too much.'
    """

    def __init__(
        self,
        budget_bytes: int,
        smallest_peak_bytes: int,
        alive: Sequence[str] = (),
        advice: Sequence[str] = (),
    ) -> None:
        self.budget_bytes = int(budget_bytes)
        self.smallest_peak_bytes = int(smallest_peak_bytes)
        self.alive = list(alive)
        self.advice = list(advice)
        super().__init__(str(self))

    def __str__(self) -> str:
        over_bytes = self.smallest_peak_bytes - self.budget_bytes
        smallest, over = format_bytes(self.smallest_peak_bytes), format_bytes(over_bytes)
        budget = format_bytes(self.budget_bytes)
        lines = [f"No plan fits the budget of {budget}: the smallest peak is {smallest}, {over} too much."]
        if self.advice:
            lines += ["What would help:", *(f"  {sentence}" for sentence in self.advice)]
        else:
            lines.append(f"Give a budget of {smallest} or more, or a smaller batch.")
        if self.alive:
            lines += ["Alive at that peak, largest first:", *(f"  {line}" for line in self.alive)]
        return "\n".join(lines)

    def __reduce__(self):
        return type(self), (self.budget_bytes, self.smallest_peak_bytes, self.alive, self.advice)
