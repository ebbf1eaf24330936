"""`Classifier`: a small convolutional network that says which class a picture is of.

It judges samples, for rejection (`fastvq.sampling.keep_best`). Training is `fastvq.train`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvq.models.pretrained import Pretrained
from fastvq.ops.checks import check_int


class Classifier(Pretrained, nn.Module):
    """Picture → logits of its class.

    Four times: a 3×3 convolution (stride 2 from the second on), batch normalisation, ReLU; widths
    1, 2, 4, 4 times `hidden_channels`. Then the mean over all pixels and one linear layer, so
    that pictures of any size fit.

    Args:
        num_classes: number of classes.
        in_channels: 1 (grey) or 3 (RGB).
        hidden_channels: width of the first convolution.
        picture_shape: (C, H, W) of the pictures it was trained on, for whoever must bring others
            to that size; None: any.
        class_names: the name of each class, or None.
    Raises:
        ValueError: an argument outside these rules.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        hidden_channels: int = 32,
        picture_shape: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("in_channels", in_channels),
            ("hidden_channels", hidden_channels),
        ):
            check_int("Classifier", name, value)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"Classifier: class_names must name all {num_classes} classes; got "
                f"{len(class_names)}."
            )
        self.num_classes, self.in_channels = num_classes, in_channels
        self.class_names = None if class_names is None else list(class_names)
        widths = [in_channels, *(hidden_channels * factor for factor in (1, 2, 4, 4))]
        self.layers = nn.Sequential()
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 1 if index == 0 else 2
            self.layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(after))
            self.layers.append(nn.ReLU())
        self.out = nn.Linear(widths[-1], num_classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) in 0…1 → (B, num_classes) logits."""
        if pictures.dim() != 4 or pictures.shape[1] != self.in_channels:
            raise ValueError(
                f"Classifier: pictures must be (B, {self.in_channels}, H, W); got "
                f"{tuple(pictures.shape)}."
            )
        logits: Tensor = self.out(self.layers(2.0 * pictures - 1.0).mean(dim=(2, 3)))
        return logits

    @torch.no_grad()
    def probabilities(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """(N, C, H, W) in 0…1 → (N, num_classes), a part at a time."""
        device = self.out.weight.device
        parts = [self(part.to(device)).softmax(dim=1) for part in pictures.split(batch_size)]
        return torch.cat(parts) if parts else pictures.new_zeros(0, self.num_classes)
