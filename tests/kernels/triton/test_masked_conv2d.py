"""masked_conv2d and causal_conv1d on the Triton kernels, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_within, rounding_bound, sum_bound
from torch import Tensor

from fastvq import ops
from fastvq.reference.masked_conv2d import masked_conv2d as reference

kernels = pytest.importorskip("fastvq.kernels.triton.masked_conv2d", reason="needs triton")
tiles = pytest.importorskip("fastvq.kernels.triton.masked_conv2d_tiles")
pytestmark = pytest.mark.usefixtures("without_tf32")

CASES = [  # x, O, kernel, mask type, dilation: ragged blocks, pictures smaller than the kernel
    ((2, 5, 6, 9), 7, (3, 3), "A", 1),
    ((1, 70, 3, 5), 36, (5, 3), "B", 2),
    ((3, 3, 1, 1), 4, (3, 3), "B", 1),
    ((2, 3, 2, 3), 20, (7, 7), "B", 1),
    ((1, 4, 13, 2), 3, (3, 7), "A", 3),
    ((2, 3, 4, 4), 2, (1, 1), "B", 1),
    ((2, 3, 4, 4), 2, (1, 1), "A", 1),
    ((1, 18, 1, 90), 33, (1, 5), "B", 4),
    ((13, 3, 5, 3), 2, (3, 3), "B", 1),  # blocks of pixels begin at any row and column
]


def _tensors(shape, out_channels, kernel, device, dtype=torch.float32) -> tuple[Tensor, ...]:
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, shape[1], *kernel)
    bias, grad = torch.randn(out_channels), torch.randn(shape[0], out_channels, *shape[2:])
    return tuple(t.to(device, dtype) for t in (x, weight, bias, grad))


def _value_and_gradients(x, weight, bias, grad, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = ops.masked_conv2d(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _bounds(x, weight, bias, grad, truths, dtype, **options) -> list[Tensor]:
    """A float32 sum of n products each, matrix units may truncate; then rounded to `dtype`."""
    sizes = _value_and_gradients(
        *(t.double().abs() for t in (x, weight, bias, grad)), backend="reference", **options
    )
    taps = weight[0, 0].numel() // 2 + 1
    pixels = x[:, 0].numel()
    counts = [taps * x.shape[1] + 1, taps * weight.shape[0], pixels, pixels]
    # The interpreter casts to bfloat16 towards zero, twice the error of rounding. The products of
    # float32 are three of TF32, off by 12 units in the last place.
    return [
        sum_bound(2 * count + 12, size) + 2 * rounding_bound(truth, dtype)
        for count, size, truth in zip(counts, sizes, truths)
    ]


@pytest.mark.parametrize(
    ("shape", "out_channels", "kernel", "mask_type", "dilation", "dtype"),
    [
        *((*case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
        (*CASES[0], torch.float16),  # one shape shows that the dtype is read and written
    ],
)
def test_value_and_gradients(shape, out_channels, kernel, mask_type, dilation, dtype, device):
    inputs = _tensors(shape, out_channels, kernel, device, dtype)
    options = {"mask_type": mask_type, "dilation": dilation}
    ours = _value_and_gradients(*inputs, backend="triton", **options)
    wide = [t.double() for t in inputs]
    truths = _value_and_gradients(*wide, backend="reference", **options)
    bounds = _bounds(*inputs, truths, dtype, **options)
    for value, truth, bound in zip(ours, truths, bounds):
        assert value.dtype == dtype
        assert_within(value, truth, bound)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_masked_taps_and_future_pixels_may_hold_anything(mask_type: str, device: str) -> None:
    x, weight, bias, grad = _tensors((1, 3, 4, 5), 4, (3, 3), device)
    options = {"mask_type": mask_type, "backend": "triton"}
    plain = _value_and_gradients(x, weight, bias, grad, **options)
    masked = torch.arange(9, device=device).view(3, 3) >= 4 + (mask_type == "B")
    poisoned = torch.where(masked, torch.nan, weight)
    assert all(
        torch.equal(a, b)
        for a, b in zip(_value_and_gradients(x, poisoned, bias, grad, **options), plain)
    )
    assert (plain[2][..., masked] == 0).all()
    # Pixels up to (2, 1) must not see what follows; those from there on send them no gradient.
    raster = torch.arange(20, device=device).view(4, 5)
    future = torch.where(raster >= 11 + (mask_type == "B"), torch.nan, x)
    seen = ops.masked_conv2d(future, weight, bias, **options)
    assert torch.equal(seen[..., raster <= 11], plain[0][..., raster <= 11])
    assert seen[..., raster > 12].isnan().any()
    past = torch.where(raster < 11, torch.nan, grad)
    grad_x = _value_and_gradients(x, weight, bias, past, **options)[1]
    assert torch.equal(grad_x[..., raster >= 11], plain[1][..., raster >= 11])


def test_any_strides_and_repeatable(device: str) -> None:
    x, weight, bias, grad = _tensors((2, 6, 5, 7), 5, (3, 3), device)
    options = {"mask_type": "B", "backend": "triton"}
    first = _value_and_gradients(x, weight, bias, grad, **options)
    wide = torch.zeros(2, 8, 5, 14, device=device)
    wide[:, 1:7, :, ::2] = x
    strided = weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    for other in (x.contiguous(), wide[:, 1:7, :, ::2]):
        turned, apart = grad.mT.clone().mT, bias.repeat_interleave(2)[::2]
        again = _value_and_gradients(other, strided, apart, turned, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    # What sum() sends back: one number, expanded.
    ones = torch.ones((), device=device).expand(grad.shape)
    expanded = _value_and_gradients(x, weight, bias, ones, **options)
    dense = _value_and_gradients(x, weight, bias, ones.clone(), **options)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense))


@pytest.mark.parametrize("empty", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)])
def test_empty(empty: tuple[int, ...], device: str) -> None:
    x, weight, bias, grad = _tensors(empty, 4, (3, 3), device)
    y, *grads = _value_and_gradients(x, weight, bias, grad, mask_type="B", backend="triton")
    assert torch.equal(y, bias[:, None, None].expand(y.shape))
    assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
    assert not grads[1].any()


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_causal_conv1d(mask_type: str, device: str) -> None:
    x, weight, bias, grad = _tensors((2, 4, 1, 11), 3, (1, 5), device)
    y = ops.causal_conv1d(
        x[:, :, 0], weight[:, :, 0], bias, mask_type=mask_type, dilation=2, backend="triton"
    )
    options = {"mask_type": mask_type, "dilation": 2}
    truth = reference(x.double(), weight.double(), bias.double(), **options)
    bound = _bounds(x, weight, bias, grad, [truth], torch.float32, **options)[0]
    assert_within(y, truth[:, :, 0], bound[:, :, 0])


def test_raw_ops_and_one_graph(device: str) -> None:
    x, weight, bias, grad = _tensors((1, 2, 4, 5), 3, (3, 3), device)
    raw, tests = torch.ops.fastvq, ("test_schema", "test_faketensor")
    for tensor in (x, x.contiguous()):
        arguments = (tensor, weight, bias, "A", 1, 1, 1, "triton")
        torch.library.opcheck(raw.masked_conv2d.default, arguments, test_utils=tests)
        arguments = (grad, tensor, weight, "B", 2, 1, 1, [True] * 3, "triton")
        torch.library.opcheck(raw.masked_conv2d_backward.default, arguments, test_utils=tests)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, bias, mask_type="B", backend="triton").square().sum()

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(map(torch.equal, ours, torch.autograd.grad(layer(*leaves), leaves)))


def test_tf32_is_the_users_choice() -> None:
    x = torch.zeros(1)
    assert tiles.arithmetic_of(x) == "float32"
    torch.backends.cudnn.allow_tf32 = True
    assert tiles.arithmetic_of(x) == "tf32"
    assert tiles.arithmetic_of(x.bfloat16()) == "half"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_device_has_tiles(capability: tuple[int, int]) -> None:
    for kernel in ("convolution", "grad_weight"):
        for arithmetic in ("half", "tf32", "float32"):
            wide = tiles.choose_tiles(kernel, arithmetic, capability, (4096, 4096, 4096))
            narrow = tiles.choose_tiles(kernel, arithmetic, capability, (4096, 3, 3))
            assert (narrow.columns, narrow.depth) == (16, 16)
            assert wide.columns >= 64
            assert wide.rows >= 64


def test_wide_layers_go_to_the_vendor_and_explain_says_so(monkeypatch) -> None:
    from fastvq.ops import backends

    x = torch.zeros(1, 512, 2, 2, dtype=torch.bfloat16)
    narrow, wide = (torch.zeros(512, 512, k, k, dtype=torch.bfloat16) for k in (3, 5))
    assert tiles.vendor_is_faster(x, wide, (9, 0))
    assert not tiles.vendor_is_faster(x, narrow, (9, 0))
    assert not tiles.vendor_is_faster(x.float(), wide.float(), (9, 0))
    # As on a GPU: tensors on a CPU are what its kernels take, and none is too old.
    monkeypatch.setattr(backends, "_DEVICE", {"triton": "cpu", "cpp": "cuda"})
    monkeypatch.setattr(backends, "_gpu_too_old", lambda *tensors: None)
    rule = backends._TORCH_IS_FASTER["masked_conv2d", "triton"]
    assert rule is not None
    assert rule(x, wide) is None  # a CPU has no capability to look up
    backends.prefer_torch("masked_conv2d", "triton", lambda x, w: "so" if w is wide else None)
    try:
        assert ops.explain("masked_conv2d", x, narrow).startswith("masked_conv2d: triton")
        said = ops.explain("masked_conv2d", x, wide)
        assert said.startswith("masked_conv2d: PyTorch's own convolution, over the live taps")
        assert "but PyTorch's convolution is faster: so" in said
        assert backends.choose("masked_conv2d", None, x, wide) == "reference"
        assert backends.choose("masked_conv2d", "triton", x, wide) == "triton"
    finally:
        backends.prefer_torch("masked_conv2d", "triton", rule)


def test_groups_and_ordered_channels_are_not_for_these_kernels() -> None:
    x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(4, 2, 3, 3)
    options = {"mask_type": "B", "backend": "triton"}
    with pytest.raises(RuntimeError, match="do not divide channels into groups"):
        ops.masked_conv2d(x, weight, groups=2, **options)
    with pytest.raises(RuntimeError, match="do not order channels, and channel_groups is 2"):
        ops.masked_conv2d(x, torch.zeros(4, 4, 3, 3), channel_groups=2, **options)
