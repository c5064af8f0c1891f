"""Real text without a download: the sources of Python's own standard library, as bytes.

In: a split's name and a size. Out: one array of bytes, and batches cut from it. The order of files, the split and the
batches depend on nothing but the library's files and the seed. It may not touch JAX, a model or the network.
"""

import hashlib
import pathlib
import sysconfig

import numpy as np

SPLITS = ("train", "validation")
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def source_files(folder: str | pathlib.Path | None = None) -> list[pathlib.Path]:
    """Return the library's own `.py` files, tests and installed packages left out, sorted by relative path.

    Args:
      folder: another folder than the running interpreter's standard library.

    Raises:
      ValueError: if the folder has no such file.
    """
    root = pathlib.Path(folder or sysconfig.get_paths()["stdlib"])
    named = [(path.relative_to(root), path) for path in root.rglob("*.py")]
    kept = [pair for pair in named if not _SKIPPED_FOLDERS.intersection(pair[0].parts[:-1])]
    if not kept:
        raise ValueError(f"no Python sources in {root}: name another folder, or use a Python that ships its library")
    return [path for _, path in sorted(kept, key=lambda pair: pair[0].as_posix())]


def load(split: str, *, max_bytes: int | None = None, folder: str | pathlib.Path | None = None) -> np.ndarray:
    """Return the bytes of one split, files joined in order.

    One file in ten is validation, by a hash of its name, so that no file is in both.

    Args:
      split: "train" or "validation".
      max_bytes: stop there; None reads all (about 10 MB).
      folder: as in `source_files`.

    Returns:
      `uint8[n]`.

    Raises:
      ValueError: if the split is unknown, or nothing is in it.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {SPLITS}")
    pieces: list[bytes] = []
    size_bytes = 0
    for path in source_files(folder):
        if _split_of(path) == split and (max_bytes is None or size_bytes < max_bytes):
            pieces.append(path.read_bytes())
            size_bytes += len(pieces[-1])
    text = np.frombuffer(b"".join(pieces), np.uint8)[:max_bytes]
    if not text.size:
        raise ValueError(f"the {split!r} split is empty: name a folder with more files")
    return text


def _split_of(path: pathlib.Path) -> str:
    name = "/".join(path.parts[-2:])
    return "validation" if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else "train"


def batch(text: np.ndarray, *, step: int, size: int, length: int, seed: int) -> np.ndarray:
    """Cut the windows of one step from the text; the same seed and step give the same windows.

    Args:
      text: `uint8[n]`, n > length.
      step: which step of the training.
      size: windows in the batch.
      length: tokens that the model reads; a window holds one more, the last target.
      seed: of the whole training.

    Returns:
      `int32[size, length + 1]`, values 0 to 255.

    Raises:
      ValueError: if the text is shorter than one window.
    """
    if text.size <= length:
        raise ValueError(f"text of {text.size} bytes holds no window of {length + 1}: use a shorter length")
    starts = np.random.default_rng((seed, step)).integers(0, text.size - length, size=size)
    return np.stack([text[start : start + length + 1] for start in starts]).astype(np.int32)
