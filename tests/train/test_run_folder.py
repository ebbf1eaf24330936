"""Run folders: what may be written into, and opening a run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvq.models import VQVAE2
from fastvq.train.run_folder import RunFolder, load_run

CONFIG: dict[str, Any] = {
    "kind": "vqvae2",
    "steps": 5,
    "seed": 0,
    "model_arguments": {},
    "resolved": {"model_arguments": {"levels": 2}, "class_names": None},
}


def test_an_existing_run_is_refused_without_resume(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match=r"run': it exists\. Go on with it by --resume"):
        RunFolder.create(tmp_path / "run", CONFIG)
    RunFolder.create(tmp_path / "run", {**CONFIG, "steps": 9}, resume=True)
    assert load_run(tmp_path / "run").config["steps"] == 9


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0; got 1"),
        (
            {"resolved": {"model_arguments": {"levels": 3}, "class_names": None}},
            r"resolved\.model_arguments",
        ),
    ],
)
def test_resuming_with_other_settings_is_refused_and_changes_nothing(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    RunFolder.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match=f"started with {named}"):
        RunFolder.create(tmp_path / "run", {**CONFIG, **change}, resume=True)
    assert load_run(tmp_path / "run").config == CONFIG


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds files but no run"):
            RunFolder.create(tmp_path, CONFIG, resume)
        with pytest.raises(ValueError, match="must be a folder"):
            RunFolder.create(tmp_path / "notes.txt", CONFIG, resume)


def test_a_folder_left_by_a_run_killed_at_once_is_free(tmp_path: Path) -> None:
    (tmp_path / "run" / "pictures").mkdir(parents=True)
    (tmp_path / "run" / ".config.json").write_text("{")
    RunFolder.create(tmp_path / "run", CONFIG)
    assert load_run(tmp_path / "run").step == 0


def test_metrics_survive_a_torn_last_line_and_are_cut_at_the_step(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    for step in (1, 2, 3):
        folder.add_metrics({"step": step, "loss": 0.5})
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in load_run(folder.path).metrics()] == [1, 2, 3]
    folder.keep_metrics(2)
    folder.add_metrics({"step": 3})
    assert [record["step"] for record in load_run(folder.path).metrics()] == [1, 2, 3]


def test_a_run_opens_with_its_model(stage1_run: Path) -> None:
    run = load_run(stage1_run)
    assert (run.kind, run.step, run.class_names) == ("vqvae2", 6, ["0", "1", "2"])
    assert run.stage1 is None
    model = run.model()
    assert isinstance(model, VQVAE2)
    assert not model.training
    saved = VQVAE2.from_pretrained(stage1_run / "model").state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_what_is_no_run_is_refused(tmp_path: Path, stage1_run: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_run(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_run(tmp_path)
    copy = shutil.copytree(stage1_run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        load_run(copy).model()
    (copy / "config.json").write_text(json.dumps({"kind": "gan"}))
    with pytest.raises(ValueError, match="kind one of vae, vqvae, vqvae2, prior"):
        load_run(copy)
