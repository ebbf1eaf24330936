"""The command line: `fastvq <command>`, also `python -m fastvq`.

Lives here: how a command is called, and how an error or an interruption ends. `commands.py` lists
the commands; a file has the options of one and what it calls. The work itself is in `fastvq.train`,
imported once the options are known.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from .commands import parser

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
            arguments.perform(arguments)
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
