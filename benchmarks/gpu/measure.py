"""The measuring parts of a GPU run: `python -m benchmarks.gpu.measure search S1`, or a suite.

Every number is checked before it is timed: by the suites for the sizes S1 … S5, here for the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import running, suites
from benchmarks.timing import Timing, interleaved
from fastvq import ops
from fastvq.reference import nearest_code as reference

from .parts import SIZES
from .runner import write_result

_SUITE = {"search": "nearest_code", "step": "vector_quantize", "sums": "code_statistics"}
_SECONDS = 0.5
_TUNING_SECONDS = 45.0


def main() -> int:
    """Exit status: 0; 1 where a check was red."""
    what, *size = sys.argv[1:]
    if what in ("adversarial", "hopper", "rates", "tuning"):
        functions = {"adversarial": adversarial, "hopper": hopper, "rates": rates, "tuning": tuning}
        write_result(functions[what]())
        return 0
    suite = _SUITE.get(what, what)
    cases = [_time_case(suite, case) for case in _cases(suite, *size)]
    write_result({"cases": cases})
    return 1 if any("red" in case for case in cases) else 0


def _cases(suite: str, size: str | None = None) -> list[dict[str, Any]]:
    """The suite's cases, or those of one size; the sums have one for each skew."""
    wanted = SIZES[size].items() if size else ()
    return [case for case in suites.load(suite).CASES["cuda"] if set(wanted) <= set(case.items())]


def _time_case(suite: str, case: dict[str, Any]) -> dict[str, Any]:
    result = running.time_case(suite, case, suites.Context(device="cuda", seconds=_SECONDS))
    print(running.table(result), flush=True)
    return result


def _as_dicts(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: timing._asdict() for name, timing in timings.items()}


def adversarial() -> dict[str, Any]:
    """The search on data made to defeat its bound, beside random data of that size."""
    cases = []
    for n, k, d in ((131072, 512, 64), (262144, 4096, 8), (16384, 8192, 256)):
        data = _adversaries(n, k, d)
        for name, (x, codebook) in data.items():
            if not torch.equal(
                ops.nearest_code(x, codebook), reference.nearest_code(x, codebook)[0]
            ):
                raise RuntimeError(f"the index of {name} is not exact at N={n} K={k} D={d}")
        runs = {name: _search(*pair) for name, pair in data.items()}
        timings = interleaved(runs, device="cuda", seconds=_SECONDS)
        ratios = {name: timing.p50 / timings["random"].p50 for name, timing in timings.items()}
        print(f"N={n} K={k} D={d}: times random data's: {ratios}", flush=True)
        case = {"N": n, "K": k, "D": d}
        cases.append({"case": case, "timings": _as_dicts(timings), "ratios": ratios})
    return {"cases": cases, "unit": "ms"}


def _search(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    return lambda: ops.nearest_code(x, codebook)


def _adversaries(n: int, k: int, d: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).cuda()
    codebook = torch.randn(k, d, generator=generator).cuda()
    close = codebook[torch.arange(k) // 8 * 8] * (
        1 + 2.0**-22 * torch.randn(k, 1, generator=generator).cuda()
    )
    scales = 10.0 ** torch.randint(-12, 13, (n, 1), generator=generator).cuda()
    return {
        "random": (x, codebook),
        "near-duplicate codes": (x, close),
        "collapsed codebook": (x, codebook[:1].expand(k, d).contiguous()),
        "nearly collapsed codebook": (x, codebook[:1] + 1e-5 * codebook),
        "offset 1e4": (x + 1e4, codebook + 1e4),
        "rows of mixed magnitude": (x * scales, codebook),
        "denormal": (x * 2.0**-140, codebook * 2.0**-140),
        "near the limit of float32": (x * 2.0**124, codebook * 2.0**124),
        "rows are codes": (codebook[torch.arange(n) % k], codebook),
    }


def hopper() -> dict[str, Any]:
    """The opt-in kernels for Hopper beside the plain ones; equal indices, or no time."""
    from fastvq.kernels.triton import nearest_code_hopper

    cases = []
    for size, case in SIZES.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(case["N"], case["D"], generator=generator).cuda()
        codebook = torch.randn(case["K"], case["D"], generator=generator).cuda()
        plain, opt_in = _with_hopper("0", x, codebook), _with_hopper("1", x, codebook)
        fast_pass = nearest_code_hopper.nearest_slot_hopper
        with mock.patch.object(nearest_code_hopper, "nearest_slot_hopper", wraps=fast_pass) as spy:
            indices = opt_in()
        if not spy.called:
            raise RuntimeError(f"{size}: the search did not take the Hopper kernels")
        if not torch.equal(plain(), indices):
            raise RuntimeError(f"{size}: the Hopper kernels' index differs from the plain kernel's")
        timings = interleaved({"plain": plain, "hopper": opt_in}, device="cuda", seconds=_SECONDS)
        print(f"{size}: {_as_dicts(timings)}", flush=True)
        cases.append({"case": case, "timings": _as_dicts(timings)})
    return {"cases": cases, "unit": "ms"}


def _with_hopper(value: str, x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        os.environ["FASTVQ_HOPPER_KERNELS"] = value
        return ops.nearest_code(x, codebook)

    return run


def tuning() -> dict[str, Any]:
    """The search's tiles one change away from the shipped, with provenance."""
    from .tuning import tune

    return tune(SIZES, _TUNING_SECONDS)


def rates() -> dict[str, Any]:
    from .instruction_rates import measure

    return measure()


if __name__ == "__main__":
    sys.exit(main())
