"""Anomaly detection with a trained run: score a data set, flag what is odd, show where.

    detection/report.json       settings, threshold, counts; written last
              scores.csv        one row per item; scores.jsonl holds the same
              held-in.csv       the same of the held-in items; held-in.jsonl likewise
              histogram.png     both groups' scores and the threshold
              heat-maps/        of each flagged item

What is measured is in anomaly.py, what the threshold guarantees in false_alarms.py.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastvq.train.anomaly import SCORES, AnomalyModel, Measures, Standardisation
from fastvq.train.data import ItemDataset, evaluation_batches, examples
from fastvq.train.false_alarms import (
    Scores,
    check_rate,
    conformal_p_values,
    conformal_threshold,
    least_held_in,
)
from fastvq.train.heat_maps import save_heat_maps
from fastvq.train.metrics import area_under_roc
from fastvq.train.output_folder import check_free, make_partial, move_into_place
from fastvq.train.pictures import save_histogram
from fastvq.train.processes import device_of
from fastvq.train.run_data import data_like, is_of_sounds
from fastvq.train.run_folder import load_run
from fastvq.train.spectrograms import spectrogram_pictures
from fastvq.train.stage1 import class_names

REPORT = "report.json"
_LEAST_FITTED = 20  # held-in items for a mean and a deviation of each measure


@dataclasses.dataclass(kw_only=True)
class DetectionConfig:
    """Settings of a detection.

    Attributes:
        run: of a prior; or of a vqvae, vqvae2 or vae, for the reconstruction alone.
        data: the items to judge, see `open_source`.
        held_in: normal items that no part of the run was trained on; they set the threshold.
        out: the folder to write.
        split, held_in_split: part of each, where it has parts.
        only, held_in_only: which of their files, see `open_source`.
        class_pattern: what the names of the data's files say of their class; None: as in the run.
        clip_seconds: of sounds, how much of each is heard, from its start; None: as in the run.
        score: "combined", "likelihood" or "reconstruction", as `AnomalyModel` and
            `Standardisation` define them; None: combined with a prior, else reconstruction.
        false_alarm_rate: of normal items, the share that may be flagged, in (0, 1).
        levels: levels of codes to reconstruct from; None: all.
        normal: classes of the data that count as normal, by their names: the report then holds
            the area under the ROC curve of every score.
        heat_maps: at most so many of the flagged items get one, the oddest first; None: all.
        batch_size: items at a time.
        device: "cpu", "cuda", …; None: CUDA where there is one.
        workers: reading processes; None chooses.
        seed: of the division of the held-in items.
        overwrite: replace an earlier detection in `out`.
        strict: refuse a broken item instead of leaving it out.
    """

    run: str
    data: str
    held_in: str
    out: str
    split: str | None = None
    held_in_split: str | None = None
    only: str | None = None
    held_in_only: str | None = None
    class_pattern: str | None = None
    clip_seconds: float | None = None
    score: str | None = None
    false_alarm_rate: float = 0.05
    levels: int | None = None
    normal: Sequence[str] | None = None
    heat_maps: int | None = None
    batch_size: int = 64
    device: str | None = None
    workers: int | None = None
    seed: int = 0
    overwrite: bool = False
    strict: bool = False

    def check(self) -> None:
        """Raises:
        ValueError: a setting breaks its rule.
        """
        check_rate(self.false_alarm_rate)
        if self.score is not None and self.score not in SCORES:
            raise ValueError(
                f"detect: score must be one of {', '.join(SCORES)}; got {self.score!r}."
            )
        least = {"batch_size": 1, "seed": 0} | ({} if self.heat_maps is None else {"heat_maps": 0})
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"detect: {name} must be {value} or more; got {getattr(self, name)}."
                )


class Detection(NamedTuple):
    """What `detect` found."""

    path: Path
    threshold: float
    rows: list[dict[str, Any]]  # as in scores.jsonl
    broken: int  # items left out
    auroc: dict[str, float] | None  # of each score; None where `normal` was not given

    @property
    def flagged(self) -> int:
        """How many items score above the threshold."""
        return sum(row["flagged"] for row in self.rows)


class _Measured(NamedTuple):
    """The measures of n readable items of a data set."""

    dataset: ItemDataset
    positions: NDArray[np.int64]
    level_nats: NDArray[np.float64]  # (n, L)
    mse: Scores
    relative_error: Scores
    peaks: dict[str, Scores]  # the highest value of each item's maps
    broken: dict[str, str]

    @property
    def nats(self) -> Scores:
        return self.level_nats.sum(axis=1)


class _Rule(NamedTuple):
    """What the held-in items decide."""

    score: str
    standard: Standardisation | None
    fitted: int  # held-in items that `standard` is of
    calibration: Scores  # the scores of the others, which set the threshold
    threshold: float
    scales: dict[str, float]  # the hottest value of each map


def detect(config: DetectionConfig, *, progress: bool = True) -> Detection:
    """Score every item of a data set under a run, and write a report on what is odd.

    With the combined score a random half of the held-in items fits its `Standardisation` and the
    other half sets the threshold, so that the rule's guarantee holds; otherwise all of them set it.
    A heat map is hottest at a value that, anywhere in it, no more than the false-alarm rate of
    normal items reach.

    Args:
        config: the settings.
        progress: show a bar.
    Raises:
        ValueError: a setting breaks its rule, the run, the data or `out` is refused, or there are
            too few held-in items for the rate.
    """
    config.check()
    out = Path(config.out)
    check_free("detection", out, REPORT, config.overwrite)
    model = AnomalyModel(
        load_run(config.run), levels=config.levels, device=device_of(config.device)
    )
    score = _score_of(config, model)
    like = functools.partial(
        data_like, model.stage1, clip_seconds=config.clip_seconds, strict=config.strict
    )
    data = like(
        config.data, split=config.split, only=config.only, class_pattern=config.class_pattern
    )
    normal = None if config.normal is None else _normal_labels(data, config.normal)
    held_in = like(config.held_in, split=config.held_in_split, only=config.held_in_only)
    _check_enough(len(held_in), score, config)

    reference = _measure(model, held_in, config, "held-in", progress)
    rule = _rule(reference, score, config)
    measured = _measure(model, data, config, "data", progress)
    scores = _scores(measured, rule.standard)
    rows = _rows(measured, scores, rule)
    auroc = None if normal is None else _auroc(measured, scores, normal)

    folder = make_partial(out)
    _draw_flagged(model, measured, rows, rule, config, folder / "heat-maps", progress)
    _write_table(folder / "scores", rows)
    _write_table(folder / "held-in", _rows(reference, _scores(reference, rule.standard), rule))
    save_histogram(
        {"held in": rule.calibration, **_groups(measured, scores[score], normal)},
        folder / "histogram.png",
        threshold=rule.threshold,
        label=f"{score} score",
    )
    detection = Detection(out, rule.threshold, rows, len(measured.broken), auroc)
    report = {
        "settings": dataclasses.asdict(config) | {"score": score, "levels": model.levels},
        "threshold": rule.threshold,
        "items": len(rows),
        "flagged": detection.flagged,
        "broken": measured.broken,
        "auroc": auroc,
        "held_in": {
            "items": len(reference.positions),
            "fitted": rule.fitted,
            "calibrating": len(rule.calibration),
            "broken": reference.broken,
        },
        "standardisation": None if rule.standard is None else rule.standard._asdict(),
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    move_into_place(folder, out)
    return detection


def _score_of(config: DetectionConfig, model: AnomalyModel) -> str:
    if model.prior is None:
        if config.score in ("combined", "likelihood"):
            raise ValueError(
                f"detect: score {config.score!r} needs the run of a prior; run '{config.run}' is "
                f"of a {model.stage1.kind}. Use --score reconstruction, or train a prior on its "
                "codes."
            )
        return "reconstruction"
    return config.score or "combined"


def _normal_labels(data: ItemDataset, names: Sequence[str]) -> list[int]:
    known, own = class_names(data.class_names, data.num_classes), data.labels
    if known is None or own is None:
        raise ValueError(f"detect: normal needs classes; data '{data.source.path}' has none.")
    for name in names:
        if name not in known:
            raise ValueError(
                f"detect: normal must be among {', '.join(known[:20])}"
                f"{', …' if len(known) > 20 else ''}; got {name!r}."
            )
    labels = [known.index(name) for name in names]
    is_normal = np.isin(own, labels)
    if is_normal.all() or not is_normal.any():
        raise ValueError(
            f"detect: normal must leave some of the data normal and some not; got "
            f"{int(is_normal.sum())} normal items of {len(is_normal)}."
        )
    return labels


def _check_enough(count: int, score: str, config: DetectionConfig) -> None:
    """Refuse held-in items that are too few to set the threshold by."""
    needed, way_out = least_held_in(config.false_alarm_rate), "a higher rate"
    if score == "combined":
        if needed <= _LEAST_FITTED:
            way_out = "take one score alone, as --score likelihood"
        needed = 2 * max(needed, _LEAST_FITTED)
    if count < needed:
        raise ValueError(
            f"detect: the {score} score at a false-alarm rate of {config.false_alarm_rate:g} needs "
            f"at least {needed} held-in items; '{config.held_in}' has {count}. Give more, or "
            f"{way_out}."
        )


def _rule(reference: _Measured, score: str, config: DetectionConfig) -> _Rule:
    """The threshold, and what the combined score is standardised by, from separate items.

    Raises:
        ValueError: too few held-in items could be decoded.
    """
    count = len(reference.positions)
    _check_enough(count, score, config)
    order = np.random.default_rng(config.seed).permutation(count)
    fitted, calibrating = np.split(order, [count // 2 if score == "combined" else 0])
    standard = None
    if score == "combined":
        standard = Standardisation.fit(reference.nats[fitted], reference.relative_error[fitted])
    calibration = _scores(reference, standard)[score][calibrating]
    rate = config.false_alarm_rate
    scales = {
        title: conformal_threshold(peaks[calibrating], rate)
        for title, peaks in reference.peaks.items()
    }
    threshold = conformal_threshold(calibration, rate)
    return _Rule(score, standard, len(fitted), calibration, threshold, scales)


def _measure(
    model: AnomalyModel, dataset: ItemDataset, config: DetectionConfig, name: str, progress: bool
) -> _Measured:
    """All readable items of a data set, one batch in memory."""
    found: list[Measures] = []
    peaks: dict[str, list[torch.Tensor]] = {}
    indices = []
    broken: dict[str, str] = {}
    for index, _, measures in _batches(model, dataset, config, name, progress, broken):
        indices.append(index)
        for title, heat in _maps(measures).items():
            peaks.setdefault(title, []).append(heat.flatten(start_dim=1).amax(dim=1).cpu())
        found.append(measures._replace(surprise=None, error=measures.mse))
    if not found:
        raise ValueError(f"detect: none of the items of '{dataset.source.path}' can be decoded.")

    def column(parts: Sequence[torch.Tensor]) -> NDArray[np.float64]:
        return torch.cat([part.cpu() for part in parts]).double().numpy()

    return _Measured(
        dataset,
        np.concatenate(indices),
        column([one.level_nats for one in found]),
        column([one.mse for one in found]),
        column([one.relative_error for one in found]),
        {title: column(values) for title, values in peaks.items()},
        broken,
    )


def _batches(
    model: AnomalyModel,
    dataset: ItemDataset,
    config: DetectionConfig,
    name: str,
    progress: bool,
    broken: dict[str, str],
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor, Measures]]:
    """(indices, items, measures) of every batch; what cannot be decoded is noted in `broken`."""
    with (
        tqdm(total=len(dataset), desc=name, unit="item", disable=not progress) as bar,
        evaluation_batches(
            dataset, batch_size=config.batch_size, workers=config.workers
        ) as batches,
    ):
        for batch in batches:
            items = examples(batch, model.device)
            yield batch["index"].numpy(), items, model.measure(items)
            bar.update(len(items))
        broken.update(batches.broken.reasons)


def _maps(measures: Measures) -> dict[str, torch.Tensor]:
    """The maps that are shown, by their titles."""
    surprise = {} if measures.surprise is None else {"codes": measures.surprise}
    return {**surprise, "reconstruction": measures.error}


def _scores(measured: _Measured, standard: Standardisation | None) -> dict[str, Scores]:
    """Every score there is, by its name in `SCORES`."""
    scores = {"reconstruction": measured.relative_error}
    if measured.level_nats.shape[1]:
        scores = {"likelihood": measured.nats, **scores}
    if standard is not None:
        scores = {"combined": standard.combined(measured.nats, measured.relative_error), **scores}
    return scores


def _rows(measured: _Measured, scores: dict[str, Scores], rule: _Rule) -> list[dict[str, Any]]:
    """The table, one row per item."""
    source = measured.dataset.source
    names = class_names(measured.dataset.class_names, measured.dataset.num_classes)
    own = scores[rule.score]
    p_values = conformal_p_values(rule.calibration, own)
    rows = []
    for number, index in enumerate(measured.positions):
        row: dict[str, Any] = {"name": source.name(int(index)), "index": int(index)}
        if names is not None and source.labels is not None:
            row["class"] = names[source.labels[index]]
        row |= {"flagged": bool(own[number] > rule.threshold), "p_value": p_values[number]}
        row |= {name: values[number] for name, values in scores.items()}
        for level, nats in enumerate(measured.level_nats[number]):
            row[f"level{level}_nats"] = nats
        rows.append({**row, "mse": measured.mse[number], "heat_map": ""})
    return rows


def _groups(measured: _Measured, scores: Scores, normal: list[int] | None) -> dict[str, Scores]:
    """The items of the histogram: all together, or the normal and the other classes apart."""
    if normal is None:
        return {"data": scores}
    is_normal = np.isin(_labels(measured), normal)
    return {"normal classes": scores[is_normal], "other classes": scores[~is_normal]}


def _auroc(measured: _Measured, scores: dict[str, Scores], normal: list[int]) -> dict[str, float]:
    is_normal = np.isin(_labels(measured), normal)
    return {
        name: area_under_roc(values[is_normal], values[~is_normal])
        for name, values in scores.items()
    }


def _labels(measured: _Measured) -> NDArray[np.int64]:
    labels = measured.dataset.source.labels
    assert labels is not None
    return labels[measured.positions]


def _draw_flagged(
    model: AnomalyModel,
    measured: _Measured,
    rows: list[dict[str, Any]],
    rule: _Rule,
    config: DetectionConfig,
    folder: Path,
    progress: bool,
) -> None:
    """The heat maps of the flagged items, the oddest first where not all; noted in their rows."""
    flagged = [row for row in rows if row["flagged"]]
    flagged.sort(key=lambda row: row[rule.score], reverse=True)
    chosen = {row["index"]: row for row in flagged[: config.heat_maps]}
    if not chosen:
        return
    digits = len(str(len(measured.dataset) - 1))
    part = measured.dataset.subset(sorted(chosen))
    for indices, items, measures in _batches(model, part, config, "heat maps", progress, {}):
        maps = _maps(measures)
        for number, index in enumerate(indices.tolist()):
            row = chosen[index]
            name = f"{index:0{digits}d}-{_file_stem(row['name'])}.png"
            own = {title: heat[number] for title, heat in maps.items()}
            save_heat_maps(_shown(model, items[number]), own, rule.scales, folder / name)
            row["heat_map"] = f"{folder.name}/{name}"


def _shown(model: AnomalyModel, item: torch.Tensor) -> torch.Tensor:
    """(C, H, W) in 0…1: a picture as it is, a sound as its spectrogram."""
    if not is_of_sounds(model.stage1):
        return item
    return spectrogram_pictures(item[None], model.stage1.resolved["sample_rate"])[0]


def _file_stem(name: str) -> str:
    """What a file may be called after an item: the last part of its name, plain characters only."""
    stem = Path(name).name.rpartition(".")[0] or Path(name).name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:80] or "item"


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """PATH.csv and PATH.jsonl."""
    plain = [
        {
            key: float(value) if isinstance(value, np.floating) else value
            for key, value in row.items()
        }
        for row in rows
    ]
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(plain[0]))
        writer.writeheader()
        writer.writerows(plain)
    with path.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in plain)
