"""Priors: settings and their refusals, metrics, what a finished run holds."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvq.models import HierarchicalPrior
from fastvq.train.codes import CodeFolder
from fastvq.train.priors import PriorTask, train_prior
from fastvq.train.run_folder import load_run

from .conftest import prior_config


@pytest.fixture(scope="module")
def prior_run(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("prior") / "run"
    return train_prior(prior_config(codes, run, validation_fraction=0.2), progress=False)


def test_a_finished_prior_samples_each_class(prior_run: Path, stage1_run: Path) -> None:
    run = load_run(prior_run)
    assert (run.kind, run.step, run.class_names) == ("prior", 6, ["0", "1", "2"])
    assert run.stage1 == stage1_run
    model = run.model()
    assert isinstance(model, HierarchicalPrior)
    codes = model.sample(3, class_labels=torch.arange(3), seed=0)
    assert [tuple(code_map.shape) for code_map in codes] == [(3, 2, 2), (3, 4, 4)]
    decoder: Any = run.stage1_model()
    assert decoder.decode_codes(codes).shape == (3, 3, 8, 8)
    names = {path.name for path in run.pictures.iterdir()}
    assert {"samples-step-00000006.png", "curves.png"} <= names


def test_the_averaged_weights_are_the_runs_model(prior_run: Path) -> None:
    from safetensors.torch import load_file

    last = prior_run / "checkpoints/step-00000006"
    plain, average = (load_file(last / f"{name}.safetensors") for name in ("model", "average"))
    state = load_run(prior_run).model().state_dict()
    assert all(torch.equal(state[key], value) for key, value in average.items())
    assert any(not torch.equal(plain[key], value) for key, value in average.items())
    saved = HierarchicalPrior.from_pretrained(prior_run / "model").state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.items())


def test_validation_is_in_nats_and_bits_per_code(prior_run: Path, codes: Path) -> None:
    task = PriorTask(prior_config(codes, prior_run, validation_fraction=0.2))
    batch = task.validation.read_batch(range(12))
    model = load_run(prior_run).model().double()
    assert isinstance(model, HierarchicalPrior)
    with torch.no_grad():
        nats = -model.level_log_prob(batch["codes"], batch["label"]).mean(dim=0)
    last = load_run(prior_run).metrics()[-1]
    # A float32 network of some ten layers, errors of order 10 · 2^-24 · cond; 1e-4 is its 100-fold.
    assert last["validation_nats"] == pytest.approx(float(nats.sum()), rel=1e-4)
    for level, size in enumerate((4, 16)):
        bits = float(nats[level]) / size / math.log(2)
        assert last[f"validation_level{level}_bits_per_code"] == pytest.approx(bits, rel=1e-4)
    assert last["validation_bits_per_code"] == pytest.approx(
        float(nats.sum()) / 20 / math.log(2), rel=1e-4
    )


def test_each_level_trains_as_it_would_alone(codes: Path, tmp_path: Path) -> None:
    """The gradient of a level's weights comes from that level's loss alone."""
    task = PriorTask(prior_config(codes, tmp_path / "run"))
    batch = task.training.read_batch(range(8))
    groups = task.clip_groups()
    everything = {id(p) for parameters in groups.values() for p in parameters}
    assert everything == {id(p) for p in task.model.parameters()}
    values = task.loss(task.model.eval(), batch, torch.device("cpu"))
    values["loss"].backward()
    together = [p.grad.clone() for p in groups["level1_"] if p.grad is not None]
    task.model.zero_grad()
    task.loss(task.model, batch, torch.device("cpu"))["level1_nats_per_code"].backward()
    alone = [p.grad for p in groups["level1_"] if p.grad is not None]
    assert len(alone) == len(groups["level1_"])
    assert all(torch.equal(a, b) for a, b in zip(together, alone))
    assert all(p.grad is None or not p.grad.any() for p in groups["level0_"])


def test_classes_can_be_left_out(codes: Path, tmp_path: Path) -> None:
    config = prior_config(codes, tmp_path / "run", class_conditional=False, steps=1)
    run = load_run(train_prior(config, progress=False))
    assert run.class_names is None
    assert run.resolved["model_arguments"]["num_classes"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_average": 1.0}, r"weight_average must be in \[0, 1\); got 1\.0"),
        ({"preset": "huge"}, "preset must be one of"),
        ({"model_arguments": {"layers": 3}}, "'layers', which HierarchicalPrior does not take"),
        ({"model_arguments": {"shapes": [[1, 1]]}}, "must leave shapes to the codes"),
        ({"codes": "/nowhere"}, "no such folder"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, codes: Path, tmp_path: Path
) -> None:
    config = prior_config(codes, tmp_path / "run")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        train_prior(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_codes_without_classes_refuse_a_class_conditional_prior(
    codes: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(codes, tmp_path / "codes")
    manifest = copy / "manifest.json"
    start, _, rest = manifest.read_text().partition('"class_names": [')
    manifest.write_text(start + '"class_names": null' + rest.partition("]")[2])
    assert CodeFolder(copy).num_classes == 0
    with pytest.raises(ValueError, match="class_conditional needs codes with classes"):
        train_prior(prior_config(copy, tmp_path / "run", class_conditional=True), progress=False)


def test_a_stage1_run_that_went_on_is_refused(
    prior_run: Path, stage1_run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(prior_run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["resolved"]["stage1"]["weights_sha256"] = "0" * 64
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="made by other weights"):
        load_run(copy).stage1_model()
    with pytest.raises(ValueError, match="it must be a prior; got a vqvae2"):
        load_run(stage1_run).stage1_model()


def test_a_prior_finds_its_stage1_run_after_both_were_moved(
    prior_run: Path, stage1_run: Path, tmp_path: Path
) -> None:
    config = json.loads((prior_run / "config.json").read_text())
    between = Path(config["resolved"]["stage1"]["from_run"])
    moved = tmp_path / "a" / "b" / "c" / "prior"
    shutil.copytree(prior_run, moved)
    beside = Path(os.path.normpath(moved / between))
    shutil.copytree(stage1_run, beside)
    config["resolved"]["stage1"]["path"] = str(tmp_path / "no longer there")
    (moved / "config.json").write_text(json.dumps(config))
    assert load_run(moved).stage1 == beside
    load_run(moved).stage1_model()
    shutil.rmtree(beside)
    with pytest.raises(ValueError, match="no longer there"):
        load_run(moved).stage1_model()
