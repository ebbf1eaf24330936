"""The command line: `fastvq <command>`, also `python -m fastvq`.

Lives here: the options, their help, and how an error or an interruption ends. What a command does
is in `fastvq.train`, imported once the options are known, so that `--help` is quick and needs
nothing but Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO

from fastvq.version import __version__

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
_DATA = """\
DATA is a folder of pictures (flat, or one sub-folder per class), a zip of one, MNIST-style IDX
files (gzipped or not), or an .npy or .npz array (N, H, W), (N, H, W, C) or (N, C, H, W)."""
_MODEL_FLAGS = {
    "levels": "levels of codes, top to bottom; only vqvae2 (default 2)",
    "num_codes": "codes in each level's codebook (default 512)",
    "hidden_channels": "width of encoder and decoder (default 128; vae 32)",
    "code_dim": "channels of a code (default 64)",
    "downsample": "pixels per bottom code, along each side; a power of two (default 4)",
    "latent_dim": "size of the latent; only vae (default 32)",
}
_PRIOR_FLAGS = {
    "hidden_channels": "width of each level's PixelCNN (default 64)",
    "num_layers": "gated layers of each (default 15)",
    "kernel_size": "side of their convolutions, odd (default 3)",
    "dropout": "probability, in 0…1 (default 0)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for an error, 130 for an interruption."""
    arguments = _parser().parse_args(argv)
    try:
        _require(arguments.extras)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.call(arguments)
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


class _Parser(argparse.ArgumentParser):
    """Ends with one line on a wrong option."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. Try {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


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


# The options. A training option that is not given is absent (SUPPRESS), so that --resume can tell
# what was asked for; its default is that of Stage1Config or PriorConfig.


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastvq",
        description="Train VAE, VQ-VAE and VQ-VAE-2 models and the priors over their codes, and "
        "draw new pictures.",
        epilog="fastvq <command> --help says more. FASTVQ_DEBUG=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"fastvq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for add in (
        _add_demo,
        _add_train,
        _add_encode,
        _add_train_prior,
        _add_sample,
        _add_reconstruct,
        _add_evaluate,
        _add_info,
    ):
        add(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    call: Any,
    summary: str,
    text: str,
    example: str,
    extras: Sequence[str] = ("train",),
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(call=call, extras=extras)
    return command


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        _demo,
        "the whole pipeline on embedded handwritten digits, in minutes",
        "Trains a two-level VQ-VAE-2 and its class-conditional priors on scikit-learn's 1797\n"
        "handwritten digits (enlarged; nothing is downloaded), draws new digits, writes labelled\n"
        "pictures and prints how well classifiers read them. An interrupted demo goes on where it\n"
        "was; a finished one shows its results again.",
        "fastvq demo --out demo-output",
        ("train", "demo"),
    )
    command.add_argument(
        "--out", default="demo-output", help="folder to write (default demo-output)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of split, training, samples (default 0)"
    )
    command.add_argument(
        "--quick", action="store_true", help="a few steps only: shows that all works, not quality"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="delete an earlier demo in --out and start anew"
    )


def _add_train(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        _train,
        "train a VAE, VQ-VAE or VQ-VAE-2 on pictures",
        "Trains the first stage: pictures to a latent or to codes, and back. Writes settings,\n"
        "metrics, checkpoints and pictures into one run folder. Kill it at any moment: --resume\n"
        f"goes on to the same weights as an unbroken run.\n\n{_DATA}",
        "fastvq train --model vqvae2 --data photos.zip --image-size 256 --run runs/photos\n"
        "fastvq train --run runs/photos --resume --steps 20000",
    )
    own = command.add_argument_group("model and data")
    own.add_argument("--model", choices=("vae", "vqvae", "vqvae2"), help="what to train", **_absent)
    own.add_argument("--data", metavar="DATA", help="pictures, see above", **_absent)
    own.add_argument("--split", choices=("train", "val", "test"), help=_SPLIT_HELP, **_absent)
    own.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="resize and centre-crop to squares of this side (default: as the first picture is)",
        **_absent,
    )
    own.add_argument(
        "--channels", type=int, choices=(1, 3), help="grey or RGB (default: the data's)", **_absent
    )
    own.add_argument(
        "--flip", action="store_true", help="mirror pictures left to right at random", **_absent
    )
    own.add_argument(
        "--strict", action="store_true", help="refuse a broken picture, not skip it", **_absent
    )
    own.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode pictures, 0 for none (default: as many as help)",
        **_absent,
    )
    own.add_argument("--preset", help="a named vqvae2 configuration, such as laptop-256", **_absent)
    own.add_argument(
        "--binarise",
        action=argparse.BooleanOptionalAction,
        help="vae: draw each pixel as 0 or 1, its value being the probability (default: where the "
        "likelihood is Bernoulli, as it is for grey pictures)",
        **_absent,
    )
    _add_training_options(command)
    _add_model_options(command, _MODEL_FLAGS)


def _add_encode(commands: Any) -> None:
    command = _command(
        commands,
        "encode",
        _encode,
        "turn pictures into codes, for a prior to be trained on",
        "Encodes every picture with a trained VQ-VAE or VQ-VAE-2 and writes memory-mapped arrays\n"
        f"of codes with a JSON manifest.\n\n{_DATA}",
        "fastvq encode --run runs/photos --data photos.zip --out runs/photos/codes-train",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a vqvae or vqvae2")
    _add_data_options(command)
    command.add_argument(
        "--out", metavar="DIR", help="folder to write (default RUN/codes-SPLIT or codes-NAME)"
    )
    command.add_argument(
        "--strict", action="store_true", help="refuse a broken picture, not leave it out"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing code folder")
    _add_device_options(command, batch_size=64)
    command.add_argument("--workers", type=int, metavar="N", help="processes that decode pictures")


def _add_train_prior(commands: Any) -> None:
    command = _command(
        commands,
        "train-prior",
        _train_prior,
        "train the autoregressive priors over a model's codes",
        "Trains one gated PixelCNN per level of codes, each conditioned on the levels above and,\n"
        "where the data has classes, on the class. --data is a folder of codes that `fastvq\n"
        "encode` wrote; or pictures, together with --vqvae, which encodes them first. Resumes as\n"
        "`fastvq train` does.",
        "fastvq train-prior --data runs/photos/codes-train --run runs/photos-prior\n"
        "fastvq train-prior --data photos.zip --vqvae runs/photos --run runs/photos-prior",
    )
    own = command.add_argument_group("model and data")
    own.add_argument("--data", metavar="PATH", help="a folder of codes, or pictures", **_absent)
    own.add_argument("--vqvae", metavar="DIR", help="run that encodes pictures", **_absent)
    own.add_argument("--split", choices=("train", "val", "test"), help=_SPLIT_HELP, **_absent)
    own.add_argument(
        "--overwrite", action="store_true", help="replace the codes that --vqvae made before"
    )
    own.add_argument(
        "--weight-average",
        type=float,
        metavar="DECAY",
        help="decay of the averaged weights that are kept, 0 for none (default 0.999)",
        **_absent,
    )
    own.add_argument(
        "--class-conditional",
        action=argparse.BooleanOptionalAction,
        help="show the prior the class (default: where the data has classes)",
        **_absent,
    )
    own.add_argument("--preset", help="a named configuration, such as laptop-256", **_absent)
    _add_training_options(command)
    _add_model_options(command, _PRIOR_FLAGS)


def _add_sample(commands: Any) -> None:
    command = _command(
        commands,
        "sample",
        _sample,
        "draw new pictures from a prior or a VAE",
        "Draws codes from a trained prior, decodes them, and writes a labelled grid; one row per\n"
        "class where the prior knows classes. The run of a VAE serves too.",
        "fastvq sample --run runs/photos-prior --count 64 --temperature 0.9 --out new.png",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a prior or a vae")
    command.add_argument(
        "--count", type=int, metavar="N", help="pictures in all (default: 8 per class, or 64)"
    )
    command.add_argument(
        "--class-labels", metavar="A,B", help="names or numbers of classes (default: all)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="below 1 likelier codes; 0 greedy (default 1)",
    )
    command.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest codes")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest codes of total share P"
    )
    command.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    command.add_argument(
        "--out", metavar="PATH.png", help="grid (default RUN/pictures/samples-SEED.png)"
    )
    command.add_argument(
        "--save-array",
        metavar="PATH",
        help="also as a data set: .npy (N, H, W, C) uint8, or .npz with the labels",
    )
    _add_device_options(command, batch_size=64)


def _add_reconstruct(commands: Any) -> None:
    command = _command(
        commands,
        "reconstruct",
        _reconstruct,
        "show what each level of codes holds",
        "Writes pictures beside their reconstructions from the top level alone, the top and the\n"
        "next, … and all levels, and prints the error of each: MSE of values in 0…1, and PSNR in\n"
        f"dB.\n\n{_DATA}",
        "fastvq reconstruct --run runs/photos --data photos-test.zip --count 8",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a vae, vqvae or vqvae2")
    _add_data_options(command)
    command.add_argument(
        "--count", type=int, default=8, metavar="N", help="pictures shown (default 8)"
    )
    command.add_argument(
        "--measure",
        type=int,
        default=256,
        metavar="N",
        help="pictures the errors are means over, evenly spaced (default 256)",
    )
    command.add_argument(
        "--out", metavar="PATH.png", help="default RUN/pictures/reconstructions-NAME.png"
    )
    _add_device_options(command, batch_size=16)
    command.add_argument("--workers", type=int, metavar="N", help="processes that decode pictures")


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
        _evaluate,
        "ELBO or bits per dimension of test pictures",
        "For a VAE: the negative evidence lower bound in nats per picture (of binarised pictures,\n"
        "where it was trained on such). For a prior: an upper bound on the bits per dimension of\n"
        f"8-bit pictures, those of the codes and those of the picture given the codes.\n\n{_DATA}",
        "fastvq evaluate --run runs/digits-vae --data mnist --split test",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a vae or a prior")
    _add_data_options(command)
    command.add_argument(
        "--limit", type=int, metavar="N", help="only the first N pictures (default: all)"
    )
    command.add_argument(
        "--samples", type=int, default=1, metavar="N", help="vae: draws of the latent (default 1)"
    )
    _add_device_options(command, batch_size=64)


def _add_info(commands: Any) -> None:
    _command(
        commands,
        "info",
        _info,
        "versions, devices, backends and instruction sets",
        "Prints versions, devices, which backend can run which op and why not, the instruction\n"
        "sets found and the one in use (FASTVQ_CPU_ISA=generic|avx2|avx512|amx holds it down),\n"
        "and the TF32 switches.",
        "fastvq info",
        (),
    )


_absent: dict[str, Any] = {"default": argparse.SUPPRESS}
_SPLIT_HELP = "part of the data, where it has parts (default: train where there are parts)"


def _add_training_options(command: argparse.ArgumentParser) -> None:
    """What `train` and `train-prior` share: the fields of `LoopConfig`."""
    run = command.add_argument_group("run")
    run.add_argument("--run", required=True, metavar="DIR", help="folder to write")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run; the other options are taken from it, --steps may differ",
    )
    run.add_argument("--seed", type=int, help="of everything random (default 0)", **_absent)
    for name, text in (
        ("--steps", "optimizer steps in all (default 2000)"),
        ("--batch-size", "pictures per step and process (default 32)"),
        ("--checkpoint-every", "steps between checkpoints (default 500)"),
        ("--validate-every", "steps between validations and pictures (default 500)"),
        ("--log-every", "steps between lines of metrics (default 20)"),
    ):
        run.add_argument(name, type=int, metavar="N", help=text, **_absent)
    step = command.add_argument_group("optimizer")
    step.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="(default 3e-4)", **_absent
    )
    step.add_argument("--optimizer", choices=("adam", "adamw"), help="(default adam)", **_absent)
    step.add_argument(
        "--gradient-clip",
        type=float,
        metavar="NORM",
        help="largest L2 norm of the gradient (default 1)",
        **_absent,
    )
    step.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        help="precision of the forward pass (default no: float32)",
        **_absent,
    )
    step.add_argument(
        "--validation-fraction",
        type=float,
        metavar="SHARE",
        help="of the data, held out (default 0.05)",
        **_absent,
    )


def _add_model_options(command: argparse.ArgumentParser, flags: dict[str, str]) -> None:
    group = command.add_argument_group("arguments of the model")
    for name, text in flags.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=float if name == "dropout" else int,
            metavar="N" if name != "dropout" else "P",
            help=text,
            **_absent,
        )
    group.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any argument of the model's constructor, as JSON; may be repeated",
        **_absent,
    )


def _add_data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, metavar="DATA", help="pictures, see above")
    command.add_argument("--split", choices=("train", "val", "test"), help=_SPLIT_HELP)


def _add_device_options(command: argparse.ArgumentParser, batch_size: int) -> None:
    command.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="B",
        help=f"pictures at a time (default {batch_size})",
    )
    command.add_argument("--device", help="cpu, cuda, … (default: CUDA where there is one)")


# The commands.


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

    given = _given(arguments, Stage1Config, _MODEL_FLAGS)
    if arguments.resume:
        config = _resumed(Stage1Config, arguments.run, given, ("vae", "vqvae", "vqvae2"))
    else:
        _require_options(given, "model", "data")
        config = Stage1Config(**given)
    path = train_stage1(config, resume=arguments.resume)
    _say_where(path, "fastvq reconstruct shows what it keeps of pictures")


def _encode(arguments: argparse.Namespace) -> None:
    from fastvq.train.codes import extract_codes

    out = arguments.out
    if out is None:
        out = _code_folder(arguments.run, arguments.data, arguments.split)
    path = extract_codes(
        arguments.run,
        arguments.data,
        out,
        split=arguments.split,
        batch_size=arguments.batch_size,
        device=arguments.device,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        strict=arguments.strict,
    )
    print(f"codes: {path}")


def _train_prior(arguments: argparse.Namespace) -> None:
    from fastvq.train.priors import PriorConfig, train_prior

    given = _given(arguments, PriorConfig, _PRIOR_FLAGS)
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
    _say_where(path, "fastvq sample draws new pictures from it")


def _sample(arguments: argparse.Namespace) -> None:
    from fastvq.train.showing import (
        check_array_path,
        draw_samples,
        save_sample_array,
        save_samples,
    )

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
        batch_size=arguments.batch_size,
        device=arguments.device,
        progress=True,
    )
    if arguments.save_array is not None:
        print(f"array: {save_sample_array(samples, arguments.save_array)}")
    out = arguments.out or Path(arguments.run) / "pictures" / f"samples-{arguments.seed}.png"
    print(f"samples: {save_samples(samples, out)}")


def _reconstruct(arguments: argparse.Namespace) -> None:
    from fastvq.train.showing import show_reconstructions

    name = f"reconstructions-{arguments.split or _stem(arguments.data)}.png"
    out = arguments.out or Path(arguments.run) / "pictures" / name
    errors = show_reconstructions(
        arguments.run,
        arguments.data,
        out,
        count=arguments.count,
        measure=arguments.measure,
        split=arguments.split,
        batch_size=arguments.batch_size,
        device=arguments.device,
        workers=arguments.workers,
    )
    for error in errors:
        print(f"{error.name:<14} MSE {error.mse:.6f}   PSNR {error.psnr:.2f} dB")
    print(f"reconstructions: {out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastvq.train.metrics import evaluate_bits_per_dim, evaluate_elbo
    from fastvq.train.run_folder import load_run
    from fastvq.train.showing import device_of

    run = load_run(arguments.run)
    options: dict[str, Any] = {
        "split": arguments.split,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "device": device_of(arguments.device),
    }
    if run.kind == "vae":
        binarise = run.resolved["binarise"]
        results = evaluate_elbo(
            run, arguments.data, binarise=binarise, samples=arguments.samples, **options
        )
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
