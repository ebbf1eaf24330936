"""The lines of a text run: its own, divided for validation, and others in the same form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from fastvq.train.data import split_validation
from fastvq.train.data.text import TextDataset
from fastvq.train.run_folder import Run


def split_lines(config: dict[str, Any], length: int) -> tuple[TextDataset, TextDataset]:
    """The training and the held-out lines of a run's settings."""
    lines = TextDataset(config["data"], length, strict=config["strict"])
    return split_validation(cast(Any, lines), config["validation_fraction"], config["seed"])


def text_like(
    run: Run, data: str | os.PathLike[str], split: str | None, *, strict: bool = False
) -> TextDataset:
    """Lines of the length that a text run was trained with.

    Args:
        split: of the file that the run was trained on, "val" or "test" are the lines it held out,
            "train" or None the others. Other files have no parts.
        strict: refuse a line that is too long, instead of leaving it out.
    Raises:
        ValueError: the data is refused, or has no parts.
    """
    length: int = run.resolved["text_length"]
    if is_own_text(run, data):
        training, held_out = split_lines(run.config, length)
        return training if split in (None, "train") else held_out
    if split is not None:
        raise ValueError(
            f"text '{data}': only the file that the run was trained on has parts; leave split out."
        )
    return TextDataset(data, length, strict=strict)


def is_own_text(run: Run, data: str | os.PathLike[str]) -> bool:
    """Whether a path is of the file that a run was trained on."""
    return Path(data).expanduser().absolute() == Path(run.config["data"])


def is_of_text(run: Run) -> bool:
    """Whether a stage-1 run was trained on text."""
    return "text_length" in run.resolved
