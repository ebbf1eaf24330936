"""Which tiles a masked convolution takes, how it multiplies, and where another is faster.

Data, never tuned on a call: configs/masked_conv2d.json holds per architecture, kernel and
arithmetic a list of tiles, from the fewest output channels to the most, and from how many channels
and live taps on the vendor's convolution over the live taps is expected to be faster.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import triton

CONFIGURATIONS = Path(__file__).with_name("configs") / "masked_conv2d.json"
# Architecture → kernel → arithmetic → list of tiles' attributes. Read once, on import, so that
# torch.compile can follow a choice.
SHIPPED: dict[str, Any] = json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))
# The narrowest block that the matrix unit's instructions fill.
LEAST_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Compile-time choices of one kernel.

    Attributes:
        max_channels: the most output channels it serves; None: any number.
        rows: of a program's block of results: pixels, or output channels of a weight's gradient.
        columns: of that block: output channels, or input channels of a weight's gradient.
        depth: summed over at a time: input channels, or pixels for a weight's gradient.
        warps: of a program.
        stages: blocks of operands in flight.
        taps: of a program of a weight's gradient.
    """

    max_channels: int | None = None
    rows: int = 64
    columns: int = 32
    depth: int = 64
    warps: int = 4
    stages: int = 2
    taps: int = 2

    def fitted(self, rows: int, columns: int, depth: int) -> Tiles:
        """The same with no block much larger than the problem."""
        return dataclasses.replace(
            self,
            rows=_fit(self.rows, rows),
            columns=_fit(self.columns, columns),
            depth=_fit(self.depth, depth),
        )


def _fit(block: int, size: int) -> int:
    return min(block, max(LEAST_BLOCK, triton.next_power_of_2(size)))


def choose_tiles(
    kernel: str, arithmetic: str, capability: tuple[int, int] | None, size: tuple[int, int, int]
) -> Tiles:
    """The tiles of a kernel; without a GPU (the interpreter) the default's.

    Args:
        kernel: "convolution", "grad_weight", or "gate" and "gate_backward", of whose columns half
            are the gate's.
        arithmetic: of `arithmetic_of`.
        capability: of the device, or None.
        size: rows, columns and depth of the whole product.
    """
    if capability is None:
        return Tiles().fitted(*size)
    for entry in SHIPPED[_architecture(capability)][kernel][arithmetic]:
        tiles = Tiles(**entry)
        if tiles.max_channels is None or size[1] <= tiles.max_channels:
            break
    return tiles.fitted(*size)


def _architecture(capability: tuple[int, int]) -> str:
    """The data file's name for a compute capability; gaming parts have less shared memory."""
    exact = f"sm_{capability[0]}{capability[1]}"
    return exact if exact in SHIPPED else "sm_100" if capability[0] == 10 else "sm_86"


def vendor_is_faster(x: Tensor, weight: Tensor, capability: tuple[int, int]) -> bool:
    """Whether two vendor's convolutions, one per rectangle of live taps, are expected to win.

    They pad, cut and add up pictures, which costs the less beside the products the more of these
    there are; and their products are formed faster. Float32 stays here: where TF32 is not allowed,
    the vendor's convolutions of float32 do without the matrix unit.
    """
    rule = SHIPPED[_architecture(capability)]["vendor"]
    taps = math.prod(weight.shape[2:]) // 2 + 1
    wide = min(weight.shape[:2]) >= rule["channels"] and taps >= rule["taps"]
    return wide and x.dtype != torch.float32


def arithmetic_of(x: Tensor) -> str:
    """How products of x are formed: "half", "tf32", or "float32", which keeps 24 bits.

    TF32 rounds the operands to 11 bits. Only the switch that PyTorch's own convolutions obey
    allows it.
    """
    if x.dtype != torch.float32:
        return "half"
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:  # PyTorch before 2.9
        return "tf32" if torch.backends.cudnn.allow_tf32 else "float32"
    return "tf32" if conv.fp32_precision == "tf32" else "float32"
