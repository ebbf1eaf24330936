"""Options that several commands share, with their help and defaults.

A training option that is not given is absent (SUPPRESS), so that --resume can tell what was asked
for; its default is that of the configuration. This needs nothing but Python, as do all modules of
`fastvq.cli` until a command is performed, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

DATA = """\
DATA is a folder of pictures or of WAV files (flat, or one sub-folder per class), a zip of one,
MNIST-style IDX files (gzipped or not), or an .npy or .npz array (N, H, W), (N, H, W, C) or
(N, C, H, W) of pictures; or a text file, every line of which is an example. WAV files may have any
rate, 8, 16, 24 or 32 bits or floats; channels are averaged."""
ABSENT: dict[str, Any] = {"default": argparse.SUPPRESS}
SPLIT_HELP = "part of the data, where it has parts (default: train where there are parts)"
ONLY_HELP = "take only the files in whose name this regular expression is found"
CLASS_PATTERN_HELP = (
    "read each file's class from its name: a regular expression with one group, such as "
    "'^([^_]+)_' (default: the folders' names)"
)


class OneLineParser(argparse.ArgumentParser):
    """Ends with one line on a wrong option."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. Try {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


def path(text: str) -> str:
    """The type of a path; an empty one, of a shell variable without a value, is none."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path; got ''")
    return text


def add_command(
    commands: Any,
    name: str,
    perform: Callable[[argparse.Namespace], None],
    summary: str,
    text: str,
    example: str,
    extras: Sequence[str] = ("train",),
) -> argparse.ArgumentParser:
    """A command: its line in the list, its help, what performs it, and the extras that needs."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(perform=perform, extras=extras)
    return command


def add_training_options(command: argparse.ArgumentParser) -> None:
    """What `train` and `train-prior` share: the fields of `LoopConfig`."""
    run = command.add_argument_group("run")
    run.add_argument("--run", required=True, type=path, metavar="DIR", help="folder to write")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run; the other options are taken from it, --steps may differ",
    )
    run.add_argument("--seed", type=int, help="of everything random (default 0)", **ABSENT)
    for name, text in (
        ("--steps", "optimizer steps in all (default 2000)"),
        ("--batch-size", "pictures per step and process (default 32)"),
        ("--checkpoint-every", "steps between checkpoints (default 500)"),
        ("--validate-every", "steps between validations and pictures (default 500)"),
        ("--log-every", "steps between lines of metrics (default 20)"),
    ):
        run.add_argument(name, type=int, metavar="N", help=text, **ABSENT)
    step = command.add_argument_group("optimizer")
    step.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="(default 3e-4)", **ABSENT
    )
    step.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        help="of the learning rate; cosine lets it fall to 0 at the last step, which then has to "
        "be known: a run resumed with other --steps follows another curve (default: constant)",
        **ABSENT,
    )
    step.add_argument("--optimizer", choices=("adam", "adamw"), help="(default adam)", **ABSENT)
    step.add_argument(
        "--gradient-clip",
        type=float,
        metavar="NORM",
        help="largest L2 norm of the gradient (default 1)",
        **ABSENT,
    )
    step.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        help="precision of the forward pass (default no: float32)",
        **ABSENT,
    )
    step.add_argument(
        "--validation-fraction",
        type=float,
        metavar="SHARE",
        help="of the data, held out (default 0.05)",
        **ABSENT,
    )


def add_model_options(command: argparse.ArgumentParser, flags: dict[str, str]) -> None:
    """Arguments of the model's constructor: `flags` by name with their help, others by --set."""
    group = command.add_argument_group("arguments of the model")
    for name, text in flags.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=float if name == "dropout" else int,
            metavar="N" if name != "dropout" else "P",
            help=text,
            **ABSENT,
        )
    group.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any argument of the model's constructor, as JSON; may be repeated",
        **ABSENT,
    )


def add_data_options(command: argparse.ArgumentParser) -> None:
    """Which data, and which part of it."""
    command.add_argument("--data", required=True, type=path, metavar="DATA", help="see above")
    command.add_argument("--split", choices=("train", "val", "test"), help=SPLIT_HELP)
    command.add_argument("--only", metavar="REGEX", help=ONLY_HELP)


def add_device_options(
    command: argparse.ArgumentParser, batch_size: int, workers: bool = False
) -> None:
    """How many at a time, on which device, and `workers` that decode them."""
    command.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="B",
        help=f"pictures at a time (default {batch_size})",
    )
    command.add_argument("--device", help="cpu, cuda, … (default: CUDA where there is one)")
    if workers:
        command.add_argument(
            "--workers", type=int, metavar="N", help="processes that decode pictures"
        )
