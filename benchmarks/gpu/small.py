"""A small case of every kernel, for compute-sanitizer: `python -m benchmarks.gpu.small`.

Shapes that leave every tile ragged, rows and codes that are not finite, a mask, heads.
"""

from __future__ import annotations

import torch

from fastvq import ops
from fastvq.models import PixelCNN
from fastvq.nn import GatedMaskedConv2d


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
    for kernel in (3, 5):
        leaves = normal(2, 20, 9, 7).requires_grad_(), normal(12, 20, kernel, kernel)
        ops.masked_conv2d(*leaves, mask_type="B").sum().backward()
        layer = GatedMaskedConv2d(12, kernel).to(device)
        sum(out.sum() for out in layer(normal(2, 12, 5, 7), normal(2, 12, 5, 7))).backward()
    prior = PixelCNN(13, hidden_channels=8, num_layers=3, attention_every=2).to(device).eval()
    prior.sample((3, 5), 3, seed=0)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
