"""Block-wise 8-bit codes, Adam on them: `codes` (the map), `reference`, `lean` (pure JAX), `tpu` (kernels), `api`."""

from .api import adam_8bit_update as adam_8bit_update
from .api import dequantize_blocks as dequantize_blocks
from .api import quantize_blocks as quantize_blocks

__all__ = ["adam_8bit_update", "dequantize_blocks", "quantize_blocks"]
