"""Every form of attention against the reference: values, gradients, special numbers, and what the compilers make of it.

In: the table of `attention_cases`. The kernels run in interpret mode; libtpu compiles them for TPUs ahead of time, and
they are lowered for CUDA.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies

import memopt
from memopt.pallas_kernels import attention
from memopt.pallas_kernels.attention import api, tpu, tpu_backward, tpu_parts
from memopt.pallas_kernels.attention import spec as specs
from tests.pallas_kernels.attention_cases import CASES, ERRORS, Case, operands

FORMS = ("lean", "tpu", "gpu")
QUICK_KERNEL_CASES = {"tpu": ("grouped causal", "key bias"), "gpu": ("cross",)}  # emulation is slow
BLOCKS = {"lean": (32, 64), "tpu": (128, 128), "gpu": (32, 64)}


def _rows():
    for form in FORMS:
        for case in CASES:
            slow = not case.quick if form == "lean" else case.name not in QUICK_KERNEL_CASES[form]
            yield pytest.param(form, case, marks=[pytest.mark.slow] if slow else [], id=f"{form}-{case.name}")


def _value_and_gradients(case: Case, dtype, **form):
    arrays, settings, cotangent = operands(case, dtype)

    def weighted(q, k, v, bias):
        out = attention(q, k, v, bias, **settings, **form)
        return (out * cotangent).astype("float64" if dtype == "float64" else "float32").sum(), out

    used = (0, 1, 2) if arrays[3] is None else (0, 1, 2, 3)
    (_, out), grads = jax.jit(jax.value_and_grad(weighted, argnums=used, has_aux=True))(*arrays)
    return [np.asarray(x, np.float64) for x in (out, *grads)]


def _assert_close(case: Case, dtype: str, form: str, blocks=None):
    interpret = {"interpret": True} if form != "lean" else {}
    sizes = blocks or ((128, 128) if "block_mask" in case.settings and form == "lean" else BLOCKS[form])
    try:
        got = _value_and_gradients(case, dtype, implementation=form, blocks=sizes, **interpret)
    except NotImplementedError as error:
        pytest.skip(str(error))
    wide = {"bfloat16": "float32"}.get(dtype, dtype)
    # Where one key takes a row whole, the gradient of its score is the difference of two equal products: zero in exact
    # arithmetic, and in a kernel their rounding times the other operand.
    least = 1e-3 if case.scale_of_q == 1 else case.scale_of_q
    for ours, theirs in zip(got, _value_and_gradients(case, wide, implementation="reference"), strict=True):
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() <= ERRORS[dtype] * max(np.abs(theirs).max(), least)


@pytest.mark.parametrize(("form", "case"), list(_rows()))
def test_a_form_equals_the_reference_in_float32(form, case):
    _assert_close(case, "float32", form)


@pytest.mark.parametrize("name", ["grouped causal", pytest.param("dropout", marks=pytest.mark.slow)])
def test_two_backward_kernels_equal_the_reference_where_one_cannot_hold_the_queries(name, monkeypatch):
    monkeypatch.setattr(tpu_backward, "HELD_BYTES", 0)
    jax.clear_caches()
    _assert_close(next(case for case in CASES if case.name == name), "float32", "tpu")


CUT = {
    "causal": ((1, 600, 600, 2, 1, 64, 64), {"is_causal": True}, (256, 512)),
    "later queries": ((1, 300, 600, 1, 1, 64, 64), {"is_causal": True, "causal_offset": 300}, (256, 256)),
    "window": ((1, 600, 600, 1, 1, 64, 64), {"local_window_size": (300, 100)}, (512, 256)),
    "segments": (
        (1, 384, 384, 1, 1, 64, 64),
        {"q_segment_ids": np.arange(384)[None] // 200, "is_causal": True},
        (384, 384),
    ),
}


@pytest.mark.parametrize(
    ("name", "held"),
    [*((name, True) for name in CUT), ("window", False)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_blocks_that_the_diagonal_or_a_window_cuts_are_taken_in_parts(name, held, monkeypatch):
    if not held:
        monkeypatch.setattr(tpu_backward, "HELD_BYTES", 0)
        jax.clear_caches()
    shape, settings, blocks = CUT[name]
    _assert_close(Case(name, shape, settings), "float32", "tpu", blocks)


@pytest.mark.parametrize("device", ["v5e", "TPU v6 lite"])
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_the_kernels_equal_the_reference_however_a_device_has_blocks_taken(device, head_dim, monkeypatch):
    how = tpu_parts.tiling(head_dim, device)
    assert how != tpu_parts.tiling(head_dim, "v5e" if device != "v5e" else "v6e")
    monkeypatch.setattr(api, "default_device", lambda: device)
    _assert_close(Case(device, (1, 600, 600, 1, 1, head_dim, head_dim), {}), "float32", "tpu", (640, 384))
    if head_dim > 64:
        _assert_close(Case(device, (1, 300, 300, 2, 1, 128, 128), {"is_causal": True}), "float32", "tpu", (256, 256))


def test_the_device_that_kernels_are_laid_out_for_is_the_default_one(monkeypatch):
    assert api.default_device() is None  # a CPU
    asked = []
    forward = tpu.forward
    monkeypatch.setattr(tpu, "forward", lambda *args: asked.append(args[-1]) or forward(*args))
    q = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)
    spec, extras = specs.Spec(scale=1.0), specs.Extras()
    for form in (api.Form(name="tpu"), api.Form(name="tpu", device="v6e")):
        jax.eval_shape(lambda q, form=form: api.forward(form, spec, q, q, q, None, extras), q)
    assert asked == [None, "v6e"]


@pytest.mark.parametrize(
    ("queries", "backward", "settings", "sizes"),
    [
        (4096, False, {}, (2048, 1024)),
        (4096, False, {"causal": True}, (1024, 1024)),
        (4096, True, {}, (1024, 1024)),
        (2500, False, {}, (1024, 1024)),  # 2,048 at once would pad 1,596 rows in place of 572
        (1500, False, {}, (1536, 1024)),
    ],
)
def test_block_sizes_are_a_function_of_shape(queries, backward, settings, sizes):
    spec = specs.Spec(scale=1.0, **settings)
    assert tpu.block_sizes(queries, 8192, 128, spec, backward) == sizes
    assert max(tpu.block_sizes(queries, 8192, 256, spec, backward)) <= 1024
    assert tpu.block_sizes(300, 200, 64, spec, backward) == (384, 256)


@pytest.mark.parametrize("at_once", [(128, None), (128, 256), (128, 512), (256, 512)], ids=str)
@pytest.mark.parametrize("blocks", [(128, 128), (256, 512), (512, 256), (384, 640)])
@pytest.mark.parametrize(
    "settings",
    [
        {"causal": True},
        {"causal": True, "offset": -200},
        {"causal": True, "offset": 77, "window": (150, None)},
        {"window": (40, 10)},
        {"window": (700, 300)},
        {},
    ],
    ids=str,
)
def test_parts_of_a_block_hold_every_allowed_pair_once(settings, blocks, at_once):
    spec, queries, keys = specs.Spec(scale=1.0, **settings), 1300, 1100
    lay = tpu_parts.Layout(1, 1, 1, queries, keys, *blocks)
    walk = specs.visits(spec, queries, keys, *blocks)
    kinds = {kind.number: kind for kind in tpu_parts.kinds(spec, lay, walk, ())}
    numbers = (tpu_parts.flags_of(spec, walk, walk.rows, lay, ()) >> tpu_parts.KIND_SHIFT) & tpu_parts.KIND_BITS
    row, column = np.arange(queries)[:, None], np.arange(keys)[None]
    allowed = np.ones((queries, keys), bool)
    for left, right in specs._bounds(spec):
        allowed &= True if right is None else column - row <= right
        allowed &= True if left is None else column - row >= -left
    computed = np.zeros((queries + blocks[0], keys + blocks[1]), int)
    for i, j, number in zip(walk.rows, walk.columns, numbers, strict=True):
        if number == specs.HIDDEN:
            continue
        for q, k in tpu_parts.parts(spec, lay, kinds[number], *at_once):
            assert 0 < q.stop - q.start <= (at_once[1] or blocks[0]) and 0 < k.stop - k.start <= at_once[0]
            rows = slice(i * blocks[0] + q.start, i * blocks[0] + q.stop)
            columns = slice(j * blocks[1] + k.start, j * blocks[1] + k.stop)
            computed[rows, columns] += 1
            if not kinds[number].masked:
                assert allowed[rows, columns].all() and rows.stop <= queries + blocks[0] and columns.stop <= keys
    computed = computed[:queries, :keys]
    assert computed.max() == 1 and computed[allowed].all()
    cut = [kind for kind in kinds.values() if kind.distance is not None]
    if cut and min(blocks) > at_once[0] and settings != {"window": (700, 300)}:
        assert computed.sum() < sum(blocks[0] * blocks[1] for n in numbers if n != specs.HIDDEN)


BF16 = [
    pytest.param(form, name, marks=[] if (form, name) == ("lean", "grouped causal") else [pytest.mark.slow])
    for form in FORMS
    for name in ("grouped causal", "segments", "dropout", "sigmoid")
]


@pytest.mark.parametrize(("form", "name"), BF16)
def test_a_form_equals_the_float32_reference_in_bfloat16(form, name):
    case = next(case for case in CASES if case.name == name)
    _assert_close(case, "bfloat16", form)


@pytest.mark.parametrize(
    "name", ["bias", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cross", "sigmoid"))]
)
def test_the_lean_form_is_exact_in_float64(name):
    with jax.enable_x64(True):
        _assert_close(next(case for case in CASES if case.name == name), "float64", "lean")


def test_a_wrong_gradient_is_seen():
    case = CASES[1]
    right = _value_and_gradients(case, "float32", implementation="reference")
    wrong = _value_and_gradients(case, "float32", implementation="lean", scale=0.126)
    assert np.abs(right[1] - wrong[1]).max() > ERRORS["float32"] * np.abs(right[1]).max()


@pytest.mark.parametrize(
    "form", ["lean", pytest.param("tpu", marks=pytest.mark.slow), pytest.param("gpu", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_reach_their_rows_and_no_other(form, value):
    q = jnp.ones((1, 40, 1, 64)).at[0, 5, 0, 0].set(value)
    k = jnp.ones((1, 40, 1, 64))
    out = attention(q, k, k, implementation=form, interpret=form != "lean")
    broken = np.isnan(np.asarray(out)).any(axis=(0, 2, 3))
    assert broken.tolist() == [row == 5 for row in range(40)]


def test_a_bias_of_minus_infinity_hides_and_leaves_zero_rows():
    q = jnp.ones((1, 4, 1, 8))
    bias = jnp.zeros((1, 1, 4, 4)).at[0, 0, :2].set(-jnp.inf)
    out = attention(q, q, q, bias, implementation="lean")
    assert np.asarray(out[0, :, 0, 0]).tolist() == [0, 0, 1, 1]


def test_equal_to_jax_itself():
    arrays, _, _ = operands(CASES[3], "float32")
    ours = attention(*arrays[:3], is_causal=True, local_window_size=(20, 20))
    theirs = jax.nn.dot_product_attention(*arrays[:3], is_causal=True, local_window_size=(20, 20))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_dropout_keeps_the_share_it_should():
    q = jnp.zeros((2, 128, 2, 16))
    eye = jnp.broadcast_to(jnp.eye(128)[None, :, None], (2, 128, 2, 128))
    key = jax.random.key(0)
    weights = attention(q, jnp.zeros((2, 128, 2, 16)), eye, dropout_rate=0.25, dropout_key=key) * 128
    assert set(np.unique(np.asarray(weights).round(4))) == {0, np.float32(1.3333)}
    kept = np.asarray(weights > 0).reshape(-1, 128)
    assert abs(kept.mean() - 0.75) < 0.01
    assert np.abs(np.corrcoef(kept[:64]) - np.eye(64)).max() < 0.5


# What is kept and what is visited.


def test_output_and_log_sum_exp_are_the_named_residuals():
    arrays, _, _ = operands(CASES[1], "float32")

    def loss(q, k, v):
        return attention(q, k, v, is_causal=True, implementation="lean").sum()

    policy = checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(*arrays[:3])
    assert _count(jaxpr, "scan") == 2  # forward and backward: the forward pass is not repeated


def _count(jaxpr, name: str) -> int:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(p)]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(_count(p, name) for p in inner)


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (4, 5)])
@pytest.mark.parametrize(
    "settings",
    [
        {"causal": True},
        {"causal": True, "offset": -3},
        {"window": (2, 1)},
        {"window": (None, 3)},
        {"causal": True, "window": (3, None)},
    ],
)
def test_visits_are_all_blocks_with_an_allowed_pair(settings, sizes):
    spec = specs.Spec(scale=1.0, **settings)
    walk = specs.visits(spec, 11, 13, *sizes)
    row, column = np.arange(11)[:, None], np.arange(13)[None]
    keep = (column <= row + spec.offset) | (not spec.causal)
    left, right = spec.window or (None, None)
    keep = keep & (column >= row - (99 if left is None else left)) & (column <= row + (99 if right is None else right))
    kinds = {(i, j): kind for i, j, kind in zip(*walk, strict=True)}
    for i in range(-(-11 // sizes[0])):
        for j in range(-(-13 // sizes[1])):
            block = keep[i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + 1) * sizes[1]]
            if block.any():
                assert kinds[i, j] == specs.WHOLE if block.all() and block.shape[1] == sizes[1] else kinds[i, j] < 2
            else:
                assert kinds.get((i, j), specs.HIDDEN) == specs.HIDDEN
    assert {i for i, _ in kinds} == set(range(-(-11 // sizes[0])))
    assert {j for _, j in kinds} == set(range(-(-13 // sizes[1])))


def test_only_visited_tiles_are_counted_and_each_once():
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)

    def step(q, k, v):
        return attention(q, k, v, is_causal=True, implementation="tpu").astype("float32").sum()

    part = 2 * 128 * 128 * 64
    parts = 8 * 9 / 2  # of 64 parts of 128 x 128 those at and below the diagonal
    products = 2 + 5  # forward, backward
    rows = 2 * 2 * 1024 * 64  # the products of output and cotangent
    counted = memopt.matmul_flops(jax.make_jaxpr(jax.grad(step, (0, 1, 2)))(q, q, q))
    assert counted == pytest.approx(2 * parts * products * part + rows, rel=1e-9)


def test_loops_inside_a_gpu_kernel_are_counted_by_what_it_states():
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)

    def step(q, k, v):
        return attention(q, k, v, is_causal=True, implementation="gpu").astype("float32").sum()

    products = 2 + 3 + 4  # forward, gradient of the queries, gradients of keys and values
    tiles = 16 * 17 / 2 * 64 * 64
    rows = 2 * 2 * 1024 * 64
    counted = memopt.matmul_flops(jax.make_jaxpr(jax.grad(step, (0, 1, 2)))(q, q, q))
    assert counted == pytest.approx(2 * 2 * products * tiles * 64 + rows, rel=1e-6)


def test_memory_is_linear_in_the_length():
    def temporaries(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        step = jax.grad(lambda q, k, v: attention(q, k, v, is_causal=True, blocks=(64, 64)).sum(), (0, 1, 2))
        return memopt.measure(step, q, q, q, target="cpu").temp_bytes

    assert temporaries(4096) <= 2.5 * temporaries(2048)


# The interface.


def test_works_under_vmap_scan_and_jit():
    q = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
    mapped = jax.vmap(lambda x: attention(x, x, x, is_causal=True))(q)
    _, scanned = jax.lax.scan(lambda c, x: (c, attention(x, x, x, is_causal=True)), 0, q)
    looped = jnp.stack([attention(x, x, x, is_causal=True, implementation="reference") for x in q])
    np.testing.assert_allclose(mapped, looped, atol=1e-6)
    np.testing.assert_allclose(scanned, looped, atol=1e-6)


Q = np.zeros((1, 16, 2, 64), np.float32)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((Q[0], Q, Q), {}, r"must be \[batch, length, heads, head_dim\]"),
        ((Q, Q[:, :8], Q), {}, "batch must agree"),
        ((Q, Q[:, :, [0, 1, 0]], Q[:, :, [0, 1, 0]]), {}, "multiple of those of k"),
        ((Q, Q, Q.astype("int32")), {}, "one floating dtype"),
        ((Q, Q, Q), {"mask": np.ones((1, 1, 16, 9), bool)}, "does not broadcast"),
        ((Q, Q, Q), {"mask": np.ones((1, 1, 16, 16))}, "give a bool mask"),
        ((Q, Q, Q), {"block_mask": np.ones((2, 2))}, "rounded up"),
        ((Q, Q, Q), {"dropout_rate": 0.1}, "needs a dropout_key"),
        ((Q, Q[:, :8], Q[:, :8]), {"q_segment_ids": np.zeros((1, 16), int)}, "kv_segment_ids is needed"),
    ],
)
def test_what_does_not_belong_together_is_named(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **settings)


def test_a_kernel_that_cannot_serve_says_why_and_the_default_still_runs():
    q = jnp.ones((1, 16, 1, 20))
    with pytest.raises(NotImplementedError, match="a head size of 20"):
        attention(q, q, q, implementation="tpu")
    assert attention(q, q, q).shape == q.shape


# The compilers.

AOT = [
    ("GPT-2", (8, 1024, 1024, 12, 12, 64), {"is_causal": True}),
    ("Llama 1B", (1, 2048, 2048, 32, 8, 64), {"is_causal": True}),
    ("Llama 8B", (1, 4096, 4096, 32, 8, 128), {"is_causal": True}),
    ("Llama 8B, long", (1, 32_768, 32_768, 32, 8, 128), {"is_causal": True}),
    ("ViT-B", (8, 196, 196, 12, 12, 64), {}),
    ("Gemma 2", (1, 4096, 4096, 8, 4, 256), {"is_causal": True, "soft_cap": 50.0, "local_window_size": (2048, 0)}),
    ("packed", (1, 1000, 1000, 4, 2, 80), {"is_causal": True, "q_segment_ids": "segments", "alibi_slopes": True}),
    ("masked", (2, 333, 777, 4, 4, 96), {"mask": "mask", "bias": "bias", "dropout_rate": 0.1}),
]
QUICK_AOT = ("packed",)


def _compile_arguments(shape, settings, dtype):
    batch, queries, keys, heads, kv_heads, dim = shape
    x = jax.ShapeDtypeStruct
    arrays = [x((batch, n, h, dim), dtype) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))]
    made = {
        "segments": x((batch, queries), jnp.int32),
        "mask": x((batch, 1, queries, keys), jnp.bool_),
        "bias": x((1, heads, 1, keys), jnp.float32),
    }
    traced = {name: made[value] for name, value in settings.items() if isinstance(value, str)}
    static = {name: value for name, value in settings.items() if name not in traced}
    if "alibi_slopes" in static:
        static["alibi_slopes"] = jnp.ones(heads)
    if "dropout_rate" in static:
        static["dropout_key"] = jax.random.key(0)

    def step(q, k, v, traced):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, **traced, **static), q, k, v)
        return out, pull(out)

    return step, (*arrays, traced)


def _targets():
    for target in ("tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1"):
        for name, shape, settings in AOT:
            slow = target != "tpu:v5e:1x1" or name not in QUICK_AOT
            marks = [pytest.mark.tpu_aot, *([pytest.mark.slow] if slow else [])]
            yield pytest.param(target, shape, settings, marks=marks, id=f"{target}-{name}")


@pytest.mark.parametrize(("target", "shape", "settings"), list(_targets()))
def test_the_kernels_compile_for_tpus_with_no_scores_in_memory(target, shape, settings, monkeypatch):
    monkeypatch.setattr(api, "default_device", lambda: target.split(":")[1])
    step, arguments = _compile_arguments(shape, settings, jnp.bfloat16)
    memory = memopt.measure(step, *arguments, target=target)
    batch, queries, keys, heads = shape[:4]
    assert memory.fits
    padding = 64 * 2**20  # of short sequences and narrow heads to whole blocks and lanes
    rows = batch * heads * queries * 64 * 4
    assert memory.peak_bytes - memory.argument_bytes < memory.argument_bytes * 6 + rows + padding
    assert memory.temp_bytes < max(batch * heads * queries * keys * 4, padding)


CUDA = [pytest.param(*row, marks=[] if row[0] in ("GPT-2", "packed") else [pytest.mark.slow], id=row[0]) for row in AOT]


@pytest.mark.xfail(jax.__version_info__ >= (0, 11), reason="newer JAX lowers Triton beside a GPU alone", strict=True)
@pytest.mark.parametrize(("name", "shape", "settings"), CUDA)
def test_the_kernels_lower_for_cuda(name, shape, settings):
    step, arguments = _compile_arguments(shape, settings, jnp.bfloat16)
    text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
