"""`PictureDataset`: one shape for all, flips, broken pictures, validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.train.data import PictureDataset, open_source, split_validation, to_float


def break_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:40])


def test_items_and_batches(folder: Path) -> None:
    dataset = PictureDataset(open_source(folder))
    assert (dataset.shape, len(dataset), dataset.decodes) == ((3, 4, 5), 11, True)
    item = dataset[7]
    assert item["picture"].dtype == torch.uint8
    assert item["picture"][0].unique().tolist() == [7]
    assert item["picture"][1, 3].tolist() == [0, 1, 2, 3, 4]
    assert (int(item["label"]), int(item["index"])) == (1, 7)
    batch = dataset.read_batch([3, 7])
    assert torch.equal(batch["picture"][1], item["picture"])
    assert batch["label"].tolist() == [0, 1]
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["broken"] == []
    assert (dataset[-1]["index"], dataset.num_classes) == (10, 2)
    with pytest.raises(IndexError, match="position 11 is outside"):
        dataset[11]


def test_to_float() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(pixels), torch.arange(256) / 255)
    assert torch.equal(to_float(torch.tensor([0.25])), torch.tensor([0.25]))


def test_sizes_and_channels(folder: Path) -> None:
    source = open_source(folder)
    assert PictureDataset(source, image_size=8)[0]["picture"].shape == (3, 8, 8)
    assert PictureDataset(source, image_size=(2, 9), channels=1)[0]["picture"].shape == (1, 2, 9)
    for arguments, message in [
        ({"image_size": 0}, "image_size must be a positive int or"),
        ({"channels": 2}, "channels must be 1 or 3; got 2"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            PictureDataset(source, **arguments)  # type: ignore[arg-type]


def test_a_picture_of_another_size_is_refused_unless_resized(folder: Path) -> None:
    Image.new("RGB", (9, 6)).save(folder / "b/08.png")
    dataset = PictureDataset(open_source(folder))
    with pytest.raises(ValueError, match=r"b/08.png: it is 6×9 .*first is 4×5.*--image-size"):
        dataset.read_batch([7, 8])
    resized = PictureDataset(open_source(folder), image_size=4)
    assert resized.read_batch([7, 8])["picture"].shape == (2, 3, 4, 4)


def test_grey_first_picture_makes_all_grey(folder: Path) -> None:
    Image.new("L", (5, 4), 9).save(folder / "a/00.png")
    dataset = PictureDataset(open_source(folder))
    assert dataset.shape == (1, 4, 5)
    assert dataset.read_batch([0, 1])["picture"].shape == (2, 1, 4, 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_gathered_at_once_equal_arrays_read_one_by_one(tmp_path: Path, dtype: type) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 6, 6, 3))
    array = pixels.astype(np.uint8) if dtype is np.uint8 else (pixels / 255).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    source = open_source(tmp_path / "x.npy")
    for channels in (1, 3):
        gathered = PictureDataset(source, channels=channels, flip=True)
        one_by_one = PictureDataset(source, channels=channels, flip=True)
        one_by_one.decodes = True
        assert not gathered.decodes
        first, second = (d.read_batch([8, 0, 3], epoch=2) for d in (gathered, one_by_one))
        assert torch.equal(first["picture"], second["picture"])
        assert first["label"].tolist() == [-1, -1, -1]
        assert first["picture"].dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    assert PictureDataset(source, image_size=3).decodes


def test_flips_follow_from_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    count = 4000
    array = np.zeros((count, 1, 2), np.uint8)
    array[:, 0, 1] = 1  # flipped pictures have the one on the left
    np.save(tmp_path / "x.npy", array)

    def flips(epoch: int, seed: int = 0, positions: range = range(count)) -> torch.Tensor:
        dataset = PictureDataset(open_source(tmp_path / "x.npy"), flip=True, seed=seed)
        return dataset.read_batch(positions, epoch=epoch)["picture"][:, 0, 0, 0]

    first = flips(0)
    assert torch.equal(first, flips(0))
    assert torch.equal(first[40:50], flips(0, positions=range(40, 50)))
    # Fair and independent coins: each count below is binomial with n = 4000, p = 1/2, standard
    # deviation 32; six of them either side.
    for other in (torch.zeros_like(first), flips(1), flips(0, seed=1), first.roll(1)):
        assert abs(int((first != other).sum()) - count // 2) < 6 * 32


def test_broken_pictures_are_replaced_by_the_next_readable(folder: Path) -> None:
    break_pictures(folder, "a/04.png", "a/05.png", "b/10.png")
    dataset = PictureDataset(open_source(folder), flip=True)
    batch = dataset.read_batch([3, 4, 10], epoch=5)
    assert batch["index"].tolist() == [3, 6, 0]
    assert batch["label"].tolist() == [0, 1, 0]
    assert batch["picture"][:, 0, 0, 0].tolist() == [3, 6, 0]
    names = [name.removeprefix(f"{folder}/") for name, _ in batch["broken"]]
    assert names == ["a/04.png", "a/05.png", "b/10.png"]
    assert torch.equal(
        batch["picture"][1], dataset.read_batch([6], epoch=5)["picture"][0]
    )  # flipped as itself
    dropped = dataset.read_batch([3, 4, 10], drop_broken=True)
    assert dropped["index"].tolist() == [3]
    assert len(dropped["broken"]) == 2
    training, _ = split_validation(dataset, 0.3)
    assert set(training.read_batch(range(len(training)))["index"].tolist()) <= set(training.indices)


def test_strict_refuses_a_broken_picture(folder: Path) -> None:
    break_pictures(folder, "a/04.png")
    dataset = PictureDataset(open_source(folder), strict=True)
    with pytest.raises(ValueError, match=r"picture .*a/04.png: it cannot be decoded \(.+\)\. Rem"):
        dataset.read_batch([4])


def test_all_broken(folder: Path) -> None:
    names = [str(file.relative_to(folder)) for file in folder.rglob("*.png")]
    break_pictures(folder, *names)
    with pytest.raises(ValueError, match=r"none of these 11 pictures can be decoded; one is .*00"):
        PictureDataset(open_source(folder))


def test_split_validation(folder: Path) -> None:
    dataset = PictureDataset(open_source(folder))
    training, validation = split_validation(dataset, 0.3, seed=4)
    assert (len(training), len(validation)) == (8, 3)
    assert sorted([*training.indices, *validation.indices]) == list(range(11))
    assert np.array_equal(split_validation(dataset, 0.3, seed=4)[1].indices, validation.indices)
    assert not np.array_equal(split_validation(dataset, 0.3, seed=5)[1].indices, validation.indices)
    assert validation[1]["index"] == validation.indices[1]
    assert training.labels is not None
    assert training.labels.tolist() == [int(i >= 6) for i in training.indices]
    assert len(split_validation(dataset, 0.001)[1]) == 1
    assert len(split_validation(dataset, 0.999)[0]) == 1
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1; got 1"):
        split_validation(dataset, 1.0)
    with pytest.raises(ValueError, match="at least 2 pictures; got 1"):
        split_validation(dataset.subset([3]), 0.5)
