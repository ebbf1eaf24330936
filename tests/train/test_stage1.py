"""Stage 1: settings and their refusals, metrics, the three models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvq.models import VAE, VQVAE2
from fastvq.train.run_folder import load_run
from fastvq.train.stage1 import Stage1Task, measured_variance, train_stage1

from .conftest import TINY_VQ, stage1_config


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_each_model_trains_and_leaves_a_whole_run(
    model: str, pictures: Path, tmp_path: Path
) -> None:
    arguments = {"hidden_channels": 4, "latent_dim": 3} if model == "vae" else TINY_VQ
    config = stage1_config(pictures, tmp_path / "run", model=model, model_arguments=arguments)
    run = load_run(train_stage1(config, progress=False))
    assert run.step == 6
    assert json.loads(json.dumps(run.config)) == run.config
    last = [record for record in run.metrics() if record["step"] == 6]
    expected = {"loss", "learning_rate", "pictures_per_second", "data_share"}
    expected |= {"kl"} if model == "vae" else {"level0_perplexity", "level0_usage"}
    assert expected <= last[0].keys()
    assert {"validation_reconstruction_mse", "validation_psnr"} <= last[1].keys()
    assert ("validation_elbo" in last[1]) == (model == "vae")
    names = {path.name for path in run.pictures.iterdir()}
    assert {"curves.png", "reconstructions-step-00000006.png"} <= names
    assert ("samples-step-00000006.png" in names) == (model == "vae")


def test_training_lowers_the_reconstruction_error(pictures: Path, tmp_path: Path) -> None:
    config = stage1_config(
        pictures, tmp_path / "run", steps=60, validate_every=60, learning_rate=3e-3
    )
    metrics = load_run(train_stage1(config, progress=False)).metrics()
    losses = [record["reconstruction_loss"] for record in metrics if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_resumes_with_another_thread_count(tmp_path: Path) -> None:
    # Enough values that torch would split their sum among threads.
    images = np.random.default_rng(0).integers(0, 256, (128, 40, 40), dtype=np.uint8)
    np.save(tmp_path / "many.npy", images)
    config = stage1_config(tmp_path / "many.npy", tmp_path / "run", steps=1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            config.steps = threads
            train_stage1(config, resume=threads > 1, progress=False)
    finally:
        torch.set_num_threads(before)
    assert load_run(tmp_path / "run").step == 3


def test_validation_reports_the_error_of_the_saved_model(pictures: Path, tmp_path: Path) -> None:
    config = stage1_config(pictures, tmp_path / "run", steps=1, validation_fraction=0.2)
    run = load_run(train_stage1(config, progress=False))
    held_out = Stage1Task(config).validation
    assert len(held_out) == 12
    x = held_out.read_batch(range(12))["picture"].double() / 255
    model = run.model().double()
    assert isinstance(model, VQVAE2)
    squared = (model.decode_codes(model.encode(x)).clamp(0, 1) - x).square()
    expected = float(squared.mean())
    last = run.metrics()[-1]
    # float32 network of about ten layers on values of order 1: 1e-5 is over 80 unit roundoffs
    # of the relative error, and a code that flips moves one map position only.
    assert last["validation_reconstruction_mse"] == pytest.approx(expected, rel=1e-3)
    psnr = -10 * squared.flatten(1).mean(1).log10().mean()
    assert last["validation_psnr"] == pytest.approx(float(psnr), abs=1e-2)


def test_the_data_decides_what_the_settings_leave_open(pictures: Path, tmp_path: Path) -> None:
    task = Stage1Task(stage1_config(pictures, tmp_path / "run"))
    chosen = task.training.read_batch(range(len(task.training)))["picture"].double() / 255
    variance = measured_variance(task.training)
    # Sums of 57·192 float32 quotients in float64: only their own rounding, 2^-24 each, remains.
    assert variance == pytest.approx(float(chosen.var(correction=0)), rel=1e-5)
    assert task.resolved["model_arguments"]["data_variance"] == variance
    assert task.resolved["picture_shape"] == [3, 8, 8]
    vae = stage1_config(pictures, tmp_path / "run", model="vae", model_arguments={})
    model = Stage1Task(vae).model
    assert isinstance(model, VAE)
    assert model.likelihood == "gaussian"
    vae.channels = 1
    grey = Stage1Task(vae)
    assert isinstance(grey.model, VAE)
    assert grey.model.likelihood == "bernoulli"
    batch = grey.training.read_batch([0, 1])
    assert grey._examples(batch, torch.device("cpu")).unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more; got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"schedule": "step"}, r"schedule must be one of constant, cosine; got 'step'"),
        ({"learning_rate": 0.0}, r"learning_rate must be positive; got 0\.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive; got nan"),
        ({"optimizer": "sgd"}, "optimizer must be adam or adamw; got 'sgd'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16; got 'fp8'"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1"),
        ({"model": "gan"}, "model must be one of vae, vqvae, vqvae2; got 'gan'"),
        ({"preset": "huge"}, "preset must be one of vqvae2-imagenet256, .*; got 'huge'"),
        ({"preset": "laptop-256", "model": "vqvae"}, "presets are of model 'vqvae2'"),
        (
            {"model_arguments": {"widht": 3}},
            "'widht', which VQVAE2 does not take; it takes .*decay",
        ),
        ({"model_arguments": {"num_codes": "many"}}, "model_arguments do not fit VQVAE2"),
        ({"model_arguments": {"num_codes": 0}}, "num_codes must be at least 1; got 0"),
        ({"data_variance": 0.0}, "data_variance must be 'measured' or a positive number"),
        ({"binarise": True}, "binarise is of model 'vae'"),
        ({"image_size": 30}, r"multiples of 4 .*got 30 × 30.*such as 28 or 32"),
        ({"data": "/nowhere"}, "no such file or folder"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    config = stage1_config(pictures, tmp_path / "run")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        train_stage1(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_half_precision_without_a_gpu_is_refused(pictures: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        config = stage1_config(pictures, tmp_path / "run", mixed_precision="fp16")
        with pytest.raises(RuntimeError, match="'fp16' needs a GPU"):
            train_stage1(config, progress=False)


def test_bf16_trains_and_keeps_float32_weights(pictures: Path, tmp_path: Path) -> None:
    config = stage1_config(pictures, tmp_path / "run", mixed_precision="bf16", steps=3)
    run = load_run(train_stage1(config, progress=False))
    floats = {v.dtype for v in run.model().state_dict().values() if v.is_floating_point()}
    assert floats == {torch.float32}


def test_a_codebook_that_is_hardly_used_is_warned_of_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvq.train import loop

    monkeypatch.setattr(loop, "LOW_USAGE", 1.1)
    monkeypatch.setattr(loop, "LOW_USAGE_STEPS", 2)
    config = stage1_config(pictures, tmp_path / "run", log_every=1)
    with pytest.warns(UserWarning, match="codes of level") as caught:
        train_stage1(config, progress=False)
    messages = [str(w.message) for w in caught if "codes of level" in str(w.message)]
    assert len(messages) == 2
    assert len({message.split(" are in use")[0].split()[-1] for message in messages}) == 2
