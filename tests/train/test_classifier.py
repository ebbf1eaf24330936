"""The classifier of `sample --keep-best`: trained, saved, and judging samples end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from train.conftest import prior_config, stage1_config

from fastvq import cli
from fastvq.models import Classifier
from fastvq.train.classifier import judge, train_classifier
from fastvq.train.codes import extract_codes
from fastvq.train.priors import train_prior
from fastvq.train.showing import draw_samples
from fastvq.train.stage1 import train_stage1


@pytest.fixture(scope="module")
def striped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of two classes: bright above, and bright below."""
    path = tmp_path_factory.mktemp("striped") / "striped.npz"
    noise = np.random.default_rng(0).integers(0, 60, (60, 8, 8))
    labels = np.arange(60) % 2
    for picture, label in zip(noise, labels):
        picture[4 * label : 4 * label + 4] += 180
    np.savez(path, images=noise.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="module")
def classifier(striped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "out"
    options = ["--steps", "30", "--batch-size", "16", "--device", "cpu"]
    command = ["train-classifier", "--data", str(striped), "--out", str(out), *options]
    assert cli.main(command) == 0
    return out


def test_it_reads_what_it_was_taught(classifier: Path, striped: Path) -> None:
    data = np.load(striped)
    pictures = torch.from_numpy(data["images"])[:, None].float() / 255
    probabilities = judge(classifier, pictures, "cpu")
    assert probabilities.shape == (60, 2)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(60))
    assert (probabilities.argmax(dim=1) == torch.from_numpy(data["labels"])).float().mean() > 0.95
    assert sorted(path.name for path in classifier.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_training_depends_on_the_seed_alone(striped: Path, tmp_path: Path) -> None:
    trained = [
        train_classifier(striped, tmp_path / str(i), steps=3, batch_size=8, seed=4, progress=False)
        for i in range(2)
    ]
    first, second = (Classifier.from_pretrained(one.path).state_dict() for one in trained)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert trained[0].held_out == 6


def test_the_best_samples_are_kept(striped: Path, classifier: Path, tmp_path: Path) -> None:
    vqvae = train_stage1(stage1_config(striped, tmp_path / "vqvae"), progress=False)
    codes = extract_codes(vqvae, striped, tmp_path / "codes", progress=False)
    prior = train_prior(prior_config(codes, tmp_path / "prior"), progress=False)
    options = {"seed": 3, "batch_size": 16, "device": "cpu"}
    best = draw_samples(prior, 6, keep_best=0.25, classifier=classifier, **options)
    drawn = draw_samples(prior, 24, **options)
    assert best.labels is not None
    assert drawn.labels is not None
    assert best.labels.tolist() == [0, 0, 0, 1, 1, 1]
    scores = judge(classifier, drawn.pictures, "cpu").gather(1, drawn.labels[:, None])[:, 0]
    kept = judge(classifier, best.pictures, "cpu").gather(1, best.labels[:, None])[:, 0]
    for label in (0, 1):
        of_class = scores[drawn.labels == label].sort(descending=True).values
        torch.testing.assert_close(kept[best.labels == label], of_class[:3])
    out = tmp_path / "best.png"
    command = ["sample", "--run", str(prior), "--count", "4", "--out", str(out), "--keep-best"]
    assert cli.main([*command, "0.5", "--classifier", str(classifier), "--device", "cpu"]) == 0
    assert out.is_file()


def test_refusals(
    striped: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train-classifier", "--data", str(striped), "--device", "cpu"]
    assert cli.main([*train, "--out", str(classifier)]) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err
    assert cli.main([*train, "--out", str(tmp_path / "new"), "--steps", "0"]) == 2
    assert "steps must be at least 1" in capsys.readouterr().err
    plain = tmp_path / "plain.npy"
    np.save(plain, np.zeros((4, 8, 8), np.uint8))
    command = ["train-classifier", "--data", str(plain), "--out", str(tmp_path / "new")]
    assert cli.main(command) == 2
    assert "must have classes; they have none" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"must be of pictures \(1, 9, 9\); it was trained on"):
        judge(classifier, torch.zeros(2, 1, 9, 9), "cpu")
    with pytest.raises(ValueError, match=r"pictures must be \(B, 1, H, W\)"):
        Classifier.from_pretrained(classifier)(torch.zeros(2, 3, 8, 8))
