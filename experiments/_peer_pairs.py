"""Which of our optimizers stands beside which of PyTorch's, with the same settings on both sides.

In: settings. Out: pairs of makers, and how far apart the two may end where they compute the same. Libraries are
imported inside of makers alone: a pair can be listed where its peer is not installed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import _peers
import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides of a pair are given.

    Attributes:
      rate, weight_decay: of all; low-rank optimizers have no weight decay, which theirs applies after the update.
      rank, every: of the low-rank ones.
      seed: of our random projections.
    """

    rate: float
    weight_decay: float
    rank: int
    every: int
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Pair:
    """One optimizer on both sides.

    Attributes:
      name: how it is called.
      peer: the distribution that theirs comes from.
      ours: settings -> an optax transformation.
      theirs: `(parameters, settings, our side) -> a PyTorch optimizer`.
      must: the largest difference of the weights where both compute the same; None where they do not.
    """

    name: str
    peer: str
    ours: Callable[[Settings], Any]
    theirs: Callable[[dict[str, Any], Settings, _peers.Ours], Any]
    must: float | None = None


def pairs() -> list[Pair]:
    """Return all pairs."""
    return [*plain_pairs(), *encoded_pairs(), *low_rank_pairs()]


def plain_pairs() -> list[Pair]:
    """Return the control: an optimizer that is neither's own."""

    def ours(s: Settings) -> Any:
        import optax

        return optax.adamw(s.rate, weight_decay=s.weight_decay)

    def theirs(parameters: dict[str, Any], s: Settings, _: Any) -> Any:
        import torch

        return torch.optim.AdamW(parameters.values(), s.rate, weight_decay=s.weight_decay)

    return [Pair("AdamW (optax)", "torch", ours, theirs, 1e-4)]


def encoded_pairs() -> list[Pair]:
    """Return optimizers with encoded moments; block sizes are the peer's."""

    def ours(name: str, share: float = 1.0, decays: bool = True, **settings: Any) -> Callable[[Settings], Any]:
        def make(s: Settings) -> Any:
            from memopt import optim

            decay = s.weight_decay if decays else 0.0
            return getattr(optim, name)(s.rate * share, weight_decay=decay, **settings)

        return make

    def bnb(name: str, share: float = 1.0, decays: bool = True, **settings: Any) -> Callable[..., Any]:
        def make(parameters: dict[str, Any], s: Settings, _: Any) -> Any:
            import bitsandbytes

            decay = s.weight_decay if decays else 0.0
            made = getattr(bitsandbytes.optim, name)
            return made(parameters.values(), lr=s.rate * share, weight_decay=decay, **settings)

        return make

    def torchao(name: str) -> Callable[..., Any]:
        def make(parameters: dict[str, Any], s: Settings, _: Any) -> Any:
            from torchao import optim

            return getattr(optim, name)(parameters.values(), s.rate, weight_decay=s.weight_decay)

        return make

    third = {"share": 1 / 3, "decays": False}
    return [
        Pair("AdamW, 8-bit", "bitsandbytes", ours("adamw_8bit", block=256), bnb("AdamW8bit"), 0.01),
        Pair("AdamW, 8-bit", "torchao", ours("adamw_8bit", block=256), torchao("AdamW8bit"), 0.01),
        Pair("Lion, 8-bit", "bitsandbytes", ours("lion_8bit", 1 / 3, block=256), bnb("Lion8bit", 1 / 3)),
        Pair(
            "momentum, 8-bit",
            "bitsandbytes",
            ours("momentum_8bit", **third, block=256),
            bnb("SGD8bit", **third, momentum=0.9),
            0.01,
        ),
        Pair("AdamW, 4-bit", "torchao", ours("adamw_4bit"), torchao("AdamW4bit")),
    ]


def low_rank_pairs() -> list[Pair]:
    """Return GaLore and APOLLO: as they are, and with our projections in theirs."""

    def galore(s: Settings, **inner: Any) -> Any:
        from memopt import optim

        core = optim.scale_by_adam_8bit(**inner) if inner else None
        return optim.galore(s.rate, core, rank=s.rank, refresh_every=s.every, seed=s.seed)

    def their_galore(parameters: dict[str, Any], s: Settings, _: Any) -> Any:
        import galore_torch

        groups = _peers.galore_groups(parameters, s.rank, s.every, 0.25)
        return galore_torch.GaLoreAdamW(groups, s.rate, eps=1e-8, no_deprecation_warning=True)

    def lent_galore(parameters: dict[str, Any], s: Settings, mine: _peers.Ours) -> Any:
        from galore_torch import galore_projector

        made = their_galore(parameters, s, mine)
        _peers.lend_bases(made, parameters, galore_projector.GaLoreProjector, mine.basis)
        return made

    def their_galore_8bit(parameters: dict[str, Any], s: Settings, _: Any) -> Any:
        import galore_torch

        return galore_torch.GaLoreAdamW8bit(_peers.galore_groups(parameters, s.rank, s.every, 0.25), s.rate)

    def apollo(s: Settings, name: str = "apollo", **more: Any) -> Any:
        from memopt import optim

        more = more if name == "apollo_mini" else {"rank": s.rank, **more}
        return getattr(optim, name)(s.rate, refresh_every=s.every, seed=s.seed, **more)

    def their_apollo(parameters: dict[str, Any], s: Settings, _: Any, kind: str = "channel", **more: Any) -> Any:
        import apollo_torch

        rank = 1 if kind == "tensor" else s.rank
        made = apollo_torch.APOLLOAdamW(_peers.apollo_groups(parameters, rank, s.every, kind), s.rate, eps=1e-8, **more)
        for number, parameter in enumerate(parameters.values()):
            made.state[parameter]["seed"] = 1000 * s.seed + number  # as ours, another one for each seed
        return made

    def once(make: Callable[[Settings], Any]) -> Callable[[Settings], Any]:
        return lambda s: make(dataclasses.replace(s, every=10**6))

    def lent_apollo(parameters: dict[str, Any], s: Settings, _: Any, **more: Any) -> Any:
        from apollo_torch import random_projector

        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        made = their_apollo(parameters, s, None, **more)
        _peers.lend_bases(
            made, parameters, random_projector.GradientProjector, projections(once(apollo)(s), shapes).get
        )
        return made

    return [
        Pair("GaLore", "galore-torch", galore, their_galore),
        Pair("GaLore, our bases lent", "galore-torch", galore, lent_galore, 0.01),
        Pair("GaLore, 8-bit", "galore-torch", lambda s: galore(s, block=256), their_galore_8bit),
        Pair("APOLLO", "apollo-torch", apollo, their_apollo),
        Pair("APOLLO, our projection lent", "apollo-torch", once(apollo), lent_apollo),
        Pair(
            "the same, no limiter",
            "apollo-torch",
            once(functools.partial(apollo, norm_growth=None)),
            functools.partial(lent_apollo, disable_nl=True),
            0.01,
        ),
        Pair(
            "APOLLO-Mini",
            "apollo-torch",
            lambda s: apollo(s, "apollo_mini"),
            lambda p, s, o: their_apollo(p, s, o, "tensor"),
        ),
    ]


def projections(optimizer: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return our APOLLO's first projections `[axis, rank]`: what it keeps of a gradient that is the identity.

    Args:
      optimizer: `memopt.optim.apollo`, with the default `b1`.
      shapes: of all parameters, by name; projections depend on a leaf's place among them.
    """
    eyes = {
        name: np.eye(*shape, dtype=np.float32) if len(shape) == 2 else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }
    mine = _peers.Ours(optimizer, eyes)
    mine.step(eyes)
    found = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes.items() if len(s) == 2):
        low = np.asarray(mine.state[0].leaves[f"['{name}']"].mu) / 0.1
        found[name] = low[:, :rows].T if rows < columns else low[:columns]
    return found
