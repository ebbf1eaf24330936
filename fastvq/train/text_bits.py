"""Bits per character of held-out lines: under a text run, and under what it is compared with.

The baselines themselves are in text_baselines.py. Every figure counts a line's bytes and its end.
"""

from __future__ import annotations

import math
import os
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastvq.models import HierarchicalPrior, TextVAE, TextVQVAE
from fastvq.models.text import live_symbols
from fastvq.ops.checks import check_int
from fastvq.train.data import evaluation_batches
from fastvq.train.data.text import TextDataset
from fastvq.train.run_folder import Run, load_run
from fastvq.train.text_baselines import NGram, compressor_bits
from fastvq.train.text_lines import is_own_text, split_lines, text_like

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, arXiv:1509.00519, section 5.2
NGRAM_ORDER = 5


@torch.no_grad()
def evaluate_text(
    run: Run,
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    samples: int = 1,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    baselines: bool = True,
) -> dict[str, float]:
    """What lines cost under a run of text, and under gzip, bzip2, xz and an n-gram model.

    Args:
        run: of kind "text-vae", "text-vqvae", or of a prior over the codes of the latter.
        data, split: as `text_like`; None: of the run's own file the lines it held out.
        limit: only so many lines, evenly spaced; None: all.
        samples: of a VAE: draws of the latent per line.
        batch_size: lines at a time.
        baselines: also the others, which see the run's training lines first.
    Returns:
        "bits_per_character": of a VAE of the bound −ELBO, of a prior of codes and lines together;
        "bits_per_character_given_codes" of a VQ-VAE, "bits_per_character_of_codes" of a prior. Of a
        VAE also how the latent is used: "kl" in nats per line, "active_units" (dimensions whose
        posterior mean has a variance over lines above `ACTIVE_VARIANCE`), and
        "latent_gain_bits_per_character": how much more a line costs with another line's latent. Of
        a VQ-VAE "code_gain_bits_per_character", likewise. Then one figure per baseline.
    Raises:
        ValueError: the run is of another kind, or the data is refused.
    """
    stage1 = run if run.stage1 is None else load_run(run.stage1)
    if split is None and is_own_text(stage1, data):
        split = "val"
    lines = text_like(stage1, data, split)
    if limit is not None:
        check_int("evaluate", "limit", limit)
        kept = np.linspace(0, len(lines) - 1, min(limit, len(lines))).round()
        lines = lines.subset(np.unique(kept.astype(np.int64)))
    batches = [batch.to(device) for batch in _batches(lines, batch_size)]
    model = cast(Any, run.model(device) if run.stage1 is None else run.stage1_model(device))
    if isinstance(model, TextVAE):
        results = _of_vae(model, batches, samples)
    else:
        prior = None if run.stage1 is None else cast(HierarchicalPrior, run.model(device))
        results = _of_vqvae(model, prior, batches)
    if baselines:
        training, _ = split_lines(stage1.config, stage1.resolved["text_length"])
        seen, asked = training.lines(), lines.lines()
        results |= compressor_bits(seen, asked)
        results[f"{NGRAM_ORDER + 1}-gram"] = NGram(seen, NGRAM_ORDER).bits(asked)
    return results


def _of_vae(model: TextVAE, batches: list[Tensor], samples: int) -> dict[str, float]:
    nats = kl = gain = 0.0
    means = []
    for x in batches:
        posterior = model.encode(x)
        nats -= float(model.elbo(x, samples).double().sum())
        kl += float(posterior.kl().double().sum())
        z = posterior.sample()
        gain += _gain(model.line_log_prob(x, z), model.line_log_prob(x, z.roll(1, dims=0)))
        means.append(posterior.mean.double())
    symbols, lines = _symbols(batches), sum(len(x) for x in batches)
    active = torch.cat(means).var(dim=0, correction=0) > ACTIVE_VARIANCE
    return {
        "bits_per_character": _bits(nats, symbols),
        "kl": kl / lines,
        "active_units": float(active.sum()),
        "latent_gain_bits_per_character": _bits(gain, symbols),
    }


def _of_vqvae(
    model: TextVQVAE, prior: HierarchicalPrior | None, batches: list[Tensor]
) -> dict[str, float]:
    nats = code_nats = gain = 0.0
    for x in batches:
        codes = model.encode(x)
        own = model.line_log_prob(x, codes)
        nats -= float(own.double().sum())
        gain += _gain(own, model.line_log_prob(x, [level.roll(1, dims=0) for level in codes]))
        if prior is not None:
            code_nats -= float(prior.log_prob(codes).double().sum())
    symbols = _symbols(batches)
    results = {
        "bits_per_character_given_codes": _bits(nats, symbols),
        "code_gain_bits_per_character": _bits(gain, symbols),
    }
    if prior is not None:
        results["bits_per_character_of_codes"] = _bits(code_nats, symbols)
        results["bits_per_character"] = _bits(nats + code_nats, symbols)
    return results


def _gain(own: Tensor, others: Tensor) -> float:
    return float((own - others).double().sum())


def _bits(nats: float, symbols: int) -> float:
    return nats / symbols / math.log(2.0)


def _symbols(batches: list[Tensor]) -> int:
    return sum(int(live_symbols(x).sum()) for x in batches)


def _batches(lines: TextDataset, batch_size: int) -> list[Tensor]:
    with evaluation_batches(cast(Any, lines), batch_size=batch_size, workers=0) as batches:
        return [batch["text"] for batch in cast(Any, batches)]
