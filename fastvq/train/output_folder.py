"""A folder that a command fills in one go: written under another name, then moved into place.

Run folders, which grow and are resumed, are in run_folder.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastvq.train.checkpoint import flush


def check_free(what: str, out: Path, marker: str, overwrite: bool) -> None:
    """Refuse a folder that may not be written.

    Args:
        what: what the folder holds, as messages call it.
        marker: the file that shows that a folder holds such a thing.
    Raises:
        ValueError: `out` is not empty, and `overwrite` is False or `marker` is not in it.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f"{what} '{out}': it exists. Replace it by --overwrite (overwrite=True), or name "
            "another folder."
        )
    if not (out / marker).is_file():
        raise ValueError(
            f"{what} '{out}': it holds something other than {what} (no {marker}), which is not "
            "overwritten. Name another folder."
        )


def partial_path(out: Path) -> Path:
    """Where the content of `out` is written at first: beside it."""
    return out.with_name(f"{out.name}.partial")


def make_partial(out: Path) -> Path:
    """An empty `partial_path(out)`; what a killed process left there is removed."""
    partial = partial_path(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def move_into_place(partial: Path, out: Path) -> None:
    """Make a filled `partial_path` the folder `out`, in place of what is there."""
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        for written in folder.iterdir():
            flush(written)
        flush(folder)
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
