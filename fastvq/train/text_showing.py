"""What a text run shows: reconstructed lines, new ones, and the way between two sentences."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor

from fastvq.models import TextVAE, TextVQVAE
from fastvq.train.data.text import lines_of, symbols_of
from fastvq.train.run_folder import Run
from fastvq.train.text import reconstructed
from fastvq.train.text_lines import text_like


def reconstruct_lines(
    run: Run,
    data: str | os.PathLike[str],
    *,
    count: int = 8,
    split: str | None = None,
    device: str | torch.device = "cpu",
) -> list[tuple[str, str]]:
    """Lines, evenly spaced over a file, each with what the model makes of it.

    Args:
        run: of kind "text-vae" or "text-vqvae".
        data, split: as `text_like`.
        count: lines, at least 1.
    """
    if count < 1:
        raise ValueError(f"reconstruct: count must be at least 1; got {count}.")
    lines = text_like(run, data, split)
    count = min(count, len(lines))
    batch = lines.read_batch([place * len(lines) // count for place in range(count)])
    x = batch["text"].to(device)
    return list(zip(lines_of(x), lines_of(reconstructed(run.model(device), x))))


def sample_lines(
    run: Run,
    count: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    device: str | torch.device = "cpu",
) -> list[str]:
    """New lines from a VAE of text, or from a prior over the codes of a VQ-VAE of text.

    Args:
        run: of kind "text-vae", or of a prior.
        count: lines, at least 1.
        seed: 0 or more; the same seed gives the same lines.
        temperature, top_k, top_p: of the codes and of the symbols, as `PixelCNN.sample`.
    Raises:
        ValueError: an argument breaks its rule, or the run is of a VQ-VAE, which draws nothing.
    """
    if count < 1 or seed < 0:
        raise ValueError(
            f"sample: count must be at least 1 and seed at least 0; got {count} and {seed}."
        )
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options["seed"] = seed
    model = cast(Any, run.model(device))
    if isinstance(model, TextVAE):
        return lines_of(model.sample(count, **options))
    if isinstance(model, TextVQVAE):
        raise ValueError(
            f"sample: run '{run.path}' must be of a prior or a VAE; it is of a VQ-VAE of text, "
            f"whose codes need a prior first: fastvq train-prior --vqvae '{run.path}' --data … "
            "--run …"
        )
    decoder = cast(TextVQVAE, run.stage1_model(device))
    codes = model.sample(count, **options)
    # Level 1 of the noise: the codes above are drawn from level 0 of the same seed.
    return lines_of(decoder.decode_codes(codes, level=1, **options))


@torch.no_grad()
def interpolate_lines(
    run: Run,
    first: str,
    last: str,
    *,
    steps: int = 7,
    device: str | torch.device = "cpu",
) -> list[str]:
    """The likeliest lines along the straight way between two sentences' latents, both included.

    Args:
        run: of kind "text-vae": only its latent is a space to go through.
        first, last: sentences, of fewer bytes than the run's length.
        steps: lines, at least 2.
    Raises:
        ValueError: an argument breaks its rule, or the run is of another kind.
    """
    model = run.model(device)
    if not isinstance(model, TextVAE):
        raise ValueError(
            f"interpolate: run '{run.path}' must be of a VAE of text; it is of a {run.kind}."
        )
    if steps < 2:
        raise ValueError(f"interpolate: steps must be at least 2; got {steps}.")
    ends = symbols_of([first.encode(), last.encode()], model.length).to(device)
    mean: Tensor = model.encode(ends).mean
    shares = torch.linspace(0.0, 1.0, steps, device=mean.device)[:, None]
    return lines_of(model.decode((1.0 - shares) * mean[:1] + shares * mean[1:]))
