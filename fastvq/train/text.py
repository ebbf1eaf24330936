"""Training of autoencoders of text: `TextVAE` and `TextVQVAE` on the lines of a file.

Lives here: the settings, and the loss, validation and shown lines of such a run. The loop itself is
in loop.py, the lines in data/text.py; what a run's text costs in bits is measured in text_bits.py.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastvq.models import TextVAE, TextVQVAE
from fastvq.models.text import live_symbols
from fastvq.train.data import evaluation_batches
from fastvq.train.data.text import lines_of
from fastvq.train.loop import LoopConfig, train
from fastvq.train.run_folder import MODEL_CLASSES, RunFolder
from fastvq.train.stage1 import build_model, check_arguments
from fastvq.train.text_lines import split_lines

TEXT_MODELS = ("vae", "vqvae")
VALIDATION_LINES = 512
_SHOWN_LINES = 8


@dataclasses.dataclass(kw_only=True)
class TextConfig(LoopConfig):
    """Settings of a text run; see `LoopConfig` for the rest.

    Attributes:
        model: "vae" or "vqvae".
        data: a text file; every line is an example, see `TextDataset`.
        strict: refuse a line that is longer than the model's length, instead of leaving it out.
        model_arguments: constructor arguments of `TextVAE` or `TextVQVAE`.
    """

    model: str
    data: str
    strict: bool = False
    model_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        return f"text-{self.model}"

    def check(self) -> None:
        """Raises:
        ValueError: a setting breaks its rule.
        """
        super().check()
        if self.model not in TEXT_MODELS:
            raise ValueError(
                f"train: model must be one of {', '.join(TEXT_MODELS)} for text; "
                f"got {self.model!r}."
            )
        check_arguments(MODEL_CLASSES[self.kind], self.model_arguments)


def train_text(config: TextConfig, *, resume: bool = False, progress: bool = True) -> Path:
    """Trains a `TextVAE` or a `TextVQVAE` on the lines of a file; returns the run folder.

    Args, errors: as `train_stage1`.
    """
    config.check()
    RunFolder.check(config.run, None, resume)
    config = dataclasses.replace(config, data=str(Path(config.data).expanduser().absolute()))
    return train(TextTask(config), config, resume=resume, progress=progress)


class TextTask:
    """A `Task` (loop.py): the lines, the model and the loss of a text run."""

    weight_average = 0.0
    workers: int | None = None

    def __init__(self, config: TextConfig) -> None:
        self.config, self.kind = config, config.kind
        arguments = dict(config.model_arguments)
        if config.model == "vqvae":
            arguments.setdefault("seed", config.seed)
        self.model = build_model(MODEL_CLASSES[self.kind], arguments, config.seed)
        length = cast(int, self.model.length)
        self.training, held_out = split_lines(config.as_dict(), length)
        kept = np.linspace(0, len(held_out) - 1, VALIDATION_LINES).round()
        self.validation = held_out.subset(np.unique(kept.astype(np.int64)))
        self.resolved = {
            "model_arguments": cast(Any, self.model).config,
            "text_length": length,
            "lines": len(self.training) + len(held_out),
            "too_long": self.training.too_long,
            "class_names": None,
        }

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"": list(self.model.parameters())}

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """VAE: nats per line. VQ: nats per symbol, perplexity and usage of the codebook."""
        out = model(batch["text"].to(device))
        if isinstance(self.model, TextVAE):
            return {
                "loss": out.loss,
                "reconstruction_loss": out.reconstruction_loss.mean(),
                "kl": out.kl.mean(),
            }
        return {
            "loss": out.loss,
            "reconstruction_loss": out.reconstruction_loss.mean(),
            "commitment_loss": out.commitment_loss,
            "level0_perplexity": out.perplexity,
            "level0_usage": out.usage,
        }

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Over at most `VALIDATION_LINES` held-out lines: bits per character, ends counted.

        Of a VAE those of the bound, −ELBO, and the KL in nats per line; of a VQ-VAE those of the
        line given its codes.
        """
        sums = torch.zeros(3, dtype=torch.float64).to(accelerator.device)
        with evaluation_batches(
            cast(Any, self.validation),
            batch_size=self.config.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ) as batches:
            for batch in batches:
                x = batch["text"].to(accelerator.device)
                sums += torch.stack([*self._nats(x), live_symbols(x).sum()]).double()
        nats, kl, symbols = cast(Tensor, accelerator.reduce(sums, reduction="sum")).tolist()
        bits = nats / symbols / math.log(2.0)
        if self.config.model == "vae":
            return {"bits_per_character": bits, "kl": kl / len(self.validation)}
        return {"bits_per_character_given_codes": bits}

    def _nats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over lines: −ELBO and KL of a VAE, −log p(x|codes) and 0 of a VQ-VAE."""
        if isinstance(self.model, TextVAE):
            return -self.model.elbo(x).sum(), self.model.encode(x).kl().sum()
        model = cast(TextVQVAE, self.model)
        nats = -model.line_log_prob(x, model.encode(x)).sum()
        return nats, torch.zeros_like(nats)

    def draw(self, pictures: Path, step: int) -> None:
        """reconstructions-<step>.txt, and of a VAE samples-<step>.txt."""
        device = next(self.model.parameters()).device
        batch = self.validation.read_batch(range(min(_SHOWN_LINES, len(self.validation))))
        x = batch["text"].to(device)
        pairs = zip(lines_of(x), lines_of(reconstructed(self.model, x)))
        shown = "".join(f"{line}\n→ {again}\n\n" for line, again in pairs)
        name = f"step-{step:08d}.txt"
        (pictures / f"reconstructions-{name}").write_text(shown, encoding="utf-8")
        if isinstance(self.model, TextVAE):
            drawn = lines_of(self.model.sample(_SHOWN_LINES, seed=self.config.seed))
            (pictures / f"samples-{name}").write_text("\n".join(drawn) + "\n", encoding="utf-8")


@torch.no_grad()
def reconstructed(model: nn.Module, x: Tensor) -> Tensor:
    """The likeliest symbols, one after the other, given the posterior mean or the codes."""
    if isinstance(model, TextVAE):
        return model.decode(model.encode(x).mean)
    quantized = cast(TextVQVAE, model)
    return quantized.decode_codes(quantized.encode(x))
