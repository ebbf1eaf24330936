"""What a finished run shows: new pictures drawn from it, and reconstructions with their errors.

`draw_samples` and `measure_levels` compute; `save_samples` and `show_reconstructions` write.
The drawing of the PNG files themselves is in `pictures`, likelihoods are in `metrics`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastvq import sampling
from fastvq.models import Classifier
from fastvq.train.classifier import judge
from fastvq.train.completion import KnownPart, known_part
from fastvq.train.data import ItemDataset, evaluation_batches, examples
from fastvq.train.pictures import level_names, reconstructions, save_grid, save_reconstructions
from fastvq.train.processes import device_of
from fastvq.train.run_data import data_like
from fastvq.train.run_folder import Run, load_run

_PER_CLASS = 8  # pictures of each class where no count is asked for
_MOST_CLASSES = 16  # classes shown where none are asked for


class Samples(NamedTuple):
    """N new pictures, or sounds, on the CPU."""

    pictures: Tensor  # (N, C, H, W) float32, clamped to 0…1; sounds (N, 1, T), to −1…1
    labels: (
        Tensor | None
    )  # (N,) int64, ascending runs of each class asked for; None without classes
    names: list[str] | None  # the name of each picture's class
    completed: Tensor | None = None  # (C, H, W) what was known of the picture they all complete
    rate: int | None = None  # of sounds: samples per second


class LevelError(NamedTuple):
    """How far the reconstructions from the top levels are from the originals."""

    name: str  # which levels, as in `level_names`
    mse: float  # mean over all elements of all pictures, of 0…1 values
    psnr: float  # −10 log₁₀ mse, dB


def draw_samples(
    run_path: str | os.PathLike[str],
    count: int | None = None,
    *,
    class_labels: Sequence[str | int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    complete: str | os.PathLike[str] | None = None,
    keep: str = "top-half",
    keep_best: float | None = None,
    classifier: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> Samples:
    """Draw new pictures from the run of a prior or of a VAE.

    With one seed every batch size gives the same pictures, up to the rounding of the decoder.

    Args:
        run_path: of a "prior" run, whose first stage must still be where it was, or a "vae" run.
        count: pictures in all, spread evenly over the classes; None: 8 of each class, or 64.
        class_labels: names or numbers of the classes to draw; None: all, the first 16 if there are
            more. Only for a class-conditional prior.
        temperature, top_k, top_p: as `PixelCNN.sample`; only for a prior.
        seed: 0 or more.
        complete: a picture file; its half `keep` ("top-half", "bottom-half", "left-half" or
            "right-half") keeps its codes, and the others are drawn. Only for a prior.
        keep_best: draw 1 / keep_best times as many of each class, and keep those whose class the
            classifier is surest of. Only for a class-conditional prior, with `classifier`.
        classifier: folder of a `Classifier`, see `train_classifier`.
        batch_size: pictures drawn at a time.
        device: "cpu", "cuda", …; None: CUDA where there is one.
        progress: show a bar.
    Raises:
        ValueError: an argument breaks its rule, or the run cannot give new pictures.
    """
    run = load_run(run_path)
    check_count("batch_size", batch_size)
    if count is not None:
        check_count("count", count)
    if seed < 0:
        raise ValueError(f"sample: seed must be 0 or more; got {seed}.")
    if run.kind == "vae":
        _refuse_prior_arguments(class_labels, temperature, top_k, top_p, complete, keep_best)
        pictures = _draw_from_vae(run, count or 64, seed, batch_size, device_of(device), progress)
        return Samples(pictures, None, None)
    if run.kind != "prior":
        raise ValueError(
            f"sample: run '{run_path}' must be of a prior or a VAE; it is of a {run.kind}, whose "
            f"codes need a prior first: fastvq train-prior --vqvae '{run_path}' --data … --run …"
        )
    prior = run.model(device_of(device))
    classes = _classes(run, prior, class_labels)
    total = count or (64 if classes is None else _PER_CLASS * len(classes))
    labels = None if classes is None else _spread(classes, total)
    if keep_best is not None or classifier is not None:
        labels = _to_be_judged(labels, keep_best, classifier)
        total = len(labels)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options["seed"] = seed
    decoder: Any = run.stage1_model(device_of(device))
    rate = load_run(run.stage1).resolved.get("sample_rate") if run.stage1 else None
    known: KnownPart | None = None
    if complete is not None and rate is not None:
        raise ValueError(f"sample: complete must be left out for sounds; got '{complete}'.")
    if complete is not None:
        known = known_part(run, decoder, complete, keep)
        options["given"] = known.given
    pictures = _draw_from_prior(prior, decoder, total, labels, options, batch_size, progress)
    if keep_best is not None and classifier is not None and labels is not None:
        best = sampling.keep_best(judge(classifier, pictures, device_of(device)), labels, keep_best)
        pictures, labels = pictures[best], labels[best]
    names = None if labels is None else [_class_name(run, int(label)) for label in labels]
    return Samples(pictures, labels, names, None if known is None else known.shown, rate)


def _to_be_judged(
    labels: Tensor | None, fraction: float | None, classifier: str | os.PathLike[str] | None
) -> Tensor:
    """The labels to draw so that as many as asked for are kept of each class."""
    if fraction is None or classifier is None:
        raise ValueError(
            "sample: --keep-best and --classifier must be given together; got one. "
            "fastvq train-classifier makes a classifier from labelled pictures."
        )
    if labels is None:
        raise ValueError(
            "sample: --keep-best must be left out for a prior without classes: there is no "
            "intended class whose probability would rank its pictures."
        )
    Classifier.from_pretrained(classifier)  # what is wrong with it is said before the drawing
    found, counts = labels.unique_consecutive(return_counts=True)
    drawn = [sampling.draws_for(count, fraction) for count in counts.tolist()]
    return found.repeat_interleave(torch.tensor(drawn))


def save_samples(samples: Samples, path: str | os.PathLike[str]) -> Path:
    """Write samples as one PNG: a labelled row per class, or each picture labelled.

    What was known of a completed picture comes first.
    """
    if samples.completed is not None:
        pictures = torch.cat([samples.completed[None], samples.pictures])
        return save_grid(pictures, path, labels=["known", *(samples.names or _numbers(samples))])
    if samples.names is None:
        return save_grid(samples.pictures, path)
    first = list(dict.fromkeys(samples.names))
    per_class = [samples.names.count(name) for name in first]
    if len(set(per_class)) == 1:
        return save_grid(samples.pictures, path, labels=first, columns=per_class[0])
    return save_grid(samples.pictures, path, labels=samples.names, columns=max(per_class))


def _numbers(samples: Samples) -> list[str]:
    return [str(number) for number in range(len(samples.pictures))]


def save_sample_array(samples: Samples, path: str | os.PathLike[str]) -> Path:
    """Write samples as a data set: (N, H, W, C) uint8 in a .npy, or with labels in an .npz.

    Raises:
        ValueError: the path ends otherwise.
    """
    target = check_array_path(path)
    if samples.rate is not None:
        raise ValueError("sample: sounds have no array; they are written as WAV files.")
    array = (samples.pictures * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".npy":
        np.save(target, array)
    else:
        labels = {} if samples.labels is None else {"labels": samples.labels.numpy()}
        np.savez(target, images=array, **labels)  # type: ignore[arg-type]
    return target


def check_array_path(path: str | os.PathLike[str]) -> Path:
    """The path, where it ends in .npy or .npz.

    Raises:
        ValueError: it ends otherwise.
    """
    if Path(path).suffix not in (".npy", ".npz"):
        raise ValueError(f"sample: the array's path must end in .npy or .npz; got '{path}'.")
    return Path(path)


def show_reconstructions(
    run_path: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    count: int = 8,
    measure: int = 256,
    split: str | None = None,
    only: str | None = None,
    batch_size: int = 16,
    device: str | None = None,
    workers: int | None = None,
) -> list[LevelError]:
    """Write reconstructions beside their originals, level by level, and measure them.

    Args:
        run_path: of a "vae", "vqvae" or "vqvae2" run.
        data: pictures, see `open_source`; brought to the size the run was trained at.
        out: path of the PNG.
        count: pictures shown, evenly spaced over the data.
        measure: pictures the errors are taken over, likewise evenly spaced; at least `count`.
        split, only: as `open_source`.
        batch_size: pictures at a time.
        device: as `draw_samples`.
        workers: reading processes; None chooses.
    Returns:
        One `LevelError` for the top 1, 2, … all levels.
    Raises:
        ValueError: an argument breaks its rule, or the run is of a prior.
    """
    check_count("count", count)
    check_count("measure", measure)
    run = load_run(run_path)
    if run.kind == "prior":
        raise ValueError(
            f"reconstruct: run '{run_path}' must be of a vae, vqvae or vqvae2; it is of a prior. "
            f"Name the run whose codes it draws: '{run.stage1}'."
        )
    model = run.model(device_of(device))
    dataset = data_like(run, data, split=split, only=only)
    shown = evenly(dataset, count)
    with evaluation_batches(shown, batch_size=count, workers=0) as batches:
        pictures = examples(next(batches), device_of(device))
    save_reconstructions(model, pictures, out)
    return measure_levels(model, evenly(dataset, max(count, measure)), batch_size, workers)


def measure_levels(
    model: nn.Module, dataset: ItemDataset, batch_size: int, workers: int | None = None
) -> list[LevelError]:
    """The error of the reconstructions (clamped to 0…1) from the top 1, 2, … all levels."""
    device = next(model.parameters()).device
    totals: list[float] = []
    elements = 0
    with evaluation_batches(dataset, batch_size=batch_size, workers=workers) as batches:
        for batch in batches:
            pictures = examples(batch, device)
            errors = [
                float((decoded.clamp(0.0, 1.0) - pictures).double().square().sum())
                for decoded in reconstructions(model, pictures)
            ]
            totals = [a + b for a, b in zip(totals or [0.0] * len(errors), errors)]
            elements += pictures.numel()
    means = [total / elements for total in totals]
    names = level_names(len(means))
    return [LevelError(name, mse, _psnr(mse)) for name, mse in zip(names, means)]


def _psnr(mse: float) -> float:
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)


def check_count(name: str, value: int) -> None:
    """Refuse a number of pictures or sounds below 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")


def _refuse_prior_arguments(
    class_labels: Sequence[str | int] | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    complete: str | os.PathLike[str] | None,
    keep_best: float | None,
) -> None:
    given = {"class labels": class_labels, "top_k": top_k, "top_p": top_p, "complete": complete}
    given["keep_best"] = keep_best
    named = [name for name, value in given.items() if value is not None]
    named += ["temperature"] if temperature != 1.0 else []
    if named:
        raise ValueError(
            f"sample: {', '.join(named)} must be left out for a VAE, which draws no codes."
        )


def _classes(run: Run, prior: nn.Module, asked: Sequence[str | int] | None) -> list[int] | None:
    """The labels to draw; None where the prior has no classes."""
    number: int | None = prior.config["num_classes"]  # type: ignore[index, assignment]
    if number is None:
        if asked is not None:
            raise ValueError("sample: class labels were given; this prior was trained without any.")
        return None
    if asked is None:
        return list(range(min(number, _MOST_CLASSES)))
    labels = [_class_label(run, number, name) for name in asked]
    if not labels:
        raise ValueError("sample: class labels must name at least one class; got none.")
    return list(dict.fromkeys(labels))


def _class_label(run: Run, number: int, asked: str | int) -> int:
    """The label of a class by its name, or by its number."""
    names = run.class_names or []
    if str(asked) in names:
        return names.index(str(asked))
    text = str(asked).strip()
    if text.isascii() and text.isdigit() and int(text) < number:
        return int(text)
    known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    raise ValueError(
        f"sample: class labels must be in 0 … {number - 1}"
        + (f" or among {known}" if names else "")
        + f"; got {text!r}."
    )


def _class_name(run: Run, label: int) -> str:
    return run.class_names[label] if run.class_names else str(label)


def _spread(classes: list[int], total: int) -> Tensor:
    """`total` labels, as even as can be, the same class side by side: (total,) int64."""
    return torch.tensor(
        [classes[position * len(classes) // total] for position in range(total)]
        if total >= len(classes)
        else classes[:total]
    )


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    """A progress bar over pictures; a silent one where no progress is asked for."""
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="sample", desc="samples", disable=not progress) as bar:
        yield bar


@torch.no_grad()
def _draw_from_vae(
    run: Run, count: int, seed: int, batch_size: int, device: str, progress: bool
) -> Tensor:
    model: Any = run.model(device)
    z = torch.randn(count, model.latent_dim, generator=torch.Generator().manual_seed(seed))
    drawn: list[Tensor] = []
    with _bar(count, progress) as bar:
        for part in z.split(batch_size):
            drawn.append(model.decode(part.to(device)).float().cpu())
            bar.update(len(part))
    return torch.cat(drawn).clamp(0.0, 1.0)


def _draw_from_prior(
    prior: Any,
    decoder: Any,
    count: int,
    labels: Tensor | None,
    options: dict[str, Any],
    batch_size: int,
    progress: bool,
) -> Tensor:
    device = next(prior.parameters()).device
    drawn: list[Tensor] = []
    # One batch shows the codes as they are drawn; several show the pictures as they are finished.
    single = count <= batch_size
    with _bar(count, progress and not single) as bar:
        for first in range(0, count, batch_size):
            size = min(batch_size, count - first)
            part = None if labels is None else labels[first : first + size].to(device)
            codes = prior.sample(
                size, class_labels=part, first_sample=first, progress=progress and single, **options
            )
            drawn.append(decoder.decode_codes(codes).float().cpu())
            bar.update(size)
    return torch.cat(drawn).clamp(0.0 if decoder.dimensions == 2 else -1.0, 1.0)


Items = TypeVar("Items", bound=ItemDataset)


def evenly(dataset: Items, count: int) -> Items:
    """At most `count` items of a dataset, evenly spaced."""
    count = min(count, len(dataset))
    return dataset.subset([position * len(dataset) // count for position in range(count)])
