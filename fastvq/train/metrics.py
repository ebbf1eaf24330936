"""Figures of merit: nats and bits, signal-to-noise, area under the ROC curve, bits per dimension.

Lives here: conversions, the likelihood of pictures under a VQ decoder, and the evaluation of
finished runs. What a run measures while it trains is in stage1.py and priors.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvq.models import VAE, VQVAE2, HierarchicalPrior
from fastvq.ops.checks import check_int
from fastvq.train.data import evaluation_batches, examples
from fastvq.train.run_data import data_like, is_of_sounds
from fastvq.train.run_folder import Run, load_run

_LEVELS = 256  # of an 8-bit value
_UNIFORM_SHARE = 1e-3


def nats_to_bits(nats: float) -> float:
    """bits = nats / ln 2."""
    return nats / math.log(2.0)


def bits_per_dim(nats: float, dims: int) -> float:
    """bits per dimension = nats / (ln 2 · dims).

    Args:
        nats: −log p of one whole example.
        dims: its number of values, C·H·W of a picture or h·w of a code map.
    Raises:
        ValueError: dims below 1.
    """
    if dims < 1:
        raise ValueError(f"bits_per_dim: dims must be 1 or more; got {dims}.")
    return nats_to_bits(nats) / dims


def peak_signal_to_noise(mean_squared_error: Tensor) -> Tensor:
    """PSNR in dB of values with peak 1: −10 log10(MSE); MSE below 1e-10 counts as that, 100 dB."""
    return -10.0 * torch.log10(mean_squared_error.clamp(min=1e-10))


def area_under_roc(normal: NDArray[np.float64], anomalous: NDArray[np.float64]) -> float:
    """Probability that an anomaly scores higher than a normal item, ties counting one half.

        (Σ_{i, j} [anomalous_j > normal_i] + ½ [anomalous_j = normal_i]) / (n · m)

    the area under the ROC curve, by the ranks in O((n + m) log (n + m)).

    Args:
        normal, anomalous: (n,) and (m,) scores, n and m at least 1.
    Raises:
        ValueError: either is empty.
    Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.
    """
    if len(normal) == 0 or len(anomalous) == 0:
        raise ValueError(
            "area_under_roc: normal and anomalous must hold at least one score each; got "
            f"{len(normal)} and {len(anomalous)}."
        )
    ordered = np.sort(normal)
    below = np.searchsorted(ordered, anomalous, side="left")
    not_above = np.searchsorted(ordered, anomalous, side="right")
    return float((below + not_above).sum()) / (2.0 * len(normal) * len(anomalous))


def signal_to_noise(original: Tensor, reconstruction: Tensor) -> Tensor:
    """SNR of each example in dB, (B,): 10 log10(Σ x² / Σ (x − y)²), both sums at least 1e-10."""
    signal = original.square().flatten(start_dim=1).sum(dim=1).clamp(min=1e-10)
    noise = (original - reconstruction).square().flatten(start_dim=1).sum(dim=1).clamp(min=1e-10)
    return 10.0 * (signal.log10() - noise.log10())


class PictureLikelihood:
    """p(picture | codes) of 8-bit pictures: a discretised Laplace around the decoder's output.

    A value v ∈ {0, …, 255} whose decoded mean is m ∈ 0…1 has, independently of the others,

        p(v | m) = (1 − ε) [F((v + ½)/255) − F((v − ½)/255)] + ε / 256
        F(t) = Laplace cumulative distribution at t with mean m and scale b(m)

    where the lowest bin reaches down to −∞ and the highest up to +∞, and ε = 0.001 keeps a value
    that training never met from costing without bound. The scale is a table over 32 equal bins of
    m, since a decoder is surer of black than of grey; each entry is the maximum-likelihood choice
    among 40 scales from 1/5100 to 1/2 in equal ratios. The table is fitted on training pictures,
    so on others the result is an honest upper bound on the description length.

    The discretised likelihood is that of Salimans et al. 2017, arXiv:1701.05517, eq. 2, with a
    Laplace in place of the logistic mixture.
    """

    MEAN_BINS = 32

    def __init__(self, scales: Tensor) -> None:
        self.scales = scales

    @classmethod
    def fit(cls, model: VQVAE2, batches: Iterable[Tensor]) -> PictureLikelihood:
        """Fits the scales.

        Args:
            model: in eval mode.
            batches: training pictures (B, C, H, W), float 0…1; read once, one batch in memory.
        Raises:
            ValueError: no pictures.
        """
        candidates = torch.logspace(math.log10(1 / 5100), math.log10(0.5), 40, dtype=torch.float64)
        likelihood = torch.zeros(cls.MEAN_BINS, len(candidates), dtype=torch.float64)
        seen = False
        for pictures in batches:
            seen = True
            values, means = _decoded(model, pictures)
            bins = cls._bin(means)
            for position, scale in enumerate(candidates):
                log_prob = _log_prob(values, means, scale.to(means.device, means.dtype))
                added = torch.zeros(cls.MEAN_BINS, dtype=torch.float64, device=means.device)
                added.index_add_(0, bins.flatten(), log_prob.double().flatten())
                likelihood[:, position] += added.cpu()
        if not seen:
            raise ValueError("PictureLikelihood.fit: batches must hold pictures; got none.")
        best = likelihood.argmax(dim=1)
        empty = (likelihood == 0.0).all(dim=1)
        scales = torch.where(empty, 0.1, candidates[best])
        return cls(scales.float())

    def bits_per_dim(self, model: VQVAE2, pictures: Tensor) -> Tensor:
        """−log2 p(picture | its own codes) / (C·H·W) of each picture, (B,).

        Args:
            pictures: (B, C, H, W) float 0…1, taken to the nearest of 256 values.
        """
        values, means = _decoded(model, pictures)
        scale = self.scales.to(means.device)[self._bin(means)]
        log_prob = _log_prob(values, means, scale).flatten(start_dim=1)
        return -log_prob.double().mean(dim=1) / math.log(2.0)

    @classmethod
    def _bin(cls, means: Tensor) -> Tensor:
        return (means * cls.MEAN_BINS).long().clamp(0, cls.MEAN_BINS - 1)


def _decoded(model: VQVAE2, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(values 0…255 as floats, decoded means 0…1), both (B, C, H, W) float32."""
    with torch.no_grad():
        means = model.decode_codes(model.encode(pictures)).float().clamp(0.0, 1.0)
    return (pictures.float() * (_LEVELS - 1)).round(), means


def _log_prob(values: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    """log p(v | m) as `PictureLikelihood` says, elementwise."""
    low = (values - 0.5) / (_LEVELS - 1) - means
    high = (values + 0.5) / (_LEVELS - 1) - means
    low = torch.where(values <= 0, -torch.inf, low)
    high = torch.where(values >= _LEVELS - 1, torch.inf, high)
    # By symmetry the bin can be taken on the side where F is not close to 1.
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    mass = _laplace_cdf(high / scale) - _laplace_cdf(low / scale)
    return torch.log((1.0 - _UNIFORM_SHARE) * mass + _UNIFORM_SHARE / _LEVELS)


def _laplace_cdf(t: Tensor) -> Tensor:
    tail = 0.5 * torch.exp(-t.abs())
    return torch.where(t < 0, tail, 1.0 - tail)


@torch.no_grad()
def evaluate_elbo(
    run: str | Run,
    data: str,
    *,
    split: str | None = None,
    binarise: bool = True,
    samples: int = 1,
    batch_size: int = 128,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Negative evidence lower bound of pictures under a trained VAE, an upper bound on −log p.

    Args:
        run: a run of kind "vae".
        data, split: as `open_source`.
        binarise: each value x in 0…1 becomes 1 with probability x, else 0, drawn by `seed`; the
            Bernoulli likelihood is one only of such pictures.
        samples: draws of the latent per picture.
        limit: only the first so many pictures; None takes all.
    Returns:
        "negative_elbo" in nats per picture (mean), "bits_per_dim" (where binarised), "pictures".
    Raises:
        ValueError: the run is of another kind, or the data is refused.
    """
    run = run if isinstance(run, Run) else load_run(run)
    if run.kind != "vae":
        raise ValueError(f"evaluate_elbo: run must be of kind 'vae'; got {run.kind!r}.")
    model = cast(VAE, run.model(device))
    total, count = 0.0, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for pictures in _pictures(run, data, split, batch_size, limit):
            pictures = torch.bernoulli(pictures) if binarise else pictures
            total -= float(model.elbo(pictures.to(device), samples).double().sum())
            count += len(pictures)
    result = {"negative_elbo": total / count, "pictures": float(count)}
    if binarise:
        dims = math.prod(run.resolved["picture_shape"])
        result["bits_per_dim"] = bits_per_dim(total / count, dims)
    return result


@torch.no_grad()
def evaluate_bits_per_dim(
    prior_run: str | Run,
    data: str,
    *,
    split: str | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    fit_pictures: int = 2048,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """An upper bound on the bits per dimension of pictures under a VQ-VAE and its prior.

        −log2 p(x) ≤ −log2 p(codes(x)) − log2 p(x | codes(x))

    the first term from the prior, the second from `PictureLikelihood`, fitted on the pictures the
    VQ-VAE was trained on; both divided by C·H·W. A prior with classes is given the true labels, so
    that the bound is then on −log2 p(x | label).

    Args:
        prior_run: a run of kind "prior"; its stage-1 run must still be there.
        data, split: as `open_source`; pictures that neither stage has seen.
        limit: only the first so many pictures; None takes all.
        fit_pictures: how many training pictures the scales are fitted on.
    Returns:
        "code_bits_per_dim", "picture_bits_per_dim", "total_bits_per_dim" (means), "pictures", and
        "level0_bits_per_code", … from the top.
    Raises:
        ValueError: the run is no prior, the data has no labels where the prior needs them, or a
            file is refused.
    """
    run = prior_run if isinstance(prior_run, Run) else load_run(prior_run)
    model = cast(VQVAE2, run.stage1_model(device))
    prior = cast(HierarchicalPrior, run.model(device))
    assert run.stage1 is not None
    stage1 = load_run(run.stage1)
    if is_of_sounds(stage1):
        raise ValueError(
            f"run '{run.path}' must be over codes of pictures; they are of sounds, of which "
            "evaluate_code_bits measures the codes alone."
        )
    own, own_split = stage1.config["data"], stage1.config["split"]
    fitted = _pictures(stage1, own, own_split, batch_size, fit_pictures)
    likelihood = PictureLikelihood.fit(model, (pictures.to(device) for pictures in fitted))
    conditional = run.resolved["model_arguments"]["num_classes"] is not None
    code_nats = torch.zeros(len(prior.levels), dtype=torch.float64)
    picture_bits, count = 0.0, 0
    codes: list[Tensor] = []
    for batch in _batches(stage1, data, split, batch_size, limit):
        if conditional and int(batch["label"].min()) < 0:
            raise ValueError(f"data '{data}': the prior needs class labels; it has none.")
        pictures = examples(batch, device)
        codes = model.encode(pictures)
        labels = batch["label"].to(device) if conditional else None
        code_nats -= prior.level_log_prob(codes, labels).double().sum(dim=0).cpu()
        picture_bits += float(likelihood.bits_per_dim(model, pictures).sum())
        count += len(pictures)
    dims = math.prod(stage1.resolved["picture_shape"])
    code_bits = bits_per_dim(float(code_nats.sum()) / count, dims)
    result = {
        "code_bits_per_dim": code_bits,
        "picture_bits_per_dim": picture_bits / count,
        "total_bits_per_dim": code_bits + picture_bits / count,
        "pictures": float(count),
    }
    for level, code_map in enumerate(codes):
        nats = float(code_nats[level]) / count
        result[f"level{level}_bits_per_code"] = bits_per_dim(nats, code_map[0].numel())
    return result


def _pictures(
    run: Run, data: str, split: str | None, batch_size: int, limit: int | None
) -> Iterable[Tensor]:
    """Pictures (B, C, H, W) float 0…1 in the shape of a stage-1 run."""
    return (examples(batch) for batch in _batches(run, data, split, batch_size, limit))


def _batches(
    run: Run,
    data: str,
    split: str | None,
    batch_size: int,
    limit: int | None,
    only: str | None = None,
    clip_seconds: float | None = None,
) -> Iterable[Any]:
    dataset = data_like(run, data, split=split, only=only, clip_seconds=clip_seconds)
    if limit is not None:
        check_int("evaluate", "limit", limit)
        dataset = dataset.subset(range(min(limit, len(dataset))))
    with evaluation_batches(dataset, batch_size=batch_size) as batches:
        yield from batches


@torch.no_grad()
def evaluate_code_bits(
    prior_run: str | Run,
    data: str,
    *,
    split: str | None = None,
    only: str | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """What the codes of sounds cost under a prior: −log2 p(codes), given the true class if any.

    The clips are as long as those whose codes the prior was trained on.

    Args:
        prior_run: a run of kind "prior" over codes of sounds; its stage-1 run must still be there.
        data, split, only: as `open_source`; sounds that neither stage has seen.
        limit: only the first so many sounds; None takes all.
    Returns:
        "bits_per_second" of clips (means), "sounds", and "level0_bits_per_code", … from the top.
    Raises:
        ValueError: the run is of another kind, or the data is refused.
    """
    run = prior_run if isinstance(prior_run, Run) else load_run(prior_run)
    model = cast(VQVAE2, run.stage1_model(device))
    prior = cast(HierarchicalPrior, run.model(device))
    assert run.stage1 is not None
    stage1 = load_run(run.stage1)
    rate = stage1.resolved["sample_rate"]
    length = prior.shapes[-1][0] * model.downsample / rate
    conditional = run.resolved["model_arguments"]["num_classes"] is not None
    nats = torch.zeros(len(prior.levels), dtype=torch.float64)
    places = [0] * len(prior.levels)
    seconds, count = 0.0, 0
    for batch in _batches(stage1, data, split, batch_size, limit, only, length):
        codes = model.encode(examples(batch, device))
        labels = batch["label"].to(device) if conditional else None
        nats -= prior.level_log_prob(codes, labels).double().sum(dim=0).cpu()
        places = [total + level.numel() for total, level in zip(places, codes)]
        count += len(codes[0])
        seconds += batch["sound"].numel() / rate
    result = {"bits_per_second": nats_to_bits(float(nats.sum())) / seconds, "sounds": float(count)}
    for level, number in enumerate(places):
        result[f"level{level}_bits_per_code"] = nats_to_bits(float(nats[level])) / number
    return result
