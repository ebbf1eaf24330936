"""`fastvq train-classifier` and `fastvq classify`: judges of pictures and of sounds."""

from __future__ import annotations

import argparse
from typing import Any

from .asked import picked
from .options import DATA, add_command, add_data_options, add_device_options


def add_train_classifier(commands: Any) -> None:
    command = add_command(
        commands,
        "train-classifier",
        _train_classifier,
        "a classifier that judges samples, for sample --keep-best",
        "Trains a small convolutional network on labelled pictures (a minute or two), says how it\n"
        f"reads a tenth that it has not seen, and saves it as safetensors.\n\n{DATA}",
        "fastvq train-classifier --data mnist --split train --out runs/digits-classifier\n"
        "fastvq sample --run runs/digits-prior --keep-best 0.25 "
        "--classifier runs/digits-classifier",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="where it goes")
    add_data_options(command)
    command.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the samples (default: as they are)",
    )
    command.add_argument("--steps", type=int, default=800, metavar="N", help="(default 800)")
    command.add_argument("--seed", type=int, default=0, help="0 or more (default 0)")
    add_device_options(command, batch_size=128)


def _train_classifier(arguments: argparse.Namespace) -> None:
    from fastvq.train.classifier import train_classifier
    from fastvq.train.processes import device_of

    trained = train_classifier(
        arguments.data,
        arguments.out,
        **picked(arguments, "split", "image_size", "steps", "batch_size", "seed"),
        device=device_of(arguments.device),
    )
    print(
        f"classifier: {trained.path} (reads {trained.accuracy:.2%} of {trained.held_out} held-out "
        "pictures right); fastvq sample --keep-best judges by it."
    )


def add_classify(commands: Any) -> None:
    command = add_command(
        commands,
        "classify",
        _classify,
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


def _classify(arguments: argparse.Namespace) -> None:
    from fastvq.train.sound_classifier import judge_sounds

    judged = judge_sounds(
        arguments.data,
        arguments.read,
        **picked(arguments, "class_pattern", "hold_out", "epochs", "seed"),
        seconds=arguments.clip_seconds,
    )
    print(f"a classifier trained on {judged.trained_on} real sounds reads")
    for read in judged.read:
        print(f"  {read.accuracy:6.1%} of {read.sounds} sounds of {read.name} as their class")
