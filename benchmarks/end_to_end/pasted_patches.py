"""Localisation: `python -m benchmarks.end_to_end.pasted_patches --run DIR --data PHOTOGRAPHS`.

Into each photograph of the second half of the data a square of another one is pasted, and the maps
of `AnomalyModel` are asked where: the figure is the area under the ROC curve over all positions,
those of the patch being the anomalies. The first half, untouched, gives the means and deviations
that the combined map weighs both maps by. Nothing is trained; the run is of a prior over the codes
of photographs, or of a first stage, which has the map of the reconstruction alone.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from benchmarks import records
from fastvq.train.anomaly import AnomalyModel, Measures, Standardisation
from fastvq.train.data import examples
from fastvq.train.metrics import area_under_roc
from fastvq.train.run_data import data_like
from fastvq.train.run_folder import load_run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end.pasted_patches")
    parser.add_argument("--run", required=True, help="of a prior over photographs' codes")
    parser.add_argument("--data", required=True, help="photographs that it was not trained on")
    parser.add_argument("--side", type=int, default=64, help="of the patch, pixels (default 64)")
    parser.add_argument("--levels", type=int, help="reconstruct from the top N (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the patches' places")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    areas = measure(arguments.run, arguments.data, arguments.side, arguments.levels, arguments.seed)
    print("   ".join(f"{name} {area:.4f}" for name, area in areas.items()))
    if not arguments.no_record:
        case = {"side": arguments.side, "levels": arguments.levels, "seed": arguments.seed}
        records.append(
            {
                "suite": "pasted_patches",
                "case": case,
                "threads": arguments.threads,
                "unit": "AUROC over positions",
                "areas": areas,
                "machine": records.machine("cpu"),
                "versions": records.versions(),
                **records.source(),
            }
        )


def measure(run: str, data: str, side: int, levels: int | None, seed: int) -> dict[str, float]:
    """The area under the ROC curve of each map over all positions of all pasted photographs."""
    judge = AnomalyModel(load_run(run), levels=levels)
    dataset = data_like(judge.stage1, data)
    pictures = examples(dataset.read_batch(range(len(dataset)), drop_broken=True))
    half = len(pictures) // 2
    pasted, patch = paste(pictures[half:], side, seed)
    normal, odd = _maps(judge, pictures[:half]), _maps(judge, pasted)
    if "surprise" in normal:
        standard = Standardisation.fit(normal["surprise"], normal["error"])
        odd["combined"] = standard.combined(odd["surprise"], odd["error"])
    within = patch.flatten().numpy()
    return {name: area_under_roc(one[~within], one[within]) for name, one in odd.items()}


def paste(pictures: Tensor, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each picture (C, H, W) with a square of the next one at another place.

    Returns:
        The pictures, and (B, H, W) bool, True where they were pasted over.
    """
    rng = np.random.default_rng(seed)
    height, width = pictures.shape[2:]
    result, mask = pictures.clone(), torch.zeros(len(pictures), height, width, dtype=torch.bool)
    for number, other in enumerate(pictures.roll(-1, dims=0)):
        top, from_top = rng.integers(0, height - side + 1, 2)
        left, from_left = rng.integers(0, width - side + 1, 2)
        square = other[:, from_top : from_top + side, from_left : from_left + side]
        result[number, :, top : top + side, left : left + side] = square
        mask[number, top : top + side, left : left + side] = True
    return result, mask


def _maps(judge: AnomalyModel, pictures: Tensor) -> dict[str, np.ndarray]:
    """(positions of all pictures,) of each map."""
    found: list[Measures] = [judge.measure(one[None]) for one in pictures]
    maps = {"error": torch.cat([one.error for one in found])}
    surprise = [one.surprise for one in found if one.surprise is not None]
    if surprise:
        maps = {"surprise": torch.cat(surprise), **maps}
    return {name: one.flatten().double().numpy() for name, one in maps.items()}


if __name__ == "__main__":
    main()
