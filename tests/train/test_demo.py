"""The demo: its digits, its judge, and the folder it leaves. Its quality needs the full demo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastvq.train import demo
from fastvq.train.digit_classifier import DigitClassifier
from fastvq.train.run_folder import load_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick demo, finished."""
    out = tmp_path_factory.mktemp("demo") / "out"
    demo.run_demo(out, quick=True, progress=False)
    return out


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        return arrays["images"], arrays["labels"]


def test_digits_are_divided_by_class_without_overlap(folder: Path) -> None:
    train, train_labels = load(folder / "digits-train.npz")
    test, test_labels = load(folder / "digits-test.npz")
    assert train.shape == (1297, 32, 32)
    assert test.shape == (500, 32, 32)
    assert train.dtype == test.dtype == np.uint8
    shares = [np.bincount(labels) / len(labels) for labels in (train_labels, test_labels)]
    # Stratified: each class's counts are rounded, by less than one picture in either part.
    assert np.abs(shares[0] - shares[1]).max() <= 1 / 500 + 1 / 1297
    assert not {picture.tobytes() for picture in train} & {picture.tobytes() for picture in test}


def test_the_enlarged_digits_are_still_the_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    small = load_digits()
    images, labels = load(folder / "digits-test.npz")
    means = images.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)) * (16 / 255)
    distance = ((means[:, None] - small.images[None]) ** 2).sum(axis=(2, 3))
    assert (small.target[distance.argmin(axis=1)] == labels).all()


def test_the_classifier_is_a_classifier(folder: Path) -> None:
    train, test = load(folder / "digits-train.npz"), load(folder / "digits-test.npz")
    judge = DigitClassifier(*train)
    # The data set's own documentation reports 97 % for such a machine; chance is 10 %.
    assert judge.accuracy(*test) > 0.95
    assert judge.accuracy(test[0], (test[1] + 1) % 10) < 0.05


def test_results_are_those_of_the_samples_on_disk(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    train, test = load(folder / "digits-train.npz"), load(folder / "digits-test.npz")
    samples, asked = load(folder / "samples.npz")
    assert (np.bincount(asked) == 12).all()
    drawn = samples[..., 0]
    assert results["samples"] == len(drawn) == 120
    assert results["real_accuracy"] == DigitClassifier(*train).accuracy(*test)
    assert results["read_as_asked"] == DigitClassifier(*train).accuracy(drawn, asked)
    score = DigitClassifier(drawn, asked).accuracy(*test)
    assert results["classification_accuracy_score"] == score
    for picture in results["pictures"].values():
        assert Path(picture).is_file()


def test_a_second_demo_shows_the_first_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_run(folder / "prior").weights_sha256
    samples = (folder / "samples.png").read_bytes()
    capsys.readouterr()
    demo.run_demo(folder, quick=True, progress=False)
    assert load_run(folder / "prior").weights_sha256 == weights
    assert (folder / "samples.png").read_bytes() == samples
    assert f"going on with the demo in '{folder}'" in capsys.readouterr().out


def test_other_settings_are_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"seed 0, quick True; got seed 1, quick True.*--overwrite"
    ):
        demo.run_demo(folder, seed=1, quick=True)


def test_a_foreign_folder_is_refused_even_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files but no demo"):
            demo.run_demo(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="must be a folder; a file is there"):
        demo.run_demo(tmp_path / "thesis.txt")


def test_an_interrupted_demo_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(demo, "train_prior", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(out, quick=True, progress=False)
    demo.run_demo(out, quick=True, progress=False)
    assert load_run(out / "prior").weights_sha256 == load_run(folder / "prior").weights_sha256


def test_overwriting_starts_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    shutil.copytree(folder, out)
    monkeypatch.setattr(demo, "_write_digits", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(out, seed=1, quick=True, overwrite=True)
    assert [path.name for path in out.iterdir()] == [demo.MARKER]
