"""Whole models: VAE, VQ-VAE, VQ-VAE-2, and PixelCNN priors over their codes."""

from fastvq.models.hierarchical_prior import HierarchicalPrior
from fastvq.models.pixelcnn import PixelCNN
from fastvq.models.presets import PRESETS, preset
from fastvq.models.text import TextVAE, TextVQVAE
from fastvq.models.vae import VAE
from fastvq.models.vqvae import VQVAE, VQVAE2

__all__ = [
    "PRESETS",
    "VAE",
    "VQVAE",
    "VQVAE2",
    "HierarchicalPrior",
    "PixelCNN",
    "TextVAE",
    "TextVQVAE",
    "preset",
]
