"""causal_conv1d: the masked convolution of a sequence."""

import pytest
import torch
from ops.masked_conv_cases import BACKENDS, truth
from tolerances import UNIT_ROUNDOFF, assert_within

from fastvq import ops


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_equals_the_plane_of_height_one(mask_type, backend):
    x = torch.randn(2, 4, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)
    for dilation, groups in ((1, 1), (2, 1), (1, 2)):
        weight = torch.randn(6, 4 // groups, 5, dtype=torch.float64, requires_grad=True)
        options = {"mask_type": mask_type, "dilation": dilation, "groups": groups}
        y = ops.causal_conv1d(x, weight, bias, backend=backend, **options)
        plane = truth(x[:, :, None], weight[:, :, None], bias, *options.values())
        torch.testing.assert_close(y, plane[:, :, 0])
    if backend is None:
        assert torch.autograd.gradcheck(
            lambda x, w: ops.causal_conv1d(x, w, **options), (x, weight)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 3, 700])
def test_long_and_short_sequences(length, backend):
    x, weight = torch.randn(1, 3, length), torch.randn(5, 3, 3)
    y = ops.causal_conv1d(x, weight, dilation=8, backend=backend)
    exact = truth(x[:, :, None], weight[:, :, None], None, "B", 8)[:, :, 0]
    size = truth(x[:, :, None].abs(), weight[:, :, None].abs(), None, "B", 8)[:, :, 0]
    # Sums of 9 products: 10 roundings touch a term at most.
    assert_within(y, exact, 10 * UNIT_ROUNDOFF[torch.float32] * size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_may_hold_anything(backend):
    x, weight = torch.randn(2, 3, 9), torch.randn(4, 3, 5)
    for mask_type, own in (("A", 0), ("B", 1)):
        y = ops.causal_conv1d(x, weight, mask_type=mask_type, backend=backend)
        for t in range(9):
            hidden = x.clone()
            hidden[:, :, t + own :] = torch.nan
            seen = ops.causal_conv1d(hidden, weight, mask_type=mask_type, backend=backend)
            assert torch.equal(seen[..., : t + 1], y[..., : t + 1])


def test_compile_and_bad_input():
    x, weight = torch.randn(1, 2, 9), torch.randn(3, 2, 3)
    compiled = torch.compile(ops.causal_conv1d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), ops.causal_conv1d(x, weight))
    with pytest.raises(ValueError, match=r"x must be \(B, C, T\)"):
        ops.causal_conv1d(x[0], weight)
    with pytest.raises(ValueError, match="groups must divide the 2 channels"):
        ops.causal_conv1d(x, weight, groups=4)
