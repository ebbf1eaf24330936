"""`open_source`: recognising the form of data at a path. Each form is read in its own file."""

from __future__ import annotations

import os
from pathlib import Path

from fastvq.train.data import pictures, sounds
from fastvq.train.data.arrays import idx_images, idx_split, is_idx, open_array, open_idx
from fastvq.train.data.files import SPLITS, Files, keep_names, label_by_name, read_layout
from fastvq.train.data.source import Source


def open_source(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    only: str | None = None,
    class_pattern: str | None = None,
) -> Source:
    """Opens the pictures or sounds at a path.

    Args:
        path: one of
            a folder or a zip of pictures (PNG, JPEG, BMP, GIF, WebP, TIFF, PPM) or of WAV files,
            flat or with one sub-folder per class;
            an MNIST-style IDX file, gzipped or not, or a folder that holds such files;
            an .npy or .npz array of pictures (see `ArraySource`).
        split: "train", "val" or "test": the part to open, where the data has parts: IDX files
            named train-… and t10k-…, or folders named train, val and test above the classes. None
            opens the whole, or the train part where there are parts.
        only: a regular expression: of a folder or a zip, only the files in whose relative name it
            is found. The classes are those of all files.
        class_pattern: a regular expression with one group: each file's class is what the group
            finds in its name, as '^([^_]+)_' finds 7 in 7_anna_3.wav. None: the folders' names.
    Returns:
        A `Source`; its order is natural (2.png before 10.png) and the same everywhere.
    Raises:
        ValueError: nothing is there, nothing in it is supported, it is damaged, or it lacks the
            part that was asked for.
    """
    path = Path(path).expanduser()
    if split is not None and split not in SPLITS:
        raise ValueError(f"open_source: split must be one of {', '.join(SPLITS)}; got {split!r}.")
    if not path.exists():
        raise ValueError(f"data '{path}': no such file or folder. Check the path.")
    parts = idx_images(path) if path.is_dir() else []
    suffix = path.suffix.lower()
    if (path.is_dir() and not parts) or (path.is_file() and suffix == ".zip"):
        return _open_files(path, split, only, class_pattern)
    if only is not None or class_pattern is not None:
        raise ValueError(
            f"data '{path}': only and class_pattern are of folders and zips of files; it is "
            "none. Leave them out."
        )
    if parts:
        return _open_idx_folder(path, parts, split)
    if suffix in (".npy", ".npz"):
        if split is not None:
            raise ValueError(f"data '{path}': an array has no parts; leave split out.")
        return open_array(path)
    if is_idx(path):
        if split not in (None, idx_split(path)):
            raise ValueError(f"data '{path}': not the {split} part. Name the folder, or that file.")
        return open_idx(path)
    raise ValueError(
        f"data '{path}': not a supported file. It may be a folder or a .zip of pictures or WAV "
        "files, an IDX file (gzipped or not), or an .npy or .npz array."
    )


def _open_idx_folder(path: Path, files: list[Path], split: str | None) -> Source:
    found = [file for file in files if idx_split(file) == (split or "train")]
    if not found and split is None:
        found = files
    # The same file may be there both gzipped and not.
    stems = {file.name.removesuffix(".gz") for file in found}
    if len(stems) != 1:
        names = ", ".join(file.name for file in files)
        which = f"no {split} part" if not found else "more than one set of pictures"
        raise ValueError(f"data '{path}': {which} among {names}. Name one of these files.")
    return open_idx(found[0])


def _open_files(
    path: Path, split: str | None, only: str | None, class_pattern: str | None
) -> Source:
    files = Files(path)

    def having(extensions: tuple[str, ...]) -> list[str]:
        return [name for name in files.names if name.lower().endswith(extensions)]

    picture_names, sound_names = having(pictures.EXTENSIONS), having(sounds.EXTENSIONS)
    if picture_names and sound_names:
        raise ValueError(
            f"data '{path}': it holds {len(picture_names)} pictures and {len(sound_names)} WAV "
            "files. Keep one kind in it."
        )
    names = picture_names or sound_names
    if names:
        layout = read_layout(path, names, split)
        if class_pattern is not None:
            layout = label_by_name(path, layout, class_pattern)
        if only is not None:
            layout = keep_names(path, layout, only)
        opened = pictures.PictureFiles if picture_names else sounds.SoundFiles
        return opened(files, layout)
    raise ValueError(
        f"data '{path}': "
        + (f"none of its {len(files.names)} files is supported. " if files.names else "empty. ")
        + f"Files that count: {' '.join(pictures.EXTENSIONS + sounds.EXTENSIONS)}."
    )
