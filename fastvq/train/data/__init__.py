"""The data of a training run: from a path to batches of pictures.

`open_source` recognises what lies at a path, `PictureDataset` gives every picture of it one size
and one number of channels, `SoundDataset` every sound one rate and one length, `training_batches`
and `evaluation_batches` read it ahead in worker processes, in an order that depends on the seed
and the step alone.

    source = open_source("photos.zip")
    dataset = PictureDataset(source, image_size=64, flip=True)
    with training_batches(dataset, batch_size=32, seed=0) as batches:
        for batch in batches:
            pictures = examples(batch, device)

This package knows nothing of models, devices or losses.
"""

from fastvq.train.data.dataset import (
    Batch,
    PictureDataset,
    examples,
    split_validation,
    to_float,
)
from fastvq.train.data.items import ItemDataset
from fastvq.train.data.loading import (
    BatchIterator,
    BrokenItems,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from fastvq.train.data.opening import open_source
from fastvq.train.data.sound_dataset import SoundBatch, SoundDataset
from fastvq.train.data.source import BrokenItem, Source

__all__ = [
    "Batch",
    "BatchIterator",
    "BrokenItem",
    "BrokenItems",
    "ItemDataset",
    "PictureDataset",
    "SoundBatch",
    "SoundDataset",
    "Source",
    "evaluation_batches",
    "examples",
    "open_source",
    "split_validation",
    "steps_per_epoch",
    "to_float",
    "training_batches",
]
