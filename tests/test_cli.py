"""The command line: whole ways through it on tiny pictures, its help, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq import cli
from fastvq.cli import machine
from fastvq.train.codes import CodeFolder
from fastvq.train.priors import PriorConfig
from fastvq.train.run_folder import load_run
from fastvq.train.stage1 import Stage1Config

COMMANDS = (
    *("demo", "train", "encode", "train-prior", "train-classifier", "sample", "reconstruct"),
    *("detect", "evaluate", "classify", "info", "bench"),
)
TINY = ("--hidden-channels", "8", "--num-codes", "8", "--code-dim", "4", "--downsample", "2")
FEW = ("--steps", "2", "--batch-size", "4", "--validation-fraction", "0.2")
TINY_PRIOR = ("--hidden-channels", "8", "--num-layers", "2", "--set", "condition_channels=4")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 pictures in 3 classes, a VQ-VAE-2 run, a prior run and a VAE run."""
    folder = tmp_path_factory.mktemp("cli")
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    data = folder / "shapes.npz"
    np.savez(data, images=images, labels=np.arange(24) % 3)
    vq, prior, vae = (str(folder / name) for name in ("vq", "prior", "vae"))
    train = ["train", "--data", str(data), *FEW]
    assert cli.main([*train, "--model", "vqvae2", "--run", vq, *TINY]) == 0
    pictures = ["--data", str(data), "--vqvae", vq]
    assert cli.main(["train-prior", *pictures, "--run", prior, *FEW, *TINY_PRIOR]) == 0
    assert cli.main([*train, "--model", "vae", "--run", vae, "--latent-dim", "3"]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command ends with."""
    capsys.readouterr()
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else -1
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.err.startswith(f"fastvq {arguments[0]}: ")
    return captured.err


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_help_needs_neither_torch_nor_the_extras() -> None:
    # A hidden module makes its import fail.
    hide = "import sys; sys.modules.update(dict.fromkeys(['torch', 'accelerate', 'PIL', 'tqdm']))"
    for command in ([], *([name] for name in COMMANDS)):
        code = f"{hide}; from fastvq.cli import main; main({[*command, '--help']!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: fastvq")
        assert not command or "example:" in done.stdout


def test_offered_commands_are_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    offered = re.findall(r"^ {4}([a-z-]+)(?: |$)", text, re.MULTILINE)
    assert offered == list(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from fastvq.version import __version__

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastvq {__version__}\n"


@pytest.mark.parametrize(
    ("command", "config"), [("train", Stage1Config), ("train-prior", PriorConfig)]
)
def test_defaults_in_the_help_are_true(
    command: str, config: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    for name in (
        *("steps", "batch_size", "checkpoint_every", "validate_every", "log_every", "seed"),
        *("learning_rate", "gradient_clip", "validation_fraction"),
        *(["weight_average"] if command == "train-prior" else []),
    ):
        flag = "--" + name.replace("_", "-")
        stated = re.search(rf"{flag} [A-Z_]+ [^()]*\(default ([0-9.e-]+)\)", text)
        assert stated, flag
        assert float(stated[1]) == fields[name], flag


def test_training_uses_the_options(work: Path) -> None:
    run = load_run(work / "vq")
    assert run.kind == "vqvae2"
    assert run.step == 2
    arguments = run.resolved["model_arguments"]
    assert (arguments["num_codes"], arguments["code_dim"], arguments["downsample"]) == (8, 4, 2)
    prior = load_run(work / "prior")
    assert prior.kind == "prior"
    assert prior.resolved["model_arguments"]["condition_channels"] == 4
    assert prior.resolved["model_arguments"]["num_classes"] == 3


def test_codes_for_a_prior_go_where_encode_puts_them(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = work / "vq" / "codes-shapes"
    assert len(CodeFolder(folder)) == 24
    encode = ["encode", "--run", str(work / "vq"), "--data", str(work / "shapes.npz")]
    assert "it exists" in refused(capsys, *encode)
    assert cli.main([*encode, "--overwrite"]) == 0
    assert len(CodeFolder(folder)) == 24


def test_resume_takes_the_settings_from_the_run(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(work / "longer")
    data = ["--data", str(work / "shapes.npz")]
    start = ["train", "--run", run, *data, "--model", "vqvae", *TINY, *FEW]
    assert cli.main(start) == 0
    assert "--resume" in refused(capsys, *start)
    assert cli.main(["train", "--run", run, "--resume", "--steps", "3"]) == 0
    assert load_run(run).step == 3
    assert load_run(run).config["batch_size"] == 4
    assert cli.main([*start, "--resume", "--steps", "3"]) == 0  # the same settings, said again
    line = refused(capsys, "train", "--run", run, "--resume", "--batch-size", "5")
    assert "batch_size 4" in line
    line = refused(capsys, "train-prior", "--run", run, "--resume")
    assert "fastvq train" in line
    assert cli.main(["train-prior", "--run", str(work / "prior"), "--resume", "--steps", "3"]) == 0
    assert load_run(work / "prior").step == 3


def test_samples_of_every_class(work: Path, tmp_path: Path) -> None:
    out, array = tmp_path / "a.png", tmp_path / "a.npz"
    sample = ["sample", "--run", str(work / "prior"), "--out", str(out)]
    assert cli.main([*sample, "--count", "6", "--save-array", str(array)]) == 0
    with np.load(array) as saved:
        assert saved["images"].shape == (6, 16, 16, 1)
        assert saved["images"].dtype == np.uint8
        assert saved["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        images = saved["images"]
    width, height = size(out)
    assert height > width  # three rows of two
    batched = tmp_path / "b.npy"
    options = ["--count", "6", "--batch-size", "4", "--save-array", str(batched)]
    assert cli.main([*sample, *options]) == 0
    # The same codes; the decoder's rounding may depend on the batch: one grey level at most.
    assert np.abs(np.load(batched).astype(int) - images.astype(int)).max() <= 1
    assert cli.main([*sample, *options[:-1], str(batched), "--seed", "1"]) == 0
    assert np.abs(np.load(batched).astype(int) - images.astype(int)).max() > 1


def test_samples_of_chosen_classes_and_their_default_place(work: Path, tmp_path: Path) -> None:
    array = tmp_path / "a.npz"
    options = ["--class-labels", "2,0", "--count", "5", "--seed", "7", "--save-array", str(array)]
    assert cli.main(["sample", "--run", str(work / "prior"), *options]) == 0
    with np.load(array) as saved:
        assert saved["labels"].tolist() == [2, 2, 2, 0, 0]
    assert (work / "prior" / "pictures" / "samples-7.png").is_file()


def test_completes_a_picture(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(work / "shapes.npz") as data:
        picture = data["images"][0]
    Image.fromarray(picture.squeeze()).save(tmp_path / "shape.png")
    run, out, array = str(work / "prior"), tmp_path / "a.png", tmp_path / "a.npy"
    command = ["sample", "--run", run, "--class-labels", "1", "--count", "3", "--out", str(out)]
    complete = ["--complete", str(tmp_path / "shape.png"), "--keep", "left-half"]
    assert cli.main([*command, *complete, "--save-array", str(array)]) == 0
    assert size(out)[0] > 2 * 64  # what is known, and three completions
    drawn = np.load(array).astype(int)
    assert drawn.shape == (3, 16, 16, 1)
    assert (drawn[:, :, 8:] != drawn[:1, :, 8:]).any()
    # The left quarter is far from every code that differs, and decoded from the same codes.
    assert np.abs(drawn[:, :, :2] - drawn[:1, :, :2]).max() <= 1

    line = refused(capsys, *command, "--complete", str(tmp_path / "none.png"))
    assert "must be a file" in line
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "cannot be read" in refused(capsys, *command, "--complete", str(tmp_path / "broken.png"))
    vae = ["sample", "--run", str(work / "vae"), "--out", str(out)]
    assert "complete must be left out" in refused(capsys, *vae, *complete)


def test_samples_of_a_vae_do_not_depend_on_the_batch(work: Path, tmp_path: Path) -> None:
    for name, batch in (("a.npy", "5"), ("b.npy", "2")):
        options = ["--count", "5", "--batch-size", batch, "--save-array", str(tmp_path / name)]
        options += ["--out", str(tmp_path / "a.png")]
        assert cli.main(["sample", "--run", str(work / "vae"), *options]) == 0
    first, second = (np.load(tmp_path / name).astype(int) for name in ("a.npy", "b.npy"))
    assert first.shape == (5, 16, 16, 1)
    assert np.abs(first - second).max() <= 1


def test_reconstruct_measures_every_level(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "a.png", work / "shapes.npz"
    capsys.readouterr()
    command = ["reconstruct", "--run", str(work / "vq"), "--data", str(data), "--count", "3"]
    assert cli.main([*command, "--measure", "24", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    model = load_run(work / "vq").model()
    with np.load(data) as arrays:
        pictures = torch.from_numpy(arrays["images"]).float()[:, None] / 255
    codes = model.encode(pictures)
    for used, name in ((1, "top only"), (2, "all")):
        decoded = model.decode_codes(codes, levels=used).clamp(0, 1)
        mse = float((decoded - pictures).square().double().mean())
        printed = re.search(rf"^{name} +MSE ([0-9.]+) +PSNR ([0-9.]+) dB", text, re.MULTILINE)
        assert printed
        assert abs(float(printed[1]) - mse) <= 1e-6  # printed to six places
        assert abs(float(printed[2]) + 10 * np.log10(mse)) <= 0.01
    assert size(out)[1] >= 3 * 64


def test_detect(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "found", str(work / "shapes.npz")
    command = ["detect", "--run", str(work / "prior"), "--data", data, "--held-in", data]
    command += ["--out", str(out), "--normal", "0, 1", "--heat-maps", "1"]
    command += ["--score", "likelihood", "--false-alarm-rate", "0.25"]
    capsys.readouterr()
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert re.search(r"^likelihood +AUROC 0\.\d{4}$", text, re.MULTILINE)
    # Judged by themselves, 24 pictures: 25 · 0.75 rounded up is 19, and 5 lie above the 19th.
    assert re.search(r"^flagged: 5 of 24 \(score above ", text, re.MULTILINE)
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert sum(row["flagged"] for row in rows) == 5
    assert size(out / next(row["heat_map"] for row in rows if row["heat_map"]))[0] > 3 * 64
    assert "it exists" in refused(capsys, *command)
    assert cli.main([*command, "--overwrite", "--levels", "1"]) == 0


def test_evaluate(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, name in (("vae", "negative_elbo"), ("prior", "total_bits_per_dim")):
        capsys.readouterr()
        command = ["evaluate", "--run", str(work / run), "--data", str(work / "shapes.npz")]
        assert cli.main(command) == 0
        assert re.search(rf"^{name}: [0-9.]+$", capsys.readouterr().out, re.MULTILINE)


def test_wrong_input_ends_in_one_line(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vq, prior, vae = (str(work / name) for name in ("vq", "prior", "vae"))
    data, new = str(work / "shapes.npz"), str(tmp_path / "new")
    train = ("train", "--data", data, "--run", new, "--model")
    detect = ("detect", "--data", data, "--held-in", data, "--out", new, "--run")
    cases = {
        ("train", "--run", new): "--model and --data must be given",
        ("train", "--run", new, "--model", "gan"): "invalid choice: 'gan'",
        ("train", "--run", new, "--model", "vae", "--data", "no/where"): "no such file",
        (*train, "vqvae", "--steps", "0"): "steps must be 1 or more; got 0",
        (*train, "vqvae", "--levels", "2"): "'levels'",
        (*train, "vqvae", "--set", "nonsense"): "--set must be NAME=VALUE; got 'nonsense'",
        (*train, "vqvae2", "--downsample", "3"): "downsample must be 2, 4, 8, …; got 3",
        (*train, "vqvae2", "--preset", "huge"): "preset must be one of",
        (
            "encode",
            "--run",
            vae,
            "--data",
            data,
        ): "must be of kind vqvae, vqvae2 or text-vqvae; got 'vae'",
        ("encode", "--run", new, "--data", data): "no such folder",
        ("train-prior", "--run", new): "--data must be given",
        ("train-prior", "--run", new, "--data", data): data,
        ("train-prior", "--run", new, "--data", data, "--split", "test"): "--vqvae",
        ("sample", "--run", vq): "fastvq train-prior",
        ("sample", "--run", prior, "--class-labels", "7"): "class labels must be in 0 … 2",
        ("sample", "--run", prior, "--count", "0"): "count must be at least 1; got 0",
        ("sample", "--run", prior, "--top-k", "99"): "top_k must be an int in 1 … num_codes=8",
        ("sample", "--run", prior, "--device", "quantum"): "device 'quantum' cannot be used",
        ("sample", "--run", vae, "--top-p", "0.5"): "top_p must be left out for a VAE",
        ("reconstruct", "--run", prior, "--data", data): "it is of a prior",
        ("detect", "--run", prior, "--data", data, "--out", new): "--held-in",
        (*detect, vq, "--score", "likelihood"): "'likelihood' needs the run of a prior",
        (*detect, prior): "needs at least 40 held-in items; '" + data + "' has 24. Give more, or "
        "take one score alone, as --score likelihood.",
        (*detect, prior, "--false-alarm-rate", "2"): "false_alarm_rate must lie between 0 and 1",
        ("evaluate", "--run", vq, "--data", data): "has no likelihood",
        ("sample", "--run", prior, "--save-array", f"{new}.txt"): "must end in .npy or .npz",
    }
    for arguments, message in cases.items():
        assert message in refused(capsys, *arguments), arguments
    assert not (tmp_path / "new").exists()


def test_what_is_no_data_ends_in_one_line(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    garbage, picture, folder = tmp_path / "a.npy", tmp_path / "b.png", tmp_path / "c"
    garbage.write_bytes(b"garbage")
    picture.write_bytes(b"\x89PNG without an end")
    folder.mkdir()
    (folder / "d.png").write_bytes(b"junk")
    new = str(tmp_path / "new")
    train = ("train", "--model", "vqvae", "--run", new, "--data")
    data = str(work / "shapes.npz")
    encode = ("encode", "--run", str(work / "vq"), "--data", data, "--out", new, "--device")
    cases = {
        (*train, str(garbage)): "a.npy': not a readable NumPy file. Save one uint8 or float",
        (*train, str(picture)): "b.png': not a supported file. It may be a folder",
        (*train, str(folder)): "d.png: not a picture of a known format, or damaged.",
        (*train, ""): "argument --data: must be a path; got ''",
        ("train", "--run", "", "--resume"): "argument --run: must be a path; got ''",
        (*train, data, "--workers", "-1"): "workers must be 0 or more; got -1",
        (*train, data, "--set", "decay=0,9"): "VQVAE: Codebook: decay must be a number; got str",
        (*train, data, "--set", "dilations=3"): "dilations must be at least one of 1, 2, …; got 3",
        (*train, data, "--set", "num_codes=null"): "num_codes must be an int; got NoneType",
        ("train", "--run", str(work / "vae"), "--resume", "--model", "vqvae"): ", vae, or left out",
        (*encode, "quantum"): "device 'quantum' cannot be used",
        ("evaluate", "--run", str(work / "vae"), "--data", data, "--limit", "0"): (
            "limit must be at least 1; got 0"
        ),
        (
            *("sample", "--run", str(work / "prior"), "--count", "3", "--out", new),
            *("--keep-best", "0.5", "--classifier", new),
        ): "there is no such folder",
    }
    if not torch.cuda.is_available():
        cases[(*encode, "cuda")] = "device 'cuda' cannot be used"
    for arguments, message in cases.items():
        assert message in refused(capsys, *arguments), arguments
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    line = refused(capsys, "train", "--run", str(work / "vq"), "--resume")
    assert line == (
        'fastvq train: accelerate is needed and not installed: pip install "fastvq[train]".\n'
    )
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "scikit-learn" in refused(capsys, "demo", "--out", str(work / "demo"))


def test_an_interruption_says_how_to_go_on(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvq.train.stage1.train_stage1", interrupt)
    run = str(work / "vq")
    assert cli.main(["train", "--run", run, "--resume"]) == 130
    assert f"fastvq train --run {run} --resume" in capsys.readouterr().err


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTVQ_DEBUG", "1")
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["sample", "--run", str(tmp_path / "none")])


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvq.kernels import load_cpu_extension

    monkeypatch.setenv("FASTVQ_CPU_ISA", "generic")
    capsys.readouterr()
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in ("torch ", "triton ", "reference ", "torch threads", "TF32 in matmul"):
        assert expected in text
    extension, reason = load_cpu_extension()
    if extension is None:
        assert reason in text
        return
    assert "in use  generic" in text
    for name in ("mmx", "amx", "avx512"):
        if name not in extension.isa_available():
            monkeypatch.setenv("FASTVQ_CPU_ISA", name)
            assert name in refused(capsys, "info")


def test_the_module_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvq", "sample", "--run", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert json.dumps(str(tmp_path))[1:-1] in done.stderr


def test_torchrun_trains_one_run_in_two_processes(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (32, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "--"]
    train = ["fastvq", "train", "--model", "vqvae", "--data", "pictures.npy", "--run", "run"]
    sizes = ["--steps", "2", "--batch-size", "4", "--hidden-channels", "4", "--num-codes", "4"]
    encode = ["fastvq", "encode", "--run", "run", "--data", "pictures.npy", "--out", "codes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    for command in ([*train, *sizes], encode):
        done = subprocess.run(
            launch + command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    # A shard for each process, and together every picture once.
    shards = json.loads((tmp_path / "codes" / "manifest.json").read_text())["shards"]
    assert [shard["count"] for shard in shards] == [16, 16]


def test_bench_runs_the_suites_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert (Path(str(options["cwd"])) / "benchmarks" / "__main__.py").is_file()
        ran.append(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["bench", "nearest_code", "--case", "K=512", "--quick", "--threads", "1"]) == 0
    (command,) = ran
    assert command[:3] == ["-m", "benchmarks", "nearest_code"]
    assert {"--quick", "--case", "K=512", "--threads", "1"} <= set(command)
    assert "--cold" not in command


def test_bench_without_a_checkout_says_where_the_suites_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "fastvq" / "cli" / "machine.py"))
    assert "they are in the source checkout" in refused(capsys, "bench")
