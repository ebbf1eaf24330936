"""`python -m benchmarks.gpu`: see the package."""

from __future__ import annotations

import argparse
import sys

import torch

from . import parts, runner


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Run the CUDA tests and benchmarks, part by part; a second call goes on where "
        "the first was cut off. Exit status: 0 all parts passed, 1 a part failed, 2 no CUDA "
        "device, 3 the time was spent before the last part.",
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="run these alone, and again")
    parser.add_argument("--seconds", type=float, default=480.0, help="of the whole call")
    parser.add_argument("--list", action="store_true", help="name the parts and their limits")
    arguments = parser.parse_args()
    known = parts.all_parts()
    names = [part.name for part in known]
    unknown = [name for name in arguments.parts if name not in names]
    if unknown:
        parser.error(f"part must be one of {', '.join(names)}; got {unknown[0]!r}")
    if arguments.list:
        for part in known:
            print(f"{part.name:<24} at most {part.limit:.0f} s")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device; nothing was run.", file=sys.stderr)
        return 2
    chosen = [part for part in known if not arguments.parts or part.name in arguments.parts]
    return runner.run(chosen, seconds=arguments.seconds, again=bool(arguments.parts))


if __name__ == "__main__":
    sys.exit(main())
