"""The files of a folder or a zip: finding, ordering and reading them, and the classes and parts
(train, val, test) that their folders spell out. What a file holds is not looked at here.
"""

from __future__ import annotations

import os
import posixpath
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


class Files:
    """The visible files below a folder or in a zip, by their relative name.

    Attributes:
        path: the folder or the zip.
        names: relative names with "/", in natural order (2.png before 10.png).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_zip = not path.is_dir()
        self._zip: zipfile.ZipFile | None = None
        self._zip_pid = 0
        found = self._zip_names() if self._is_zip else _folder_names(path)
        self.names = sorted((name for name in found if _visible(name)), key=_natural_key)

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        if self._is_zip:
            return self._open_zip().read(name)
        return (self.path / name).read_bytes()

    def _open_zip(self) -> zipfile.ZipFile:
        # A forked process shares its parent's file offset, so each process opens its own handle.
        handle = self._zip
        if handle is None or self._zip_pid != os.getpid():
            handle = zipfile.ZipFile(self.path)
            self._zip, self._zip_pid = handle, os.getpid()
        return handle

    def _zip_names(self) -> list[str]:
        try:
            entries = self._open_zip().infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"data '{self.path}': not a readable zip ({error}). Copy or download it again."
            ) from None
        return [entry.filename for entry in entries if not entry.is_dir()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}


class Layout(NamedTuple):
    """What the folders around a list of files say."""

    names: list[str]
    split: str | None
    labels: NDArray[np.int64] | None
    class_names: list[str] | None


def read_layout(path: Path, names: list[str], split: str | None) -> Layout:
    """Reads parts and classes off the folders of `names`.

    Folders that all files share are ignored. If what is then the first level holds nothing but
    parts (train/, val/, test/), one part is kept: `split`, else "train". The first level left over
    is the class. Files without one have no class.
    """
    found, first = _shared_folders(names)
    folders = {name.split("/")[first] for name in names if name.count("/") > first}
    is_flat = any(name.count("/") == first for name in names)
    parts = {_SPLIT_FOLDERS.get(folder.lower()) for folder in folders}
    if len(folders) > 1 and not is_flat and None not in parts:
        found = split or "train"
        kept = [n for n in names if _SPLIT_FOLDERS[n.split("/")[first].lower()] == found]
        if not kept:
            raise ValueError(
                f"data '{path}': no {found} part; it has {', '.join(sorted(folders))}. "
                "Name one of these with split."
            )
        names = kept
        _, first = _shared_folders(names)
    elif split is not None and split != found:
        raise ValueError(f"data '{path}': no {split} part. Leave split out to use all of it.")

    in_class = [name.count("/") > first for name in names]
    if not all(in_class):
        if any(in_class):
            warnings.warn(
                f"data '{path}': {in_class.count(False)} of {len(names)} files lie outside the "
                "class folders, so no classes are used. Move them into class folders to have "
                "classes.",
                stacklevel=3,
            )
        return Layout(names, found, None, None)
    return Layout(names, found, *_labels([name.split("/")[first] for name in names]))


def label_by_name(path: Path, layout: Layout, pattern: str) -> Layout:
    """The same files, each of the class that the one group of `pattern` finds in its name.

    Args:
        pattern: a regular expression, searched for in the relative name of every file.
    Raises:
        ValueError: not a regular expression with one group, or a name in which it is not found.
    """
    expression = _compiled("class_pattern", pattern)
    if expression.groups != 1:
        raise ValueError(
            f"data '{path}': class_pattern must have one group, the class, as in '^([^_]+)_'; "
            f"got {pattern!r}."
        )
    classes = []
    for name in layout.names:
        found = expression.search(name)
        if found is None or not found[1]:
            raise ValueError(
                f"data '{path}': class_pattern {pattern!r} finds no class in the name '{name}'."
            )
        classes.append(found[1])
    return Layout(layout.names, layout.split, *_labels(classes))


def keep_names(path: Path, layout: Layout, pattern: str) -> Layout:
    """Only the files in whose relative name `pattern` is found; the numbers of classes stay.

    Raises:
        ValueError: not a regular expression, or no name has it.
    """
    expression = _compiled("only", pattern)
    kept = [row for row, name in enumerate(layout.names) if expression.search(name)]
    if not kept:
        raise ValueError(
            f"data '{path}': only {pattern!r} is found in none of its {len(layout.names)} names; "
            f"one is '{layout.names[0]}'."
        )
    labels = None if layout.labels is None else layout.labels[kept]
    names = [layout.names[row] for row in kept]
    return Layout(names, layout.split, labels, layout.class_names)


def _compiled(argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"open_source: {argument} must be a regular expression; got {pattern!r} ({error})."
        ) from None


def _labels(classes: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    """(N,) labels, and the classes' names in natural order."""
    class_names = sorted(set(classes), key=_natural_key)
    label_of = {name: label for label, name in enumerate(class_names)}
    return np.array([label_of[c] for c in classes], np.int64), class_names


def _shared_folders(names: list[str]) -> tuple[str | None, int]:
    """(the part that a folder shared by all names spells out, how many levels they share)."""
    folder = posixpath.commonpath({posixpath.dirname(name) for name in names})
    shared = folder.split("/") if folder else []
    parts = [_SPLIT_FOLDERS[f.lower()] for f in shared if f.lower() in _SPLIT_FOLDERS]
    return parts[-1] if parts else None, len(shared)


def _folder_names(path: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(path, followlinks=True):
        parent = os.path.realpath(os.path.dirname(folder))
        if folder != str(path) and Path(parent).is_relative_to(os.path.realpath(folder)):
            subfolders.clear()  # a link back up the tree
            continue
        relative = Path(folder).relative_to(path)
        names += [(relative / file).as_posix() for file in files]
    return names


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _natural_key(name: str) -> tuple[list[str | int], str]:
    pieces = re.split(r"(\d+)", name)
    return [int(p) if i % 2 else p for i, p in enumerate(pieces)], name
