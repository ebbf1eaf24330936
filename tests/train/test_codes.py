"""Codes of a data set: what is written is what the model gives, and damage is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvq.models import VQVAE2
from fastvq.train.codes import CodeFolder, extract_codes
from fastvq.train.data import PictureDataset, open_source, to_float, training_batches
from fastvq.train.run_folder import load_run


def test_codes_are_those_of_the_model(pictures: Path, stage1_run: Path, codes: Path) -> None:
    folder = CodeFolder(codes)
    model = load_run(stage1_run).model()
    assert isinstance(model, VQVAE2)
    source = open_source(pictures)
    x = to_float(PictureDataset(source).read_batch(range(60))["picture"])
    # The same batches of 7: what a batch holds may change the convolutions' rounding.
    expected = [torch.cat(maps) for maps in zip(*(model.encode(part) for part in x.split(7)))]
    positions = np.random.default_rng(0).permutation(60)
    for ours, theirs in zip(folder.codes(positions), expected):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, theirs[positions])
    assert folder.labels is not None
    assert source.labels is not None
    assert folder.labels.tolist() == source.labels.tolist()
    assert (len(folder), folder.num_codes, folder.shapes) == (60, [16, 16], [[2, 2], [4, 4]])
    assert folder.class_names == ["0", "1", "2"]
    assert folder.stage1["path"] == str(stage1_run.absolute())
    assert folder.manifest["levels"][0]["dtype"] == "uint8"


def test_subsets_and_batches_go_by_position(codes: Path) -> None:
    folder = CodeFolder(codes)
    part = folder.subset([50, 3, 7])
    assert torch.equal(part.codes([2, 0])[1], folder.codes([7, 50])[1])
    assert part.codes([])[0].shape == (0, 2, 2)
    with training_batches(folder, batch_size=5, seed=1) as batches:  # type: ignore[arg-type]
        batch: Any = next(batches)
    assert torch.equal(batch["codes"][0], folder.codes(batch["index"].numpy())[0])
    assert batch["label"].tolist() == (batch["index"] % 3).tolist()


def test_an_existing_folder_is_refused_unless_told(
    pictures: Path, stage1_run: Path, codes: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(codes, tmp_path / "codes")
    with pytest.raises(ValueError, match=r"it exists\. Replace it by --overwrite"):
        extract_codes(stage1_run, pictures, out, progress=False)
    extract_codes(stage1_run, pictures, out, overwrite=True, progress=False)
    assert len(CodeFolder(out)) == 60
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something other than codes"):
        extract_codes(stage1_run, pictures, mine, overwrite=True, progress=False)
    assert (mine / "thesis.txt").exists()


def test_broken_pictures_are_left_out_and_counted(stage1_run: Path, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(5):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match=r"3\.png: it cannot be decoded"):
        out = extract_codes(
            *(stage1_run, tmp_path, tmp_path / "codes"), batch_size=2, workers=0, progress=False
        )
    folder = CodeFolder(out)
    assert (len(folder), folder.manifest["source"]["broken"]) == (4, 1)
    assert folder.labels is None
    assert folder.codes(range(4))[1].shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", r"shard-00000-level1\.npy must have 1088 bytes; got 1087"),
        ("remove", r"shard-00000-level1\.npy is missing"),
        ("reshape", r"shard-00000-level1\.npy must be uint8 \(60, 4, 4\); got uint8 \(60, 16\)"),
        ("pickle", r"shard-00000-level1\.npy is not a readable NumPy file"),
        ("count", "a count that is not the sum"),
        ("json", r"manifest\.json is not readable JSON"),
        ("format", r"manifest\.json must say format"),
        ("manifest", r"it holds no manifest\.json"),
    ],
)
def test_damage_is_refused(damage: str, message: str, codes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(codes, tmp_path / "codes")
    shard, manifest = copy / "shard-00000-level1.npy", copy / "manifest.json"
    described = json.loads(manifest.read_text())
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "reshape":
        np.save(shard, np.load(shard).reshape(60, 16))
    elif damage == "pickle":
        np.save(shard, np.array([{"a": 1}] * 3), allow_pickle=True)
        described["shards"][0]["files"][shard.name] = shard.stat().st_size
        manifest.write_text(json.dumps(described))
    elif damage == "count":
        manifest.write_text(json.dumps({**described, "count": 61}))
    elif damage == "json":
        manifest.write_text(manifest.read_text()[:-5])
    elif damage == "format":
        manifest.write_text("{}")
    else:
        manifest.unlink()
    with pytest.raises(ValueError, match=message):
        CodeFolder(copy)


def test_codes_outside_the_codebook_are_refused_when_read(codes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(codes, tmp_path / "codes")
    array = np.load(copy / "shard-00000-level0.npy", mmap_mode="r+")
    array[5, 0, 0] = 200
    array.flush()
    folder = CodeFolder(copy)
    folder.codes([4])
    with pytest.raises(ValueError, match="level 0 must be below 16; got 200"):
        folder.codes([5])


def test_runs_without_codes_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        extract_codes(tmp_path / "missing", pictures, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
