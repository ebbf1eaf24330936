"""A folder of small pictures that the tests of datasets and loading share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a/00.png ... b/10.png: eleven 4×5 RGB pictures; the i-th is (i, column, row) everywhere."""
    path = tmp_path / "pictures"
    rows, columns = np.indices((4, 5))
    for i in range(11):
        file = path / ("a" if i < 6 else "b") / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.stack([np.full_like(rows, i), columns, rows], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return path
