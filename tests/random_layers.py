"""Layers for the random programs: in come parameters, activations and a context; out go activations of the same shape.

Every layer is ``layer(params, h, context) -> h`` with ``h`` float32 ``[rows, width]``, is finite and smooth (or at
least continuous) in ``h``, and obeys strict dtype and rank promotion, so that a rewritten program may round otherwise
and still agree. Each exercises a family of JAX primitives. Nothing here knows of planners or of memopt.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

CONSTANT = np.linspace(-1.0, 1.0, 32, dtype=np.float32)


def squash(h):
    """Bound the rows of ``h`` smoothly: every deep stack stays well conditioned."""
    return h * lax.rsqrt(1.0 + jnp.mean(h * h, axis=-1, keepdims=True))


def dense(p, h, c):
    return jnp.tanh(h @ p["w"] + p["b"][None, :])


def mlp(p, h, c):
    wide = jnp.concatenate([p["w"], p["u"]], axis=1)
    hidden = jax.nn.gelu(h @ wide)
    return h + 0.5 * (hidden @ jnp.concatenate([p["u"], p["w"]], axis=0))


def swiglu(p, h, c):
    return jax.nn.silu(h @ p["w"]) * (h @ p["u"]) + h


def attention(p, h, c):
    scores = lax.dot_general(h @ p["w"], h @ p["u"], (((1,), (1,)), ((), ()))) / np.sqrt(h.shape[1]).astype(np.float32)
    causal = jnp.arange(h.shape[0])[:, None] >= jnp.arange(h.shape[0])[None, :]
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return h + weights @ h


def heads(p, h, c):
    q = (h @ p["w"]).reshape(h.shape[0], 2, -1)
    k = (h @ p["u"]).reshape(h.shape[0], 2, -1)
    scores = jnp.einsum("qhd,khd->hqk", q, k)
    out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), k)
    return jnp.transpose(out, (0, 2, 1)).reshape(h.shape)


def layernorm(p, h, c):
    centred = h - jnp.mean(h, axis=1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred**2, axis=1, keepdims=True) + 0.1)
    return centred * scale * (1.0 + p["g"])[None, :] + p["b"][None, :]


def bf16(p, h, c):
    low = jnp.dot(h.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16))
    return h + jnp.tanh(low).astype(jnp.float32)


def waves(p, h, c):
    for _ in range(3):
        h = jnp.sin(h) * 0.9 + 0.1 * jnp.exp(-h * h)
    return h + lax.logistic(p["g"])[None, :]


def leaky(p, h, c):
    h = jnp.where(h > 0, h, 0.1 * h)
    return jnp.where(c["mask"][: h.shape[0], None], h, jnp.clip(h, -0.5, 0.5))


def gather(p, h, c):
    return h + jnp.take(h @ p["w"], c["ids"][: h.shape[0]] % h.shape[0], axis=0)


def scatter(p, h, c):
    ids = c["ids"][: h.shape[0]] % h.shape[0]
    return squash(jnp.zeros_like(h).at[ids].add(jnp.tanh(h)) + p["b"][None, :]) + 0.1 * h


def slices(p, h, c):
    start = jnp.clip(c["step"], 0, h.shape[0] - 2)
    part = lax.dynamic_slice(h, (start, jnp.int32(0)), (2, h.shape[1])) @ p["w"]
    return lax.dynamic_update_slice(h, 0.5 * part, (jnp.int32(1), jnp.int32(0)))


def shuffle(p, h, c):
    left, right = jnp.split(h, 2, axis=1)
    padded = lax.pad(jnp.concatenate([jnp.sin(right), left], axis=1), np.float32(0), ((1, 0, 0), (0, 0, 0)))
    return padded[:-1] + lax.rev(h, (0,)) * p["g"][None, :]


def sums(p, h, c):
    total = jnp.cumsum(h, axis=1) / h.shape[1]
    return total + 0.1 * lax.cumlogsumexp(h, axis=0, reverse=True) + 0.1 * jnp.cumsum(h * p["b"][None, :], axis=0)


def extremes(p, h, c):
    best = jnp.max(h, axis=1, keepdims=True)
    return h - 0.5 * best + 0.1 * jnp.sort(h, axis=1) + 0.1 * lax.cummax(h, axis=1)


def top(p, h, c):
    values, _ = lax.top_k(h, 2)
    return h + jnp.mean(values, axis=1, keepdims=True) * p["g"][None, :]


def conv(p, h, c):
    kernel = p["w"][:3, :, None]
    out = lax.conv_general_dilated(
        h[None, :, :],
        jnp.transpose(kernel, (0, 2, 1)),
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=h.shape[1],
    )
    return h + jnp.tanh(out[0])


def pool(p, h, c):
    padded = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")
    return 0.5 * padded + h * lax.integer_pow(p["g"], 2)[None, :]


def dropout(p, h, c):
    kept = jax.random.bernoulli(c["key"], 0.8, h.shape)
    return jnp.where(kept, h / 0.8, 0.0) @ p["w"] + h


def noise(p, h, c):
    first, second = jax.random.split(c["key"])
    return h + 0.1 * jax.random.normal(first, h.shape) + p["b"][None, :] * jax.random.uniform(second, (h.shape[0], 1))


def recurrent(p, h, c):
    _, out = lax.scan(functools.partial(_cell, p), jnp.zeros_like(p["b"]), h, reverse=bool(h.shape[0] % 2))
    return out + h


def _cell(p, carry, x):
    new = jnp.tanh(x @ p["w"] + carry @ p["u"])
    return new, new * 0.5


def gated(p, h, c):
    state = {"a": h, "n": jnp.int32(0)}
    state = lax.fori_loop(0, 3, functools.partial(_gate, p), state)
    return squash(state["a"]) * (1.0 + 0.01 * state["n"].astype(jnp.float32))


def _gate(p, i, state):
    return {"a": squash(state["a"] @ p["w"]) + 0.1, "n": state["n"] + i}


def whiles(p, h, c):
    count, factor = lax.while_loop(_small, _grow, (c["step"], jnp.float32(0.3)))
    return h * factor + count.astype(jnp.float32) * p["b"][None, :] * 0.1


def _small(state):
    return state[1] < 0.9


def _grow(state):
    return state[0] + 1, state[1] * 1.5


def branch(p, h, c):
    return lax.cond(c["step"] > 2, _bend, _turn, p, h)


def choose(p, h, c):
    return lax.switch(c["ids"][0] % 3, [_bend, _turn, _pass], p, h)


def _bend(p, h):
    return jnp.tanh(h @ p["w"]) + jnp.exp(-h * h)


def _turn(p, h):
    return jnp.sin(h @ p["u"]) * h


def _pass(p, h):
    return h


@jax.custom_vjp
def _soft(x, scale):
    return jnp.sin(x) * scale


def _soft_forward(x, scale):
    return _soft(x, scale), (jnp.cos(x), scale, jnp.sin(x))


def _soft_backward(saved, ct):
    cosine, scale, sine = saved
    return 0.9 * ct * cosine * scale, jnp.sum(ct * sine)


_soft.defvjp(_soft_forward, _soft_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _power(n, x):
    return jnp.tanh(x) ** n


@_power.defjvp
def _power_rule(n, primals, tangents):
    (x,), (t,) = primals, tangents
    return _power(n, x), t * n * jnp.tanh(x) ** (n - 1)


def custom_vjp(p, h, c):
    return _soft(h @ p["w"], c["scale"]) + h


def custom_jvp(p, h, c):
    return _power(3, h @ p["u"]) + jax.nn.relu(h)


def rows(p, h, c):
    return jax.vmap(_row, in_axes=(None, 0, 0))(p, h, c["ids"][: h.shape[0]])


def _row(p, row, number):
    return jnp.tanh(p["w"] @ row) + lax.dynamic_index_in_dim(row, number % row.shape[0], keepdims=False)


def shared(p, h, c):
    inner = jnp.tanh(h @ p["w"])
    again = jnp.tanh(h @ p["w"])
    return inner * jnp.sin(inner) + again * inner + jnp.exp(-inner) * 0.2


def frozen(p, h, c):
    target = lax.stop_gradient(jnp.tanh(h @ p["u"]))
    return h * (1.0 + target) - jnp.floor(lax.stop_gradient(h)) * 0.1


def empty(p, h, c):
    none = jnp.sin(h[:0])
    _, ys = lax.scan(_empty_step, jnp.sum(none), none)
    return jnp.concatenate([h, none, ys], axis=0) + jnp.sum(none @ p["w"])


def _empty_step(carry, x):
    return carry + jnp.sum(x), x * 2.0


def weak(p, h, c):
    factor = jnp.sin(jnp.asarray(0.5)) + lax.cos(0.25)
    return 2 * h * factor + jnp.where(c["mask"][0], 1.0, 0.5) - 3 / (2.0 + h * h)


def constants(p, h, c):
    table = jnp.asarray(CONSTANT[: h.shape[1]])
    return h * table[None, :] + np.float32(0.1) * CONSTANT[None, : h.shape[1]] + h @ p["w"]


def integers(p, h, c):
    bits = (c["ids"][: h.shape[0]] << 1) ^ c["step"]
    parity = lax.population_count(bits) % 2 == 0
    order = jnp.argsort(bits)
    return jnp.where(parity[:, None], h, jnp.sin(h)) + 0.1 * h[order]


def named(p, h, c):
    with jax.named_scope("named"):
        hidden = checkpoint_name(jnp.tanh(h @ p["w"]), "hidden")
    return checkpoint_name(hidden @ p["u"], "out") + h


def chain(p, h, c):
    for _ in range(4):
        h = squash(h + 0.3 * jnp.tanh(h @ p["w"]))
    return h


def barrier(p, h, c):
    left, right = lax.optimization_barrier((jnp.tanh(h @ p["w"]), jnp.sin(h)))
    return left * right + jnp.square(h) * 0.1


def softplus(p, h, c):
    return jax.nn.log_softmax(h @ p["w"], axis=-1) * 0.3 + jax.nn.softplus(h) + lax.erf(h) + jnp.sqrt(h * h + 0.1)


LAYERS = {
    f.__name__: f
    for f in (
        dense,
        mlp,
        swiglu,
        attention,
        heads,
        layernorm,
        bf16,
        waves,
        leaky,
        gather,
        scatter,
        slices,
        shuffle,
        sums,
        extremes,
        top,
        conv,
        pool,
        dropout,
        noise,
        recurrent,
        gated,
        whiles,
        branch,
        choose,
        custom_vjp,
        custom_jvp,
        rows,
        shared,
        frozen,
        empty,
        weak,
        constants,
        integers,
        named,
        chain,
        barrier,
        softplus,
    )
}
"""Every layer by name."""
