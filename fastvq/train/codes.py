"""Codes of a whole data set: `extract_codes` writes them, `CodeFolder` reads them.

    codes/manifest.json              written last: without it the folder is not whole
          shard-00000-level0.npy     (n, h, w) or (n, t), the smallest unsigned dtype that holds
                                     the codes
          shard-00000-level1.npy     …, top level first
          shard-00000-labels.npy     (n,) int64, −1 where the data has no classes

One shard per process. Nothing is held in memory but one batch, in either direction, and nothing is
pickled. Training on codes is in priors.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastvq.models import VQVAE2
from fastvq.train.data import ItemDataset, evaluation_batches, examples
from fastvq.train.output_folder import (
    check_free,
    make_partial,
    move_into_place,
    partial_path,
)
from fastvq.train.processes import device_of, several_on_cpus
from fastvq.train.run_data import data_like, described
from fastvq.train.run_folder import Run, load_run
from fastvq.train.stage1 import class_names

MANIFEST = "manifest.json"
_FORMAT = "fastvq codes 1"


def extract_codes(
    run_path: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    only: str | None = None,
    class_pattern: str | None = None,
    clip_seconds: float | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> Path:
    """Encodes every picture, sound or line of a data set with a trained VQ-VAE; returns `out`.

    They are brought to the size and channels, or the rate, length and peak, that the run was
    trained with; broken ones are left out and counted. Under `torchrun` or `accelerate
    launch` each process writes a shard of its own. Everything is written into `out`.partial, which
    becomes `out` when it is whole.

    Args:
        run_path: a run of kind "vqvae" or "vqvae2".
        data, split, only: as `open_source`.
        class_pattern: as `open_source`; None: the run's own.
        clip_seconds: of sounds, how much of each is encoded (from its start, zeros behind); None:
            as long as the clips of the run.
        out: the folder to write; an existing one is refused unless `overwrite`.
        batch_size: pictures or sounds encoded together.
        device: None: this process's GPU where there is one.
        workers: processes that decode files; None chooses.
        strict: refuse a broken file instead.
        progress: show a bar, on the main process.
    Raises:
        ValueError: an argument breaks its rule, or the run, the data or `out` is refused.
        RuntimeError: the encoder gives a value that is not finite.
    """
    run, out = load_run(run_path), Path(out)
    if run.kind not in ("vqvae", "vqvae2", "text-vqvae"):
        raise ValueError(
            f"encode: run must be of kind vqvae, vqvae2 or text-vqvae; got {run.kind!r}."
        )
    if batch_size < 1:
        raise ValueError(f"encode: batch_size must be 1 or more; got {batch_size}.")
    check_free("codes", out, MANIFEST, overwrite)
    state = PartialState(cpu=several_on_cpus())
    dataset = data_like(
        run,
        data,
        split=split,
        only=only,
        class_pattern=class_pattern,
        clip_seconds=clip_seconds,
        strict=strict,
    )
    where = state.device if device is None else device_of(str(device))
    model = cast(VQVAE2, run.model(where))
    partial = partial_path(out)
    state.wait_for_everyone()
    if state.is_main_process:
        make_partial(out)
    state.wait_for_everyone()
    _write_shard(model, dataset, partial, state, batch_size, workers, progress)
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = _manifest(run, model, dataset, partial, state.num_processes)
        path = partial / MANIFEST
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        move_into_place(partial, out)
    state.wait_for_everyone()
    return out


class CodeFolder:
    """The codes of N pictures or sounds, memory-mapped. Written by `extract_codes`.

    It answers to `training_batches` and `evaluation_batches` as an `ItemDataset` does; their
    batches then hold "codes", a list of (B, h, w) or (B, t) int64 per level, top first.

    Args:
        path: the folder.
    Attributes:
        num_codes: K of each level, top first.
        shapes: [h, w] or [t] of each level.
        class_names: the names of the classes; None where there are none.
        num_classes: their number; 0 where there are none.
        labels: (N,) int64 labels, or None.
        stage1: {"path", "step", "weights_sha256"} of the run that made the codes.
        manifest: all of manifest.json.
    Raises:
        ValueError: not such a folder, or a shard is missing, truncated or altered in its shape.
    """

    noun = "map"
    decodes = False  # reading takes no decoding that worker processes would speed up

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        levels = self.manifest["levels"]
        self.num_codes: list[int] = [level["num_codes"] for level in levels]
        self.shapes: list[list[int]] = [level["shape"] for level in levels]
        self.class_names: list[str] | None = self.manifest["class_names"]
        self.num_classes = len(self.class_names or [])
        self.stage1: dict[str, Any] = self.manifest["stage1"]
        self._shards: list[list[NDArray[Any]]] = []
        labels = []
        for number, shard in enumerate(self.manifest["shards"]):
            arrays = [self._open(number, shard, level) for level in range(len(levels))]
            self._shards.append(arrays)
            labels.append(self._open(number, shard, None))
        counts = [shard["count"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.indices = np.arange(sum(counts), dtype=np.int64)
        self._labels = np.concatenate(labels)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        return self._labels[self.indices] if self.num_classes else None

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, positions: Sequence[int] | NDArray[np.int64]) -> CodeFolder:
        """The same codes at these positions alone, in their order."""
        chosen = object.__new__(CodeFolder)
        chosen.__dict__.update(self.__dict__)
        chosen.indices = self.indices[np.asarray(positions, np.int64)]
        return chosen

    def codes(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Tensor]:
        """The codes at `positions`: one (n, *shape) int64 per level, top first.

        Raises:
            ValueError: a code is outside its codebook: the shard was altered.
        """
        indices = self.indices[np.asarray(positions, np.int64)]
        maps = [np.empty((len(indices), *shape), np.int64) for shape in self.shapes]
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(shard_of):
            chosen = np.nonzero(shard_of == number)[0]
            start = self._ends[number] - len(self._shards[number][0])
            for level, array in enumerate(self._shards[number]):
                maps[level][chosen] = array[indices[chosen] - start]
        for level, values in enumerate(maps):
            if values.size and values.max() >= self.num_codes[level]:
                raise ValueError(
                    f"codes '{self.path}': level {level} must be below {self.num_codes[level]}; "
                    f"got {values.max()}. The files were altered: extract them again."
                )
        return [torch.from_numpy(values) for values in maps]

    def read_batch(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        *,
        epoch: int = 0,
        drop_broken: bool = False,
    ) -> dict[str, Any]:
        """ "codes", "label" (n,), "index" (n,), and "broken", always empty; as `PictureDataset`."""
        indices = self.indices[np.asarray(positions, np.int64)]
        return {
            "codes": self.codes(positions),
            "label": torch.from_numpy(self._labels[indices]),
            "index": torch.from_numpy(indices),
            "broken": [],
        }

    def _open(self, number: int, shard: dict[str, Any], level: int | None) -> NDArray[Any]:
        """One array of a shard, checked: a level's codes, or the labels."""
        name = _file_name(number, level)
        path, size = self.path / name, shard["files"].get(name)
        if size is None or not path.is_file():
            raise _refused(self.path, f"{name} is missing")
        if path.stat().st_size != size:
            raise _refused(self.path, f"{name} must have {size} bytes; got {path.stat().st_size}")
        mode = "r" if level is not None and shard["count"] else None  # nothing to map in an empty
        try:
            array: NDArray[Any] = np.load(path, allow_pickle=False, mmap_mode=cast(Any, mode))
        except (OSError, ValueError, EOFError) as error:
            raise _refused(self.path, f"{name} is not a readable NumPy file ({error})") from None
        shape, dtype = (shard["count"],), np.dtype(np.int64)
        if level is not None:
            described = self.manifest["levels"][level]
            shape, dtype = (*shape, *described["shape"]), np.dtype(described["dtype"])
        if array.shape != shape or array.dtype != dtype:
            raise _refused(
                self.path, f"{name} must be {dtype} {shape}; got {array.dtype} {array.shape}"
            )
        return array


class _Rows:
    """An .npy file that grows row by row; `close` writes the final count into its header."""

    def __init__(self, path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._file: BinaryIO = path.open("wb")
        self._shape, self._dtype, self.count = tuple(shape), dtype, 0
        self._write_header()
        self._start = self._file.tell()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.count, *self._shape),
        }
        # NumPy pads the header so that the first axis can grow in place.
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, rows: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self.count += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start
        self._file.close()


def _write_shard(
    model: VQVAE2,
    dataset: ItemDataset,
    folder: Path,
    state: PartialState,
    batch_size: int,
    workers: int | None,
    progress: bool,
) -> None:
    """This process's part of the pictures, and a note of its count and broken pictures."""
    rank, device = state.process_index, next(model.parameters()).device
    dtype = _code_dtype(model.num_codes)
    shapes = _level_shapes(model, dataset.shape)
    files = [_Rows(folder / _file_name(rank, level), s, dtype) for level, s in enumerate(shapes)]
    labels = _Rows(folder / _file_name(rank, None), (), np.dtype(np.int64))
    bar = tqdm(
        total=len(dataset) * (rank + 1) // state.num_processes
        - len(dataset) * rank // state.num_processes,
        disable=not (progress and state.is_main_process),
        desc="encode",
        unit=dataset.noun,
        dynamic_ncols=True,
    )
    batches = evaluation_batches(
        dataset,
        batch_size=batch_size,
        rank=rank,
        world_size=state.num_processes,
        workers=workers,
    )
    with bar, batches:
        for batch in batches:
            codes = model.encode(examples(batch, device))
            for level, (file, code_map) in enumerate(zip(files, codes)):
                if bool((code_map < 0).any()):
                    name = dataset.source.name(int(batch["index"][0]))
                    raise RuntimeError(
                        f"encode: the encoder gives values that are not finite at level {level}, "
                        f"in the batch that starts at {name}. Train the run again."
                    )
                file.add(code_map.cpu().numpy())
            labels.add(batch["label"].numpy())
            bar.update(len(batch["index"]))
        broken = len(batches.broken)
    for file in (*files, labels):
        file.close()
    note = {"count": labels.count, "broken": broken}
    _note(folder, rank).write_text(json.dumps(note), encoding="utf-8")


def _manifest(
    run: Run, model: VQVAE2, dataset: ItemDataset, folder: Path, world_size: int
) -> dict[str, Any]:
    """manifest.json from what the processes noted; their notes are removed."""
    shards, broken = [], 0
    shapes = _level_shapes(model, dataset.shape)
    for rank in range(world_size):
        note = json.loads(_note(folder, rank).read_text(encoding="utf-8"))
        _note(folder, rank).unlink()
        names = [_file_name(rank, level) for level in (*range(len(shapes)), None)]
        files = {name: (folder / name).stat().st_size for name in names}
        shards.append({"count": note["count"], "files": files})
        broken += note["broken"]
    dtype = _code_dtype(model.num_codes).name
    return {
        "format": _FORMAT,
        "levels": [
            {"shape": list(shape), "num_codes": model.num_codes, "dtype": dtype} for shape in shapes
        ],
        "count": sum(shard["count"] for shard in shards),
        "class_names": class_names(dataset.class_names, dataset.num_classes),
        "stage1": {
            "path": str(run.path.absolute()),
            "step": run.step,
            "weights_sha256": run.weights_sha256,
        },
        "source": {
            "path": str(Path(dataset.source.path).absolute()),
            "split": dataset.source.split,
            "description": str(dataset.source),
            **described(cast(Any, dataset)),
            "broken": broken,
        },
        "shards": shards,
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        there = f"it holds no {MANIFEST}" if path.is_dir() else "no such folder"
        raise ValueError(f"codes '{path}': {there}. Name a folder that fastvq encode has written.")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(path, f"{MANIFEST} is not readable JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise _refused(path, f"{MANIFEST} must say format '{_FORMAT}'")
    missing = {"levels", "count", "class_names", "stage1", "shards"} - manifest.keys()
    if missing:
        raise _refused(path, f"{MANIFEST} lacks {', '.join(sorted(missing))}")
    if manifest["count"] != sum(shard["count"] for shard in manifest["shards"]):
        raise _refused(path, f"{MANIFEST} has a count that is not the sum of its shards'")
    return manifest


def _level_shapes(model: VQVAE2, shape: tuple[int, ...]) -> list[list[int]]:
    """[h, w] or [t] of each level's codes of data (C, …), top first."""
    coarsest = model.downsample << (model.levels - 1)
    top = [-(-size // coarsest) for size in shape[1:]]
    return [[size << level for size in top] for level in range(model.levels)]


def _code_dtype(num_codes: int) -> np.dtype[Any]:
    return np.dtype(np.min_scalar_type(num_codes - 1))


def _file_name(shard: int, level: int | None) -> str:
    return f"shard-{shard:05d}-" + ("labels.npy" if level is None else f"level{level}.npy")


def _note(folder: Path, rank: int) -> Path:
    return folder / f"shard-{rank:05d}.json"


def _refused(path: Path, reason: str) -> ValueError:
    return ValueError(f"codes '{path}': {reason}. Extract the codes again.")
