"""Tests of what the table of transfers promises: in come rows, out go figures and a verdict."""

import offload


def row(temp, host):
    return {"row": "offload", "temp_bytes": temp, "host_temp_bytes": host}


def test_what_is_missing_is_on_its_way():
    found = offload.compared(row(1000, 0), row(300, 800), layers=8)
    assert (found["fall_bytes"], found["in_flight_bytes"], found["in_flight_layers"]) == (700, 100, 1.0)
    assert not offload.misses(found)


def test_more_than_four_layers_in_flight_and_dropped_transfers_miss():
    assert offload.misses(offload.compared(row(1000, 0), row(650, 800), layers=8))
    assert offload.misses(offload.compared(row(1000, 0), row(990, 0), layers=8))
    assert offload.misses(offload.compared(row(None, None), row(990, 100), layers=8))
