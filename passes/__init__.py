"""The passes: one technique, one file. This list of the defaults is the only place that names concrete passes."""

from collections.abc import Iterable

from memopt.passes.compress import Compress as Compress
from memopt.passes.compress_state import CompressState as CompressState
from memopt.passes.fuse_update import FuseUpdate as FuseUpdate
from memopt.passes.kernels import Kernels as Kernels
from memopt.passes.lossless import Lossless as Lossless
from memopt.passes.low_rank_state import LowRankState as LowRankState
from memopt.passes.offload import Offload as Offload
from memopt.passes.remat import Remat as Remat
from memopt.passes.shard import Shard as Shard
from memopt.passes.sketch import Sketch as Sketch

__all__ = [
    "Compress",
    "CompressState",
    "FuseUpdate",
    "Kernels",
    "Lossless",
    "LowRankState",
    "Offload",
    "Remat",
    "Shard",
    "Sketch",
    "asked_for",
    "default",
]


def default() -> list:
    """Return a new list of the passes that `memopt.optimize` uses when none are named: exact ones only.

    Example:
      >>> import memopt
      >>> memopt.passes.default()
      [Remat(respect_checkpoint=False), Lossless(), Kernels(attention=True, losses=True, gated_mlps=None, norms=False)]
    """
    return [Remat(), Lossless(), Kernels()]


def asked_for(marks: Iterable[str]) -> list:
    """Return the passes that carry out what scopes ask for, for `memopt.optimize` when no passes are named.

    Args:
      marks: as `@memopt.offload` and `@memopt.compress("int8")` leave them: `"offload"`, `"compress.int8"`.

    Example:
      >>> import memopt
      >>> memopt.passes.asked_for(["offload"])[0].only_marked
      True
    """
    codecs = tuple(sorted(mark.removeprefix("compress.") for mark in marks if mark.startswith("compress.")))
    found = [Compress(codecs, only_marked=True)] if codecs else []
    return found + [Offload(only_marked=True)] * ("offload" in marks)
