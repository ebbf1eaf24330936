"""Pretrained: what is recorded, round trips, and one clear line for every broken folder."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastvq.models.pretrained import Pretrained
from fastvq.models.vae import VAE
from fastvq.models.vqvae import VQVAE, VQVAE2


class Base(Pretrained, nn.Module):
    def __init__(self, width: int, *, kernel: tuple[int, int] = (3, 3), name: str = "a") -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, tuple(kernel))
        self.tied = self.conv.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("ready", torch.tensor(True))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("coarse", torch.arange(3).bfloat16())


class Derived(Base):
    def __init__(self, size: int = 2, **options: Any) -> None:
        super().__init__(2 * size, kernel=(1, 3), **options)


class Inherited(Base):
    pass


def _same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_config_holds_the_outermost_calls_arguments() -> None:
    assert Base(3).config == {"width": 3, "kernel": [3, 3], "name": "a"}
    assert Derived().config == {"size": 2}
    assert Derived(5, name="b").config == {"size": 5, "name": "b"}
    assert Inherited(4).config == {"width": 4, "kernel": [3, 3], "name": "a"}
    json.dumps(VQVAE().config)


def test_arguments_must_be_json() -> None:
    with pytest.raises(TypeError, match=r"Base: name must be a number.* got device"):
        Base(3, name=torch.device("cpu"))
    with pytest.raises(TypeError, match="Loose: constructor argument 'sizes' must have a name"):

        class Loose(Pretrained, nn.Module):
            def __init__(self, *sizes: int) -> None:
                super().__init__()


@pytest.mark.parametrize(
    "model",
    [
        Base(3, name="x"),
        Derived(3),
        Inherited(2),
        VAE(1, (9, 12), 4, 3),
        VQVAE(1, 8, 4, 1, num_codes=8, code_dim=3),
        VQVAE2(1, 3, 8, 4, 1, num_codes=8, code_dim=3, codebook="gradient"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_round_trip(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "deep" / "er")
    model.save_pretrained(tmp_path / "deep" / "er")  # over an older one
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loaded = type(model).from_pretrained(tmp_path / "deep" / "er")
    assert torch.equal(torch.get_rng_state(), state)
    assert _same(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training


def test_shared_tensors_stay_shared(tmp_path: Path) -> None:
    model = Base(3)
    model.save_pretrained(tmp_path)
    loaded = Base.from_pretrained(tmp_path)
    assert loaded.tied is loaded.conv.weight


def test_a_failed_save_leaves_the_older_files(tmp_path: Path, monkeypatch) -> None:
    first = Base(3)
    first.save_pretrained(tmp_path)

    def torn(state: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        Base(3).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert _same(first, Base.from_pretrained(tmp_path))


def test_files_without_our_checksum_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Base(3)
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert _same(model, Base.from_pretrained(tmp_path))


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(folder: Path, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold an object"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
        (lambda f: _edit_config(f, **{"class": "VAE"}), "describes a VAE, not a Base"),
        (lambda f: _edit_config(f, arguments={"width": 3, "depth": 1}), "does not take: depth"),
        (lambda f: _edit_config(f, arguments={}), "config.json: .*width"),
        (lambda f: _edit_config(f, arguments={"width": 4}), r"shape \(3, 1, 3, 3\), expected \(4"),
        (_truncate, "is not a whole safetensors file"),
        (_flip, "does not match the checksum"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
        (lambda f: _edit_weights(f, lambda s: s.pop("steps")), "missing steps"),
        (lambda f: _edit_weights(f, lambda s: s.update(x=torch.ones(1))), "unexpected x"),
        (lambda f: _edit_weights(f, lambda s: s.update(steps=torch.tensor(1.0))), "steps is torch"),
    ],
)
def test_refuses_a_damaged_folder(damage: Any, message: str, tmp_path: Path) -> None:
    Base(3).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Base.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for source in (tmp_path / "none", tmp_path / "file", "no_folder", ""):
        with pytest.raises(FileNotFoundError, match=r"must be a folder|does not exist"):
            Base.from_pretrained(source)


def test_hub_id_without_huggingface_hub(monkeypatch) -> None:
    real = builtins.__import__

    def without_hub(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        Base.from_pretrained("owner/model-that-is-no-folder")


def test_hub_id_is_fetched(tmp_path: Path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = Base(3)
    model.save_pretrained(tmp_path)
    asked = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options["revision"]))
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert _same(model, Base.from_pretrained("owner/model", revision="v1"))
    assert asked == [
        ("owner/model", "config.json", "v1"),
        ("owner/model", "model.safetensors", "v1"),
    ]
    monkeypatch.setattr(hub, "hf_hub_download", _offline)
    with pytest.raises(RuntimeError, match="reading it as a hub id failed: no network"):
        Base.from_pretrained("owner/model")


def _offline(*args: Any, **kwargs: Any) -> str:
    raise OSError("no network\nsecond line")
