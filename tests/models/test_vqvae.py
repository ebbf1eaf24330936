"""VQVAE and VQVAE2: shapes, the loss, gradients, decoding level by level, errors, collapse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvq.models.vqvae import VQVAE, VQVAE2

U = 2.0**-24


def _small(levels: int = 2, **options: object) -> VQVAE2:
    torch.manual_seed(0)
    arguments = {"hidden_channels": 8, "residual_channels": 4, "num_residual_blocks": 1}
    arguments |= {"num_codes": 16, "code_dim": 5}
    return VQVAE2(2, levels, **{**arguments, **options})


def _pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("levels", "downsample"), [(1, 2), (1, 8), (2, 4), (3, 4), (4, 2), (5, 2)])
def test_levels_halve_the_resolution_and_decode_to_the_reconstruction(
    levels: int, downsample: int
) -> None:
    model = _small(levels, downsample=downsample)
    step = downsample << (levels - 1)
    x = _pictures(2, 2, 2 * step, step)
    out = model(x)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    out = model(x)
    codes = model.encode(x)
    assert [tuple(c.shape) for c in codes] == [(2, 2 << i, 1 << i) for i in range(levels)]
    assert all(c.dtype == torch.int64 for c in codes)
    assert all(torch.equal(a, b) for a, b in zip(codes, out.codes))
    assert out.reconstruction.shape == x.shape
    assert out.perplexity.shape == out.usage.shape == (levels,)
    assert torch.equal(model.decode_codes(codes), out.reconstruction)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_loss_is_the_weighted_sum_of_the_stated_means(codebook: str) -> None:
    model = _small(codebook=codebook, commitment_weight=0.5, data_variance=0.1).eval()
    x = _pictures(2, 2, 16, 8)
    out = model(x)
    expected = ((out.reconstruction.double() - x.double()) ** 2).mean()
    assert (out.reconstruction_loss - expected).abs() <= (x.numel() + 4) * U * expected
    if codebook == "ema":
        assert out.codebook_loss.item() == 0.0
    else:
        assert torch.equal(out.codebook_loss, out.commitment_loss)
    loss = out.reconstruction_loss / 0.1 + out.codebook_loss + 0.5 * out.commitment_loss
    torch.testing.assert_close(out.loss, loss)


def test_one_level_is_vqvae() -> None:
    torch.manual_seed(0)
    one = VQVAE(2, 8, 4, 1, 4, 16, 5)
    same = _small(1)
    assert one.state_dict().keys() == same.state_dict().keys()
    same.load_state_dict(one.state_dict())
    x = _pictures(2, 2, 8, 8)
    assert torch.equal(one.eval()(x).reconstruction, same.eval()(x).reconstruction)


def test_two_levels_have_the_published_network() -> None:
    """Module by module: kernel, stride and channels of the public VQ-VAE-2 (downsample 4)."""

    def convolutions(module: torch.nn.Module) -> list[tuple]:
        kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
        return [
            (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
            for m in module.modules()
            if isinstance(m, kinds)
        ]

    model = VQVAE2()
    blocks = [(128, 32, 3, 1), (32, 128, 1, 1)] * 2
    assert convolutions(model.encoders[0]) == [
        (3, 64, 4, 2),
        (64, 128, 4, 2),
        (128, 128, 3, 1),
        *blocks,
    ]
    assert convolutions(model.encoders[1]) == [(128, 64, 4, 2), (64, 128, 3, 1), *blocks]
    assert convolutions(model.to_code) == [(192, 64, 1, 1), (128, 64, 1, 1)]
    assert convolutions(model.level_decoders[0]) == [(64, 128, 3, 1), *blocks, (128, 64, 4, 2)]
    assert convolutions(model.upsamplers) == [(64, 64, 4, 2)]
    decoder = [(128, 128, 3, 1), *blocks, (128, 64, 4, 2), (64, 3, 4, 2)]
    assert convolutions(model.decoder) == decoder


@pytest.mark.parametrize("levels", [2, 3])
def test_lower_levels_depend_on_the_codes_above(levels: int) -> None:
    """Level l's vectors see the quantized maps above it: other codebooks above, other codes."""
    model = _small(levels).eval()
    x = _pictures(1, 2, 16, 16)
    before = model.encode(x)
    with torch.no_grad():
        model.codebooks[levels - 1].embed.mul_(1e4)
    after = model.encode(x)
    assert not torch.equal(before[-1], after[-1])


def test_decoding_the_top_levels_alone() -> None:
    model = _small(3).eval()
    codes = model.encode(_pictures(2, 2, 32, 16))
    pictures = [model.decode_codes(codes, levels=n) for n in (1, 2, 3)]
    assert all(p.shape == (2, 2, 32, 16) for p in pictures)
    assert torch.equal(pictures[2], model.decode_codes(codes))
    assert torch.equal(pictures[0], model.decode_codes(codes[:1], levels=1))
    assert not torch.equal(pictures[0], pictures[1])
    others = [codes[0], codes[1], (codes[2] + 1) % 16]
    assert torch.equal(pictures[1], model.decode_codes(others, levels=2))


@pytest.mark.parametrize("levels", [2, 3])
def test_level_dropout_trains_on_what_decoding_the_top_levels_shows(levels: int) -> None:
    fixed = {"codebook": "gradient", "kmeans_init": False, "revive_below": 0.0}
    model = _small(levels, level_dropout=0.5, **fixed)
    out = model(_pictures(24, 2, 16, 16))
    shown = [model.decode_codes(out.codes, levels=n) for n in range(1, levels + 1)]
    # float32 convolutions of another batch layout: far below the pictures' differences.
    matches = [(out.reconstruction - s).abs().amax(dim=(1, 2, 3)) < 1e-5 for s in shown]
    assert (torch.stack(matches).sum(dim=0) == 1).all()
    assert all(match.any() for match in matches)
    whole = _small(levels, level_dropout=0.0, **fixed)(_pictures(24, 2, 16, 16))
    torch.testing.assert_close(whole.reconstruction, shown[-1])


def test_encode_leaves_a_training_model_alone() -> None:
    model = _small()
    model(_pictures(2, 2, 16, 16))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.encode(_pictures(2, 2, 8, 16))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = _small().to(dtype)
    out = model(_pictures(2, 2, 16, 16).to(dtype))
    out.loss.backward()
    assert out.reconstruction.dtype == dtype
    assert model.codebooks[0].embed.dtype == torch.float32
    assert model.decode_codes(out.codes).dtype == dtype


@pytest.mark.parametrize("levels", [1, 3])
def test_compiles_as_one_graph(levels: int) -> None:
    model = _small(levels).eval()
    x = _pictures(2, 2, 16, 16)
    expected = model(x)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert all(torch.equal(a, b) for a, b in zip(out.codes, expected.codes))
    torch.testing.assert_close(out.reconstruction, expected.reconstruction)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_default_settings_keep_the_codebooks_alive(codebook: str) -> None:
    """Smooth random pictures, 300 steps: no level falls back to a few codes."""
    model = _small(hidden_channels=16, num_codes=32, codebook=codebook)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        noise = torch.rand(8, 2, 6, 6, generator=generator)
        x = torch.nn.functional.interpolate(noise, size=(32, 32), mode="bilinear")
        out = model(x)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert (out.perplexity > 32 / 4).all()
    assert (out.usage > 0.9).all()
    assert out.reconstruction_loss < x.var()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 0}, "levels must be at least 1; got 0"),
        ({"downsample": 3}, "downsample must be .* got 3"),
        ({"downsample": 1}, "downsample"),
        ({"num_codes": 0}, "num_codes must"),
        ({"codebook": "soft"}, "codebook must be .*'soft'"),
        ({"level_dropout": 1.0}, r"level_dropout must be in \[0, 1\); got 1.0"),
        ({"data_variance": 0.0}, "data_variance must be positive"),
    ],
)
def test_refuses_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 16, 16), r"\(B, 2, H, W\)"),
        (torch.zeros(2, 16, 16), "got torch.float32"),
        (torch.zeros(1, 2, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 2, 28, 16), "multiples of 8 .* got 28 × 16, .* is 32 × 16"),
        (torch.zeros(1, 2, 3, 11), "is 8 × 8"),
    ],
)
def test_refuses_pictures(x: Tensor, message: str) -> None:
    model = _small()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_refuses_codes() -> None:
    model = _small(2)
    top, bottom = torch.zeros(1, 2, 3).long(), torch.zeros(1, 4, 6).long()
    assert model.decode_codes([top, bottom]).shape == (1, 2, 16, 24)
    for codes, levels, message in [
        ([top], None, "must hold 2 maps, top level first; got 1"),
        ([top, bottom], 3, r"levels must be in 1 … 2; got 3"),
        ([top, top], None, r"codes\[1\] must be \(1, 4, 6\), twice"),
        ([top - 1, bottom], None, r"codes\[0\] must be in 0 … 15; got -1"),
        ([top, bottom + 16], None, r"codes\[1\] must be in 0 … 15; got 16"),
        ([top.float(), bottom], None, "must be integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.decode_codes(codes, levels=levels)
