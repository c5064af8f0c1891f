"""Reads of widened arrays: moved before the cast where that changes nothing, and left alone where it might."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _compat as c
from memopt._inline import inline
from memopt._narrow import narrow
from tests import eager

LOGITS = jax.random.normal(jax.random.key(0), (4, 32), jnp.bfloat16)
LABELS = jnp.array([3, 31, 0, 40])  # the last one is out of bounds: it reads NaN


def label_logits(logits, labels):
    """The labels' logits, read in float32 as a cross-entropy reads them."""
    return jnp.take_along_axis(logits.astype(jnp.float32), labels[:, None], axis=-1)


def read_dtypes(closed) -> set[str]:
    """The dtypes that gathers and slices of a jaxpr read, nested ones too."""
    found = set()
    for eqn in c.open_jaxpr(closed).eqns:
        if eqn.primitive.name in ("gather", "slice", "dynamic_slice"):
            found.add(str(eqn.invars[0].aval.dtype))
        for _, _, body in c.subjaxprs(eqn.params):
            found |= read_dtypes(body)
    return found


def narrowed(function, *args):
    """The jaxpr of a function before and after, calls inlined."""
    flat = inline(jax.make_jaxpr(function)(*args))
    return flat, narrow(flat)


READS = {
    "gather": lambda x: label_logits(x, LABELS),
    "slice": lambda x: x.astype(jnp.float32)[1:3, ::2],
    "dynamic slice": lambda x: jax.lax.dynamic_slice(x.astype(jnp.float32), (LABELS[0] - 2, LABELS[2]), (2, 5)),
    "in a loop": lambda x: jax.lax.scan(lambda s, row: (s + label_logits(row[None], LABELS[:1]).sum(), s), 0.0, x),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_comes_before_its_cast(name):
    flat, new = narrowed(READS[name], LOGITS)
    assert "bfloat16" not in read_dtypes(flat) and "bfloat16" in read_dtypes(new)
    assert "float32" in read_dtypes(flat) and "float32" not in read_dtypes(new)
    c.check(new)
    for one, other in zip(eager.evaluate(flat, LOGITS), eager.evaluate(new, LOGITS), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


LEFT = {
    "a narrowing cast": lambda x: x.astype(jnp.bfloat16)[1:3],
    "integers, whose fill value differs": lambda x: jnp.take(x.astype(jnp.int8).astype(jnp.int32), LABELS, axis=1),
    "another fill value": lambda x: jnp.take(x, LABELS, axis=1, mode="fill", fill_value=0.1),
    "no cast at all": lambda x: x[1:3],
}


@pytest.mark.parametrize("name", LEFT)
def test_the_rest_is_left_alone(name):
    wide = LOGITS.astype(jnp.float32)
    flat, new = narrowed(LEFT[name], wide)
    assert new is flat


def test_a_fill_value_is_not_rounded():
    def filled(x):
        return jnp.take(x.astype(jnp.float32), LABELS, axis=1, mode="fill", fill_value=0.1)

    flat, new = narrowed(filled, LOGITS)
    assert new is flat
