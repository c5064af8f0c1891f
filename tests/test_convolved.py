"""What convolutions on TPUs take for images: known answers of compiled programs, and that the timeline uses them."""

import jax
import jax.numpy as jnp
import pytest

from memopt import _compat as c
from memopt import _convolved, _sizes, _timeline_graph

MIB = 2**20


@pytest.mark.parametrize(
    ("shape", "mib"),
    [  # layouts that XLA:TPU gave these for a v5e, in whole tiles of (8, 128)
        ((4, 128, 128, 32), 17),  # [128, 32, 17, 32], features in the lanes
        ((4, 128, 128, 2), 17),
        ((8, 128, 128, 32), 32),  # {3, 0, 2, 1}
        ((16, 128, 128, 64), 64),
        ((64, 64, 64, 32), 32),  # {0, 3, 2, 1}: the batch in the lanes
        ((32, 64, 64, 64), 32),
        ((8, 128, 128, 128), 32),
    ],
)
def test_images_take_whole_tiles_of_batch_and_features(shape, mib):
    assert _convolved.image_bytes(jax.ShapeDtypeStruct(shape, jnp.bfloat16), 0, 3) == mib * MIB


def _convolved_twice(x, w, dims=("NHWC", "HWIO", "NHWC")):
    for _ in range(2):
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims))
    return x


def _graph(fun, *args):
    return _timeline_graph.flatten(c.open_jaxpr(jax.make_jaxpr(fun)(*args)), "tpu")


def test_results_and_what_is_made_of_them_are_padded_arguments_are_not():
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 128, 128, 32), (3, 3, 32, 32)))
    graph = _graph(_convolved_twice, x, w)
    made = [graph.bytes[v] for op in graph.ops for v in op.outs if graph.avals[v].shape == x.shape]
    assert len(made) == 4 and set(made) == {32 * MIB}
    assert graph.bytes[graph.inputs[0]] == _sizes.padded_bytes(x, "tpu") == 8 * MIB


def test_the_gradient_of_a_window_reads_images_and_makes_none():
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 32, 64, 32), (3, 3, 32, 48)))

    def grad(x, w):
        return jax.grad(lambda w: _convolved_twice(x, w[..., :32]).astype(jnp.float32).sum())(w)

    jaxpr = c.open_jaxpr(jax.make_jaxpr(grad)(x, w))
    sizes = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            window = eqn.outvars[0].aval.size < x.size
            for operand, size in _convolved.laid_out(eqn):
                assert (operand is None) is not window or operand == 0
                sizes.setdefault(window, set()).add(size)
    assert sizes == {
        True: {4 * MIB},
        False: {4 * MIB},
    }  # 32 x 64 positions of 8 images in 8 rows, 32 features in 128 lanes


def test_layouts_with_the_batch_last_are_seen_by_their_numbers():
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((32, 128, 128, 8), (32, 32, 3, 3)))
    graph = _graph(lambda x, w: _convolved_twice(x, w, ("CHWN", "OIHW", "CHWN")), x, w)
    assert max(graph.bytes) == 32 * MIB
