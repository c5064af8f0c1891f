"""RMSNorm and LayerNorm: `reference`, `lean` (pure JAX), `tpu` and `gpu` (Pallas kernels), `api` (choice)."""

from .api import layer_norm as layer_norm
from .api import rms_norm as rms_norm

__all__ = ["layer_norm", "rms_norm"]
