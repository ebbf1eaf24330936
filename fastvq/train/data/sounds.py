"""WAV files: parsing RIFF, decoding PCM and float samples to mono float32, resampling, writing.

Written out here because the standard library's `wave` reads neither float samples nor, before
Python 3.12, the extensible header. Clips of one length are cut in sound_dataset.py.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvq.train.data.files import Files, Layout
from fastvq.train.data.source import Array, BrokenItem, Source

EXTENSIONS = (".wav",)
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN_SIZE = 0xFFFFFFFF  # written by programs that stream: the samples go on to the end


class Sound(NamedTuple):
    """`samples` (1, T) float32 in −1…1, `rate` in samples per second."""

    samples: NDArray[np.float32]
    rate: int


class SoundFiles(Source):
    """The WAV files of a folder or a zip.

    Attributes:
        rate: samples per second of the first readable file; `read` brings the others to it.
    """

    kind = "sounds"
    dtype = np.dtype(np.float32)

    def __init__(self, files: Files, layout: Layout) -> None:
        self.path = files.path
        self._files = files
        self._names, self.split, self.labels, self.class_names = layout
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

    def file_name(self, index: int) -> str:
        """The name of a file inside the folder or zip."""
        return self._names[index]

    def read(self, index: int, *, at_least: int | None = None) -> Array:
        """(1, T) float32 at `rate`."""
        return self.read_at(index, self.rate)

    def read_at(self, index: int, rate: int) -> NDArray[np.float32]:
        """(1, T) float32 at another rate; see `resample`."""
        sound = self._decode(index)
        return resample(sound.samples, sound.rate, rate)

    def _decode(self, index: int) -> Sound:
        try:
            return decode_wav(self._files.read(self._names[index]))
        except Exception as error:  # of any type, on damaged input
            raise BrokenItem(self.name(index), str(error) or type(error).__name__) from None

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.rate} Hz"


def decode_wav(data: bytes) -> Sound:
    """Decodes a WAV file: 8-, 16-, 24- or 32-bit PCM, or 32- or 64-bit float.

        sample = integer / 2^(bits − 1)        mono = mean over the channels

    Raises:
        ValueError: not a WAV file, truncated, compressed, empty, or not of finite numbers.
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
    if not len(samples):
        raise ValueError("it holds no samples")
    if not np.isfinite(samples).all():
        raise ValueError("it holds values that are not finite")
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


def resample(samples: NDArray[np.float32], rate: int, new_rate: int) -> NDArray[np.float32]:
    """(C, T) at `rate` → (C, ⌈T · new_rate / rate⌉) at `new_rate`.

    A polyphase low-pass filter, that of `scipy.signal.resample_poly` as it comes; the same samples
    where the rates are the same.

    Raises:
        ImportError: scipy is not installed and the rates differ.
    """
    if rate == new_rate:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(
            f"Resampling sounds ({rate} Hz to {new_rate} Hz) needs scipy: "
            "pip install 'fastvq[sound]'."
        ) from error
    common = math.gcd(rate, new_rate)
    resampled: NDArray[np.float32] = resample_poly(
        samples, new_rate // common, rate // common, axis=-1
    ).astype(np.float32)
    return resampled


def encode_wav(samples: Array, rate: int, bits: int = 16, *, floating: bool = False) -> bytes:
    """A WAV file of samples; what `decode_wav` reads, but with all channels kept.

        integer = round(clamp(sample, −1, 1) · 2^(bits − 1)), at most 2^(bits − 1) − 1

    Args:
        samples: (C, T) or (T,) float, −1…1.
        rate: samples per second.
        bits: 8, 16, 24 or 32; 32 or 64 where `floating`.
        floating: write IEEE floats, unclamped.
    Raises:
        ValueError: an argument breaks its rule.
    """
    channels = np.atleast_2d(np.asarray(samples, np.float64))
    if channels.ndim != 2 or bits not in ((32, 64) if floating else (8, 16, 24, 32)) or rate < 1:
        raise ValueError(
            "encode_wav: samples must be (C, T), bits 8, 16, 24 or 32 (floating: 32 or 64), rate "
            f"at least 1; got {channels.shape}, {bits}, {rate}."
        )
    frame = channels.shape[0] * bits // 8
    coding = _FLOAT if floating else _PCM
    header = struct.pack("<HHIIHH", coding, channels.shape[0], rate, rate * frame, frame, bits)
    body = _body(channels.T.ravel(), bits, floating)
    chunks = b"WAVE"
    for name, content in ((b"fmt ", header), (b"data", body)):
        chunks += name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def _body(samples: NDArray[np.float64], bits: int, floating: bool) -> bytes:
    """Samples as they lie in a data chunk: the inverse of `_samples`."""
    if floating:
        return samples.astype(f"<f{bits // 8}").tobytes()
    full = 2.0 ** (bits - 1)
    integers = np.rint(samples.clip(-1.0, 1.0) * full).clip(-full, full - 1.0).astype(np.int64)
    if bits == 8:
        return (integers + 128).astype(np.uint8).tobytes()
    # Little-endian: the low bytes of each 64-bit integer are the sample.
    wide = integers.astype("<i8").view(np.uint8).reshape(-1, 8)
    return wide[:, : bits // 8].tobytes()
