"""The customs: what a rewritten step sends to the host's memory, and whether the compiled one did.

In: a closed jaxpr, and the compiler's figures of it. Out: the bytes that its operations put into host memory, and the
sentence for what the compiler left of that. XLA may drop a transfer without a word, so it is counted. Nothing is
planned or compiled here.
"""

from __future__ import annotations

from typing import Any

import jax

from memopt import _compat as c
from memopt._errors import format_bytes
from memopt._sizes import is_on_host, padded_bytes

#: Less than this share of what was sent, and something was dropped; layouts on the host pad a little differently.
_SHARE = 0.9


def sent_bytes(closed: Any, platform: str) -> int:
    """Return the bytes of all values that a step moves to the host's memory for later operations, results not counted.

    A loop's stack counts as a whole, what is on the host inside one trip of a loop once.

    Args:
      closed: open or closed jaxpr.
      platform: "tpu", "cpu" or "gpu", whose padding counts.
    """
    jaxpr = c.open_jaxpr(closed)
    results = set(v for v in jaxpr.outvars if not isinstance(v, c.Literal))
    total = 0
    for eqn in jaxpr.eqns:
        bodies = [body for _, _, body in c.subjaxprs(eqn.params)]
        for var in eqn.outvars if bodies or eqn.primitive.name == "device_put" else ():
            if is_on_host(var.aval) and var not in results and not isinstance(var, c.DropVar):
                total += padded_bytes(var.aval.update(memory_space=jax.memory.Space.Device), platform)
        total += max((sent_bytes(body, platform) for body in bodies), default=0)
    return total


def report(sent: int, memory: Any) -> tuple[str, bool]:
    """Return a sentence on what a compiled step holds on the host, and whether less than what was sent there.

    Args:
      sent: the bytes that the rewritten step sends to the host.
      memory: the compiler's figures (`memopt.Memory`).
    """
    there = memory.host_temp_bytes
    if not sent or there is None:
        return "", False
    told = f"{format_bytes(there)} of the {format_bytes(sent)} sent to the host are there when compiled"
    if there >= _SHARE * sent:
        return f"Offload happened: {told}.", False
    return f"Offload did not happen as planned: {told}; XLA dropped the rest of the transfers.", True
