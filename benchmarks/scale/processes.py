"""Rows per code and their sums over several processes of one thread each, joined by gloo.

The rows are dealt out; every process adds up its own and all of them share the result, as the EMA
update of a data-parallel training does. The time is that of the slowest process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.isolated import Together
from benchmarks.ops import code_statistics, nearest_code
from benchmarks.suites import Context, Prepared, WrongResult
from fastvq import ops
from fastvq.nn.processes import summed
from fastvq.reference import code_statistics as reference

_WORLDS = sorted({1, 2, min(8, os.cpu_count() or 1)})
CASES = {
    "cpu": [
        {"N": n, "K": k, "D": d, "processes": world}
        for n, k, d in ((262144, 512, 64), (32768, 8192, 256))
        for world in _WORLDS
    ],
    "cuda": [],
}
QUICK_CASES = [{"N": 1024, "K": 64, "D": 16, "processes": 2}]
_WAYS = {"fastvq": "kernel", "index_add_": "index_add", "fastvq, all-reduce alone": "nothing"}


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, _ = nearest_code.inputs(case, "cpu")
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(case["K"], (case["N"],), generator=generator)
    counts, sums = reference.code_statistics(x, indices, case["K"])
    exact = torch.cat([counts[:, None], sums], dim=1)
    prepared = Prepared(code_statistics.work(case))

    def start(way: str) -> Together:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        world = case["processes"]
        parts = [
            {
                "x": x[rank::world].numpy(),
                "indices": indices[rank::world].numpy(),
                "setting": np.array([rank, world, port, case["K"]]),
            }
            for rank in range(world)
        ]
        run = Together(f"benchmarks.scale.processes:{way}", parts, 1)
        if way != "nothing":
            got = torch.from_numpy(run.result())
            torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-2)
        return run

    try:
        prepared.candidates["fastvq"] = start("kernel")
    except AssertionError as error:
        raise WrongResult(f"the shared sums: {str(error).splitlines()[0]}") from error
    for name, way in _WAYS.items():
        if name != "fastvq":
            prepared.rival(name, lambda way=way: start(way))
    return prepared


def kernel(arrays: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    return _joined(arrays, threads, ops.code_statistics)


def index_add(arrays: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    return _joined(arrays, threads, code_statistics.index_add)


def nothing(arrays: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    """What is shared, without its making."""
    x = torch.from_numpy(arrays["x"])
    made = (
        torch.zeros(int(arrays["setting"][3])),
        torch.zeros(int(arrays["setting"][3]), x.shape[1]),
    )
    return _joined(arrays, threads, lambda *_: made)


def _joined(
    arrays: dict[str, np.ndarray],
    threads: int,
    statistics: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[], np.ndarray]:
    torch.set_num_threads(threads)
    rank, world, port, num_codes = map(int, arrays["setting"])
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    x, indices = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["indices"])

    def run() -> np.ndarray:
        counts, sums = statistics(x, indices, num_codes)
        counts, sums = summed(counts[None], sums[None], shared=True)
        return torch.cat([counts[0][:, None], sums[0]], dim=1).numpy()

    return run
