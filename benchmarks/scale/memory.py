"""Peak memory of the search as K grows, each candidate in a process of its own.

The peak is resident memory above what the process held with its library and the inputs. A rival
whose N×K matrices would exceed the budget is left out, and so the largest K with a time is the
largest problem that fits into the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.isolated import Isolated
from benchmarks.ops import nearest_code
from benchmarks.suites import Context, Prepared, WrongResult
from fastvq import ops
from fastvq.reference import nearest_code as reference

BUDGET_BYTES = 2**31
_ROWS, _CHANNELS = 16384, 16
CASES = {
    "cpu": [{"N": _ROWS, "K": 4**power, "D": _CHANNELS} for power in range(4, 11)],
    "cuda": [],
}
QUICK_CASES = [{"N": 1024, "K": 256, "D": _CHANNELS}]
# Rows that are compared with the reference: float64 distances of all would take minutes.
_CHECKED_ROWS = 256
# N×K float32 matrices that a candidate holds at once, and where it is prepared.
_CANDIDATES = {
    "fastvq": (0, "benchmarks.scale.memory:fastvq"),
    "FAISS IndexFlatL2": (0, "benchmarks.rivals.search:faiss"),
    "torch.cdist + argmin": (2, "benchmarks.scale.memory:cdist"),
    "vector-quantize-pytorch, eval": (6, "benchmarks.scale.memory:lucidrains"),
}


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, codebook = nearest_code.inputs(case, context.device)
    exact = reference.nearest_code(x[:_CHECKED_ROWS], codebook)[0]
    if not torch.equal(ops.nearest_code(x, codebook)[:_CHECKED_ROWS], exact):
        raise WrongResult(f"fastvq's index is not exact at {case}: no time is reported")
    prepared = Prepared(nearest_code.work(case, context.device))
    arrays = {"x": x.numpy(), "codebook": codebook.numpy()}

    def start(name: str) -> Isolated:
        matrices, function = _CANDIDATES[name]
        needed = 4 * matrices * case["N"] * case["K"]
        if needed > BUDGET_BYTES:
            gibibytes = f"{needed / 2**30:.0f} GiB, the budget is {BUDGET_BYTES / 2**30:.0f}"
            raise MemoryError(f"N×K matrices of {gibibytes}")
        run = Isolated(function, arrays, context.threads)
        misses = int((torch.as_tensor(run.result())[:_CHECKED_ROWS] != exact).sum())
        if misses > 0.05 * _CHECKED_ROWS:
            run.close()
            raise RuntimeError(f"{misses} of {_CHECKED_ROWS} rows differ from the exact index")
        return run

    for name in _CANDIDATES:
        prepared.rival(name, lambda name=name: start(name))
    return prepared


def fastvq(arrays: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    x, codebook = _tensors(arrays, threads)
    return lambda: ops.nearest_code(x, codebook).numpy()


def cdist(arrays: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    run: Any = nearest_code.cdist(*_tensors(arrays, threads))
    return lambda: run().numpy()


def lucidrains(arrays: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    run: Any = nearest_code.lucidrains(*_tensors(arrays, threads))
    return lambda: run()[1].numpy()


def _tensors(arrays: dict[str, np.ndarray], threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.set_num_threads(threads)
    return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["codebook"])
