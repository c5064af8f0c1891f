"""Compressed state: leaves of the state stored encoded between steps, and decoded where they are used.

In: a codec and patterns of paths. Out: which leaves are stored, in which form; and the step rewritten so that leaves
are decoded one after the other. The mechanism of stored forms is the framework's (`memopt._stored`); how arrays are
encoded is the codec's. No optimizer is known by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from memopt import _in_turn, _stored
from memopt._codec import Codec, Encoded
from memopt._codecs import codec as codec_named
from memopt._contract import Context, Rewritten
from memopt._plan import Decision
from memopt.passes import _decode_loops


@dataclasses.dataclass(frozen=True)
class CompressState(_stored.LeafForm):
    """Store leaves of the state encoded between steps, and decode each one only where it is used.

    Memory: arguments and results fall by what the codec saves (a 32-bit moment to about a quarter in 8 bits); one leaf
    at a time is held decoded, of stacks that loops alone read as slices one layer. Cost: each leaf is decoded and
    encoded once a step, and such a stack in each loop that reads it. Lossy by the codec's stated error a step, unless
    the codec is exact. For any optimizer, and for frozen weights, which are only read.

    Args:
      codec: a codec, or the name of one such as `"int8"` or `"dynamic8"`.
      where: a pattern of `jax.tree_util.keystr` paths of leaves to store, or several; `*` and `?` are special. A path
        may be written with or without the number of the argument.
      min_size: leaves with fewer elements stay plain.

    Raises:
      ValueError: there is no such codec; `.compress` and the step raise it where no leaf matches.
      TypeError: raised by the step: a leaf that should be stored comes in plain.

    Example:
      >>> import jax, jax.numpy as jnp, memopt, optax
      >>> optimizer = optax.sgd(0.1, momentum=0.9)
      >>> def step(params, moments, x):
      ...     grads = jax.grad(lambda p: jnp.mean((x @ p) ** 2))(params)
      ...     updates, moments = optimizer.update(grads, moments, params)
      ...     return optax.apply_updates(params, updates), moments
      >>> step = memopt.optimize(step, passes=[memopt.passes.CompressState("int8", where="*.trace*")])
      >>> params = jnp.ones((128, 128))
      >>> moments = step.compress(optimizer.init(params))
      >>> params, moments = step(params, moments, jnp.ones((4, 128)))
      >>> moments[0].trace.codes.dtype.name, step.decompress(moments)[0].trace.dtype.name
      ('uint8', 'float32')

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, section 2, for the state of any
    optimizer, after differentiation.

    Limits: the new value of a leaf is the step's result with the same shape and dtype whose path ends most like the
    leaf's. Second moments need a codec that keeps small values apart (`"dynamic8-unsigned"`).
    """

    codec: str | Codec
    where: str | Sequence[str] = "*opt_state*"
    min_size: int = 4096
    stage: ClassVar[int] = 40
    optional: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "codec", codec_named(self.codec).for_state())
        if not isinstance(self.where, str):
            object.__setattr__(self, "where", tuple(self.where))

    @property
    def name(self) -> str:
        """The pass's name in plans."""
        return "compress_state"

    def stores(self, path: str, leaf: Any) -> bool:
        """Say whether a leaf is stored: its path matches, and it is large enough and of a type that the codec takes."""
        big = math.prod(leaf.shape) >= max(1, self.min_size)
        return big and self.codec.accepts(leaf.dtype) and _stored.matches(path, self.where)

    def is_stored(self, node: Any) -> bool:
        """Say whether a node is an array that this pass's codec has encoded."""
        return isinstance(node, Encoded) and node.codec == self.codec

    def encode(self, leaf: Any) -> Encoded:
        """Return a leaf encoded."""
        return self.codec.encode(leaf)

    def decode(self, node: Encoded) -> Any:
        """Return a leaf decoded."""
        return self.codec.decode(node)

    def rewrite(self, closed: Any, context: Context) -> Rewritten | None:
        """Return the step with its stored leaves decoded, used and encoded one after the other."""
        leaves = _in_turn.stored_leaves(context.paths, ".codes")
        closed = _decode_loops.sink(closed, [i for places in leaves.values() for i in places])
        rows = tuple(self._row(path, [closed.in_avals[i] for i in places]) for path, places in leaves.items())
        return Rewritten(_in_turn.in_turn(closed, list(leaves.values())), rows, error=self.codec.error)

    def _row(self, path: str, avals: Sequence[Any]) -> Decision:
        size = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in avals)
        reason = f"stored as {self.codec.name} between steps, error at most {self.codec.error:.2g} of its scale"
        return Decision(path, "", "", size, self.name, reason)
