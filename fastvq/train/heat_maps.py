"""Heat maps laid over pictures. What they show is measured in anomaly.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.train.pictures import save_grid

_OPACITY = 0.75  # of a map where it is hottest; 0 where it is cold


def save_heat_maps(
    picture: Tensor, maps: dict[str, Tensor], scales: dict[str, float], path: str | os.PathLike[str]
) -> Path:
    """Write a picture and, beside it, each map laid over it, as one PNG.

    Args:
        picture: (C, H, W) float 0…1, C = 1 or 3.
        maps: float, by the title above each: (H, W), or (T,) from left to right, brought to W by
            means.
        scales: the value of each map that is drawn hottest; 0 is cold.
        path: of the PNG.
    """
    shown = [picture.cpu().expand(3, -1, -1)]
    for title, heat in maps.items():
        if heat.dim() == 1:
            heat = F.adaptive_avg_pool1d(heat[None], picture.shape[2]).expand(picture.shape[1], -1)
        shown.append(overlay(picture, heat / max(scales[title], torch.finfo(torch.float32).tiny)))
    return save_grid(torch.stack(shown), path, column_labels=["", *maps], columns=len(shown))


def overlay(picture: Tensor, heat: Tensor) -> Tensor:
    """A grey version of a picture under a colour scale from nothing over red and yellow to white.

    Args:
        picture: (C, H, W) float 0…1.
        heat: (H, W), clamped to 0…1.
    Returns:
        (3, H, W) in 0…1.
    """
    heat = heat.float().cpu().clamp(0.0, 1.0)
    grey = picture.float().cpu().mean(dim=0)
    colour = torch.stack([3.0 * heat, 3.0 * heat - 1.0, 3.0 * heat - 2.0]).clamp(0.0, 1.0)
    opacity = _OPACITY * (2.0 * heat).clamp(max=1.0)
    return (1.0 - opacity) * grey + opacity * colour
