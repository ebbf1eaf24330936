"""The training loop that stage 1 and the priors share: `train` runs a `Task` under a `LoopConfig`.

Lives here: devices, mixed precision and processes (Hugging Face Accelerate), the order of a step,
metrics, validation, checkpoints and resuming. What a model's loss is, and what there is to
validate and to draw, is the task's affair: stage1.py and priors.py.

A run can be killed at any moment and resumed to bitwise the same weights, on the same kind and
number of devices: batches depend on (seed, step) alone, torch's generators are seeded anew from
(seed, step, rank) before every step, and the learning rate depends on the step. So a checkpoint
holds no generator state, and validation cannot disturb training.

metrics.jsonl, every `log_every` steps, means over the steps since the last line:
    step, loss, the task's own terms, learning_rate, gradient_norm (before clipping; level0_… where
    levels are clipped apart), pictures_per_second (of all processes), steps_per_second,
    data_share (fraction of the wall time spent waiting for data)
and every `validate_every` steps: step, and the task's terms under validation_… names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, is_tensorboard_available
from torch import Tensor, nn
from tqdm import tqdm

from fastvq.models.pretrained import Pretrained
from fastvq.train.checkpoint import (
    Checkpoint,
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)
from fastvq.train.data import training_batches
from fastvq.train.processes import several_on_cpus
from fastvq.train.run_folder import RunFolder, read_metrics
from fastvq.train.weight_average import WeightAverage
from fastvq.version import __version__

WARM_UP_STEPS = 50
LOW_USAGE = 0.25  # fraction of a codebook below which, after LOW_USAGE_STEPS, a run warns
LOW_USAGE_STEPS = 200
_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_PRECISIONS = ("no", "bf16", "fp16")
_SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(kw_only=True)
class LoopConfig:
    """What every training run is told.

    Attributes:
        run: the folder to write.
        steps: optimizer steps in all, those before a resume included.
        batch_size: pictures per step and process.
        checkpoint_every, validate_every, log_every: steps between them; the last step does all.
        seed: of the weights' start, the order of the data and everything random in a step.
        learning_rate: reached after a linear warm-up of 50 steps.
        schedule: of the learning rate after that: "constant", or "cosine", which falls to 0 along
            half a cosine until the last of `steps`.
        optimizer: "adam" or "adamw" (weight decay 0.01).
        gradient_clip: largest L2 norm of the gradient; None leaves it.
        mixed_precision: "no" (float32), "bf16", or "fp16" (GPU only).
        validation_fraction: of the data, held out by `seed`.
    """

    run: str
    steps: int = 2000
    batch_size: int = 32
    checkpoint_every: int = 500
    validate_every: int = 500
    seed: int = 0
    learning_rate: float = 3e-4
    schedule: str = "constant"
    optimizer: str = "adam"
    gradient_clip: float | None = 1.0
    mixed_precision: str = "no"
    validation_fraction: float = 0.05
    log_every: int = 20

    def check(self) -> None:
        """Raises:
        ValueError: a setting breaks its rule.
        """
        for name in ("steps", "batch_size", "checkpoint_every", "validate_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be 1 or more; got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"train: seed must be 0 or more; got {self.seed}.")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"train: {name} must be positive; got {value}.")
        if self.schedule not in _SCHEDULES:
            raise ValueError(
                f"train: schedule must be one of {', '.join(_SCHEDULES)}; got {self.schedule!r}."
            )
        if self.optimizer not in _OPTIMIZERS:
            raise ValueError(f"train: optimizer must be adam or adamw; got {self.optimizer!r}.")
        if self.mixed_precision not in _PRECISIONS:
            raise ValueError(
                f"train: mixed_precision must be one of {', '.join(_PRECISIONS)}; "
                f"got {self.mixed_precision!r}."
            )
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                "train: validation_fraction must lie between 0 and 1; "
                f"got {self.validation_fraction}."
            )

    def as_dict(self) -> dict[str, Any]:
        """Every setting by its name, JSON-able."""
        return dataclasses.asdict(self)


class Task(Protocol):
    """What a kind of training brings to the loop.

    Attributes:
        kind: "vae", "vqvae", "vqvae2" or "prior".
        model: in training mode, on the CPU.
        resolved: what the data decided, for config.json; it holds "model_arguments".
        weight_average: decay of the averaged weights; 0 keeps none.
        training: the data, as `training_batches` takes it.
        workers: processes that read it ahead; None leaves that to `training_batches`.
    """

    kind: str
    resolved: dict[str, Any]
    weight_average: float
    training: Any
    workers: int | None

    @property
    def model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """Scalars by name; "loss" is minimised. `model` is `self.model`, wrapped for DDP."""

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are clipped together, by a prefix for their norm's name."""

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Metrics on held-out data, the same on every process; the model is in eval mode."""

    def draw(self, pictures: Path, step: int) -> None:
        """Write pictures for people, on the main process; the model is in eval mode."""


def train(task: Task, config: LoopConfig, *, resume: bool, progress: bool) -> Path:
    """Runs `task` for `config.steps` steps in all; returns the run folder.

    Raises:
        ValueError: the run folder is not free, belongs to other settings, or its newest checkpoint
            is damaged.
        RuntimeError: the loss is no longer finite, or the precision needs another device.
    """
    accelerator = make_accelerator(config)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        loop = _Loop(task, config, accelerator, resume)
        try:
            loop.run(progress)
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
    return loop.folder.path


def make_accelerator(config: LoopConfig) -> Accelerator:
    """An `Accelerator` of this run's own precision, whatever ran before in this process."""
    AcceleratorState._reset_state()
    way_out = "Use 'no', or 'bf16' on a CPU."
    try:
        accelerator = Accelerator(
            cpu=several_on_cpus(),
            mixed_precision=config.mixed_precision,
            log_with="tensorboard" if is_tensorboard_available() else None,
            project_dir=config.run,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        if config.mixed_precision == "no":
            raise
        raise RuntimeError(
            f"train: mixed_precision {config.mixed_precision!r} cannot run here: {error} {way_out}"
        ) from None
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise RuntimeError(f"train: mixed_precision 'fp16' needs a GPU; none is in use. {way_out}")
    return accelerator


def seed_of(*numbers: int) -> int:
    """A 64-bit seed that any change of the numbers (each 0 or more) changes altogether."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class _Loop:
    """One process's share of a run."""

    def __init__(
        self, task: Task, config: LoopConfig, accelerator: Accelerator, resume: bool
    ) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.folder = self._open_folder(resume)
        parameters = list(task.model.parameters())
        optimizer = _OPTIMIZERS[config.optimizer](parameters, lr=config.learning_rate)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.raw_optimizer = optimizer
        self.average: WeightAverage | None = None
        if task.weight_average > 0.0:
            self.average = WeightAverage(task.model, task.weight_average)
        self.step = 0
        self.warned_levels: set[str] = set()
        self._load()
        if accelerator.is_main_process:
            self.folder.keep_metrics(self.step)
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard")

    def _open_folder(self, resume: bool) -> RunFolder:
        settings = {
            "kind": self.task.kind,
            "fastvq_version": __version__,
            **self.config.as_dict(),
            "resolved": self.task.resolved,
        }
        # Every process looks before one of them writes, so that all of them refuse together.
        RunFolder.check(self.config.run, settings, resume)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            RunFolder.create(self.config.run, settings, resume)
        self.accelerator.wait_for_everyone()
        return RunFolder(self.config.run)

    def _load(self) -> None:
        checkpoint = newest_checkpoint(self.folder.checkpoints)
        if checkpoint is None:
            return
        self.step = checkpoint.step
        self.task.model.load_state_dict(checkpoint.model)
        load_optimizer(self.raw_optimizer, checkpoint.optimizer)
        if self.average is not None and checkpoint.average is not None:
            self.average.load_state_dict(checkpoint.average)
        if self.accelerator.scaler is not None and checkpoint.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)

    def run(self, progress: bool) -> None:
        config, main = self.config, self.accelerator.is_main_process
        bar = tqdm(
            total=config.steps,
            initial=min(self.step, config.steps),
            disable=not (progress and main),
            desc=f"train {self.task.kind}",
            unit="step",
            dynamic_ncols=True,
        )
        window = _Window(self.accelerator.device)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = training_batches(
            self.task.training,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=self.step,
            rank=rank,
            world_size=world,
            workers=self.task.workers,
        )
        self.task.model.train()
        with bar, batches:
            window.start(batches.wait_seconds)
            while self.step < config.steps:
                window.add(self.step + 1, self._take_step(next(batches)))
                self.step += 1
                bar.update()
                last = self.step == config.steps
                validating = last or self.step % config.validate_every == 0
                saving = last or self.step % config.checkpoint_every == 0
                if last or validating or saving or self.step % config.log_every == 0:
                    self._log(window, batches.wait_seconds, bar)
                if validating:
                    self._validate()
                if saving:
                    self._save()
                if validating or saving:
                    window.start(batches.wait_seconds)
        self._finish()

    def _take_step(self, batch: Any) -> dict[str, Tensor]:
        """One optimizer step; the task's scalars, detached."""
        config, task = self.config, self.task
        torch.manual_seed(seed_of(config.seed, self.step, self.accelerator.process_index))
        for group in self.raw_optimizer.param_groups:
            group["lr"] = self._learning_rate()
        values = task.loss(self.model, batch, self.accelerator.device)
        self.accelerator.backward(values["loss"])
        self.accelerator.unscale_gradients()
        limit = math.inf if config.gradient_clip is None else config.gradient_clip
        norms = {
            f"{prefix}gradient_norm": nn.utils.clip_grad_norm_(parameters, limit)
            for prefix, parameters in task.clip_groups().items()
        }
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.step)
        return {name: value.detach() for name, value in {**values, **norms}.items()}

    def _learning_rate(self) -> float:
        config, warm_up = self.config, min(1.0, (self.step + 1) / WARM_UP_STEPS)
        if config.schedule == "constant":
            return config.learning_rate * warm_up
        part = max(0.0, self.step - WARM_UP_STEPS) / max(1, config.steps - WARM_UP_STEPS)
        return config.learning_rate * warm_up * 0.5 * (1.0 + math.cos(math.pi * part))

    def _log(self, window: _Window, wait_seconds: float, bar: Any) -> None:
        """Write the window's means; stop where the loss was not finite."""
        seconds, waited, steps = window.elapsed(wait_seconds)
        means = window.means(self.accelerator)
        record: dict[str, Any] = {"step": self.step, **means}
        record["learning_rate"] = self.raw_optimizer.param_groups[0]["lr"]
        record["steps_per_second"] = steps / seconds
        pictures = steps * self.config.batch_size * self.accelerator.num_processes
        record["pictures_per_second"] = pictures / seconds
        record["data_share"] = waited / seconds
        self._record(record)
        shown = {name: f"{value:.4g}" for name, value in means.items() if "loss" in name}
        bar.set_postfix({**shown, "data": f"{record['data_share']:.0%}"}, refresh=False)
        self._warn_of_unused_codes(means)
        window.start(wait_seconds)

    def _warn_of_unused_codes(self, means: dict[str, float]) -> None:
        for name, value in means.items():
            low = name.endswith("_usage") and value < LOW_USAGE and self.step >= LOW_USAGE_STEPS
            if low and name not in self.warned_levels and self.accelerator.is_main_process:
                self.warned_levels.add(name)
                warnings.warn(
                    f"train: only {value:.0%} of the codes of {name.removesuffix('_usage')} are "
                    f"in use at step {self.step}. Fewer codes (num_codes) would do, or "
                    "revive_below may be raised.",
                    stacklevel=2,
                )

    def _validate(self) -> None:
        task, accelerator = self.task, self.accelerator
        task.model.eval()
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
        torch.manual_seed(seed_of(self.config.seed))
        with averaged, torch.no_grad():
            metrics = task.validate(accelerator)
            self._record({"step": self.step, **{f"validation_{k}": v for k, v in metrics.items()}})
            if accelerator.is_main_process:
                task.draw(self.folder.pictures, self.step)
        if accelerator.is_main_process:
            from fastvq.train.pictures import save_curves

            save_curves(read_metrics(self.folder.metrics), self.folder.pictures / "curves.png")
        accelerator.wait_for_everyone()
        task.model.train()

    def _record(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.folder.add_metrics(record)
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=self.step)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint = Checkpoint(
                self.step,
                self.task.model.state_dict(),
                optimizer_tensors(self.raw_optimizer),
                None if self.average is None else self.average.state_dict(),
                None if scaler is None else scaler.state_dict(),
            )
            save_checkpoint(self.folder.checkpoints, checkpoint)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        """Save the model for use, with the averaged weights where there are some."""
        self.task.model.eval()
        if self.accelerator.is_main_process:
            averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
            with averaged:
                cast(Pretrained, self.task.model).save_pretrained(self.folder.model)
        self.accelerator.wait_for_everyone()


class _Window:
    """The scalars and the clock since the last line of metrics.

    Sums stay on the device until they are asked for, so that a step waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._first_bad = torch.full((), torch.iinfo(torch.int64).max, device=device)

    def start(self, wait_seconds: float) -> None:
        """Begin anew, now."""
        self._sums, self._steps = {}, 0
        self._began, self._waited = time.perf_counter(), wait_seconds

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Take the scalars of one step."""
        self._steps += 1
        for name, value in values.items():
            wide = value.double()
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
        bad = ~values["loss"].isfinite()
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=step), self._first_bad)

    def elapsed(self, wait_seconds: float) -> tuple[float, float, int]:
        """Wall seconds, seconds of them spent waiting for data, and steps."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        return seconds, wait_seconds - self._waited, self._steps

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the window's steps and all processes.

        Raises:
            RuntimeError: the loss of a step was not finite, on any process.
        """
        first_bad = int(accelerator.gather(self._first_bad.reshape(1)).min())
        if first_bad < torch.iinfo(torch.int64).max:
            raise RuntimeError(
                f"train: the loss is not finite at step {first_bad}; stopped, and the checkpoints "
                "before it are kept. Lower learning_rate, or set gradient_clip."
            )
        stacked = torch.stack(list(self._sums.values())) / self._steps
        means = cast(Tensor, accelerator.reduce(stacked.float(), reduction="mean")).tolist()
        return dict(zip(self._sums, means))
