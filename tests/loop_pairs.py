"""The sample room of loop pairs: small differentiated steps whose forward loop's stacks are read by later loops.

In: a length. Out: functions with their arguments in float64, of every kind that rewrites of loops must keep exact, and
the comparison of a rewritten jaxpr with the original.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from memopt import _compat as c
from memopt import _inline, _pairs

WIDTH = 4


def _weights(length=None):
    shape = (WIDTH, WIDTH) if length is None else (length, WIDTH, WIDTH)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * 0.4)


def _start():
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, WIDTH)))


def recurrent(length):
    """No slices at all: the carry is the memory."""

    def loss(w, h):
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=length)
        return h.sum()

    return jax.value_and_grad(loss, (0, 1)), (_weights(), _start())


def layers(length):
    """Parameters as slices, gradients stacked by the reading loop."""

    def loss(w, h):
        h, _ = jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), h, w)
        return (h**2).sum()

    return jax.value_and_grad(loss, (0, 1)), (_weights(length), _start())


def reversed_loop(length):
    """The forward loop runs from the end."""

    def loss(w, h):
        h, s = jax.lax.scan(lambda h, w: (jnp.sin(h @ w), h.sum()), h, w, reverse=True)
        return (h**2).sum() + (s**2).sum()

    return jax.value_and_grad(loss), (_weights(length), _start())


def noise(length):
    """Typed keys as slices."""

    def loss(w, h, keys):
        def body(h, key):
            return jnp.tanh(h @ w + jax.random.normal(key, h.shape, h.dtype)), h.sum()

        h, s = jax.lax.scan(body, h, keys)
        return h.sum() + (s**2).sum()

    return jax.value_and_grad(loss), (_weights(), _start(), jax.random.split(jax.random.key(0), length))


def carried_key(length):
    """A typed key and a counter in the carry."""

    def loss(w, h, key):
        def body(carry, _):
            h, key, i = carry
            key, sub = jax.random.split(key)
            h = jnp.tanh(h @ w) * jax.random.bernoulli(sub, 0.7, h.shape).astype(h.dtype) / i.astype(h.dtype)
            return (h, key, i + 1), None

        (h, key, i), _ = jax.lax.scan(body, (h, key, jnp.int32(1)), length=length)
        return h.sum(), (key, i)

    return jax.value_and_grad(loss, has_aux=True), (_weights(), _start(), jax.random.key(3))


def integer_slices(length):
    """Integer slices, a table that the body reads as a constant, a residual of integers."""

    def loss(table, w, ids):
        def body(h, i):
            h = jnp.tanh(h @ w + table[i][None]) * jnp.where(i > 2, 1.0, 0.5)
            return h, (h[0], i * 2)

        h, (ys, twice) = jax.lax.scan(body, jnp.zeros((3, WIDTH)), ids)
        return (ys**2).sum() + h.sum(), twice

    table = jnp.asarray(np.random.default_rng(2).normal(size=(5, WIDTH)))
    return jax.value_and_grad(loss, (0, 1), has_aux=True), (table, _weights(), jnp.arange(length, dtype=jnp.int32) % 5)


def outputs_too(length):
    """Stacks that are residuals and outputs of the step at once."""

    def loss(w, h):
        def body(h, w):
            h = jnp.tanh(h @ w)
            return h, h

        h, hs = jax.lax.scan(body, h, w)
        return (hs**2).sum() + h.sum(), (h, hs)

    return jax.value_and_grad(loss, (0, 1), has_aux=True), (_weights(length), _start())


def two_readers(length):
    """Two cotangents pulled back through one forward loop."""

    def step(w, h):
        def run(w, h):
            h, s = jax.lax.scan(lambda h, w: (jnp.sin(h @ w), h.sum()), h, w)
            return h.sum(), s

        (a, s), pull = jax.vjp(run, w, h)
        return a, pull((jnp.ones_like(a), jnp.zeros_like(s))), pull((a, s))

    return step, (_weights(length), _start())


def checkpointed(length):
    """The user's own checkpoint around the body."""

    def loss(w, h):
        body = jax.checkpoint(lambda h, w: (h + jnp.sin(jnp.tanh(h @ w) @ w), None))
        h, _ = jax.lax.scan(body, h, w)
        return (h**2).sum()

    return jax.value_and_grad(loss, (0, 1)), (_weights(length), _start())


def two_nets(length):
    """A second forward loop reads what the first one stacks."""

    def loss(w, h):
        def body(h, x):
            h = jnp.tanh(h @ w + x[None])
            return h, h

        _, first = jax.lax.scan(body, h, jnp.ones((length, WIDTH)))
        h, second = jax.lax.scan(body, h, first.sum(1))
        return (second**2).sum() + h.sum()

    return jax.value_and_grad(loss), (_weights(), _start())


def branches(length):
    """A branch in the body, and a loop within it."""

    def loss(w, h):
        def body(h, w):
            h = jax.lax.cond(h.sum() > 0, lambda h: jnp.sin(h @ w), lambda h: h * 0.5, h)
            h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h), None), h, length=3)
            return h, None

        h, _ = jax.lax.scan(body, h, w, unroll=2)
        return (h**2).sum()

    return jax.value_and_grad(loss, (0, 1)), (_weights(length), _start())


def accumulated(length):
    """The pair lies in the body of a loop over microbatches."""

    def step(w, batches):
        def loss(w, h):
            h, _ = jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), h, w)
            return (h**2).sum()

        def one(total, h):
            value, grads = jax.value_and_grad(loss)(w, h)
            return total + grads, value

        return jax.lax.scan(one, jnp.zeros_like(w), batches)

    return step, (_weights(length), jnp.stack([_start(), _start() + 1]))


def sharded(length):
    """The pair lies in the body of a `shard_map`."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def step(w, h):
        def local(w, h):
            def loss(w):
                last, s = jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), h.sum()), h, w)
                return jax.lax.psum((last**2).sum() + s.sum(), "d")

            return jax.grad(loss)(w)

        return jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec())(w, h)

    return step, (_weights(length), jnp.concatenate([_start(), _start()]))


PROGRAMS = {
    f.__name__: f
    for f in (
        recurrent,
        layers,
        reversed_loop,
        noise,
        carried_key,
        integer_slices,
        outputs_too,
        two_readers,
        checkpointed,
        two_nets,
        branches,
        accumulated,
        sharded,
    )
}


@functools.cache
def traced(name, length):
    """Return a program's inlined jaxpr, its flat arguments and the paths of its pairs."""
    fn, args = PROGRAMS[name](length)
    closed = _inline.inline(jax.jit(fn).trace(*args).jaxpr)
    return closed, jax.tree.leaves(args), [path for path, _ in _pairs.find_all(c.open_jaxpr(closed))]


#: Compiling takes most of these tests' time, and their programs are tiny.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _run(closed, args):
    return jax.jit(c.as_function(closed)).lower(*args).compile(compiler_options=QUICK)(*args)


_results = {}


def _expected(closed, args):
    if id(closed) not in _results:
        _results[id(closed)] = (closed, _run(closed, args))
    return _results[id(closed)][1]


def assert_same(old, new, args, tolerance=1e-12):
    """Compare two jaxprs: well formed, inputs and outputs of the same types, the same values."""
    c.check(new)
    assert [v.aval for v in c.open_jaxpr(old).invars] == [v.aval for v in c.open_jaxpr(new).invars]
    assert [v.aval for v in c.open_jaxpr(old).outvars] == [v.aval for v in c.open_jaxpr(new).outvars]
    for a, b in zip(_expected(old, args), _run(new, args), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        chex.assert_equal_shape([a, b])
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * max(1.0, np.linalg.norm(a))


def scans(jaxpr):
    """List every `scan` equation, inner ones after the one that holds them."""
    found = []
    for eqn in c.open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name == "scan":
            found.append(eqn)
        for _, _, body in c.subjaxprs(eqn.params):
            found.extend(scans(body))
    return found
