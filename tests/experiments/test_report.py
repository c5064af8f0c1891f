"""The experiments' helpers write what they are given, and nothing else."""

import csv
import io

import _report
import pytest
from rich import console as rich_console


@pytest.mark.parametrize(
    "value, style, text",
    [
        (3 * 2**29, "bytes", "1.50 GiB"),
        (-(2**20), "bytes", "-1.0 MiB"),
        (100, "bytes", "100 B"),
        (2.5e9, "flops", "2.50 GFLOP"),
        (0, "flops", "0 FLOP"),
        (0.0123, "seconds", "12.3 ms"),
        (2.0, "seconds", "2.00 s"),
        (0.051, "percent", "5.1 %"),
        (None, "bytes", "-"),
        (float("nan"), "number", "-"),
        ("plain", "text", "plain"),
    ],
)
def test_values_are_printed_with_their_unit(value, style, text):
    assert _report.format_value(value, style) == text


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match="unknown column style 'miles'"):
        _report.format_value(1, "miles")


def test_a_table_prints_a_dash_for_what_a_row_lacks():
    out = rich_console.Console(file=io.StringIO(), width=100)
    columns = [_report.Column("name", "name"), _report.Column("size", "size", "bytes")]
    _report.print_table(columns, [{"name": "a", "size": 2**20}, {"name": "b"}], "Title", out)
    lines = [line.split() for line in out.file.getvalue().splitlines()]
    assert ["Title"] in lines and ["a", "1.0", "MiB"] in lines and ["b", "-"] in lines


def test_a_csv_file_holds_raw_values_of_all_rows(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    _report.write_csv(path, [{"a": 1, "b": 2.5}, {"a": 3, "c": "x"}])
    with path.open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "2.5", "c": ""}, {"a": "3", "b": "", "c": "x"}]


def test_a_figure_is_written_as_png(tmp_path):
    path = tmp_path / "new" / "figure.png"
    with _report.figure(path) as (_, axes):
        axes.plot([0, 1], [0, 1])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_cache_continues_with_equal_settings_and_starts_anew_with_others(tmp_path):
    path = tmp_path / "rows.json"
    _report.Cache(path, {"size": 1}).put("a", {"x": 1})
    again = _report.Cache(path, {"size": 1})
    assert again.get("a") == {"x": 1} and again.get("b") is None
    assert _report.Cache(path, {"size": 2}).get("a") is None


def test_a_row_of_the_cache_is_a_copy(tmp_path):
    cache = _report.Cache(tmp_path / "rows.json", {})
    cache.put("a", {"x": 1})
    cache.get("a")["x"] = 2
    assert cache.get("a") == {"x": 1}


def test_the_environment_line_names_versions():
    assert "jax 0." in _report.environment() and "commit" not in _report.environment(commit=False)
