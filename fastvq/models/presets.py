"""Named configurations of a VQ-VAE-2 and its priors: the paper's, and small ones for a laptop.

Each preset is plain data: {"image_size": pixels, "vqvae2": arguments of `VQVAE2`, "prior":
arguments of `HierarchicalPrior`}. Build them with

    p = preset("vqvae2-imagenet256")
    model, prior = VQVAE2(**p["vqvae2"]), HierarchicalPrior(**p["prior"])
"""

from __future__ import annotations

import copy
from typing import Any

# Razavi et al. 2019, arXiv:1906.00446, appendix: codebook 512 × 64, hidden 128, residual 64, two
# residual blocks. 256×256 pictures give 32×32 (top) and 64×64 (bottom) codes; 1024×1024 give
# 32×32, 64×64 and 128×128. commitment 0.25 and EMA decay 0.99 are `VQVAE2`'s own defaults.
_PAPER_STAGE_1: dict[str, Any] = {
    "in_channels": 3,
    "hidden_channels": 128,
    "residual_channels": 64,
    "num_residual_blocks": 2,
    "num_codes": 512,
    "code_dim": 64,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Priors: the same appendix, "PixelCNN prior" tables. Kept as printed: hidden units 512,
    # layers, attention (4 in 20 top layers: every 5th; none below), 8 heads, 5×5 convolutions,
    # dropout, 20 residual conditioning blocks. Not kept: the paper's residual units (2048 top,
    # 1024 bottom) and its 20-layer 1×1 output stack belong to its PixelSNAIL-like blocks; a gated
    # PixelCNN layer has no such width, and the head here is two 1×1 convolutions.
    # 1000 classes: ImageNet.
    "vqvae2-imagenet256": {
        "image_size": 256,
        "vqvae2": {**_PAPER_STAGE_1, "levels": 2, "downsample": 4},
        "prior": {
            "num_codes": 512,
            "shapes": [[32, 32], [64, 64]],
            "hidden_channels": 512,
            "num_layers": 20,
            "kernel_size": 5,
            "attention_every": [5, 0],
            "attention_heads": 8,
            "dropout": 0.1,
            "num_classes": 1000,
            "condition_channels": 512,
            "conditioning_blocks": 20,
        },
    },
    # FFHQ at 1024×1024, three levels, no classes; the same reading of the table: attention layers
    # 4, 1 and 0; layers 20, 20 and 10; dropout 0.5, 0.3 and 0.25; 8 conditioning blocks.
    "vqvae2-ffhq1024": {
        "image_size": 1024,
        "vqvae2": {**_PAPER_STAGE_1, "levels": 3, "downsample": 8},
        "prior": {
            "num_codes": 512,
            "shapes": [[32, 32], [64, 64], [128, 128]],
            "hidden_channels": 512,
            "num_layers": [20, 20, 10],
            "kernel_size": 5,
            "attention_every": [5, 20, 0],
            "attention_heads": 8,
            "dropout": [0.5, 0.3, 0.25],
            "condition_channels": 512,
            "conditioning_blocks": 8,
        },
    },
    # The same shapes at widths two CPU cores can train for an afternoon. Our choice, no paper's.
    "laptop-256": {
        "image_size": 256,
        "vqvae2": {
            "in_channels": 3,
            "hidden_channels": 64,
            "residual_channels": 32,
            "num_residual_blocks": 2,
            "num_codes": 256,
            "code_dim": 32,
            "levels": 2,
            "downsample": 4,
        },
        "prior": {
            "num_codes": 256,
            "shapes": [[32, 32], [64, 64]],
            "hidden_channels": 64,
            "num_layers": [12, 8],
            "kernel_size": 3,
            "attention_every": [4, 0],
            "attention_heads": 4,
            "dropout": 0.1,
            "condition_channels": 64,
            "conditioning_blocks": 2,
        },
    },
    "laptop-three-level": {
        "image_size": 256,
        "vqvae2": {
            "in_channels": 3,
            "hidden_channels": 64,
            "residual_channels": 32,
            "num_residual_blocks": 2,
            "num_codes": 256,
            "code_dim": 32,
            "levels": 3,
            "downsample": 4,
        },
        "prior": {
            "num_codes": 256,
            "shapes": [[16, 16], [32, 32], [64, 64]],
            "hidden_channels": 64,
            "num_layers": [12, 10, 8],
            "kernel_size": 3,
            "attention_every": [4, 0, 0],
            "attention_heads": 4,
            "dropout": 0.1,
            "condition_channels": 64,
            "conditioning_blocks": 2,
        },
    },
}


def preset(name: str) -> dict[str, Any]:
    """A copy of `PRESETS[name]`, free to change.

    Raises:
        ValueError: no preset has that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}; got {name!r}.")
    return copy.deepcopy(PRESETS[name])
