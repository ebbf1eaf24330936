"""Training of the second stage: the autoregressive priors over the codes of a VQ-VAE or VQ-VAE-2.

Lives here: the settings, and the loss, validation and samples of such a run. The loop itself is in
loop.py, the reading of codes in codes.py, the network in `fastvq.models.HierarchicalPrior`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fastvq.models import PRESETS, VQVAE2, HierarchicalPrior, TextVQVAE, preset
from fastvq.train.codes import CodeFolder
from fastvq.train.data import (
    ItemDataset,
    evaluation_batches,
    split_validation,
)
from fastvq.train.data.text import lines_of
from fastvq.train.loop import LoopConfig, train
from fastvq.train.metrics import nats_to_bits
from fastvq.train.run_folder import RunFolder, load_run
from fastvq.train.stage1 import build_model, check_arguments

VALIDATION_MAPS = 512
_DRAWN_CLASSES = 10
_DRAWN_CODES = 16_384  # the grid of a validation shrinks until it holds no more codes than this


@dataclasses.dataclass(kw_only=True)
class PriorConfig(LoopConfig):
    """Settings of a prior's run; see `LoopConfig` for the rest.

    Attributes:
        codes: a folder written by `extract_codes`.
        weight_average: decay of the averaged weights, which validation and sampling use; 0: none.
        class_conditional: whether the classes are shown to the prior; None: where there are some.
        preset: a name in `fastvq.models.PRESETS`, whose "prior" is taken.
        model_arguments: constructor arguments of `HierarchicalPrior` that override everything else.
    """

    codes: str
    weight_average: float = 0.999
    class_conditional: bool | None = None
    preset: str | None = None
    model_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raises:
        ValueError: a setting breaks its rule.
        """
        super().check()
        if not 0.0 <= self.weight_average < 1.0:
            raise ValueError(f"train: weight_average must be in [0, 1); got {self.weight_average}.")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(
                f"train: preset must be one of {', '.join(PRESETS)}; got {self.preset!r}."
            )
        check_arguments(HierarchicalPrior, self.model_arguments)
        for name in ("num_codes", "shapes", "num_classes"):
            if name in self.model_arguments:
                raise ValueError(
                    f"train: model_arguments must leave {name} to the codes; "
                    f"got {self.model_arguments[name]!r}."
                )


def train_prior(config: PriorConfig, *, resume: bool = False, progress: bool = True) -> Path:
    """Trains the priors of all levels on extracted codes; returns the run folder.

    The levels share no weights: their losses are added, and each level's gradient is clipped by
    itself, so that each trains as it would alone.

    Args:
        config: the settings.
        resume: go on with the run in `config.run`; it ends with the weights of an unbroken one.
        progress: show a bar with rates and losses.
    Raises:
        ValueError: a setting breaks its rule, the codes or the run folder are refused, or the
            newest checkpoint is damaged.
        RuntimeError: the loss is no longer finite, or the environment lacks something.
    """
    config.check()
    RunFolder.check(config.run, None, resume)
    config = dataclasses.replace(config, codes=str(Path(config.codes).expanduser().absolute()))
    return train(PriorTask(config), config, resume=resume, progress=progress)


class PriorTask:
    """A `Task` (loop.py): the codes, the prior and the loss of a second-stage run."""

    kind = "prior"
    workers: int | None = None

    def __init__(self, config: PriorConfig) -> None:
        self.config = config
        self.weight_average = config.weight_average
        folder = CodeFolder(config.codes)
        if config.class_conditional and not folder.num_classes:
            raise ValueError(
                f"train: class_conditional needs codes with classes; '{config.codes}' has none."
            )
        self.conditional = (
            folder.num_classes > 0 if config.class_conditional is None else config.class_conditional
        )
        self.class_names = folder.class_names if self.conditional else None
        training, validation = split_validation(
            _as_dataset(folder), config.validation_fraction, config.seed
        )
        kept = np.linspace(0, len(validation) - 1, VALIDATION_MAPS).round().astype(np.int64)
        self.training, self.validation = training, validation.subset(np.unique(kept))
        arguments: dict[str, Any] = {} if config.preset is None else preset(config.preset)["prior"]
        arguments |= {
            **config.model_arguments,
            "num_codes": folder.num_codes,
            "shapes": folder.shapes,
            "num_classes": folder.num_classes if self.conditional else None,
        }
        self.model = cast(HierarchicalPrior, build_model(HierarchicalPrior, arguments, config.seed))
        self._decoder: VQVAE2 | TextVQVAE | None = None
        self.stage1 = folder.stage1
        self.resolved = {
            "model_arguments": self.model.config,
            "code_shapes": folder.shapes,
            "maps": len(folder),
            "class_names": self.class_names,
            "stage1": {
                **folder.stage1,
                "from_run": os.path.relpath(folder.stage1["path"], Path(config.run).absolute()),
            },
        }

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Each level's prior, with the network that shows it the levels above."""
        groups = {}
        for level, prior in enumerate(self.model.levels):
            parameters = list(prior.parameters())
            if level > 0:
                parameters += self.model.conditioning[level - 1].parameters()
            groups[f"level{level}_"] = parameters
        return groups

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """loss: the sum over levels of nats per code; with each level's nats and bits per code."""
        codes, labels = self._on(batch, device)
        nats = [
            F.cross_entropy(logits.float(), code_map)
            for logits, code_map in zip(model(codes, labels), codes)
        ]
        values = {"loss": torch.stack(nats).sum()}
        for level, value in enumerate(nats):
            values[f"level{level}_nats_per_code"] = value
            values[f"level{level}_bits_per_code"] = value.detach() / math.log(2.0)
        return values

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over at most `VALIDATION_MAPS` held-out examples, without dropout.

        nats of all levels' maps together, per example; nats and bits per code of each level, from
        the top; and bits_per_code over all codes of all levels.
        """
        sums = torch.zeros(len(self.model.levels) + 1, dtype=torch.float64)
        sums = sums.to(accelerator.device)
        with evaluation_batches(
            self.validation,
            batch_size=self.config.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ) as batches:
            for batch in batches:
                codes, labels = self._on(batch, accelerator.device)
                sums[:-1] -= self.model.level_log_prob(codes, labels).double().sum(dim=0)
                sums[-1] += len(codes[0])
        *levels, count = cast(Tensor, accelerator.reduce(sums, reduction="sum")).tolist()
        metrics = {"nats": sum(levels) / count}
        sizes = [math.prod(shape) for shape in self.model.shapes]
        metrics["bits_per_code"] = nats_to_bits(metrics["nats"]) / sum(sizes)
        for level, (nats, size) in enumerate(zip(levels, sizes)):
            metrics[f"level{level}_nats_per_code"] = nats / count / size
            metrics[f"level{level}_bits_per_code"] = nats_to_bits(nats / count / size)
        return metrics

    def draw(self, pictures: Path, step: int) -> None:
        """samples-<step>.png, a row per class, where the stage-1 run can still be reached.

        Of codes of text: samples-<step>.txt.
        """
        if not (Path(self.stage1["path"]) / "config.json").is_file():
            return
        if isinstance(self._stage1_model(), TextVQVAE):
            self._write_lines(pictures / f"samples-step-{step:08d}.txt")
            return
        from fastvq.train.pictures import save_grid
        from fastvq.train.spectrograms import save_spectrograms

        codes_each = sum(math.prod(shape) for shape in self.model.shapes)
        affordable = max(_DRAWN_CODES // codes_each, 1)
        labels, names, columns = None, None, None
        count = min(affordable, 16)
        if self.class_names is not None:
            classes = min(len(self.class_names), _DRAWN_CLASSES, affordable)
            columns = max(min(affordable // classes, 8), 1)
            count, names = classes * columns, self.class_names[:classes]
            labels = torch.arange(classes).repeat_interleave(columns)
        device = self.model.levels[0].embedding.weight.device  # type: ignore[union-attr]
        codes = self.model.sample(
            count,
            class_labels=None if labels is None else labels.to(cast(torch.device, device)),
            seed=self.config.seed,
        )
        samples = self._stage1_model().decode_codes([code_map.cpu() for code_map in codes])
        path = pictures / f"samples-step-{step:08d}.png"
        rate = load_run(self.stage1["path"]).resolved.get("sample_rate")
        if rate is None:
            save_grid(samples.clamp(0.0, 1.0), path, labels=names, columns=columns)
        else:
            save_spectrograms(samples.clamp(-1.0, 1.0), rate, path, labels=names, columns=columns)

    def _write_lines(self, path: Path) -> None:
        codes = [level.cpu() for level in self.model.sample(8, seed=self.config.seed)]
        decoder = cast(TextVQVAE, self._stage1_model())
        drawn = lines_of(decoder.decode_codes(codes, 1.0, seed=self.config.seed, level=1))
        path.write_text("\n".join(drawn) + "\n", encoding="utf-8")

    def _stage1_model(self) -> VQVAE2 | TextVQVAE:
        """The decoder of the codes, on the CPU, read once.

        Raises:
            ValueError: the stage-1 run has other weights than those that made the codes.
        """
        if self._decoder is None:
            run = load_run(self.stage1["path"])
            if run.weights_sha256 != self.stage1["weights_sha256"]:
                raise ValueError(
                    f"train: run '{run.path}' has other weights than those that made the codes in "
                    f"'{self.config.codes}'. Extract the codes again."
                )
            self._decoder = cast(VQVAE2 | TextVQVAE, run.model())
        return self._decoder

    def _on(self, batch: Any, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
        codes = [code_map.to(device, non_blocking=True) for code_map in batch["codes"]]
        return codes, batch["label"].to(device) if self.conditional else None


def _as_dataset(folder: CodeFolder) -> ItemDataset:
    """A `CodeFolder` for the functions of `fastvq.train.data`, which ask of a data set only what
    it has, too: its length, `subset`, `read_batch` and `decodes`."""
    return cast(ItemDataset, folder)
