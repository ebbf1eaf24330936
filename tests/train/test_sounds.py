"""Sounds through the command line: two kinds of tones, trained on, coded, drawn and judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvq import cli
from fastvq.train.data.sounds import decode_wav, encode_wav
from fastvq.train.run_folder import load_run
from fastvq.train.sound_classifier import SoundClassifier, log_mel, mel_filters
from fastvq.train.spectrograms import spectrogram_pictures

PATTERN = "^([a-z]+)_"
TINY = ("--hidden-channels", "8", "--num-codes", "8", "--code-dim", "4", "--downsample", "16")
FEW = ("--steps", "2", "--batch-size", "4", "--validation-fraction", "0.2", "--workers", "0")


def _tones(count: int, seed: int) -> dict[str, np.ndarray]:
    """low_0 … high_<count − 1>: sines at 8 kHz of 300 to 700 samples, around 400 and 1600 Hz."""
    draw = np.random.default_rng(seed)
    tones = {}
    for name, hertz in (("low", 400.0), ("high", 1600.0)):
        for take in range(count):
            n = np.arange(draw.integers(300, 700))
            pitch = hertz * draw.uniform(0.8, 1.2)
            phase = 2 * np.pi * pitch * n / 8000
            tones[f"{name}_{take}"] = 0.5 * np.sin(phase + draw.uniform(0, 6))
    return tones


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones with one broken file, and a run of each stage over them."""
    folder = tmp_path_factory.mktemp("sounds")
    data = folder / "tones"
    data.mkdir()
    for name, tone in _tones(8, 0).items():
        (data / f"{name}.wav").write_bytes(encode_wav(tone, 8000))
    (data / "low_9.wav").write_bytes(b"noise")
    (data / "high_3.wav").write_bytes(
        encode_wav(np.stack([np.zeros(1200), np.ones(1200)]), 16000, 24)
    )
    train = ["train", "--model", "vqvae2", "--data", str(data), "--run", str(folder / "tones2")]
    train += ["--class-pattern", PATTERN, "--clip-seconds", "0.06", "--peak", "0.9"]
    assert cli.main([*train, *TINY, *FEW, "--set", "spectral_windows=[64,32]"]) == 0
    prior = ["train-prior", "--data", str(data), "--vqvae", str(folder / "tones2")]
    prior += ["--run", str(folder / "prior"), "--steps", "2", "--batch-size", "4"]
    prior += ["--hidden-channels", "8", "--num-layers", "2", "--set", "condition_channels=4"]
    assert cli.main([*prior, "--validation-fraction", "0.2"]) == 0
    return folder


def test_runs_and_codes(work: Path) -> None:
    run = load_run(work / "tones2")
    assert run.resolved["sound_shape"] == [1, 480]
    assert (run.resolved["sample_rate"], run.resolved["peak"]) == (8000, 0.9)
    assert run.resolved["model_arguments"]["dimensions"] == 1
    assert (run.pictures / "reconstructions-step-00000002.png").is_file()
    validation = run.metrics()[-1]
    assert {"validation_snr", "validation_log_spectral_distance"} <= validation.keys()
    manifest = json.loads((work / "tones2/codes-tones/manifest.json").read_text())
    assert [level["shape"] for level in manifest["levels"]] == [[15], [30]]
    assert (manifest["count"], manifest["source"]["broken"]) == (16, 1)
    assert manifest["class_names"] == ["high", "low"]
    assert (work / "prior/pictures/samples-step-00000002.png").is_file()


def test_reconstruct(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "again.png"
    run = ["reconstruct", "--run", str(work / "tones2"), "--data", str(work / "tones")]
    assert cli.main([*run, "--out", str(out), "--count", "2"]) == 0
    printed = capsys.readouterr()
    # 8000 / 32 top and 8000 / 16 bottom codes of 3 bits a second.
    assert "750 bits/s" in printed.out
    assert "2250 bits/s" in printed.out
    assert f"16 sounds: {work / 'again'}" in printed.out
    assert "1 could not be decoded" in printed.out
    assert "low_9.wav: it cannot be decoded" in printed.err
    assert out.is_file()
    for name in ("low_0", "high_3"):
        original = decode_wav((work / f"tones/{name}.wav").read_bytes())
        again = decode_wav((work / f"again/{name}.wav").read_bytes())
        assert again.rate == 8000
        length = -(-original.samples.shape[1] * 8000 // original.rate)
        assert again.samples.shape == (1, length)
    assert cli.main([*run, "--out", str(out), "--strict"]) == 2
    assert "low_9.wav: it cannot be decoded" in capsys.readouterr().err


def test_sample_evaluate_and_classify(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "new.png"
    sample = ["sample", "--run", str(work / "prior"), "--out", str(out)]
    assert cli.main([*sample, "--count", "6"]) == 0
    names = sorted(path.name for path in (work / "new").iterdir())
    assert names == [f"{name}_{n}.wav" for name in ("high", "low") for n in range(3)]
    assert decode_wav((work / "new/low_0.wav").read_bytes()).samples.shape == (1, 480)
    assert cli.main(["evaluate", "--run", str(work / "prior"), "--data", str(work / "tones")]) == 0
    values = dict(line.split(": ") for line in capsys.readouterr().out.splitlines()[-4:])
    bits = [float(values[f"level{level}_bits_per_code"]) for level in (0, 1)]
    assert float(values["bits_per_second"]) == pytest.approx(
        250 * bits[0] + 500 * bits[1], rel=1e-4
    )
    judge = ["classify", "--data", str(work / "tones"), "--class-pattern", PATTERN]
    judge += ["--hold-out", "_[67]", "--read", str(work / "new"), "--epochs", "4"]
    assert cli.main([*judge, "--clip-seconds", "0.06"]) == 0
    printed = capsys.readouterr().out
    assert "trained on 12 real sounds" in printed
    assert "of 4 sounds of" in printed
    assert "of 6 sounds of" in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--model", "vae", "--run", "{}/x"], "must be vqvae or vqvae2 for sounds"),
        (["train", "--model", "vqvae", "--run", "{}/x", "--flip"], "flip must be left out for sou"),
        (["sample", "--run", "{}/prior", "--complete", "a.png"], "complete must be left out for s"),
        (["train-prior", "--run", "{}/x"], "no manifest.json"),
    ],
)
def test_what_sounds_have_not(
    command: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if command[0] == "sample" else ["--data", str(work / "tones")]
    assert cli.main([*(part.format(work) for part in command), *data]) == 2
    assert message in capsys.readouterr().err
    assert not (work / "x").exists()


def test_the_classifier_tells_tones_apart() -> None:
    def clips(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        tones = _tones(count, seed)
        sounds = torch.zeros(len(tones), 1, 800)
        for row, tone in enumerate(tones.values()):
            sounds[row, 0, : len(tone)] = torch.from_numpy(tone)
        return sounds, torch.tensor([int(name.startswith("high")) for name in tones])

    classifier = SoundClassifier(*clips(12, 1), 8000, epochs=8)
    assert classifier.accuracy(*clips(20, 2)) >= 0.95


def test_mel_bands() -> None:
    filters = mel_filters(129, 8000)
    assert filters.shape == (129, 32)
    assert bool((filters.amax(dim=0) >= 0.5).all())
    peaks = filters.argmax(dim=0)
    assert bool((peaks.diff() >= 0).all())
    assert int(peaks[-1]) < 128
    features = log_mel(torch.randn(2, 1, 800), 8000)
    assert features.shape == (2, 1, 32, 10)
    softer = log_mel(0.1 * torch.ones(1, 1, 800), 8000)
    torch.testing.assert_close(log_mel(torch.ones(1, 1, 800), 8000), softer)


def test_spectrogram_pictures_show_the_tone() -> None:
    n = torch.arange(1600)
    tone = torch.sin(2 * torch.pi * 2000 * n / 8000)[None, None]
    picture = spectrogram_pictures(tone, 8000)
    assert picture.shape == (1, 3, 129, 160)
    rows = picture[0].sum(dim=0)[:, 80]
    assert int(rows.argmax()) == 128 - 64  # 2000 Hz is bin 64 of 128, counted from below
