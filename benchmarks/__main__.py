"""`python -m benchmarks [suite ...]`: see the package."""

from __future__ import annotations

import argparse

import torch

from .suites import SUITES, Context, run_suite


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check fastvq and its rivals on the same inputs, then time them in turn. "
        "Records are appended to benchmarks/results/.",
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of: {', '.join(SUITES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for every library")
    parser.add_argument("--cold", action="store_true", help="evict the caches before every run")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case, at least")
    parser.add_argument("--quick", action="store_true", help="one small case a suite, unrecorded")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"suite must be one of {', '.join(SUITES)}; got {unknown[0]!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    torch.set_num_threads(arguments.threads)
    seconds = 0.1 if arguments.quick else arguments.seconds
    context = Context(arguments.device, arguments.threads, arguments.cold, seconds)
    for name in arguments.suites or SUITES:
        run_suite(
            name,
            context,
            quick=arguments.quick,
            record=not (arguments.quick or arguments.no_record),
        )


if __name__ == "__main__":
    main()
