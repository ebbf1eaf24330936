"""Modules by concept: quantizers, Gaussian latent, masked convolutions, residual stacks."""

from fastvq.nn.causal_attention import CausalSelfAttention
from fastvq.nn.codebook import Codebook, CodebookOutput
from fastvq.nn.fsq import FSQ
from fastvq.nn.gated_masked_conv import GatedMaskedConv2d
from fastvq.nn.gaussian import DiagonalGaussian
from fastvq.nn.kmeans import kmeans
from fastvq.nn.lfq import LFQ, LFQLossBreakdown, LFQOutput
from fastvq.nn.masked_conv import CausalConv1d, MaskedConv2d
from fastvq.nn.residual import ResidualBlock, ResidualStack
from fastvq.nn.vector_quantize import LossBreakdown, VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "CausalConv1d",
    "CausalSelfAttention",
    "Codebook",
    "CodebookOutput",
    "DiagonalGaussian",
    "GatedMaskedConv2d",
    "LFQLossBreakdown",
    "LFQOutput",
    "LossBreakdown",
    "MaskedConv2d",
    "ResidualBlock",
    "ResidualStack",
    "VectorQuantize",
    "kmeans",
]
