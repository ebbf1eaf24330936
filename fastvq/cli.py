"""The command line: `fastvq <command>`, also `python -m fastvq`.

Lives here: how a command is called, and how an error or an interruption ends. The options are in
`cli_options`. What a command does is in `fastvq.train`, imported once the options are known.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from fastvq.cli_options import MODEL_FLAGS, PRIOR_FLAGS, parser

# Modules behind the extras of pyproject.toml, with the names their packages install under.
_EXTRAS = {
    "train": {
        "accelerate": "accelerate",
        "matplotlib": "matplotlib",
        "PIL": "pillow",
        "tqdm": "tqdm",
    },
    "demo": {"sklearn": "scikit-learn"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for an error, 130 for an interruption."""
    arguments = parser().parse_args(argv)
    try:
        _require(arguments.extras)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        print(f"\nfastvq {arguments.command}: {_after_interrupt(arguments)}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("FASTVQ_DEBUG") == "1":
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        line = line.removeprefix(f"{arguments.command}: ")
        print(f"fastvq {arguments.command}: {line}", file=sys.stderr)
        return 2
    return 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, without the place in the sources."""
    print(f"\nfastvq: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def _require(extras: Sequence[str]) -> None:
    """ImportError with the way out, where a package of these extras is not installed."""
    for extra in extras:
        for module, package in _EXTRAS[extra].items():
            if find_spec(module) is None:
                raise ImportError(
                    f'{package} is needed and not installed: pip install "fastvq[{extra}]".'
                )


def _after_interrupt(arguments: argparse.Namespace) -> str:
    if arguments.command in ("train", "train-prior"):
        if (Path(arguments.run) / "config.json").is_file():
            return (
                f"interrupted; go on from the last checkpoint with: "
                f"fastvq {arguments.command} --run {arguments.run} --resume"
            )
        return "interrupted before the run began; start it again."
    if arguments.command == "demo":
        return "interrupted; the same command goes on from the last checkpoint."
    return "interrupted."


def _demo(arguments: argparse.Namespace) -> None:
    from fastvq.train.demo import run_demo

    run_demo(
        arguments.out,
        seed=arguments.seed,
        quick=arguments.quick,
        overwrite=arguments.overwrite,
    )


def _train(arguments: argparse.Namespace) -> None:
    from fastvq.train.stage1 import Stage1Config, train_stage1

    if _is_text_run(arguments):
        _train_text(arguments)
        return
    given = _given(arguments, Stage1Config, MODEL_FLAGS)
    if arguments.resume:
        config = _resumed(Stage1Config, arguments.run, given, ("vae", "vqvae", "vqvae2"))
    else:
        _require_options(given, "model", "data")
        config = Stage1Config(**given)
    path = train_stage1(config, resume=arguments.resume)
    _say_where(path, "fastvq reconstruct shows what it keeps of the data")


def _is_text_run(arguments: argparse.Namespace) -> bool:
    """Whether `train` is asked to train on text, or to go on with such a run."""
    from fastvq.train.data.text import is_text
    from fastvq.train.run_folder import load_run

    if arguments.resume:
        return load_run(arguments.run).kind.startswith("text-")
    data = getattr(arguments, "data", None)
    # An IDX file holds zero bytes at its start, an array or a zip has a suffix of its own.
    return data is not None and is_text(data)


def _train_text(arguments: argparse.Namespace) -> None:
    from fastvq.train.stage1 import Stage1Config
    from fastvq.train.text import TextConfig, train_text

    given = _given(arguments, TextConfig, MODEL_FLAGS)
    others = _given(arguments, Stage1Config, {}).keys() - given.keys() - {"model_arguments"}
    if others:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(others))
        raise ValueError(f"{names} must be left out for text.")
    if arguments.resume:
        config = _resumed(TextConfig, arguments.run, given, ("text-vae", "text-vqvae"))
    else:
        _require_options(given, "model", "data")
        config = TextConfig(**given)
    path = train_text(config, resume=arguments.resume)
    _say_where(path, "fastvq reconstruct shows what it keeps of the lines")


def _encode(arguments: argparse.Namespace) -> None:
    from fastvq.train.codes import CodeFolder, extract_codes

    out = arguments.out
    if out is None:
        out = _code_folder(arguments.run, arguments.data, arguments.split)
    path = extract_codes(
        arguments.run,
        arguments.data,
        out,
        split=arguments.split,
        only=arguments.only,
        class_pattern=arguments.class_pattern,
        clip_seconds=arguments.clip_seconds,
        batch_size=arguments.batch_size,
        device=arguments.device,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        strict=arguments.strict,
    )
    print(f"codes: {path}")
    broken = CodeFolder(path).manifest["source"]["broken"]
    if broken:
        print(f"{broken} files could not be decoded and were left out; each is named above")


def _train_prior(arguments: argparse.Namespace) -> None:
    from fastvq.train.priors import PriorConfig, train_prior

    given = _given(arguments, PriorConfig, PRIOR_FLAGS)
    if not arguments.resume:
        _require_options(vars(arguments), "data")
    codes = _codes(arguments)
    if codes is not None:
        given["codes"] = codes
    if arguments.resume:
        config = _resumed(PriorConfig, arguments.run, given, ("prior",))
    else:
        config = PriorConfig(**given)
    path = train_prior(config, resume=arguments.resume)
    _say_where(path, "fastvq sample draws from it")


def _sample(arguments: argparse.Namespace) -> None:
    from fastvq.train.showing import (
        check_array_path,
        draw_samples,
        save_sample_array,
        save_samples,
    )

    if _is_of_text(arguments.run):
        _sample_text(arguments)
        return
    if arguments.interpolate is not None:
        raise ValueError("--interpolate is of runs of text.")
    if arguments.save_array is not None:
        check_array_path(arguments.save_array)
    labels = arguments.class_labels
    samples = draw_samples(
        arguments.run,
        arguments.count,
        class_labels=None if labels is None else [name.strip() for name in labels.split(",")],
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        complete=arguments.complete,
        keep=arguments.keep,
        batch_size=arguments.batch_size,
        device=arguments.device,
        progress=True,
    )
    if arguments.save_array is not None:
        print(f"array: {save_sample_array(samples, arguments.save_array)}")
    out = arguments.out or Path(arguments.run) / "pictures" / f"samples-{arguments.seed}.png"
    if samples.rate is None:
        print(f"samples: {save_samples(samples, out)}")
    else:
        from fastvq.train.sound_showing import save_sound_samples

        print(f"samples: {save_sound_samples(samples, out)} (spectrograms: {out})")


def _is_of_text(run: str) -> bool:
    """Whether a run is of text, or of a prior over codes of text."""
    from fastvq.train.run_folder import load_run
    from fastvq.train.text_lines import is_of_text

    opened = load_run(run)
    return is_of_text(opened if opened.stage1 is None else load_run(opened.stage1))


def _sample_text(arguments: argparse.Namespace) -> None:
    from fastvq.train.run_folder import load_run
    from fastvq.train.showing import device_of
    from fastvq.train.text_showing import interpolate_lines, sample_lines

    run, device = load_run(arguments.run), device_of(arguments.device)
    for name in ("class_labels", "complete", "save_array"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} must be left out for text.")
    if arguments.interpolate is not None:
        first, last = arguments.interpolate
        lines = interpolate_lines(run, first, last, steps=arguments.count or 7, device=device)
    else:
        lines = sample_lines(
            run,
            arguments.count or 16,
            seed=arguments.seed,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            device=device,
        )
    text = "".join(f"{line}\n" for line in lines)
    out = arguments.out or run.pictures / f"samples-{arguments.seed}.txt"
    Path(out).write_text(text, encoding="utf-8")
    print(f"{text}samples: {out}")


def _reconstruct_text(arguments: argparse.Namespace) -> None:
    from fastvq.train.run_folder import load_run
    from fastvq.train.showing import device_of
    from fastvq.train.text_bits import evaluate_text
    from fastvq.train.text_showing import reconstruct_lines

    run, device = load_run(arguments.run), device_of(arguments.device)
    if run.kind == "prior":
        raise ValueError(
            f"run '{run.path}' must be of a vae or vqvae; it is of a prior. Name the run whose "
            f"codes it draws: '{run.stage1}'."
        )
    pairs = reconstruct_lines(
        run, arguments.data, count=arguments.count, split=arguments.split, device=device
    )
    text = "".join(f"{line}\n→ {again}\n\n" for line, again in pairs)
    name = f"reconstructions-{arguments.split or _stem(arguments.data)}.txt"
    out = arguments.out or run.pictures / name
    Path(out).write_text(text, encoding="utf-8")
    print(text, end="")
    results = evaluate_text(
        run, arguments.data, split=arguments.split, limit=arguments.measure, baselines=False
    )
    for name, value in results.items():
        print(f"{name}: {value:.6g}")
    print(f"reconstructions: {out}")


def _reconstruct(arguments: argparse.Namespace) -> None:
    from fastvq.train.run_data import is_of_sounds
    from fastvq.train.run_folder import load_run
    from fastvq.train.showing import show_reconstructions

    name = f"reconstructions-{arguments.split or _stem(arguments.data)}.png"
    out = arguments.out or Path(arguments.run) / "pictures" / name
    if _is_of_text(arguments.run):
        _reconstruct_text(arguments)
        return
    if is_of_sounds(load_run(arguments.run)):
        _reconstruct_sounds(arguments, out)
        return
    errors = show_reconstructions(
        arguments.run,
        arguments.data,
        out,
        count=arguments.count,
        measure=arguments.measure,
        split=arguments.split,
        only=arguments.only,
        batch_size=arguments.batch_size,
        device=arguments.device,
        workers=arguments.workers,
    )
    for error in errors:
        print(f"{error.name:<14} MSE {error.mse:.6f}   PSNR {error.psnr:.2f} dB")
    print(f"reconstructions: {out}")


def _reconstruct_sounds(arguments: argparse.Namespace, out: str | Path) -> None:
    from fastvq.train.run_folder import load_run
    from fastvq.train.showing import device_of
    from fastvq.train.sound_showing import show_sound_reconstructions

    report = show_sound_reconstructions(
        load_run(arguments.run),
        arguments.data,
        out,
        count=arguments.count,
        measure=arguments.measure,
        split=arguments.split,
        only=arguments.only,
        strict=arguments.strict,
        device=device_of(arguments.device),
    )
    for error in report.errors:
        print(
            f"{error.name:<14} SNR {error.snr:.2f} dB   log-spectral distance "
            f"{error.log_spectral_distance:.2f} dB   {error.bits_per_second:.0f} bits/s "
            f"(entropy {error.entropy_bits_per_second:.0f})"
        )
    skipped = f"; {report.broken} could not be decoded" if report.broken else ""
    print(f"{report.sounds} sounds: {report.folder} (spectrograms: {out}){skipped}")


def _classify(arguments: argparse.Namespace) -> None:
    from fastvq.train.sound_classifier import judge_sounds

    judged = judge_sounds(
        arguments.data,
        arguments.read,
        class_pattern=arguments.class_pattern,
        hold_out=arguments.hold_out,
        seconds=arguments.clip_seconds,
        epochs=arguments.epochs,
        seed=arguments.seed,
    )
    print(f"a classifier trained on {judged.trained_on} real sounds reads")
    for read in judged.read:
        print(f"  {read.accuracy:6.1%} of {read.sounds} sounds of {read.name} as their class")


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastvq.train.metrics import evaluate_bits_per_dim, evaluate_code_bits, evaluate_elbo
    from fastvq.train.run_data import is_of_sounds
    from fastvq.train.run_folder import load_run
    from fastvq.train.showing import device_of

    run = load_run(arguments.run)
    options: dict[str, Any] = {
        "split": arguments.split,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "device": device_of(arguments.device),
    }
    if _is_of_text(arguments.run):
        from fastvq.train.text_bits import evaluate_text

        results = evaluate_text(run, arguments.data, samples=arguments.samples, **options)
    elif run.kind == "vae":
        binarise = run.resolved["binarise"]
        results = evaluate_elbo(
            run, arguments.data, binarise=binarise, samples=arguments.samples, **options
        )
    elif run.stage1 is not None and is_of_sounds(load_run(run.stage1)):
        results = evaluate_code_bits(run, arguments.data, only=arguments.only, **options)
    elif run.kind == "prior":
        results = evaluate_bits_per_dim(run, arguments.data, **options)
    else:
        raise ValueError(
            f"run '{arguments.run}' must be of a vae or a prior; a {run.kind} has no likelihood. "
            "Use fastvq reconstruct for its errors, or evaluate a prior over its codes."
        )
    for name, value in results.items():
        print(f"{name}: {value:.6g}")


def _info(arguments: argparse.Namespace) -> None:
    from fastvq.train.environment import report

    print(report())


def _given(
    arguments: argparse.Namespace, config: type[Any], flags: dict[str, str]
) -> dict[str, Any]:
    """The options that were given, as fields of `config`; model arguments in one dict."""
    asked = vars(arguments)
    fields = {field.name for field in dataclasses.fields(config)}
    given = {name: value for name, value in asked.items() if name in fields}
    model_arguments = {name: asked[name] for name in flags if name in asked}
    for pair in asked.get("set", []):
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ValueError(f"--set must be NAME=VALUE; got {pair!r}.")
        try:
            model_arguments[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            model_arguments[name.replace("-", "_")] = text
    if model_arguments:
        given["model_arguments"] = model_arguments
    return given


def _resumed(config: type[Any], run: str, given: dict[str, Any], kinds: Sequence[str]) -> Any:
    """The configuration of a run, with the options that were given on top.

    What may not change is refused by the training itself.
    """
    from fastvq.train.run_folder import load_run

    started = load_run(run)
    if started.kind not in kinds:
        raise ValueError(
            f"run '{run}' must be of a {' or '.join(kinds)}; it is of a {started.kind}. Resume it "
            f"with fastvq {'train-prior' if started.kind == 'prior' else 'train'}."
        )
    fields = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in started.config.items() if name in fields}
    merged = {**settings.get("model_arguments", {}), **given.get("model_arguments", {})}
    return config(**{**settings, **given, "model_arguments": merged})


def _require_options(given: dict[str, Any], *names: str) -> None:
    missing = [f"--{name}" for name in names if given.get(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given, unless --resume goes on with a run."
        )


def _codes(arguments: argparse.Namespace) -> str | None:
    """The folder of codes to train on, where --data names it or the pictures it is made from.

    Pictures are encoded into the folder that `fastvq encode` would choose; codes that are there
    already, of the same pictures and the same weights, are taken as they are.
    """
    from fastvq.train.codes import MANIFEST, CodeFolder, extract_codes
    from fastvq.train.run_folder import RunFolder, load_run

    data, split = getattr(arguments, "data", None), getattr(arguments, "split", None)
    vqvae = getattr(arguments, "vqvae", None)
    if vqvae is None:
        if split is not None:
            raise ValueError(
                "--split is of pictures, with --vqvae; folders of codes have no parts."
            )
        return None if data is None else str(Path(data).expanduser().absolute())
    if data is None:
        raise ValueError("--vqvae must come with --data, the pictures that it encodes.")
    out = _code_folder(vqvae, data, split)
    if arguments.resume:
        return str(out.absolute())
    RunFolder.check(arguments.run, None, False)  # before the pictures are encoded
    if (out / MANIFEST).is_file() and not arguments.overwrite:
        found = CodeFolder(out)
        source = found.manifest["source"]
        same = source["path"] == str(Path(data).absolute()) and source["split"] == split
        if same and found.stage1["weights_sha256"] == load_run(vqvae).weights_sha256:
            print(f"codes: {out} (made before)")
            return str(out.absolute())
    return str(extract_codes(vqvae, data, out, split=split, overwrite=arguments.overwrite))


def _code_folder(run: str, data: str, split: str | None) -> Path:
    """Where codes go unless told otherwise: RUN/codes-SPLIT, or codes-NAME of the data."""
    return Path(run) / f"codes-{split or _stem(data)}"


def _stem(data: str) -> str:
    """photos for photos.zip; the folder's name for a folder."""
    path = Path(data)
    return path.name if path.is_dir() else path.name.partition(".")[0]


def _say_where(path: Path, next_step: str) -> None:
    """Where a training run lies; said once, by the main process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"run: {path} (pictures in {path / 'pictures'}); {next_step}.")


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "train": _train,
    "encode": _encode,
    "train-prior": _train_prior,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "evaluate": _evaluate,
    "classify": _classify,
    "info": _info,
}
