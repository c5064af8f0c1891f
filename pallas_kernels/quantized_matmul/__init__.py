"""Matmuls with quantized weights: `weight` (the stored form), `reference`, `lean`, `tpu` (kernels), `api` (choice)."""

from .api import quantized_dot_general as quantized_dot_general
from .api import quantized_matmul as quantized_matmul
from .weight import QuantizedWeight as QuantizedWeight
from .weight import dequantize as dequantize
from .weight import quantize_weight as quantize_weight

__all__ = ["QuantizedWeight", "dequantize", "quantize_weight", "quantized_dot_general", "quantized_matmul"]
