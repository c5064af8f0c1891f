"""Kernel families, one folder each: the arithmetic that makes the large transients of a step never exist."""

from memopt.pallas_kernels.attention import attention as attention
from memopt.pallas_kernels.blockwise import adam_8bit_update as adam_8bit_update
from memopt.pallas_kernels.blockwise import dequantize_blocks as dequantize_blocks
from memopt.pallas_kernels.blockwise import quantize_blocks as quantize_blocks
from memopt.pallas_kernels.gated_mlp import gated_activation as gated_activation
from memopt.pallas_kernels.gated_mlp import gated_mlp as gated_mlp
from memopt.pallas_kernels.linear_cross_entropy import contrastive_loss as contrastive_loss
from memopt.pallas_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from memopt.pallas_kernels.norms import layer_norm as layer_norm
from memopt.pallas_kernels.norms import rms_norm as rms_norm
from memopt.pallas_kernels.quantized_matmul import dequantize as dequantize
from memopt.pallas_kernels.quantized_matmul import quantize_weight as quantize_weight
from memopt.pallas_kernels.quantized_matmul import quantized_dot_general as quantized_dot_general
from memopt.pallas_kernels.quantized_matmul import quantized_matmul as quantized_matmul

__all__ = [
    "adam_8bit_update",
    "attention",
    "contrastive_loss",
    "dequantize",
    "dequantize_blocks",
    "gated_activation",
    "gated_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "quantize_blocks",
    "quantize_weight",
    "quantized_dot_general",
    "quantized_matmul",
    "rms_norm",
]
