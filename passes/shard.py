"""Sharding: a step for one device made into the same step on a mesh, by constraints put into its jaxpr.

In: a flat step, a mesh and a strategy. Out: the step with `sharding_constraint`s on its arguments, results, gradients,
activations and weights, and a row of the plan for each kind of leaf. XLA's own partitioner (Shardy) does the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from jax.sharding import Mesh, NamedSharding

from memopt import _compat as c
from memopt import _inline
from memopt._contract import Context, Repeat, Rewritten
from memopt._local import Shardings, spec_of
from memopt._plan import Decision
from memopt._specs import spec_for
from memopt._survey import Survey
from memopt._target import Target
from memopt.passes import (
    _shard_apply,
    _shard_attention,
    _shard_auto,
    _shard_cost,
    _shard_flow,
    _shard_places,
    _shard_roles,
    _shard_rules,
    _shard_tensor,
)

_KINDS = (_shard_roles.PARAMETER, _shard_roles.MOMENT, _shard_roles.BATCH, _shard_roles.OTHER)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Run a step that is written for one device on a mesh, each device with a part of its memory.

    Parameters and state per device fall to their total over the number of devices that split them. The cost is
    communication: `"zero3"` brings each layer's weights together next to their uses and scatters the sums of its
    gradients. Bringing them together again for the backward pass, instead of keeping the copies, is an alternative of
    the cut: the planner takes it as soon as the budget asks for it.

    Args:
      mesh: a `jax.sharding.Mesh`, from `jax.make_mesh`, or from `memopt.mesh` for a target that is not attached.
      strategy: parts joined by `+`, such as `"zero3+tensor"`, or a mapping of parts to mesh axes, such as
        `{"parameters": "inner", "moments": ("outer", "inner"), "tensor": "model"}`. Parts: `"data"` (the batch is
        split), `"zero1"` (and the moments), `"zero2"` (and the gradients), `"zero3"` (and the parameters),
        `"hierarchical"` (parameters and gradients over the last data axis, moments over all), `"tensor"` (features, in
        columns and rows, the vocabulary among them), `"sequence"` (the sequence, between the parts of `"tensor"`),
        `"context"` (the sequence everywhere, in attention too: see `attention`). In a string,
        axes named `model`, `tensor` or `context` go to these parts, else the last ones; all others are for data.
        `"auto"` takes the mesh's devices, not its axes, and searches over strategies and mesh shapes: the quickest
        predicted one (collectives on the mesh's links, and what the cut repeats) among those that split parameters
        and state in full and fit the device. Forms that keep some of them whole (`"zero1"`, `"zero2"`) are taken only
        where none of those fits; the plan prints what they would take: ask for them by name.
      least_elements: smaller leaves are not split for storage.
      attention: how attention sees the other parts of a sequence that `"context"` splits. `"ring"`: keys and values
        pass by, partial results are merged exactly; `"ulysses"`: an all-to-all splits heads instead of the sequence
        for the time of the attention; `"gather"`: XLA brings keys and values together. Attention that the first two
        cannot take (array masks, biases) is left to the third, and the plan says so.

    Raises:
      TypeError: `mesh` is none.
      ValueError: an unknown part or axis, too few axes; when planning: a size that an axis does not divide.

    Example:
      >>> import jax, memopt
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> memopt.passes.Shard(mesh, strategy="zero3").strategy
      'zero3'

    Source: Rajbhandari et al., "ZeRO", SC 2020; Zhang et al., "SimpleFSDP", 2024 (arXiv 2411.00284); Shoeybi et al.,
    "Megatron-LM", 2019, section 3; Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
    2022, section 4.2.2 ("sequence"); Liu et al., "Ring Attention", 2023; Jacobs et al., "DeepSpeed Ulysses", 2023.
    Limits: exact up to the order of sums. What the user constrained stays as it is. `shard_map` bodies are not entered.
    """

    mesh: Mesh
    strategy: str | Mapping[str, Any] = "zero3"
    least_elements: int = 1024
    attention: str = "ring"

    stage: ClassVar[int] = 50
    optional: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"Shard takes a jax.sharding.Mesh, got {self.mesh!r}. Make one: jax.make_mesh(shape, names)."
            )
        if isinstance(self.strategy, Mapping):
            pairs = ((k, v if isinstance(v, (str, type(None))) else tuple(v)) for k, v in self.strategy.items())
            object.__setattr__(self, "strategy", tuple(sorted(pairs)))
        if self.attention not in _shard_attention.FORMS:
            raise ValueError(f"Unknown attention={self.attention!r}. Give one of {', '.join(_shard_attention.FORMS)}.")
        if self.strategy != "auto":
            _shard_rules.layout(self.mesh, self._asked)

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "shard"

    @property
    def partitions(self) -> int:
        """The number of parts that the tokens of the step are split into; before the search, at most."""
        if self.searches:
            return self.mesh.size
        layout = _shard_rules.layout(self.mesh, self._asked)
        return math.prod(self.mesh.shape[a] for a in (*layout.batch, *layout.context))

    @property
    def feature_parts(self) -> int:
        """The number of parts that features are split into, where they divide; 1 before the search."""
        if self.searches:
            return 1
        return math.prod(self.mesh.shape[a] for a in _shard_rules.layout(self.mesh, self._asked).tensor)

    @property
    def _auto_mesh(self) -> Mesh:
        """The mesh with axes that XLA's partitioner may use freely."""
        return Mesh(self.mesh.devices, self.mesh.axis_names)

    @property
    def _asked(self) -> str | Mapping[str, Any]:
        return self.strategy if isinstance(self.strategy, str) else dict(self.strategy)

    def parts(self) -> list[Any]:
        """Return the rewriters that do this pass's work, attention over a split sequence first."""
        layout = None if self.searches else _shard_rules.layout(self.mesh, self._asked)
        if layout is None or not layout.context or self.attention == "gather":
            return [self]
        axes = layout.context, layout.batch, layout.tensor
        return [_shard_attention.ContextAttention(self._auto_mesh, *axes, form=self.attention), self]

    @property
    def searches(self) -> bool:
        """Whether the strategy is searched for: then `search` makes the plans, and `rewrite` cannot run."""
        return self.strategy == "auto"

    def search(
        self,
        closed: Any,
        context: Context,
        plan: Callable[..., Any],
        limit: Callable[[Any], int | None],
    ) -> Iterator[Any]:
        """Yield the ladders of the candidates of `"auto"`, the best first.

        Args:
          closed: the step as written.
          context: what is known of it.
          plan: a pass to take the place of this one, and `sketched=` -> the ladder of the step with it.
          limit: a ladder, or None -> the budget in bytes, None where there is none.
        """
        flat = _inline.inline(closed)
        flow = _shard_flow.Flow(c.close(c.dce(flat)[0], c.jaxpr_consts(flat)))
        roles = _shard_roles.roles(flow, context.paths, context.out_paths)
        groups = _shard_flow.Groups(flow)

        def lay_out(one: _shard_auto.Candidate) -> None:
            rules = self._as(one)._rules(flow, roles, context, groups)
            found = _shard_places.places(flow, roles, rules)
            pairs = zip(flow.jaxpr.invars, found.inputs, strict=True)
            held = [_bytes(var) // _ways(rules, spec) for var, spec in pairs]
            kinds = zip(held, roles.kinds, strict=True)
            one.argument_bytes = sum(held)
            one.state_bytes = sum(size for size, kind in kinds if kind != _shard_roles.BATCH)
            one.collective_seconds = _shard_cost.collective_seconds(flow, rules, found, context.target)

        def ladder(one: _shard_auto.Candidate, sketched: bool) -> Any:
            return plan(self._as(one), sketched=sketched)

        return _shard_auto.search(self.mesh, lay_out, ladder, limit)

    def saved_in(self, passes: str) -> Shard:
        """Return the candidate that a saved plan names among its passes; this pass itself where it names none."""
        named = (self._as(one) for one in _shard_auto.candidates(self.mesh))
        return next((shard for shard in named if repr(shard) in passes), self)

    def _as(self, one: _shard_auto.Candidate) -> Shard:
        return dataclasses.replace(self, mesh=one.mesh, strategy=one.strategy)

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with sharding constraints on the mesh."""
        if self.searches:
            raise RuntimeError("Shard(strategy='auto') has no strategy before its search: plan by memopt.optimize.")
        flow = _shard_flow.Flow(closed)
        roles = _shard_roles.roles(flow, context.paths, context.out_paths)
        rules = self._rules(flow, roles, context)
        found = _shard_places.places(flow, roles, rules)
        _keep_users(found, flow, roles, context)
        closed = _shard_apply.constrain(closed, self._auto_mesh, found.made, found.used, found.results)
        mesh = self._auto_mesh
        inputs = tuple(_shard_apply.named(mesh, spec) for spec in found.inputs)
        outputs = tuple(None if spec is None else _shard_apply.named(mesh, spec) for spec in found.outputs)
        rows = *_rows(flow, roles, rules, found, context), *_collectives(flow, rules, found, context)
        return Rewritten(closed, rows, shardings=Shardings(inputs, outputs))

    def propose(self, survey: Survey) -> Iterator[Repeat]:
        """Yield a `Repeat` for each constraint, so that weights may be gathered again for the backward pass."""
        for op in survey.graph.ops:
            if op.eqn.primitive.name == "sharding_constraint":
                yield Repeat(op.id, survey.repeat_seconds[op.id])

    def _rules(self, flow: Any, roles: Any, context: Context, groups: Any = None) -> _shard_rules.Rules:
        layout = _shard_rules.layout(self.mesh, self._asked)
        groups = _shard_flow.Groups(flow) if groups is None else groups
        platform = context.target.platform
        rules = _shard_rules.Rules(
            flow, groups, roles, self.mesh.shape, layout, platform, least_elements=self.least_elements
        )
        if layout.tensor:
            taken = rules.batch_groups | rules.sequence_groups
            spec = spec_for(context.target if platform != "cpu" else Target.parse("tpu:v5e"))
            ways = rules.count(layout.tensor)
            chosen = _shard_tensor.tensor_groups(flow, groups, roles, ways, taken, spec)
            rules.tensor.update(dict.fromkeys(chosen, layout.tensor))
        return rules


def _keep_users(found: _shard_places.Places, flow: Any, roles: Any, context: Context) -> None:
    """Take the user's own shardings of arguments in place of ours."""
    users = context.shardings.arguments if context.shardings is not None else ()
    for i, sharding in enumerate(users):
        if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1:
            var = flow.jaxpr.invars[i]
            spec = spec_of(sharding.spec, len(_shard_flow.shape_of(var)))
            found.inputs[i] = spec
            found.made[var] = (spec,)
            out = roles.result_of.get(i)
            if out is not None:
                found.outputs[out] = spec
                found.results[out] = (spec,)


def _rows(flow: Any, roles: Any, rules: Any, found: _shard_places.Places, context: Context):
    """Yield what became of each kind of leaf, which leaves are whole everywhere and why, and the gathered weights."""
    for kind in _KINDS:
        members = [i for i, k in enumerate(roles.kinds) if k == kind]
        total = sum(_bytes(flow.jaxpr.invars[i]) for i in members)
        if not total:
            continue
        local = sum(_bytes(flow.jaxpr.invars[i]) // _ways(rules, found.inputs[i]) for i in members)
        axes = sorted({a for i in members for axes in found.inputs[i] for a in axes})
        choice = f"shard over {', '.join(axes)}" if axes else "replicate"
        largest = max(members, key=lambda i: _bytes(flow.jaxpr.invars[i]))
        shown = f"{_path(context, largest)} {_cut(flow.jaxpr.invars[largest], found.inputs[largest])}"
        reason = f"{len(members)} leaves, {local / total:.1%} of their bytes on each device; {shown}"
        yield Decision(f"shard/{kind}", "", "", total, choice, reason)
    whole: dict[str, list[int]] = {}
    for i, spec in enumerate(found.inputs):
        if not any(spec) and _shard_flow.shape_of(flow.jaxpr.invars[i]):
            whole.setdefault(rules.why_whole(i), []).append(i)
    for why, members in whole.items():
        total = sum(_bytes(flow.jaxpr.invars[i]) for i in members)
        largest = max(members, key=lambda i: _bytes(flow.jaxpr.invars[i]))
        reason = f"{why}: {len(members)} leaves, the largest {_path(context, largest)}"
        yield Decision("shard/whole", "", "", total, "replicate", reason)
    if found.gathered:
        reason = "brought together next to each use; the planner decides what is kept for the backward pass"
        yield Decision("shard/gather", "", "", found.gathered, "gather", reason)


def _collectives(flow: Any, rules: Any, found: _shard_places.Places, context: Context):
    """Yield what one device is predicted to send in a step, by kind of collective."""
    sent = _shard_cost.sent_by_kind(flow, rules, found, context.target)
    for kind, one in sorted(sent.items(), key=lambda item: -item[1].bytes):
        reason = f"sent by each device in a step, {one.seconds * 1e3:.3g} ms, predicted; repeats are not counted"
        name, choice = f"shard/{kind}", f"over {', '.join(sorted(one.axes))}"
        yield Decision(name, "", "", int(one.bytes), choice, reason, collective_seconds=one.seconds)


def _path(context: Context, index: int) -> str:
    return context.paths[index] if index < len(context.paths) else f"input {index}"


def _cut(var: Any, spec: Any) -> str:
    """Return a shape with the axes that split it, as `[4096/data, 1024]`."""
    pairs = zip(_shard_flow.shape_of(var), spec, strict=True)
    return f"[{', '.join('/'.join([str(size), *axes]) for size, axes in pairs)}]"


def _bytes(var: Any) -> int:
    dtype = getattr(var.aval, "dtype", None)
    return int(var.aval.size) * getattr(dtype, "itemsize", 4) if dtype is not None else 0


def _ways(rules: Any, spec: Any) -> int:
    return rules.count([a for axes in spec for a in axes])
