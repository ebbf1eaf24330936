"""`fastvq demo`: the whole pipeline."""

from __future__ import annotations

import argparse
from typing import Any

from .asked import picked
from .options import add_command


def add_demo(commands: Any) -> None:
    command = add_command(
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


def _demo(arguments: argparse.Namespace) -> None:
    from fastvq.train.demo import run_demo

    run_demo(arguments.out, **picked(arguments, "seed", "quick", "overwrite"))
