"""Checkpoints: whole or absent, checked when read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvq.train.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    remove_partial,
    save_checkpoint,
)


def _checkpoint(step: int) -> Checkpoint:
    shared = torch.arange(6.0)
    model = {"weight": shared, "view": shared[::2], "flag": torch.tensor(True)}
    return Checkpoint(step, model, {"0.exp_avg": torch.full((2,), float(step))}, None, None)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = _checkpoint(3)._replace(average={"a": torch.ones(1)}, scaler={"scale": 65536.0})
    save_checkpoint(tmp_path, saved)
    loaded = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 3
    assert loaded.scaler == saved.scaler
    for before, after in zip(saved[1:4], loaded[1:4]):
        assert before is not None
        assert after is not None
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000):
        save_checkpoint(tmp_path, _checkpoint(step))
    names = [path.name for path in checkpoint_folders(tmp_path)]
    assert names == ["step-00000010", "step-100000000"]


def test_half_written_folders_do_not_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _checkpoint(5))
    partial = tmp_path / ".partial-step-00000010"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 5
    remove_partial(tmp_path)
    assert not partial.exists()


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_refused_by_name_and_the_older_one_is_offered(
    tmp_path: Path, file: str, damage: str
) -> None:
    save_checkpoint(tmp_path, _checkpoint(5))
    target = save_checkpoint(tmp_path, _checkpoint(10)) / file
    data = target.read_bytes()
    if damage == "missing":
        target.unlink()
    elif damage == "truncated":
        target.write_bytes(data[:-3])
    elif file == "state.json":
        target.write_text(json.dumps({**json.loads(data), "step": 11}))
    else:
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"step-00000010': {file}.*step-00000005'"):
        newest_checkpoint(tmp_path)


def test_an_optimizer_goes_on_where_it_was() -> None:
    def optimizer() -> tuple[nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1)

    def step(layer: nn.Linear, adam: torch.optim.Adam) -> None:
        adam.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        adam.step()

    layer, adam = optimizer()
    step(layer, adam)
    other_layer, other = optimizer()
    other_layer.load_state_dict(layer.state_dict())
    load_optimizer(other, {k: v.clone() for k, v in optimizer_tensors(adam).items()})
    step(layer, adam)
    step(other_layer, other)
    assert torch.equal(layer.weight, other_layer.weight)
