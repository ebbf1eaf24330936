"""The classifier that judges the demo's samples: a support vector machine on 8 × 8 pixels.

It is scikit-learn's `SVC` as it comes (RBF kernel, C = 1, gamma = "scale"): nothing of it was
chosen by looking at test pictures. What it is trained on is up to the caller.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIDE = 8


class DigitClassifier:
    """Reads digits.

    Args:
        pictures: (N, H, W) uint8; H and W multiples of 8.
        labels: (N,) int64, the class of each.
    """

    def __init__(self, pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        from sklearn.svm import SVC

        self._machine: Any = SVC().fit(_features(pictures), labels)

    def read(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The class of each picture, (N,)."""
        answer: NDArray[np.int64] = self._machine.predict(_features(pictures))
        return answer

    def accuracy(self, pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
        """Share of the pictures that are read as their label, in 0…1."""
        return float(np.mean(self.read(pictures) == labels))


def _features(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(N, 64): means over the cells of an 8 × 8 grid, in 0…1."""
    count, height, width = pictures.shape
    cells = pictures.reshape(count, _SIDE, height // _SIDE, _SIDE, width // _SIDE)
    means: NDArray[np.float64] = cells.mean(axis=(2, 4)) / 255.0
    return means.reshape(count, _SIDE * _SIDE)
