"""The table of optimizer state counts what it says, and the experiments on optimizers name optimizers that exist."""

import jax
import mezo_peak
import numpy as np
import optimizer_quality
import optimizer_time
import pytest
import state_table


def test_the_smallest_model_has_its_size():
    params = state_table.parameters(state_table.MODELS["60m"])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 58_073_600


def test_rows_of_the_smallest_model():
    rows = {row["optimizer"]: row for row in state_table.rows(["60m"])}
    assert rows["AdamW"]["bytes_a_parameter"] == pytest.approx(4, rel=1e-6)
    assert rows["AdamW"]["total_gb"] == pytest.approx(0.36, rel=0.04)
    assert rows["GaLore, tables too"]["total_gb"] < 0.24 < rows["GaLore"]["total_gb"]
    assert rows["MeZO"]["state_bytes"] == 4 and rows["SGD"]["state_bytes"] == 0
    assert (
        rows["AdamW, 4-bit"]["state_bytes"] < rows["AdamW, 8-bit"]["state_bytes"] < rows["AdamW"]["state_bytes"] / 1.9
    )


@pytest.mark.parametrize("known", [optimizer_time.optimizers(64), optimizer_quality.optimizers(64, 50)])
def test_all_optimizers_can_be_made(known):
    for make in known.values():
        made = make() if known.keys() == optimizer_time.optimizers(64).keys() else make(lambda count: 1e-3)
        assert hasattr(made, "update")


def test_the_best_rate_is_the_best_mean_and_nan_never_wins():
    losses = np.array([[2.0, 2.2], [1.0, np.nan], [1.9, 2.1]])
    row = optimizer_quality.summary("x", losses, [1e-3, 1e-2, 3e-3], 8)
    assert row["rate"] == 3e-3 and row["loss"] == 2.0 and row["spread"] == pytest.approx(0.2)


def test_gaps_and_verdicts():
    rows = [
        {"optimizer": "adamw", "loss": 2.0, "spread": 0.1},
        {"optimizer": "close", "loss": 2.09, "spread": 0.0},
        {"optimizer": "far", "loss": 2.2, "spread": 0.0},
    ]
    optimizer_quality.compare(rows)
    assert [row["verdict"] for row in rows] == ["yes", "yes", "no"]


def test_the_rows_of_mezo_are_in_leaves():
    class Memory:
        argument_bytes = temp_bytes = 0
        compile_seconds = 1.0

        def __init__(self, peak_bytes):
            self.peak_bytes = peak_bytes

    row = mezo_peak.row("MeZO", Memory(130), Memory(100), 20)
    assert row["over_bytes"] == 30 and row["leaves"] == 1.5
