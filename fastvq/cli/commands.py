"""The commands of `fastvq`, and the parser that knows them all."""

from __future__ import annotations

import argparse

from fastvq.version import __version__

from .classifiers import add_classify, add_train_classifier
from .codes import add_encode
from .demo import add_demo
from .detection import add_detect
from .evaluation import add_evaluate
from .machine import add_bench, add_info
from .options import OneLineParser
from .priors import add_train_prior
from .reconstruction import add_reconstruct
from .sampling import add_sample
from .training import add_train


def parser() -> argparse.ArgumentParser:
    """The parser of `fastvq`; what it parses has `command`, `perform`, and the `extras` needed."""
    root = OneLineParser(
        prog="fastvq",
        description="Train VAE, VQ-VAE and VQ-VAE-2 models and the priors over their codes, and "
        "draw new pictures.",
        epilog="fastvq <command> --help says more. FASTVQ_DEBUG=1 shows the traceback of an error.",
    )
    root.add_argument("--version", action="version", version=f"fastvq {__version__}")
    commands = root.add_subparsers(dest="command", metavar="<command>", required=True)
    for add in (
        add_demo,
        add_train,
        add_encode,
        add_train_prior,
        add_train_classifier,
        add_sample,
        add_reconstruct,
        add_detect,
        add_evaluate,
        add_classify,
        add_info,
        add_bench,
    ):
        add(commands)
    return root
