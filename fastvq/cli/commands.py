"""The commands of `fastvq`, and the parser that knows them all."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from fastvq.version import __version__

from .classifiers import add_classify, add_train_classifier
from .codes import add_encode
from .demo import add_demo
from .detection import add_detect
from .evaluation import add_evaluate
from .machine import add_bench, add_info
from .priors import add_train_prior
from .reconstruction import add_reconstruct
from .sampling import add_sample
from .training import add_train


class _Parser(argparse.ArgumentParser):
    """Ends with one line on a wrong option."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. Try {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of `fastvq`; what it returns has the `command`, what can `perform`
    it, and the `extras` that needs."""
    root = _Parser(
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
