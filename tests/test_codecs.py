"""Codecs: layouts, error bounds, values that are not finite, odd shapes, transformations. One table, every codec."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memopt import _codec, _codecs, _codecs_blocks, _codecs_maps
from memopt import _compat as c
from memopt._codecs_exact import Bits, Range
from memopt._codecs_linear import Float8, Integer
from memopt._codecs_maps import Dynamic, RankOne

LOSSY = [one for one in map(_codecs.codec, _codecs.names()) if one.error]
SHAPES = [(), (0,), (7,), (5, 129), (3, 3, 8, 16)]
SHAPES += [
    pytest.param(s, marks=pytest.mark.slow)
    for s in [(1,), (300,), (0, 5), (3, 0), (2, 3, 384), (16, 256), (2, 64, 130)]
]
QUICK = "int8 int4-asymmetric-stochastic int2 fp8-e4m3 dynamic8 rank1-linear4".split()
by_name = pytest.mark.parametrize(
    "codec",
    [pytest.param(one, id=one.name, marks=[] if one.name in QUICK else pytest.mark.slow) for one in LOSSY],
)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling is most of the time


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def encode(codec, x, key=None):
    return codec.encode(x, key)


@functools.partial(jax.jit, compiler_options=FAST)
def decode(encoded):
    return _codec.decode(encoded)


def primitives(closed):
    """The names of all primitives, bodies included."""
    inner = [body for eqn in c.open_jaxpr(closed).eqns for _, _, body in c.subjaxprs(eqn.params)]
    return {eqn.primitive.name for eqn in c.open_jaxpr(closed).eqns}.union(*map(primitives, inner))


def positive(codec):
    return isinstance(codec, RankOne) or (isinstance(codec, Dynamic) and not codec.signed)


def draw(codec, shape, dtype=np.float32, seed=0):
    """Values over several decades, with a few zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape)) * rng.choice([1e-3, 1.0, 10.0])
    x = np.where(rng.random(shape) < 0.1, 0.0, x)
    return jnp.asarray(np.abs(x) if positive(codec) else x, dtype)


def scale_of(codec, x):
    """What a codec's error is relative to, for every element: plain NumPy, one group at a time."""
    size = np.abs(np.where(np.isfinite(x), x, 0.0))
    if getattr(codec, "channels", False):
        return np.broadcast_to(size.reshape(-1, x.shape[-1]).max(0), x.shape) if x.size and x.ndim else size
    block = None if isinstance(codec, RankOne) else codec.block
    view = size.reshape(_codecs_blocks.view_shape(x.shape, block))
    if isinstance(codec, RankOne) and view.ndim > 1:
        if not view.size:
            return size
        return np.minimum(view.max(-1, keepdims=True), view.max(-2, keepdims=True)).reshape(x.shape)
    runs_down = getattr(codec, "down", False) and view.ndim > 1
    if runs_down and isinstance(codec, Dynamic):  # alone where rows are longer than a block, and many enough
        runs_down = view.shape[-1] > block and _codecs_blocks.rows_of_block(view.shape, block) is not None
    if runs_down:
        rows = _codecs_blocks.rows_of_block(view.shape, block)
        if rows is None:
            return np.broadcast_to(view.max(-1, keepdims=True, initial=0), view.shape).reshape(x.shape)
        groups = view.reshape(*view.shape[:-2], -1, rows, view.shape[-1])
        return np.broadcast_to(groups.max(-2, keepdims=True), groups.shape).reshape(x.shape)
    rows = view.reshape(-1, view.shape[-1]) if view.size else view.reshape(0, 1)
    width = rows.shape[-1] if codec.block is None else codec.block
    scales = np.zeros_like(rows)
    for row, start in itertools.product(range(len(rows)), range(0, rows.shape[-1], width)):
        scales[row, start : start + width] = rows[row, start : start + width].max()
    return scales.reshape(x.shape)


def assert_within(codec, x, got, factor=1.0):
    dtype, x, got = x.dtype, np.asarray(x, np.float64), np.asarray(got, np.float64)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(x[~finite], got[~finite])
    assert np.isfinite(got[finite]).all()
    bound = codec.error * factor * scale_of(codec, x) * (1 + 1e-5) + 4.8e-38
    rounding = np.maximum(np.abs(x), np.abs(got)) * 2.0**-8 + float(jnp.finfo(dtype).smallest_subnormal)
    assert (np.abs(got[finite] - x[finite]) <= (bound[finite] + rounding[finite])).all()


@by_name
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_array_comes_back_within_the_bound(codec, shape):
    x = draw(codec, shape)
    encoded = encode(codec, x)
    _codec.validate(encoded)
    got = decode(encoded)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert_within(codec, x, got)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(encoded)) == codec.encoded_bytes(x)


@by_name
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_error_bounds_hold_for_random_values(codec, seed, dtype):
    x = draw(codec, (4, 384), dtype, seed)
    assert_within(codec, x, decode(encode(codec, x)))


DOWN = [Integer(8, down=True), Integer(4, down=True), Dynamic(8, True, 64, True), Dynamic(4, True, 128, True)]


@pytest.mark.parametrize("codec", DOWN, ids=lambda one: one.name)
def test_blocks_down_the_rows_keep_channels_apart(codec):
    x = np.array(draw(codec, (2, 160, 130)))
    x[:, :, 7] *= 1e4
    encoded = encode(codec, x)
    assert encoded.scales[0].shape == (2, 5, 130)  # of 160 rows 32 share a scale
    assert_within(codec, x, decode(encoded))
    others = np.arange(130) != 7
    assert np.abs(np.asarray(decode(encoded)) - x)[..., others].max() < np.abs(x[..., others]).max()


@by_name
def test_a_bound_is_not_slack(codec):
    worst = 0.0
    for seed in range(6):
        x = np.asarray(draw(codec, (16, 384), seed=seed))
        x = np.where(x == 0, 1e-30, x)
        off = np.abs(np.asarray(decode(encode(codec, x))) - x) / np.maximum(scale_of(codec, x), 1e-30)
        worst = max(worst, off.max())
    assert worst >= 0.5 * codec.error


@by_name
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_come_back(codec, dtype):
    x = np.array(draw(codec, (4, 384), "float32", 3))
    x[0, 5], x[1, 7], x[1, 9], x[2, 300], x[2, 301] = np.nan, np.inf, -np.inf, np.inf, np.nan
    got = decode(encode(codec, jnp.asarray(x, dtype)))
    worst = {2: 2.0, 4: 1.25, 8: 1.02}.get(getattr(codec, "bits", 8), 1.0) if isinstance(codec, Integer) else 1.2
    if getattr(codec, "bits", 0) == 2 and not codec.symmetric:
        worst = 6.0  # all are the smallest one of their block
    assert_within(codec, jnp.asarray(x, dtype), got, 3.5 if isinstance(codec, RankOne) else worst)
    for value in (np.nan, np.inf, -np.inf):
        alone = jnp.full((3,), value, dtype)
        np.testing.assert_array_equal(np.asarray(decode(encode(codec, alone)), np.float32), np.float32([value] * 3))


@by_name
def test_the_largest_and_smallest_numbers_stay_finite(codec):
    largest = float(jnp.finfo(jnp.float32).max)
    for values in ([largest, -largest, 1.0], [1e-38, -1e-38, 0.0], [1e-45, 0.0, 0.0], [0.0, 0.0, 0.0]):
        x = jnp.asarray(np.abs(values) if positive(codec) else values, jnp.float32)
        assert_within(codec, x, decode(encode(codec, x)))


@by_name
def test_zero_comes_back_as_zero(codec):
    x = jnp.zeros((4, 200))
    got = np.asarray(decode(encode(codec, x)))
    assert (got <= 1e-37).all() and (got >= 0).all()


def there_and_back(xs, codec):
    """Encoded in one loop, stacked, decoded in another."""
    _, stacked = jax.lax.scan(lambda n, one: (n, codec.encode(one)), 0, xs)
    return jax.lax.scan(lambda n, one: (n, _codec.decode(one)), 0, stacked)[1]


@by_name
def test_vmap_and_scan_give_the_same(codec):
    x = draw(codec, (3, 4, 256))
    want = np.stack([decode(encode(codec, one)) for one in x])
    stacked = jax.jit(jax.vmap(codec.encode), compiler_options=FAST)(x)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(stacked))
    got = jax.jit(jax.vmap(_codec.decode), compiler_options=FAST)(stacked)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    got = jax.jit(there_and_back, static_argnums=1, compiler_options=FAST)(x, codec)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("codec", [Integer(8), Integer(4), Integer(4, 64, symmetric=False), Float8(4)], ids=str)
def test_a_stacked_leaf_is_encoded_as_its_layers_are(codec):
    x = draw(codec, (3, 4, 256))
    want = jnp.stack([decode(encode(codec, one)) for one in x])
    np.testing.assert_allclose(decode(encode(codec, x)), want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@by_name
def test_one_program_for_equal_codecs(codec):
    traces = []
    counted = jax.jit(lambda x, how: (traces.append(how), how.encode(x))[1], static_argnums=1)
    x = draw(codec, (2, 256))
    counted(x, codec), counted(x, dataclasses.replace(codec))
    assert len(traces) == 1


@by_name
def test_no_gather_and_no_sort_is_traced(codec):
    closed = jax.make_jaxpr(lambda x: _codec.decode(codec.encode(x)))(jax.ShapeDtypeStruct((4, 256), jnp.float32))
    used = primitives(closed)
    assert used and not used & {"gather", "sort", "scatter", "dynamic_slice"}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("keyed", [True, False])
def test_stochastic_rounding_has_mean_zero(bits, symmetric, keyed):
    codec = Integer(bits, 64, symmetric=symmetric, stochastic=True)
    n = 2000
    row = jnp.asarray(np.random.default_rng(0).standard_normal(64), jnp.float32)
    key = jax.random.key(0) if keyed else None
    got = np.asarray(decode(encode(codec, jnp.broadcast_to(row, (n, 64)), key)), np.float64)
    middle, spread = got.mean(0) - np.asarray(row), got.std(0) / np.sqrt(n)
    assert (np.abs(middle) <= 4.5 * spread + 1e-6).all()
    assert np.abs(np.corrcoef(got[:, :8].T - np.asarray(row)[:8, None])[0, 1:]).max() < 0.15


def test_nearest_rounding_has_a_bias_that_the_test_would_see():
    row = jnp.full((64,), 0.3).at[0].set(1.0)
    got = decode(encode(Integer(4, 64), jnp.broadcast_to(row, (2000, 64))))
    assert np.abs(np.asarray(got.mean(0) - row)).max() > 0.01


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True), (4, False)])
def test_the_dynamic_map_is_the_published_one(bits, signed):
    values = _codecs_maps.dynamic_values(bits, signed)
    assert len(values) == 2**bits and (np.diff(values) > 0).all() and 0.0 in values and values[-1] == 1.0
    if bits == 8:  # the cells of the largest decade, by the definition: linspace(0.1, 1) and the middles
        cells = 64 if signed else 128
        edges = np.linspace(0.1, 1.0, cells + 1)
        np.testing.assert_allclose(values[-cells - 1 : -1], (edges[1:] + edges[:-1]) / 2)
    x = np.linspace(-1.0 if signed else 0.0, 1.0, 20011).astype(np.float32)
    x = np.concatenate([x, np.logspace(-9, 0, 5000).astype(np.float32)])
    got = np.asarray(decode(encode(Dynamic(bits, signed, None), x)))
    nearest = np.abs(values[None] - x[:, None]).min(1)
    np.testing.assert_allclose(np.abs(got - x), nearest, atol=2e-7)
    every = jnp.asarray(values, jnp.float32)
    np.testing.assert_allclose(decode(encode(Dynamic(bits, signed, None), every)), every, rtol=1e-6)


def test_rank_one_is_finer_than_blocks_where_columns_differ():
    rng = np.random.default_rng(0)
    v = jnp.asarray(10 ** rng.uniform(-3, 0, (1, 256)) * rng.uniform(0.5, 1.0, (64, 256)), jnp.float32)
    matrix, flat = (decode(encode(RankOne(), x)).reshape(v.shape) for x in (v, v.reshape(-1)))
    off = [np.abs(np.asarray(got / v - 1)).mean() for got in (matrix, flat)]
    assert off[0] < 0.05 < off[1]
    assert (np.asarray(decode(encode(RankOne(), v.at[:, 3].set(0.0)))) > 0).all()


@pytest.mark.parametrize("shape", [*SHAPES, (8, 16, 64), (2, 12, 8, 8), (9, 1), (1, 9)], ids=str)
def test_bools_come_back_bit_by_bit(shape):
    x = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
    encoded = encode(Bits(), x)
    np.testing.assert_array_equal(decode(encoded), x)
    assert encoded.codes.nbytes == Bits().encoded_bytes(x)
    if x.size >= 8 and x.size % 8 == 0:
        assert encoded.codes.nbytes * 8 == x.size


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (-2, 1), (3, 18), (-100, 100), (0, 255), (-128, 300)])
def test_integers_of_a_known_range_come_back(dtype, low, high):
    info = np.iinfo(dtype)
    low, high = max(low, info.min), min(high, info.max)
    codec = Range(low, high)
    x = jnp.asarray(np.random.default_rng(0).integers(low, high, (6, 10), endpoint=True), dtype)
    np.testing.assert_array_equal(decode(encode(codec, x)), x)
    assert encode(codec, x).codes.dtype.itemsize * 8 in (8, 16)
    assert Range(0, 2**32 - 1).bits == 32 and Range(0, 256).bits == 16 and Range(0, 15).bits == 4


def test_the_bytes_are_what_is_promised():
    aval = jax.ShapeDtypeStruct((8, 1024, 768), jnp.bfloat16)
    plain = 2 * 8 * 1024 * 768
    assert Integer(8).encoded_bytes(aval) / plain <= 0.52
    assert Integer(4).encoded_bytes(aval) / plain <= 0.27
    assert Integer(2).encoded_bytes(aval) / plain <= 0.145
    assert Bits().encoded_bytes(jax.ShapeDtypeStruct((8, 1024, 768), jnp.bool_)) == plain // 16


def test_a_wrong_leaf_is_named():
    encoded = encode(Integer(8), jnp.ones((4, 256)))
    with pytest.raises(ValueError, match=r"codes of 'int8' for float32\[4, 256\] must be uint8\[4, 256\], not int8"):
        _codec.decode(dataclasses.replace(encoded, codes=encoded.codes.astype(jnp.int8)))
    with pytest.raises(ValueError, match="decoded inside it"):
        _codec.decode(jax.jit(jax.vmap(Integer(8).encode), compiler_options=FAST)(jnp.ones((2, 4, 256))))
    with pytest.raises(ValueError, match="has 1 scales, this array has 0"):
        _codec.validate(dataclasses.replace(encoded, scales=()))


def test_a_dtype_that_a_codec_does_not_take_is_refused():
    for codec, x in ((Integer(8), jnp.ones(3, jnp.int32)), (Bits(), jnp.ones(3)), (Range(0, 1), jnp.ones(3, bool))):
        with pytest.raises(TypeError, match="leave this one as it is"):
            encode(codec, x)
    for wrong in (
        lambda: Integer(3),
        lambda: Integer(8, 0),
        lambda: Float8(3),
        lambda: Dynamic(2),
        lambda: Range(1, 0),
    ):
        with pytest.raises(ValueError, match="not"):
            wrong()
    with pytest.raises(ValueError, match="nearest are: .*int8"):
        _codecs.codec("int-8")


def test_names_are_unique_and_find_their_codec():
    assert all(_codecs.codec(name).name == name for name in _codecs.names())
    assert _codecs.codec(Integer(8)) == Integer(8)


@pytest.mark.parametrize("codec", [Integer(8), Integer(4), Bits()], ids=str)
def test_a_batch_that_is_sharded_stays_where_it_is(codec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, 64, 384), bool if isinstance(codec, Bits) else jnp.float32, sharding=sharding)
    text = jax.jit(lambda x: _codec.decode(codec.encode(x)), out_shardings=sharding).lower(x).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
