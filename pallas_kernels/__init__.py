"""Kernel families, one folder each: the arithmetic that makes the large transients of a step never exist."""

from memopt.pallas_kernels.attention import attention as attention
from memopt.pallas_kernels.linear_cross_entropy import contrastive_loss as contrastive_loss
from memopt.pallas_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy

__all__ = ["attention", "contrastive_loss", "linear_cross_entropy"]
