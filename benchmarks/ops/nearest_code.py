"""The search alone: the nearest code of every row, against everything that finds nearest rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.isolated import Isolated, TimesItself
from benchmarks.suites import Context, Prepared, Work, WrongResult
from benchmarks.timing import quickest
from fastvq import ops
from fastvq.reference import nearest_code as reference

_CPU_SIZES = (
    *((32768, 512, 64), (16384, 8192, 256), (16384, 4096, 32)),
    *((65536, 1024, 8), (32768, 16384, 8), (64, 64, 16)),
)
_CUDA_SIZES = (
    *((131072, 512, 64), (131072, 8192, 256), (1048576, 1024, 8)),
    *((262144, 16384, 8), (65536, 65536, 128)),
)
CASES = {
    "cpu": [{"N": n, "K": k, "D": d} for n, k, d in _CPU_SIZES],
    "cuda": [{"N": n, "K": k, "D": d} for n, k, d in _CUDA_SIZES],
}
QUICK_CASES = [{"N": 4096, "K": 512, "D": 64}]

# A rival's index may differ where two codes are nearly as near; more than this is another function.
_MOST_MISSES = 0.05
# Rows per block of the search in blocks, of which the quickest on the case is taken.
_BLOCKS = (1024, 4096, 16384)


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, codebook = inputs(case, context.device)
    exact = reference.nearest_code(x, codebook)[0]
    if not torch.equal(ops.nearest_code(x, codebook), exact):
        raise WrongResult(f"fastvq's index is not exact at {case}: no time is reported")
    prepared = Prepared(work(case, context.device))
    prepared.candidates["fastvq"] = lambda: ops.nearest_code(x, codebook)
    prepared.notes["fastvq"] = "exact"
    for name, make in _rivals(context).items():
        prepared.rival(
            name,
            lambda name=name, make=make: checked(prepared, name, make(x, codebook), exact),
        )
    if context.device == "cpu":
        prepared.absent["flash-kmeans"] = "its kernels are for CUDA devices only"
    return prepared


def inputs(case: dict[str, Any], device: str) -> tuple[Tensor, Tensor]:
    """Standard normal rows and codes, float32, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case["N"], case["D"], generator=generator)
    codebook = torch.randn(case["K"], case["D"], generator=generator)
    return x.to(device), codebook.to(device)


def work(case: dict[str, Any], device: str) -> Work:
    """One product of rows and codes; rows and codes in, indices out."""
    n, k, d = case["N"], case["K"], case["D"]
    dtype = "float16" if device == "cuda" else "float32"
    return Work(2.0 * n * k * d, 4.0 * (n * d + k * d) + 8.0 * n, dtype)


def fits(x: Tensor, codebook: Tensor, matrices: int) -> None:
    """Raises where `matrices` float32 N×K matrices would take more than half of the memory."""
    needed = 4 * matrices * len(x) * len(codebook)
    if x.device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise MemoryError(f"N×K matrices of {needed / 2**30:.1f} GiB")


def checked(
    prepared: Prepared, name: str, run: Callable[[], Any], exact: Tensor
) -> Callable[[], object]:
    """The rival, with the number of its rows that are not the exact ones noted."""
    result = run.result() if isinstance(run, TimesItself) else run()
    misses = int((_as_indices(result).to(exact.device) != exact).sum())
    if misses > _MOST_MISSES * len(exact):
        raise RuntimeError(f"{misses} of {len(exact)} rows differ from the exact index")
    note = "exact" if misses == 0 else f"{misses} rows not exact"
    prepared.notes[name] = ", ".join(filter(None, [prepared.notes.get(name), note]))
    return run


def _as_indices(result: Any) -> Tensor:
    """A module gives (quantized, indices, loss), the others indices."""
    if isinstance(result, tuple):
        result = result[1]
    return torch.as_tensor(result).reshape(-1).long()


def _rivals(context: Context) -> dict[str, Callable[[Tensor, Tensor], Callable[[], object]]]:
    shared = {
        "torch.cdist + argmin": cdist,
        "torch.cdist + argmin, compiled": _cdist_compiled,
        "blocks of rows, compiled": _blocks_compiled,
        "vector-quantize-pytorch, eval": lucidrains,
    }
    if context.device == "cuda":
        return {**shared, "flash-kmeans": _flash_kmeans, "flash-kmeans, fp16": _flash_kmeans_fp16}
    alone = {
        "FAISS IndexFlatL2": "faiss",
        "scikit-learn argmin": "scikit_learn",
        "PyKeOps argmin": "keops",
    }
    return {**shared, **{name: _isolated(rival, context.threads) for name, rival in alone.items()}}


def _isolated(rival: str, threads: int) -> Callable[[Tensor, Tensor], Callable[[], object]]:
    return lambda x, codebook: Isolated(
        f"benchmarks.rivals.search:{rival}",
        {"x": x.numpy(), "codebook": codebook.numpy()},
        threads,
    )


def _search_by_cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(dim=1)


def cdist(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    fits(x, codebook, 2)
    return lambda: _search_by_cdist(x, codebook)


def _cdist_compiled(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    fits(x, codebook, 2)
    compiled = torch.compile(_search_by_cdist, dynamic=False)
    return lambda: compiled(x, codebook)


def _search_block(rows: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    return torch.addmm(half_norms, rows, codes, alpha=-1).argmin(dim=1)


def _blocks_compiled(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    """½‖c‖² − x·c over blocks of rows that stay in the cache: written first by who knows."""

    def search(block: Callable[..., Tensor], rows: int) -> Tensor:
        codes, half_norms = codebook.T, 0.5 * (codebook**2).sum(dim=1)
        return torch.cat([block(part, codes, half_norms) for part in x.split(rows)])

    sizes = {str(rows): rows for rows in _BLOCKS if rows <= len(x)} or {"all": len(x)}
    runs = {name: lambda rows=rows: search(_search_block, rows) for name, rows in sizes.items()}
    best = sizes[quickest(runs, x.device.type)]
    compiled = torch.compile(_search_block, dynamic=False)
    return lambda: search(compiled, best)


def lucidrains(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    from vector_quantize_pytorch import VectorQuantize

    fits(x, codebook, 4)
    module = VectorQuantize(x.shape[1], len(codebook)).to(x.device).eval()
    module._codebook.embed.data.copy_(codebook)

    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def _flash_kmeans(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    rows, codes = x[None], codebook[None]

    def run() -> object:
        return euclid_assign_triton(rows, codes, (rows.float() ** 2).sum(-1))

    return run


def _flash_kmeans_fp16(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    return _flash_kmeans(x.half(), codebook.half())
