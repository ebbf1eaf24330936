"""The PNG files that `fastvq.train.pictures` writes: where pixels land, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.models import VAE, VQVAE, VQVAE2
from fastvq.train.pictures import (
    level_names,
    reconstructions,
    save_curves,
    save_grid,
    save_reconstructions,
)

GAP = 2


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_pixel_lands_where_the_grid_says(tmp_path: Path) -> None:
    # Three grey pictures of 2 × 3 in two columns, each pixel 4 × 4; values of k/255 are exact.
    values = torch.arange(18).reshape(3, 1, 2, 3)
    image = read(save_grid(values.float() / 255, tmp_path / "a.png", columns=2, scale=4))
    assert image.shape == (2 * (8 + GAP) + GAP, 2 * (12 + GAP) + GAP, 3)
    for index in range(3):
        row, column = divmod(index, 2)
        y, x = GAP + row * (8 + GAP), GAP + column * (12 + GAP)
        tile = image[y : y + 8, x : x + 12]
        expected = values[index, 0].numpy().repeat(4, axis=0).repeat(4, axis=1)
        assert (tile == expected[..., None]).all()
    assert (image[-(8 + GAP) :, -(12 + GAP) :] == 255).all()  # the empty cell stays white


def test_colours_keep_their_order_and_values_are_clamped(tmp_path: Path) -> None:
    picture = torch.tensor([2.0, -1.0, 0.5]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    image = read(save_grid(picture, tmp_path / "a.png"))
    assert tuple(image[GAP + 5, GAP + 5]) == (255, 0, 128)


def test_not_a_number_is_black(tmp_path: Path) -> None:
    image = read(save_grid(torch.full((1, 1, 64, 64), float("nan")), tmp_path / "a.png"))
    assert (image[GAP:-GAP, GAP:-GAP] == 0).all()


def test_small_pictures_are_enlarged_by_whole_factors(tmp_path: Path) -> None:
    for side, factor in ((8, 8), (28, 2), (32, 2), (64, 1), (256, 1)):
        image = read(save_grid(torch.rand(1, 1, side, side), tmp_path / "a.png"))
        assert image.shape[0] == factor * side + 2 * GAP


def test_labels_are_drawn_outside_the_pictures(tmp_path: Path) -> None:
    pictures = torch.zeros(4, 1, 64, 64)
    plain = read(save_grid(pictures, tmp_path / "plain.png", columns=2))
    assert (plain == 0).sum() == 4 * 64 * 64 * 3
    for options in (
        {"labels": ["cat", "dog"]},
        {"labels": ["a", "b", "c", "d"]},
        {"column_labels": ["original", "top only"]},
    ):
        image = read(save_grid(pictures, tmp_path / "a.png", columns=2, **options))
        assert image.size > plain.size
        assert (image < 128).sum() > (plain < 128).sum()  # ink beside the four black pictures


@pytest.mark.parametrize(
    ("pictures", "options", "message"),
    [
        (torch.zeros(2, 8, 8), {}, r"save_grid: pictures must be \(B, C, H, W\).*got \(2, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), {}, r"got \(0, 1, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8), {}, "C = 1 or 3"),
        (torch.zeros(4, 1, 8, 8), {"labels": ["a"] * 3}, "labels must be 2.* or 4.*got 3"),
        (torch.zeros(4, 1, 8, 8), {"column_labels": ["a"]}, "column_labels must be 2.*got 1"),
        (torch.zeros(4, 1, 8, 8), {"columns": 0}, "columns must be at least 1; got 0"),
        (torch.zeros(4, 1, 8, 8), {"scale": 0}, "scale must be at least 1; got 0"),
    ],
)
def test_wrong_arguments_are_named(
    pictures: torch.Tensor, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_grid(pictures, tmp_path / "a.png", **options)
    assert not (tmp_path / "a.png").exists()


def test_integers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"float tensor in 0…1; got torch\.uint8"):
        save_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "a.png")


def test_nothing_partial_stays_beside_the_file(tmp_path: Path) -> None:
    save_grid(torch.zeros(1, 1, 8, 8), tmp_path / "new" / "a.png")
    save_grid(torch.ones(1, 1, 8, 8), tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_levels_have_names() -> None:
    assert level_names(1) == ["all"]
    assert level_names(2) == ["top only", "all"]
    assert level_names(3) == ["top only", "top + next", "all"]
    assert level_names(4) == ["top only", "top + next", "top + next 2", "all"]


def test_reconstructions_are_the_decoded_levels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQVAE2(1, 3, 8, 4, 1, 2, 16, 4, kmeans_init=False).eval()
    pictures = torch.rand(2, 1, 16, 16)
    codes = model.encode(pictures)
    for used, decoded in enumerate(reconstructions(model, pictures), start=1):
        assert torch.equal(decoded, model.decode_codes(codes, levels=used))
    image = read(save_reconstructions(model, pictures, tmp_path / "a.png", scale=2))
    # Rows are pictures; the originals stand in the first column, below the header.
    step = (image.shape[1] - GAP) // 4
    header = image.shape[0] - GAP - 2 * (32 + GAP)
    x, y = GAP + (step - GAP - 32) // 2, header + GAP
    shown = (pictures[0, 0] * 255).round().numpy().repeat(2, axis=0).repeat(2, axis=1)
    assert (image[y : y + 32, x : x + 32, 0] == shown).all()
    decoded = model.decode_codes(codes)[1, 0].clamp(0, 1)
    shown = (decoded * 255).round().numpy().repeat(2, axis=0).repeat(2, axis=1)
    x, y = x + 3 * step, y + 32 + GAP
    assert (image[y : y + 32, x : x + 32, 0] == shown).all()


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_one_level_models_give_one_reconstruction(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (
        VAE(1, 16, 4, 3).eval()
        if kind == "vae"
        else VQVAE(1, 8, 4, 1, 2, 16, 4, kmeans_init=False).eval()
    )
    pictures = torch.rand(3, 1, 16, 16)
    assert len(reconstructions(model, pictures)) == 1
    image = read(save_reconstructions(model, pictures, tmp_path / "a.png"))
    rows, columns = (2, 3) if kind == "vae" else (3, 2)
    assert image.shape[0] >= rows * (64 + GAP)
    assert image.shape[1] >= columns * (64 + GAP)


def test_curves_take_rows_that_lack_metrics(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "loss": 2.0, "level0_perplexity": 3.0, "learning_rate": 0.1},
        {"step": 20, "loss": float("nan"), "codes_usage": [0.5, 1.0]},
        {"step": 20, "validation_bits_per_dim": 1.5, "note": "text"},
    ]
    one = save_curves(rows[:1], tmp_path / "one.png")
    all_rows = save_curves(rows, tmp_path / "all.png")
    assert one is not None
    assert all_rows is not None
    assert read(all_rows).shape[0] > read(one).shape[0]  # a panel for each kind of metric


def test_no_metrics_give_no_curves(tmp_path: Path) -> None:
    assert save_curves([{"step": 1, "learning_rate": 0.1}], tmp_path / "a.png") is None
    assert not (tmp_path / "a.png").exists()
