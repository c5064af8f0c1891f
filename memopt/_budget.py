"""Budgets: what a user writes (`"14GiB"`, `"60%"`, bytes, None) turned into bytes on one device.

Text or numbers come in, bytes go out, or None where the device knows no limit. This module looks at live arrays; it
never plans and never compiles.
"""

import math
import numbers
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax

from memopt._target import Target, devices, limit_bytes

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_FORMS = (
    "Write bytes (15_000_000_000), '14GiB', '500MB' (MiB is 2**20, MB is 10**6), "
    "'60%' of the plain step's peak, or None for the device's limit."
)


@dataclass(frozen=True)
class Budget:
    """What was asked for: bytes, a fraction of the plain step's peak, or (both None) the device's limit."""

    amount_bytes: int | None = None
    fraction: float | None = None


def parse_budget(value: Any) -> Budget:
    """Read a budget.

    Args:
        value: bytes as a whole number, text with a unit (`"14GiB"`, `"500MB"`), a percentage (`"60%"`), or None.

    Returns:
        The budget, not yet resolved for a device.

    Raises:
        ValueError: unreadable, not positive, or not finite; the message holds the value and the accepted forms.

    Example:
        >>> parse_budget("1.5KiB")
        Budget(amount_bytes=1536, fraction=None)
    """
    if value is None or isinstance(value, Budget):
        return value or Budget()
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)):
        if not 0 < float(match[1]) < math.inf:
            raise ValueError(f"Budget {value!r} leaves no memory. {_FORMS}")
        return Budget(fraction=float(match[1]) / 100)
    amount_bytes = _read_bytes(value)
    if amount_bytes is None or amount_bytes < 1:
        raise ValueError(f"Unreadable budget {value!r}. {_FORMS}")
    return Budget(amount_bytes=amount_bytes)


def parse_reserve(value: Any) -> int:
    """Read `reserve`, the bytes to leave free: a number or text with a unit, zero allowed.

    Raises:
        ValueError: unreadable or negative.

    Example:
        >>> parse_reserve("1kB")
        1000
    """
    amount_bytes = _read_bytes(value)
    if amount_bytes is None or amount_bytes < 0:
        raise ValueError(f"Unreadable reserve {value!r}. Write bytes (500_000_000) or text such as '500MB' or '1GiB'.")
    return amount_bytes


def _read_bytes(value: Any) -> int | None:
    """Return whole bytes, or None where `value` is not readable as bytes."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        unit = _UNITS.get(match[2].lower()) if match else None
        return None if match is None or unit is None else int(float(match[1]) * unit)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None


def resolve_budget(
    budget: Budget,
    *,
    target: Target,
    reserve_bytes: int,
    baseline_peak_bytes: Callable[[], int],
    arguments: Collection[Any],
) -> int | None:
    """Turn a budget into bytes on one device.

    Args:
        budget: what was asked for.
        target: the device; its limit counts where the budget is None.
        reserve_bytes: bytes to leave free of a device's limit; a budget in bytes or per cent is taken as it is.
        baseline_peak_bytes: gives the plain step's peak, asked for a percentage alone.
        arguments: arrays of this step, constants included: live, but counted in the step's own peak.

    Returns:
        Bytes, or None where None was asked for on a device with no known limit.
    """
    if budget.amount_bytes is not None:
        return budget.amount_bytes
    if budget.fraction is not None:
        return int(budget.fraction * baseline_peak_bytes())
    limit = limit_bytes(target)
    if limit is None:
        return None
    others_bytes = other_live_bytes(devices(target)[0], arguments) if target.attached else 0
    return max(limit - others_bytes - reserve_bytes, 1)


def other_live_bytes(device: jax.Device, arguments: Collection[Any]) -> int:
    """Count the bytes of live arrays on `device` that are not among `arguments`."""
    own = {id(array) for array in arguments}
    arrays = [array for array in jax.live_arrays() if id(array) not in own and not array.is_deleted()]
    return sum(_bytes_on(device, array) for array in arrays)


def _bytes_on(device: jax.Device, array: jax.Array) -> int:
    if device not in array.sharding.device_set:
        return 0
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
