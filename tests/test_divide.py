"""Loops divided in two: the same values, no stack sliced, and two pairs that are planned apart."""

import jax
import pytest

from memopt import _compat as c
from memopt import _divide, _inline, _pairs, _split, _timeline
from memopt._graph import Graph
from memopt._planner import make_ladder
from memopt._target import Target
from memopt.passes import Remat
from tests import loop_pairs

TPU = Target.parse("tpu:v5e:1x1")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", [name for name in loop_pairs.PROGRAMS if name != "sharded"])
def test_values_and_gradients_stay(name):
    closed, args, paths = loop_pairs.traced(name, 7)
    assert paths
    for path in paths:
        new = _divide.divide(closed, path, 3)
        assert len(loop_pairs.scans(new)) > len(loop_pairs.scans(closed))
        loop_pairs.assert_same(closed, new, args)


@pytest.mark.parametrize("name", ["recurrent", "layers", "reversed_loop", "outputs_too", "two_readers", "noise"])
@pytest.mark.parametrize(("block", "levels"), [(5, 2), (4, 3)])
def test_blocks_that_leave_a_rest(name, block, levels):
    closed, args, (path,) = loop_pairs.traced(name, 13)
    new = _split.two_level(closed, path, block, levels=levels)
    assert {13 // block, block, 13 % block} <= {e.params["length"] for e in loop_pairs.scans(new)} | {1}
    loop_pairs.assert_same(closed, new, args)
