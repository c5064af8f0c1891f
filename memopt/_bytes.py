"""Sizes in bytes, read and written the one way that memopt's arguments, tables and messages share.

Text or a number comes in, an integer or text goes out. Nothing of memopt or JAX is imported, so that all may import it.
"""

import re

MIB = 2**20
GIB = 2**30
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_bytes(size: int | str) -> int:
    """Read a number of bytes.

    Args:
        size: bytes as an integer, or text with a unit: `"14GiB"` (2**30), `"14 GB"` (10**9), `"512"` (bytes).

    Returns:
        Bytes, at least 1.

    Raises:
        ValueError: unreadable text, or nothing left of it.
        TypeError: neither an integer nor text.

    Example:
        >>> parse_bytes("1.5KiB"), parse_bytes("2MB")
        (1536, 2000000)
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"A size is an integer of bytes or text such as '14GiB'; got {size!r}.")
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", str(size).lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"Unreadable size {size!r}. Write bytes, or a unit: '14GiB' (2**30), '14GB' (10**9).")
    size_bytes = int(float(match[1]) * _UNITS[match[2]]) if match[2] or "." in match[1] else int(match[1])
    if size_bytes < 1:
        raise ValueError(f"Size {size!r} is less than one byte. Write for example '14GiB'.")
    return size_bytes


def format_bytes(size_bytes: int | None) -> str:
    """Write a number of bytes the way every memopt table does.

    Args:
        size_bytes: bytes, or None for a figure that is not known.

    Returns:
        `"512 B"`, `"1.5 KiB"`, `"20.0 MiB"`, `"15.75 GiB"`; `"unknown"` for None.

    Example:
        >>> format_bytes(3 * 2**29)
        '1.50 GiB'
    """
    if size_bytes is None:
        return "unknown"
    magnitude = abs(size_bytes)
    if magnitude >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if magnitude >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    if magnitude >= 1024:
        return f"{size_bytes / 1024:.1f} KiB"
    return f"{size_bytes} B"
