"""PyTorch optimizers and ours behind one face: weights in NumPy, one update at a time, state counted in bytes.

In: NumPy weights and gradients by name. Out: the new weights, the bytes of everything an optimizer keeps between
updates, and the projections that ours drew. Nothing here trains, compares or prints; PyTorch and its libraries are
imported inside functions alone, so that a machine without them can import this file.
"""

import importlib.metadata
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]
PEERS = ("torch", "bitsandbytes", "torchao", "galore-torch", "apollo-torch")


class Ours:
    """An optax transformation, compiled.

    Args:
      optimizer: the transformation.
      weights: float32 arrays by name.
    """

    def __init__(self, optimizer: Any, weights: Weights):
        import jax
        import optax

        def update(weights: Any, grads: Any, state: Any) -> Any:
            updates, state = optimizer.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

        self.weights, self.state = dict(weights), optimizer.init(dict(weights))
        self._update = jax.jit(update)

    def step(self, grads: Weights) -> Weights:
        """Take one update; return the new weights."""
        new, self.state = self._update(self.weights, dict(grads), self.state)
        self.weights = {name: np.asarray(value) for name, value in new.items()}
        return self.weights

    def state_bytes(self) -> int:
        """Return the bytes of all arrays of the state."""
        import jax

        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    def basis(self, name: str) -> np.ndarray:
        """Return the basis `[axis, rank]` of one matrix, of GaLore."""
        return np.asarray(self.state[0].projectors[f"['{name}']"])


class Theirs:
    """A PyTorch optimizer on the CPU.

    Args:
      make: called with the parameters by name; returns the optimizer.
      weights: float32 arrays by name.
    """

    def __init__(self, make: Callable[[dict[str, Any]], Any], weights: Weights):
        import torch

        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")  # torchao compiles its update, which needs a C++ compiler
        self.parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in weights.items()}
        self.weights, self.optimizer = dict(weights), make(self.parameters)

    def step(self, grads: Weights) -> Weights:
        """Take one update; return the new weights."""
        import torch

        for name, parameter in self.parameters.items():
            parameter.grad = torch.tensor(grads[name])
        self.optimizer.step()
        self.weights = {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}
        return self.weights

    def state_bytes(self) -> int:
        """Return the bytes of all tensors of the state, tables that parameters share counted once.

        Numbers that PyTorch keeps as Python objects (a count, a seed) are not counted.
        """
        found = {t.data_ptr(): t.nbytes for t in _tensors(dict(self.optimizer.state.items()))}
        return sum(found.values())


def _tensors(value: Any) -> Iterator[Any]:
    """Yield the plain tensors inside of a state: of dicts, of projectors, of tensors that are made of others."""
    import torch

    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from (getattr(value, name) for name in value.__tensor_flatten__()[0])
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif hasattr(value, "ortho_matrix"):
        yield from _tensors(vars(value))


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed, by the names of their distributions."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def quiet() -> None:
    """Silence what the peers say of GPUs, deprecations and compilers when they are imported."""
    warnings.filterwarnings("ignore", module="torch|torchao|bitsandbytes|galore_torch|apollo_torch|transformers")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "torch._functorch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def galore_groups(parameters: dict[str, Any], rank: int, every: int, scale: float) -> list[dict[str, Any]]:
    """Return GaLore's parameter groups: matrices projected, the rest plain."""
    low = {"rank": rank, "update_proj_gap": every, "scale": scale, "proj_type": "std"}
    return _groups(parameters, low)


def apollo_groups(parameters: dict[str, Any], rank: int, every: int, scale_type: str) -> list[dict[str, Any]]:
    """Return APOLLO's parameter groups; its `scale` is the square of the factor: 128 is what APOLLO-Mini publishes."""
    low = {"rank": rank, "update_proj_gap": every, "proj": "random", "proj_type": "std", "scale_type": scale_type}
    return _groups(parameters, {**low, "scale": 128 if scale_type == "tensor" else 1})


def _groups(parameters: dict[str, Any], low: dict[str, Any]) -> list[dict[str, Any]]:
    matrices = [p for p in parameters.values() if p.ndim == 2]
    return [{"params": matrices, **low}, {"params": [p for p in parameters.values() if p.ndim < 2]}]


def lend_bases(optimizer: Any, parameters: dict[str, Any], projector: Any, basis: Callable[[str], np.ndarray]) -> None:
    """Let a low-rank optimizer of theirs project with bases of ours, looked up anew at each update.

    Args:
      optimizer: GaLore's or APOLLO's.
      parameters: by name.
      projector: the library's class of projectors.
      basis: name -> `[axis, rank]`.
    """
    import torch

    for group in optimizer.param_groups:
        if "rank" not in group:
            continue
        for name in (n for n, p in parameters.items() if any(p is q for q in group["params"])):

            def get(matrix, rank, type, seed=None, name=name):  # noqa: A002 (the library's own names)
                found = torch.tensor(basis(name))
                return found if type == "left" else found.T.contiguous()

            mine = projector(group["rank"], update_proj_gap=1, scale=group["scale"], proj_type=group["proj_type"])
            mine.get_orthogonal_matrix = get
            optimizer.state[parameters[name]]["projector"] = mine
