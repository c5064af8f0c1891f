"""Kernels in place of naive attention and vocabulary losses, found by dataflow in a differentiated step.

In: a flat jaxpr. Out: an equal one in which scores and logits never exist whole, with a row for each replacement and a
sentence for each near miss. Forward and backward are recognised and replaced together; a pair of loops is looked at as
one, so that what the kernel's backward pass reads is stacked in place of scores and weights. It may not change anything
whose forward and backward pass were not shown to equal the definition.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax

from memopt import _compat as c
from memopt import _pairs
from memopt._contract import Context, Left, Rewritten
from memopt._plan import Decision
from memopt.passes import _attention_call, _loss_call, _match_attention, _match_loss
from memopt.passes._match import FIRST, OUTER, SECOND, Node, Space


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Replace naive attention, and matmuls into a cross-entropy, by kernels that never hold scores or logits.

    On TPU and GPU they are Pallas kernels, elsewhere, for shapes that these cannot serve, and in steps with shardings
    pure JAX that computes a tile at a time.

    Memory: of an attention, output and two floats a row and head are kept for the backward pass, in place of scores,
    weights and masks; of a loss, one float a token in place of logits. Cost: the backward pass computes scores and
    logits again; blocks that a causal or windowed mask hides are skipped. Exact: only sums are reassociated, and
    roundings of scores and logits to half precision are dropped.

    Found are a softmax between two products with any layout, scale, cast, `where` masks, added biases, soft cap and
    grouped heads, and any way of writing the cross-entropy of integer labels, summed, averaged, masked or weighted,
    each only when the backward pass is exactly its own: the region is evaluated on small random inputs.

    The planner takes both, attention alone, or neither: a causal attention costs fewer FLOPs than the plain one, as
    hidden blocks are skipped; another one, and a loss, are taken where the budget asks for their memory.

    Args:
        attention: replace attention.
        losses: replace matmuls into a cross-entropy.

    Example:
        >>> import memopt
        >>> memopt.passes.Kernels(losses=False).name
        'Kernels: attention'

    Source: Dao 2023, "FlashAttention-2"; Wijmans et al. 2024, "Cut your losses in large-vocabulary language models".

    Limits: dropout inside attention, learned biases, a bias of the head, smoothed labels, and scores, weights or logits
    that something else reads are left as they are.
    """

    stage: ClassVar[int] = 10
    optional: ClassVar[bool] = True

    attention: bool = True
    losses: bool = True

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "Kernels" if self.attention == self.losses else f"Kernels: {'attention' if self.attention else 'losses'}"

    def parts(self) -> list[Kernels]:
        """Return one pass for each kind of kernel, in the order in which the planner takes them."""
        found = [Kernels(losses=False)] if self.attention else []
        return [*found, Kernels(attention=False)] if self.losses else found

    def propose(self, survey: Any) -> tuple[()]:
        """Propose nothing: this pass rewrites."""
        return ()

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with every proven attention replaced, or None where there is none and nothing to say."""
        platform = "cpu" if context.partitioned else getattr(context.target, "platform", "cpu")
        work = _Work(platform, self)
        base = work.level(c.open_jaxpr(closed))
        if not work.rows and not work.left:
            return None
        out = closed if not work.rows else c.close(base, c.jaxpr_consts(closed))
        return Rewritten(out, tuple(work.rows), tuple(work.left))


class _Work:
    """One rewrite of a step: what it did so far, for the plan."""

    def __init__(self, platform: str, settings: Kernels):
        self.platform, self.settings = platform, settings
        self.rows: list[Decision] = []
        self.left: list[Left] = []
        self.seen: set[Any] = set()  # near misses that are listed already

    def level(self, jaxpr: Any, quiet: bool = False) -> Any:
        """Return a level rewritten: its own operations, its pairs of loops, then the bodies inside."""
        jaxpr = self._space(jaxpr, None, quiet)
        paired: set[int] = set()
        for index in range(len(jaxpr.eqns)):
            pair = _pairs.find(jaxpr, index)
            if pair is not None and len(pair.readers) == 1:
                jaxpr = self._space(jaxpr, (index, pair.readers[0]), quiet)
                paired.update((index, pair.readers[0]))
        eqns = [self._bodies(eqn, quiet or index in paired) for index, eqn in enumerate(jaxpr.eqns)]
        changed = any(a is not b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        return c.rebuild(jaxpr, eqns=eqns) if changed else jaxpr

    def _bodies(self, eqn: Any, quiet: bool) -> Any:
        if eqn.primitive.name not in ("scan", "cond", "while"):
            return eqn
        params = dict(eqn.params)
        for key, position, body in c.subjaxprs(eqn.params):
            inner = self.level(c.open_jaxpr(body), quiet)
            if inner is c.open_jaxpr(body):
                continue
            new = c.close(inner, c.jaxpr_consts(body))
            if position is None:
                params[key] = new
            else:
                items = list(params[key])
                items[position] = new
                params[key] = type(eqn.params[key])(items)
        same = all(params[key] is eqn.params[key] for key in params)
        return eqn if same else c.replace_eqn(eqn, params=params)

    def _space(self, jaxpr: Any, pair: tuple[int, int] | None, quiet: bool) -> Any:
        eqns = jaxpr.eqns if pair is None else c.open_jaxpr(jaxpr.eqns[pair[0]].params["jaxpr"]).eqns
        if not any(eqn.primitive.name == "exp" for eqn in eqns):
            return jaxpr
        space = Space(jaxpr, pair)
        edit = _Edit(space)
        for node, found in _match_attention.find(space) if self.settings.attention else ():
            if pair is not None and node.side == OUTER:
                continue
            if isinstance(found, str):
                self._leave(node, found, quiet)
            else:
                call = _attention_call.make(space, found, self.platform)
                edit.replace(call, call.found.out)
                self.rows.append(_row(space, call, len(self.rows)))
        if pair is None and self.settings.losses:
            self._losses(space, edit, quiet)
        return edit.done()

    def _losses(self, space: Space, edit: _Edit, quiet: bool) -> None:
        for node, found in _match_loss.find(space):
            if not isinstance(found, str):
                try:
                    call = _loss_call.make(space, found, self.platform)
                except NotImplementedError as error:
                    found = str(error)
            if isinstance(found, str):
                self._leave(node, found, quiet, "loss")
                continue
            edit.replace(call, found.loss)
            self.rows.append(_loss_row(call, len(self.rows)))

    def _leave(self, node: Node, why: str, quiet: bool, what: str = "attention") -> None:
        key = (c.user_source(node.eqn), why)
        if not quiet and key not in self.seen:
            self.seen.add(key)
            self.left.append(Left(f"{what} at {key[0] or _module(node.eqn) or 'an unnamed place'}", why))


def _module(eqn: Any) -> str:
    return str(c.name_stack(eqn))


def _row(space: Space, call: _attention_call.Call, number: int) -> Decision:
    eqn = call.found.softmax.eqn
    aval = eqn.outvars[0].aval
    size = math.prod(aval.shape) * aval.dtype.itemsize
    spec = call.spec
    kind = "causal" if spec.causal and spec.offset == 0 else "masked" if spec.hides or call.masks else "full"
    passes = "forward and backward" if call.found.grads else "forward"
    name = f"{_module(eqn)}/attention.{number}".lstrip("/")
    reason = f"{kind} attention, {passes}, equal on random inputs; {call.note}"
    return Decision(name, _module(eqn), c.user_source(eqn), size, "kernel", reason)


def _loss_row(call: _loss_call.Call, number: int) -> Decision:
    eqn = call.found.product.eqn
    aval = eqn.outvars[0].aval
    passes = "forward and backward" if call.found.grads else "forward"
    name = f"{_module(eqn)}/linear_cross_entropy.{number}".lstrip("/")
    reason = f"cross-entropy of a product, {passes}, equal on random inputs; {call.note}"
    size = math.prod(aval.shape) * aval.dtype.itemsize
    return Decision(name, _module(eqn), c.user_source(eqn), size, "kernel", reason)


class _Edit:
    """Exchanges equations of a space, and hands values from one body to the other where the new ones need them."""

    def __init__(self, space: Space):
        self.space = space
        self.new: dict[str, dict[int, Any]] = {OUTER: {}, FIRST: {}, SECOND: {}}  # None deletes
        self.rename: dict[Any, Any] = {}  # variable -> the one that has its value now
        self.handed: list[tuple[Any, Any]] = []  # variable of the first body -> of the second
        self.given: dict[str, list[tuple[Any, Any]]] = {FIRST: [], SECOND: []}  # variable of the level -> of a body

    def replace(self, call: Any, first: Node) -> None:
        """Put a call in the place of what it was found to equal; `first` makes the forward result."""
        found, space = call.found, self.space
        out, lse = self._forward(call, first)
        copies = [v for v, number in space.numbered() if number == first.outs[0] and v is not out]
        for var in copies:
            self.rename[var] = out
        if not found.grads:
            return
        side = next(iter(found.grads.values())).side
        index = min(node.index for node in found.grads.values())
        eqn = next(node for node in found.grads.values() if node.index == index).eqn
        operands = [self._variable(side, value) for value in call.operands]
        saved = [out, lse] if side == first.side else [self._hand(out), self._hand(lse)]
        if side != first.side:
            self.rename.update((var, saved[0]) for var in copies)
        cotangent = self._variable(side, found.cotangent)
        outvars = [node.eqn.outvars[0] for node in found.grads.values()]
        for node in found.grads.values():
            self.new[side][node.index] = None
        self.new[side][index] = _call_eqn(call.backward, [*operands, *saved, cotangent], outvars, eqn)

    def _forward(self, call: Any, node: Node) -> tuple[Any, Any]:
        operands = [self._variable(node.side, value) for value in call.operands]
        aval = jax.eval_shape(call.forward, *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands))[1]
        out, lse = node.eqn.outvars[0], c.Var(c.ShapedArray(aval.shape, aval.dtype))
        self.new[node.side][node.index] = _call_eqn(call.forward, operands, [out, lse], node.eqn)
        return out, lse

    def _variable(self, side: str, value: int) -> Any:
        """Return the variable that has a value on a side, handing it over where it has none yet."""
        held = self.space.held
        if (side, value) not in held:
            if side == SECOND and (FIRST, value) in held:
                held[side, value] = self._hand(held[FIRST, value])
            else:
                outer = held[OUTER, value]
                held[side, value] = c.Var(outer.aval)
                self.given[side].append((outer, held[side, value]))
        return held[side, value]

    def _hand(self, var: Any) -> Any:
        for first, second in self.handed:
            if first is var:
                return second
        self.handed.append((var, c.Var(var.aval)))
        return self.handed[-1][1]

    def done(self) -> Any:
        """Return the level with all exchanges made."""
        space, jaxpr = self.space, self.space.jaxpr
        if not any(self.new.values()):
            return jaxpr
        if space.pair is None:
            eqns = self._exchanged(OUTER, jaxpr.eqns)
            return c.rebuild(jaxpr, eqns=eqns, outvars=[self._renamed(v) for v in jaxpr.outvars])
        first, second = (_pairs.Loop(jaxpr.eqns[i]) for i in space.pair)
        stacked = [c.Var(c.stacked_aval(var.aval, first.length)) for var, _ in self.handed]
        eqns = list(jaxpr.eqns)
        eqns[space.pair[0]] = self._loop(FIRST, first, [var for var, _ in self.handed], [], stacked)
        slices = [(stack, var) for stack, (_, var) in zip(stacked, self.handed, strict=True)]
        eqns[space.pair[1]] = self._loop(SECOND, second, [], slices, [])
        return c.rebuild(jaxpr, eqns=eqns)

    def _loop(self, side: str, loop: _pairs.Loop, outs: list[Any], slices: list[tuple[Any, Any]], results: list[Any]):
        consts, carry, xs = loop.sorted(loop.body.invars)
        given = self.given[side]
        invars = [*consts, *(var for _, var in given), *carry, *xs, *(var for _, var in slices)]
        outvars = [self._renamed(v) for v in (*loop.body.outvars, *outs)]
        body = c.rebuild(loop.body, invars=invars, outvars=outvars, eqns=self._exchanged(side, loop.body.eqns))
        operands = [*loop.consts, *(var for var, _ in given)], loop.init, [*loop.xs, *(var for var, _ in slices)]
        return _pairs.scan_eqn(loop.eqn, body, operands, [*loop.eqn.outvars, *results], loop.length)

    def _exchanged(self, side: str, eqns: list[Any]) -> list[Any]:
        found = []
        for index, eqn in enumerate(eqns):
            eqn = self.new[side].get(index, eqn)
            if eqn is not None:
                found.append(c.replace_eqn(eqn, invars=[self._renamed(v) for v in eqn.invars]))
        return found

    def _renamed(self, var: Any) -> Any:
        return var if isinstance(var, c.Literal) else self.rename.get(var, var)


def _call_eqn(function: Any, operands: list[Any], outvars: list[Any], like: Any) -> Any:
    """Return a `jit` equation that calls a function; it is inlined when the step is made flat again."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands]
    traced = c.open_jaxpr(jax.make_jaxpr(jax.jit(lambda *arrays: function(*arrays)))(*shapes))
    call = traced.eqns[-1]
    return c.new_eqn(operands, outvars, call.primitive, call.params, call.effects, like.source_info, like.ctx)
