"""Functions on tensors: check the arguments, choose a backend, run it with its gradient."""

from fastvq.ops.backends import BACKENDS, explain
from fastvq.ops.causal_conv1d import causal_conv1d
from fastvq.ops.code_statistics import code_statistics
from fastvq.ops.gated_masked_conv import GatedWeights, gated_masked_conv
from fastvq.ops.masked_conv2d import masked_conv2d
from fastvq.ops.nearest_code import nearest_code
from fastvq.ops.quantize_to_indices import quantize_to_indices
from fastvq.ops.residual_quantize import ResidualQuantizeOutput, residual_quantize
from fastvq.ops.vector_quantize import VectorQuantizeOutput, vector_quantize

__all__ = [
    "BACKENDS",
    "GatedWeights",
    "ResidualQuantizeOutput",
    "VectorQuantizeOutput",
    "causal_conv1d",
    "code_statistics",
    "explain",
    "gated_masked_conv",
    "masked_conv2d",
    "nearest_code",
    "quantize_to_indices",
    "residual_quantize",
    "vector_quantize",
]
