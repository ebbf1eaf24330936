"""Which kernels the library ships, in which configurations, and their machine code.

A case is one launch that a launcher makes, on one architecture. Adding a kernel means adding the
function that launches it here; what must hold of it is asserted in
`tests/kernels/triton/test_machine_code.py`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from unittest import mock

import torch

from benchmarks.static.compile import Launch, MachineCode, compile_launch, record_launches


@dataclasses.dataclass(frozen=True)
class Search:
    """What one trip through the main loop of a search computes.

    Attributes:
        products: multiply-adds per pair: the width of the operands.
        warp_pairs: scores per warp and trip.
        rows: per warp, for the instructions outside the loop.
        group: codes that are scored again per row.
        hidden: share of the shorter pipe's work that other warpgroups hide; None: read the loop.
    """

    products: int
    warp_pairs: int
    rows: int
    group: int
    hidden: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    capability: int
    launch: Launch
    search: Search | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.capability


@dataclasses.dataclass(frozen=True)
class Examined:
    """A case compiled."""

    name: str
    kernel: str
    capability: int
    search: Search | None
    code: MachineCode


@functools.cache
def cases() -> tuple[Case, ...]:
    return tuple(_hopper_cases())


def _hopper_cases() -> Iterator[Case]:
    from fastvq.kernels.triton import nearest_code_hopper as hopper

    for (width, has_norms), tiling in hopper.TILINGS.items():
        rows = torch.empty(1000, width, dtype=torch.float16)
        ratio = torch.empty(1000) if has_norms else None
        for is_resident in (False, True) if not tiling.row_state else (False,):
            stages = tiling.stages + (not is_resident)
            codes = torch.empty(stages * tiling.stage_codes, width, dtype=torch.float16)
            norms = torch.empty(codes.shape[0]) if has_norms else None
            with record_launches() as launches:
                hopper.nearest_slot_hopper(rows, codes, ratio, norms, 132)
            search = Search(
                products=width,
                warp_pairs=tiling.rows // 4 * tiling.stage_codes,
                rows=tiling.rows // 4,
                group=tiling.group,
                # Model, not measurement: with one warpgroup's fold under the other's products.
                hidden=0.93 if tiling.row_state else 1.0,
            )
            name = f"hopper W{width}{' norms' if has_norms else ''}"
            name += " resident" if is_resident else ""
            yield Case(name, 90, launches[0], search)


def examine(keys: Iterable[tuple[str, int]] | None = None, workers: int = 2) -> list[Examined]:
    """Compile cases in a pool of processes.

    Args:
        keys: (name, capability) of the wanted; default all.
        workers: processes at once; each takes about 1 GB.
    Returns:
        In the order of `cases()`.
    """
    # TRITON_INTERPRET decides at import what a kernel is: workers must import without it.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool,
    ):
        wanted = list(pool.submit(_keys).result() if keys is None else keys)
        return list(pool.map(_examine, wanted))


def _keys() -> list[tuple[str, int]]:
    return [case.key for case in cases()]


def _examine(key: tuple[str, int]) -> Examined:
    torch.set_num_threads(1)
    case = {case.key: case for case in cases()}[key]
    code = compile_launch(case.launch, case.capability)
    return Examined(case.name, case.launch.name, case.capability, case.search, code)
