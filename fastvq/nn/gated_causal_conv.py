"""One layer of a gated causal prior over a sequence: the horizontal stack alone.

The layer of pictures, with its vertical stack, is `gated_masked_conv.GatedMaskedConv2d`; the prior
built from either is `fastvq.models.PixelCNN`.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastvq.nn.gated_layer import GatedLayer, gate
from fastvq.nn.masked_conv import CausalConv1d


class GatedCausalConv1d(GatedLayer):
    """Gated causal layer over a sequence.

    With r = kernel_size // 2, d = dilation, * a convolution and y the class or the map:

        h'  = W_h * x                      steps t − r·d … t − d, and with mask type "B" step t
        out = W_o dropout(tanh(h'₁ + V₁·y) ⊙ σ(h'₂ + V₂·y)) (+ x)

    Indices 1 and 2 are the two halves of the channels; V·y is a learned bias per class and a 1×1
    convolution of the condition map. As in two dimensions the residual x is added with mask type
    "B" only: to a type "A" layer x is the code that is to be predicted.

    Args:
        hidden_channels: C, in and out.
        kernel_size: odd, at least 3; the kernel_size // 2 taps after the centre are masked.
        mask_type: "A" for the layer fed with the codes' embedding, "B" for all later ones.
        dilation: spacing of the taps.
        num_classes: number of class labels, or None.
        condition_channels: channels of the condition map, or None.
        dropout: probability of dropping an element of a gated output.
        residual: add x to the output (mask type "B" only).
    Raises:
        ValueError: a kernel, mask type, size or probability outside the rules above.
    van den Oord et al. 2016, arXiv:1609.03499 (WaveNet), eq. 2-3; without its skip connections.
    """

    dimensions = 1

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
        both = 2 * hidden_channels
        self.horizontal = CausalConv1d(hidden_channels, both, kernel_size, mask_type, dilation)
        self.horizontal_out = nn.Conv1d(hidden_channels, hidden_channels, 1)
        self._add_conditioning(both)

    def forward(
        self, x: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """(B, C, T) → (B, C, T).

        Args:
            x: (B, C, T); for mask type "A" usually the codes' embedding.
            class_labels: (B,) int64 in 0 … num_classes − 1, exactly when num_classes was given.
            condition: (B, condition_channels, T), exactly when condition_channels was given.
        Raises:
            ValueError: class_labels or condition missing, or given to a layer without them.
        """
        features = self.horizontal(x)
        added = self._conditioning(class_labels, condition)
        if added is not None:
            features = features + added
        out: Tensor = self.horizontal_out(self.dropout(gate(features)))
        return out + x if self.residual else out
