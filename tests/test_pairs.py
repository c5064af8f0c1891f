"""Pairs of loops: what is found, and copies that share no variable."""

import jax
import pytest

from memopt import _compat as c
from memopt import _pairs
from tests import loop_pairs


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def pairs(name, length=8):
    closed, _, _ = loop_pairs.traced(name, length)
    return dict(_pairs.find_all(c.open_jaxpr(closed)))


def test_a_pair_knows_its_readers_and_bytes():
    ((path, pair),) = pairs("recurrent").items()
    assert path == (pair.index,) and pair.length == 8 and len(pair.readers) == 1
    assert pair.residual_bytes >= 8 * 3 * 4 * 8


def test_two_readers_are_one_pair():
    (pair,) = pairs("two_readers").values()
    assert len(pair.readers) == 2


def test_a_stack_with_other_readers_is_no_residual():
    closed, _, (path,) = loop_pairs.traced("outputs_too", 8)
    eqn = c.open_jaxpr(closed).eqns[path[0]]
    (pair,) = pairs("outputs_too").values()
    stays = {i for i, v in enumerate(_pairs.Loop(eqn).ys) if v in c.open_jaxpr(closed).outvars}
    assert stays and not stays & set(pair.residuals)


def test_a_loop_of_the_same_direction_is_no_reader():
    first, second = pairs("two_nets").items()
    assert second[0][0] not in first[1].readers


def test_pairs_lie_in_bodies_too():
    assert [len(path) for path in pairs("accumulated")] == [3]
    assert [len(path) for path in pairs("sharded")] == [3]


def variables(jaxpr):
    found = {*jaxpr.constvars, *jaxpr.invars}
    for eqn in jaxpr.eqns:
        found.update(v for v in eqn.outvars if not isinstance(v, c.DropVar))
        for _, _, body in c.subjaxprs(eqn.params):
            found |= variables(c.open_jaxpr(body))
    return found


@pytest.mark.parametrize("name", ["layers", "accumulated"])
def test_a_fresh_copy_shares_no_variable(name):
    closed, args, _ = loop_pairs.traced(name, 8)
    copy = _pairs.fresh(c.open_jaxpr(closed))
    assert len(variables(copy)) == len(variables(c.open_jaxpr(closed)))
    assert not variables(copy) & variables(c.open_jaxpr(closed))
    loop_pairs.assert_same(closed, c.close(copy, c.jaxpr_consts(closed)), args, tolerance=0)


@pytest.mark.parametrize("name", ["layers", "accumulated"])
def test_a_refused_change_gives_nothing(name):
    closed, _, (path,) = loop_pairs.traced(name, 8)
    assert _pairs.rewrite(closed, path, lambda jaxpr, index: None) is None
