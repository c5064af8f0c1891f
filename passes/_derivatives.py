"""The chain rule, multiplied out: what element-wise operations multiply a gradient with, as one forward value.

In: a flat step. Out: an equal one in which such runs of the backward pass are one multiplication each, by the local
derivative of what the forward pass did there: computed beside the forward values, handed from a forward loop to its
backward one, and marked (`_scopes.DERIVATIVE`), so that it may be kept in a form of its own. Found on dataflow: the
backward pass reads a gradient once, and forward values of the same shape otherwise, through operations that are linear
in the gradient. Which names a model gives its activations is not asked. It stores nothing and chooses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memopt import _compat as c
from memopt import _forms, _fusion, _scopes
from memopt._contract import Context, Left, Rewritten

#: Arguments at which a derivative is looked at, to see whether rounding it to 0 or 1 makes sense.
_GRID = np.linspace(-30.0, 30.0, 2401, dtype=np.float32)
_END = 400  # how many of them, on each side, count as far out


@dataclasses.dataclass(frozen=True)
class Derivatives:
    """Let the backward pass multiply by local derivatives, as values that the forward pass makes.

    Exact but for the order of products. Part of `Compress` where a codec of derivatives is asked for.
    """

    stage: ClassVar[int] = 15
    optional: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "derivatives"

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with its element-wise runs multiplied out; None where there is none."""
        level = _Level(c.open_jaxpr(closed), ())
        found = level.rewritten()
        if found is level.jaxpr:
            return Rewritten(closed, left=(Left("Every derivative", "no run of element-wise operations was found"),))
        return Rewritten(c.close(found, c.jaxpr_consts(closed)))


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """What a gradient is multiplied with: an operation on other factors, a forward variable, or a number.

    Attributes:
      how: a function of the operands' arrays; None for a variable.
      operands: factors.
      var: the forward variable, where it is one.
      number: the number and its dtype, where it is one.
    """

    how: Callable[..., Any] | None
    operands: tuple[Factor, ...] = ()
    var: Any = None
    number: tuple[Any, Any] | None = None

    def leaves(self) -> Iterator[Any]:
        """Yield the forward variables that it reads, each once."""
        seen: set[Any] = set()
        stack = [self]
        while stack:
            one = stack.pop()
            if one.var is not None and one.var not in seen:
                seen.add(one.var)
                yield one.var
            stack += one.operands

    def value(self, leaves: dict[Any, Any], scope: str | None = None) -> Any:
        """Return its array, given those of its leaves; the last operation stands in a name scope."""
        if self.var is not None:
            return leaves[self.var]
        if self.number is not None:
            return jnp.full(next(iter(leaves.values())).shape, *self.number)
        operands = [one.value(leaves) for one in self.operands]
        if scope is None:
            return self.how(*operands)
        with jax.named_scope(scope):
            return self.how(*operands)


def _number(value: float, aval: Any) -> Factor:
    return Factor(None, number=(value, aval.dtype))


class _Level:
    """One body of equations, and the pairs of loops in it.

    Args:
      jaxpr: open.
      around: the transforms of what the body is in, outermost first.
      carried: inputs that the forward pass makes: a loop's carry.
    """

    def __init__(self, jaxpr: Any, around: tuple[str, ...], carried: Sequence[Any] = ()):
        self.jaxpr = jaxpr
        self.carried = frozenset(carried)
        self.around = around
        self.maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.after: dict[int, list[Any]] = {}  # id of an equation -> equations that follow it
        self.instead: dict[int, Any] = {}  # id of an equation -> what stands in its place
        self.at_start: list[Any] = []

    def is_backward(self, eqn: Any) -> bool:
        """Say whether JAX transposed an equation."""
        return c.is_transposed([*self.around, *c.transforms(eqn)])

    def rewritten(self) -> Any:
        """Return the body with its runs and those of its pairs of loops multiplied out; the very same without any."""
        for eqn, root, factor in self.runs(self._is_forward):
            likes = [self.maker[v] for v in factor.leaves() if v in self.maker]
            eqns, derivative = derivative_of(factor, likes[-1] if likes else eqn, self.single(factor))
            last = max(likes, key=self._place, default=None)
            (self.at_start if last is None else self.after.setdefault(id(last), [])).extend(eqns)
            self.instead[id(eqn)] = times(root, derivative, eqn)
        for forward, backward in self._pairs():
            self._join(forward, backward)
        if not (self.after or self.instead or self.at_start):
            return self.jaxpr
        eqns = list(self.at_start)
        for eqn in self.jaxpr.eqns:
            eqns += [self.instead.get(id(eqn), eqn), *self.after.get(id(eqn), ())]
        return c.rebuild(self.jaxpr, eqns=eqns)

    def _place(self, eqn: Any) -> int:
        if not hasattr(self, "_places"):
            self._places = {id(one): i for i, one in enumerate(self.jaxpr.eqns)}
        return self._places[id(eqn)]

    def _is_forward(self, var: Any) -> bool:
        """Say whether the forward pass makes a value of its own here: no parameter, no row spread out."""
        eqn = self.maker.get(var)
        if eqn is None:
            return var in self.carried
        return not self.is_backward(eqn) and eqn.primitive.name != "broadcast_in_dim"

    def runs(
        self, is_forward: Callable[[Any], bool], gradients: Sequence[Any] = ()
    ) -> Iterator[tuple[Any, Any, Factor]]:
        """Yield the last equation of each run, the gradient that goes in, and what that is multiplied with.

        Args:
          is_forward: whether a variable is a forward value that a derivative may be made of.
          gradients: inputs of the body that are gradients.
        """
        # variable -> the gradient and the factor, None for one
        known: dict[Any, tuple[Any, Factor | None]] = {v: (v, None) for v in gradients if _is_array(v)}
        zeros: set[Any] = set()
        read: dict[Any, list[Any]] = {}
        for eqn in self.jaxpr.eqns:
            for v in eqn.invars:
                if not isinstance(v, c.Literal):
                    read.setdefault(v, []).append(eqn)
            if not self.is_backward(eqn):
                continue
            out = eqn.outvars[0]
            if _is_zero(eqn, zeros):
                zeros.add(out)
            elif len(eqn.outvars) == 1 and _is_array(out):
                known[out] = _of(eqn, known, zeros, is_forward) or (out, None)
        for eqn in self.jaxpr.eqns:
            root, factor = known.get(eqn.outvars[0], (None, None)) if eqn.outvars else (None, None)
            if factor is None or factor.var is not None or not list(factor.leaves()):
                continue
            readers = read.get(eqn.outvars[0], [])
            if not readers or any(known.get(r.outvars[0], (None,))[0] is not root for r in readers):
                yield eqn, root, factor

    def single(self, factor: Factor, leaf: Callable[[Any], Any] = lambda v: v) -> bool:
        """Say whether a factor depends on one forward value alone, and goes from 0 or 1 to 0 or 1 as that grows."""
        leaves = {v: leaf(v) for v in factor.leaves()}
        source = self._source(set(leaves.values()))
        if source is None:
            return False
        known = {source: jnp.asarray(_GRID, source.aval.dtype)}
        with jax.ensure_compile_time_eval():
            values = np.asarray(factor.value({v: self._on_grid(w, known) for v, w in leaves.items()}), np.float32)
        ends = np.concatenate([values[:_END], values[-_END:]])
        return bool(np.all(np.minimum(abs(ends), abs(ends - 1)) < 0.01) and values.min() > -0.6 and values.max() < 1.6)

    def _source(self, found: set[Any]) -> Any | None:
        """Return the latest value of which all of these are pointwise functions; None where there is none."""
        while len(found) != 1 or not all(map(_is_array, found)):
            last = max(found, key=lambda v: self._place(self.maker[v]) if v in self.maker else -1)
            eqn = self.maker.get(last)
            if eqn is None or not is_pointwise(eqn):
                return None
            found = (found - {last}) | {v for v in eqn.invars if not isinstance(v, c.Literal)}
            if not found:
                return None
        return next(iter(found))

    def _on_grid(self, var: Any, known: dict[Any, Any]) -> Any:
        if var not in known:
            eqn = self.maker[var]
            known[var] = _evaluated(eqn, [_operand(v, lambda v: self._on_grid(v, known)) for v in eqn.invars])
        return known[var]

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        """Yield each backward loop with the forward one that stacks what it reads."""
        loops = [eqn for eqn in self.jaxpr.eqns if eqn.primitive.name == "scan"]
        for backward in filter(self.is_backward, loops):
            makers = [self.maker.get(v) for v in backward.invars if not isinstance(v, c.Literal)]
            for forward in loops:
                same = forward.params["length"] == backward.params["length"]
                if not self.is_backward(forward) and same and any(one is forward for one in makers):
                    yield forward, backward

    def _join(self, forward: Any, backward: Any) -> None:
        """Hand derivatives from a forward loop's body to its backward loop's."""
        forward, backward = self.instead.get(id(forward), forward), self.instead.get(id(backward), backward)
        inner = _Level(c.open_jaxpr(backward.params["jaxpr"]), (*self.around, *c.transforms(backward)))
        body = c.open_jaxpr(forward.params["jaxpr"])
        consts, carry = c.scan_layout(forward)
        outer = _Level(body, (*self.around, *c.transforms(forward)), body.invars[consts : consts + carry])
        stacks = _handed(forward, backward)
        new_outs, new_xs, forward_eqns = [], [], []
        consts, carry = c.scan_layout(backward)
        gradients = inner.jaxpr.invars[consts : consts + carry]
        for eqn, root, factor in inner.runs(lambda v: v in stacks and outer._is_forward(stacks[v]), gradients):
            single = outer.single(factor, stacks.__getitem__)
            likes = [outer.maker[stacks[v]] for v in factor.leaves() if stacks[v] in outer.maker]
            like = likes[-1] if likes else forward
            eqns, derivative = derivative_of(factor, like, single, stacks.__getitem__)
            forward_eqns += eqns
            new_outs.append(derivative)
            new_xs.append(c.Var(derivative.aval))
            inner.instead[id(eqn)] = times(root, new_xs[-1], eqn)
        if not new_outs:
            return
        made = [c.Var(c.stacked_aval(v.aval, forward.params["length"])) for v in new_outs]
        first = _wider(forward, outer.jaxpr, (), [*outer.jaxpr.eqns, *forward_eqns], new_outs)
        second = [inner.instead.get(id(eqn), eqn) for eqn in inner.jaxpr.eqns]
        second = _wider(backward, inner.jaxpr, new_xs, second, ())
        old_forward, old_backward = self._written(forward), self._written(backward)
        self.instead[old_forward] = c.replace_eqn(forward, params=first, outvars=[*forward.outvars, *made])
        self.instead[old_backward] = c.replace_eqn(backward, params=second, invars=[*backward.invars, *made])

    def _written(self, eqn: Any) -> int:
        """Return the id of the equation in the body as written in whose place this one stands."""
        return next((key for key, new in self.instead.items() if new is eqn), id(eqn))


def _wider(eqn: Any, jaxpr: Any, new_inputs: Sequence[Any], eqns: list[Any], new_outputs: Sequence[Any]) -> Any:
    """Return the parameters of a loop whose body has more slices coming in and going out."""
    body = c.rebuild(jaxpr, invars=[*jaxpr.invars, *new_inputs], eqns=eqns, outvars=[*jaxpr.outvars, *new_outputs])
    closed = c.close(body, c.jaxpr_consts(eqn.params["jaxpr"]))
    return c.scan_params(eqn, closed, *c.scan_layout(eqn))


def _handed(forward: Any, backward: Any) -> dict[Any, Any]:
    """Return, for variables of the backward body that are slices of the forward one's stacks, its variables."""
    _, carry = c.scan_layout(forward)
    outs = c.open_jaxpr(forward.params["jaxpr"]).outvars
    given = {v: outs[i] for i, v in enumerate(forward.outvars) if i >= carry and not isinstance(outs[i], c.Literal)}
    first = sum(c.scan_layout(backward))
    invars = c.open_jaxpr(backward.params["jaxpr"]).invars
    pairs = list(zip(backward.invars, invars, strict=True))[first:]
    return {inner: given[v] for v, inner in pairs if not isinstance(v, c.Literal) and v in given}


def derivative_of(
    factor: Factor, like: Any, single: bool, leaf: Callable[[Any], Any] = lambda v: v
) -> tuple[list[Any], Any]:
    """Return a factor's equations and its variable, marked as a derivative, with the name stack of `like`."""
    leaves = list(factor.leaves())
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in leaves]
    scope = _scopes.MASK if single else _scopes.DERIVATIVE

    def made(*arrays: Any) -> Any:
        return factor.value(dict(zip(leaves, arrays, strict=True)), scope)

    flat = _forms.flat(jax.make_jaxpr(made)(*shapes))
    eqns, (derivative,) = _forms.emit(flat, [leaf(v) for v in leaves], like)
    return eqns, derivative


def times(gradient: Any, derivative: Any, eqn: Any) -> Any:
    """Return an equation that multiplies a gradient by a derivative, in the place of another one."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in (gradient, derivative)]
    (product,), _ = _forms.emit(_forms.flat(jax.make_jaxpr(jax.lax.mul)(*shapes)), [gradient, derivative], None)
    return c.with_source(c.replace_eqn(product, outvars=eqn.outvars), eqn.source_info)


def _is_array(var: Any) -> bool:
    return c.guardable(var) and jnp.issubdtype(var.aval.dtype, jnp.floating) and bool(var.aval.shape)


def _is_zero(eqn: Any, zeros: set[Any]) -> bool:
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    (operand,) = eqn.invars[:1]
    return np.all(np.asarray(operand.val) == 0) if isinstance(operand, c.Literal) else operand in zeros


def _of(eqn: Any, known: dict, zeros: set, is_forward: Callable[[Any], bool]) -> tuple[Any, Factor] | None:
    """Return the gradient and the factor of an equation that is linear in one gradient, else None."""
    name, out, invars = eqn.primitive.name, eqn.outvars[0].aval, eqn.invars
    if any(not isinstance(v, c.Literal) and v.aval.shape != out.shape for v in invars):
        return None
    gradients = [v for v in invars if not isinstance(v, c.Literal) and v in known]
    roots = {known[v][0] for v in gradients}
    if len(roots) != 1 or any(v.aval.dtype != out.dtype for v in gradients):
        return None
    (root,) = roots

    def of(v: Any) -> Factor | None:
        """Return a gradient's factor, a number, or a forward value as a factor."""
        if isinstance(v, c.Literal):
            return _number(v.val, v.aval)
        if v in known:
            return known[v][1] or _number(1.0, out)
        return Factor(None, var=v) if is_forward(v) else None

    rule = _LINEAR.get(name)
    operands = [_number(0.0, out) if _is_in(v, zeros) else of(v) for v in invars]
    if rule is None or any(one is None for one in operands):
        return None
    which = [not isinstance(v, c.Literal) and v in known for v in invars]
    how = rule(which, [_is_in(v, zeros) for v in invars])
    if how is None:
        return None
    trivial = [known[v][1] is None for v in gradients]
    if name == "mul" and trivial == [True]:  # by a forward value or a number itself
        (other,) = (one for one, yes in zip(operands, which, strict=True) if not yes)
        return root, other
    return root, Factor(how, tuple(operands))


def _is_in(v: Any, found: set) -> bool:
    return not isinstance(v, c.Literal) and v in found


def _selected(which: list[bool], zero: list[bool]) -> Callable | None:
    """A selection between gradients, and zeros, by a predicate of the forward pass."""
    return jax.lax.select_n if not which[0] and all(a or b for a, b in zip(which[1:], zero[1:], strict=True)) else None


#: Operation -> from which operands are gradients and which are zeros, what to do with their factors; None: not linear.
_LINEAR: dict[str, Callable[[list[bool], list[bool]], Callable | None]] = {
    "mul": lambda which, zero: jax.lax.mul if sum(which) == 1 else None,
    "div": lambda which, zero: jax.lax.div if which == [True, False] else None,
    "neg": lambda which, zero: jax.lax.neg,
    "copy": lambda which, zero: lambda x: x,
    "add": lambda which, zero: jax.lax.add if all(which) else None,
    "add_any": lambda which, zero: jax.lax.add if all(which) else None,
    "sub": lambda which, zero: jax.lax.sub if all(which) else None,
    "select_n": _selected,
}


def _called(eqn: Any) -> Any | None:
    """Return the open jaxpr that a plain call or a `custom_jvp_call` runs once."""
    if eqn.primitive.name not in ("custom_jvp_call", "jit", "pjit", *c.CLOSED_CALLS):
        return None
    return next(
        (c.open_jaxpr(body) for key, _, body in c.subjaxprs(eqn.params) if key in ("call_jaxpr", "jaxpr")), None
    )


def is_pointwise(eqn: Any) -> bool:
    """Say whether an equation makes each element from one element, or number, of each operand."""
    if len(eqn.outvars) != 1:
        return False
    shape = eqn.outvars[0].aval.shape
    if any(v.aval.shape not in ((), shape) for v in eqn.invars):
        return False
    inner = _called(eqn)
    if inner is not None:
        return all(map(is_pointwise, inner.eqns))
    moves = ("broadcast_in_dim", "reshape", "transpose", "rev", "concatenate", "pad", "iota", "dynamic_slice")
    return eqn.primitive.name in _fusion.ELEMENTWISE and eqn.primitive.name not in moves


def _operand(v: Any, of: Callable[[Any], Any]) -> Any:
    return jnp.asarray(v.val, v.aval.dtype) if isinstance(v, c.Literal) else of(v)


def _evaluated(eqn: Any, operands: list[Any]) -> Any:
    """Return a pointwise equation's result on arrays of another shape."""
    inner = _called(eqn)
    if inner is not None:
        known = dict(zip(inner.invars, operands, strict=True))
        for one in inner.eqns:
            known[one.outvars[0]] = _evaluated(one, [_operand(v, known.__getitem__) for v in one.invars])
        return _operand(inner.outvars[0], known.__getitem__)
    wide = [jnp.broadcast_to(x, _GRID.shape) for x in operands]
    params = {k: (None if k in ("sharding", "out_sharding") else v) for k, v in eqn.params.items()}
    return eqn.primitive.bind(*wide, **params)
