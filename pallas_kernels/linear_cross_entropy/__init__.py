"""Cross-entropy of a linear head: `reference` (semantics), `lean` (pure JAX), `tpu` (kernels), `api` (dispatch)."""

from .api import contrastive_loss as contrastive_loss
from .api import linear_cross_entropy as linear_cross_entropy

__all__ = ["contrastive_loss", "linear_cross_entropy"]
