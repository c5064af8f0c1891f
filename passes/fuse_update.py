"""Fused updates: layers' parameters updated inside the backward loop, where their gradients are made.

In: an inlined step. Out: an equal one in which the optimizer's operations on stacked gradients, as far as they treat
each layer alone, stand in the body of the loop that makes the gradients. Parameters and moments go through that loop
in its carry and are updated in place. The search is by dataflow (`memopt._stacks`); no optimizer is known by name.
What needs all gradients first stays as it was, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _compat as c
from memopt import _cost, _forms, _pairs, _rows, _stacks
from memopt._contract import Context, Left, Rewritten
from memopt._plan import Decision
from memopt._scopes import module_path


@dataclasses.dataclass(frozen=True)
class FuseUpdate:
    """Update each layer of a scanned model inside the backward loop, as soon as its gradient is there.

    Memory falls by the stacked gradients of all layers but one, and by what the update makes of them; arguments and
    outputs stay. No operation is added but a slice and a write of each layer's state, in place. Exact: each layer's
    operations are the same; only reductions over all layers (a gradient norm that is reported) are summed in another
    order. A loop in the update that goes through the layers itself (GaLore's refreshed bases, Muon's matrices) is taken
    apart: each layer's part stands behind a condition on its number, or alone.

    The plan has one row for each loop, and one sentence for each stacked gradient that stays: one that the step
    returns, or whose update waits for all gradients (clipping by a global norm, a loss scale).

    Example:
      >>> import jax, jax.numpy as jnp, memopt
      >>> def loss(w, x):
      ...     return jax.lax.scan(lambda h, one: (jnp.tanh(h @ one), None), x, w)[0].sum()
      >>> def step(w, x):
      ...     return w - 0.1 * jax.grad(loss)(w, x)
      >>> fused = memopt.optimize(step, target="tpu:v5e", passes=[memopt.passes.FuseUpdate()], donate_argnums=0)
      >>> plan = fused.plan(jnp.ones((4, 8, 8)), jnp.ones((2, 8)))
      >>> plan.decisions[0].reason
      '1 stacked gradients are consumed one layer of 4 at a time'

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), ACL 2024,
    section 3.1; Zhao et al., "GaLore", ICML 2024, for per-layer updates of it; here for any optimizer that
    treats layers alone, after differentiation.

    Limits: layers have to be a `scan`, and the state donated for its memory not to be held twice. Unrolled layers are
    left to XLA, which may update them as early. On the CPU the step is left as it was: XLA:CPU would copy the stacks.
    """

    stage: ClassVar[int] = 30
    optional: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "fuse_update"

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with updates inside the loops that make their gradients."""
        if context.target.platform == "cpu":
            why = (
                "XLA:CPU reads old moments again where it writes new parameters, and so copies whole stacks (measured)"
            )
            return Rewritten(closed, left=(Left("The update", why),))
        new, moved, left = fuse(closed)
        if new is None:
            left = left or [Left("The update", "no stacked gradient of a scan reaches a new state")]
            return Rewritten(closed, left=tuple(dict.fromkeys(left)))
        return Rewritten(new, tuple(self._row(loop, avals) for loop, avals in moved), tuple(dict.fromkeys(left)))

    def _row(self, loop: _pairs.Loop, gradients: Sequence[Any]) -> Decision:
        size = sum(map(_cost.aval_bytes, gradients))
        module = module_path(str(c.name_stack(loop.eqn)))
        reason = f"{len(gradients)} stacked gradients are consumed one layer of {loop.length} at a time"
        return Decision(f"{module or 'scan'}/update", module, c.user_source(loop.eqn), size, self.name, reason)


def fuse(closed: Any) -> tuple[Any | None, list[tuple[_pairs.Loop, list[Any]]], list[Left]]:
    """Move updates into the loops that make their gradients, in nested bodies too.

    Args:
      closed: closed jaxpr, inlined.

    Returns:
      `(the rewritten closed jaxpr or None, (loop, types of its gradients that are no longer stacked) ..., what stays)`.
    """
    moved: list[tuple[_pairs.Loop, list[Any]]] = []
    left: list[Left] = []
    base = _fuse(c.open_jaxpr(closed), moved, left)
    if not moved:
        return None, [], left
    return c.close(c.dce(base)[0], c.jaxpr_consts(closed)), moved, left


def _fuse(jaxpr: Any, moved: list, left: list[Left]) -> Any:
    jaxpr = _untied(jaxpr)
    done: set[int] = set()
    while True:
        places = [i for i, e in enumerate(jaxpr.eqns) if e.primitive.name == "scan" and id(e) not in done]
        if not places:
            return jaxpr
        place = places[0]
        eqn = jaxpr.eqns[place]
        inner = c.open_jaxpr(eqn.params["jaxpr"])
        body = _fuse(inner, moved, left)
        if body is not inner:
            eqn = c.replace_eqn(eqn, params=dict(eqn.params, jaxpr=c.close(body, c.jaxpr_consts(eqn.params["jaxpr"]))))
            jaxpr = c.rebuild(jaxpr, eqns=[*jaxpr.eqns[:place], eqn, *jaxpr.eqns[place + 1 :]])
        found = _stacks.region(jaxpr, place)
        left += _stays(jaxpr, found)
        pairs = _pairs_of(jaxpr, found)
        if pairs:
            moved.append((found.loop, [found.loop.ys[i].aval for i in found.sources]))
            jaxpr, eqn = _Builder(jaxpr, place, found, pairs).build()
        done.add(id(eqn))


def _untied(jaxpr: Any) -> Any:
    """Return an open jaxpr in which barriers hold no stacks of layers: stacks that wait for each other cannot move.

    Optimizers with encoded state tie leaves so; layer by layer, what one of them needs in full precision is small.
    """
    lengths = {e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"}
    renamed: dict[Any, Any] = {}
    eqns = []
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, c.Literal) and v in renamed for v in eqn.invars):
            eqn = c.replace_eqn(eqn, invars=[v if isinstance(v, c.Literal) else renamed.get(v, v) for v in eqn.invars])
        if eqn.primitive is c.optimization_barrier_p:
            pairs = list(zip(eqn.invars, eqn.outvars, strict=True))
            kept = [(a, b) for a, b in pairs if not a.aval.shape or a.aval.shape[0] not in lengths]
            renamed.update((b, a) for a, b in pairs if (a, b) not in kept)
            if len(kept) < len(pairs):
                eqn = c.replace_eqn(eqn, invars=[a for a, _ in kept], outvars=[b for _, b in kept]) if kept else None
        if eqn is not None:
            eqns.append(eqn)
    if not renamed:
        return jaxpr
    outvars = [v if isinstance(v, c.Literal) else renamed.get(v, v) for v in jaxpr.outvars]
    return c.rebuild(jaxpr, eqns=eqns, outvars=outvars)


def _pairs_of(jaxpr: Any, found: _stacks.Region) -> dict[Any, Any]:
    """Return for each new state that members make the old one that it overwrites: a step's argument it is made from.

    An argument that comes from the host's memory, and a result that goes there, count as what is moved.
    """
    moves = [e for e in jaxpr.eqns if e.primitive.name == "device_put" and len(e.invars) == 1]
    arguments, results = list(jaxpr.invars), {v for v in jaxpr.outvars if not isinstance(v, c.Literal)}
    arguments += [e.outvars[0] for e in moves if any(e.invars[0] is v for v in jaxpr.invars)]
    outs = results | {e.invars[0] for e in moves if _stacks.is_sent(e, results)}
    free = set(arguments) & set(found.inputs()[0])
    origins = {v: own for v, own in found.origins().items() if v in outs and v not in own}
    fits = {o: [v for v in arguments if v in free and v in own and v.aval == o.aval] for o, own in origins.items()}
    pairs: dict[Any, Any] = {}
    for out in sorted(fits, key=lambda o: len(fits[o])):
        match = next((v for v in fits[out] if v not in pairs.values()), None)
        if match is not None:
            pairs[out] = match
    return pairs


def _stays(jaxpr: Any, found: _stacks.Region) -> Iterator[Left]:
    """Say of each stack that looks like a gradient, and reaches a new state, why it stays."""
    shapes = {v.aval.shape for v in jaxpr.invars if hasattr(v.aval, "shape")}
    for i, why in sorted(found.why.items()):
        stack = found.loop.ys[i]
        if _is_residual(jaxpr, stack):
            continue
        if stack.aval.shape in shapes and stack.aval.shape in _reached(jaxpr, stack):
            yield Left(f"The stacked gradient {stack.aval.str_short(short_dtypes=True)}", why)


def _is_residual(jaxpr: Any, stack: Any) -> bool:
    """Say whether another loop reads a stack: it is no gradient then."""
    return any(e.primitive.name == "scan" and any(v is stack for v in e.invars) for e in jaxpr.eqns)


def _reached(jaxpr: Any, var: Any) -> set[tuple[int, ...]]:
    """Return the shapes of the outputs that a variable has an effect on."""
    known = {var}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, c.Literal) and v in known for v in eqn.invars):
            known.update(eqn.outvars)
    return {v.aval.shape for v in jaxpr.outvars if not isinstance(v, c.Literal) and v in known}


class _Builder:
    """The loop built anew with a region inside, and the equations around it."""

    def __init__(self, jaxpr: Any, place: int, found: _stacks.Region, pairs: dict[Any, Any]):
        self.jaxpr, self.place, self.region, self.pairs = jaxpr, place, found, pairs
        self.loop = found.loop
        self.body = self.loop.body
        self.like = self.loop.eqn
        self.body_consts, self.body_carry, self.body_xs = self.loop.sorted(self.body.invars)
        self.inside: dict[Any, Any] = {}  # outer variable -> the body's: one layer of a stack, or what all share
        self.index = c.Var(c.ShapedArray((), np.dtype("int32")))
        self.eqns: list[Any] = []
        self.state = [(old, new, c.Var(old.aval)) for new, old in pairs.items()]  # (before, after, in the carry)
        self.consts: list[tuple[Any, Any]] = []
        self.xs: list[tuple[Any, Any]] = []
        self.gathers: list[tuple[Any, Any, Any]] = []  # (outer result, carry variable, the joined value)

    def build(self) -> tuple[Any, Any]:
        """Return the open jaxpr with the new loop, and the loop's equation."""
        before, after = self._around()
        stacks, whole = self.region.inputs()
        self._slices()
        self._operands(stacks, whole)
        self.eqns += self.body.eqns
        outs = self.body.outvars[: self.loop.num_carry], self.body.outvars[self.loop.num_carry :]
        for i in self.region.sources:
            self.inside[self.loop.ys[i]] = outs[1][i]
        for member in self.region.members:
            self._member(member)
        iota, rows = _pairs.op(
            jax.lax.iota_p,
            [],
            c.ShapedArray((self.loop.length,), np.dtype("int32")),
            self.like,
            dtype=np.dtype("int32"),
            shape=(self.loop.length,),
            dimension=0,
            sharding=None,
        )
        starts = self._starts()
        eqn = self._loop(rows, [v for _, v in starts], *outs)
        eqns = [*before, iota, *[e for e, _ in starts], eqn, *after]
        return c.rebuild(self.jaxpr, eqns=eqns), eqn

    def _around(self) -> tuple[list[Any], list[Any]]:
        """Return the equations before and after the loop: what members read is made before it."""
        eqns = self.jaxpr.eqns
        moved = {id(m.eqn) for m in self.region.members}
        stacks, whole = self.region.inputs()
        wanted = {*stacks, *whole}
        early: set[int] = set()
        for eqn in reversed(eqns[self.place + 1 :]):
            if id(eqn) not in moved and any(v in wanted for v in eqn.outvars):
                early.add(id(eqn))
                wanted.update(v for v in eqn.invars if not isinstance(v, c.Literal))
        before = [e for e in eqns[: self.place] if id(e) not in moved]
        rest = [e for e in eqns[self.place + 1 :] if id(e) not in moved]
        return before + [e for e in rest if id(e) in early], [e for e in rest if id(e) not in early]

    def _slices(self) -> None:
        """Take the layer's old state out of the carry; what the body took as slices of the same arrays is this."""
        for old, _, carried in self.state:
            known = [v for outer, v in zip(self.loop.xs, self.body_xs, strict=True) if outer is old]
            self.inside[old] = self._slice(carried, known[0] if known else c.Var(_rows.row_aval(old.aval)))
            for other in known[1:]:
                self._slice(carried, other)

    def _slice(self, stack: Any, out: Any) -> Any:
        shape = (1, *out.aval.shape)
        places = [self.index, *[_pairs.literal(0)] * len(out.aval.shape)]
        eqn, part = _pairs.op(
            jax.lax.dynamic_slice_p, [stack, *places], out.aval.update(shape=shape), self.like, slice_sizes=shape
        )
        self.eqns += [eqn, _pairs.reshape(part, out, self.like)]
        return out

    def _operands(self, stacks: Sequence[Any], whole: Sequence[Any]) -> None:
        """Bring the other operands of members into the body: slices and constants, old ones where they are there."""
        slices = dict(zip(reversed(self.loop.xs), reversed(self.body_xs), strict=True))
        shared = dict(zip(reversed(self.loop.consts), reversed(self.body_consts), strict=True))
        for outer in whole:
            if outer not in shared:
                self.consts.append((outer, c.Var(outer.aval)))
        for outer in stacks:
            if outer not in slices and outer not in self.inside:
                self.xs.append((outer, c.Var(_rows.row_aval(outer.aval))))
        self.shared = shared | dict(self.consts)
        self.inside = slices | dict(self.xs) | self.inside

    def _member(self, member: _stacks.Member) -> None:
        eqn = member.eqn
        tables = [self.inside if s else self.shared for s in member.stacked]
        invars = [v if isinstance(v, c.Literal) else t[v] for v, t in zip(eqn.invars, tables, strict=True)]
        if member.row.gather is not None:
            self._gather(member, invars)
            return
        if member.row.inner is not None:
            eqns, outs = _forms.emit(member.row.inner, [self.index, *invars], eqn)
            self.inside.update(zip(eqn.outvars, outs, strict=True))
            self.eqns += eqns
            return
        outvars = [v if isinstance(v, c.DropVar) else c.Var(_rows.row_aval(v.aval)) for v in eqn.outvars]
        self.inside.update(zip(eqn.outvars, outvars, strict=True))
        self.eqns.append(c.replace_eqn(eqn, invars=invars, outvars=outvars, params=member.row.params))

    def _gather(self, member: _stacks.Member, invars: list[Any]) -> None:
        """Join one layer's result with what the layers before gave, in the carry."""
        (outer,) = member.eqn.outvars
        part, carried = c.Var(outer.aval), c.Var(outer.aval)
        self.eqns.append(c.replace_eqn(member.eqn, invars=invars, outvars=[part], params=member.row.params))
        primitive = {"add": jax.lax.add_p, "max": jax.lax.max_p, "min": jax.lax.min_p}.get(member.row.gather)
        primitive = primitive or {"and": jax.lax.and_p, "or": jax.lax.or_p}[member.row.gather]
        eqn, joined = _pairs.op(primitive, [carried, part], outer.aval, self.like)
        self.eqns.append(eqn)
        self.gathers.append((outer, carried, joined))

    def _starts(self) -> list[tuple[Any, Any]]:
        """Return the equations that make what the gathered results start from, with their variables."""
        made = []
        for (outer, carried, _), member in zip(self.gathers, self._gatherers(), strict=True):
            first = c.Literal(_identity(member.row.gather, outer.aval.dtype), c.ShapedArray((), outer.aval.dtype))
            params = {"shape": tuple(outer.aval.shape), "broadcast_dimensions": (), "sharding": None}
            made.append(_pairs.op(jax.lax.broadcast_in_dim_p, [first], carried.aval, self.like, **params))
        return made

    def _gatherers(self) -> list[_stacks.Member]:
        return [m for m in self.region.members if m.row.gather is not None]

    def _write(self, new: Any, carried: Any) -> Any:
        """Put the layer's new state into the carry, in the place of the old one."""
        row = self.inside[new]
        part = c.Var(carried.aval.update(shape=(1, *row.aval.shape)))
        places = [self.index, *[_pairs.literal(0)] * len(row.aval.shape)]
        self.eqns.append(_pairs.reshape(row, part, self.like))
        eqn, out = _pairs.op(jax.lax.dynamic_update_slice_p, [carried, part, *places], carried.aval, self.like)
        self.eqns.append(eqn)
        return out

    def _loop(self, rows: Any, starts: Sequence[Any], carry_outs: Sequence[Any], ys: Sequence[Any]) -> Any:
        """Return the new loop: old state in the carry, one layer's update in the body."""
        loop = self.loop
        paired = {old for old, _, _ in self.state}
        kept = [k for k, v in enumerate(loop.xs) if isinstance(v, c.Literal) or v not in paired]
        writes = [self._write(new, carried) for _, new, carried in self.state]
        gone = set(self.region.sources)
        stay = [i for i in range(len(ys)) if i not in gone]
        extra = [v for v in self._outputs() if v not in self.pairs]
        carried = [v for _, _, v in self.state] + [v for _, v, _ in self.gathers]
        body = c.make_jaxpr_like(
            self.body,
            [],
            [
                *self.body_consts, *[v for _, v in self.consts], *self.body_carry, *carried,
                *[self.body_xs[k] for k in kept], self.index, *[v for _, v in self.xs],
            ],
            [*carry_outs, *writes, *[v for _, _, v in self.gathers], *[ys[i] for i in stay],
             *[self.inside[v] for v in extra]],
            self.eqns,
        )  # fmt: skip
        operands = (
            [*loop.consts, *[v for v, _ in self.consts]],
            [*loop.init, *[old for old, _, _ in self.state], *starts],
            [*[loop.xs[k] for k in kept], rows, *[v for v, _ in self.xs]],
        )
        outvars = [
            *loop.finals, *[new for _, new, _ in self.state], *[outer for outer, _, _ in self.gathers],
            *[loop.ys[i] for i in stay], *extra,
        ]  # fmt: skip
        return _pairs.scan_eqn(loop.eqn, body, operands, outvars, loop.length)

    def _outputs(self) -> list[Any]:
        """Return what members make for others than members: the step's outputs, each once."""
        outs = {v for v in self.jaxpr.outvars if not isinstance(v, c.Literal)}
        return [v for m in self.region.members if m.row.gather is None for v in m.eqn.outvars if v in outs]


def _identity(primitive: str, dtype: Any) -> Any:
    """Return what changes no result of a joining primitive."""
    if primitive in ("and", "or"):
        return np.bool_(primitive == "and") if dtype == np.bool_ else np.asarray(-(primitive == "and"), dtype)[()]
    if primitive == "add":
        return np.asarray(0, dtype)[()]
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(-np.inf if primitive == "max" else np.inf, dtype)[()]
    info = jnp.iinfo(dtype)
    return np.asarray(info.min if primitive == "max" else info.max, dtype)[()]
