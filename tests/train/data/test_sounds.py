"""WAV files in every coding that is read, and the ones that are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from fastvq.train.data import BrokenItem, PictureDataset, open_source
from fastvq.train.data.sounds import decode_wav


def wav(
    body: bytes, coding: int, channels: int, bits: int, rate: int = 8000, size: int | None = None
) -> bytes:
    frame = channels * bits // 8
    header = struct.pack("<HHIIHH", coding, channels, rate, rate * frame, frame, bits)
    if coding == 0xFFFE:
        header += struct.pack("<HHIH14x", 22, bits, 0, 1)
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # an unknown chunk of odd size
    chunks = b"fmt " + struct.pack("<I", len(header)) + header + odd
    chunks += b"data" + struct.pack("<I", len(body) if size is None else size) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


HALVES = np.array([0.0, 0.5, -0.5, -1.0])


@pytest.mark.parametrize(
    ("coding", "bits", "body"),
    [
        (1, 8, bytes([128, 192, 64, 0])),
        (1, 16, (HALVES * 2**15).astype("<i2").tobytes()),
        (0xFFFE, 16, (HALVES * 2**15).astype("<i2").tobytes()),
        (1, 24, b"".join(int(v * 2**23).to_bytes(3, "little", signed=True) for v in HALVES)),
        (1, 32, (HALVES * 2**31).astype("<i4").tobytes()),
        (3, 32, HALVES.astype("<f4").tobytes()),
        (3, 64, HALVES.astype("<f8").tobytes()),
    ],
)
def test_codings(coding: int, bits: int, body: bytes) -> None:
    mono = decode_wav(wav(body, coding, 1, bits, rate=16000))
    assert mono.rate == 16000
    assert mono.samples.dtype == np.float32
    assert mono.samples.tolist() == [HALVES.tolist()]
    stereo = decode_wav(wav(body, coding, 2, bits))
    assert stereo.samples.tolist() == [[0.25, -0.75]]


def test_size_left_open_by_a_stream() -> None:
    data = wav((HALVES * 2**15).astype("<i2").tobytes(), 1, 1, 16, size=0xFFFFFFFF)
    assert decode_wav(data).samples.shape == (1, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"OggS" + bytes(40), "not a WAV file"),
        (wav(bytes(4), 1, 1, 16)[:-2], "truncated: chunk b'data' should have 4 bytes, 2 are there"),
        (wav(bytes(3), 1, 1, 16), "3 bytes of samples are not whole 2-byte frames"),
        (wav(bytes(4), 17, 1, 16), "coding 17 with 16 bits is not read"),
        (wav(bytes(4), 1, 1, 16, rate=0), "contradicts itself"),
        (b"RIFF\0\0\0\0WAVE", "no complete 'fmt ' and 'data' chunks"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_wav(data)


def test_a_folder_of_sounds(tmp_path: Path) -> None:
    for name, rate in [("no/1.wav", 8000), ("yes/1.wav", 8000), ("yes/2.wav", 4000)]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(wav(bytes(8), 1, 1, 16, rate=rate))
    (tmp_path / "yes/3.wav").write_bytes(b"noise")
    source = open_source(tmp_path)
    assert (source.kind, source.class_names) == ("sounds", ["no", "yes"])
    assert str(source) == f"4 sounds in '{tmp_path}', 2 classes, 8000 Hz"
    assert source.read(1).shape == (1, 4)
    assert source.read(2).shape == (1, 8)
    with pytest.raises(BrokenItem, match="not a WAV file"):
        source.read(3)
    with pytest.raises(ValueError, match="pictures are needed here; it holds sounds"):
        PictureDataset(source)


def test_no_readable_sound(tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"none of its 1 WAV files can be read.*not a WAV file"):
        open_source(tmp_path)
