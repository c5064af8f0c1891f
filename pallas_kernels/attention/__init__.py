"""Attention: `reference` (semantics), `lean` (pure JAX, linear memory), kernels `tpu` and `gpu`, `api` (dispatch)."""

from .api import attention as attention

__all__ = ["attention"]
