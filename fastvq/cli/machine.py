"""`fastvq info` and `fastvq bench`: what this machine has, and how fast it is."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from .options import add_command


def add_info(commands: Any) -> None:
    add_command(
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


def _info(arguments: argparse.Namespace) -> None:
    from fastvq.train.environment import report

    print(report())


def add_bench(commands: Any) -> None:
    command = add_command(
        commands,
        "bench",
        _bench,
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


def _bench(arguments: argparse.Namespace) -> None:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise RuntimeError(
            "the suites must be there, and they are in the source checkout, not in an installed "
            "wheel. Clone the repository, pip install -e '.[bench]' in it, and run this again."
        )
    options = []
    for name, value in vars(arguments).items():
        if name not in ("command", "extras", "perform", "suites") and value not in (None, False):
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = [sys.executable, "-m", "benchmarks", *arguments.suites, *options]
    status = subprocess.run(command, cwd=checkout, check=False).returncode
    if status:
        sys.exit(status)  # said there
