"""Tiny pictures, runs and codes that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvq.train.codes import extract_codes
from fastvq.train.priors import PriorConfig
from fastvq.train.stage1 import Stage1Config, train_stage1

TINY_VQ = {
    "hidden_channels": 8,
    "residual_channels": 4,
    "num_residual_blocks": 1,
    "num_codes": 16,
    "code_dim": 4,
    "downsample": 2,
    "revive_below": 0.5,
}
TINY_PRIOR = {
    "hidden_channels": 8,
    "num_layers": 2,
    "attention_every": 2,
    "attention_heads": 2,
    "condition_channels": 8,
    "conditioning_blocks": 1,
    "dropout": 0.2,
}
INTERVALS = {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "validate_every": 6}


def stage1_config(data: Path, run: Path, **changes: Any) -> Stage1Config:
    settings: dict[str, Any] = {
        **INTERVALS,
        "model": "vqvae2",
        "data": str(data),
        "run": str(run),
        "log_every": 2,
        "model_arguments": TINY_VQ,
    }
    return Stage1Config(**{**settings, **changes})


def prior_config(codes: Path, run: Path, **changes: Any) -> PriorConfig:
    settings: dict[str, Any] = {
        **INTERVALS,
        "codes": str(codes),
        "run": str(run),
        "log_every": 2,
        "model_arguments": TINY_PRIOR,
    }
    return PriorConfig(**{**settings, **changes})


def coloured(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, 8×8 RGB, of three classes in turn, bright in the class's channel; and labels."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(seed).integers(0, 100, (count, 8, 8, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 120
    return images, labels


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 `coloured` pictures."""
    images, labels = coloured(0, 60)
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="session")
def stage1_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a two-level VQ-VAE-2."""
    run = tmp_path_factory.mktemp("runs") / "stage1"
    return train_stage1(stage1_config(pictures, run), progress=False)


@pytest.fixture(scope="session")
def codes(pictures: Path, stage1_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codes of all pictures."""
    out = tmp_path_factory.mktemp("codes") / "codes"
    return extract_codes(stage1_run, pictures, out, batch_size=7, progress=False)
