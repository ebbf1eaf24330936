"""Masked convolutions of other code before and after `replace_modules`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn

import fastvq


def causal_mask(mask_type: str, height: int, width: int) -> Tensor:
    mask = torch.ones(height, width)
    mask[height // 2, width // 2 + (mask_type == "B") :] = 0
    mask[height // 2 + 1 :] = 0
    return mask


class InPlace(nn.Conv2d):
    """Writes zeros into its weight before every forward."""

    def __init__(self, mask_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", self.weight.data.clone())
        self.mask.copy_(causal_mask(mask_type, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class Multiplied(nn.Conv2d):
    """Multiplies in the graph, by a mask that is broadcast."""

    def __init__(self, mask_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask_type = mask_type
        mask = causal_mask(mask_type, *self.kernel_size)
        self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.mask
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class NotTrained(Multiplied):
    """Keeps its mask among the parameters."""

    def __init__(self, mask_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(mask_type, *args, **kwargs)
        mask = self.mask.clone()
        del self.mask
        self.mask = nn.Parameter(mask, requires_grad=False)


class Doubled(Multiplied):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


SHAPES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 5, 3), {"padding": 1}),
    ((4, 2, 7), {"padding": "same", "bias": False}),
    ((3, 5, (3, 5)), {"padding": (1, 2)}),
    ((3, 4, 3), {"padding": 2, "dilation": 2}),
    ((2, 3, 1), {}),
]


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize(("args", "kwargs"), SHAPES)
@pytest.mark.parametrize("cls", [InPlace, Multiplied, NotTrained])
def test_outputs_gradients_and_keys_are_equal(
    cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mask_type: str
) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(cls(mask_type, *args, **kwargs), nn.ReLU()).double()
    ours = copy.deepcopy(host)
    (report,) = fastvq.replace_modules(ours)
    assert report.replaced, str(report)
    assert str(report) == f"0: {cls.__name__} (masked convolution): replaced"
    assert isinstance(ours[0], fastvq.MaskedConv2d)
    assert ours[0].mask_type == mask_type
    assert list(ours.state_dict()) == list(host.state_dict())
    ours.load_state_dict(host.state_dict())
    x = torch.randn(2, args[0], 6, 5, dtype=torch.float64)
    results = []
    for model in (host, ours):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        live = causal_mask(mask_type, *model[0].kernel_size)
        bias = model[0].bias
        gradients = [leaf.grad, model[0].weight.grad * live, None if bias is None else bias.grad]
        results.append([y, *[grad for grad in gradients if grad is not None]])
    assert (ours[0].weight.grad * (1 - live)).abs().max() == 0
    for mine, theirs in zip(*results):
        terms = mine[0].numel() + host[0].weight.numel() + x.numel()
        bound = 2 * terms * UNIT_ROUNDOFF[torch.float64] * (1 + theirs.abs().max().item())
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max().item() <= bound


def test_weight_and_mask_stay_the_same_tensors() -> None:
    model = nn.Sequential(InPlace("A", 3, 4, 3, padding=1))
    weight, mask = model[0].weight.requires_grad_(False), model[0].mask
    fastvq.replace_modules(model)
    assert model[0].weight is weight
    assert model[0].mask is mask
    assert copy.deepcopy(model)(torch.randn(1, 3, 4, 4)).shape == (1, 4, 4, 4)
    half = model.bfloat16()
    assert half(torch.randn(1, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


def _with_mask(change: Callable[[Tensor], None], **options: Any) -> nn.Module:
    module = InPlace("B", 3, 6, 3, **{"padding": 1, **options})
    change(module.mask)
    return module


def _weight_normed() -> nn.Module:
    module = Multiplied("A", 3, 3, 3, padding=1)
    nn.utils.parametrizations.weight_norm(module)
    return module


def _weight_normed_by_hook() -> nn.Module:
    return nn.utils.weight_norm(Multiplied("A", 3, 3, 3, padding=1))


def _trained() -> nn.Module:
    module = NotTrained("A", 3, 3, 3, padding=1)
    module.mask.requires_grad_(True)
    return module


def _channels(mask: Tensor) -> None:
    mask[0, 0, 1, 1] = 0


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "channels": (lambda: _with_mask(_channels), "differs between channels"),
    "other mask": (lambda: _with_mask(lambda mask: mask.fill_(1)), "neither of type A nor"),
    "stride": (lambda: _with_mask(lambda mask: None, stride=2), "stride"),
    "groups": (lambda: InPlace("A", 4, 4, 3, padding=1, groups=2), "groups"),
    "padding": (lambda: _with_mask(lambda mask: None, padding=0), "its padding is (0, 0)"),
    "padding mode": (
        lambda: _with_mask(lambda mask: None, padding_mode="circular"),
        "'circular', not 'zeros'",
    ),
    "even": (lambda: InPlace("A", 3, 3, 2, padding=1), "is even"),
    "weight norm": (_weight_normed, "it has a parametrization"),
    "weight norm by hook": (_weight_normed_by_hook, "it has hooks"),
    "trained": (_trained, "its mask is trained"),
    "more than a masked convolution": (
        lambda: Doubled("A", 3, 3, 3, padding=1),
        "it computes something else in evaluation",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LEFT)
def test_other_masks_are_left_with_the_reason(name: str) -> None:
    build, reason = LEFT[name]
    model = nn.ModuleDict({"conv": build()})
    before = model["conv"]
    (report,) = fastvq.replace_modules(model)
    assert not report.replaced
    assert reason in str(report)
    assert str(report).startswith("conv: ")
    assert model["conv"] is before


def test_plain_convolutions_and_our_own_are_not_mentioned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), fastvq.MaskedConv2d(3, 3, 3))
    assert fastvq.replace_modules(model) == []
