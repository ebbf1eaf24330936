"""What the gated causal layers of one and of two dimensions share: rules and conditioning.

The layers are `gated_causal_conv.GatedCausalConv1d` and `gated_masked_conv.GatedMaskedConv2d`.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastvq.nn.dimensions import CONVOLUTIONS
from fastvq.nn.masked_conv import check_mask_type
from fastvq.ops.checks import check_indices, check_int, check_number


class GatedLayer(nn.Module):
    """The attributes of a gated layer, and the weights of what class and map add before its gates.

    Attributes:
        dimensions: of the features besides batch and channels.
        horizontal, horizontal_out: the masked and the 1×1 convolution of the horizontal stack.
    Args:
        hidden_channels, kernel_size, mask_type, dilation, num_classes, condition_channels,
            dropout, residual: as `GatedMaskedConv2d`.
    Raises:
        ValueError: a kernel, mask type, size or probability outside the rules there.
    """

    dimensions: int
    horizontal: nn.Conv1d | nn.Conv2d
    horizontal_out: nn.Conv1d | nn.Conv2d
    class_bias: nn.Embedding | None
    condition_map: nn.Conv1d | nn.Conv2d | None

    def __init__(
        self,
        hidden_channels: int,
        kernel_size: int,
        mask_type: str,
        dilation: int,
        num_classes: int | None,
        condition_channels: int | None,
        dropout: float,
        residual: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_mask_type(name, mask_type)
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"{name}: kernel_size must be odd and at least 3; got {kernel_size}.")
        check_int(name, "dilation", dilation)
        check_number(name, "dropout", dropout)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{name}: dropout must be in 0 … 1; got {dropout}.")
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        self.mask_type = mask_type
        self.dilation = dilation
        self.num_classes = num_classes
        self.condition_channels = condition_channels
        self.residual = residual and mask_type == "B"
        self.dropout = nn.Dropout(dropout)

    def _add_conditioning(self, channels: int) -> None:
        """Make the bias per class and the 1×1 map, of so many channels in all."""
        self.class_bias = None
        self.condition_map = None
        if self.num_classes is not None:
            self.class_bias = nn.Embedding(self.num_classes, channels)
            # Small beside the convolutions' outputs: no gate starts saturated.
            nn.init.normal_(self.class_bias.weight, std=0.1)
        if self.condition_channels is not None:
            conv = CONVOLUTIONS[self.dimensions]
            self.condition_map = conv(self.condition_channels, channels, 1, bias=False)

    def _check_conditioning(self, class_labels: Tensor | None, condition: Tensor | None) -> None:
        name = type(self).__name__
        if (class_labels is None) != (self.class_bias is None):
            raise ValueError(
                f"{name}: class_labels must be given exactly when num_classes is; "
                f"got class_labels {'None' if class_labels is None else 'given'} with "
                f"num_classes={self.num_classes}."
            )
        if class_labels is not None and self.num_classes is not None:
            check_indices(name, "class_labels", class_labels, self.num_classes, least=0)
        if (condition is None) != (self.condition_map is None):
            raise ValueError(
                f"{name}: condition must be given exactly when condition_channels is; "
                f"got condition {'None' if condition is None else 'given'} with "
                f"condition_channels={self.condition_channels}."
            )
