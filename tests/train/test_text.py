"""Runs of text: training, codes, prior, samples and bits, through the command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastvq.cli import main
from fastvq.train.run_folder import load_run
from fastvq.train.text import TextConfig, train_text
from fastvq.train.text_bits import evaluate_text
from fastvq.train.text_lines import text_like

SMALL = ("--hidden-channels", "8", "--length", "32", "--set", "num_layers=2", "--seed", "1")
QUICK = ("--steps", "4", "--batch-size", "8", "--validate-every", "4", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "cat", "dog", "saw", "a", "red", "hat", "and", "sat", "on", "it"]
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(" ".join(rng.choices(words, k=5)) + "\n" for _ in range(80)))
    return path


def _fastvq(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(lines: Path) -> dict[str, Path]:
    """A VAE, a VQ-VAE and a prior over its codes, trained for a few steps."""
    paths = {name: lines.parent / name for name in ("vae", "vqvae", "prior")}
    for model in ("vae", "vqvae"):
        train = ("train", "--model", model, "--data", lines, "--run", paths[model])
        codes = () if model == "vae" else ("--num-codes", 16)
        assert _fastvq(*train, *SMALL, *QUICK, *codes) == 0
    prior = ("train-prior", "--data", lines, "--vqvae", paths["vqvae"], "--run", paths["prior"])
    assert _fastvq(*prior, "--hidden-channels", 8, "--num-layers", 2, *QUICK) == 0
    return paths


def test_a_run_writes_its_lines_and_goes_on(runs: dict[str, Path], lines: Path) -> None:
    assert load_run(runs["vae"]).kind == "text-vae"
    assert (runs["vae"] / "pictures" / "samples-step-00000004.txt").is_file()
    assert (runs["prior"] / "pictures" / "samples-step-00000004.txt").is_file()
    shown = (runs["vqvae"] / "pictures" / "reconstructions-step-00000004.txt").read_text()
    assert shown.count("→") == 4  # five percent of 80 lines
    assert _fastvq("train", "--run", runs["vqvae"], "--resume", "--steps", 4) == 0
    assert load_run(runs["vqvae"]).step == 4


def test_samples_and_interpolations(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("vae", "prior"):
        drawn = []
        for number in (0, 1):
            out = tmp_path / f"{name}-{number}.txt"
            assert _fastvq("sample", "--run", runs[name], "--count", 3, "--out", out) == 0
            drawn.append(out.read_bytes())
        assert drawn[0] == drawn[1]
    out = tmp_path / "way.txt"
    ends = ("--interpolate", "the cat sat", "a red hat")
    assert _fastvq("sample", "--run", runs["vae"], *ends, "--count", 4, "--out", out) == 0
    assert out.read_bytes().count(b"\n") == 4
    capsys.readouterr()
    assert _fastvq("sample", "--run", runs["prior"], *ends) == 2
    assert "must be of a VAE of text" in capsys.readouterr().err
    assert _fastvq("sample", "--run", runs["vqvae"]) == 2
    assert "need a prior first" in capsys.readouterr().err


def test_reconstruct_and_evaluate(
    runs: dict[str, Path], lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fastvq("reconstruct", "--run", runs["vqvae"], "--data", lines, "--count", 2) == 0
    printed = capsys.readouterr().out
    assert printed.count("→") == 2
    assert "bits_per_character_given_codes" in printed
    assert _fastvq("evaluate", "--run", runs["vae"], "--data", lines) == 0
    printed = capsys.readouterr().out
    for name in ("bits_per_character", "kl", "active_units", "gzip", "6-gram"):
        assert f"{name}: " in printed


def test_a_runs_own_file_is_measured_on_its_held_out_lines(
    runs: dict[str, Path], lines: Path, tmp_path: Path
) -> None:
    run = load_run(runs["prior"])
    stage1 = load_run(runs["vqvae"])
    held_out, training = (text_like(stage1, lines, split) for split in ("val", None))
    assert len(held_out) == 4
    assert len(training) == 76
    assert load_run(runs["prior"]).resolved["maps"] == 76  # its codes are of the training lines
    other = tmp_path / "held-out.txt"
    other.write_bytes(b"".join(line + b"\n" for line in held_out.lines()))
    own = evaluate_text(run, lines)
    assert own == evaluate_text(run, other)
    parts = own["bits_per_character_of_codes"] + own["bits_per_character_given_codes"]
    assert own["bits_per_character"] == pytest.approx(parts, rel=1e-12)
    assert 0 < own["bits_per_character_given_codes"] < 9  # eight bits and little learnt


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", (), "holds no line"),
        (b"\n \n", (), "holds no line"),
        (b"x" * 40 + b"\n", (), "every one of its 1 lines has 32 bytes or more"),
        (b"a\n" + b"x" * 40, ("--strict",), "line 2 has 40"),
        (b"a\n", (), "at least 2 lines"),
        (b"a\nb\n", ("--flip",), "--flip must be left out for text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    content: bytes,
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "lines.txt"
    data.write_bytes(content)
    train = ("train", "--model", "vae", "--data", data, "--run", tmp_path / "run")
    assert _fastvq(*train, *SMALL, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_two_lines_shorter_than_the_receptive_field_work(tmp_path: Path) -> None:
    data = tmp_path / "two.txt"
    data.write_bytes(b"a\nb\n")
    arguments = {"length": 8, "hidden_channels": 8, "num_layers": 1}
    config = TextConfig(
        model="vqvae", data=str(data), run=str(tmp_path / "run"), steps=1, model_arguments=arguments
    )
    with pytest.warns(UserWarning, match="fewer than one step"):
        train_text(config, progress=False)
    assert load_run(tmp_path / "run").step == 1
