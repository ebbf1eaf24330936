"""One-class MNIST: `python -m benchmarks.end_to_end.one_class_mnist --data DIR --out DIR`.

For each digit a VQ-VAE-2 and its prior are trained on that digit's training pictures alone; all
10,000 test pictures are then scored, and the figure is the area under the ROC curve with the
digit's own test pictures as normal and those of the nine other digits as anomalies.

Published means over the ten digits: deep SVDD 0.948 (Ruff et al. 2018, PMLR 80); OCGAN 0.975
(Perera et al. 2019, arXiv:1903.08550); LSA 0.975 (Abati et al. 2019, arXiv:1807.01653).

A digit that is finished is not trained or scored again, and one that was cut off goes on; the
record is written once all ten are there.

The sizes below were chosen on the digits 8 and 2, on training pictures only: the last 600, not
trained on, against the last 300 of each other digit. One earlier run (prior of 400 steps, digit 2)
had been scored on the test pictures before the prior was given more steps.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import records
from fastvq.train.anomaly import SCORES
from fastvq.train.codes import MANIFEST, extract_codes
from fastvq.train.data import open_source
from fastvq.train.detection import REPORT, DetectionConfig, detect
from fastvq.train.priors import PriorConfig, train_prior
from fastvq.train.stage1 import Stage1Config, train_stage1

HELD_IN = 600  # training pictures of the digit that are not trained on but standardise its scores
RECONSTRUCTED_LEVELS = 1  # of the three: the top level alone, 2 × 2 codes
SIZE = 32  # pixels: MNIST's 28 enlarged, so that three levels fit
_STEPS = {"vqvae2": 600, "prior": 1200}
_VQVAE2 = {
    "levels": 3,
    "hidden_channels": 32,
    "residual_channels": 16,
    "num_codes": 64,
    "code_dim": 16,
    "downsample": 4,
    "level_dropout": 0.66,
}
_PRIOR = {"hidden_channels": 32, "num_layers": 5, "condition_channels": 32}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end.one_class_mnist")
    parser.add_argument("--data", required=True, help="folder of MNIST's four IDX files")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs and reports")
    parser.add_argument("--digits", default="0123456789", help="only these (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, unrecorded")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    areas: dict[str, dict[str, float]] = {}
    for digit in arguments.digits:
        folder = arguments.out / f"digit-{digit}"
        options = {"seed": arguments.seed, "quick": arguments.quick}
        areas[digit] = score_digit(int(digit), arguments.data, folder, **options)
        print(f"digit {digit}: {_line(areas[digit])}", flush=True)
    means = {name: float(np.mean([one[name] for one in areas.values()])) for name in SCORES}
    print(f"mean of {len(areas)}: {_line(means)}")
    if len(areas) == 10 and not (arguments.quick or arguments.no_record):
        records.append(_record(areas, means, arguments.threads, arguments.seed))


def score_digit(
    digit: int, data: str, folder: Path, *, seed: int = 0, quick: bool = False
) -> dict[str, float]:
    """The area under the ROC curve of each score over the test pictures, training first."""
    out = folder / "detection"
    if not (out / REPORT).is_file():
        prior = train_digit(digit, data, folder, seed=seed, quick=quick)
        config = DetectionConfig(
            run=str(prior),
            data=data,
            split="test",
            held_in=str(folder / "held-in.npz"),
            out=str(out),
            levels=RECONSTRUCTED_LEVELS,
            normal=[str(digit)],
            heat_maps=100,
            batch_size=256,
            workers=0,
            seed=seed,
        )
        detect(config)
    found: dict[str, float] = json.loads((out / REPORT).read_text(encoding="utf-8"))["auroc"]
    return found


def _line(areas: dict[str, float]) -> str:
    return "   ".join(f"{name} {areas[name]:.4f}" for name in SCORES)


def _record(
    areas: dict[str, dict[str, float]], means: dict[str, float], threads: int, seed: int
) -> dict[str, Any]:
    return {
        "suite": "one_class_mnist",
        "case": {"vqvae2": _VQVAE2, "prior": _PRIOR, "steps": _STEPS, "seed": seed},
        "threads": threads,
        "unit": "AUROC over the 10,000 test pictures",
        "means": means,
        "digits": areas,
        "published": {"deep SVDD": 0.948, "OCGAN": 0.975, "LSA": 0.975},
        "machine": records.machine("cpu"),
        "versions": records.versions(),
        **records.source(),
    }


def train_digit(digit: int, data: str, folder: Path, *, seed: int = 0, quick: bool = False) -> Path:
    """Train both stages for one digit, or go on where an earlier call was cut off.

    Returns:
        The run of the prior; beside it lies held-in.npz.
    """
    train, held_in = folder / "train.npz", folder / "held-in.npz"
    if not (train.is_file() and held_in.is_file()):
        pictures = _pictures_of(data, "train", digit)
        _save(train, pictures[:-HELD_IN])
        _save(held_in, pictures[-HELD_IN:])
    steps = dict.fromkeys(_STEPS, 4) if quick else _STEPS
    common: dict[str, Any] = {"learning_rate": 2e-3, "seed": seed}
    run = train_stage1(
        Stage1Config(
            model="vqvae2",
            data=str(train),
            run=str(folder / "vqvae2"),
            image_size=SIZE,
            workers=0,
            batch_size=64,
            model_arguments=dict(_VQVAE2),
            **_lengths(steps["vqvae2"]),
            **common,
        ),
        resume=True,
    )
    codes = folder / "codes"
    if not (codes / MANIFEST).is_file():
        extract_codes(run, train, codes, workers=0)
    return train_prior(
        PriorConfig(
            codes=str(codes),
            run=str(folder / "prior"),
            batch_size=32,
            weight_average=0.99,
            model_arguments=dict(_PRIOR),
            **_lengths(steps["prior"]),
            **common,
        ),
        resume=True,
    )


def _lengths(steps: int) -> dict[str, int]:
    return {"steps": steps, "checkpoint_every": min(steps, 200), "validate_every": steps}


def _pictures_of(data: str, split: str, digit: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(N, 28, 28, 1) of one digit, in the data set's order."""
    source: Any = open_source(data, split=split)
    if source.labels is None:
        raise ValueError(f"data '{data}': its labels are needed; there are none beside it.")
    return np.asarray(source.gather(np.nonzero(source.labels == digit)[0]))


def _save(path: Path, images: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    np.savez(partial, images=images)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
