"""What a rewritten step sends to the host, what the compiler keeps of it there, and that a loss of it is told."""

import types

import jax
import jax.numpy as jnp
import pytest

import memopt
from memopt import _hosted
from memopt._timeline_graph import flatten

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
SHAPE = jax.ShapeDtypeStruct((8, 128), jnp.float32)
LAYERS, ROWS, WIDTH = 6, 4096, 512


def away(x):
    def body(h, _):
        return jnp.sin(h), jax.device_put(h, HOST)

    def back(g, h):
        return g * jnp.cos(jax.device_put(h, DEVICE)), None

    h, stack = jax.lax.scan(body, x, None, length=5)
    return jax.lax.scan(back, h, stack, reverse=True)[0]


def test_stacks_that_leave_a_loop_count_once():
    assert _hosted.sent_bytes(jax.make_jaxpr(away)(SHAPE), "cpu") == 5 * 4096


def test_what_a_step_returns_on_the_host_is_not_counted():
    closed = jax.make_jaxpr(lambda x: jax.device_put(x, HOST))(SHAPE)
    assert _hosted.sent_bytes(closed, "cpu") == 0


@pytest.mark.parametrize(("there", "dropped"), [(100, False), (95, False), (50, True), (0, True)])
def test_a_dropped_transfer_is_told(there, dropped):
    text, found = _hosted.report(100, types.SimpleNamespace(host_temp_bytes=there))
    assert found is dropped and ("did not happen" in text) is dropped and f"{there} B" in text


def test_without_transfers_nothing_is_said():
    assert _hosted.report(0, types.SimpleNamespace(host_temp_bytes=0)) == ("", False)
    assert _hosted.report(10, types.SimpleNamespace(host_temp_bytes=None)) == ("", False)


def test_what_is_on_the_host_takes_no_bytes_where_its_shape_is_padded():
    def step(x, w):
        y = jnp.einsum("bqhd,bkhd->bhqk", x, w)  # XLA:TPU pads it for the second matmul
        return jax.device_put(jnp.sin(y), HOST), jnp.einsum("bhqk,bkhd->bqhd", y, w)

    shapes = [jax.ShapeDtypeStruct((4, 1000, 12, 64), jnp.bfloat16)] * 2
    closed = jax.make_jaxpr(step)(*shapes)
    graph = flatten(closed.jaxpr, "tpu")
    put = next(op for op in graph.ops if op.name == "device_put")
    assert put.ins[0] in graph.padding and graph.bytes[put.outs[0]] == 0


def loss(ws, x):
    return jnp.sum(jax.lax.scan(lambda h, w: (h + jax.nn.gelu(h @ w), None), x, ws)[0] ** 2)


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("scanned", [True, False])
def test_residuals_leave_the_device_under_xla_tpu(scanned):
    def unrolled(ws, x):
        for w in ws:
            x = x + jax.nn.gelu(x @ w)
        return jnp.sum(x**2)

    step = jax.grad(loss if scanned else unrolled)
    args = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    plain = memopt.measure(step, *args, target="tpu:v5e:1x1")
    common = dict(target="tpu:v5e:1x1", passes=[memopt.passes.Offload()], verify=False)
    least = min(p.peak_bytes for p in memopt.optimize(step, budget="100%", **common).frontier(*args))
    planned = memopt.optimize(step, budget=least, **common)
    memory = planned.measure(*args)
    sent = _hosted.sent_bytes(planned.trace(*args).jaxpr, "tpu")
    assert memory.host_temp_bytes == pytest.approx(sent, rel=0.02)
    assert plain.temp_bytes - memory.temp_bytes >= memory.host_temp_bytes * (1 - 4 / LAYERS)
    assert any(note.startswith("Offload happened") for note in planned.plan(*args).notes)
