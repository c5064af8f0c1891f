"""Offload: residuals in the host's memory until they are read again.

In: a survey of the step. Out: a `Store` without error for each large forward value, that takes no bytes of the device
while it is away, and the seconds of the link to the host and back. Which of them are taken is the planner's choice.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memopt import _forms
from memopt._contract import Context, Left, Rewritten, Store
from memopt._survey import Survey
from memopt.passes import _offload_rows, _offload_state, _residuals


@dataclasses.dataclass(frozen=True)
class Offload(_offload_state.HostState):
    """Let the planner send forward values to the host's memory, and fetch them where the backward pass reads them.

    Device memory falls by what is away; the cost is each byte twice over the link to the host, less what is hidden
    behind computation. Exact. After compiling, `host_temp_bytes` tells what really went.

    Args:
      where: `fnmatch` patterns on module paths, a string or a tuple; empty for everything.
      fraction: the part of the tokens whose products go (MEMO's alpha): of each large matrix product the first rows
        are sent, and the backward pass makes the others again from the same rows of what the product is made of. What
        follows from products by cheap operations is made again of them; other values, such as a layer's input, go
        whole. `"auto"` takes the part that the link sends while the forward pass computes, by public rates, less what
        goes whole. Where nothing can be cut into rows, this part of each value goes, along its longest axis, and the
        rest stays on the device. 1.0 sends values whole and repeats nothing.
      hidden: the part of a transfer that is hidden behind computation, from 0 to 1; the rest is counted as time.
        `"auto"`: for each loop's body, and for what is outside of loops, the seconds in which the forward pass computes
        there over those in which everything that may go from there is sent, by public rates. It is counted so also
        where a plan sends less, of which more would be hidden.
      least_bytes: smaller values stay.
      only_marked: only what `@memopt.offload` marks.
      state: `jax.tree_util.keystr` patterns of leaves of the state that lie in the host's memory between steps, a
        string or a tuple, such as `"*opt_state*"`; whatever the budget. Take `step.compress(state)` before the loop.

    Example:
      >>> import memopt
      >>> memopt.passes.Offload()
      Offload(where=(), fraction=1.0, hidden='auto', least_bytes=1048576, only_marked=False, state=())

    Raises:
      ValueError: a fraction outside its range, a fraction with `only_marked`, or a pattern that matches no module path.

    Source: Rhu et al., "vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural Network Design",
    MICRO 2016; the fraction of tokens is Zhao et al., "MEMO: Fine-grained Tensor Management For Ultra-long Context LLM
    Training", 2024 (arXiv 2407.12117), section 4.

    Limits: with a fraction, products of fewer rows may be summed in another order (float tolerance). Rows are those of
    the longest axis of a layer's input but the last; products are cut in pairs of loops, or in a step without any at
    the top level. On XLA:CPU, where host and device memory are one, this changes no figure. XLA may drop a transfer.
    State of scanned layers is fetched a layer at a time where a loop alone uses it: parameters that are only read, and
    with `FuseUpdate` all that is updated in the backward loop. Other state XLA:TPU was measured to fetch at the start
    of the step, all at once: then the arguments fall, and the temporaries rise by as much.
    """

    where: str | tuple[str, ...] = ()
    fraction: float | str = 1.0
    hidden: float | str = "auto"
    least_bytes: int = 1 << 20
    only_marked: bool = False
    state: str | tuple[str, ...] = ()
    stage: ClassVar[int] = 45
    repeats: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("where", "state"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, (patterns,) if isinstance(patterns, str) else tuple(patterns))
        known = self.fraction == "auto" if isinstance(self.fraction, str) else 0.0 < self.fraction <= 1.0
        if not known:
            raise ValueError(
                f"The fraction that goes to the host is above 0 and at most 1, or 'auto', not {self.fraction!r}."
            )
        if self.fraction != 1.0 and self.only_marked:
            raise ValueError(
                "A fraction of the tokens is cut wherever it can be: leave only_marked out, or give where=."
            )
        known = self.hidden == "auto" if isinstance(self.hidden, str) else 0.0 <= self.hidden <= 1.0
        if not known:
            raise ValueError(f"The hidden part of a transfer is from 0 to 1, or 'auto', not {self.hidden!r}.")

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "offload"

    @property
    def optional(self) -> bool:
        """Whether the budget decides all of it: state goes whatever the budget."""
        return not self.state

    def parts(self) -> tuple[Any, ...]:
        """Return the rewriters that do its work: of the state, and of products that are cut into rows."""
        cuts = self.fraction != 1.0
        return (self, _offload_rows.Rows(self.fraction, self.where, self.least_bytes)) if cuts else (self,)

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with its state fetched from the host and sent back, one leaf after the other."""
        return _offload_state.rewritten(closed, context, self.name) if self.state else None

    def propose(self, survey: Survey) -> Iterator[Store | Left]:
        """Yield a `Store` for every forward value large enough."""
        link = survey.spec.host_bytes_per_second
        if not link:
            yield Left("Offload", "the link between this device and its host is not known")
            return
        residuals = _residuals.chosen(survey, self.where)
        is_cut = any(one.mark == _offload_rows.MARK for one in _residuals.residuals(survey))
        fraction = 1.0 if is_cut or self.fraction == "auto" else self.fraction
        forms = {
            one: _Away(*_part(one.aval.shape, fraction), one.aval.shape)
            for one in residuals
            if one.bytes >= self.least_bytes and one.aval.shape and (one.mark == "offload" or not self.only_marked)
        }
        goes = {one: one.bytes * form.count / one.aval.shape[form.axis] for one, form in forms.items()}
        hidden = _hidden(survey, goes) if self.hidden == "auto" else {}
        for one, form in forms.items():
            shown = 1 - hidden.get(survey.graph.values[one.value].region, self.hidden)
            common = dict(name="host", asked=one.mark == "offload")
            stays = int(one.bytes - goes[one])
            yield Store(one.value, 2 * goes[one] / link * shown, stays, form.encode, form.decode, **common)


def _hidden(survey: Survey, goes: Mapping[_residuals.Residual, float]) -> dict[int, float]:
    """Return for each region the part of its transfers that its forward pass hides, if all of them are sent.

    The backward pass, which fetches them, takes longer than the forward pass.
    """
    marks, regions = _forms.Marks(survey.graph), survey.graph.regions
    sent = collections.Counter()
    for one, count in goes.items():
        sent[survey.graph.values[one.value].region] += count / survey.spec.host_bytes_per_second
    found = {}
    for region, seconds in sent.items():
        computes = sum(survey.seconds[op.id] for op in regions[region].ops if not marks.is_backward(op))
        found[region] = min(1.0, computes / seconds)
    return found


def _part(shape: tuple[int, ...], fraction: float) -> tuple[int, int]:
    """Return the longest axis that is not the last one, and how much of it goes."""
    axis = max(range(max(1, len(shape) - 1)), key=lambda a: shape[a])
    return axis, max(1, round(shape[axis] * fraction))


@dataclasses.dataclass(frozen=True)
class _Away:
    """An array of which the first `count` entries along an axis are in the host's memory."""

    axis: int
    count: int
    shape: tuple[int, ...]

    def encode(self, x: Any) -> tuple[Any, ...]:
        """Return the part that goes, and the part that stays if there is one."""
        if self.count == self.shape[self.axis]:
            return (jax.device_put(x, jax.memory.Space.Host),)
        goes = jax.lax.slice_in_dim(x, 0, self.count, axis=self.axis)
        stays = jax.lax.slice_in_dim(x, self.count, self.shape[self.axis], axis=self.axis)
        return jax.device_put(goes, jax.memory.Space.Host), stays

    def decode(self, parts: tuple[Any, ...]) -> Any:
        """Return the array on the device."""
        here = [jax.device_put(parts[0], jax.memory.Space.Device), *parts[1:]]
        return here[0] if len(here) == 1 else jnp.concatenate(here, axis=self.axis)
