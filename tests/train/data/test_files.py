"""Folders and zips of files: which files count, their order, their classes and parts."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvq.train.data import open_source


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 3), value).save(file, "PNG")
    return file.getvalue()


def write(path: Path, names: list[str]) -> Path:
    """The i-th name gets a picture of grey value i; other files get their name as text."""
    contents = {
        name: png(i) if name.endswith(("g", "G")) else name.encode() for i, name in enumerate(names)
    }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in contents.items():
                file.writestr(name, data)
    else:
        for name, data in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("form", ["data", "data.zip"])
def test_flat_is_in_natural_order(tmp_path: Path, form: str) -> None:
    path = write(
        tmp_path / form, ["10.png", "2.png", "1.PNG", "notes.txt", ".x.png", "__MACOSX/2.png"]
    )
    source = open_source(path)
    assert [source.name(i) for i in range(len(source))] == [
        f"{path}/{name}" for name in ("1.PNG", "2.png", "10.png")
    ]
    assert [int(source.read(i)[0, 0, 0]) for i in range(3)] == [2, 1, 0]
    assert source.read(0).shape == (3, 4, 1)
    assert source.labels is None
    assert source.class_names is None
    assert source.split is None


@pytest.mark.parametrize("form", ["data", "data.zip"])
@pytest.mark.parametrize("prefix", ["", "set/train/"])
def test_first_level_below_shared_folders_is_the_class(
    tmp_path: Path, form: str, prefix: str
) -> None:
    names = ["c10/a.png", "c2/deep/er/z.png", "c2/b.png", "c10/b.png"]
    source = open_source(write(tmp_path / form, [prefix + name for name in names]))
    assert source.class_names == ["c2", "c10"]
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.num_classes == 2
    assert source.split == ("train" if prefix else None)


@pytest.mark.parametrize("form", ["data", "data.zip"])
def test_parts_above_the_classes(tmp_path: Path, form: str) -> None:
    path = write(
        tmp_path / form, ["Train/a/1.png", "Train/b/1.png", "test/a/7.png", "test/b/8.png"]
    )
    assert open_source(path).split == "train"
    test = open_source(path, split="test")
    assert test.class_names == ["a", "b"]
    assert [int(test.read(i)[0, 0, 0]) for i in range(len(test))] == [2, 3]
    with pytest.raises(ValueError, match="no val part; it has Train, test"):
        open_source(path, split="val")


def test_split_of_data_without_parts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data", ["a.png"])
    with pytest.raises(ValueError, match="no test part"):
        open_source(path, split="test")
    with pytest.raises(ValueError, match="split must be one of train, val, test; got 'dev'"):
        open_source(path, split="dev")


def test_files_beside_class_folders_leave_no_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "data", ["a/1.png", "b/1.png", "cover.png"])
    with pytest.warns(UserWarning, match="1 of 3 files lie outside the class folders"):
        source = open_source(path)
    assert source.labels is None
    assert len(source) == 3


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", ["1.png"])
    path = write(tmp_path / "data", ["a/1.png"])
    (path / "b").symlink_to(tmp_path / "elsewhere")
    (path / "c").symlink_to(tmp_path / "elsewhere")
    (path / "a" / "up").symlink_to(path)
    source = open_source(path)
    assert source.class_names == ["a", "b", "c"]
    assert len(source) == 3


def test_a_zip_source_survives_pickling(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "data.zip", ["a.png", "b.png"]))
    source.read(0)
    assert pickle.loads(pickle.dumps(source)).read(1)[0, 0, 0] == 1


def test_each_process_opens_a_zip_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.zip", ["a.png"])
    source = open_source(path)
    source.read(0)
    opened: list[Path] = []
    really_open = zipfile.ZipFile

    def watched(file: Path) -> zipfile.ZipFile:
        opened.append(file)
        return really_open(file)

    monkeypatch.setattr(zipfile, "ZipFile", watched)
    source.read(0)
    assert opened == []
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork
    source.read(0)
    source.read(0)
    assert opened == [path]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "empty. Files that count: .png"),
        (["a.txt", "b.csv"], "none of its 2 files is supported. Files that count: .png"),
        (["a.png", "a.wav"], "1 pictures and 1 WAV files"),
    ],
)
@pytest.mark.parametrize("form", ["data", "data.zip"])
def test_nothing_usable(tmp_path: Path, form: str, names: list[str], message: str) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path / form, names)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere': no such file or folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes.txt': not a supported file"):
        open_source(tmp_path / "notes.txt")
    (tmp_path / "cut.zip").write_bytes(write(tmp_path / "w.zip", ["a.png"]).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut.zip': not a readable zip"):
        open_source(tmp_path / "cut.zip")
