"""The folder of one training run: who may write into it, and how to open it again.

    run/config.json        every setting, and under "resolved" what the data decided
        metrics.jsonl      one JSON object per line
        checkpoints/       see checkpoint.py
        pictures/          reconstructions, samples, curves
        tensorboard/       where TensorBoard is installed
        model/             the finished model, for `from_pretrained`

`RunFolder` is the writer's side, `load_run` the reader's. Training itself is in loop.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvq.models import VAE, VQVAE, VQVAE2, HierarchicalPrior, TextVAE, TextVQVAE
from fastvq.train.checkpoint import (
    AVERAGE,
    MODEL,
    checkpoint_folders,
    flush,
    load_checkpoint,
    read_state,
    remove_partial,
    step_of,
)

MODEL_CLASSES: dict[str, type[nn.Module]] = {
    "vae": VAE,
    "vqvae": VQVAE,
    "vqvae2": VQVAE2,
    "prior": HierarchicalPrior,
    "text-vae": TextVAE,
    "text-vqvae": TextVQVAE,
}
# What may change when a run is resumed, since the weights of a given step do not depend on it.
CHANGEABLE = (
    *("steps", "checkpoint_every", "validate_every", "log_every", "workers", "run", "strict"),
    "fastvq_version",
)


class RunFolder:
    """Paths of a run, and writing its metrics."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.model = self.path / "model"

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], config: dict[str, Any], resume: bool = False
    ) -> RunFolder:
        """Make the folder and write `config` into it, or take one up again.

        Raises:
            ValueError: as `check`.
        """
        cls.check(path, config, resume)
        folder = cls(path)
        folder.pictures.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
        remove_partial(folder.checkpoints)
        partial = folder.config.with_name(".config.json")
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        flush(partial)
        os.replace(partial, folder.config)
        flush(folder.path)
        return folder

    @classmethod
    def check(
        cls, path: str | os.PathLike[str], config: dict[str, Any] | None, resume: bool
    ) -> None:
        """Refuse a folder this run may not write into; nothing is written.

        An empty or missing folder is free. With `resume`, a run of the same configuration is taken
        up (the lengths and intervals in `CHANGEABLE` may differ); None leaves that comparison out.

        Raises:
            ValueError: the folder holds a run and `resume` is False, something other than a run,
                or a run with another configuration.
        """
        folder = cls(path)
        if folder.path.exists() and not folder.path.is_dir():
            raise ValueError(f"run '{path}': it must be a folder; a file is there.")
        if not folder.path.exists() or folder._is_fresh():
            return
        if not folder.config.is_file():
            raise ValueError(
                f"run '{path}': it holds files but no run (no config.json). Name another folder."
            )
        if not resume:
            raise ValueError(
                f"run '{path}': it exists. Go on with it by --resume (resume=True), or name "
                "another folder."
            )
        if config is not None:
            _compare(path, _read_config(folder.config), json.loads(json.dumps(config)))

    def _is_fresh(self) -> bool:
        """Whether all there is was left by a run that was killed before its configuration."""
        files = {path.name for path in self.path.rglob("*") if path.is_file()}
        return files <= {".config.json"}

    def keep_metrics(self, step: int) -> None:
        """Drop the metrics after `step`, and a last line that a killed process left incomplete."""
        kept = [record for record in read_metrics(self.metrics) if record["step"] <= step]
        partial = self.metrics.with_name(".metrics.jsonl")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, self.metrics)

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append one line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Run:
    """A run as it lies on the disk, finished or not. Get one from `load_run`.

    Attributes:
        path: of its folder.
        config: every setting, by its name in `Stage1Config` or `PriorConfig`; `config["resolved"]`
            holds what the data decided ("model_arguments", "picture_shape" (C, H, W) or
            "code_shapes", "class_names", …).
        kind: "vae", "vqvae", "vqvae2", "prior", "text-vae" or "text-vqvae".
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._folder = RunFolder(path)
        if not self._folder.config.is_file():
            there = "it holds no config.json" if self.path.is_dir() else "no such folder"
            raise ValueError(f"run '{path}': {there}. Name a folder that training has written.")
        self.config = _read_config(self._folder.config)
        self.kind: str = self.config["kind"]

    @property
    def resolved(self) -> dict[str, Any]:
        """`config["resolved"]`."""
        resolved: dict[str, Any] = self.config["resolved"]
        return resolved

    @property
    def step(self) -> int:
        """Steps taken up to the newest checkpoint; 0 where there is none."""
        found = checkpoint_folders(self._folder.checkpoints)
        return step_of(found[-1]) if found else 0

    @property
    def pictures(self) -> Path:
        """The folder of its pictures."""
        return self._folder.pictures

    @property
    def class_names(self) -> list[str] | None:
        """The classes of its data, in the order of their labels; None where it has none."""
        return self.resolved["class_names"]

    @property
    def stage1(self) -> Path | None:
        """Of a prior: the run whose codes it models. None for other kinds."""
        stage1 = self.resolved.get("stage1")
        return None if stage1 is None else Path(stage1["path"])

    @property
    def weights_sha256(self) -> str:
        """Checksum of the weights that `model` would give.

        Raises:
            ValueError: there is no checkpoint, or it is damaged.
        """
        files: dict[str, str] = read_state(self._newest())["files"]
        return files.get(AVERAGE, files[MODEL])

    def metrics(self) -> list[dict[str, Any]]:
        """Its metrics, oldest first; see `fastvq.train.loop` for the names."""
        return read_metrics(self._folder.metrics)

    def model(self, device: str | torch.device = "cpu") -> nn.Module:
        """The model of the newest checkpoint in eval mode, with averaged weights where it has some.

        Raises:
            ValueError: there is no checkpoint yet, or the newest one is damaged.
        """
        newest = self._newest()
        checkpoint = load_checkpoint(newest)
        with torch.random.fork_rng(devices=[]):
            model = MODEL_CLASSES[self.kind](**self.resolved["model_arguments"])
        try:
            model.load_state_dict({**checkpoint.model, **(checkpoint.average or {})})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"checkpoint '{newest}': it does not fit the run: {reason}") from None
        return model.to(device).eval()

    def stage1_model(self, device: str | torch.device = "cpu") -> nn.Module:
        """Of a prior: the model that decodes its codes, checked to be the one that made them.

        Raises:
            ValueError: this is no prior, or the stage-1 run is gone or has other weights by now.
        """
        if self.stage1 is None:
            raise ValueError(f"run '{self.path}': it must be a prior; got a {self.kind}.")
        run = load_run(self.stage1)
        if run.weights_sha256 != self.resolved["stage1"]["weights_sha256"]:
            raise ValueError(
                f"run '{self.path}': its codes were made by other weights than '{self.stage1}' "
                f"holds now (step {run.step}). Extract the codes again and train the prior on them."
            )
        return run.model(device)

    def _newest(self) -> Path:
        found = checkpoint_folders(self._folder.checkpoints)
        if not found:
            raise ValueError(
                f"run '{self.path}': it has no checkpoint yet. Train it further with --resume "
                "(resume=True)."
            )
        return found[-1]


def load_run(path: str | os.PathLike[str]) -> Run:
    """Opens the run in a folder.

    Raises:
        ValueError: there is no run in it, or its config.json is damaged.
    """
    return Run(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a killed process is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"metrics '{path}': line {number} is not JSON.") from None
    return records


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"run '{path.parent}': config.json is not readable ({error}).") from None
    if not isinstance(config, dict) or config.get("kind") not in MODEL_CLASSES:
        raise ValueError(
            f"run '{path.parent}': config.json must hold a run's settings, with kind one of "
            f"{', '.join(MODEL_CLASSES)}."
        )
    if not isinstance(config.get("resolved"), dict):
        raise ValueError(f"run '{path.parent}': config.json lacks 'resolved'.")
    return config


def _compare(path: str | os.PathLike[str], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to resume with other settings, naming the first that differs."""
    before, after = _flat(old), _flat(new)
    for name in sorted(before.keys() | after.keys()):
        if name not in CHANGEABLE and before.get(name) != after.get(name):
            raise ValueError(
                f"run '{path}': it was started with {name} {before.get(name)!r}; got "
                f"{after.get(name)!r}. Resume it with the same settings (only "
                f"{', '.join(CHANGEABLE[:5])} may change), or name another folder."
            )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    resolved = {f"resolved.{name}": value for name, value in config["resolved"].items()}
    return {**{name: value for name, value in config.items() if name != "resolved"}, **resolved}
