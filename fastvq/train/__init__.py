"""Training: configurations, runs and their folders, checkpoints, codes and metrics.

    run = train_stage1(Stage1Config(model="vqvae2", data="photos.zip", run="runs/photos"))
    codes = extract_codes(run, "photos.zip", "runs/photos-codes")
    prior = train_prior(PriorConfig(codes=str(codes), run="runs/photos-prior"))
    samples = load_run(prior).model().sample(16)

Needs the `train` extra. Imported names load on first use, so that importing this package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvq.train.codes import CodeFolder, extract_codes
    from fastvq.train.detection import DetectionConfig, detect
    from fastvq.train.metrics import evaluate_bits_per_dim, evaluate_elbo
    from fastvq.train.priors import PriorConfig, train_prior
    from fastvq.train.run_folder import Run, load_run
    from fastvq.train.stage1 import Stage1Config, train_stage1

_ROOMS = {
    "CodeFolder": "codes",
    "DetectionConfig": "detection",
    "PriorConfig": "priors",
    "Run": "run_folder",
    "Stage1Config": "stage1",
    "detect": "detection",
    "evaluate_bits_per_dim": "metrics",
    "evaluate_elbo": "metrics",
    "extract_codes": "codes",
    "load_run": "run_folder",
    "train_prior": "priors",
    "train_stage1": "stage1",
}

__all__ = [
    "CodeFolder",
    "DetectionConfig",
    "PriorConfig",
    "Run",
    "Stage1Config",
    "detect",
    "evaluate_bits_per_dim",
    "evaluate_elbo",
    "extract_codes",
    "load_run",
    "train_prior",
    "train_stage1",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
