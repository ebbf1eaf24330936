"""Clips of one rate and length; classes and parts of a data set by the names of its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvq.train.data import (
    SoundDataset,
    evaluation_batches,
    examples,
    open_source,
    split_validation,
    training_batches,
)
from fastvq.train.data.sounds import encode_wav


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """7_anna_0 … 8_anna_2: ramps of 10, 20, 40 samples at 1000 Hz, of 1/64 a step."""
    for name in ("7", "8"):
        for take, length in enumerate((10, 20, 40)):
            ramp = np.arange(1, length + 1) / 64
            file = tmp_path / f"{name}_anna_{take}.wav"
            file.write_bytes(encode_wav(ramp, 1000, 32, floating=True))
    return tmp_path


def test_clips_begin_with_the_sound(sounds: Path) -> None:
    dataset = SoundDataset(open_source(sounds), seconds=0.02)
    assert (dataset.rate, dataset.shape, len(dataset)) == (1000, (1, 20), 6)
    batch = dataset.read_batch([0, 1, 2])
    ramp = torch.arange(1, 21) / 64
    assert batch["sound"].dtype == torch.float32
    assert torch.equal(batch["sound"][0, 0], torch.cat([ramp[:10], torch.zeros(10)]))
    assert torch.equal(batch["sound"][1, 0], ramp)
    assert torch.equal(batch["sound"][2, 0], ramp)
    assert batch["label"].tolist() == [-1, -1, -1]
    assert torch.equal(examples(batch), batch["sound"])


def test_moving_clips_are_windows_at_places_that_seed_and_epoch_decide(sounds: Path) -> None:
    dataset = SoundDataset(open_source(sounds), seconds=0.02, moving=True, seed=3)
    starts: dict[int, set[int]] = {0: set(), 2: set()}
    for epoch in range(60):
        clips = dataset.read_batch([0, 2], epoch=epoch)["sound"][:, 0] * 64
        at = int((clips[0] > 0).nonzero()[0])
        assert clips[0].tolist() == [0] * at + [*range(1, 11)] + [0] * (10 - at)
        starts[0].add(at)
        assert clips[1].diff().unique().tolist() == [1.0]
        starts[2].add(int(clips[1, 0]) - 1)
    assert min(starts[0]) == 0
    assert max(starts[0]) == 10
    assert min(starts[2]) <= 1
    assert max(starts[2]) >= 19
    again = SoundDataset(open_source(sounds), seconds=0.02, moving=True, seed=3)
    first, second = (d.read_batch([0, 2], epoch=5)["sound"] for d in (dataset, again))
    assert torch.equal(first, second)
    still = dataset.without_augmentation().read_batch([0], epoch=5)["sound"]
    assert still[0, 0, 0] == 1 / 64


def test_peak_and_rate(sounds: Path) -> None:
    dataset = SoundDataset(open_source(sounds), rate=2000, seconds=0.04, peak=0.9)
    batch = dataset.read_batch([0, 1, 2])
    assert batch["sound"].shape == (3, 1, 80)
    assert float(batch["sound"][1].abs().max()) == pytest.approx(0.9, rel=1e-6)
    met: list[tuple[str, str]] = []
    whole = dataset.whole(0, met)
    assert whole is not None
    assert whole.shape == (1, 20)
    assert met == []


def test_classes_and_parts_by_name(sounds: Path) -> None:
    source = open_source(sounds, class_pattern=r"^(\d)_", only=r"8_.*_[12]\.wav$")
    assert (source.class_names, len(source)) == (["7", "8"], 2)
    assert SoundDataset(source).read_batch([0, 1])["label"].tolist() == [1, 1]
    for options, message in (
        ({"class_pattern": r"^\d_"}, "class_pattern must have one group"),
        ({"class_pattern": r"^(9)_"}, "finds no class in the name '7_anna_0.wav'"),
        ({"class_pattern": "("}, "class_pattern must be a regular expression"),
        ({"only": "nothing"}, "only 'nothing' is found in none of its 6 names"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(sounds, **options)
    np.save(sounds / "a.npy", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="only and class_pattern are of folders and zips"):
        open_source(sounds / "a.npy", only="a")


def test_broken_files_are_named_and_skipped_or_refused(sounds: Path) -> None:
    (sounds / "7_anna_1.wav").write_bytes(encode_wav(np.zeros(0), 1000))
    source = open_source(sounds)
    dataset = SoundDataset(source, seconds=0.02)
    with (
        pytest.warns(UserWarning, match=r"sound .*7_anna_1.wav: .*it holds no samples.*skipped"),
        evaluation_batches(dataset, batch_size=4, workers=0) as batches,
    ):
        found = [int(i) for batch in batches for i in batch["index"]]
    assert found == [0, 2, 3, 4, 5]
    assert str(batches.broken).startswith("1 sound could not be decoded")
    strict = SoundDataset(source, seconds=0.02, strict=True)
    with pytest.raises(
        ValueError, match=r"7_anna_1.wav: it cannot be decoded .*leave out --strict"
    ):
        strict.read_batch([1])
    held = split_validation(dataset, 0.5)
    assert [len(part) for part in held] == [3, 3]
    with training_batches(dataset, batch_size=6, workers=0) as training:
        assert next(training)["sound"].shape == (6, 1, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate must be 1 or more"),
        ({"seconds": 0.0}, "seconds must be at least one sample"),
        ({"peak": 0.0}, "peak must be positive"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_refused(options: dict[str, float], message: str, sounds: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SoundDataset(open_source(sounds), **options)  # type: ignore[arg-type]
