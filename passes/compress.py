"""Lossy forms: residuals as integers or 8-bit floats with scales, for the backward pass alone.

In: a survey of the step. Out: a `Store` with its error for each forward value of floats that matches `where`. Which of
them are taken, beside keeping and repeating, is the planner's choice. Losses and metrics never carry the error: nothing
of the forward pass reads a lossy form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from memopt import _codecs, _forms
from memopt._codec import Codec
from memopt._codecs_derivative import DERIVATIVES, Rounded
from memopt._contract import Left, Store
from memopt._decisions import Names
from memopt._survey import Survey
from memopt.passes import _residuals
from memopt.passes._derivatives import Derivatives

#: Share of a step's seconds below which it is not worth it to keep a value in another form.
_SHORT = 0.15
#: Rows and columns from which what a batched matmul makes counts as attention scores.
_WIDE = 128
_OTHER = (
    "its sensitivity was measured on another form of this step: measure it with the passes and the target that plan it"
)
_NONE = "its sensitivity has no figure for it: the loss does not depend on it, or this form was not measured"


@dataclasses.dataclass(frozen=True)
class Compress:
    """Let the planner keep forward values in few bits until the backward pass reads them.

    Residual bytes fall to 0.52 of bf16 with `"int8"`, 0.27 with `"int4"`, 0.14 with `"int2"` (scales included); the
    cost is one pass over a value to encode it and one over its codes to decode, which XLA fuses with what makes and
    reads it. Gradients carry the error, the forward result does not.

    Args:
      codec: a codec's name (`memopt._codecs.names()`: `"int8"`, `"int4"`, `"int4-asymmetric-stochastic"`, `"fp8-e4m3"`,
        `"int2"`, ..., with `-token` for one scale a row, `-channel` for one a channel), or several, among which the
        planner chooses for each value. `"derivative4"` and `"derivative2"` keep local derivatives of element-wise
        functions (GELU, SiLU, whatever dataflow shows) in 4 or 2 bits in place of what they are made from, and
        `"derivative-mask"` those of Hard-Swish, ReLU6 and other ramps in 1 bit, rounded to 0 or 1: exact for ReLU6.
      where: `fnmatch` patterns on module paths, a string or a tuple; empty for everything.
      error: largest relative error to allow, that of the codec against the largest magnitude of a block.
      only_marked: only what `@memopt.compress` marks.
      always: keep in this codec's form whatever is kept of these values, also without a budget, rather than where it
        pays; for one codec.
      sensitivity: what `memopt.sensitivity` measured with the same passes and target. Each value then gets its own
        number of bits, so that the plan within the budget has the smallest error in all, exact forms and repeats of
        other passes included. Errors of several values are taken as independent: their squares add up.
      total_error: with `sensitivity`, the largest error in all that a plan may have, in its figure (the relative error
        of the gradient, or the sum of Omegas). Of the plans up to it the quickest within the budget is taken.

    Example:
      >>> import memopt
      >>> memopt.passes.Compress("int8", where="*/mlp")
      Compress(codec=('int8',), where=('*/mlp',), error=1.0, only_marked=False, always=False, sensitivity=None,
      total_error=None)

    Raises:
      ValueError: there is no such codec, none of them is within `error`, `always` has several, a pattern matches no
        module path, or `total_error` is not positive or stands without `sensitivity`.
      BudgetError: raised by a call: no plan within the budget has an error of at most `total_error`.

    Source: Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training", ICML 2021
    (per-group asymmetric codes, stochastic rounding); Liu et al., "GACT: Activation Compressed Training for Generic
    Network Architectures", ICML 2022 (one codec for whatever a backward pass reads).

    Blocks of 128 values run down the rows (tokens) of each channel: XLA:TPU fuses these, and wrote the scales of blocks
    along the channels out in full. Where rows are no multiple of 32, and for attention scores, each row is a block.
    Left as they are: statistics of rows, values outside loops that gradients read at once, parameters in another type,
    and what no gradient needs.

    Bits by sensitivity: Dong et al., "HAWQ-V2", NeurIPS 2020 (arXiv 1911.03852), section 3.2 (the frontier of summed
    sensitivity against bytes); there for weights, here for residuals, and jointly with repeats. Forms of the step that
    were not measured (a loop in two levels, a rewrite left out) keep their values exact.

    Derivatives: Jin et al., "S2A" (arXiv 2503.08154); Chiang et al., "MobileTL" (AAAI 2023, arXiv 2212.03246). The
    backward pass then multiplies by them (the order of products changes), whatever the plan. Softmax and norms need no
    code of their own: their derivatives are made of probabilities and centred inputs, which are values of the step, and
    `"int4"` keeps those.

    Limits: integers and bools stay as they are (`Lossless` takes them), and so does what is inside a `shard_map`. An
    operation that JAX did not mark as transposed, such as a gradient written by hand, counts as forward.
    """

    codec: str | Codec | tuple[str | Codec, ...] = ("int8",)
    where: str | tuple[str, ...] = ()
    error: float = 1.0
    only_marked: bool = False
    always: bool = False
    sensitivity: Any = None
    total_error: float | None = None

    def __post_init__(self):
        codecs = (self.codec,) if isinstance(self.codec, (str, Codec)) else tuple(self.codec)
        where = (self.where,) if isinstance(self.where, str) else tuple(self.where)
        object.__setattr__(self, "codec", codecs)
        object.__setattr__(self, "where", where)
        if not self.codecs:
            least = min(_codec(one).error for one in codecs)
            raise ValueError(f"No codec of {codecs} has an error of at most {self.error:g}: the smallest is {least:g}.")

        if self.always and len(codecs) != 1:
            raise ValueError(f"Everything is kept in one codec's form, not in several: {codecs}.")

        if self.total_error is not None and (self.sensitivity is None or not self.total_error > 0):
            raise ValueError(
                f"total_error={self.total_error} has to be positive, and needs what was measured: give "
                "sensitivity=memopt.sensitivity(step, *args, passes=...)."
            )

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "compress"

    @property
    def codecs(self) -> list[Codec]:
        """The codecs within the error that is allowed."""
        return [one for one in map(_codec, self.codec) if one.error <= self.error]

    @property
    def harm_limit(self) -> float | None:
        """The sum of harms that a plan may have."""
        return None if self.total_error is None else self.sensitivity.harm(self.total_error)

    def parts(self) -> list:
        """Return the rewrite that makes local derivatives values of the step, where one of the codecs is for those."""
        return [Derivatives()] if any(one.name in DERIVATIVES for one in self.codecs) else []

    def propose(self, survey: Survey) -> Iterator[Store | Left]:
        """Yield a `Store` for every codec and every forward value of floats that it makes smaller."""
        left = _residuals.small(survey) | _soon(survey) | _residuals.statistics(survey.graph)
        rows = _row_shapes(survey)
        measured, names = None, None
        if self.sensitivity is not None:
            measured, names = self.sensitivity.of(survey.graph), Names(survey)
            if measured is None:
                yield Left("What Compress would store", _OTHER)
                return
        for one in _residuals.chosen(survey, self.where):
            for codec in self.codecs if one.lossy_readers else ():
                asked = one.mark == f"compress.{codec.name}"
                wanted = asked or not (self.only_marked or one.value in left)
                if wanted and codec.accepts(one.aval.dtype) and _is_for(codec, one.mark):
                    form = _codecs.rowwise(codec) if one.aval.shape in rows else _codecs.lean(codec)
                    for store in _coded(survey, one, codec.name, form, asked or self.always):
                        yield store if measured is None else self._with_harm(store, measured, names.value(one.value))

    def _with_harm(self, store: Store, measured: Mapping, name: str) -> Store | Left:
        """Return a form with its measured harm; where repeats start from it and that was not measured, any."""
        row = measured.get((name, store.name))
        if row is None or row.harm is None:
            return Left(f"{name} in {store.name!r}", _NONE)
        again = row.harm if self.sensitivity.kind == "hessian" else math.inf
        return dataclasses.replace(
            store, harm=row.harm, repeated_harm=again if row.repeated_harm is None else row.repeated_harm
        )


def _codec(name: str | Codec) -> Codec:
    return DERIVATIVES[name] if name in DERIVATIVES else _codecs.codec(name)


def _is_for(codec: Codec, mark: str | None) -> bool:
    """Say whether a codec is for values with this mark: those of derivatives are for derivatives alone."""
    if codec.name not in DERIVATIVES:
        return True
    return mark == "derivative.mask" or (mark == "derivative" and not isinstance(codec, Rounded))


def _soon(survey: Survey) -> set[int]:
    """Return values that no gradient needs, or only for a short while, outside loops; and cast parameters.

    A loss's logits are such: their codes would live beside the values themselves.
    """
    graph, last, found = survey.graph, _residuals.last_backward(survey.graph), set()
    done = {b: 0.0 for b in graph.top.bins}  # seconds of each segment
    for op in graph.top.ops:
        done[op.bin] += survey.seconds[op.id]
    short = _SHORT * sum(done.values())
    for one in _residuals.residuals(survey):
        item = graph.values[one.value]
        if one.value not in last or _residuals.is_view(graph, one.value):
            found.add(one.value)
        elif item.region == graph.top.id and item.op is not None:
            if sum(done[b] for b in range(item.op.bin + 1, last[one.value] + 1)) < short:
                found.add(one.value)
    return found


def _row_shapes(survey: Survey) -> set[tuple[int, ...]]:
    """Return the shapes of attention scores: what forward matmuls with batch dimensions make, in wide rows.

    Whole rows share a scale there: XLA:TPU reads scores transposed, and would write out what is decoded in blocks.
    """
    graph, marks = survey.graph, _forms.Marks(survey.graph)
    found = set()
    for op in graph.ops:
        if op.eqn.primitive.name == "dot_general" and any(op.eqn.params["dimension_numbers"][1]):
            shape = op.eqn.outvars[0].aval.shape
            if min(shape[-2:]) >= _WIDE and not marks.is_backward(op):
                found.add(shape)
    return found


def _coded(survey: Survey, one: _residuals.Residual, name: str, form: Codec, asked: bool) -> Iterator[Store]:
    layout = form.layout(one.aval.shape, one.aval.dtype)
    size = sum(survey.bytes_of(leaf) for leaf in (layout.codes, *layout.scales))
    if size < one.bytes:
        seconds = _residuals.move_seconds(survey, size, one.bytes)
        again = size / survey.spec.memory_bytes_per_second  # what is decoded mostly stays in a TPU's fast memory
        yield Store(
            one.value,
            seconds,
            size,
            form.encode,
            form.decode,
            error=form.error,
            name=name,
            asked=asked,
            again_seconds=again,
        )
