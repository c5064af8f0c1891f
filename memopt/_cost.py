"""FLOPs and seconds of jaxprs: what running one equation again costs.

Comes in: equations and jaxprs (closed or open), and a `memopt._specs.DeviceSpec`. Goes out: plain
numbers. Nothing here changes a jaxpr, runs a computation or asks a device; the planner, the timeline and the plan's
report all count with these functions, so that every side of a comparison is counted alike.

Seconds are a roofline for one equation alone, with one correction: XLA fuses element-wise operations into their
neighbours, so those pay their arithmetic and only `FUSED_TRAFFIC` of the traffic of their result.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend import core

from memopt._sizes import aval_bytes as aval_bytes
from memopt._sizes import element_bits
from memopt._sizes import padded_bytes as padded_bytes
from memopt._specs import DeviceSpec

# The part of an element-wise result's write and read that fusion leaves: about one such value in four ends a fusion.
FUSED_TRAFFIC = 0.25
# Integer operations for one 32-bit word of Threefry 2x32: twenty rounds of add, rotate and xor, and the key schedule.
RANDOM_OPERATIONS = 100.0
# Vector operations for one step of a loop that XLA:CPU does not vectorise (sorts, cumulative sums, gathers): 20 to 60.
CPU_SCALAR_WEIGHT = 40.0
# Vector operations for one element of a result that a loop stacks on the CPU, where writing a slice repeats in scalar
# code what made it: 100 for attention, 400 and more for the residuals of a GELU. The smallest, as it is a price for
# storing: too much of it would make repeating look cheaper than it is.
CPU_STACK_WEIGHT = 100.0


# FLOPs


def matmul_flops(program: Any) -> float:
    """Count the FLOPs of `dot_general` and `conv_general_dilated`, two for each multiply-add.

    Loops are multiplied out: a `scan` by its length, a `pallas_call` by its grid. A `while` counts one trip, as its
    number is not known from the program, but inside a kernel that states its FLOPs (`cost_estimate`) as many as these
    ask for. A `cond` counts its dearest branch; in a kernel that states fewer FLOPs than that, these count. The body
    of a `shard_map` counts as one device sees it. Positions of a convolution that fall on padding or into the holes of
    a dilation are not counted, as in XLA's own cost analysis.

    Args:
        program: a jaxpr, closed or open, or one equation.

    Returns:
        FLOPs.

    Example:
        >>> import jax, jax.numpy as jnp, memopt
        >>> memopt.matmul_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))
        48.0
    """
    if hasattr(program, "eqns"):
        return _jaxpr_flops(_open(program))
    return _eqn_flops(program)


_flops_cache: "weakref.WeakKeyDictionary[core.Jaxpr, float]" = weakref.WeakKeyDictionary()


def _jaxpr_flops(jaxpr: core.Jaxpr) -> float:
    known = _flops_cache.get(jaxpr)
    if known is None:
        counted = (_eqn_flops(eqn) for eqn in jaxpr.eqns if eqn.primitive.name not in _LEAVES)
        known = _flops_cache[jaxpr] = sum(counted, 0.0)
    return known


def _eqn_flops(eqn: core.JaxprEqn) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot_flops(eqn)
    if name == "conv_general_dilated":
        return _conv_flops(eqn)
    bodies = list(_bodies(eqn))
    if not bodies:
        return 0.0
    flops = [_jaxpr_flops(body) for body in bodies]
    return _trips(eqn) * (max(flops) if name == "cond" else sum(flops))


def _dot_flops(eqn: core.JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod([shape[d] for d in contracted])


def _conv_flops(eqn: core.JaxprEqn) -> float:
    params, lhs, rhs = eqn.params, eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    numbers = params["dimension_numbers"]
    batch, spatial = lhs[numbers.lhs_spec[0]], numbers.lhs_spec[2:]
    pairs = 1.0
    for axis, dim in enumerate(spatial):
        pairs *= _valid_positions(
            lhs[dim],
            rhs[numbers.rhs_spec[2 + axis]],
            eqn.outvars[0].aval.shape[numbers.out_spec[2 + axis]],
            params["window_strides"][axis],
            params["padding"][axis][0],
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
    features = rhs[numbers.rhs_spec[0]] * rhs[numbers.rhs_spec[1]]
    return 2.0 * features * (batch // params["batch_group_count"]) * pairs


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    size: int, kernel: int, out: int, stride: int, low: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Count the pairs of output and kernel position along one axis that meet a real input element."""
    last, total = (size - 1) * lhs_dilation, 0
    if size == 0:
        return 0
    for k in range(kernel):
        offset = k * rhs_dilation - low
        first = max(0, -(offset // stride))
        final = min(out - 1, (last - offset) // stride)
        if lhs_dilation == 1:
            total += max(0, final - first + 1)
        else:
            total += sum((o * stride + offset) % lhs_dilation == 0 for o in range(first, final + 1))
    return total


def _open(jaxpr: Any) -> core.Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yield the jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield _open(value)
        elif isinstance(value, tuple | list):
            yield from (_open(item) for item in value if isinstance(item, core.Jaxpr | core.ClosedJaxpr))


def _trips(eqn: core.JaxprEqn) -> float:
    """Return how often an equation runs its body; 1 where that is not known."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "pallas_call":
        return math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int)) * _inner_trips(eqn)
    return 1


def _inner_trips(eqn: core.JaxprEqn) -> float:
    """Return how often a kernel's body runs on each step of its grid, by the FLOPs that it states; 1 where it does not.

    More than once where it loops (`while`); less than once where branches (`cond`) are cheaper than the dearest.
    """
    stated, body = eqn.params.get("cost_estimate"), _open(eqn.params["jaxpr"])
    names = {inner.primitive.name for inner in body.eqns}
    if stated is None or not names & {"while", "cond"}:
        return 1
    steps = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    share = stated.flops / max(1.0, steps * _jaxpr_flops(body))
    return max(1.0, share) if "while" in names else min(1.0, share)


# Seconds


def jaxpr_seconds(jaxpr: Any, spec: DeviceSpec) -> float:
    """Return the modelled seconds of a jaxpr, the sum of `eqn_seconds`.

    Args:
        jaxpr: closed or open.
        spec: the device.

    Returns:
        Seconds. Ratios of two programs on one device are what this is good for.
    """
    return _jaxpr_seconds(_open(jaxpr), spec)


_seconds_cache: "weakref.WeakKeyDictionary[core.Jaxpr, dict[DeviceSpec, float]]" = weakref.WeakKeyDictionary()


def _jaxpr_seconds(jaxpr: core.Jaxpr, spec: DeviceSpec) -> float:
    known = _seconds_cache.setdefault(jaxpr, {})
    if spec not in known:
        known[spec] = sum([eqn_seconds(eqn, spec) for eqn in jaxpr.eqns], 0.0)
    return known[spec]


def eqn_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    """Return the modelled seconds of one equation, bodies included.

    A matmul or convolution takes the larger of its arithmetic and its traffic. An element-wise operation takes its
    arithmetic and `FUSED_TRAFFIC` of its result's traffic, since XLA fuses it. Shape changes that XLA resolves while
    compiling are free. A primitive that is not known here takes its operands' and results' traffic.

    Args:
        eqn: an equation.
        spec: the device.

    Returns:
        Seconds.
    """
    name = eqn.primitive.name
    work = _ELEMENTWISE.get(name)
    if work is not None:
        return _elementwise_seconds(eqn, spec, work)
    if name in _FREE:
        return 0.0
    rule = _RULES.get(name)
    if rule is not None:
        return rule(eqn, spec)
    bodies = list(_bodies(eqn))
    if bodies:
        return sum(_jaxpr_seconds(body, spec) for body in bodies)
    return _traffic_seconds(eqn, spec)


def _read_bytes(eqn: core.JaxprEqn) -> int:
    return sum(aval_bytes(v.aval) for v in eqn.invars)


def _written_bytes(eqn: core.JaxprEqn) -> int:
    return sum(aval_bytes(v.aval) for v in eqn.outvars)


def _traffic_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    return (_read_bytes(eqn) + _written_bytes(eqn)) / spec.memory_bytes_per_second


def _elements(variables: Any) -> int:
    return sum(math.prod(getattr(v.aval, "shape", ())) for v in variables)


def _elementwise_seconds(eqn: core.JaxprEqn, spec: DeviceSpec, work: tuple[float, float]) -> float:
    aval = eqn.outvars[0].aval
    count = math.prod(getattr(aval, "shape", ()))
    operations = work[0] + work[1] * spec.transcendental_weight
    moved = FUSED_TRAFFIC * element_bits(aval) / 4  # Bytes of an element, written and read.
    return count * (operations / spec.vector_flops_per_second + moved / spec.memory_bytes_per_second)


def _matmul_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    flops = _conv_flops(eqn) if eqn.primitive.name == "conv_general_dilated" else _dot_flops(eqn)
    return max(flops / _matmul_rate(eqn, spec), _traffic_seconds(eqn, spec))


def _matmul_rate(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    dtype = max((v.aval.dtype for v in eqn.invars[:2]), key=lambda d: d.itemsize)
    precision = eqn.params.get("precision")
    return spec.matmul_rate(dtype.name, precision[0].name if isinstance(precision, tuple) else None)


def _ragged_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    flops = 2.0 * math.prod(lhs) * rhs[-1]
    return max(flops / _matmul_rate(eqn, spec), _traffic_seconds(eqn, spec))


def _reduction_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    moved = _read_bytes(eqn) + _written_bytes(eqn)
    return _elements(eqn.invars) / spec.vector_flops_per_second + moved / spec.memory_bytes_per_second


def _window_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    window = math.prod(eqn.params.get("window_dimensions", ()))
    work = _elements(eqn.outvars) * window / spec.vector_flops_per_second
    return max(work, _traffic_seconds(eqn, spec))


def _moved_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    """Price an operation that reads as much as it writes (slices, gathers, copies)."""
    return 2 * _written_bytes(eqn) / spec.memory_bytes_per_second


def _gather_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    return _elements(eqn.outvars) * _scalar_weight(spec) / spec.vector_flops_per_second + _moved_seconds(eqn, spec)


def _update_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    """Price an update in place: read and write the update only (operand 1, after a scatter's indices operand 2)."""
    updates = eqn.invars[2 if eqn.primitive.name.startswith("scatter") else 1]
    return 3 * aval_bytes(updates.aval) / spec.memory_bytes_per_second


def _sorted_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    shape = eqn.invars[0].aval.shape
    axis = eqn.params.get("dimension", eqn.params.get("axis", -1))
    steps = math.log2(max(2, shape[axis] if shape else 1)) ** (2 if eqn.primitive.name in ("sort", "top_k") else 1)
    work = _elements(eqn.invars) * steps * _scalar_weight(spec)
    return work / spec.vector_flops_per_second + _traffic_seconds(eqn, spec)


def _scalar_weight(spec: DeviceSpec) -> float:
    """Return how many vector operations one step of a loop that XLA does not vectorise takes: 1 but on the CPU."""
    return CPU_SCALAR_WEIGHT if spec.platform == "cpu" else 1.0


def _random_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    words = max(1.0, sum(aval_bytes(v.aval) for v in eqn.outvars) / 4)
    return words * RANDOM_OPERATIONS / spec.vector_flops_per_second


def _cubic_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    """Price a dense factorisation as ten matmuls' worth of vector-unit-bound work over its last two dimensions."""
    shape = eqn.invars[0].aval.shape
    flops = 10.0 * math.prod(shape) * (min(shape[-2:]) if len(shape) >= 2 else 1)
    return max(flops / spec.vector_flops_per_second, _traffic_seconds(eqn, spec))


def _fourier_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    length = math.prod(eqn.params["fft_lengths"])
    flops = 5.0 * _elements(eqn.outvars) * math.log2(max(2, length))
    return max(flops / spec.vector_flops_per_second, _traffic_seconds(eqn, spec))


def _scan_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    """Price a loop as its body times its length, and one pass over each stacked operand and result."""
    body = _open(eqn.params["jaxpr"])
    results = _stacked(eqn.outvars, body.outvars)
    moved = sum(aval_bytes(v.aval) for v in _stacked(eqn.invars, body.invars) + results)
    seconds = eqn.params["length"] * _jaxpr_seconds(body, spec) + moved / spec.memory_bytes_per_second
    if spec.platform == "cpu":
        seconds += _elements(results) * CPU_STACK_WEIGHT / spec.vector_flops_per_second
    return seconds


def _stacked(outer: Any, inner: Any) -> list[Any]:
    """Return the outer variables that hold one slice for each trip."""
    pairs = zip(outer, inner, strict=False)
    return [o for o, i in pairs if len(getattr(o.aval, "shape", ())) > len(getattr(i.aval, "shape", ()))]


def _cond_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    return max((_jaxpr_seconds(_open(branch), spec) for branch in eqn.params["branches"]), default=0.0)


def _pallas_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    """Price a kernel as the larger of its arithmetic on the whole grid and one pass over operands and results."""
    compute = _jaxpr_seconds(_open(eqn.params["jaxpr"]), spec.without_memory())
    return max(_trips(eqn) * compute, _traffic_seconds(eqn, spec))


def _collective_seconds(eqn: core.JaxprEqn, spec: DeviceSpec) -> float:
    """Price a ring collective by its link: the larger side once, an all-reduce twice, less a device's own share."""
    size = eqn.params.get("axis_size")
    share = (size - 1) / size if size else 1.0
    passes = 2 if eqn.primitive.name.startswith(_ALL_REDUCE) else 1
    moved = max(_read_bytes(eqn), _written_bytes(eqn))
    return passes * share * moved / (spec.link_bytes_per_second or spec.memory_bytes_per_second)


def _names(text: str) -> list[str]:
    return text.split()


_ALL_REDUCE = ("psum", "pmax", "pmin", "pmean")

_FREE = frozenset(
    _names("""reshape broadcast_in_dim squeeze expand_dims stop_gradient optimization_barrier name copy_p pvary
    pbroadcast sharding_constraint bitcast_convert_type iota create_token after_all axis_index get swap addupdate
    program_id num_programs random_wrap random_unwrap empty empty2 layout_constraint dce_sink
    debug_callback mesh_cast reshard split unstack slice""")
)

# Vector operations and transcendental calls of one element. TPUs and CPUs divide by a reciprocal and Newton steps.
_ELEMENTWISE: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        _names("""abs add add_any and ceil clamp clz complex conj convert_element_type copy eq eq_to floor ge gt imag
        is_finite le le_to lt lt_to max min mul mulhi ne neg nextafter not one_minus_square or pad population_count real
        reduce_precision round select_n shift_left shift_right_arithmetic shift_right_logical sign square sub
        xor"""),
        (1.0, 0.0),
    ),
    **dict.fromkeys(["integer_pow", "div", "sqrt", "rsqrt", "rem"], (4.0, 0.0)),
    **dict.fromkeys(_names("exp exp2 expm1 log log1p log2 tanh logistic cbrt erf"), (0.0, 1.0)),
    **dict.fromkeys(
        _names("sin cos tan sinh cosh asin acos atan asinh acosh atanh atan2 erfc erf_inv pow"), (0.0, 5.0)
    ),
    **dict.fromkeys(_names("lgamma digamma bessel_i0e bessel_i1e igamma igammac polygamma zeta"), (0.0, 10.0)),
}

# Primitives that hold no jaxpr and no matmul: most equations of a step.
_LEAVES = frozenset(_ELEMENTWISE) | {"broadcast_in_dim", "reshape", "transpose", "reduce_sum", "reduce_max", "squeeze"}

_RULES: dict[str, Callable[[core.JaxprEqn, DeviceSpec], float]] = {
    "dot_general": _matmul_seconds,
    "conv_general_dilated": _matmul_seconds,
    "ragged_dot_general": _ragged_seconds,
    "scan": _scan_seconds,
    "cond": _cond_seconds,
    "pallas_call": _pallas_seconds,
    "fft": _fourier_seconds,
    "gather": _gather_seconds,
    **dict.fromkeys(
        _names("""reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor reduce argmax
        argmin"""),
        _reduction_seconds,
    ),
    **dict.fromkeys(
        _names(
            "reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add "
            "select_and_gather_add"
        ),
        _window_seconds,
    ),
    **dict.fromkeys(_names("dynamic_slice concatenate transpose rev tile stack"), _moved_seconds),
    **dict.fromkeys(
        _names("dynamic_update_slice scatter scatter-add scatter-mul scatter-min scatter-max"), _update_seconds
    ),
    **dict.fromkeys(_names("sort top_k approx_top_k cumsum cumprod cummax cummin cumlogsumexp"), _sorted_seconds),
    **dict.fromkeys(
        _names("random_bits threefry2x32 random_seed random_fold_in random_split rng_bit_generator rng_uniform"),
        _random_seconds,
    ),
    **dict.fromkeys(_names("cholesky lu qr householder_product svd eigh triangular_solve"), _cubic_seconds),
    **dict.fromkeys(
        _names("""psum psum2 psum_invariant pmax pmin all_gather all_gather_invariant all_gather_reduced reduce_scatter
        all_to_all ragged_all_to_all ppermute collective_permute"""),
        _collective_seconds,
    ),
}
