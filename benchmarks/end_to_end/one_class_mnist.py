"""One-class MNIST: `python -m benchmarks.end_to_end.one_class_mnist --data PATH --out DIR`.

For each digit a VQ-VAE-2 and its prior are trained on that digit's training pictures alone; all
10,000 test pictures are then scored, and the figure is the area under the ROC curve with the
digit's own test pictures as normal and those of the nine other digits as anomalies.

Published means over the ten digits: deep SVDD 0.948 (Ruff et al. 2018, PMLR 80); OCGAN 0.975
(Perera et al. 2019, arXiv:1903.08550); LSA 0.975 (Abati et al. 2019, arXiv:1807.01653).

The sizes below were chosen on the digits 8 and 2, on training pictures only: the last 600 training
pictures of the digit against the last 300 of each other digit. The test pictures played no part.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvq.train.codes import MANIFEST, extract_codes
from fastvq.train.data import open_source
from fastvq.train.priors import PriorConfig, train_prior
from fastvq.train.stage1 import Stage1Config, train_stage1

HELD_IN = 600  # training pictures of the digit that are not trained on but standardise its scores
RECONSTRUCTED_LEVELS = 1  # of the three: the top level alone, 2 × 2 codes
SIZE = 32  # pixels: MNIST's 28 enlarged, so that three levels fit
_STEPS = {"vqvae2": 600, "prior": 400}
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
