"""How shardings travel: for each operation, which dimensions of its operands and results are cut together.

In: an equation. Out: its `Factor`s, each a list of `(variable, dimension)` that one mesh axis cuts at once, as in the
rules of XLA's partitioner (Shardy). A dimension that is in no factor cannot be cut while the operation runs. Bodies are
tied to the equation that holds them in the same form. Nothing here knows a mesh or decides a sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from memopt import _compat as c
from memopt import _fusion

#: When a factor may pass a sharding on: at once, after all of those, or last (a broadcast's result, from its operand).
EARLY, LATER, LAST = 0, 1, 2


class Factor(NamedTuple):
    """Dimensions cut together. `EARLY` ones hand shardings on before `LATER` ones do; `first` places only receive."""

    places: tuple[tuple[Any, int], ...]
    phase: int = LATER
    receives: int | None = None  # before the last phase only this many leading places take on a sharding


def factors_of(eqn: Any) -> list[Factor] | None:
    """Return an equation's factors, bodies not counted; None where the primitive is not known here."""
    name = eqn.primitive.name
    rule = _RULES.get(name)
    if rule is not None:
        return list(rule(eqn))
    if name in _fusion.ELEMENTWISE or name in _ELEMENTWISE:
        return list(_elementwise(eqn))
    if not eqn.invars or name in _SOURCES or not any(_shape(v) for v in eqn.outvars):
        return []
    return None


def ties(eqn: Any) -> list[tuple[Any, list[Factor]]] | None:
    """Return each body of an equation with the factors that tie its variables to the equation's, or None."""
    name = eqn.primitive.name
    if name == "scan":
        return [_scan_ties(eqn)]
    if name == "while":
        return _while_ties(eqn)
    if name == "cond":
        return [(b, _call_ties(eqn.invars[1:], eqn.outvars, b)) for b in map(c.open_jaxpr, eqn.params["branches"])]
    if name in c.INLINED_CALLS:
        body = c.open_jaxpr(next(value for _, _, value in c.subjaxprs(eqn.params)))
        if len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars):
            return [(body, _call_ties(eqn.invars, eqn.outvars, body))]
    return None


def tie(*variables: Any, phase: int = EARLY, skip: tuple[int, ...] = ()) -> Iterator[Factor]:
    """Yield a factor for each dimension of variables of one shape, those in `skip` left out."""
    variables = tuple(v for v in variables if _is_var(v))
    if not variables:
        return
    for dim in range(len(_shape(variables[0]))):
        if dim not in skip:
            yield Factor(tuple((v, dim) for v in variables), phase)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, (c.Literal, c.DropVar))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _factor(*places: tuple[Any, int], phase: int = LATER, receives: int | None = None) -> Factor:
    return Factor(tuple(p for p in places if _is_var(p[0])), phase, receives)


def _call_ties(invars: Any, outvars: Any, body: Any) -> list[Factor]:
    found = []
    for outer, inner in [*zip(invars, body.invars, strict=True), *zip(outvars, body.outvars, strict=True)]:
        if _is_var(outer) and _is_var(inner):
            found += tie(outer, inner)
    return found


def _scan_ties(eqn: Any) -> tuple[Any, list[Factor]]:
    body = c.open_jaxpr(eqn.params["jaxpr"])
    num_consts, num_carry = c.scan_layout(eqn)
    first_xs = num_consts + num_carry
    found: list[Factor] = []
    for outer, inner in zip(eqn.invars[:num_consts], body.invars, strict=False):
        found += tie(outer, inner)
    for i in range(num_carry):
        carried = eqn.invars[num_consts + i], body.invars[num_consts + i], body.outvars[i], eqn.outvars[i]
        found += tie(*carried)
    stacks = [*zip(eqn.invars[first_xs:], body.invars[first_xs:], strict=True)]
    stacks += zip(eqn.outvars[num_carry:], body.outvars[num_carry:], strict=True)
    for outer, inner in stacks:
        if _is_var(outer) and _is_var(inner):
            found += [Factor(((outer, d + 1), (inner, d)), EARLY) for d in range(len(_shape(inner)))]
    return body, found


def _while_ties(eqn: Any) -> list[tuple[Any, list[Factor]]]:
    cond, body = c.open_jaxpr(eqn.params["cond_jaxpr"]), c.open_jaxpr(eqn.params["body_jaxpr"])
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    first = n_cond + n_body
    of_cond = [f for o, i in zip(eqn.invars[:n_cond], cond.invars, strict=False) for f in tie(o, i)]
    of_body = [f for o, i in zip(eqn.invars[n_cond:first], body.invars, strict=False) for f in tie(o, i)]
    for i, outer in enumerate(eqn.invars[first:]):
        of_body += tie(outer, body.invars[n_body + i], body.outvars[i], eqn.outvars[i])
        of_cond += tie(outer, cond.invars[n_cond + i])
    return [(body, of_body), (cond, of_cond)]


def _elementwise(eqn: Any) -> Iterator[Factor]:
    """All dimensions pass, but those of size one that an operand is repeated along."""
    for out in filter(_is_var, eqn.outvars):
        shape = _shape(out)
        operands = [v for v in eqn.invars if _is_var(v) and len(_shape(v)) == len(shape)]
        for dim, size in enumerate(shape):
            yield Factor(((out, dim), *((v, dim) for v in operands if _shape(v)[dim] == size)), EARLY)


def _pairs(eqn: Any) -> Iterator[Factor]:
    """Operand i becomes result i."""
    for operand, out in zip(eqn.invars, eqn.outvars, strict=False):
        if _shape(operand) == _shape(out):
            yield from tie(operand, out)


def _but(*keys: str) -> Callable[[Any], Iterator[Factor]]:
    """Return the rule of an operation along one axis: all other dimensions pass."""

    def rule(eqn: Any) -> Iterator[Factor]:
        rank = len(_shape(eqn.invars[0]))
        axis = next((eqn.params[k] for k in keys if k in eqn.params), rank - 1)
        same = [v for v in (*eqn.invars, *eqn.outvars) if len(_shape(v)) == rank]
        yield from tie(*same, skip=(axis % rank,) if rank else ())

    return rule


def _every(eqn: Any) -> Iterator[Factor]:
    """All dimensions pass, also where their sizes differ (slices, pads, windows)."""
    rank = len(_shape(eqn.outvars[0]))
    variables = [v for v in (*eqn.invars, *eqn.outvars) if _is_var(v) and len(_shape(v)) == rank]
    for dim in range(rank):
        yield Factor(tuple((v, dim) for v in variables), EARLY)


def _whole(eqn: Any) -> Iterator[Factor]:
    """Only dimensions that are taken whole pass (slices at positions known at run time)."""
    first, out = eqn.invars[0], eqn.outvars[0]
    update = [eqn.invars[1]] if eqn.primitive.name == "dynamic_update_slice" else []
    for dim in range(len(_shape(out))):
        variables = [v for v in (first, *update, out) if _is_var(v)]
        if len({_shape(v)[dim] for v in variables}) == 1:
            yield Factor(tuple((v, dim) for v in variables), EARLY)


def _broadcast(eqn: Any) -> Iterator[Factor]:
    operand, out = eqn.invars[0], eqn.outvars[0]
    dims = {d: i for i, d in enumerate(eqn.params["broadcast_dimensions"])}
    receives = 1 if math.prod(_shape(operand)) < math.prod(_shape(out)) else None
    for dim, size in enumerate(_shape(out)):
        source = dims.get(dim)
        if source is not None and _shape(operand)[source] == size and _is_var(operand):
            yield Factor(((operand, source), (out, dim)), EARLY, receives)
        else:
            yield _factor((out, dim))


def _transpose(eqn: Any) -> Iterator[Factor]:
    for dim, source in enumerate(eqn.params["permutation"]):
        yield _factor((eqn.invars[0], source), (eqn.outvars[0], dim), phase=EARLY)


def _reshape(eqn: Any) -> Iterator[Factor]:
    """Tie the major dimensions of each smallest group of dimensions with one product."""
    operand, out = eqn.invars[0], eqn.outvars[0]
    a, b = _shape(operand), _shape(out)
    for before, after in reshape_majors(a, b):
        yield _factor((operand, before), (out, after), phase=EARLY)


def reshape_majors(a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the major dimension, the first above one, of each smallest group of dimensions with one product, in both.

    Example:
      >>> list(reshape_majors((4, 6), (4, 2, 3)))
      [(0, 0), (1, 1)]
    """
    for first, second in reshape_groups(a, b):
        before, after = next((d for d in first if a[d] > 1), None), next((d for d in second if b[d] > 1), None)
        if before is not None and after is not None:
            yield before, after


def reshape_groups(a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest groups of dimensions of two shapes of one size that have one product, in order.

    Example:
      >>> list(reshape_groups((4, 6), (4, 2, 3)))
      [([0], [0]), ([1], [1, 2])]
    """
    i = k = 0
    while i < len(a) and k < len(b):
        first, second = [i], [k]
        i, k = i + 1, k + 1
        while math.prod(a[d] for d in first) != math.prod(b[d] for d in second):
            if math.prod(a[d] for d in first) < math.prod(b[d] for d in second):
                first.append(i)
                i += 1
            else:
                second.append(k)
                k += 1
            if i > len(a) or k > len(b):
                return
        yield first, second


def _squeeze(eqn: Any) -> Iterator[Factor]:
    gone = {d % len(_shape(eqn.invars[0])) for d in eqn.params["dimensions"]}
    left = [d for d in range(len(_shape(eqn.invars[0]))) if d not in gone]
    for dim, source in enumerate(left):
        yield _factor((eqn.invars[0], source), (eqn.outvars[0], dim), phase=EARLY)


def _reduce(eqn: Any) -> Iterator[Factor]:
    axes = set(eqn.params["dimensions" if eqn.primitive.name == "reduce" else "axes"])
    rank = len(_shape(eqn.invars[0]))
    left = [d for d in range(rank) if d not in axes]
    operands = [v for v in eqn.invars if len(_shape(v)) == rank]
    for dim, source in enumerate(left):
        yield _factor(*((v, source) for v in operands), *((v, dim) for v in eqn.outvars))
    for dim in axes:
        yield _factor(*((v, dim) for v in operands))


def _dot(eqn: Any) -> Iterator[Factor]:
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    lhs, rhs, out = eqn.invars[0], eqn.invars[1], eqn.outvars[0]
    for dim, (left, right) in enumerate(zip(batch_l, batch_r, strict=True)):
        yield _factor((lhs, left), (rhs, right), (out, dim))
    dim = len(batch_l)
    for side, used in ((lhs, {*contract_l, *batch_l}), (rhs, {*contract_r, *batch_r})):
        for source in range(len(_shape(side))):
            if source not in used:
                yield _factor((side, source), (out, dim))
                dim += 1
    for left, right in zip(contract_l, contract_r, strict=True):
        yield _factor((lhs, left), (rhs, right))


def _conv(eqn: Any) -> Iterator[Factor]:
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs, out = eqn.invars[0], eqn.invars[1], eqn.outvars[0]
    grouped = eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1
    if eqn.params["batch_group_count"] == 1:
        yield _factor((lhs, numbers.lhs_spec[0]), (out, numbers.out_spec[0]))
    if not grouped:
        yield _factor((rhs, numbers.rhs_spec[0]), (out, numbers.out_spec[1]))
        yield _factor((lhs, numbers.lhs_spec[1]), (rhs, numbers.rhs_spec[1]))
    for source, dim in zip(numbers.lhs_spec[2:], numbers.out_spec[2:], strict=True):
        yield _factor((lhs, source), (out, dim))


def _gather(eqn: Any) -> Iterator[Factor]:
    operand, indices, out = eqn.invars[0], eqn.invars[1], eqn.outvars[0]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = len(_shape(out))
    batch_dims = [d for d in range(rank) if d not in numbers.offset_dims]
    for i, dim in enumerate(batch_dims):
        yield _factor((indices, i), (out, dim), *_batching(numbers, operand, i, "start_indices_batching_dims"))
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(_shape(operand))) if d not in gone]
    for dim, source in zip(numbers.offset_dims, kept, strict=True):
        if sizes[source] == _shape(operand)[source]:
            yield _factor((operand, source), (out, dim))


def _batching(numbers: Any, operand: Any, dim: int, key: str) -> list[tuple[Any, int]]:
    dims = getattr(numbers, key)
    return [(operand, numbers.operand_batching_dims[dims.index(dim)])] if dim in dims else []


def _scatter(eqn: Any) -> Iterator[Factor]:
    operand, indices, updates = eqn.invars[:3]
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(_shape(operand))) if d not in gone]
    for dim, source in zip(numbers.update_window_dims, kept, strict=True):
        if _shape(updates)[dim] == _shape(operand)[source]:
            yield _factor((operand, source), (updates, dim), (out, source))
    scattered = [d for d in range(len(_shape(updates))) if d not in numbers.update_window_dims]
    for i, dim in enumerate(scattered):
        both = _batching(numbers, operand, i, "scatter_indices_batching_dims")
        yield _factor((indices, i), (updates, dim), *both, *((out, d) for _, d in both))
    for source in numbers.inserted_window_dims:
        yield _factor((operand, source), (out, source))


def _shard_map(eqn: Any) -> Iterator[Factor]:
    """Tie what the same mesh axes split; nothing else can be cut, for the body sees it whole."""
    found: dict[tuple[str, ...], list[tuple[Any, int]]] = {}
    sides = (eqn.invars, eqn.params["in_specs"]), (eqn.outvars, eqn.params["out_specs"])
    for var, spec in (pair for atoms, specs in sides for pair in zip(atoms, specs, strict=True)):
        for dim, axes in enumerate(spec):
            if axes is not None:
                found.setdefault(axes if isinstance(axes, tuple) else (axes,), []).append((var, dim))
    for places in found.values():
        yield _factor(*places)


_ELEMENTWISE = frozenset(
    "add_any copy_p stop_gradient name checkpoint_name select_n clamp square pow nextafter mulhi bessel_i0e bessel_i1e "
    "reduce_precision pvary pcast layout_constraint threefry2x32 random_wrap random_unwrap erf_inv one_minus_square "
    "eq_to lt_to le_to dce_sink".split()
)
_SOURCES = frozenset("random_bits random_seed random_fold_in random_split iota empty rng_uniform".split())

_RULES: dict[str, Callable[[Any], Iterator[Factor]]] = {
    "dot_general": _dot,
    "shard_map": _shard_map,
    "conv_general_dilated": _conv,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "gather": _gather,
    "dynamic_slice": _whole,
    "dynamic_update_slice": _whole,
    **dict.fromkeys(("sharding_constraint", "reshard", "mesh_cast", "optimization_barrier"), _pairs),
    **dict.fromkeys(("slice", "pad", "concatenate", "rev", "split"), _every),
    **dict.fromkeys(
        "scatter scatter-add scatter_add scatter-mul scatter-min scatter-max scatter-sub".split(), _scatter
    ),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _but("axis")),
    "sort": _but("dimension"),
    "top_k": _but("axis", "dimension"),
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor reduce argmax argmin".split(),
        _reduce,
    ),
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add "
        "select_and_gather_add".split(),
        _every,
    ),
}
