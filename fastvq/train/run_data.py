"""The data of a run, and other data brought to the form that a run was trained on.

Lives here: from settings, or from a finished run, to a `PictureDataset` or a `SoundDataset`. What
these do is in `fastvq.train.data`.
"""

from __future__ import annotations

import os
from typing import Any, Protocol, cast

from fastvq.train.data import PictureDataset, SoundDataset, open_source
from fastvq.train.data.text import TextDataset
from fastvq.train.run_folder import Run
from fastvq.train.text_lines import is_of_text, text_like

_PICTURE_OPTIONS = ("image_size", "channels", "flip")
_SOUND_OPTIONS = ("sample_rate", "clip_seconds", "peak")


class DataConfig(Protocol):
    """The settings of a stage-1 run that concern its data; see `Stage1Config`."""

    data: str
    split: str | None
    only: str | None
    class_pattern: str | None
    seed: int
    strict: bool
    image_size: int | None
    channels: int | None
    flip: bool
    sample_rate: int | None
    clip_seconds: float | None
    peak: float | None


def open_training_data(
    config: DataConfig, image_size: int | None = None
) -> PictureDataset | SoundDataset:
    """All of a run's data, augmented as it is in training.

    Args:
        image_size: for pictures where the settings name none.
    Raises:
        ValueError: the data is refused, or a setting is given that its kind does not have.
    """
    source = open_source(
        config.data, split=config.split, only=config.only, class_pattern=config.class_pattern
    )
    others = _SOUND_OPTIONS if source.kind == "pictures" else _PICTURE_OPTIONS
    for name in others:
        if getattr(config, name) not in (None, False):
            raise ValueError(
                f"train: {name} must be left out for {source.kind}, which '{config.data}' holds; "
                f"got {getattr(config, name)!r}."
            )
    if source.kind == "sounds":
        return SoundDataset(
            source,
            rate=config.sample_rate,
            seconds=1.0 if config.clip_seconds is None else config.clip_seconds,
            peak=config.peak,
            moving=True,
            seed=config.seed,
            strict=config.strict,
        )
    return PictureDataset(
        source,
        image_size=image_size if config.image_size is None else config.image_size,
        channels=config.channels,
        flip=config.flip,
        seed=config.seed,
        strict=config.strict,
    )


def described(dataset: PictureDataset | SoundDataset | TextDataset) -> dict[str, Any]:
    """What `data_like` needs to know of a run's data, JSON-able."""
    if isinstance(dataset, TextDataset):
        return {"text_length": dataset.shape[1]}
    if isinstance(dataset, PictureDataset):
        return {"picture_shape": list(dataset.shape)}
    return {
        "sound_shape": list(dataset.shape),
        "sample_rate": dataset.rate,
        "peak": dataset.peak,
    }


def data_like(
    run: Run,
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    only: str | None = None,
    class_pattern: str | None = None,
    clip_seconds: float | None = None,
    strict: bool = False,
) -> PictureDataset | SoundDataset:
    """Data in the size, channels, rate and loudness that a stage-1 run was trained on.

    Of a run of text: a `TextDataset`, which answers as the others do.

    Args:
        run: of stage 1.
        class_pattern: None: the run's own.
        clip_seconds: of sounds; None: the run's own.
    Raises:
        ValueError: the data is refused, or is of another kind than the run's.
    """
    if is_of_text(run):
        for name, value in (("only", only), ("class_pattern", class_pattern)):
            if value is not None:
                raise ValueError(f"{name} must be left out for a run of text; got {value!r}.")
        return cast(PictureDataset, text_like(run, data, split, strict=strict))
    if class_pattern is None:
        class_pattern = run.config.get("class_pattern")
    source = open_source(data, split=split, only=only, class_pattern=class_pattern)
    if is_of_sounds(run):
        length, rate = run.resolved["sound_shape"][1], run.resolved["sample_rate"]
        return SoundDataset(
            source,
            rate=rate,
            seconds=length / rate if clip_seconds is None else clip_seconds,
            peak=run.resolved["peak"],
            strict=strict,
        )
    if clip_seconds is not None:
        raise ValueError(
            f"clip_seconds must be left out for a run of pictures; got {clip_seconds}."
        )
    channels, height, width = run.resolved["picture_shape"]
    return PictureDataset(source, image_size=(height, width), channels=channels, strict=strict)


def is_of_sounds(run: Run) -> bool:
    """Whether a stage-1 run was trained on sounds."""
    return "sound_shape" in run.resolved
