"""`detect`: what its tables, report and pictures hold, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.train.anomaly import AnomalyModel, Standardisation
from fastvq.train.detection import Detection, DetectionConfig, detect
from fastvq.train.false_alarms import conformal_p_values, conformal_threshold
from fastvq.train.heat_maps import overlay
from fastvq.train.priors import train_prior
from fastvq.train.run_folder import load_run

from .conftest import coloured, prior_config

NUMBERS = ("p_value", "combined", "likelihood", "reconstruction", "level0_nats", "level1_nats")


@pytest.fixture(scope="module")
def prior_run(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "prior"
    return train_prior(prior_config(codes, run, class_conditional=False), progress=False)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures: two classes as the training pictures, and a third of black and white noise."""
    images, labels = coloured(1, 12)
    noise = np.random.default_rng(2).integers(0, 2, (4, 8, 8, 3), dtype=np.uint8) * np.uint8(255)
    images[labels == 2] = noise
    path = tmp_path_factory.mktemp("odd") / "odd.npz"
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def found(
    prior_run: Path, pictures: Path, odd: Path, tmp_path_factory: pytest.TempPathFactory
) -> Detection:
    out = tmp_path_factory.mktemp("out") / "found"
    settings = config(prior_run, pictures, odd, out, false_alarm_rate=0.25, heat_maps=None)
    found = detect(settings, progress=False)
    assert 0 < found.flagged < 12
    return found


def config(run: Path, held_in: Path, data: Path, out: Path, **changes: Any) -> DetectionConfig:
    settings: dict[str, Any] = {"false_alarm_rate": 0.1, "batch_size": 7, "heat_maps": 0}
    settings["normal"] = ["0", "1"]
    paths = {"run": run, "data": data, "held_in": held_in, "out": out}
    return DetectionConfig(**settings | {k: str(v) for k, v in paths.items()} | changes)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_names_choose_the_files_and_say_their_class(
    prior_run: Path, odd: Path, tmp_path: Path
) -> None:
    data, held_in = tmp_path / "data", tmp_path / "held-in"
    for folder in (data, held_in):
        folder.mkdir()
    with np.load(odd) as arrays:
        for number, (image, label) in enumerate(zip(arrays["images"], arrays["labels"])):
            for folder, name in ((data, ("ok", "ok", "odd")[label]), (held_in, "ab"[number % 2])):
                Image.fromarray(image).save(folder / f"{name}_{number}.png")
    (data / "ok_left-out.png").write_bytes(b"")
    chosen = {"only": r"_\d+\.png$", "held_in_only": "^a", "class_pattern": "^(ok|odd)_"}
    settings = {"score": "likelihood", "false_alarm_rate": 0.4, "normal": ["ok"], "strict": True}
    found = detect(
        config(prior_run, held_in, data, tmp_path / "out", **chosen, **settings), progress=False
    )
    assert sorted(row["class"] for row in found.rows) == ["odd"] * 4 + ["ok"] * 8
    assert len(lines(found.path / "held-in.jsonl")) == 6


def test_tables_hold_one_row_per_item_alike(found: Detection, odd: Path) -> None:
    rows, plain = lines(found.path / "scores.jsonl"), table(found.path / "scores.csv")
    assert len(rows) == len(plain) == 12
    assert list(rows[0]) == [
        *("name", "index", "class", "flagged", *NUMBERS, "mse", "heat_map"),
    ]
    for number, (row, text) in enumerate(zip(rows, plain)):
        assert row["name"] == f"{odd}[{number}]"
        assert (row["index"], row["class"]) == (number, str(number % 3))
        assert {key: str(value) for key, value in row.items()} == text
    assert rows == [{**row, "p_value": float(row["p_value"])} for row in found.rows]


def test_scores_are_what_their_rules_say(
    found: Detection, prior_run: Path, pictures: Path, odd: Path
) -> None:
    judge = AnomalyModel(load_run(prior_run))
    with np.load(odd) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 255
    measures = judge.measure(images)
    rows, held_in = lines(found.path / "scores.jsonl"), lines(found.path / "held-in.jsonl")
    assert len(held_in) == 60

    def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    # The batches differ, and with them the rounding of the convolutions: thousands of u = 2⁻²⁴.
    for name, values in (
        ("likelihood", measures.nats),
        ("reconstruction", measures.relative_error),
    ):
        np.testing.assert_allclose(column(rows, name), values.numpy(), rtol=1e-3)
    report = json.loads((found.path / "report.json").read_text(encoding="utf-8"))
    order = np.random.default_rng(0).permutation(60)
    fitted, calibrating = order[:30], order[30:]
    standard = Standardisation.fit(
        column(held_in, "likelihood")[fitted], column(held_in, "reconstruction")[fitted]
    )
    for side in ("surprise", "error"):
        np.testing.assert_allclose(report["standardisation"][side], getattr(standard, side))
    for part in (rows, held_in):
        combined = standard.combined(column(part, "likelihood"), column(part, "reconstruction"))
        np.testing.assert_allclose(column(part, "combined"), combined)
    calibration = column(held_in, "combined")[calibrating]
    assert found.threshold == conformal_threshold(calibration, 0.25) == report["threshold"]
    combined = column(rows, "combined")
    assert (column(rows, "flagged") == (combined > found.threshold)).all()
    assert (column(rows, "p_value") == conformal_p_values(calibration, combined)).all()
    assert found.flagged == report["flagged"] == column(rows, "flagged").sum()


def test_the_auroc_of_each_score_is_over_the_pairs_of_the_table(found: Detection) -> None:
    assert found.auroc is not None
    assert set(found.auroc) == {"combined", "likelihood", "reconstruction"}
    for name, area in found.auroc.items():
        normal = [row[name] for row in found.rows if row["class"] != "2"]
        others = [row[name] for row in found.rows if row["class"] == "2"]
        assert area == sum((o > n) + 0.5 * (o == n) for o in others for n in normal) / 32


def test_flagged_items_have_heat_maps_and_no_others(found: Detection) -> None:
    drawn = sorted(path.name for path in (found.path / "heat-maps").iterdir())
    flagged = [row for row in found.rows if row["flagged"]]
    assert drawn == [Path(row["heat_map"]).name for row in flagged]
    assert all(not row["heat_map"] for row in found.rows if not row["flagged"])
    with Image.open(found.path / flagged[0]["heat_map"]) as image:
        assert image.size[0] > 3 * 64  # the picture, the codes, the reconstruction
    with Image.open(found.path / "histogram.png") as image:
        assert image.size[0] > 100


def test_only_the_oddest_have_heat_maps_where_asked(
    prior_run: Path, pictures: Path, odd: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {"heat_maps": 2, "false_alarm_rate": 0.9, "score": "likelihood"}
    some = detect(config(prior_run, pictures, odd, out, **settings), progress=False)
    assert some.flagged > 2
    oddest = sorted(some.rows, key=lambda row: row["likelihood"])[-2:]
    assert {row["index"] for row in some.rows if row["heat_map"]} == {r["index"] for r in oddest}
    assert len(list((out / "heat-maps").iterdir())) == 2


def test_an_overlay_is_the_picture_where_cold_and_hot_where_hot() -> None:
    picture = torch.full((1, 1, 3), 0.4)
    shown = overlay(picture, torch.tensor([[0.0, 1.0, 7.0]]))
    torch.testing.assert_close(shown[:, 0, 0], torch.full((3,), 0.4))
    assert (shown[:, 0, 1] > 0.8).all()
    assert torch.equal(shown[:, 0, 1], shown[:, 0, 2])


def test_one_score_sets_its_threshold_by_all_held_in_items(
    prior_run: Path, pictures: Path, odd: Path, tmp_path: Path
) -> None:
    one = detect(
        config(prior_run, pictures, odd, tmp_path / "out", score="likelihood"), progress=False
    )
    held_in = np.array([row["likelihood"] for row in lines(one.path / "held-in.jsonl")])
    assert one.threshold == conformal_threshold(held_in, 0.1)
    assert "combined" not in one.rows[0]


def test_a_first_stage_alone_goes_by_its_reconstruction(
    stage1_run: Path, pictures: Path, odd: Path, tmp_path: Path
) -> None:
    one = detect(config(stage1_run, pictures, odd, tmp_path / "out", levels=1), progress=False)
    assert set(one.auroc or {}) == {"reconstruction"}
    assert "likelihood" not in one.rows[0]
    with pytest.raises(ValueError, match="'combined' needs the run of a prior"):
        detect(config(stage1_run, pictures, odd, tmp_path / "new", score="combined"))


def test_broken_pictures_are_named_and_left_out_or_refused(
    stage1_run: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            folder / f"a {number}.png"
        )
    (folder / "b.png").write_bytes(b"no picture")
    settings = config(stage1_run, pictures, folder, tmp_path / "out", normal=None)
    with pytest.warns(UserWarning, match=r"b\.png: it cannot be decoded"):
        some = detect(settings, progress=False)
    assert [Path(row["name"]).name for row in some.rows] == ["a 0.png", "a 1.png", "a 2.png"]
    assert some.broken == 1
    report = json.loads((some.path / "report.json").read_text(encoding="utf-8"))
    assert list(report["broken"]) == [f"{folder}/b.png"]
    with pytest.raises(ValueError, match=r"b\.png: it cannot be decoded .*--strict"):
        detect(
            config(stage1_run, pictures, folder, tmp_path / "new", normal=None, strict=True),
            progress=False,
        )
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_refused_or_replaced(
    stage1_run: Path, pictures: Path, odd: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    detect(config(stage1_run, pictures, odd, out), progress=False)
    with pytest.raises(ValueError, match=r"it exists\. Replace it by --overwrite"):
        detect(config(stage1_run, pictures, odd, out))
    detect(config(stage1_run, pictures, odd, out, overwrite=True, heat_maps=0), progress=False)
    assert not (out / "heat-maps").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="something other than detection"):
        detect(config(stage1_run, pictures, odd, other, overwrite=True))
    assert (other / "mine.txt").read_text() == "kept"


def test_errors(prior_run: Path, pictures: Path, odd: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"false_alarm_rate": 0.01}, "needs at least 198 held-in items"),
        ({"false_alarm_rate": 0.01, "score": "likelihood"}, "needs at least 99 held-in items"),
        ({"false_alarm_rate": 1.5}, "false_alarm_rate must lie between 0 and 1; got 1.5"),
        ({"score": "both"}, "score must be one of combined, likelihood, reconstruction"),
        ({"levels": 3}, "levels must be in 1 … 2"),
        ({"normal": ["7"]}, "normal must be among 0, 1, 2; got '7'"),
        ({"normal": ["0", "1", "2"]}, "some of the data normal and some not"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"heat_maps": -1}, "heat_maps must be 0 or more; got -1"),
        ({"split": "test"}, "an array has no parts"),
    ):
        with pytest.raises(ValueError, match=message):
            detect(config(prior_run, pictures, odd, tmp_path / "out", **changes), progress=False)
    assert not (tmp_path / "out").exists()
