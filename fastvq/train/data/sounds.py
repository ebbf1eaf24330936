"""WAV files: parsing RIFF and decoding PCM and float samples to mono float32.

Written out here because the standard library's `wave` reads neither float samples nor, before
Python 3.12, the extensible header.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvq.train.data.files import Files, read_layout
from fastvq.train.data.source import Array, BrokenItem, Source

EXTENSIONS = (".wav",)
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN_SIZE = 0xFFFFFFFF  # written by programs that stream: the samples go on to the end


class Sound(NamedTuple):
    """`samples` (1, T) float32 in −1…1, `rate` in samples per second."""

    samples: NDArray[np.float32]
    rate: int


class SoundFiles(Source):
    """The WAV files of a folder or a zip. All have the sample rate of the first one.

    Attributes:
        rate: samples per second.
    """

    kind = "sounds"
    dtype = np.dtype(np.float32)

    def __init__(self, files: Files, names: list[str], split: str | None) -> None:
        self.path = files.path
        self._files = files
        self._names, self.split, self.labels, self.class_names = read_layout(
            files.path, names, split
        )
        self.rate = self._first_rate()

    def _first_rate(self) -> int:
        broken: list[BrokenItem] = []
        for index in range(len(self)):
            try:
                return self._decode(index).rate
            except BrokenItem as error:
                broken.append(error)
        raise ValueError(
            f"data '{self.path}': none of its {len(self)} WAV files can be read; "
            f"the first is {broken[0].name}: {broken[0].reason}."
        )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def read(self, index: int, *, at_least: int | None = None) -> Array:
        """(1, T) float32. ValueError where the sample rate differs from the first file's."""
        sound = self._decode(index)
        if sound.rate != self.rate:
            raise ValueError(
                f"sound {self.name(index)}: the sample rate must be {self.rate} Hz as in the first "
                f"file; got {sound.rate} Hz. Resample it."
            )
        return sound.samples

    def _decode(self, index: int) -> Sound:
        try:
            return decode_wav(self._files.read(self._names[index]))
        except Exception as error:
            raise BrokenItem(self.name(index), str(error) or type(error).__name__) from None

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.rate} Hz"


def decode_wav(data: bytes) -> Sound:
    """Decodes a WAV file: 8-, 16-, 24- or 32-bit PCM, or 32- or 64-bit float.

        sample = integer / 2^(bits − 1)        mono = mean over the channels

    Raises:
        ValueError: not a WAV file, truncated, or compressed.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("not a WAV file (no RIFF/WAVE header)")
    chunks = _chunks(data)
    if len(chunks.get(b"fmt ", b"")) < 16 or b"data" not in chunks:
        raise ValueError("no complete 'fmt ' and 'data' chunks")
    header = chunks[b"fmt "]
    coding, channels, rate, _, frame_bytes, bits = struct.unpack("<HHIIHH", header[:16])
    if coding == _EXTENSIBLE and len(header) >= 26:
        (coding,) = struct.unpack("<H", header[24:26])  # the sub-format opens with the coding
    if channels == 0 or rate == 0 or frame_bytes != channels * bits // 8:
        raise ValueError(
            f"header contradicts itself: {channels} channels, {rate} Hz, {bits} bits, "
            f"{frame_bytes} bytes per frame"
        )
    body = chunks[b"data"]
    if len(body) % frame_bytes:
        raise ValueError(f"{len(body)} bytes of samples are not whole {frame_bytes}-byte frames")
    samples = _samples(body, coding, bits).reshape(-1, channels).mean(axis=1, dtype=np.float64)
    return Sound(samples.astype(np.float32)[None], rate)


def _chunks(data: bytes) -> dict[bytes, bytes]:
    chunks: dict[bytes, bytes] = {}
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        start = position + 8
        if size == _UNKNOWN_SIZE:
            size = len(data) - start
        if start + size > len(data):
            raise ValueError(
                f"truncated: chunk {name!r} should have {size} bytes, {len(data) - start} are there"
            )
        chunks.setdefault(name, data[start : start + size])
        position = start + size + size % 2  # chunks start at even offsets
    return chunks


def _samples(body: bytes, coding: int, bits: int) -> NDArray[np.float64]:
    if coding == _FLOAT and bits in (32, 64):
        return np.frombuffer(body, f"<f{bits // 8}").astype(np.float64)
    if coding == _PCM and bits == 8:  # the one unsigned width
        return (np.frombuffer(body, np.uint8).astype(np.float64) - 128) / 128
    if coding == _PCM and bits in (16, 32):
        return np.frombuffer(body, f"<i{bits // 8}") / 2.0 ** (bits - 1)
    if coding == _PCM and bits == 24:
        wide = np.zeros((len(body) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    raise ValueError(
        f"coding {coding} with {bits} bits is not read; "
        "save it as 8-, 16-, 24- or 32-bit PCM, or as 32- or 64-bit float"
    )
