"""Tests of what the tables of quality promise: gradients and losses in, figures and a verdict out."""

import numpy as np
import pytest
import residual_quality


def test_gradients_are_compared_as_one_vector():
    exact = (1.0, {"a": np.float32([3.0]), "b": np.float32([0.0, 4.0])})
    found = residual_quality.compared(exact, (1.5, {"a": np.float32([3.0]), "b": np.float32([0.0, -4.0])}))
    assert found == {"cosine": pytest.approx(-7 / 25), "error": pytest.approx(8 / 5), "loss_error": 0.5}


def test_gaps_are_taken_seed_by_seed_and_int8_has_to_be_near():
    found = residual_quality.summary([2.0, 2.5], [1.9, 2.2])
    assert found == pytest.approx({"loss": 2.25, "spread": 0.5, "gap": 0.2, "gap_spread": 0.2})
    rows = [{"model": "gpt", "form": form, "gap": gap, "spread": 0.1} for form, gap in (("exact", 0.0), ("int8", 0.2))]
    assert residual_quality.far(rows) == ["gpt"]
    assert residual_quality.far([rows[0], rows[1] | {"gap": 0.05}]) == []


def test_forms_are_passes():
    assert residual_quality.make_pass("wta:0.5").ratio == 0.5
    assert residual_quality.make_pass("int4").always
