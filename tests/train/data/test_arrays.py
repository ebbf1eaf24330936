"""IDX, .npy and .npz: layouts, labels, parts and refusals."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvq.train.data import open_source

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder as MNIST's: the train part gzipped, the test part not."""
    for name, count in [("train", 5), ("t10k", 3)]:
        images, labels = PICTURES[:count, :, :, 0], np.arange(count)
        for kind, array in [("images-idx3", images), ("labels-idx1", labels)]:
            if name == "train":
                data = gzip.compress(idx(array))
                (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(data)
            else:
                (tmp_path / f"{name}-{kind}-ubyte").write_bytes(idx(array))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "split", "found", "count"),
    [
        ("", None, "train", 5),
        ("", "test", "test", 3),
        ("train-images-idx3-ubyte.gz", None, "train", 5),
        ("t10k-images-idx3-ubyte", "test", "test", 3),
    ],
)
def test_idx(mnist: Path, file: str, split: str | None, found: str, count: int) -> None:
    source = open_source(mnist / file, split=split)
    assert (source.split, len(source), source.num_classes) == (found, count, count)
    assert np.array_equal(source.read(2), PICTURES[2, :, :, :1])
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == list(range(count))
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(2), source.read(2))


def test_idx_is_known_by_its_first_bytes_too(tmp_path: Path) -> None:
    (tmp_path / "digits").write_bytes(idx(PICTURES[:, :, :, 0]))
    source = open_source(tmp_path / "digits")
    assert len(source) == 5
    assert source.labels is None
    assert len(pickle.loads(pickle.dumps(source))) == 5


def test_idx_refusals(mnist: Path) -> None:
    def refused(message: str, path: Path, split: str | None = None) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            open_source(path, split=split)
        assert "\n" not in str(caught.value)

    refused("no val part among t10k-images-idx3-ubyte, train-images", mnist, "val")
    refused("not the test part", mnist / "train-images-idx3-ubyte.gz", "test")
    refused("3 dimensions; got 1", mnist / "t10k-labels-idx1-ubyte")
    test = mnist / "t10k-images-idx3-ubyte"
    whole = test.read_bytes()
    test.write_bytes(whole[:-1])
    refused(r"its header says 3×4×6 in 3 axes, 88 bytes; got 87", test)
    test.write_bytes(whole[:9])
    refused("got 9", test)
    test.write_bytes(b"\0\0\x0d" + whole[3:])
    refused("opens with 00 00 08; got 00 00 0d 03", test)
    test.write_bytes(b"")
    refused("got an empty file", test)
    train = mnist / "train-images-idx3-ubyte.gz"
    train.write_bytes(train.read_bytes()[:-20])
    refused("not readable", train)
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(4)))
    test.write_bytes(whole)
    refused(r"labels must be \(3,\), one for each picture; got \(4,\)", test)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PICTURES, PICTURES),
        (PICTURES.transpose(0, 3, 1, 2), PICTURES),
        (PICTURES[..., 0], PICTURES[..., :1]),
        (PICTURES[:, None, :, :, 0], PICTURES[..., :1]),
    ],
    ids=["NHWC", "NCHW", "NHW", "N1HW"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npy_layouts(tmp_path: Path, array: Any, expected: Any, dtype: Any) -> None:
    if dtype is not np.uint8:
        array, expected = array.astype(dtype) / 255, (expected.astype(dtype) / 255)
    np.save(tmp_path / "x.npy", array)
    source = open_source(tmp_path / "x.npy")
    for copy in (source, pickle.loads(pickle.dumps(source))):
        got = copy.read(3)
        assert got.dtype == source.dtype == (np.uint8 if dtype is np.uint8 else np.float32)
        assert np.array_equal(got, expected[3].astype(got.dtype))
    assert source.labels is None


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("data", "y"), ("arr_0", None)])
def test_npz_keys(tmp_path: Path, keys: tuple[str, str | None]) -> None:
    arrays = {keys[0]: PICTURES}
    if keys[1]:
        arrays[keys[1]] = np.array([0, 2, 1, 1, 0], np.int16)
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    source = open_source(tmp_path / "x.npz")
    assert np.array_equal(source.read(4), PICTURES[4])
    assert source.num_classes == (3 if keys[1] else 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": PICTURES}, "no array named images, x, data, arr_0; it holds pixels"),
        ({"x": PICTURES, "y": np.arange(4)}, r"labels must be \(5,\).*got \(4,\)"),
        ({"x": PICTURES, "y": np.ones(5)}, "labels must be integers from 0; got float64"),
        ({"x": PICTURES, "y": np.arange(5) - 1}, "labels must be integers from 0; got int64 from"),
        ({"x": PICTURES.astype(np.int64)}, "must be uint8, or float in 0…1; got int64"),
        ({"x": PICTURES / 127.5 - 1}, r"must lie in 0…1; got -1…"),
        ({"x": np.full((2, 3, 3), np.nan)}, "must lie in 0…1; got nan…nan"),
        ({"x": PICTURES[0, 0]}, r"must be \(N, H, W\).*got \(6, 3\)"),
        ({"x": PICTURES[..., :2]}, r"C = 1 or 3; got \(5, 4, 6, 2\)"),
        ({"x": PICTURES[:0]}, r"no pictures in it; its shape is \(0, 4, 6, 3\)"),
        ({"x": np.array([{}, []], dtype=object)}, "Python objects, which are never unpickled"),
    ],
)
def test_npz_refusals(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


def test_unreadable_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "x.npy", PICTURES)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-9])
    (tmp_path / "p.npy").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "z.npz").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "g.npy").write_bytes(b"garbage")
    for name, message in [
        ("g.npy", r"not a readable NumPy file\. Save"),
        ("o.npy", "never unpickled"),
        ("p.npy", "never unpickled"),
        ("cut.npy", "not a readable NumPy file"),
        ("z.npz", "not a readable NumPy file"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match="an array has no parts"):
        open_source(tmp_path / "x.npy", split="train")
