"""Which columns a constant mask allows, by interval arithmetic, against the mask itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import _compat as c
from memopt import _inline
from memopt.passes import _mask_bounds
from memopt.passes._mask_bounds import Unknown, row_extents
from memopt.passes._match import Space

pytestmark = pytest.mark.loose_promotion

MASKS = {
    "causal": lambda r, s: s <= r,
    "window": lambda r, s: (s <= r) & (r - s < 7),
    "both ways": lambda r, s: jnp.logical_not((s > r + 3) | (s < r - 5)),
    "blocks of two": lambda r, s: s < 2 * r + 1,
    "from the end": lambda r, s: (s.astype(jnp.float32) >= r) & (s != 5),
    "lower triangle": lambda r, s: jnp.where(r - 2 >= s, jnp.bool_(True), jnp.bool_(False)),
    "all but one": lambda r, s: s != r,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rows, columns", [(37, 37), (16, 40), (64, 64)])
@pytest.mark.parametrize("allows, flip", [(True, False), (False, False), (True, True)])
def test_extents_are_those_of_the_mask(name, rows, columns, allows, flip):
    def mask():
        keep = MASKS[name](jnp.arange(rows)[:, None], jnp.arange(columns)[None])
        return keep.T[None] if flip else keep[None, :, None]

    jaxpr = c.open_jaxpr(_inline.inline(jax.make_jaxpr(mask)()))
    space = Space(jaxpr)
    found = row_extents(space.nodes, space.number(jaxpr.outvars[0]), mask().shape, allows=allows, flip=flip)
    keep = np.asarray(mask()).reshape((columns, rows) if flip else (rows, columns))
    keep = (keep.T if flip else keep) == allows
    column = np.arange(columns)[None]
    expected = np.where(keep, column, columns).min(1), np.where(keep, column, -1).max(1), keep.sum(1)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "mask, why",
    [
        (lambda r, s: (r * s).astype(jnp.int8) > 3, "a cast loses positions"),
        (lambda r, s: jnp.sin(r + s) > 0, "`sin` has no rule"),
        (lambda r, s: (r ^ s) > 3, "`xor` has no rule"),
        (lambda r, s: (r & s) > 3, "`and` of numbers of this kind has no rule"),
    ],
)
def test_what_has_no_rule_is_named(mask, why):
    jaxpr = c.open_jaxpr(jax.make_jaxpr(lambda: mask(jnp.arange(8)[:, None], jnp.arange(8)[None]))())
    space = Space(jaxpr)
    with pytest.raises(Unknown, match=why):
        row_extents(space.nodes, space.number(jaxpr.outvars[0]), (8, 8))


def band(size):
    jaxpr = c.open_jaxpr(jax.make_jaxpr(lambda: jnp.arange(size)[None] <= jnp.arange(size)[:, None])())
    space = Space(jaxpr)
    return row_extents(space.nodes, space.number(jaxpr.outvars[0]), (size, size))


def test_a_long_band_is_found_without_its_mask():
    first, last, count = band(2**18)
    assert (first == 0).all() and (last == np.arange(2**18)).all() and (count == last + 1).all()


def test_more_mixed_squares_than_are_looked_at(monkeypatch):
    monkeypatch.setattr(_mask_bounds, "_MOST", 16)
    with pytest.raises(Unknown, match="no band"):
        band(64)
