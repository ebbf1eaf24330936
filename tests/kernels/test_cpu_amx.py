"""The AMX search's values, on machines without AMX: its file compiled over emulated tiles.

Its speed is not tested anywhere here, nor that the processor's tiles do what their description
says.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernels.search_cases import DTYPES, METRICS, hostile, normal, promised

_C = pytest.importorskip("_fastvq_C", reason="the C++ kernels are not built")

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "cpu"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of amx_search.cpp."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not SOURCES.is_dir() or "avx512" not in _C.isa_available():
        pytest.skip("needs the C++ sources, a compiler, and AVX-512 for what is not a tile")
    folder = tmp_path_factory.mktemp("amx")
    emulation = f'-DFASTVQ_EMULATED_TILES="{HERE / "amx_emulation.h"}"'
    jobs = {
        HERE / "amx_search.cpp": [],
        SOURCES / "nearest_code.cpp": [],
        SOURCES / "nearest_code_generic.cpp": [],
        SOURCES / "threads.cpp": [],
        SOURCES / "nearest_code_amx.cpp": [*AVX512, emulation],
    }
    running = [
        subprocess.Popen(
            [compiler, *FLAGS, *own, f"-I{SOURCES}", "-w", "-c", source, "-o", source.stem + ".o"],
            cwd=folder,
        )
        for source, own in jobs.items()
    ]
    assert [job.wait() for job in running] == [0] * len(jobs)
    objects = [source.stem + ".o" for source in jobs]
    subprocess.run(
        [compiler, "-shared", "-pthread", *objects, "-o", "amx.so"], cwd=folder, check=True
    )
    library = ctypes.CDLL(str(folder / "amx.so"))
    library.amx_search.restype = ctypes.c_int64
    return library


def check(amx: ctypes.CDLL, x: torch.Tensor, codebook: torch.Tensor, metric: str = "l2") -> int:
    """Compares every index; returns how many rows the AMX search left to float64."""
    indices, distance = torch.full((len(x),), -7), torch.full((len(x),), -7.0)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    left = amx.amx_search(
        *(pointer(x.data_ptr()), DTYPES[x.dtype], pointer(codebook.data_ptr())),
        *(DTYPES[codebook.dtype], pointer(indices.data_ptr()), pointer(distance.data_ptr())),
        *(size(len(x)), size(len(codebook)), size(x.shape[1]), METRICS[metric]),
    )
    assert indices.tolist() == promised(x, codebook, metric).tolist()
    return int(left)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("N", "K", "D"),
    [
        *((1, 1, 1), (7, 2, 3), (97, 65, 8), (193, 300, 16), (33, 129, 31), (50, 512, 64)),
        *((20, 700, 100), (40, 1000, 256), (9, 900, 512), (17, 400, 1029)),
    ],
)
def test_every_shape(amx: ctypes.CDLL, N: int, K: int, D: int, metric: str) -> None:
    left = check(amx, normal(N, D), normal(K, D, seed=1), metric)
    assert left <= N // 2  # else float64 would have been tested


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "name", ["offset", "collapsed", "lattice ties", "subnormal", "far code", "every magnitude"]
)
def test_hostile_numbers(amx: ctypes.CDLL, name: str, metric: str) -> None:
    for N, K, D in [(60, 150, 8), (20, 130, 70)]:
        check(amx, *hostile(name, N, K, D), metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_numbers(amx: ctypes.CDLL, dtype: torch.dtype) -> None:
    assert check(amx, normal(70, 21).to(dtype), normal(90, 21, seed=1)) <= 70 // 4
