"""The gated layer's Triton kernels against the reference in float64, gradients of all inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.gated_cases import ADDED, TRITON, Case, arguments, error_bounds, results, upstream
from tolerances import assert_within
from torch import Tensor

from fastvq import ops

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("without_tf32")

EVERYTHING = Case(5, 3, "B", 1, (4, 5), dropout=0.3)
CASES = {  # by name: the call, and what of it is left away
    "all": (EVERYTHING, ()),
    "two blocks": (Case(18, 5, "A", 2, (3, 4), 0.6, condition=17, residual=False), ()),
    "neither": (Case(17, 3, "A", 1, (2, 3), batch=1, condition=0), ()),
    "class": (Case(3, 3, "B", 2, (1, 7)), ADDED[1:]),
    "map": (Case(2, 7, "A", 1, (2, 1), batch=1, condition=17), ADDED[:1]),
    "all dropped": (Case(4, 3, "B", 1, (2, 2), 1.0), ()),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(CASES, (torch.float32, torch.bfloat16)),
        ("all", torch.float16),  # one case shows that the dtype is read and written
    ],
    ids=str,
)
def test_outputs_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    case, left_away = CASES[name]
    tensors = case.tensors(dtype)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_away}
    truth = results(case, {key: t.double() for key, t in tensors.items()}, truth=True)
    bounds = error_bounds(case, tensors, upstream(case, torch.float64), dtype, TRITON)
    there = {key: tensor.to(device) for key, tensor in tensors.items()}
    for key, found in results(case, there, backend="triton").items():
        assert found.dtype == dtype
        assert_within(found.cpu(), truth[key], bounds[key])


def _on(device: str, case: Case) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in case.tensors().items()}


def test_dropout_drops_what_the_reference_drops(device: str) -> None:
    tensors = EVERYTHING.tensors()
    dropped = results(EVERYTHING, tensors, truth=True)["out_vertical"] == 0
    assert 0.1 < dropped.double().mean() < 0.5
    ours = results(EVERYTHING, _on(device, EVERYTHING), backend="triton")["out_vertical"]
    assert torch.equal(ours.cpu() == 0, dropped)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_the_future_may_hold_anything(mask_type: str, device: str) -> None:
    case = Case(3, 3, mask_type, 1, (4, 5), batch=1, condition=0, residual=False)
    tensors = _on(device, case)
    plain = results(case, tensors, backend="triton")
    masked = torch.arange(3, device=device) >= 1 + (mask_type == "B")
    poisoned = torch.where(masked, torch.nan, tensors["horizontal_weight"])
    again = results(case, {**tensors, "horizontal_weight": poisoned}, backend="triton")
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    raster = torch.arange(20, device=device).view(4, 5)
    rows_below = raster // 5 >= 2 + (mask_type == "B")
    after = raster >= 12 + (mask_type == "B")
    future = {
        "vertical": torch.where(rows_below, torch.nan, tensors["vertical"]),
        "horizontal": torch.where(after, torch.nan, tensors["horizontal"]),
    }
    first, _ = arguments({**tensors, **future})
    seen = ops.gated_masked_conv(*first, mask_type=mask_type, backend="triton")
    assert torch.equal(seen[0][..., :3, :], plain["out_vertical"][..., :3, :])
    assert torch.equal(seen[1][..., raster <= 12], plain["out_horizontal"][..., raster <= 12])
    assert seen[0][..., 3, :].isnan().all()


def test_repeatable_and_any_strides(device: str) -> None:
    case = Case(4, 3, "B", 1, (3, 5), condition=2)
    tensors = _on(device, case)
    first = results(case, tensors, backend="triton")
    last = {
        name: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
        for name, t in tensors.items()
    }
    turned = {
        name: t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2]
        for name, t in tensors.items()
    }
    for strided in (tensors, last, turned):
        again = results(case, strided, backend="triton")
        assert all(torch.equal(again[name], value) for name, value in first.items())
