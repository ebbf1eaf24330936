"""Training of the first stage, pictures or sounds to a latent and back: VAE, VQ-VAE, VQ-VAE-2.

Lives here: the settings, what the data decides about the model, and the loss, validation and
pictures of such a run. The loop itself is in loop.py; priors over the codes are in priors.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastvq.models import PRESETS, VAE, VQVAE2, preset
from fastvq.nn.spectral_loss import log_spectral_distance
from fastvq.train.data import (
    ItemDataset,
    SoundDataset,
    evaluation_batches,
    examples,
    split_validation,
)
from fastvq.train.loop import LoopConfig, seed_of, train
from fastvq.train.metrics import bits_per_dim, peak_signal_to_noise, signal_to_noise
from fastvq.train.run_data import described, open_training_data
from fastvq.train.run_folder import MODEL_CLASSES, RunFolder

STAGE1_MODELS = ("vae", "vqvae", "vqvae2")
VALIDATION_PICTURES = 512
DRAWN_PICTURES = 8
DRAWN_SAMPLES = 64
SOUND_DOWNSAMPLE = 64  # samples per bottom code of a sound: arXiv:1711.00937, section 4.3
_VARIANCE_PICTURES = 2048


@dataclasses.dataclass(kw_only=True)
class Stage1Config(LoopConfig):
    """Settings of a stage-1 run; see `LoopConfig` for the rest.

    Attributes:
        model: "vae", "vqvae" or "vqvae2".
        data: a path, see `open_source`.
        split: which part of the data, where it has parts.
        only, class_pattern: which of its files, and what their names say of their class; see
            `open_source`.
        image_size: pixels, square; None: the preset's, else that of the first picture.
        channels: 1 or 3; None: those of the first picture.
        workers: processes that decode pictures; None chooses.
        flip: mirror training pictures at random.
        sample_rate: of sounds, samples per second; None: that of the first file.
        clip_seconds: length of the clips that training takes of sounds; None: 1. See
            `SoundDataset`, which is `moving` in training.
        peak: scale every sound to this largest absolute value; None: leave it as it is.
        strict: refuse a broken picture instead of skipping it.
        preset: a name in `fastvq.models.PRESETS` (VQ-VAE-2 only).
        model_arguments: constructor arguments that override everything else.
        data_variance: what a quantized model's squared error is divided by in the loss; "measured"
            takes the variance of the training pictures around their mean.
        binarise: a VAE sees each value x in 0…1 as 1 with probability x, else 0, drawn anew every
            step; None: where its likelihood is "bernoulli", which is over such pictures.
    """

    model: str
    data: str
    split: str | None = None
    only: str | None = None
    class_pattern: str | None = None
    image_size: int | None = None
    channels: int | None = None
    workers: int | None = None
    flip: bool = False
    sample_rate: int | None = None
    clip_seconds: float | None = None
    peak: float | None = None
    strict: bool = False
    preset: str | None = None
    model_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_variance: str | float = "measured"
    binarise: bool | None = None

    def check(self) -> None:
        """Raises:
        ValueError: a setting breaks its rule.
        """
        super().check()
        if self.model not in STAGE1_MODELS:
            raise ValueError(
                f"train: model must be one of {', '.join(STAGE1_MODELS)}; got {self.model!r}."
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"train: image_size must be 1 or more; got {self.image_size}.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"train: workers must be 0 or more; got {self.workers}.")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(
                f"train: preset must be one of {', '.join(PRESETS)}; got {self.preset!r}."
            )
        if self.preset is not None and self.model != "vqvae2":
            raise ValueError(f"train: presets are of model 'vqvae2'; got model {self.model!r}.")
        number = isinstance(self.data_variance, (int, float)) and self.data_variance > 0.0
        if self.data_variance != "measured" and not number:
            raise ValueError(
                f"train: data_variance must be 'measured' or a positive number; "
                f"got {self.data_variance!r}."
            )
        if self.binarise and self.model != "vae":
            raise ValueError(f"train: binarise is of model 'vae'; got model {self.model!r}.")
        check_arguments(MODEL_CLASSES[self.model], self.model_arguments)


def train_stage1(config: Stage1Config, *, resume: bool = False, progress: bool = True) -> Path:
    """Trains a VAE, VQ-VAE or VQ-VAE-2 on pictures or sounds; returns the run folder.

    Under `torchrun` or `accelerate launch` all processes call this and train together.

    Args:
        config: the settings.
        resume: go on with the run in `config.run`; it ends with the weights of an unbroken one.
        progress: show a bar with rates and losses.
    Raises:
        ValueError: a setting breaks its rule, the data or the run folder is refused, or the newest
            checkpoint is damaged.
        RuntimeError: the loss is no longer finite, or the environment lacks something.
    """
    config.check()
    RunFolder.check(config.run, None, resume)
    config = dataclasses.replace(config, data=str(Path(config.data).expanduser().absolute()))
    return train(Stage1Task(config), config, resume=resume, progress=progress)


def check_arguments(cls: type[nn.Module], arguments: dict[str, Any]) -> None:
    """Refuse names that the constructor of `cls` does not take.

    Raises:
        ValueError: names the first such argument and lists the valid ones.
    """
    valid = list(inspect.signature(cls).parameters)
    for name in arguments:
        if name not in valid:
            raise ValueError(
                f"train: model_arguments has {name!r}, which {cls.__name__} does not take; "
                f"it takes {', '.join(valid)}."
            )


def build_model(cls: type[nn.Module], arguments: dict[str, Any], seed: int) -> nn.Module:
    """The model, with initial weights drawn from `seed`; the caller's generator stays.

    Raises:
        ValueError: the constructor refuses the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed))
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"train: model_arguments do not fit {cls.__name__}: {error}") from None


class Stage1Task:
    """A `Task` (loop.py): the data, the model and the loss of a stage-1 run."""

    weight_average = 0.0

    def __init__(self, config: Stage1Config) -> None:
        self.config, self.workers = config, config.workers
        self.kind = config.model
        size = None if config.preset is None else preset(config.preset)["image_size"]
        whole = open_training_data(config, size)
        self.of_sounds = isinstance(whole, SoundDataset)
        if self.of_sounds and self.kind == "vae":
            raise ValueError(
                f"train: model must be vqvae or vqvae2 for sounds, which '{config.data}' holds; "
                "got 'vae'."
            )
        self.rate = whole.rate if isinstance(whole, SoundDataset) else 0
        self.training, self.validation = split_validation(
            whole, config.validation_fraction, config.seed
        )
        self.validation = self.validation.without_augmentation()
        kept = np.linspace(0, len(self.validation) - 1, VALIDATION_PICTURES).round()
        self.validation = self.validation.subset(np.unique(kept.astype(np.int64)))
        arguments = self._model_arguments(whole.shape)
        self.model = build_model(MODEL_CLASSES[self.kind], arguments, config.seed)
        if isinstance(self.model, VQVAE2) and not self.of_sounds:
            check_picture_size(self.model, whole.shape)
        self.binarise = isinstance(self.model, VAE) and (
            self.model.likelihood == "bernoulli" if config.binarise is None else config.binarise
        )
        self.resolved = {
            "model_arguments": cast(Any, self.model).config,
            **described(whole),
            f"{whole.noun}s": len(whole),
            "class_names": class_names(whole.class_names, whole.num_classes),
            "binarise": self.binarise,
        }

    def _model_arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Constructor arguments: the preset's, then what the data says, then the user's."""
        config = self.config
        arguments: dict[str, Any] = {} if config.preset is None else preset(config.preset)["vqvae2"]
        arguments["in_channels"] = shape[0]
        if self.kind == "vae":
            arguments["image_size"] = list(shape[1:])
            arguments["likelihood"] = "bernoulli" if shape[0] == 1 else "gaussian"
        else:
            arguments["seed"] = config.seed
            if self.of_sounds:
                arguments |= {"dimensions": 1, "downsample": SOUND_DOWNSAMPLE}
            if "data_variance" not in config.model_arguments:
                measured = config.data_variance == "measured"
                arguments["data_variance"] = (
                    measured_variance(self.training) if measured else float(config.data_variance)
                )
        return {**arguments, **config.model_arguments}

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"": list(self.model.parameters())}

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """VAE: nats per picture. VQ: as `VQVAE2` says, perplexity and usage per level, top 0."""
        out = model(self._examples(batch, device))
        if self.kind == "vae":
            return {
                "loss": out.loss,
                "reconstruction_loss": out.reconstruction_loss.mean(),
                "kl": out.kl.mean(),
            }
        values = {
            "loss": out.loss,
            "reconstruction_loss": out.reconstruction_loss,
            "commitment_loss": out.commitment_loss,
            "codebook_loss": out.codebook_loss,
        }
        if self.of_sounds:
            values["spectral_loss"] = out.spectral_loss
        for level in range(len(out.codes)):
            values[f"level{level}_perplexity"] = out.perplexity[level]
            values[f"level{level}_usage"] = out.usage[level]
        return values

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over at most `VALIDATION_PICTURES` held-out pictures or sounds.

        reconstruction_mse over the elements of the 0…1 pictures, psnr in dB; of sounds, in place
        of psnr, snr and log_spectral_distance in dB; of a VAE also elbo in
        nats, and bits_per_dim where its likelihood is over discrete pictures; of the others each
        level's perplexity over the whole set.
        """
        device = accelerator.device
        totals: dict[str, Tensor] = {}
        with evaluation_batches(
            self.validation,
            batch_size=self.config.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            workers=self.config.workers,
        ) as batches:
            for batch in batches:
                for name, value in self._validation_sums(self._examples(batch, device)).items():
                    totals[name] = totals[name] + value if name in totals else value
        if not totals:  # a process beyond the number of pictures, or all of them broken
            zeros = self._validation_sums(torch.zeros(1, *self.validation.shape).to(device))
            totals = {name: torch.zeros_like(value) for name, value in zeros.items()}
        summed = {
            name: cast(Tensor, accelerator.reduce(value, reduction="sum"))
            for name, value in totals.items()
        }
        count = float(summed.pop("count"))
        metrics: dict[str, float] = {}
        for name, value in summed.items():
            if name.endswith("_histogram"):
                shares = value / value.sum()
                perplexity = float(torch.special.entr(shares).sum().exp())
                metrics[name.replace("histogram", "perplexity")] = perplexity
            else:
                metrics[name] = float(value) / count
        if "elbo" in metrics and self.binarise:
            dims = math.prod(self.resolved["picture_shape"])
            metrics["bits_per_dim"] = bits_per_dim(-metrics["elbo"], dims)
        return metrics

    def _validation_sums(self, originals: Tensor) -> dict[str, Tensor]:
        """Sums over these pictures or sounds, by metric, and their count."""
        sums: dict[str, Tensor] = {}
        if isinstance(self.model, VAE):
            sums["elbo"] = self.model.elbo(originals).sum()
            reconstruction = self.model.decode(self.model.encode(originals).mean)
        else:
            model = cast(VQVAE2, self.model)
            codes = model.encode(originals)
            reconstruction = model.decode_codes(codes)
            for level, code_map in enumerate(codes):
                counts = torch.bincount(code_map.flatten(), minlength=model.num_codes)
                sums[f"level{level}_histogram"] = counts
        reconstruction = reconstruction.float()[..., : originals.shape[-1]]
        if not self.of_sounds:
            reconstruction = reconstruction.clamp(0.0, 1.0)
        squared = (reconstruction - originals).square().flatten(start_dim=1).mean(dim=1)
        sums["reconstruction_mse"] = squared.sum()
        if self.of_sounds:
            sums["snr"] = signal_to_noise(originals, reconstruction).sum()
            distance = log_spectral_distance(originals, reconstruction)
            sums["log_spectral_distance"] = distance.sum()
        else:
            sums["psnr"] = peak_signal_to_noise(squared).sum()
        sums["count"] = torch.full_like(squared, 1.0).sum()
        return {name: value.double() for name, value in sums.items()}

    def draw(self, pictures: Path, step: int) -> None:
        """reconstructions-<step>.png, and of a VAE samples-<step>.png."""
        device = next(self.model.parameters()).device
        batch = self.validation.read_batch(
            range(min(DRAWN_PICTURES, len(self.validation))), drop_broken=True
        )
        if len(batch["index"]):
            shown = self._examples(batch, device)
            self._draw_reconstructions(shown, pictures / f"reconstructions-step-{step:08d}.png")
        if isinstance(self.model, VAE):
            from fastvq.train.pictures import save_grid

            samples = self.model.sample(DRAWN_SAMPLES, seed=self.config.seed)
            save_grid(samples, pictures / f"samples-step-{step:08d}.png")

    def _draw_reconstructions(self, originals: Tensor, path: Path) -> None:
        from fastvq.train.pictures import save_reconstructions
        from fastvq.train.spectrograms import save_sound_reconstructions

        if self.of_sounds:
            save_sound_reconstructions(self.model, originals, self.rate, path)
        else:
            save_reconstructions(self.model, originals, path)

    def _examples(self, batch: Any, device: torch.device) -> Tensor:
        taken = examples(batch, device)
        return torch.bernoulli(taken) if self.binarise else taken


def class_names(names: list[str] | None, num_classes: int) -> list[str] | None:
    """The names of the classes; numbers where they have none, None where there are no classes."""
    if names is not None:
        return names
    return [str(label) for label in range(num_classes)] if num_classes else None


def check_picture_size(model: VQVAE2, shape: tuple[int, ...]) -> None:
    """Refuse pictures whose sides the model cannot halve down to its top level.

    Raises:
        ValueError: names the size and the nearest valid ones.
    """
    step = model.downsample << (model.levels - 1)
    _, height, width = shape
    if height % step or width % step:
        below, above = (max(height // step + more, 1) * step for more in (0, 1))
        sizes = f"{below} or {above}" if below < above and height >= step else f"{step}"
        raise ValueError(
            f"train: the pictures' sides must be multiples of {step} (downsample "
            f"{model.downsample}, {model.levels} levels); got {height} × {width}. Set a size with "
            f"--image-size (image_size), such as {sizes}."
        )


def measured_variance(dataset: ItemDataset) -> float:
    """Variance of the values around their overall mean, of up to 2048 pictures or sounds; at least
    1e-6.

    They lie evenly over the dataset, numpy adds in one order whatever the thread count,
    and six digits are kept: the figure depends on the data alone, and a resumed run finds it again.
    """
    kept = np.linspace(0, len(dataset) - 1, min(len(dataset), _VARIANCE_PICTURES)).round()
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(kept), 64):
        batch = dataset.read_batch(kept[start : start + 64].astype(np.int64), drop_broken=True)
        values = examples(batch).double().numpy()
        count += values.size
        total += float(values.sum())
        squares += float(np.square(values).sum())
    return max(float(f"{squares / count - (total / count) ** 2:.6g}"), 1e-6)
