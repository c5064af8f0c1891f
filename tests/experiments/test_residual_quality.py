"""Tests of what the tables of quality promise: gradients and losses in, figures and a verdict out."""

import types

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
    assert residual_quality.make_pass("wta:0.5").always


class Planned:
    """A bench whose plans store what it is told."""

    def __init__(self, stores):
        self.stores = stores

    def stored(self, form):
        rows = [types.SimpleNamespace(choice=choice) for choice in ("keep", *self.stores[form])]
        return None, types.SimpleNamespace(decisions=rows)


def test_forms_that_store_nothing_are_named():
    assert residual_quality.empty(Planned({"int8": ["int8"], "wta:0.5": []}), ["int8", "wta:0.5", "wta:0.5"]) == [
        "wta:0.5"
    ]


@pytest.mark.once
@pytest.mark.loose_promotion
def test_sketches_store_what_weight_gradients_read():
    sizes = types.SimpleNamespace(width=16, depth=1, heads=2, length=32, batch=4, rate=1e-3)
    bench = residual_quality.Bench("gpt", sizes)
    assert not residual_quality.empty(bench, ["wta:0.5"])
    plan = bench.stored("wta:0.5")[1]
    assert len(plan.stores) >= 4 and set(plan.stores.values()) == {"wta"}


def digits():
    """The digits' task without its model: ten images of one number each."""
    task = residual_quality.Vit.__new__(residual_quality.Vit)
    images = np.arange(10, dtype=np.float32)
    task.values, task.data, task.samples = types.SimpleNamespace(batch=4), {"train": (images, images + 0.5)}, 10
    return types.SimpleNamespace(task=task)


def test_norms_are_for_samples_with_numbers():
    bench, text = digits(), types.SimpleNamespace(task=residual_quality.Gpt.__new__(residual_quality.Gpt))
    forms = ["int8", "wta:0.5:norms"]
    assert residual_quality.possible(bench, forms) == forms and residual_quality.possible(text, forms) == ["int8"]
    made = residual_quality.make_pass("wta:0.5:norms", samples=10)
    assert made.samples == 10 and made.ids and not residual_quality.make_pass("wta:0.5").samples
    numbers = bench.task.numbers("train", 3, 1)
    images, labels = bench.task.batch("train", 3, 1)
    np.testing.assert_array_equal(images, numbers)
    np.testing.assert_array_equal(labels, numbers + 0.5)
    grad = residual_quality.Remembering(lambda norms, *args: (norms + 1, *args), 0)
    assert grad("loss", "grads") == grad("loss", "grads") == ("loss", "grads")
    assert grad.norms == 2 and len(residual_quality.Bench.fed(bench, grad, 3, 1)) == 3
    assert len(residual_quality.Bench.fed(bench, print, 3, 1)) == 2


@pytest.mark.slow
@pytest.mark.loose_promotion
def test_norms_are_remembered_from_one_gradient_to_the_next():
    pytest.importorskip("sklearn")
    sizes = types.SimpleNamespace(width=16, depth=1, heads=2, batch=16, rate=1e-3)
    bench = residual_quality.Bench("vit", sizes)
    assert residual_quality.possible(bench, ["wta:0.5:norms"]) and not residual_quality.empty(bench, ["wta:0.5:norms"])
    grad = bench.stored("wta:0.5:norms")[0]
    bench.train(grad, 0, 2)
    seen = set(bench.task.numbers("train", 0, 0)) | set(bench.task.numbers("train", 1, 0))
    norms = np.asarray(next(iter(grad.norms.sketch_norms.values())))
    assert grad.norms.sketch_count == 2 and set(np.flatnonzero(norms[0] >= 0)) == seen
    plain = residual_quality.Gpt.__new__(residual_quality.Gpt)
    assert not residual_quality.possible(types.SimpleNamespace(task=plain), ["wta:0.5:norms"])
