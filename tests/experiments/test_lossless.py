"""Tests of what the table of exact forms promises: names and decisions in, bytes and shares out."""

import lossless

import memopt


def test_steps_are_named_with_their_layers_and_fields():
    assert lossless.parse("resnet") == ("resnet", None, {})
    assert lossless.parse("gpt2:scan:dropout=0.1") == ("gpt2", "scan", {"dropout": 0.1})


def test_a_form_counts_its_own_bytes():
    def decision(choice, stored_bytes=None):
        return memopt.Decision("mask", "", "", 800, choice, "read in 1 later place", stored_bytes)

    assert lossless.kept_bytes(decision("keep")) == 800
    assert lossless.kept_bytes(decision("recompute")) == 0
    assert lossless.kept_bytes(decision("bits", 100)) == 100


def test_a_row_is_compared_with_its_partner():
    assert lossless.compared({"temp_bytes": 200}, {"temp_bytes": 150})["fell"] == 0.25
    assert "fell" not in lossless.compared({}, {"temp_bytes": 150})
