"""Tests of what the table of exact forms promises: names and decisions in, bytes and shares out."""

import types

import lossless


def test_steps_are_named_with_their_layers_and_fields():
    assert lossless.parse("resnet") == ("resnet", None, {})
    assert lossless.parse("gpt2:scan:dropout=0.1") == ("gpt2", "scan", {"dropout": 0.1})


def test_a_form_counts_its_share():
    def decision(choice, reason=""):
        return types.SimpleNamespace(value_bytes=800, choice=choice, reason=reason)

    assert lossless.kept_bytes(decision("keep")) == 800
    assert lossless.kept_bytes(decision("recompute")) == 0
    assert lossless.kept_bytes(decision("bits", "read in 1 later place; kept exactly in 12.500% of its bytes")) == 100


def test_a_row_is_compared_with_its_partner():
    assert lossless.compared({"temp_bytes": 200}, {"temp_bytes": 150})["fell"] == 0.25
    assert "fell" not in lossless.compared({}, {"temp_bytes": 150})
