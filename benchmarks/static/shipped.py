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
from typing import Any
from unittest import mock

import torch

from benchmarks.static.compile import Launch, MachineCode, compile_launch, record_launches
from benchmarks.static.masked_conv2d import Product, shipped_launches
from benchmarks.static.sass import Search

ARCHITECTURES = (80, 90, 100)
# Channels at which the plain search is compiled, per compute capability: each shipped entry of its
# tiles at least once. At the second table's, the kernels before and after it as well.
SEARCHED = {80: (16, 128, 512), 90: (8, 64, 128, 256, 512), 100: (16, 256, 512)}
PREPARED = {80: (512,), 90: (8, 256), 100: (16,)}


@dataclasses.dataclass(frozen=True)
class Model:
    """What the predicted time needs beside the main loop.

    Attributes:
        channels: of the rows searched.
        rows: per warp, for the instructions outside the loop.
        group: codes that are scored again per row.
        block_rows: rows that share one reading of the codes from L2.
        hidden: share of the shorter pipe's work that other warps hide; None: read the loop.
    """

    channels: int
    rows: int
    group: int
    block_rows: int
    hidden: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel in one shipped configuration on one architecture; `search` if it scores."""

    name: str
    capability: int
    launch: Launch
    search: Search | None = None
    model: Model | None = None
    product: Product | None = None

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
    model: Model | None
    product: Product | None
    code: MachineCode


@functools.cache
def cases() -> tuple[Case, ...]:
    return (
        *_nearest_code_cases(),
        *_hopper_cases(),
        *_sums_cases(),
        *_row_cases(),
        *_sampling_cases(),
        *masked_conv2d_cases(),
    )


def _nearest_code_cases() -> Iterator[Case]:
    """The plain search in every shipped configuration; its other kernels narrow and wide."""
    from fastvq.kernels.triton.nearest_code import nearest_code_forward
    from fastvq.kernels.triton.nearest_code_tiles import choose_tiles

    for capability, widths in SEARCHED.items():
        for channels in widths:
            tiles = choose_tiles(channels, divmod(capability, 10))
            with record_launches() as launches:
                nearest_code_forward(
                    torch.empty(1, 1000, channels),
                    torch.empty(1, 8192, channels),
                    metric="l2",
                    tiles=tiles,
                )
            search = Search(
                products=tiles.width(channels),
                warp_pairs=tiles.block_n * tiles.block_k * (1 + tiles.paired) // tiles.warps,
                chunks=-(-tiles.width(channels) // tiles.chunk),
                tcgen05_products=min(128, tiles.block_n) * tiles.block_k * 16 // tiles.warps,
            )
            model = Model(channels, tiles.block_n // tiles.warps, tiles.group, tiles.block_n)
            for launch in launches:
                name = launch.name.removeprefix("nearest_code_").removesuffix("_kernel")
                if name == "search":
                    yield Case(f"search D{channels}", capability, launch, search, model)
                elif channels in PREPARED[capability]:
                    yield Case(f"{name} D{channels}", capability, on_device(launch))


def on_device(launch: Launch) -> Launch:
    """The launch without what a launcher does differently for CPU tensors (the interpreter)."""
    if "INTERPRETED" not in launch.keywords:
        return launch
    return dataclasses.replace(launch, keywords={**launch.keywords, "INTERPRETED": False})


_RESIDENT = {(32, False), (64, True)}


def _hopper_cases() -> Iterator[Case]:
    from fastvq.kernels.triton import nearest_code_hopper as hopper

    for (width, has_norms), tiling in hopper.TILINGS.items():
        rows = torch.empty(1000, width, dtype=torch.float16)
        ratio = torch.empty(1000) if has_norms else None
        results = (torch.empty(1000, dtype=torch.int32), torch.empty(1000), torch.empty(1000))
        # The resident form differs in its loops' ends alone: two widths stand for all.
        for is_resident in (False, True) if (width, has_norms) in _RESIDENT else (False,):
            stages = tiling.stages + (not is_resident)
            codes = torch.empty(stages * tiling.stage_codes, width, dtype=torch.float16)
            norms = torch.empty(codes.shape[0]) if has_norms else None
            with record_launches() as launches:
                hopper.nearest_slot_hopper(rows, codes, ratio, norms, results, 132)
            search = Search(
                products=width,
                warp_pairs=tiling.rows // 4 * tiling.stage_codes,
            )
            model = Model(
                # One term; or three terms and the norm's columns, then the widest power of two.
                channels=width if has_norms else 1 << ((width - 4) // 3).bit_length() - 1,
                rows=tiling.rows // 4,
                group=tiling.group,
                block_rows=hopper.CONSUMERS.value * tiling.rows,
                # Assumed, not measured: one warpgroup folds under the other's products.
                hidden=0.93 if tiling.row_state else 1.0,
            )
            name = f"hopper W{width}{' norms' if has_norms else ''}"
            yield Case(name + " resident" * is_resident, 90, launches[0], search, model)


def _sums_cases() -> Iterator[Case]:
    """The sums by code and the codebook's gradient, for a narrow and a wide row."""
    from fastvq.kernels.triton.code_statistics import code_statistics_forward, codebook_gradient

    for channels in (8, 256):
        x, codebook = torch.empty(8192, channels), torch.empty(512, channels)
        indices = torch.zeros(len(x), dtype=torch.int64)
        with record_launches() as launches:
            code_statistics_forward(x, indices, len(codebook))
            codebook_gradient(x[:, 0], x, codebook, indices)
        # The levels above the first are launches of one kernel: one stands for all.
        for launch in {_kind(launch): launch for launch in launches}.values():
            name = f"sums {' '.join(_kind(launch))} D{channels}"
            for capability in ARCHITECTURES:
                yield Case(name, capability, launch)


def _kind(launch: Launch) -> tuple[str, ...]:
    name = launch.name.removeprefix("_").removesuffix("_kernel")
    kind = launch.keywords.get("KIND")
    return (name,) if kind is None else (name, kind)


def _row_cases() -> Iterator[Case]:
    """The quantizer's epilogue and gradient, the residual's update and sum."""
    from fastvq.kernels.triton.residual_quantize import subtract_codes, sum_of_codes
    from fastvq.kernels.triton.vector_quantize import (
        vector_quantize_backward_x,
        vector_quantize_forward,
    )

    for channels in (8, 256):
        x, codebook = torch.empty(8192, channels), torch.empty(512, channels)
        indices = torch.zeros(len(x), dtype=torch.int64)
        mask = torch.ones(len(x), dtype=torch.bool)
        with record_launches() as launches:
            vector_quantize_forward(x, codebook, mask, indices)
            for gradient in ("straight_through", "rotation"):
                vector_quantize_backward_x(x, x[:, 0], x, codebook, indices, gradient)
            subtract_codes(x, codebook, indices, x)
            sum_of_codes(codebook[None], indices[:, None])
        for launch in launches:
            name = launch.name.removeprefix("_").removesuffix("_kernel")
            name += " rotation" if launch.keywords.get("ROTATION") else ""
            for capability in ARCHITECTURES:
                yield Case(f"rows {name} D{channels}", capability, launch)


def _sampling_cases() -> Iterator[Case]:
    """The kernels of one code of a prior: one sample and many, both kinds of weights, the rules."""
    from fastvq.sampling.draw import Filter
    from fastvq.sampling.gpu_rows import MOST_CODES

    for samples, dtype in ((1, torch.float32), (64, torch.float32), (64, torch.bfloat16)):
        for kind, launch in _sampling_launches(samples, dtype, Filter()).items():
            # Without a residual, a product is the one with it less a load.
            if not kind.startswith("product") or kind == "product plain":
                continue
            name = f"sampling {kind} n{samples} {str(dtype).removeprefix('torch.')}"
            for capability in (80, 90, 100) if kind in _SAMPLING_EVERYWHERE else (90,):
                yield Case(name, capability, on_device(launch))
    both = Filter(1.0, 100, 0.9)
    rules = {"draw": Filter(), "draw greedy": Filter(0.0), "draw top-k and top-p": both}
    for name, rule in rules.items():
        launches = _sampling_launches(2, torch.float32, rule)
        for capability in (80, 90, 100) if rule is both else (90,):
            yield Case(f"sampling {name} K512", capability, launches["draw_code"])
            if rule is both:
                yield Case("sampling attention", capability, launches["attend"])
    widest = _sampling_launches(2, torch.float32, both, MOST_CODES)["draw_code"]
    yield Case(f"sampling draw top-k and top-p K{MOST_CODES}", 90, widest)


# The widest product, of two accumulators, and the one that writes to two places.
_SAMPLING_EVERYWHERE = ("product gated", "product query")


def _sampling_launches(
    samples: int, dtype: torch.dtype, rule: tuple[Any, ...], num_codes: int = 512
) -> dict[str, Launch]:
    """One launch of each kind for one code of a prior of two gated layers and attention."""
    from fastvq.models.pixelcnn import PixelCNN
    from fastvq.sampling import Conditioning, make_request
    from fastvq.sampling.gpu_rows import GpuMapExecutor, one_by_one

    prior = PixelCNN(num_codes, 256, 1, 5, attention_every=1)
    temperature, top_k, top_p = rule
    request = make_request(
        (1, 1),
        samples,
        num_codes=num_codes,
        device=torch.device("cpu"),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=0,
    )
    with torch.no_grad():
        executor = GpuMapExecutor(
            prior._plan(),
            Conditioning(None, None),
            request,
            weights_dtype=dtype,
            launcher=one_by_one,
        )
        with record_launches() as launches:
            executor.draw(torch.full((samples, 1, 1), -1))
    return {_sampling_kind(launch): launch for launch in launches}


def _sampling_kind(launch: Launch) -> str:
    name = launch.name.removeprefix("_").removesuffix("_kernel")
    if name != "row_product":
        return name
    found = launch.keywords
    kinds = {"GATED": "gated", "HAS_RESIDUAL": "residual", "HEAD": "query", "RECTIFIED": "head"}
    return "product " + next((kind for key, kind in kinds.items() if found[key]), "plain")


def masked_conv2d_cases() -> Iterator[Case]:
    """Masked convolutions both ways, and the gated layer's kernels."""
    for name, capability, launch, product in shipped_launches():
        yield Case(name, capability, on_device(launch), product=product)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What compiled, in the order of `cases()`, and the error of each (name, capability) that did
    not."""

    examined: list[Examined]
    failures: dict[tuple[str, int], str]


def examine(keys: Iterable[tuple[str, int]] | None = None, workers: int = 2) -> Outcome:
    """Compile cases in a pool of processes.

    Args:
        keys: (name, capability) of the wanted; default all.
        workers: processes at once; each takes about 1 GB.
    """
    # TRITON_INTERPRET decides at import what a kernel is: workers must import without it.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool,
    ):
        wanted = list(pool.submit(_keys).result() if keys is None else keys)
        outcomes = list(pool.map(_examine, wanted))
    return Outcome(
        [outcome for outcome in outcomes if isinstance(outcome, Examined)],
        {key: error for key, error in zip(wanted, outcomes) if isinstance(error, str)},
    )


def _keys() -> list[tuple[str, int]]:
    return [case.key for case in cases()]


def _examine(key: tuple[str, int]) -> Examined | str:
    torch.set_num_threads(1)
    case = {case.key: case for case in cases()}[key]
    try:
        code = compile_launch(case.launch, case.capability)
    except Exception as error:  # Triton's and the assembler's have no common class
        return f"{type(error).__name__}: {error}"
    return Examined(
        *(case.name, case.launch.name, case.capability),
        *(case.search, case.model, case.product, code),
    )
