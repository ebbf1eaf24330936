"""Checkpoints of a training run: folders that are whole or absent, and are checked when read.

    checkpoints/step-00000500/model.safetensors       state dict of the model
                              optimizer.safetensors   moments, "<parameter number>.<name>"
                              average.safetensors     averaged weights, where the run keeps them
                              state.json              step, SHA-256 of each file, loss scale

Lives here: writing, finding, checking and reading these folders. Which tensors go in is the
training loop's affair; models for use are saved by `save_pretrained`. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT_CHECKPOINTS = 2
MODEL, OPTIMIZER, AVERAGE, STATE = (
    *("model.safetensors", "optimizer.safetensors", "average.safetensors"),
    "state.json",
)
_FOLDER = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"
_CHECKSUM = "state_sha256"


class Checkpoint(NamedTuple):
    """What one checkpoint holds; tensors on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor] | None
    scaler: dict[str, Any] | None  # of the fp16 loss scale


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = KEPT_CHECKPOINTS) -> Path:
    """Write a checkpoint below `folder`, then remove all but the newest `keep`.

    Everything is written into a folder with a temporary name, flushed to the disk, and renamed:
    a process killed at any moment leaves either the whole checkpoint or none. One that is already
    there for the same step is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step:08d}"
    partial, final = folder / f"{_PARTIAL}{name}", folder / name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    files: dict[str, str] = {}
    tensors = {
        MODEL: checkpoint.model,
        OPTIMIZER: checkpoint.optimizer,
        AVERAGE: checkpoint.average,
    }
    for file, values in tensors.items():
        if values is not None:
            save_file(_separate(values), partial / file, metadata={"format": "pt"})
            flush(partial / file)
            files[file] = sha256(partial / file)
    state: dict[str, Any] = {"step": checkpoint.step, "files": files, "scaler": checkpoint.scaler}
    state[_CHECKSUM] = _state_checksum(state)
    (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    flush(partial / STATE)
    flush(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    flush(folder)
    for old in checkpoint_folders(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first; half-written ones do not count."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name)),
        key=step_of,
    )


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint's folder spells out."""
    match = _FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed while writing have left below `folder`."""
    if folder.is_dir():
        for path in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint below `folder`, checked and read; None where there is none.

    Raises:
        ValueError: it is truncated or altered. An older one is named, never taken in its place.
    """
    found = checkpoint_folders(folder)
    return load_checkpoint(found[-1]) if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Check and read one checkpoint.

    Raises:
        ValueError: a file is missing, truncated or altered; the message names it and the way out.
    """
    state = read_state(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, expected in state["files"].items():
        if not (path / file).is_file():
            raise _damaged(path, f"{file} is missing")
        if sha256(path / file) != expected:
            raise _damaged(path, f"{file} does not match its SHA-256: it is truncated or altered")
        try:
            tensors[file] = load_file(path / file)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, f"{file} is not a safetensors file ({error})") from None
    for file in (MODEL, OPTIMIZER):
        if file not in tensors:
            raise _damaged(path, f"{STATE} does not list {file}")
    return Checkpoint(
        state["step"], tensors[MODEL], tensors[OPTIMIZER], tensors.get(AVERAGE), state["scaler"]
    )


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json, checked against its own checksum: step, files, scaler.

    Raises:
        ValueError: it is missing, not JSON, or altered.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(path, f"{STATE} is missing") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{STATE} is not readable JSON ({error})") from None
    if not isinstance(state, dict) or state.get(_CHECKSUM) != _state_checksum(state):
        raise _damaged(path, f"{STATE} does not match its checksum: it was altered")
    if state["step"] != step_of(path):
        raise _damaged(path, f"{STATE} is of step {state['step']}; the folder was renamed")
    return state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors, "<parameter number>.<name>"; settings are not in it."""
    return {
        f"{number}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}


def _state_checksum(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, reason: str) -> ValueError:
    older = [other for other in checkpoint_folders(path.parent) if step_of(other) < step_of(path)]
    if older:
        way_out = f"Remove that folder to go on from the one before it, '{older[-1]}'."
    else:
        way_out = "There is no older one: restore a copy, or remove the run and start again."
    return ValueError(f"checkpoint '{path}': {reason}. {way_out}")
