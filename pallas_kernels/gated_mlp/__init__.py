"""SwiGLU, GeGLU, ReGLU: `activations`, `reference`, `lean` (pure JAX), `tpu` and `gpu` (kernels), `api` (choice)."""

from .api import gated_activation as gated_activation
from .api import gated_mlp as gated_mlp

__all__ = ["gated_activation", "gated_mlp"]
