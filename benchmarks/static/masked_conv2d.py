"""The masked convolutions' and the gated layer's launches, and their predicted times on an H200.

A model, not a measurement: per step of the main loop the matrix unit, the issue of instructions
and the operands' way from L2 each take their time, and the slowest counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks.static import predict, sass
from benchmarks.static.compile import Launch, record_launches

ARITHMETIC = {"half": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
CHANNELS, KERNEL, BATCH, SIZE = 128, 3, 64, 32
# Passes over the operands: float32 is three products of TF32, and a TF32 product takes twice the
# time of one of 16-bit numbers.
PASSES = {"half": 1, "tf32": 1, "float32": 3}


@dataclasses.dataclass(frozen=True)
class Product:
    """A block of a matrix product: what one trip of the main loop multiplies.

    Attributes:
        rows, columns, depth: of the block and the trip.
        taps: blocks per program that share one operand.
        passes: products per number, for float32.
        warps: of a program.
        size: bytes of a number.
    """

    rows: int
    columns: int
    depth: int
    taps: int
    passes: int
    warps: int
    size: int

    @property
    def search(self) -> sass.Search:
        """The same as the reader of main loops takes it."""
        depth = 16 if self.size == 2 else 8
        return sass.Search(
            products=self.depth * self.taps * self.passes,
            warp_pairs=self.rows * self.columns // self.warps,
            tcgen05_products=min(128, self.rows) * self.columns * depth // self.warps,
        )


def shipped_launches() -> Iterator[tuple[str, int, Launch, Product | None]]:
    """Every kernel in its shipped configurations: name, capability, launch, and its product."""
    from fastvq.kernels.triton import masked_conv2d as kernels

    for capability in (80, 90, 100):
        for arithmetic, dtype in ARITHMETIC.items():
            with (
                mock.patch.object(kernels, "arithmetic_of", return_value=arithmetic),
                mock.patch.object(kernels, "_capability", return_value=divmod(capability, 10)),
                mock.patch.object(kernels, "_wanted_programs", return_value=132),
                record_launches() as launches,
            ):
                _launch_all(dtype, gated=arithmetic == "half")
            seen = set()
            for launch in launches:
                name = _name(launch)
                if name in seen or ("sum_parts" in name and (capability, dtype) != (90, dtype)):
                    continue
                seen.add(name)
                product = _product(launch, arithmetic, torch.finfo(dtype).bits // 8)
                yield f"conv {name} {arithmetic}", capability, launch, product


def _name(launch: Launch) -> str:
    name = launch.name.removeprefix("masked_conv2d_").removesuffix("kernel").strip("_")
    stack = launch.keywords.get("STACK")
    name = (name or "taps") + ("" if stack is None else (" vertical", " horizontal")[stack])
    return name + " conditioned" * bool(launch.keywords.get("HAS_CLASS"))


def _launch_all(dtype: torch.dtype, gated: bool) -> None:
    from fastvq.kernels.triton import gated_masked_conv as layer
    from fastvq.kernels.triton import masked_conv2d as kernels

    def picture(channels: int) -> torch.Tensor:
        size = (BATCH, channels, SIZE, SIZE)
        return torch.empty(size, dtype=dtype, memory_format=torch.channels_last)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    x, weight = picture(CHANNELS), empty(CHANNELS, CHANNELS, KERNEL, KERNEL)
    kernels.masked_conv2d_forward(x, weight, weight[:, 0, 0, 0], "B", 1)
    kernels.masked_conv2d_backward_weight(x, x, (KERNEL, KERNEL), "B", 1)
    if gated:
        c, both = CHANNELS, 2 * CHANNELS
        weights = [
            *(empty(both, c, KERNEL // 2 + 1, KERNEL), empty(both)),
            *(empty(both, c, 1, KERNEL), empty(both)),
            *(empty(both, both, 1, 1), empty(both), empty(c, c, 1, 1), empty(c)),
        ]
        seed = torch.empty((), dtype=torch.int64)
        given = (empty(BATCH, 2 * both), picture(CHANNELS), empty(2 * both, CHANNELS, 1, 1))
        for added in ((None, None, None), given):
            told = layer.Layer(seed, 0.1, "B", 1, True, x, x, *added, weights)
            layer.gated_masked_conv_forward(told)
            layer.gated_masked_conv_backward(x, x, picture(both), [True] * 3, told)


def _product(launch: Launch, arithmetic: str, size: int) -> Product | None:
    """What a launch multiplies; None where it adds, or multiplies in several loops."""
    told = launch.keywords
    shared = (PASSES[arithmetic], told.get("num_warps", 4), size)
    if launch.name == "masked_conv2d_kernel":
        return Product(told["BLOCK_P"], told["BLOCK_O"], told["BLOCK_C"], 1, *shared)
    if launch.name == "masked_conv2d_grad_weight_kernel":
        blocks = told["BLOCK_O"], told["BLOCK_C"], told["BLOCK_P"]
        return Product(*blocks, told["GROUP"], *shared)
    return None


def predicted(product: Product, issued: float, cached: bool) -> dict[str, tuple[float, float]]:
    """µs of a forward pass in bf16 of 65536 pixels, and of cuDNN on the whole kernel at its best.

    Args:
        product: of the compiled convolution.
        issued: instructions per result and trip of the main loop.
        cached: whether what neighbouring taps see comes from the L1 cache.
    """
    clock = predict.MULTIPROCESSORS * predict.CLOCK_HZ
    pixels = BATCH * SIZE * SIZE
    pairs = product.rows * product.columns
    l2_bytes = product.size * product.depth * (product.columns + product.rows * (not cached))
    step = predict.OVERHEAD * max(
        2 * pairs * product.depth / (predict.MATRIX_FLOPS / clock),
        pairs * issued / predict.ISSUE_LANES,
        l2_bytes / (predict.L2_BYTES_PER_S / clock),
    )
    found = {}
    for kernel in (3, 5, 7):
        for channels in (64, 128, 256, 512):
            blocks = math.ceil(pixels / product.rows) * math.ceil(channels / product.columns)
            waves = math.ceil(blocks / predict.MULTIPROCESSORS)
            trips = (kernel * kernel // 2 + 1) * math.ceil(channels / product.depth)
            whole = 2 * pixels * (channels * kernel) ** 2 / predict.MATRIX_FLOPS
            traffic = 2 * pixels * channels * product.size / predict.DRAM_BYTES_PER_S
            ours = max(waves * trips * step / predict.CLOCK_HZ, traffic)
            name = f"{kernel}×{kernel}, {channels} channels"
            found[name] = (ours * 1e6, max(whole, traffic) * 1e6)
    return found
