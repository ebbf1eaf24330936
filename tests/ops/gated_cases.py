"""Inputs of gated_masked_conv, and bounds on the errors of its results and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ops.winograd_sizes import roundings, winograd_sizes
from tolerances import UNIT_ROUNDOFF
from torch import Tensor

from fastvq import ops
from fastvq.ops import GatedWeights
from fastvq.reference import gated_masked_conv as reference

ADDED = ("class_bias", "condition", "condition_weight")


@dataclass
class Case:
    """One call: shapes and options; the tensors follow from them."""

    channels: int
    kernel: int
    mask_type: str
    dilation: int
    size: tuple[int, int]
    dropout: float = 0.0
    batch: int = 2
    condition: int = 3  # channels; 0 leaves class and map away
    residual: bool = True
    winograd: bool = False  # large enough for the C++ kernels to filter its float32 convolutions

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        c, k, e = self.channels, self.kernel, self.condition
        rows = k // 2 + (self.mask_type == "B")
        shapes: dict[str, tuple[int, ...]] = {
            "vertical": (self.batch, c, *self.size),
            "horizontal": (self.batch, c, *self.size),
        }
        if e:
            shapes["class_bias"] = (self.batch, 4 * c)
            shapes["condition"] = (self.batch, e, *self.size)
            shapes["condition_weight"] = (4 * c, e, 1, 1)
        weights = ((2 * c, c, rows, k), (2 * c, c, 1, k), (2 * c, 2 * c, 1, 1), (c, c, 1, 1))
        for index, shape in enumerate(weights):
            shapes[GatedWeights._fields[2 * index]] = shape
            shapes[GatedWeights._fields[2 * index + 1]] = shape[:1]
        generator = torch.Generator().manual_seed(7)
        made = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        for name, tensor in made.items():
            if name.endswith("_weight"):
                tensor /= tensor[0].numel() ** 0.5
        return {name: tensor.to(dtype) for name, tensor in made.items()}

    @property
    def seed(self) -> Tensor | None:
        return torch.tensor(-(2**62) + 12345) if self.dropout else None

    @property
    def options(self) -> dict[str, object]:
        return {
            "mask_type": self.mask_type,
            "dilation": self.dilation,
            "dropout": self.dropout,
            "residual": self.residual,
        }


def arguments(tensors: dict[str, Tensor]) -> tuple[tuple, dict[str, Tensor]]:
    """What `ops.gated_masked_conv` takes first, and what it takes by name."""
    weights = GatedWeights(*(tensors[name] for name in GatedWeights._fields))
    by_name = {name: tensors[name] for name in ADDED if name in tensors}
    return (tensors["vertical"], tensors["horizontal"], weights), by_name


def upstream(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Gradients to both outputs."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, case.batch, case.channels, *case.size)
    # Rounded to the coarsest dtype first: the same numbers whatever the dtype.
    made = torch.randn(shape, generator=generator).bfloat16().half()
    return list(made.to(dtype))


def results(case: Case, tensors: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs and gradients by name; `truth` takes them from the reference."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    first, by_name = arguments(leaves)
    device = first[0].device
    seed = case.seed if case.seed is None else case.seed.to(device)
    if options.pop("truth", False):
        values = (by_name.get(name) for name in ADDED)
        outputs = reference.gated_masked_conv(*first, *values, seed, **case.options)
    else:
        outputs = ops.gated_masked_conv(*first, **by_name, **case.options, seed=seed, **options)
    grads = [grad.to(device) for grad in upstream(case, outputs[0].dtype)]
    found = {"out_vertical": outputs[0].detach(), "out_horizontal": outputs[1].detach()}
    return found | dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads)))


CASES = [
    Case(5, 3, "A", 1, (7, 6), dropout=0.3),
    Case(16, 3, "B", 2, (2, 5)),
    Case(17, 5, "B", 1, (1, 4), dropout=0.5, residual=False),
    Case(3, 3, "A", 4, (3, 1), condition=0, residual=False),
    Case(1, 3, "B", 1, (1, 1), condition=0, batch=1),
    Case(8, 7, "B", 1, (13, 12), condition=0),
    Case(24, 3, "B", 1, (16, 17), dropout=0.2, batch=4, condition=2, winograd=True),
    Case(16, 5, "A", 1, (13, 12), batch=7, condition=0, winograd=True),
]


class Arithmetic(NamedTuple):
    """Where and how a backend rounds; u are units of roundoff of float32.

    Attributes:
        sums: u per term of a sum.
        products: u that a product is off by before it is added.
        gate: u of the gate and its slopes, absolute, as all are at most 1; dropout's scale and the
            product with a gradient included.
        stores: units of roundoff of the dtype that storing a number costs.
        between: how often h', what class and map add, and the gradient to what was gated are
            stored before they are used.
    """

    sums: int
    products: int
    gate: int
    stores: int
    between: int


# The gate's kernel keeps 8 (tests/kernels/test_cpu_gated_activation.py). What is added onto a
# tensor that is there is stored twice.
CPP = Arithmetic(sums=1, products=0, gate=12, stores=1, between=2)
# Matrix units may truncate sums. Products of float32 are three of TF32. A slope is within 17 u of
# kernels/triton/gated_masked_conv_gate.py's e and r, a gate's half within 8, products and scale add
# 5. The interpreter casts to bfloat16 towards zero. What stays in registers is not rounded.
TRITON = Arithmetic(sums=2, products=12, gate=30, stores=2, between=0)


def error_bounds(
    case: Case,
    tensors: dict[str, Tensor],
    grads: list[Tensor],
    dtype: torch.dtype,
    rounds: Arithmetic = CPP,
) -> dict[str, Tensor]:
    """First-order running error analysis of the layer in `dtype`, sums in float32.

    κ(n) M bounds the error of a sum of n terms whose sizes add up to M, stored at most twice in
    `dtype`; an error that is there already passes on through the absolute values of what multiplies
    it. The gate moves by at most its features' errors, and so do its slopes: both have derivatives
    below 1. Names are the arguments', and "out_vertical", "out_horizontal".
    """
    u, u_out = UNIT_ROUNDOFF[torch.float32], rounds.stores * UNIT_ROUNDOFF[dtype]
    t = {name: tensor.double() for name, tensor in tensors.items()}
    size = {name: tensor.abs() for name, tensor in t.items()}
    c, d = case.channels, case.dilation
    pixels = case.batch * case.size[0] * case.size[1]
    filtered = case.winograd and dtype == torch.float32 and rounds is CPP
    gate, scale = rounds.gate * u + u_out, 1.0 / (1.0 - case.dropout) if case.dropout < 1 else 0.0

    def kappa(terms: int, stored: int = 2) -> float:
        summed = roundings(terms) if filtered else terms + 2
        return (rounds.sums * summed + rounds.products) * u + stored * u_out

    def conv_v(x: Tensor, w: Tensor) -> Tensor:
        reach, below = d * (case.kernel // 2), 0 if case.mask_type == "B" else d
        if filtered:
            return winograd_sizes(x, w, (-reach, -reach))
        seen = F.pad(x, (reach, reach, reach, d))[:, :, : x.shape[2] + reach - below]
        return F.conv2d(seen, w, dilation=d)

    def conv_h(x: Tensor, w: Tensor) -> Tensor:
        live = case.kernel // 2 + (case.mask_type == "B")
        if filtered and live > 1:
            return winograd_sizes(x, w[..., :live], (0, -d * (case.kernel // 2)))
        seen = F.pad(x, (d * (case.kernel // 2), 0, 0, 0))
        seen = seen[..., : x.shape[3] + (live - 1) * d]
        return F.conv2d(seen, w[..., :live], dilation=d)

    def back(conv, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        return torch.autograd.grad(conv(x, w), (x, w), g)

    def bias(name: str) -> Tensor:
        return size[name][:, None, None]

    point = F.conv2d
    more = torch.zeros(case.batch, 4 * c, *case.size, dtype=torch.float64)
    if "condition" in size:
        more = more + point(size["condition"], size["condition_weight"])
    if "class_bias" in size:
        more = more + size["class_bias"][:, :, None, None]
    more_v, more_h = more.chunk(2, dim=1)
    taps = case.kernel * case.kernel * c
    size_v = conv_v(size["vertical"], size["vertical_weight"]) + bias("vertical_bias")
    error_v = kappa(taps) * size_v
    own = conv_h(size["horizontal"], size["horizontal_weight"]) + bias("horizontal_bias")
    size_h = own + point(size_v, size["link_weight"]) + bias("link_bias")
    error_h = kappa(taps + 2 * c, rounds.between) * size_h + point(error_v, size["link_weight"])
    # What the features of a gate are off by, both halves, once class and map are added.
    added, onto = kappa(case.condition + 2, rounds.between), kappa(case.condition, stored=0)
    off_v, off_h = (
        sum((error + added * more + onto * whole).chunk(2, dim=1))
        for error, more, whole in ((error_v, more_v, size_v), (error_h, more_h, size_h))
    )
    gated_v, gated_h = (scale * (off + gate) for off in (off_v, off_h))
    g_v, g_h = (grad.double().abs() for grad in grads)
    size_out = scale * size["out_weight"].sum(dim=1) + bias("out_bias")
    size_out = size_out + size["horizontal"]
    found = {
        "out_vertical": gated_v,
        "out_horizontal": point(gated_h, size["out_weight"]) + kappa(c + 2) * size_out,
    }
    one = torch.ones_like(g_h)
    size_y, grad_w_o = back(point, g_h, scale * one, size["out_weight"])
    _, error_w_o = back(point, g_h, gated_h, size["out_weight"])
    found["out_weight"] = error_w_o + kappa(pixels) * grad_w_o
    found["out_bias"] = kappa(pixels) * g_h.sum(dim=(0, 2, 3))
    slopes_h = scale * torch.cat([size_y] * 2, dim=1)  # bounds the gradient to h'
    slopes_v = scale * torch.cat([g_v] * 2, dim=1)
    error_gh = slopes_h * (torch.cat([off_h] * 2, dim=1) + gate + kappa(c, rounds.between))
    error_gv = slopes_v * (torch.cat([off_v] * 2, dim=1) + gate)

    def parameters(conv, name: str, x: str | None, g: Tensor, e: Tensor, seen, off) -> None:
        weight = size[f"{name}_weight"]
        error_x, error_w = back(conv, e, seen, weight)
        size_x, size_w = back(conv, g, seen, weight)
        found[f"{name}_weight"] = error_w + kappa(pixels) * size_w
        if off is not None:
            found[f"{name}_weight"] += back(conv, g, off, weight)[1]
        if x is not None:
            found[x] = error_x + kappa(2 * taps + 4 * c) * size_x
        if f"{name}_bias" in size:
            total = (e + kappa(pixels + 2 * c) * g).sum(dim=(0, 2, 3))
            found[f"{name}_bias"] = total

    both_g, both_e = (
        torch.cat(pair, dim=1) for pair in ((slopes_v, slopes_h), (error_gv, error_gh))
    )
    if "condition" in size:
        parameters(point, "condition", "condition", both_g, both_e, size["condition"], None)
    if "class_bias" in size:
        found["class_bias"] = (both_e + kappa(pixels) * both_g).sum(dim=(2, 3))
    parameters(point, "link", None, slopes_h, error_gh, size_v, error_v)
    parameters(conv_h, "horizontal", "horizontal", slopes_h, error_gh, size["horizontal"], None)
    found["horizontal"] = found["horizontal"] + kappa(2) * g_h
    through, _ = back(point, slopes_h, size_v, size["link_weight"])
    error_through, _ = back(point, error_gh, size_v, size["link_weight"])
    grad_v = slopes_v + through
    error_gv = error_gv + error_through + kappa(2 * c) * grad_v
    parameters(conv_v, "vertical", "vertical", grad_v, error_gv, size["vertical"], None)
    return found
