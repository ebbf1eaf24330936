"""The gated layer's Triton kernels against the reference in float64, gradients of all inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import UNIT_ROUNDOFF, assert_within
from torch import Tensor

from fastvq import ops
from fastvq.ops.gated_masked_conv import GatedWeights

pytest.importorskip("triton")

# shape, kernel, mask type, dilation, condition's channels, class labels, dropout
EVERYTHING = ((2, 5, 4, 5), 3, "B", 1, 3, True, 0.3)
CASES = [
    EVERYTHING,
    ((1, 18, 3, 4), 5, "A", 2, 0, False, 0.0),
    ((2, 3, 1, 7), 3, "B", 2, 0, True, 0.0),
    ((1, 2, 2, 1), 7, "A", 1, 17, False, 1.0),
]
NAMES = ["vertical", "horizontal", "class_bias", "condition", "condition_weight"]
NAMES += GatedWeights._fields


@pytest.fixture(autouse=True)
def _float32_products_keep_24_bits():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _tensors(shape, kernel, mask_type, inputs, with_class) -> dict[str, Tensor | None]:
    batch, channels, height, width = shape
    both, rows = 2 * channels, kernel // 2 + (mask_type == "B")
    small = 0.5 / channels**0.5
    shapes = [(both, channels, rows, kernel), (both,), (both, channels, 1, kernel), (both,)]
    shapes += [(both, both, 1, 1), (both,), (channels, channels, 1, 1), (channels,)]
    tensors: list[Tensor | None] = [
        torch.randn(shape),
        torch.randn(shape),
        torch.randn(batch, 2 * both) if with_class else None,
        torch.randn(batch, inputs, height, width) if inputs else None,
        torch.randn(2 * both, inputs, 1, 1) * small if inputs else None,
        *(torch.randn(size) * small for size in shapes),
    ]
    return dict(zip(NAMES, tensors))


def _run(tensors, grads, backend, **options) -> dict[str, Tensor]:
    """Both outputs, and the gradient of every input that is there."""
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    out = ops.gated_masked_conv(
        *(leaves["vertical"], leaves["horizontal"]),
        GatedWeights(*(leaves[name] for name in GatedWeights._fields)),
        **{name: leaves[name] for name in NAMES[2:5]},
        backend=backend,
        **options,
    )
    there = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(out, list(there.values()), grads)
    return {"out_v": out[0].detach(), "out_h": out[1].detach(), **dict(zip(there, found))}


def _both(case, device: str, dtype: torch.dtype) -> tuple[dict, dict]:
    shape, kernel, mask_type, dilation, inputs, with_class, dropout = case
    tensors = _tensors(shape, kernel, mask_type, inputs, with_class)
    tensors = {k: None if t is None else t.to(device, dtype) for k, t in tensors.items()}
    grads = [torch.randn(shape).to(device, dtype) for _ in range(2)]
    options = {
        "mask_type": mask_type,
        "dilation": dilation,
        "dropout": dropout,
        "seed": torch.tensor(-(2**62) + 12345, device=device) if dropout else None,
        "residual": mask_type == "B",
    }
    ours = _run(tensors, grads, "triton", **options)
    wide = {k: None if t is None else t.double() for k, t in tensors.items()}
    return ours, _run(wide, [g.double() for g in grads], "reference", **options)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *itertools.product(CASES, (torch.float32, torch.bfloat16)),
        (EVERYTHING, torch.float16),  # one case shows that the dtype is read and written
    ],
    ids=str,
)
def test_outputs_and_gradients(case, dtype: torch.dtype, device: str) -> None:
    ours, truth = _both(case, device, dtype)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        # A chain of at most 5 products (convolution, link, gate, 1×1, convolution back), each
        # adding up at most n terms of the size of what it is fed with in float32, where matrix
        # units may truncate, and rounded when it is stored: twice the error of rounding in the
        # interpreter. The weights keep every stage near size 1; sums over pixels add up errors as
        # they add up terms.
        (batch, channels, height, width), kernel = case[0], case[1]
        terms = 2 * channels * kernel * (kernel + 1) + case[4]
        stage = 2 * (terms + 12) * UNIT_ROUNDOFF[torch.float32] + 2 * UNIT_ROUNDOFF[dtype]
        size = 1.0 + float(expected.abs().max())
        pixels = batch * height * width
        summed = name not in ("out_v", "out_h", "vertical", "horizontal", "condition")
        bound = 5 * stage * size * (pixels**0.5 if summed else 1.0)
        assert_within(ours[name], expected, torch.full_like(expected, bound))
        assert ours[name].dtype == dtype


def test_dropout_drops_what_the_reference_drops(device: str) -> None:
    ours, truth = _both(EVERYTHING, device, torch.float32)
    dropped = truth["out_v"] == 0
    assert 0.1 < dropped.double().mean() < 0.5
    assert torch.equal(ours["out_v"] == 0, dropped)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_the_future_may_hold_anything(mask_type: str, device: str) -> None:
    tensors = _tensors((1, 3, 4, 5), 3, mask_type, 0, False)
    tensors = {k: None if t is None else t.to(device) for k, t in tensors.items()}
    options = {"mask_type": mask_type, "backend": "triton"}

    def run(**changed: Tensor) -> tuple[Tensor, Tensor]:
        now = {**tensors, **changed}
        weights = GatedWeights(*(now[name] for name in GatedWeights._fields))
        return ops.gated_masked_conv(now["vertical"], now["horizontal"], weights, **options)

    plain = run()
    masked = torch.arange(3, device=device) >= 1 + (mask_type == "B")
    poisoned = torch.where(masked, torch.nan, tensors["horizontal_weight"])
    raster = torch.arange(20, device=device).view(4, 5)
    rows_below = raster // 5 >= 2 + (mask_type == "B")
    after = raster >= 12 + (mask_type == "B")
    seen = run(
        horizontal_weight=poisoned,
        vertical=torch.where(rows_below, torch.nan, tensors["vertical"]),
        horizontal=torch.where(after, torch.nan, tensors["horizontal"]),
    )
    assert torch.equal(seen[0][..., :3, :], plain[0][..., :3, :])
    assert torch.equal(seen[1][..., raster <= 12], plain[1][..., raster <= 12])
    assert seen[0][..., 3, :].isnan().all()


def test_repeatable_and_any_strides(device: str) -> None:
    tensors = _tensors((2, 4, 3, 5), 3, "B", 2, True)
    tensors = {k: None if t is None else t.to(device) for k, t in tensors.items()}
    grads = [torch.randn(2, 4, 3, 5, device=device) for _ in range(2)]
    options = {"mask_type": "B", "residual": True, "backend": "triton"}
    first = _run(tensors, grads, **options)
    last = {
        name: t.to(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t
        for name, t in tensors.items()
    }
    for again in (_run(tensors, grads, **options), _run(last, grads, **options)):
        assert all(torch.equal(again[name], value) for name, value in first.items())
