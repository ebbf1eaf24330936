"""VQVAE and VQVAE2 on sequences: lengths, the loss, causality, saving, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastvq.models.vqvae import VQVAE, VQVAE2
from fastvq.nn.spectral_loss import spectral_loss

U = 2.0**-24


def _small(levels: int = 1, **options: object) -> VQVAE2:
    torch.manual_seed(0)
    arguments: dict[str, object] = {"hidden_channels": 8, "residual_channels": 4, "num_codes": 16}
    arguments |= {"code_dim": 5, "downsample": 8, "dimensions": 1, "spectral_windows": (16, 8)}
    return VQVAE2(1, levels, **{**arguments, **options})  # type: ignore[arg-type]


def _sound(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 7, 32, 33, 95])
def test_any_length_is_padded_and_cut(levels: int, length: int) -> None:
    model = _small(levels).eval()
    x = _sound(2, 1, length)
    out = model(x)
    codes = model.encode(x)
    coarsest = 8 << (levels - 1)
    top = -(-length // coarsest)
    assert [tuple(c.shape) for c in codes] == [(2, top << level) for level in range(levels)]
    assert all(c.dtype == torch.int64 for c in codes)
    assert out.reconstruction.shape == x.shape
    decoded = model.decode_codes(codes)
    assert decoded.shape == (2, 1, top * coarsest)
    assert torch.equal(decoded[..., :length], out.reconstruction)


def test_the_published_downsampling_and_every_gradient() -> None:
    torch.manual_seed(0)
    model = VQVAE(in_channels=1, dimensions=1, downsample=64, hidden_channels=8, code_dim=4,
                  num_codes=16, stage_blocks=1, dilations=(1, 3))  # fmt: skip
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    assert not any(isinstance(module, kinds) for module in model.modules())
    dilations = [m.dilation[0] for m in model.modules() if isinstance(m, nn.Conv1d)]
    assert max(dilations) == 3
    # Residual branches start at 0, which hides what lies before their last layer from step one.
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    out = model(_sound(4, 1, 640))
    assert out.codes[0].shape == (4, 10)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_start_keeps_the_vectors_apart() -> None:
    """With PyTorch's own start six strides leave hardly anything of the signal."""
    torch.manual_seed(0)
    model = VQVAE(1, 32, dimensions=1, downsample=64, data_variance=1 / 12)
    x = _sound(4, 1, 1280)
    with torch.no_grad():
        vectors = model.to_code[0](model.encoders[0](x * 12**0.5)).transpose(1, 2).flatten(0, 1)
    spread = vectors.var(dim=0).sum() / vectors.square().sum(dim=1).mean()
    assert spread > 0.1
    assert 0.05 < vectors.square().mean() < 20.0


def test_loss_is_the_weighted_sum_of_the_stated_terms() -> None:
    model = _small(2, spectral_weight=0.5, data_variance=0.1, commitment_weight=0.3).eval()
    x = _sound(2, 1, 50)
    out = model(x)
    squared = (out.reconstruction.double() - x.double()).square().mean()
    assert (out.reconstruction_loss - squared).abs() <= (x.numel() + 4) * U * squared
    assert torch.equal(out.spectral_loss, spectral_loss(x, out.reconstruction, (16, 8)))
    expected = out.reconstruction_loss / 0.1 + 0.5 * out.spectral_loss + 0.3 * out.commitment_loss
    torch.testing.assert_close(out.loss, expected)
    without = _small(2, spectral_weight=0.0).eval()(x)
    assert without.spectral_loss.item() == 0.0


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_causal_decoding_does_not_see_later_codes(levels: int, causal: bool) -> None:
    model = _small(levels, causal=causal, stage_blocks=1, dilations=(1, 2)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    codes = [torch.zeros(1, 12 << level, dtype=torch.int64) for level in range(levels)]
    before = model.decode_codes(codes)
    for level in range(levels):
        changed = [one.clone() for one in codes]
        at = 6 << level
        changed[level][:, at:] = 3
        after = model.decode_codes(changed)
        same = (before == after).all(dim=1)[0]
        first = int(same.logical_not().nonzero()[0])
        change = 6 * (8 << (levels - 1))
        assert (first >= change) == causal
        assert first < change + 8  # and the code's own samples do follow it


def test_saving_and_loading(tmp_path: Path) -> None:
    model = _small(2, causal=True, dilations=(1, 3)).eval()
    model.save_pretrained(tmp_path)
    again = VQVAE2.from_pretrained(tmp_path)
    x = _sound(1, 1, 77)
    assert torch.equal(model(x).reconstruction, again(x).reconstruction)
    assert again.spectral_windows == (16, 8)


def test_decoding_the_top_level_alone() -> None:
    model = _small(2).eval()
    codes = model.encode(_sound(2, 1, 64))
    assert model.decode_codes(codes[:1], levels=1).shape == (2, 1, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 3}, "dimensions must be 1 .* or 2"),
        ({"dilations": ()}, "dilations must be at least one of 1, 2"),
        ({"dilations": (0,)}, "dilations must be at least one of 1, 2"),
        ({"spectral_weight": -1.0}, "spectral_weight must be 0 or more"),
        ({"dimensions": 2, "causal": True}, "causal is of sounds; set dimensions=1"),
        ({"dimensions": 2, "spectral_weight": 1.0}, "spectral_weight is of sounds"),
        ({"stage_blocks": -1}, "stage_blocks must be at least 0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)  # type: ignore[arg-type]


def test_other_shapes_are_refused() -> None:
    model = _small()
    for shape in ((2, 1, 8, 8), (2, 2, 8), (8,)):
        with pytest.raises(ValueError, match=r"x must be float sounds \(B, 1, T\)"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="at least one step"):
        model.encode(torch.zeros(1, 1, 0))
    with pytest.raises(ValueError, match=r"codes\[0\] must be integers \(B, t\)"):
        model.decode_codes([torch.zeros(1, 2, 2, dtype=torch.int64)])
