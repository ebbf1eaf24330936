"""The demo: scikit-learn's handwritten digits through the whole pipeline, as a user would go.

Split and enlarge → train a two-level VQ-VAE-2 → extract its codes → train the class-conditional
priors of both levels → draw new digits → let classifiers judge them. Each step calls the public
function of its room and leaves its files in one folder; the sizes chosen for it are all below.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvq.train.codes import MANIFEST, extract_codes
from fastvq.train.data import open_source
from fastvq.train.digit_classifier import DigitClassifier
from fastvq.train.priors import PriorConfig, train_prior
from fastvq.train.showing import (
    draw_samples,
    save_sample_array,
    save_samples,
    show_reconstructions,
)
from fastvq.train.stage1 import Stage1Config, train_stage1

MARKER = "demo.json"
SIZE = 32  # pixels
TEST_PICTURES = 500
_CLASSES = 10
_SHOWN = 12  # samples of each class in the picture

# Found by trying a few sizes with seed 0, for two to three minutes on two CPU cores.
_VQVAE2 = {
    "levels": 2,
    "hidden_channels": 32,
    "residual_channels": 16,
    "num_codes": 32,
    "code_dim": 16,
    "level_dropout": 0.2,
}
_PRIOR = {
    "hidden_channels": 32,
    "num_layers": 6,
    "dropout": 0.1,
    "condition_channels": 32,
}
_STEPS = {"vqvae2": 400, "prior": 1000, "samples_per_class": 130}
_QUICK_STEPS = {"vqvae2": 4, "prior": 4, "samples_per_class": 12}


def run_demo(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the demo, or go on with an interrupted one; prints and writes what it finds.

    Args:
        out: the folder to write. One that holds a demo of the same settings is gone on with.
        seed: of the split, the training and the samples; 0 or more.
        quick: a few steps of each training, to see that everything works.
        overwrite: delete the demo that `out` holds and start anew.
        progress: show bars.
    Returns:
        What results.json holds: "read_as_asked", "real_accuracy", "classification_accuracy_score"
        (all in 0…1), the sizes they were taken over, "seconds" and the paths of the pictures.
    Raises:
        ValueError: `out` holds something other than a demo of these settings.
    """
    started = time.perf_counter()
    folder = Path(out)
    settings = {"seed": seed, "quick": quick}
    _open_folder(folder, settings, overwrite)
    steps = _QUICK_STEPS if quick else _STEPS
    train_data, test_data = folder / "digits-train.npz", folder / "digits-test.npz"

    _say(1, f"handwritten digits, enlarged to {SIZE} × {SIZE}")
    if not (train_data.is_file() and test_data.is_file()):
        _write_digits(train_data, test_data, seed)
    for path in (train_data, test_data):
        print(f"      {open_source(path)}")

    _say(2, f"two-level VQ-VAE-2, {steps['vqvae2']} steps")
    run = train_stage1(
        _stage1_config(folder / "vqvae2", train_data, steps["vqvae2"], seed),
        resume=True,
        progress=progress,
    )
    errors = show_reconstructions(run, test_data, folder / "reconstructions.png", measure=500)
    for error in errors:
        print(f"      test digits from {error.name}: MSE {error.mse:.5f}, PSNR {error.psnr:.1f} dB")

    _say(3, "codes of the training digits")
    codes = folder / "codes"
    if not (codes / MANIFEST).is_file():
        extract_codes(run, train_data, codes, progress=progress)

    _say(4, f"class-conditional priors of both levels, {steps['prior']} steps")
    prior = train_prior(
        _prior_config(folder / "prior", codes, steps["prior"], seed),
        resume=True,
        progress=progress,
    )

    _say(5, f"{_CLASSES * steps['samples_per_class']} new digits")
    results = _judge(folder, prior, seed, steps["samples_per_class"], (train_data, test_data))
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["settings"] = settings
    _write_json(folder / "results.json", results)
    _report(folder, results)
    return results


def _open_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder, or check that its demo is the one that was asked for."""
    marker = folder / MARKER
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"demo: --out '{folder}' must be a folder; a file is there.")
    if folder.exists() and any(folder.iterdir()):
        if not marker.is_file():
            raise ValueError(
                f"demo: --out '{folder}' holds files but no demo (no {MARKER}). Name another "
                "folder."
            )
        if overwrite:
            shutil.rmtree(folder)
        else:
            found = json.loads(marker.read_text(encoding="utf-8"))
            if found != settings:
                raise ValueError(
                    f"demo: --out '{folder}' holds a demo of {_describe(found)}; got "
                    f"{_describe(settings)}. Name another folder, or start anew with --overwrite."
                )
            print(f"going on with the demo in '{folder}' (--overwrite starts anew)")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(marker, settings)


def _describe(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _write_digits(train: Path, test: Path, seed: int) -> None:
    """1797 digits, each class divided alike, as .npz with uint8 images (N, 32, 32) and labels."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    resized = [
        np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for picture in small
    ]
    parts = train_test_split(
        np.stack(resized),
        digits.target.astype(np.int64),
        test_size=TEST_PICTURES,
        stratify=digits.target,
        random_state=seed,
    )
    for path, images, labels in ((train, parts[0], parts[2]), (test, parts[1], parts[3])):
        partial = path.with_name(f".{path.name}")
        np.savez(partial, images=images, labels=labels)
        os.replace(partial, path)


def _stage1_config(run: Path, data: Path, steps: int, seed: int) -> Stage1Config:
    return Stage1Config(
        model="vqvae2",
        data=str(data),
        run=str(run),
        steps=steps,
        batch_size=64,
        checkpoint_every=100,
        validate_every=500,
        learning_rate=1e-3,
        seed=seed,
        model_arguments=dict(_VQVAE2),
    )


def _prior_config(run: Path, codes: Path, steps: int, seed: int) -> PriorConfig:
    return PriorConfig(
        codes=str(codes),
        run=str(run),
        steps=steps,
        batch_size=64,
        checkpoint_every=100,
        validate_every=500,
        learning_rate=2e-3,
        seed=seed,
        weight_average=0.995,
        model_arguments=dict(_PRIOR),
    )


def _judge(
    folder: Path, prior: Path, seed: int, per_class: int, data: tuple[Path, Path]
) -> dict[str, Any]:
    """Draw samples of every class, write them, and take the two figures."""
    samples = draw_samples(prior, per_class * _CLASSES, seed=seed, batch_size=260)
    assert samples.labels is not None
    drawn_path = save_sample_array(samples, folder / "samples.npz")
    rows = np.concatenate([np.arange(_SHOWN) + label * per_class for label in range(_CLASSES)])
    assert samples.names is not None
    shown = samples._replace(
        pictures=samples.pictures[rows],
        labels=samples.labels[rows],
        names=[samples.names[row] for row in rows],
    )
    save_samples(shown, folder / "samples.png")
    drawn, asked = _load(drawn_path)
    (train, train_labels), (test, test_labels) = _load(data[0]), _load(data[1])
    on_real = DigitClassifier(train, train_labels)
    on_samples = DigitClassifier(drawn, asked)
    return {
        "read_as_asked": on_real.accuracy(drawn, asked),
        "real_accuracy": on_real.accuracy(test, test_labels),
        "classification_accuracy_score": on_samples.accuracy(test, test_labels),
        "samples": len(drawn),
        "real_training_digits": len(train),
        "real_test_digits": len(test),
        "pictures": {
            "samples": str(folder / "samples.png"),
            "reconstructions": str(folder / "reconstructions.png"),
        },
    }


def _load(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(images (N, H, W), labels (N,))."""
    with np.load(path, allow_pickle=False) as arrays:
        images = arrays["images"]
        return images.reshape(*images.shape[:3]), arrays["labels"]


def _say(number: int, text: str) -> None:
    print(f"[{number}/5] {text}", flush=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _report(folder: Path, results: dict[str, Any]) -> None:
    """The two figures, and where everything lies."""
    print(
        f"""
A classifier trained on {results["real_training_digits"]} real digits reads
  {results["read_as_asked"]:6.1%} of the {results["samples"]} samples as the class asked for
  {results["real_accuracy"]:6.1%} of {results["real_test_digits"]} real test digits correctly
Classification accuracy score: a classifier trained on the samples only reads
  {results["classification_accuracy_score"]:6.1%} of the real test digits correctly
  (Ravuri and Vinyals 2019, arXiv:1905.10887; Razavi et al. 2019, arXiv:1906.00446, section 4)

new digits, a row per class:        {folder / "samples.png"}
test digits, level by level:        {folder / "reconstructions.png"}
the figures:                        {folder / "results.json"}
runs, with curves and checkpoints:  {folder / "vqvae2"}, {folder / "prior"}
{results["seconds"]:.0f} seconds, this time"""
    )
