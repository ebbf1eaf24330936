"""Pictures that lie in one array: MNIST-style IDX files, and NumPy's .npy and .npz.

Nothing here unpickles.
"""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvq.train.data.source import Array, Source

_IDX_IMAGES = re.compile(r"(?P<set>.*)images[-.]idx\d-ubyte(\.gz)?", re.IGNORECASE)
_IMAGE_KEYS = ("images", "x", "data", "arr_0")
_LABEL_KEYS = ("labels", "y")
_CHECK_BYTES = 1 << 26  # how much of a float array is looked at at once


class ArraySource(Source):
    """Pictures in one array, in memory or memory-mapped.

    Args:
        path: where it was read from; a copy in another process opens it again from there.
        images: (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, uint8, or float in 0…1.
            Where both the last and the second axis could be C, the last one is.
        labels: (N,) integers, or None.
    Raises:
        ValueError: a shape, a dtype or a value range breaks these rules.
    """

    kind = "pictures"

    def __init__(
        self, path: Path, images: Array, labels: Array | None, split: str | None = None
    ) -> None:
        self.path = path
        self.split = split
        self._images = _channels_last(path, images)
        self.dtype = np.dtype(np.uint8 if images.dtype == np.uint8 else np.float32)
        self.labels = None if labels is None else _check_labels(path, labels, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def read(self, index: int, *, at_least: int | None = None) -> Array:
        return np.asarray(self._images[index], self.dtype)

    def gather(self, indices: NDArray[np.int64]) -> Array:
        """(B, H, W, C): many pictures in one copy."""
        return np.asarray(self._images[indices], self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        reopen = open_array if self.path.suffix.lower() in (".npy", ".npz") else open_idx
        return reopen, (self.path,)


def _may_hold_objects(path: Path) -> bool:
    """Whether a file begins as an .npy, an .npz or a pickle does; NumPy takes all else for one."""
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x93NUMPY", b"PK", b"\x80"))


def open_array(path: Path) -> ArraySource:
    """Opens an .npy (memory-mapped) or an .npz (images, x, data or arr_0; labels or y)."""
    images, labels = None, None
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            images = loaded
        else:
            with loaded:
                keys = ", ".join(loaded.files) or "nothing"
                images = next((loaded[key] for key in _IMAGE_KEYS if key in loaded.files), None)
                labels = next((loaded[key] for key in _LABEL_KEYS if key in loaded.files), None)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        holds_objects = "pickle" in str(error) or "Python objects" in str(error)
        if holds_objects and _may_hold_objects(path):
            reason = "it holds Python objects, which are never unpickled"
        else:
            known = "" if holds_objects else f" ({error})"
            reason = f"not a readable NumPy file{known}"
        raise ValueError(f"data '{path}': {reason}. Save one uint8 or float array.") from None
    if images is None:
        raise ValueError(
            f"data '{path}': no array named {', '.join(_IMAGE_KEYS)}; it holds "
            f"{keys}. Name the pictures 'images'."
        )
    return ArraySource(path, images, labels)


def idx_images(folder: Path) -> list[Path]:
    """The IDX files of pictures in a folder, by their names."""
    return sorted(p for p in folder.iterdir() if _IDX_IMAGES.fullmatch(p.name) and p.is_file())


def idx_split(images: Path) -> str | None:
    """The part that the name of an IDX file spells out: train-… or t10k-… and test-…."""
    match = _IDX_IMAGES.fullmatch(images.name)
    prefix = match["set"].lower() if match else ""
    if "train" in prefix:
        return "train"
    return "test" if "t10k" in prefix or "test" in prefix else None


def is_idx(path: Path) -> bool:
    """Whether a file is IDX, by its name or by its first bytes."""
    if "-ubyte" in path.name.lower():
        return True
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as file:
            return bytes(file.read(3)) == b"\0\0\x08"
    except (OSError, EOFError, zlib.error):
        return False


def open_idx(path: Path) -> ArraySource:
    """Opens an IDX file of pictures, and the labels where their file lies beside it."""
    images = _read_idx(path)
    if images.ndim < 3:
        raise ValueError(
            f"data '{path}': an IDX file of pictures has 3 dimensions; got {images.ndim}. "
            "Name the file of the pictures; its labels are found beside it."
        )
    stem = re.sub(r"\.gz$", "", path.name)
    stem = stem.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    beside = [path.with_name(name) for name in (stem, f"{stem}.gz")]
    found = next((p for p in beside if p.exists() and p != path), None)
    labels = None if found is None or "labels" not in stem else _read_idx(found)
    return ArraySource(path, images, labels, idx_split(path))


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file: 0, 0, 8 (unsigned byte), the number of axes, each length as big-endian uint32,
    then the bytes in C order."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as file:
                data = file.read()
        else:
            data = path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"data '{path}': not readable ({error}). Copy or download it again."
        ) from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] == 0:
        raise ValueError(
            f"data '{path}': an IDX file of unsigned bytes opens with 00 00 08; "
            f"got {data[:4].hex(' ') or 'an empty file'}."
        )
    axes, start = data[3], 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist()) if len(data) >= start else (0,)
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"data '{path}': its header says {'×'.join(map(str, shape))} in {axes} axes, "
            f"{start + math.prod(shape)} bytes; got {len(data)}. Copy or download it again."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _channels_last(path: Path, images: Array) -> Array:
    """A view (N, H, W, C) of the array, once its dtype, shape and range are right."""
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(
            f"data '{path}': pictures must be uint8, or float in 0…1; got {images.dtype}."
        )
    if images.ndim == 3:
        view = images[..., None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        view = images
    elif images.ndim == 4 and images.shape[1] in (1, 3):
        view = images.transpose(0, 2, 3, 1)
    else:
        raise ValueError(
            f"data '{path}': pictures must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 "
            f"or 3; got {images.shape}."
        )
    if 0 in view.shape:
        raise ValueError(f"data '{path}': no pictures in it; its shape is {images.shape}.")
    if images.dtype != np.uint8:
        _check_range(path, images)
    return view


def _check_range(path: Path, images: Array) -> None:
    step = max(1, _CHECK_BYTES // images[0].nbytes)
    blocks = [images[start : start + step] for start in range(0, len(images), step)]
    low = float(np.min([block.min() for block in blocks]))  # NaN stays NaN
    high = float(np.max([block.max() for block in blocks]))
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"data '{path}': float pictures must lie in 0…1; got {low:g}…{high:g}. "
            "Scale them, or save them as uint8."
        )


def _check_labels(path: Path, labels: Array, count: int) -> NDArray[np.int64]:
    if labels.shape != (count,):
        raise ValueError(
            f"data '{path}': labels must be ({count},), one for each picture; got {labels.shape}."
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        low = "" if labels.dtype.kind not in "iu" else f" from {labels.min()}"
        raise ValueError(f"data '{path}': labels must be integers from 0; got {labels.dtype}{low}.")
    return labels.astype(np.int64)
