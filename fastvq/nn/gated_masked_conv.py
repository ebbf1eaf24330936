"""One layer of a gated PixelCNN: the vertical and horizontal stacks, their link and their gates.

The prior built from these layers is `fastvq.models.PixelCNN`; the single masked convolution is
`masked_conv.MaskedConv2d`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.nn.gated_layer import GatedLayer, gate
from fastvq.nn.masked_conv import MaskedConv2d


class GatedMaskedConv2d(GatedLayer):
    """Gated PixelCNN layer over a vertical and a horizontal stack, without a blind spot.

    With r = kernel_size // 2, d = dilation, * a convolution and y the class or the map:

        v' = W_v * vertical                    rows i − r·d … i − d, and with mask type "B" row i
        h' = W_h * horizontal + W_vh v'        columns j − r·d … j − d, with "B" also column j
        vertical out   = dropout(tanh(v'₁ + …) ⊙ σ(v'₂ + …))
        horizontal out = W_o dropout(tanh(h'₁ + …) ⊙ σ(h'₂ + …)) (+ horizontal)

    "+ …" is V·y: a learned bias per class and a 1×1 convolution of the condition map, each with
    its own weights for each stack. Indices 1 and 2 are the two halves of the channels.

    The vertical stack spans columns j − r·d … j + r·d. In a stack of layers whose first has mask
    type "A", vertical features at row i hold codes of rows < i only, so later layers (type "B")
    may use their own row, and must: without it the codes up and to the right stay unseen.
    The rectangle of live rows is convolved; no masked tap is multiplied.

    Horizontal features hold codes up to the one at (i, j − 1) after a type "A" layer. That
    layer's *input* is the code at (i, j) itself, so adding it back would show the model the code
    it predicts: `residual` therefore acts with mask type "B" only.

    Args:
        hidden_channels: C of both stacks, in and out.
        kernel_size: odd, at least 3.
        mask_type: "A" for the layer fed with the codes' embedding, "B" for all later ones.
        dilation: spacing of the taps in both stacks, rows and columns.
        num_classes: number of class labels, or None.
        condition_channels: channels of the condition map, or None.
        dropout: probability of dropping an element of a gated output.
        residual: add the horizontal input to the horizontal output (mask type "B" only).
    Raises:
        ValueError: a kernel, mask type, size or probability outside the rules above.
    van den Oord et al. 2016, arXiv:1606.05328, eq. 2-4 and figure 2.
    """

    dimensions = 2

    def __init__(
        self,
        hidden_channels: int,
        kernel_size: int,
        mask_type: str = "B",
        dilation: int = 1,
        num_classes: int | None = None,
        condition_channels: int | None = None,
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__(
            hidden_channels,
            kernel_size,
            mask_type,
            dilation,
            num_classes,
            condition_channels,
            dropout,
            residual,
        )
        rows = kernel_size // 2 + (mask_type == "B")
        both = 2 * hidden_channels
        self.vertical = nn.Conv2d(hidden_channels, both, (rows, kernel_size), dilation=dilation)
        self.horizontal = MaskedConv2d(hidden_channels, both, (1, kernel_size), mask_type, dilation)
        self.link = nn.Conv2d(both, both, 1)
        self.horizontal_out = nn.Conv2d(hidden_channels, hidden_channels, 1)
        # The first 2C channels of each go to the vertical stack, the others to the horizontal.
        self._add_conditioning(2 * both)

    def _vertical_features(self, vertical: Tensor) -> Tensor:
        """Convolve the live rectangle: rows above, and with mask type "B" the own row."""
        height = vertical.shape[2]
        reach = self.dilation * (self.kernel_size // 2)
        if self.mask_type == "A":
            vertical = vertical[:, :, : max(height - self.dilation, 0)]
        features = self.vertical(F.pad(vertical, (reach, reach, reach, 0)))
        return features[:, :, :height]  # longer only where type "A" meets height < dilation

    def forward(
        self,
        vertical: Tensor,
        horizontal: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both stacks' features, (B, C, H, W) each, to the next layer's.

        Args:
            vertical: (B, C, H, W); for mask type "A" usually the codes' embedding.
            horizontal: (B, C, H, W), likewise.
            class_labels: (B,) int64 in 0 … num_classes − 1, exactly when num_classes was given.
            condition: (B, condition_channels, H, W), exactly when condition_channels was given.
        Returns:
            (vertical, horizontal), each (B, C, H, W).
        Raises:
            ValueError: class_labels or condition missing, or given to a layer without them.
        """
        vertical_features = self._vertical_features(vertical)
        horizontal_features = self.horizontal(horizontal) + self.link(vertical_features)
        added = self._conditioning(class_labels, condition)
        if added is not None:
            for_vertical, for_horizontal = added.chunk(2, dim=1)
            vertical_features = vertical_features + for_vertical
            horizontal_features = horizontal_features + for_horizontal
        vertical_out = self.dropout(gate(vertical_features))
        horizontal_out = self.horizontal_out(self.dropout(gate(horizontal_features)))
        if self.residual:
            horizontal_out = horizontal_out + horizontal
        return vertical_out, horizontal_out
