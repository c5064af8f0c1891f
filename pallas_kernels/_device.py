"""Which kind of device a kernel is laid out for, where the caller does not say.

In: JAX's settings. Out: a device's kind, as JAX names it. No array is made.
"""

from __future__ import annotations

import jax


def default_device() -> str | None:
    """Return the kind of the device that `jax.default_device` names, else of the first one attached; None on a CPU.

    A step that is compiled ahead of time for a device that is not attached has to name it: nothing here can know it.
    """
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        chosen = jax.local_devices(backend=chosen)[0]
    return None if chosen.platform == "cpu" else str(chosen.device_kind)
