"""The options of the command line, their help and defaults.

A training option that is not given is absent (SUPPRESS), so that --resume can tell what was asked
for; its default is that of Stage1Config or PriorConfig. What the commands do with the options is in
`cli`; this module needs nothing but Python, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastvq.version import __version__

_DATA = """\
DATA is a folder of pictures or of WAV files (flat, or one sub-folder per class), a zip of one,
MNIST-style IDX files (gzipped or not), or an .npy or .npz array (N, H, W), (N, H, W, C) or
(N, C, H, W) of pictures; or a text file, every line of which is an example. WAV files may have any
rate, 8, 16, 24 or 32 bits or floats; channels are averaged."""
MODEL_FLAGS = {
    "levels": "levels of codes, top to bottom; only vqvae2 (default 2)",
    "num_codes": "codes in each level's codebook (default 512)",
    "hidden_channels": "width of encoder and decoder (default 128; vae 32)",
    "code_dim": "channels of a code (default 64)",
    "downsample": "pixels per bottom code, along each side; a power of two (default 4)",
    "latent_dim": "size of the latent; only vae (default 32)",
    "length": "text: bytes of a line, its end included; longer ones are left out (default 128)",
}
PRIOR_FLAGS = {
    "hidden_channels": "width of each level's PixelCNN (default 64)",
    "num_layers": "gated layers of each (default 15)",
    "kernel_size": "side of their convolutions, odd (default 3)",
    "dropout": "probability, in 0…1 (default 0)",
}


class _Parser(argparse.ArgumentParser):
    """Ends with one line on a wrong option."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. Try {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of `fastvq`; what it returns names the `command` and the `extras` it needs."""
    root = _Parser(
        prog="fastvq",
        description="Train VAE, VQ-VAE and VQ-VAE-2 models and the priors over their codes, and "
        "draw new pictures.",
        epilog="fastvq <command> --help says more. FASTVQ_DEBUG=1 shows the traceback of an error.",
    )
    root.add_argument("--version", action="version", version=f"fastvq {__version__}")
    commands = root.add_subparsers(dest="command", metavar="<command>", required=True)
    for add in (
        _add_demo,
        _add_train,
        _add_encode,
        _add_train_prior,
        _add_train_classifier,
        _add_sample,
        _add_reconstruct,
        _add_detect,
        _add_evaluate,
        _add_classify,
        _add_info,
        _add_bench,
    ):
        add(commands)
    return root


def _command(
    commands: Any,
    name: str,
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
    command.set_defaults(extras=extras)
    return command


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
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
        "train a VAE, VQ-VAE or VQ-VAE-2 on pictures",
        "Trains the first stage: pictures to a latent or to codes, and back. Writes settings,\n"
        "metrics, checkpoints and pictures into one run folder. Kill it at any moment: --resume\n"
        f"goes on to the same weights as an unbroken run.\n\n{_DATA}",
        "fastvq train --model vqvae2 --data photos.zip --image-size 256 --run runs/photos\n"
        "fastvq train --run runs/photos --resume --steps 20000",
    )
    own = command.add_argument_group("model and data")
    own.add_argument("--model", choices=("vae", "vqvae", "vqvae2"), help="what to train", **_absent)
    own.add_argument("--data", metavar="DATA", help="see above", **_absent)
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
    own.add_argument("--only", metavar="REGEX", help=_ONLY_HELP, **_absent)
    own.add_argument("--class-pattern", metavar="REGEX", help=_CLASS_PATTERN_HELP, **_absent)
    own.add_argument(
        "--sample-rate",
        type=int,
        metavar="HZ",
        help="sounds: resample to this rate (default: that of the first file)",
        **_absent,
    )
    own.add_argument(
        "--clip-seconds",
        type=float,
        metavar="S",
        help="sounds: length of the clips; longer sounds are cut, shorter ones set among zeros, at "
        "a place drawn anew in training (default 1)",
        **_absent,
    )
    own.add_argument(
        "--peak",
        type=float,
        metavar="LEVEL",
        help="sounds: scale each to this peak, such as 0.9 (default: leave its loudness)",
        **_absent,
    )
    own.add_argument(
        "--strict", action="store_true", help="refuse a broken file, not skip it", **_absent
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
    _add_model_options(command, MODEL_FLAGS)


def _add_encode(commands: Any) -> None:
    command = _command(
        commands,
        "encode",
        "turn pictures into codes, for a prior to be trained on",
        "Encodes every picture with a trained VQ-VAE or VQ-VAE-2 and writes memory-mapped arrays\n"
        f"of codes with a JSON manifest.\n\n{_DATA}",
        "fastvq encode --run runs/photos --data photos.zip --out runs/photos/codes-train",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="of a vqvae or vqvae2")
    _add_data_options(command)
    command.add_argument(
        "--class-pattern", metavar="REGEX", help="as fastvq train's (default: that of the run)"
    )
    command.add_argument(
        "--clip-seconds",
        type=float,
        metavar="S",
        help="sounds: how much of each is encoded, from its start (default: as in the run)",
    )
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
    _add_model_options(command, PRIOR_FLAGS)


def _add_train_classifier(commands: Any) -> None:
    command = _command(
        commands,
        "train-classifier",
        "a classifier that judges samples, for sample --keep-best",
        "Trains a small convolutional network on labelled pictures (a minute or two), says how it\n"
        f"reads a tenth that it has not seen, and saves it as safetensors.\n\n{_DATA}",
        "fastvq train-classifier --data mnist --split train --out runs/digits-classifier\n"
        "fastvq sample --run runs/digits-prior --keep-best 0.25 "
        "--classifier runs/digits-classifier",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="where it goes")
    _add_data_options(command)
    command.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the samples (default: as they are)",
    )
    command.add_argument("--steps", type=int, default=800, metavar="N", help="(default 800)")
    command.add_argument("--seed", type=int, default=0, help="0 or more (default 0)")
    _add_device_options(command, batch_size=128)


def _add_sample(commands: Any) -> None:
    command = _command(
        commands,
        "sample",
        "draw new pictures from a prior or a VAE",
        "Draws codes from a trained prior, decodes them, and writes a labelled grid; one row per\n"
        "class where the prior knows classes. The run of a VAE serves too.",
        "fastvq sample --run runs/photos-prior --count 64 --temperature 0.9 --out new.png\n"
        "fastvq sample --run runs/photos-prior --count 8 --complete photo.jpg --keep left-half",
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
        "--complete",
        metavar="PICTURE",
        help="keep the codes of a half of this picture, draw others",
    )
    command.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="vae of text: --count lines on the way between two sentences",
    )
    command.add_argument(
        "--keep",
        choices=("top-half", "bottom-half", "left-half", "right-half"),
        default="top-half",
        help="which half --complete keeps (default top-half)",
    )
    command.add_argument(
        "--keep-best",
        type=float,
        metavar="FRACTION",
        help="draw 1/FRACTION times as many, keep those the classifier is surest of",
    )
    command.add_argument(
        "--classifier", metavar="DIR", help="judge of --keep-best, from train-classifier"
    )
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
    command.add_argument(
        "--strict", action="store_true", help="sounds: refuse a broken file, not leave it out"
    )
    _add_device_options(command, batch_size=16)
    command.add_argument("--workers", type=int, metavar="N", help="processes that decode pictures")


def _add_detect(commands: Any) -> None:
    command = _command(
        commands,
        "detect",
        "flag pictures that are unlike those a run was trained on",
        "Scores every picture by how unlikely its codes are under a prior, by what its\n"
        "reconstruction misses, and by both; flags those above a threshold that at most the\n"
        "false-alarm rate of normal pictures exceed, whatever the model, as long as the held-in\n"
        "pictures are normal and no part of the run was trained on them. Writes a table (CSV and\n"
        f"JSON lines), a histogram, and heat maps of the flagged pictures.\n\n{_DATA}",
        "fastvq detect --run runs/parts-prior --data new.zip --held-in good.zip --out found\n"
        "fastvq detect --run runs/parts --data new.zip --held-in good.zip --out found \\\n"
        "    --false-alarm-rate 0.01 --strict",
    )
    command.add_argument(
        "--run", required=True, metavar="DIR", help="of a prior; or of a first stage, without codes"
    )
    _add_data_options(command)
    command.add_argument(
        "--held-in", required=True, metavar="DATA", help="normal pictures, not trained on"
    )
    command.add_argument("--held-in-split", choices=("train", "val", "test"), help=_SPLIT_HELP)
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    command.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of normal pictures, the share that may be flagged (default 0.05)",
    )
    command.add_argument(
        "--score",
        choices=("combined", "likelihood", "reconstruction"),
        help="what is flagged by (default: combined; without a prior, reconstruction)",
    )
    command.add_argument(
        "--levels", type=int, metavar="N", help="reconstruct from the top N levels (default: all)"
    )
    command.add_argument(
        "--normal", metavar="A,B", help="classes of the data that are normal: prints the AUROC"
    )
    command.add_argument(
        "--heat-maps", type=int, metavar="N", help="of the N oddest only (default: all flagged)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of the division of --held-in (default 0)"
    )
    command.add_argument(
        "--strict", action="store_true", help="refuse a broken picture, not leave it out"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an earlier detection")
    _add_device_options(command, batch_size=64)
    command.add_argument("--workers", type=int, metavar="N", help="processes that decode pictures")


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
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


def _add_classify(commands: Any) -> None:
    command = _command(
        commands,
        "classify",
        "judge sounds by a classifier trained on real ones",
        "Trains a small convolutional network to tell the classes of real sounds apart, and\n"
        "prints how many it reads correctly of those held out and of other sounds, such as those\n"
        "that fastvq reconstruct and fastvq sample wrote.",
        "fastvq classify --data digits.zip --class-pattern '^([^_]+)_' --hold-out '_1[5-9]' \\\n"
        "  --read samples-0",
    )
    command.add_argument("--data", required=True, metavar="DATA", help="real sounds with classes")
    command.add_argument(
        "--class-pattern", metavar="REGEX", help="as fastvq train's; holds for --read too"
    )
    command.add_argument(
        "--hold-out",
        metavar="REGEX",
        help="files of DATA in whose name it is found are read, not trained on",
    )
    command.add_argument(
        "--read", action="append", default=[], metavar="DATA", help="more to read; may be repeated"
    )
    command.add_argument(
        "--clip-seconds", type=float, default=1.0, metavar="S", help="heard of each (default 1)"
    )
    command.add_argument("--epochs", type=int, default=60, metavar="N", help="(default 60)")
    command.add_argument("--seed", type=int, default=0, help="of the training (default 0)")


def _add_info(commands: Any) -> None:
    _command(
        commands,
        "info",
        "versions, devices, backends and instruction sets",
        "Prints versions, devices, which backend can run which op and why not, the instruction\n"
        "sets found and the one in use (FASTVQ_CPU_ISA=generic|avx2|avx512|amx holds it down),\n"
        "and the TF32 switches.",
        "fastvq info",
        (),
    )


_absent: dict[str, Any] = {"default": argparse.SUPPRESS}
_SPLIT_HELP = "part of the data, where it has parts (default: train where there are parts)"

_ONLY_HELP = "take only the files in whose name this regular expression is found"
_CLASS_PATTERN_HELP = (
    "read each file's class from its name: a regular expression with one group, such as "
    "'^([^_]+)_' (default: the folders' names)"
)


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
    step.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        help="of the learning rate; cosine lets it fall to 0 at the last step, which then has to "
        "be known: a run resumed with other --steps follows another curve (default: constant)",
        **_absent,
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


def _add_bench(commands: Any) -> None:
    command = _command(
        commands,
        "bench",
        "check and time fastvq beside its rivals; needs a source checkout",
        "Runs the suites of benchmarks/ in the source checkout that fastvq is installed from:\n"
        "correctness first, then fastvq and its rivals in turn on the same inputs. The same as\n"
        "python -m benchmarks there.",
        "fastvq bench --list\nfastvq bench nearest_code --threads 2",
        (),
    )
    add_bench_options(command)


def add_bench_options(command: argparse.ArgumentParser) -> None:
    """The options of `fastvq bench` and `python -m benchmarks`."""
    command.add_argument("suites", nargs="*", metavar="suite", help="names; default all")
    command.add_argument("--list", action="store_true", help="say what each suite times")
    command.add_argument(
        "--case", metavar="KEY=VALUE,…", help="only the cases with these values, as N=32768,K=512"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    command.add_argument(
        "--threads",
        type=int,
        default=2,
        metavar="N",
        help="CPU threads of every library (default 2)",
    )
    command.add_argument(
        "--cold", action="store_true", help="evict the caches before every timed run"
    )
    command.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="to measure each case for, at least (default 4)",
    )
    command.add_argument(
        "--quick", action="store_true", help="small cases, unrecorded: shows that all works"
    )
    command.add_argument("--no-record", action="store_true", help="print only")
    command.add_argument(
        "--resume", action="store_true", help="skip cases recorded of these sources, here"
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
    command.add_argument("--data", required=True, metavar="DATA", help="see above")
    command.add_argument("--split", choices=("train", "val", "test"), help=_SPLIT_HELP)
    command.add_argument("--only", metavar="REGEX", help=_ONLY_HELP)


def _add_device_options(command: argparse.ArgumentParser, batch_size: int) -> None:
    command.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="B",
        help=f"pictures at a time (default {batch_size})",
    )
    command.add_argument("--device", help="cpu, cuda, … (default: CUDA where there is one)")
