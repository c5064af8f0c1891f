"""Sizes and errors: what is read, what is written, and every sentence."""

import pickle

import pytest

from memopt._bytes import format_bytes, parse_bytes
from memopt._errors import BudgetError, TargetError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (7, 7),
        ("512", 512),
        ("12 B", 12),
        ("1KiB", 1024),
        ("1kb", 1000),
        ("1.5 MiB", 3 * 2**19),
        ("2MB", 2_000_000),
        (" 14GiB ", 14 * 2**30),
        ("14gb", 14 * 10**9),
        (".5TiB", 2**39),
        ("1tb", 10**12),
        ("123456789012345678", 123456789012345678),
    ],
)
def test_parse_bytes(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "14 gigs", "-1GiB", "1e9", "60%", "1.2.3MB", "inf"])
def test_parse_bytes_names_unreadable_text(text):
    with pytest.raises(ValueError, match="Unreadable size .* '14GiB'") as raised:
        parse_bytes(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("size", [0, "0GiB", "0.1"])
def test_parse_bytes_refuses_nothing(size):
    with pytest.raises(ValueError, match="less than one byte"):
        parse_bytes(size)


def test_parse_bytes_refuses_a_negative_integer():
    with pytest.raises(ValueError, match="Unreadable size -1"):
        parse_bytes(-1)


@pytest.mark.parametrize("size", [1.5, True, None, [1]])
def test_parse_bytes_refuses_other_types(size):
    with pytest.raises(TypeError, match="integer of bytes or text such as '14GiB'"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (None, "unknown"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (-(2**20), "-1.0 MiB"),
        (63 * 2**28, "15.75 GiB"),
    ],
)
def test_format_bytes(size_bytes, text):
    assert format_bytes(size_bytes) == text


def test_budget_error_is_full_sentences():
    error = BudgetError(2**20, 3 * 2**20, ["2.0 MiB params"], ["Donate argument 0: -1.0 MiB."])
    assert str(error).splitlines() == [
        "No plan fits the budget of 1.0 MiB: the smallest peak is 3.0 MiB, 2.0 MiB too much.",
        "What would help:",
        "  Donate argument 0: -1.0 MiB.",
        "Alive at that peak, largest first:",
        "  2.0 MiB params",
    ]
    assert isinstance(error, RuntimeError)
    assert (error.budget_bytes, error.smallest_peak_bytes) == (2**20, 3 * 2**20)
    assert (error.alive, error.advice) == (["2.0 MiB params"], ["Donate argument 0: -1.0 MiB."])


def test_budget_error_without_advice_still_has_a_remedy():
    assert "Give a budget of 3.0 MiB or more, or a smaller batch." in str(BudgetError(2**20, 3 * 2**20))


def test_budget_error_survives_pickling():
    error = BudgetError(1, 2, ["a"], ["b"])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.alive, copy.advice) == (str(error), ["a"], ["b"])


def test_target_error_is_a_value_error():
    assert issubclass(TargetError, ValueError)
