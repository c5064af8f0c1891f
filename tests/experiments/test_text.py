"""The text is the same on every run, and the splits share no file."""

import _text
import numpy as np
import pytest


@pytest.fixture
def folder(tmp_path):
    for index in range(40):
        (tmp_path / f"module_{index}.py").write_text(f"# {index}\n" * 50)
    for skipped in ("site-packages", "test", "__pycache__"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "secret.py").write_text("SECRET\n")
    return tmp_path


def test_files_come_sorted_without_packages_and_tests(folder):
    names = [path.name for path in _text.source_files(folder)]
    assert names == sorted(names) and len(names) == 40 and "secret.py" not in names


def test_the_splits_cover_all_text_and_share_no_file(folder):
    train, validation = (_text.load(split, folder=folder).tobytes() for split in _text.SPLITS)
    whole = sum(path.stat().st_size for path in _text.source_files(folder))
    assert len(train) + len(validation) == whole
    assert len(train) > len(validation) > 0
    numbers = [{line for line in text.splitlines()} for text in (train, validation)]
    assert not numbers[0] & numbers[1]


def test_max_bytes_cuts_the_text(folder):
    assert np.array_equal(_text.load("train", folder=folder, max_bytes=100), _text.load("train", folder=folder)[:100])


def test_the_standard_library_is_there():
    assert _text.load("train", max_bytes=100_000).size == 100_000


def test_batches_repeat_for_a_seed_and_differ_between_steps(folder):
    text = _text.load("train", folder=folder)
    first, again, later = (_text.batch(text, step=s, size=3, length=16, seed=1) for s in (0, 0, 1))
    assert first.shape == (3, 17) and first.dtype == np.int32
    assert np.array_equal(first, again) and not np.array_equal(first, later)
    assert all(row.astype(np.uint8).tobytes() in text.tobytes() for row in first)


def test_bad_input_is_named(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        _text.load("tset", folder=folder)
    with pytest.raises(ValueError, match="no Python sources in"):
        _text.source_files(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match="text of 10 bytes holds no window of 17"):
        _text.batch(np.zeros(10, np.uint8), step=0, size=1, length=16, seed=0)
