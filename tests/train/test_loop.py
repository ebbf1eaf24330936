"""The loop: resuming to bitwise the same weights, several processes, bad losses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastvq.train.priors import train_prior
from fastvq.train.run_folder import load_run, read_metrics
from fastvq.train.stage1 import Stage1Task, train_stage1
from fastvq.train.weight_average import WeightAverage

from .conftest import prior_config, stage1_config


def _assert_same_end(one: Path, other: Path) -> None:
    """Every tensor of the last checkpoint is the same, those of the optimizer included."""
    assert load_run(one).step == load_run(other).step == 6
    files = sorted(path.name for path in (one / "checkpoints/step-00000006").glob("*.safetensors"))
    assert files[-2:] == ["model.safetensors", "optimizer.safetensors"]
    for file in files:
        a, b = (load_file(run / "checkpoints/step-00000006" / file) for run in (one, other))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_resumed_vqvae2_ends_as_an_unbroken_one(
    pictures: Path, stage1_run: Path, tmp_path: Path
) -> None:
    """k-means start, moving averages, revival, level dropout and flips included."""
    settings: dict[str, Any] = {"flip": True, "checkpoint_every": 3}
    straight = stage1_config(pictures, tmp_path / "straight", **settings)
    train_stage1(straight, progress=False)
    broken = stage1_config(pictures, tmp_path / "broken", **settings, validate_every=2)
    broken.steps = 3
    train_stage1(broken, progress=False)
    torch.randn(5)  # whatever else the process does with the generator
    broken.steps = 6
    train_stage1(broken, resume=True, progress=False)
    _assert_same_end(tmp_path / "straight", tmp_path / "broken")
    steps = [record["step"] for record in load_run(tmp_path / "broken").metrics()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("kind", ["vqvae2", "prior"])
def test_a_run_killed_while_writing_a_checkpoint_resumes_to_the_same_end(
    kind: str, pictures: Path, stage1_run: Path, codes: Path, tmp_path: Path
) -> None:
    """SIGKILL in another process just before the checkpoint of step 4 gets its name."""
    name, source = ("stage1", pictures) if kind == "vqvae2" else ("prior", codes)
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from fastvq.train import checkpoint
from tests.train.conftest import {name}_config
from fastvq.train import train_{name}
rename = os.replace
def replace(source, target):
    if str(target).endswith("step-00000004"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
checkpoint.os.replace = replace
config = {name}_config(Path({str(source)!r}), Path({str(tmp_path / "killed")!r}))
train_{name}(config, progress=False)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert checkpoints == {"step-00000002", ".partial-step-00000004"}
    if kind == "prior":
        train_prior(prior_config(source, tmp_path / "killed"), resume=True, progress=False)
        train_prior(prior_config(source, tmp_path / "straight"), progress=False)
        _assert_same_end(tmp_path / "straight", tmp_path / "killed")
    else:
        train_stage1(stage1_config(source, tmp_path / "killed"), resume=True, progress=False)
        _assert_same_end(stage1_run, tmp_path / "killed")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(
    pictures: Path, stage1_run: Path, tmp_path: Path
) -> None:
    config = stage1_config(pictures, tmp_path / "run", steps=4)
    train_stage1(config, progress=False)
    weights = tmp_path / "run/checkpoints/step-00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    config.steps = 6
    with pytest.raises(ValueError, match=r"step-00000004.*truncated.*step-00000002"):
        train_stage1(config, resume=True, progress=False)
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    train_stage1(config, resume=True, progress=False)
    _assert_same_end(stage1_run, tmp_path / "run")


def test_training_leaves_the_callers_generator_alone(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_stage1(stage1_config(pictures, tmp_path / "run", steps=1), progress=False)
    assert torch.equal(torch.rand(1), expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Stage1Task.loss
    taken = []

    def loss(self: Stage1Task, *arguments: Any) -> dict[str, torch.Tensor]:
        taken.append(1)
        values = own(self, *arguments)
        return {**values, "loss": values["loss"] * (float("nan") if len(taken) == 3 else 1.0)}

    monkeypatch.setattr(Stage1Task, "loss", loss)
    with pytest.raises(RuntimeError, match="not finite at step 3"):
        train_stage1(stage1_config(pictures, tmp_path / "run"), progress=False)
    run = load_run(tmp_path / "run")
    assert run.step == 2
    assert all(value.isfinite().all() for value in run.model().state_dict().values())


def test_clipping_bounds_the_gradient_of_each_level(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clip c and plain gradient descent of rate r no level moves further than r·c."""
    from fastvq.train import loop

    def descent(parameters: Any, lr: float) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr)

    monkeypatch.setitem(loop._OPTIMIZERS, "adam", descent)
    monkeypatch.setattr(loop, "WARM_UP_STEPS", 1)
    settings: dict[str, Any] = {"weight_average": 0.0, "learning_rate": 0.5, "gradient_clip": 0.01}
    for steps in (1, 2):
        config = prior_config(codes, tmp_path / f"{steps}", steps=steps, **settings)
        train_prior(config, progress=False)
    one, two = (load_run(tmp_path / name).model() for name in ("1", "2"))
    assert isinstance(one.levels, nn.ModuleList)
    assert isinstance(two.levels, nn.ModuleList)
    for level in range(2):
        pairs = zip(one.levels[level].parameters(), two.levels[level].parameters())
        moved = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
        # Rounding of the parameters themselves: n values of size below 4, unit roundoff 2^-24.
        rounding = 4 * 2**-24 * len(list(one.levels[level].parameters())) ** 0.5 * 64
        assert 0 < moved <= 0.5 * 0.01 + rounding


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_follows_its_schedule(
    schedule: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvq.train import loop

    monkeypatch.setattr(loop, "WARM_UP_STEPS", 2)
    config = stage1_config(
        pictures, tmp_path / "run", steps=6, learning_rate=0.01, schedule=schedule, log_every=1
    )
    train_stage1(config, progress=False)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    # Steps 2 … 5 of the four after the warm-up: half a cosine at 0, 1/4, 1/2 and 3/4.
    falling = [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    after = [1.0] * 4 if schedule == "constant" else falling
    assert rates == pytest.approx([0.01 * share for share in (0.5, 1.0, *after)])


def test_the_weight_average_follows_its_formula() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 0.0)
    average, expected = WeightAverage(layer, 0.5), 0.0
    for step in range(12):
        nn.init.constant_(layer.weight, step + 1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1.0)
    with average.applied():
        # 12 updates of three roundings each, values below 12.
        assert layer.weight.item() == pytest.approx(expected, abs=36 * 12 * 2**-24)
    assert layer.weight.item() == 12.0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _in_two_processes(statements: str) -> list[str]:
    """Runs statements in two processes that form one group; what each printed."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{statements}"
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, answers):
        assert process.returncode == 0, errors
    return [output for output, _ in answers]


def test_two_processes_end_with_equal_weights_and_resume(pictures: Path, tmp_path: Path) -> None:
    """Both train, are broken off at step 4, resume to 6, write codes, and refuse together."""
    statements = f"""
import hashlib
from pathlib import Path
from fastvq.train import extract_codes, stage1, train_stage1
from tests.train.conftest import stage1_config
tasks = []
class Kept(stage1.Stage1Task):
    def __init__(self, config):
        super().__init__(config)
        tasks.append(self)
stage1.Stage1Task = Kept
pictures, folder = Path({str(pictures)!r}), Path({str(tmp_path)!r})
train_stage1(stage1_config(pictures, folder / "straight"), progress=False)
train_stage1(stage1_config(pictures, folder / "broken", steps=4), progress=False)
train_stage1(stage1_config(pictures, folder / "broken"), resume=True, progress=False)
extract_codes(folder / "straight", pictures, folder / "codes", batch_size=7, progress=False)
try:
    train_stage1(stage1_config(pictures, folder / "straight"), progress=False)
except ValueError as error:
    assert "--resume" in str(error)
state = tasks[0].model.state_dict()
digest = hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state)))
print("weights", digest.hexdigest())
"""
    printed = [output.split("weights ")[1] for output in _in_two_processes(statements)]
    assert printed[0] == printed[1]
    _assert_same_end(tmp_path / "straight", tmp_path / "broken")

    from fastvq.train.codes import CodeFolder, extract_codes

    folder = CodeFolder(tmp_path / "codes")
    assert [shard["count"] for shard in folder.manifest["shards"]] == [30, 30]
    alone = CodeFolder(
        extract_codes(tmp_path / "straight", pictures, tmp_path / "alone", progress=False)
    )
    for ours, theirs in zip(folder.codes(range(60)), alone.codes(range(60))):
        assert torch.equal(ours, theirs)
