"""Training the classifier that judges samples, and having it judge them.

One short supervised training on labelled pictures, without checkpoints: it takes a minute or two.
The network is `fastvq.models.Classifier`, the rule of rejection `fastvq.sampling.keep_best`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.models import Classifier
from fastvq.train.data import (
    PictureDataset,
    evaluation_batches,
    open_source,
    split_validation,
    to_float,
    training_batches,
)

_HELD_OUT = 0.1
_LEARNING_RATE = 2e-3


class Trained(NamedTuple):
    """Where a classifier lies, and how it reads pictures it was not trained on."""

    path: Path
    accuracy: float  # share of the held-out pictures read as their label, in 0…1
    held_out: int  # how many


def train_classifier(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    steps: int = 800,
    batch_size: int = 128,
    hidden_channels: int = 32,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> Trained:
    """Train a `Classifier` on labelled pictures and save it (safetensors and JSON) in `out`.

    AdamW on the cross-entropy, learning rate 2·10⁻³ falling to 0 along a cosine. A tenth of the
    pictures, chosen by the seed, is held out and read once at the end.

    Args:
        data: labelled pictures, see `open_source`; bring them to the size and channels of the
            samples by `image_size`, or train on what the prior's first stage was trained on.
        out: a folder that does not exist or is empty.
        split: part of the data.
        steps, batch_size, hidden_channels, seed: of the training; 1 or more, seed 0 or more.
    Raises:
        ValueError: the data has no classes, `out` is not free, or an argument breaks its rule.
    """
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"train-classifier: --out '{out}' must be a new or empty folder.")
    for name, value in (("steps", steps), ("hidden_channels", hidden_channels)):
        if value < 1:
            raise ValueError(f"train-classifier: {name} must be at least 1; got {value}.")
    dataset = PictureDataset(open_source(data, split=split), image_size=image_size)
    if dataset.labels is None:
        raise ValueError(
            f"train-classifier: the pictures of '{data}' must have classes; they have none. Put "
            "each class in a folder of its own."
        )
    training, held_out = split_validation(dataset, _HELD_OUT, seed)
    torch.manual_seed(seed)
    model = Classifier(
        dataset.num_classes,
        dataset.shape[0],
        hidden_channels,
        dataset.shape,
        dataset.class_names,
    ).to(device)
    _fit(model, training, steps, batch_size, seed, workers, progress)
    model.eval()
    right = read = 0
    with evaluation_batches(held_out, batch_size=batch_size, workers=workers) as batches:
        for batch in batches:
            found = model.probabilities(to_float(batch["picture"])).argmax(dim=1).cpu()
            right += int((found == batch["label"]).sum())
            read += len(found)
    model.save_pretrained(folder)
    return Trained(folder, right / max(read, 1), read)


def _fit(
    model: Classifier,
    dataset: PictureDataset,
    steps: int,
    batch_size: int,
    seed: int,
    workers: int | None,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    device = model.out.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    reading = training_batches(dataset, batch_size=batch_size, seed=seed, workers=workers)
    with reading as batches, tqdm(total=steps, desc="classifier", disable=not progress) as bar:
        for _ in range(steps):
            batch: Any = next(batches)
            logits = model(to_float(batch["picture"].to(device)))
            loss = F.cross_entropy(logits, batch["label"].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()


def judge(path: str | os.PathLike[str], pictures: Tensor, device: str) -> Tensor:
    """What the classifier saved at `path` thinks of pictures: (N, classes) probabilities, CPU.

    Args:
        pictures: (N, C, H, W) in 0…1.
    Raises:
        ValueError: the classifier was trained on pictures of another shape.
        FileNotFoundError: there is no classifier.
    """
    model = Classifier.from_pretrained(path, device=device)
    shape = model.config["picture_shape"]
    if shape is not None and list(shape) != list(pictures.shape[1:]):
        raise ValueError(
            f"sample: the classifier '{path}' must be of pictures {tuple(pictures.shape[1:])}; it "
            f"was trained on {tuple(shape)}. Train one with --image-size."
        )
    return model.probabilities(pictures).cpu()
