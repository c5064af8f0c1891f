"""The catalogue: codecs by the names that users write, `"int8"` or `"rank1-linear4"`.

In: a name, or a codec, which is returned as it is. Out: the codec.
"""

from __future__ import annotations

import dataclasses
import difflib

from memopt._codec import Codec
from memopt._codecs_exact import Bits
from memopt._codecs_linear import Float8, Integer
from memopt._codecs_maps import Dynamic, RankOne

_ALL = (
    *(Integer(bits, symmetric=s, stochastic=r) for bits in (8, 4, 2) for s in (True, False) for r in (False, True)),
    *(Integer(bits, None) for bits in (8, 4, 2)),
    *(Integer(bits, channels=True) for bits in (8, 4, 2)),
    *(Integer(bits, down=True) for bits in (8, 4, 2)),
    *(Float8(e, down=True) for e in (4, 5)),
    *(Float8(e, block) for e in (4, 5) for block in (128, None)),
    *(Dynamic(8, signed) for signed in (True, False)),
    *(Dynamic(4, signed, 128) for signed in (True, False)),
    *(Dynamic(8, signed, down=True) for signed in (True, False)),
    *(Dynamic(4, signed, 128, down=True) for signed in (True, False)),
    RankOne(),
    Bits(),
)
_BY_NAME = {one.name: one for one in _ALL}


def codec(name: str | Codec) -> Codec:
    """Return the codec of a name.

    Raises:
      ValueError: there is none; the message names the nearest.

    Example:
      >>> codec("int8")
      Integer(bits=8, block=128, symmetric=True, stochastic=False, channels=False)
    """
    if isinstance(name, Codec):
        return name
    if name not in _BY_NAME:
        near = difflib.get_close_matches(str(name), _BY_NAME, n=3, cutoff=0.0)
        raise ValueError(f"There is no codec {name!r}. The nearest are: {', '.join(near)}.")
    return _BY_NAME[name]


def names() -> list[str]:
    """Return all names, lossy codecs first."""
    return list(_BY_NAME)


def lean(one: Codec) -> Codec:
    """Return a codec whose blocks run down the rows, where it has blocks: XLA fuses what it encodes and decodes.

    Example:
      >>> lean(codec("int8")).name, lean(codec("int8-token")).name
      ('int8-down', 'int8-token')
    """
    has_blocks = isinstance(one, (Integer, Float8)) and one.block is not None and not one.channels
    return dataclasses.replace(one, down=True) if has_blocks else one


def rowwise(one: Codec) -> Codec:
    """Return a codec whose blocks are whole rows, where it has blocks.

    Example:
      >>> rowwise(codec("int8")).name, rowwise(codec("int8-channel")).name
      ('int8-token', 'int8-channel')
    """
    has_blocks = isinstance(one, (Integer, Float8)) and one.block is not None and not one.channels
    return dataclasses.replace(one, block=None, down=False) if has_blocks else one
