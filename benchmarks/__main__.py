"""`python -m benchmarks [suite ...]`: see the package."""

from __future__ import annotations

import sys

import torch

from fastvq.cli.machine import add_bench_options
from fastvq.cli.options import OneLineParser

from .running import run_suite, waiting
from .suites import SUITES, Context, load, parse_case, summary


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 where a check was red; 2 for a wrong option."""
    parser = OneLineParser(
        prog="python -m benchmarks",
        description="Check fastvq and its rivals on the same inputs, then time them in turn. "
        "Records are appended to benchmarks/results/.",
    )
    add_bench_options(parser)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"suite must be one of {', '.join(SUITES)}; got {unknown[0]!r}")
    if arguments.list:
        for name in SUITES:
            print(f"{name:<18} {summary(name)}")
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    torch.set_num_threads(arguments.threads)
    seconds = min(0.1, arguments.seconds) if arguments.quick else arguments.seconds
    context = Context(arguments.device, arguments.threads, arguments.cold, seconds)
    try:
        wanted = parse_case(arguments.case) if arguments.case else {}
    except ValueError as error:
        parser.error(str(error))
    results = []
    for name in arguments.suites or SUITES:
        suite = load(name)
        known = suite.QUICK_CASES if arguments.quick else suite.CASES[arguments.device]
        cases = [case for case in known if wanted.items() <= case.items()]
        if not cases and wanted:
            parser.error(f"--case: {name} has no case with {wanted}; see CASES of {suite.__name__}")
        if arguments.resume:
            cases = waiting(name, cases, context)
        record = not (arguments.quick or arguments.no_record)
        results += run_suite(name, context, cases=cases, record=record)
    return 1 if any("red" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
