"""JAX's odd corners, one small program each: in comes a name, out come a function, arguments and what must hold.

A rewrite must keep every one of them: values, types, effects and how often they happen. ``effects`` counts on the host
how often callbacks ran. Nothing here knows of planners or of memopt.
"""

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

CALLS: collections.Counter[str] = collections.Counter()
X = np.linspace(-1.0, 1.0, 16, dtype=np.float32).reshape(4, 4)
W = np.linspace(0.5, -0.5, 16, dtype=np.float32).reshape(4, 4)
POLICIES = jax.checkpoint_policies


@dataclass(frozen=True)
class Corner:
    """A program and what is expected: ``calls`` counts host calls a run, ``gradient``, ``batched`` what it allows."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    calls: int = 0
    gradient: bool = False
    batched: bool = False
    loose: bool = False


def _count(x):
    CALLS["host"] += 1
    return np.asarray(x)


def _note(x):
    CALLS["host"] += 1


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def layer(w, h):
    """One small layer with a residual or two."""
    return jnp.tanh(h @ w) + jnp.sin(h)


def scanned(body, w, x, **options):
    """Scan ``body(w_i, h)`` over four scaled copies of ``w``."""
    ws = w[None] * jnp.arange(1.0, 5.0, dtype=jnp.float32)[:, None, None]
    return lax.scan(lambda h, w: (body(w, h), jnp.sum(h)), x, ws, **options)


def total(fn):
    """The sum of squares of ``fn``'s first result: something to differentiate."""
    return lambda *xs: jnp.sum(jnp.square(jax.tree_util.tree_leaves(fn(*xs))[0]))


def grad_of(fn):
    """Value and gradients with respect to weights and inputs."""
    return lambda w, x: jax.value_and_grad(total(fn), argnums=(0, 1))(w, x)


# ---- effects --------------------------------------------------------------------------------------------------------


def debug_print(w, x):
    jax.debug.callback(_note, jnp.sum(x))
    return grad_of(layer)(w, x)


def debug_in_loss(w, x):
    def noisy(w, h):
        jax.debug.callback(_note, h[0, 0])
        return layer(w, h)

    return grad_of(noisy)(w, x)


def debug_in_scan(w, x):
    def noisy(w, h):
        jax.debug.callback(_note, h[0, 0])
        return layer(w, h)

    return grad_of(lambda w, x: scanned(noisy, w, x))(w, x)


def io_ordered(w, x):
    y = io_callback(_count, _like(x), x, ordered=True)
    return grad_of(layer)(w, lax.stop_gradient(y)), io_callback(_count, _like(x), y + 1, ordered=True)


def io_unordered(w, x):
    return grad_of(layer)(w, lax.stop_gradient(io_callback(_count, _like(x), x)))


def pure(w, x):
    y = jax.pure_callback(lambda v: np.asarray(v) * 2, _like(x), x, vmap_method="sequential")
    return grad_of(layer)(w, lax.stop_gradient(y))


def mutable(w, x):
    ref = jax.new_ref(jnp.zeros_like(x))
    ref[...] = layer(w, x)
    ref[0, :] = ref[1, :] * 2.0
    return ref[...], jax.grad(total(layer))(w, x)


# ---- types ----------------------------------------------------------------------------------------------------------


def typed_key(key, w, x):
    first, second = jax.random.split(key)
    h = jnp.where(jax.random.bernoulli(first, 0.5, x.shape), x, 0.0)
    return grad_of(layer)(w, h), second, jax.random.key_data(first)


def weak_types(rate, w, x):
    return rate * 2, jnp.sin(rate), 1.0, 3, True, jax.grad(total(layer))(w, x) * rate


def literals(w, x):
    return 2.0, x, x, jnp.float32(3.0), w


def zero_size(w, x):
    none = x[:0]
    return none, jnp.sum(none), grad_of(lambda w, x: jnp.concatenate([layer(w, x[:0]), layer(w, x)]))(w, x)


def integers_only(n):
    return lax.fori_loop(0, 5, lambda i, c: (c * 3 + i) % 17, n), n << 2, lax.population_count(n)


def float_zero(w, n):
    return jax.grad(lambda w, n: jnp.sum(w[n % 4]), argnums=(0, 1), allow_int=True)(w, n)[0]


def jvp_integers(w, n):
    return jax.jvp(lambda w: (jnp.sum(w) * 2, n + 1), (w,), (w,))[1][0]


def bf16_mix(w, x):
    def mixed(w, x):
        h = jnp.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        return jax.nn.softmax(h) @ w + jnp.tanh(h.astype(jnp.bfloat16)).astype(jnp.float32)

    return grad_of(mixed)(w, x)


def complex_numbers(w, x):
    z = lax.complex(x, w)
    return jax.grad(lambda w: jnp.sum(jnp.abs(lax.complex(x, w) @ z + 1.0)))(w), jnp.exp(z), jnp.conj(z)


def fft(w, x):
    return jax.grad(lambda w: jnp.sum(jnp.abs(jnp.fft.rfft(w * x) + 0.5)))(w)


# ---- derivatives ----------------------------------------------------------------------------------------------------


@jax.custom_jvp
def _flat(x):
    return jnp.round(x)


@_flat.defjvp
def _flat_rule(primals, tangents):
    return _flat(primals[0]), jnp.zeros_like(tangents[0])


def zero_tangents(w, x):
    return grad_of(lambda w, x: _flat(layer(w, x) + 0.3) + layer(w, x) * 0.5)(w, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _scaled(f, x, n):
    return f(x) * n


def _scaled_forward(f, x, n):
    return _scaled(f, x, n), jnp.cos(x)


def _scaled_backward(f, n, saved, ct):
    return (ct * saved * n,)


_scaled.defvjp(_scaled_forward, _scaled_backward)


def nondiff(w, x):
    return grad_of(lambda w, x: _scaled(jnp.sin, x @ w, 3))(w, x)


def custom_vjp_plain(w, x):
    return _scaled(jnp.sin, x @ w, 3)


def vjp_twice(w, x):
    out, pull = jax.vjp(layer, w, x)
    return pull(out), pull(jnp.ones_like(out))


def linearised(w, x):
    out, push = jax.linearize(functools.partial(layer, w), x)
    return out, push(x), push(out)


def pullback_returned(w, x):
    return jax.vjp(layer, w, x)


def sort_gradient(w, x):
    return grad_of(lambda w, x: jnp.sort(x @ w, axis=1) * jnp.arange(4.0, dtype=jnp.float32)[None, :])(w, x)


def linalg(w, x):
    def solved(w, x):
        spd = w @ w.T + 2.0 * jnp.eye(4, dtype=jnp.float32)
        return jnp.linalg.solve(spd, x) + jnp.linalg.cholesky(spd) + jnp.linalg.inv(spd)

    return grad_of(solved)(w, x)


# ---- control flow ---------------------------------------------------------------------------------------------------


def nested_loops(w, x):
    return grad_of(lambda w, x: scanned(lambda v, h: scanned(layer, v * 0.1, h)[0], w, x)[0])(w, x)


def scan_no_xs(w, x):
    return grad_of(lambda w, x: lax.scan(lambda h, _: (layer(w, h), None), x, None, length=3)[0])(w, x)


def scan_tree(w, x):
    def body(c, i):
        h, d = c
        return (layer(w, h) * d["s"], {"s": d["s"] * 0.9, "n": d["n"] + i}), (i, h[0])

    start = x, {"s": jnp.float32(1), "n": jnp.int32(0)}
    gradient = jax.grad(lambda x: jnp.sum(lax.scan(body, (x, start[1]), jnp.arange(3))[0][0]))(x)
    return gradient, lax.scan(body, start, jnp.arange(3))


def scan_gradient(w, x):
    return grad_of(lambda w, x: scanned(layer, w, x, reverse=True, unroll=2)[0])(w, x)


def while_large(w, x):
    def more(c):
        return jnp.logical_and(c[0] < 5, jnp.sum(c[1]) < 100.0)

    return lax.while_loop(more, lambda c: (c[0] + 1, layer(w, c[1]), c[2] @ w), (0, x, x)), jax.grad(total(layer))(w, x)


def cond_residuals(flag, w, x):
    def pick(w, x):
        return lax.cond(flag, lambda: jnp.exp(layer(w, x)), lambda: jnp.sin(x @ w) * jnp.cos(x))

    return grad_of(pick)(w, x)


def switch_in_scan(w, x):
    def body(v, h):
        return lax.switch(jnp.int32(v[0, 0] > 1.0), [layer, lambda v, h: jnp.exp(-h * h) @ v], v, h)

    return grad_of(lambda w, x: scanned(body, w, x)[0])(w, x)


def vmap_scan(w, x):
    return jax.vmap(lambda row: grad_of(lambda w, x: scanned(layer, w, x)[0])(w, row[None, :]))(x)


def remat_in_scan(policy, w, x):
    def named(w, h):
        return jnp.sin(checkpoint_name(jnp.tanh(h @ w), "hidden")) @ w

    return grad_of(lambda w, x: scanned(jax.checkpoint(named, policy=policy, prevent_cse=False), w, x)[0])(w, x)


def names(w, x):
    def named(w, x):
        return jnp.sin(checkpoint_name(jnp.tanh(checkpoint_name(x @ w, "pre")), "post")) @ w

    return grad_of(jax.checkpoint(named, policy=POLICIES.save_only_these_names("post")))(w, x)


def jit_donating(w, x):
    return jax.jit(lambda w, x: (w - jax.grad(total(layer))(w, x), x), donate_argnums=0)(w * 1.0, x)


def sharded_sum(w, x):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("d")

    def local(w, x):
        return lax.psum(layer(w, x), "d")

    inner = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec())
    return grad_of(inner)(w, x)


def pallas(w, x):
    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.sin(x_ref[...]) * 2.0

    call = pl.pallas_call(kernel, out_shape=_like(x), interpret=True)
    return call(layer(w, x)), jax.grad(total(layer))(w, x)


def barrier(w, x):
    return grad_of(lambda w, x: lax.optimization_barrier((layer(w, x), x))[0])(w, x)


def _with_policies() -> dict[str, Corner]:
    policies = {
        "none": None,
        "dots": POLICIES.dots_saveable,
        "nothing": POLICIES.nothing_saveable,
        "names": POLICIES.save_only_these_names("hidden"),
        "all": POLICIES.everything_saveable,
    }
    return {
        f"remat_in_scan_{n}": Corner(functools.partial(remat_in_scan, p), (W, X), gradient=n == "dots")
        for n, p in policies.items()
    }


def corners() -> dict[str, Corner]:
    """Return every corner by name."""
    plain = (debug_print, debug_in_loss, debug_in_scan, io_ordered, io_unordered)
    calls = {"debug_print": 1, "debug_in_loss": 1, "debug_in_scan": 4, "io_ordered": 2, "io_unordered": 1}
    usual = (
        linalg,
        nested_loops,
        vmap_scan,
        pure,
        mutable,
        literals,
        zero_size,
        bf16_mix,
        complex_numbers,
        fft,
        nondiff,
        custom_vjp_plain,
        vjp_twice,
        linearised,
        pullback_returned,
        while_large,
        jit_donating,
        sharded_sum,
        pallas,
    )
    smooth = (zero_tangents, sort_gradient, scan_no_xs, scan_tree, scan_gradient, switch_in_scan, names, barrier)
    return {
        **{f.__name__: Corner(f, (W, X), calls=calls[f.__name__]) for f in plain},
        **{f.__name__: Corner(f, (W, X), loose=f is bf16_mix) for f in usual},
        **{f.__name__: Corner(f, (W, X), gradient=True, batched=True) for f in smooth},
        **_with_policies(),
        "typed_key": Corner(typed_key, (jax.random.key(0), W, X)),
        "raw_key": Corner(lambda k, w, x: (jax.random.normal(k, (3,)), layer(w, x)), (jax.random.PRNGKey(0), W, X)),
        "weak_types": Corner(weak_types, (0.5, W, X)),
        "integers_only": Corner(integers_only, (np.int32(3),)),
        "float_zero": Corner(float_zero, (W, np.int32(3))),
        "jvp_integers": Corner(jvp_integers, (W, np.int32(3))),
        "cond_true": Corner(cond_residuals, (np.bool_(True), W, X), gradient=True, batched=True),
        "cond_false": Corner(cond_residuals, (np.bool_(False), W, X)),
        "nothing": Corner(lambda: (), ()),
        "unused_argument": Corner(lambda w, x: w * 2, (W, X)),
    }
