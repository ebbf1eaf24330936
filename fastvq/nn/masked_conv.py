"""Masked convolutions as modules: `MaskedConv2d` and `CausalConv1d`.

What the mask means and how it is computed live in `fastvq.ops.masked_conv2d` and
`fastvq.ops.causal_conv1d`; the two-stack gated layer lives in `gated_masked_conv`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastvq import ops


def _odd_sizes(module: str, kernel_size: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """`kernel_size` as one odd positive int per dimension."""
    if isinstance(kernel_size, int):
        sizes = (kernel_size,) * dims
    else:
        sizes = tuple(kernel_size)
    if len(sizes) != dims or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(
            f"{module}: kernel_size must be odd and positive ({dims} of them, or one for all); "
            f"got {kernel_size!r}."
        )
    return sizes


def check_mask_type(module: str, mask_type: str) -> None:
    """Refuse a mask type other than "A" and "B"."""
    if mask_type not in ("A", "B"):
        raise ValueError(
            f'{module}: mask_type must be "A" (earlier pixels only) or "B" (also the current one); '
            f"got {mask_type!r}."
        )


class MaskedConv2d(nn.Conv2d):
    """'Same'-padded 2-D convolution that sees only earlier pixels in raster order.

        y[i, j] = bias + Σ weight[a, b] · x[i + dilation·a, j + dilation·b]

    over the taps (a, b), counted from the kernel's centre, with a < 0, or a = 0 and b < 0, or
    (mask type "B" only) a = b = 0. A masked tap contributes nothing, whatever it holds, and
    receives zero gradient. Parameters, attributes, initialisation and state-dict keys are
    `torch.nn.Conv2d`'s; `weight` is full-size, (out_channels, in_channels, kh, kw).

    Args:
        in_channels: C of the input (B, C, H, W).
        out_channels: C of the output (B, C, H, W), the same H and W.
        kernel_size: odd; an int or (kh, kw).
        mask_type: "A" or "B".
        dilation: spacing of the taps, the same in both directions.
        bias: whether a bias is added.
        groups: as `torch.nn.Conv2d`'s.
        channel_groups: n > 1 orders the channels of a pixel, as 3 does red, green and blue: group
            q of the outputs sees, at the current pixel, the inputs' groups before q ("A") or up to
            q ("B"). Divides both numbers of channels.
    Raises:
        ValueError: an even kernel, or another mask type.
    van den Oord et al. 2016, arXiv:1601.06759, sections 3.3 and 3.4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        mask_type: str = "B",
        dilation: int = 1,
        bias: bool = True,
        groups: int = 1,
        channel_groups: int = 1,
    ) -> None:
        check_mask_type("MaskedConv2d", mask_type)
        height, width = _odd_sizes("MaskedConv2d", kernel_size, 2)
        super().__init__(
            in_channels,
            out_channels,
            (height, width),
            padding=(dilation * (height // 2), dilation * (width // 2)),
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        if in_channels % channel_groups or out_channels % channel_groups:
            raise ValueError(
                f"MaskedConv2d: channel_groups must divide in_channels={in_channels} and "
                f"out_channels={out_channels}; got {channel_groups}."
            )
        self.mask_type = mask_type
        self.channel_groups = channel_groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W)."""
        return ops.masked_conv2d(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            dilation=self.dilation[0],
            groups=self.groups,
            channel_groups=self.channel_groups,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_type={self.mask_type}"


class CausalConv1d(nn.Conv1d):
    """'Same'-padded 1-D convolution that sees only earlier steps: `MaskedConv2d` of height 1.

        y[t] = bias + Σ weight[a] · x[t + dilation·a]

    over the taps a, counted from the kernel's centre, with a < 0, or (mask type "B" only) a = 0.
    Parameters, attributes and state-dict keys are `torch.nn.Conv1d`'s.

    Args:
        in_channels: C of the input (B, C, T).
        out_channels: C of the output (B, C, T).
        kernel_size: odd.
        mask_type: "A" or "B".
        dilation: spacing of the taps.
        bias: whether a bias is added.
        groups: as `torch.nn.Conv1d`'s.
    Raises:
        ValueError: an even kernel, or another mask type.
    van den Oord et al. 2016, arXiv:1609.03499, section 2.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        mask_type: str = "B",
        dilation: int = 1,
        bias: bool = True,
        groups: int = 1,
    ) -> None:
        check_mask_type("CausalConv1d", mask_type)
        (size,) = _odd_sizes("CausalConv1d", kernel_size, 1)
        super().__init__(
            in_channels,
            out_channels,
            size,
            padding=dilation * (size // 2),
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.mask_type = mask_type

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T) → (B, out_channels, T)."""
        return ops.causal_conv1d(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            dilation=self.dilation[0],
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_type={self.mask_type}"
