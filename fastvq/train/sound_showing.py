"""What a finished run of sounds shows: WAV files, spectrograms, distances and bits per second.

`fastvq.train.showing` does the same for pictures, and draws the samples of both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvq.models import VQVAE2
from fastvq.nn.spectral_loss import log_spectral_distance
from fastvq.train.data import BrokenItems, SoundDataset, evaluation_batches, examples
from fastvq.train.metrics import signal_to_noise
from fastvq.train.pictures import level_names, reconstructions
from fastvq.train.run_data import data_like
from fastvq.train.run_folder import Run
from fastvq.train.showing import Samples, check_count, evenly
from fastvq.train.spectrograms import save_sound_reconstructions, save_sounds, save_spectrograms


class SoundError(NamedTuple):
    """How far the reconstructions from the top levels are from the originals; means over sounds."""

    name: str  # which levels, as in `level_names`
    snr: float  # dB, see `signal_to_noise`
    log_spectral_distance: float  # dB, see `fastvq.nn.spectral_loss`
    bits_per_second: float  # Σ over these levels of codes per second · log2 K
    entropy_bits_per_second: float  # with the entropy of the codes met in place of log2 K


class SoundReport(NamedTuple):
    """What `show_sound_reconstructions` found."""

    errors: list[SoundError]  # of the top 1, 2, … all levels
    sounds: int  # how many were measured
    broken: int  # how many could not be decoded, and were left out
    folder: Path  # of the WAV files


def show_sound_reconstructions(
    run: Run,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    count: int = 8,
    measure: int = 256,
    split: str | None = None,
    only: str | None = None,
    strict: bool = False,
    device: str = "cpu",
) -> SoundReport:
    """Reconstruct whole sounds, each at its own length, and measure them.

    Writes spectrograms of `count` originals (their first clip) beside their reconstructions to
    `out`, and the reconstructions of all measured sounds as 16-bit WAV files, under the names of
    the originals, into the folder that `out` names without its ".png".

    Args:
        run: of a "vqvae" or "vqvae2" trained on sounds.
        data, split, only: as `open_source`.
        count: sounds shown, evenly spaced over the data.
        measure: sounds written and measured, likewise evenly spaced; at least `count`.
        strict: refuse a broken file; otherwise it is named, left out and counted.
        device: "cpu", "cuda", …
    Raises:
        ValueError: an argument breaks its rule, or the data is refused.
    """
    check_count("count", count)
    check_count("measure", measure)
    model = cast(VQVAE2, run.model(device))
    dataset = cast(SoundDataset, data_like(run, data, split=split, only=only, strict=strict))
    shown = evenly(dataset, count)
    with evaluation_batches(shown, batch_size=count, workers=0) as batches:
        save_sound_reconstructions(model, examples(next(batches), device), dataset.rate, out)
    return _measure(model, evenly(dataset, max(count, measure)), Path(out).with_suffix(""))


def _measure(model: VQVAE2, dataset: SoundDataset, folder: Path) -> SoundReport:
    device, broken = next(model.parameters()).device, BrokenItems(dataset.noun)
    sums = torch.zeros(model.levels, 2, dtype=torch.float64)
    histograms = torch.zeros(model.levels, model.num_codes, dtype=torch.float64)
    measured = 0
    for position in range(len(dataset)):
        met: list[tuple[str, str]] = []
        sound = dataset.whole(position, met)
        broken.add(met)
        if sound is None:
            continue
        original = torch.from_numpy(sound)[None].to(device)
        decoded = [one[..., : original.shape[-1]] for one in reconstructions(model, original)]
        for level, one in enumerate(decoded):
            distances = signal_to_noise(original, one), log_spectral_distance(original, one)
            sums[level] += torch.cat(distances).double().cpu()
        for level, codes in enumerate(model.encode(original)):
            counts = torch.bincount(codes.flatten().cpu(), minlength=model.num_codes)
            histograms[level] += counts
        name = cast(Any, dataset.source).file_name(int(dataset.indices[position]))
        save_sounds([decoded[-1][0]], dataset.rate, folder, [name])
        measured += 1
    errors = _errors(sums / max(measured, 1), histograms, dataset.rate, model)
    return SoundReport(errors, measured, len(broken), folder)


def _errors(means: Tensor, histograms: Tensor, rate: int, model: VQVAE2) -> list[SoundError]:
    errors: list[SoundError] = []
    total = entropy_total = 0.0
    for level, name in enumerate(level_names(model.levels)):
        codes_per_second = rate / (model.downsample << (model.levels - 1 - level))
        shares = histograms[level] / histograms[level].sum().clamp(min=1.0)
        entropy = float(torch.special.entr(shares).sum()) / math.log(2.0)
        total += codes_per_second * math.log2(model.num_codes)
        entropy_total += codes_per_second * entropy
        snr, distance = means[level].tolist()
        errors.append(SoundError(name, snr, distance, total, entropy_total))
    return errors


def save_sound_samples(samples: Samples, path: str | os.PathLike[str]) -> Path:
    """Write samples as spectrograms, a row per class where there are as many of each, and as WAV
    files CLASS_NUMBER.wav (sample_NUMBER.wav without classes) into the folder of the PNG's name.

    Returns:
        The folder.
    """
    assert samples.rate is not None
    target = Path(path)
    names = samples.names or ["sample"] * len(samples.pictures)
    _save_sample_spectrograms(samples, samples.rate, target)
    files = [f"{name}_{number}.wav" for name, number in zip(names, _numbers_within(names))]
    return save_sounds(list(samples.pictures), samples.rate, target.with_suffix(""), files)


def _save_sample_spectrograms(samples: Samples, rate: int, path: Path, most: int = 8) -> None:
    """At most `most` of each class, or `most`² without classes."""
    names = samples.names
    if names is None:
        save_spectrograms(samples.pictures[: most * most], rate, path)
        return
    rows = [row for row, number in enumerate(_numbers_within(names)) if number < most]
    kept = [names[row] for row in rows]
    first = list(dict.fromkeys(kept))
    columns = max(kept.count(name) for name in first)
    even = all(kept.count(name) == columns for name in first)
    labels = first if even else kept
    save_spectrograms(samples.pictures[rows], rate, path, labels=labels, columns=columns)


def _numbers_within(names: Sequence[str]) -> list[int]:
    """Of each name, how many of the same came before it."""
    met: dict[str, int] = {}
    numbers = []
    for name in names:
        numbers.append(met.get(name, 0))
        met[name] = numbers[-1] + 1
    return numbers
