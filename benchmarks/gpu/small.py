"""A small case of every kernel, for compute-sanitizer: `python -m benchmarks.gpu.small`.

Shapes that leave every tile ragged, rows and codes that are not finite, a mask, heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvq import nn, ops
from fastvq.models import PixelCNN


def main(device: str = "cuda") -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for rows, book in (((301, 20), (70, 20)), ((2, 77, 8), (2, 33, 8)), ((5, 130), (3, 130))):
        x, codebook = normal(*rows), normal(*book)
        x[..., 1, 0] = torch.nan
        codebook[..., 2, :] = codebook[..., 1, :]
        mask = (torch.arange(rows[-2]) % 3 > 0).to(device)
        for gradient in ("straight_through", "rotation"):
            leaves = x.clone().requires_grad_(), codebook.clone().requires_grad_()
            out = ops.vector_quantize(*leaves, mask=mask, gradient=gradient)
            total = out.quantized.nansum() + out.commitment.nansum() + out.codebook.nansum()
            total.backward()
            ops.code_statistics(x, out.indices, book[-2])
    ops.residual_quantize(normal(90, 12), normal(3, 17, 12))
    for dtype in (torch.bfloat16, torch.float32):
        convolve(normal, dtype, device)
    prior = PixelCNN(13, hidden_channels=8, num_layers=3, attention_every=2).to(device).eval()
    prior.sample((3, 5), 3, seed=0)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def convolve(normal: Callable[..., torch.Tensor], dtype: torch.dtype, device: str) -> None:
    """A masked convolution and a gated layer, forward and backward."""
    backend = "triton" if device == "cuda" else None
    weight = normal(20, 18, 3, 5).to(dtype).requires_grad_()
    x = normal(2, 18, 5, 7).to(dtype).requires_grad_()
    ops.masked_conv2d(x, weight, mask_type="A", dilation=2, backend=backend).sum().backward()
    layer = nn.GatedMaskedConv2d(18, 3, num_classes=3, condition_channels=5, dropout=0.5)
    layer = layer.to(device, dtype)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    outputs = layer(x, x, labels, normal(2, 5, 5, 7).to(dtype))
    (outputs[0] + outputs[1]).sum().backward()


if __name__ == "__main__":
    main()
