"""Masked convolutions of any origin: a Conv2d whose weight is multiplied by a mask it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.nn.masked_conv import MaskedConv2d as FastMaskedConv2d

from .adapter import Host, Unsupported, adopt

# What such a mask is called, as a buffer or as a parameter that is not trained.
_MASK_NAMES = ("mask", "_mask", "kernel_mask", "conv_mask")


class MaskedConv2d(FastMaskedConv2d):
    """A host's masked convolution, by `fastvq.ops.masked_conv2d`.

    Weight, bias and the buffer with the mask are the host's; the mask is kept for its key in the
    state dict, and no longer read. Where a host writes zeros into the masked part of its weight,
    that part is left as it is here, and its gradient is zero.
    """

    live_taps: str

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W)."""
        return ops.masked_conv2d(
            x, self.weight, self.bias, mask_type=self.live_taps, dilation=self.dilation[0]
        )

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, mask_type={self.live_taps}"


def find_mask(module: nn.Module) -> Tensor | None:
    """The mask that a convolution holds, or None: of its weight's size, or broadcast to it."""
    if not isinstance(module, nn.Conv2d):
        return None
    for name in _MASK_NAMES:
        mask = getattr(module, name, None)
        if isinstance(mask, Tensor) and mask.dim() in (2, 4):
            return mask
    return None


def _adapt(host: Any) -> MaskedConv2d:
    """The adapter of a convolution with a mask; Unsupported where it is not of type A or B."""
    weight = host._parameters.get("weight")
    if weight is None:
        raise Unsupported("its weight is not a plain parameter (weight normalisation or the like)")
    dilation = host.dilation[0]
    kernel = tuple(weight.shape[2:])
    if any(size % 2 == 0 for size in kernel):
        raise Unsupported(f"its kernel {kernel} is even and has no centre")
    if host.groups != 1 or host.stride != (1, 1) or host.dilation != (dilation, dilation):
        raise Unsupported("groups, a stride, or dilations that differ are not supported")
    same = tuple(dilation * (size // 2) for size in kernel)
    if host.padding != same and host.padding != "same":
        raise Unsupported(f"its padding is {host.padding}, not {same}")
    if host.padding_mode != "zeros":
        raise Unsupported(f"its padding_mode is {host.padding_mode!r}, not 'zeros'")
    mask_type = _mask_type(host)
    adapter = adopt(MaskedConv2d, host)
    adapter.live_taps = mask_type
    if getattr(host, "mask_type", None) is None:
        adapter.mask_type = mask_type
    return adapter


def _mask_type(host: Any) -> str:
    """ "A" or "B" from the content of the mask."""
    mask = find_mask(host)
    assert mask is not None
    if mask.requires_grad:
        raise Unsupported("its mask is trained")
    weight = host.weight
    try:
        taps = mask.detach().to("cpu", torch.float32).expand(weight.shape)
    except RuntimeError:
        raise Unsupported(
            f"its mask {tuple(mask.shape)} does not fit its weight {tuple(weight.shape)}"
        ) from None
    height, width = weight.shape[2:]
    position = torch.arange(height * width).view(height, width)
    centre = (height * width) // 2
    for mask_type, live in (("A", position < centre), ("B", position <= centre)):
        if torch.equal(taps, live.float().expand(taps.shape)):
            return mask_type
    if not torch.equal(taps, taps[:1, :1].expand(taps.shape)):
        raise Unsupported("its mask differs between channels")
    raise Unsupported("its mask is neither of type A nor of type B")


def _probe(host: nn.Conv2d) -> tuple[Tensor]:
    """A picture larger than the kernel in both directions."""
    height, width = (2 * (size // 2) * host.dilation[0] + 2 for size in host.kernel_size)
    return (torch.randn(1, host.in_channels, height, width + 1, dtype=torch.float64),)


def _blank_masked_taps(module: nn.Conv2d) -> None:
    """Make what lies under the mask, which may hold anything, zero; in the gradient too."""
    mask = find_mask(module)
    assert mask is not None
    module.weight.mul_(mask)
    if module.weight.requires_grad:
        module.weight.register_hook(lambda grad: grad * mask)


# Not in the registry of classes: it is recognised by the mask it holds, whatever its class.
HOST = Host(
    library="masked convolution",
    class_name="MaskedConv2d",
    modules=(),
    attributes=frozenset(),
    without=frozenset(),
    bypassed=(),
    adapt=_adapt,
    probe=_probe,
    fill=_blank_masked_taps,
)
