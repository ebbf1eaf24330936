"""The search alone: fastvq against everything that finds nearest rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.suites import Context, Prepared
from fastvq import ops
from fastvq.reference import nearest_code as reference

_CPU_SIZES = (
    *((32768, 512, 64), (16384, 8192, 256), (16384, 4096, 32)),
    *((65536, 1024, 8), (32768, 16384, 8)),
)
_CUDA_SIZES = (
    *((131072, 512, 64), (131072, 8192, 256), (1048576, 1024, 8)),
    *((262144, 16384, 8), (65536, 65536, 128)),
)
CASES = {
    "cpu": [{"N": n, "K": k, "D": d} for n, k, d in _CPU_SIZES],
    "cuda": [{"N": n, "K": k, "D": d} for n, k, d in _CUDA_SIZES],
}
QUICK_CASES = [{"N": 512, "K": 64, "D": 16}]

# A rival's index may differ where two codes are nearly as near; more than this is another function.
_MOST_MISSES = 0.05


def prepare(case: dict[str, Any], context: Context) -> Prepared:
    x, codebook = inputs(case, context.device)
    exact = reference.nearest_code(x, codebook)[0]
    prepared = Prepared()
    ours = ops.nearest_code(x, codebook)
    if not torch.equal(ours, exact):
        raise RuntimeError(f"fastvq's index is not exact at {case}: no time is reported")
    prepared.candidates["fastvq"] = lambda: ops.nearest_code(x, codebook)
    prepared.notes["fastvq"] = "exact"

    for name, make in _rivals(context).items():

        def checked(name: str = name, make: Callable = make) -> Callable[[], object]:
            run = make(x, codebook)
            misses = int((_as_indices(run()).to(exact.device) != exact).sum())
            if misses > _MOST_MISSES * len(x):
                raise RuntimeError(f"{misses} of {len(x)} rows differ from the exact index")
            prepared.notes[name] = "exact" if misses == 0 else f"{misses} rows not exact"
            return run

        prepared.rival(name, checked)
    return prepared


def inputs(case: dict[str, Any], device: str) -> tuple[Tensor, Tensor]:
    """Standard normal rows and codes, float32, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case["N"], case["D"], generator=generator)
    codebook = torch.randn(case["K"], case["D"], generator=generator)
    return x.to(device), codebook.to(device)


def _rivals(context: Context) -> dict[str, Callable[[Tensor, Tensor], Callable[[], object]]]:
    shared = {
        "torch.cdist + argmin": _cdist,
        "torch.cdist + argmin, compiled": _cdist_compiled,
        "vector-quantize-pytorch, eval": _lucidrains,
    }
    if context.device == "cuda":
        return {**shared, "flash-kmeans": _flash_kmeans, "flash-kmeans, fp16": _flash_kmeans_fp16}
    return {
        "FAISS IndexFlatL2": lambda x, codebook: _faiss(x, codebook, context.threads),
        **shared,
        "scikit-learn argmin": lambda x, codebook: _sklearn(x, codebook, context.threads),
    }


def _as_indices(result: Any) -> Tensor:
    """FAISS gives (distances, indices), a module (quantized, indices, loss), others indices."""
    if isinstance(result, tuple):
        result = result[1]
    return torch.as_tensor(result).reshape(-1).long()


def _faiss(x: Tensor, codebook: Tensor, threads: int) -> Callable[[], object]:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(codebook.numpy())
    rows = x.numpy()
    return lambda: index.search(rows, 1)


def _search_by_cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(dim=1)


def _fits(x: Tensor, codebook: Tensor, matrices: int) -> None:
    """Raises where `matrices` float32 N×K matrices would take more than half of the memory."""
    needed = 4 * matrices * len(x) * len(codebook)
    if x.device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        import os

        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise MemoryError(f"N×K matrices of {needed / 2**30:.1f} GiB")


def _cdist(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    _fits(x, codebook, 2)
    return lambda: _search_by_cdist(x, codebook)


def _cdist_compiled(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    _fits(x, codebook, 2)
    compiled = torch.compile(_search_by_cdist, dynamic=False)
    return lambda: compiled(x, codebook)


def _lucidrains(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    from vector_quantize_pytorch import VectorQuantize

    _fits(x, codebook, 4)
    module = VectorQuantize(x.shape[1], len(codebook)).to(x.device).eval()
    module._codebook.embed.data.copy_(codebook)

    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def _sklearn(x: Tensor, codebook: Tensor, threads: int) -> Callable[[], object]:
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    rows, codes = x.numpy(), codebook.numpy()

    def run() -> object:
        with threadpool_limits(threads):
            return pairwise_distances_argmin(rows, codes)

    return run


def _flash_kmeans(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    rows, codes = x[None], codebook[None]

    def run() -> object:
        return euclid_assign_triton(rows, codes, (rows.float() ** 2).sum(-1))

    return run


def _flash_kmeans_fp16(x: Tensor, codebook: Tensor) -> Callable[[], object]:
    return _flash_kmeans(x.half(), codebook.half())
