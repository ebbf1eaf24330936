"""`fastvq train`: the first stage, on pictures, sounds or text."""

from __future__ import annotations

import argparse
from typing import Any

from .asked import given_fields, require_options, resumed, say_where
from .options import (
    ABSENT,
    CLASS_PATTERN_HELP,
    DATA,
    ONLY_HELP,
    SPLIT_HELP,
    add_command,
    add_model_options,
    add_training_options,
    path,
)

MODEL_FLAGS = {
    "levels": "levels of codes, top to bottom; only vqvae2 (default 2)",
    "num_codes": "codes in each level's codebook (default 512)",
    "hidden_channels": "width of encoder and decoder (default 128; vae 32)",
    "code_dim": "channels of a code (default 64)",
    "downsample": "pixels per bottom code, along each side; a power of two (default 4)",
    "latent_dim": "size of the latent; only vae (default 32)",
    "length": "text: bytes of a line, its end included; longer ones are left out (default 128)",
}


def add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        _train,
        "train a VAE, VQ-VAE or VQ-VAE-2 on pictures",
        "Trains the first stage: pictures to a latent or to codes, and back. Writes settings,\n"
        "metrics, checkpoints and pictures into one run folder. Kill it at any moment: --resume\n"
        f"goes on to the same weights as an unbroken run.\n\n{DATA}",
        "fastvq train --model vqvae2 --data photos.zip --image-size 256 --run runs/photos\n"
        "fastvq train --run runs/photos --resume --steps 20000",
    )
    own = command.add_argument_group("model and data")
    own.add_argument("--model", choices=("vae", "vqvae", "vqvae2"), help="what to train", **ABSENT)
    own.add_argument("--data", type=path, metavar="DATA", help="see above", **ABSENT)
    own.add_argument("--split", choices=("train", "val", "test"), help=SPLIT_HELP, **ABSENT)
    own.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="resize and centre-crop to squares of this side (default: as the first picture is)",
        **ABSENT,
    )
    own.add_argument(
        "--channels", type=int, choices=(1, 3), help="grey or RGB (default: the data's)", **ABSENT
    )
    own.add_argument(
        "--flip", action="store_true", help="mirror pictures left to right at random", **ABSENT
    )
    own.add_argument("--only", metavar="REGEX", help=ONLY_HELP, **ABSENT)
    own.add_argument("--class-pattern", metavar="REGEX", help=CLASS_PATTERN_HELP, **ABSENT)
    own.add_argument(
        "--sample-rate",
        type=int,
        metavar="HZ",
        help="sounds: resample to this rate (default: that of the first file)",
        **ABSENT,
    )
    own.add_argument(
        "--clip-seconds",
        type=float,
        metavar="S",
        help="sounds: length of the clips; longer sounds are cut, shorter ones set among zeros, at "
        "a place drawn anew in training (default 1)",
        **ABSENT,
    )
    own.add_argument(
        "--peak",
        type=float,
        metavar="LEVEL",
        help="sounds: scale each to this peak, such as 0.9 (default: leave its loudness)",
        **ABSENT,
    )
    own.add_argument(
        "--strict", action="store_true", help="refuse a broken file, not skip it", **ABSENT
    )
    own.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode pictures, 0 for none (default: as many as help)",
        **ABSENT,
    )
    own.add_argument("--preset", help="a named vqvae2 configuration, such as laptop-256", **ABSENT)
    own.add_argument(
        "--binarise",
        action=argparse.BooleanOptionalAction,
        help="vae: draw each pixel as 0 or 1, its value being the probability (default: where the "
        "likelihood is Bernoulli, as it is for grey pictures)",
        **ABSENT,
    )
    add_training_options(command)
    add_model_options(command, MODEL_FLAGS)


def _train(arguments: argparse.Namespace) -> None:
    from fastvq.train.stage1 import Stage1Config, train_stage1

    if _is_text_run(arguments):
        _train_text(arguments)
        return
    given = given_fields(arguments, Stage1Config, MODEL_FLAGS)
    if arguments.resume:
        config = resumed(Stage1Config, arguments.run, given, ("vae", "vqvae", "vqvae2"))
    else:
        require_options(given, "model", "data")
        config = Stage1Config(**given)
    path = train_stage1(config, resume=arguments.resume)
    say_where(path, "fastvq reconstruct shows what it keeps of the data")


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

    given = given_fields(arguments, TextConfig, MODEL_FLAGS)
    others = given_fields(arguments, Stage1Config, {}).keys() - given.keys() - {"model_arguments"}
    if others:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(others))
        raise ValueError(f"{names} must be left out for text.")
    if arguments.resume:
        config = resumed(TextConfig, arguments.run, given, ("text-vae", "text-vqvae"))
    else:
        require_options(given, "model", "data")
        config = TextConfig(**given)
    path = train_text(config, resume=arguments.resume)
    say_where(path, "fastvq reconstruct shows what it keeps of the lines")
