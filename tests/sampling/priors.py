"""Priors, options and known codes that the sampling tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.models.pixelcnn import PixelCNN

K = 9

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"num_layers": 3},
    "one layer": {"num_layers": 1},
    "deep": {"num_layers": 10},
    "kernel 5": {"num_layers": 3, "kernel_size": 5},
    "kernel 7": {"num_layers": 2, "kernel_size": 7},
    "first kernel 7": {"num_layers": 3, "first_kernel_size": 7},
    "dilations": {"num_layers": 5, "dilations": (1, 2, 4)},
    "classes": {"num_layers": 3, "num_classes": 4},
    "condition": {"num_layers": 3, "condition_channels": 5},
    "attention": {"num_layers": 4, "attention_every": 2, "attention_heads": 2},
    "everything": {
        "num_layers": 4,
        "kernel_size": 5,
        "num_classes": 4,
        "condition_channels": 5,
        "dilations": (1, 2),
        "attention_every": 2,
        "attention_heads": 4,
        "dropout": 0.4,
    },
}
RULES: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "all three": {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
}


def build_prior(name: str, seed: int = 0) -> PixelCNN:
    """A prior with weights large enough that its logits are far from uniform."""
    torch.manual_seed(seed)
    model = PixelCNN(K, 16, **MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def conditioning_of(name: str, n: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    told = {}
    if "num_classes" in MODELS[name]:
        told["class_labels"] = torch.arange(n) % 4
    if "condition_channels" in MODELS[name]:
        told["condition"] = torch.randn(n, 5, *shape, generator=torch.Generator().manual_seed(1))
    return told


def known_codes(n: int, shape: tuple[int, int], pattern: str) -> Tensor:
    codes = torch.randint(0, K, (n, *shape), generator=torch.Generator().manual_seed(2))
    rows = torch.arange(shape[0])[:, None].expand(shape)
    known = {
        "top half": (rows < shape[0] // 2).expand(n, *shape),
        "bottom half": (rows >= shape[0] // 2).expand(n, *shape),
        "scattered": torch.rand(n, *shape, generator=torch.Generator().manual_seed(3)) < 0.5,
        "all": torch.ones(n, *shape, dtype=torch.bool),
        "none": torch.zeros(n, *shape, dtype=torch.bool),
    }[pattern]
    return torch.where(known, codes, -1)
