"""Modules by concept: quantizers, Gaussian latent, masked convolutions, residual stacks."""

from fastvq.nn.causal_attention import CausalSelfAttention
from fastvq.nn.codebook import Codebook, CodebookOutput
from fastvq.nn.fsq import FSQ
from fastvq.nn.gated_causal_conv import GatedCausalConv1d
from fastvq.nn.gated_masked_conv import GatedMaskedConv2d
from fastvq.nn.gaussian import DiagonalGaussian
from fastvq.nn.grouped_residual_vq import GroupedResidualVQ
from fastvq.nn.kmeans import kmeans
from fastvq.nn.lfq import LFQ, LFQLossBreakdown, LFQOutput
from fastvq.nn.masked_conv import CausalConv1d, MaskedConv2d
from fastvq.nn.residual import ResidualBlock, ResidualStack
from fastvq.nn.residual_fsq import GroupedResidualFSQ, ResidualFSQ
from fastvq.nn.residual_lfq import GroupedResidualLFQ, ResidualLFQ
from fastvq.nn.residual_sim_vq import ResidualSimVQ
from fastvq.nn.residual_vq import ResidualVQ
from fastvq.nn.sim_vq import SimVQ
from fastvq.nn.vector_quantize import LossBreakdown, VectorQuantize

__all__ = [
    "FSQ",
    "LFQ",
    "CausalConv1d",
    "CausalSelfAttention",
    "Codebook",
    "CodebookOutput",
    "DiagonalGaussian",
    "GatedCausalConv1d",
    "GatedMaskedConv2d",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "LFQLossBreakdown",
    "LFQOutput",
    "LossBreakdown",
    "MaskedConv2d",
    "ResidualBlock",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualStack",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
    "kmeans",
]
