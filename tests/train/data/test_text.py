"""Lines of a text file as symbols."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastvq.train.data import split_validation, training_batches
from fastvq.train.data.text import END, TextDataset, is_text, lines_of, symbols_of


def test_lines_and_their_symbols(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_bytes("first\r\n\n  \nzweite Zeile: ä\nlong line beyond it\nlast".encode())
    data = TextDataset(path, 17)
    assert data.lines() == [b"first", "zweite Zeile: ä".encode(), b"last"]
    assert data.too_long == 1
    assert data.num_bytes == 5 + 16 + 4 + 3
    batch = data.subset([2, 0]).read_batch([0, 1])
    assert lines_of(batch["text"]) == ["last", "first"]
    assert batch["index"].tolist() == [2, 0]
    assert (batch["text"][0, 4:] == END).all()
    training, held_out = split_validation(data, 0.3)
    assert sorted([*training.indices, *held_out.indices]) == [0, 1, 2]
    with training_batches(data, batch_size=2, seed=0) as batches:
        assert next(batches)["text"].shape == (2, 17)


def test_round_trip_of_any_bytes() -> None:
    line = bytes(symbol for symbol in range(256) if symbol != END)
    rows = symbols_of([line, b""], 256)
    assert bytes(rows[0, :255].numpy().astype(np.uint8)) == line
    assert lines_of(symbols_of(["è".encode(), b"\xff"], 4)) == ["è", "�"]


@pytest.mark.parametrize(
    ("content", "length", "message"),
    [
        (b"", 8, "holds no line"),
        (b"12345678\n", 8, "every one of its 1 lines has 8 bytes or more"),
        (b"a\0b\n", 8, "not a text file"),
        (b"a\n", 1, "length must be at least 2"),
    ],
)
def test_refusals(content: bytes, length: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextDataset(path, length)


def test_what_counts_as_text(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(b"plain")
    assert is_text(path)
    assert not is_text(tmp_path)
    assert not is_text(tmp_path / "missing.txt")
    path.with_suffix(".npz").write_bytes(b"plain")
    assert not is_text(path.with_suffix(".npz"))
