"""The experiments on kernels judge rows rightly, measure tiny forms and draw their pictures."""

import cpu_kernels
import kernels
import pytest

GIB = 2**30


def pair(share, repeated, **more):
    hand = {"step": "s", "row": "full remat", "beyond_bytes": GIB, "share": 1.0, "recompute_share": 0.2}
    ours = {"step": "s", "row": "memopt", "beyond_bytes": share * GIB, "share": share, "recompute_share": repeated}
    return [hand, ours | {"peak_bytes": GIB} | more]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (pair(0.4, 0.1), None),
        (pair(0.6, 0.1), "0.60 of full remat's"),
        (pair(0.4, 0.2), "repeats 20.0%"),
        (pair(0.4, 0.1, peak_bytes=None, note="no plan fits"), "no plan fits"),
        ([{"step": "long", "row": "memopt", "peak_bytes": None, "note": "no plan fits"}], "long: no plan fits"),
    ],
)
def test_plans_with_kernels_are_judged(rows, words):
    found = kernels.misses(rows, 0.5)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_forms_on_the_cpu_are_judged():
    row = {"kind": "loss", "length": 4096, "naive_rss_bytes": 2, "lean_rss_bytes": 1, "time_ratio": 0.9}
    assert cpu_kernels.misses([row]) == []
    assert cpu_kernels.misses([row | {"length": 1024, "time_ratio": 1.5}]) == []
    assert "1.50 of the naive" in cpu_kernels.misses([row | {"time_ratio": 1.5}])[0]
    assert "no less memory" in cpu_kernels.misses([row | {"lean_rss_bytes": 2}])[0]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["attention", "loss"])
def test_both_forms_of_a_case_have_equal_gradients(kind):
    import jax
    import numpy as np

    make = {"attention": cpu_kernels.attention_case, "loss": cpu_kernels.loss_case}[kind]
    naive, lean = (make(form, 96, 4) for form in ("naive", "lean"))
    for ours, theirs in zip(lean[0](*lean[1]), naive[0](*naive[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jax.numpy.abs(theirs).max()))


def test_the_pictures_are_written(tmp_path):
    kernels.draw(tmp_path / "kernels.png", pair(0.4, 0.1))
    rows = [
        {"kind": "loss", "length": n, "naive_rss_bytes": n, "lean_rss_bytes": n, "naive_seconds": n, "lean_seconds": n}
        for n in (1024, 2048)
    ]
    cpu_kernels.draw(tmp_path / "cpu.png", rows)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("kernels.png", "cpu.png"))
