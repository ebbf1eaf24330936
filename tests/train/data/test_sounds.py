"""WAV files in every coding that is read, and the ones that are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from fastvq.train.data import BrokenItem, PictureDataset, open_source
from fastvq.train.data.sounds import decode_wav, encode_wav, resample


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
        (wav(b"", 1, 1, 16), "it holds no samples"),
        (wav(np.array([0.0, np.nan], "<f4").tobytes(), 3, 1, 32), "values that are not finite"),
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


@pytest.mark.parametrize(
    ("bits", "floating"),
    [(8, False), (16, False), (24, False), (32, False), (32, True), (64, True)],
)
def test_writing_and_reading_again(bits: int, floating: bool) -> None:
    """Rounding to 2^(bits − 1) steps errs by half a step, at +1 by a whole one; then float32's."""
    samples = np.append(np.linspace(-1.0, 1.0, 40), 0.0)
    read = decode_wav(encode_wav(samples, 44100, bits, floating=floating))
    assert read.rate == 44100
    step = 0.0 if floating else 2.0 ** (1 - bits)
    error = np.abs(read.samples[0].astype(np.float64) - samples)
    assert error[:-2].max() <= step / 2 + 2.0**-24
    assert error[-2] <= step + 2.0**-24
    if not floating:
        loud = decode_wav(encode_wav(np.array([-3.0, 3.0]), 8000, bits)).samples[0]
        assert loud.tolist() == [-1.0, np.float32(1.0 - step)]


def test_stereo_is_written_side_by_side_and_read_as_its_mean() -> None:
    both = np.array([[0.5, -0.5, 0.25], [0.0, -1.0, 0.25]])
    assert decode_wav(encode_wav(both, 8000)).samples.tolist() == [[0.25, -0.75, 0.25]]
    with pytest.raises(ValueError, match="bits 8, 16, 24 or 32"):
        encode_wav(both, 8000, 12)


@pytest.mark.parametrize(("rate", "new_rate"), [(8000, 16000), (44100, 8000), (16000, 16000)])
def test_resampling_keeps_a_tone(rate: int, new_rate: int) -> None:
    """300 Hz, far below both half rates: the middle of the tone is the same sine."""
    tone = np.sin(2 * np.pi * 300 * np.arange(rate // 4) / rate, dtype=np.float32)[None]
    new = resample(tone.astype(np.float32), rate, new_rate)
    assert new.dtype == np.float32
    assert new.shape == (1, -(-tone.shape[1] * new_rate // rate))
    expected = np.sin(2 * np.pi * 300 * np.arange(new.shape[1]) / new_rate)
    middle = slice(new.shape[1] // 4, -new.shape[1] // 4)
    # The filter's pass band is flat to about half a percent (its window's ripple).
    assert np.abs(new[0] - expected)[middle].max() < 0.01
