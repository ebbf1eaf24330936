"""The C++ kernels, called by address, against a float64 loop that follows the index promise.

Each test runs under every instruction set the machine has: FASTVQ_CPU_ISA is read at every call.
What users call is `fastvq.ops` (tests/ops); here are only the kernels' own edges.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from kernels.search_cases import (
    DIRECT,
    DTYPES,
    FLOAT32,
    HOSTILE,
    INT8,
    INT16,
    METRICS,
    check,
    hostile,
    nearest_code,
    normal,
    promised,
)

_C = pytest.importorskip("_fastvq_C", reason="the C++ kernels are not built")

ISAS = _C.isa_available()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTVQ_CPU_ISA", request.param)
    assert _C.isa_in_use() == request.param
    return str(request.param)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("N", "K", "D"),
    [
        *((1, 1, 1), (7, 2, 1), (97, 3, 3), (193, 65, 8), (50, 4096, 3), (300, 512, 16)),
        *((101, 129, 31), (33, 1000, 64), (65, 257, 100), (13, 2051, 256), (5, 5, 1029)),
    ],
)
def test_every_shape(isa: str, N: int, K: int, D: int, metric: str) -> None:
    check(normal(N, D), normal(K, D, seed=1), metric)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_every_mix_of_dtypes(isa: str, x_dtype: torch.dtype, codebook_dtype: torch.dtype) -> None:
    check(normal(150, 21).to(x_dtype), normal(70, 21, seed=1).to(codebook_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x, codebook = every[:, None], torch.zeros(1, 1)
    _, distance = nearest_code(x, codebook.fill_(1.0), "dot")
    expected = torch.where(every.isfinite(), every.float(), float("nan"))
    assert torch.equal(distance.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers(isa: str, name: str, metric: str) -> None:
    for N, K, D in [(100, 150, 8), (40, 300, 64), (60, 70, 3), (8, 9, 31)]:
        check(*hostile(name, N, K, D), metric)


@pytest.fixture(params=[INT8, INT16, FLOAT32, 0], ids=["int8", "int16", "float32", "float64"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One coarse search of the widest instruction set, with float64 for what it leaves."""
    monkeypatch.delenv("FASTVQ_CPU_ISA", raising=False)
    return int(request.param)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("D", [1, 3, 8, 16, 31, 64, 100, 256, 512, 1024])
def test_each_search_on_every_width(search: int, D: int, metric: str) -> None:
    # 97 and 400 rows: an unfinished tile, and enough rows that the first block is tried alone.
    check(normal(97, D), normal(max(65, 8192 // D), D, seed=1), metric, search)
    check(normal(400, D), normal(max(5, min(70, 8192 // D)), D, seed=1), metric, search)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HOSTILE)
def test_each_search_on_hostile_numbers(search: int, name: str, metric: str) -> None:
    for N, K, D in [(400, 150, 8), (40, 300, 64), (60, 70, 3), (400, 420, 31)]:
        check(*hostile(name, N, K, D), metric, search)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_each_search_on_every_mix_of_dtypes(
    search: int, x_dtype: torch.dtype, codebook_dtype: torch.dtype
) -> None:
    x, codebook = normal(150, 21).to(x_dtype), normal(70, 21, seed=1).to(codebook_dtype)
    check(x, codebook, searches=search)
    check(x, codebook, "dot", search)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_search_on_unaligned_rows_near_the_limit_of_16_bits(
    search: int, dtype: torch.dtype
) -> None:
    limit = torch.finfo(dtype).max
    x = torch.cat([torch.zeros(1), normal(150 * 21)]).tanh().mul(limit).to(dtype)[1:].view(150, 21)
    codebook = normal(90, 21, seed=1).tanh().mul(limit).to(dtype)
    assert x.data_ptr() % 4 != 0
    check(x, codebook, searches=search)


def test_each_search_on_many_codes(search: int) -> None:
    check(normal(24, 8), normal(65536, 8, seed=1), searches=search)
    check(normal(5, 64), normal(20000, 64, seed=1), searches=search)


@pytest.mark.parametrize("metric", METRICS)
def test_each_search_where_rows_and_codes_repeat(search: int, metric: str) -> None:
    x, codebook = hostile("all codes tie", 700, 500, 12)
    x[::2], codebook[::3] = -x[::2], 0.0  # zeros of either sign
    check(x, codebook, metric, search)
    x[::5, 0] = torch.nan
    check(x, codebook.repeat(2, 1), metric, search)


@pytest.mark.parametrize("metric", METRICS)
def test_each_search_on_tight_clusters_among_spread_codes(search: int, metric: str) -> None:
    # By distance from the first cluster: itself, the second, the third, then the spread codes.
    x, codes, at = normal(200, 31), normal(2000, 31, seed=1), torch.arange(2000)
    one = codes[:1]
    near = torch.where((at % 10 < 2)[:, None], 3 * one, one + 0.01 * codes)
    near = torch.where((at % 10 == 2)[:, None], 40 - one, near) + 1e-6 * codes
    codebook = torch.where((at % 10 == 3)[:, None], 1000 * codes, near)
    x[::3] += 3 * one
    x[1::3] += 40
    x[::7] *= 1e3
    check(x, codebook, metric, search)


def test_each_search_agrees_between_thread_counts(search: int) -> None:
    x, codebook = hostile("every magnitude", 3001, 260, 12)
    expected = promised(x, codebook, "l2")
    for threads in (1, 2, 3):
        indices, _ = nearest_code(x, codebook, threads=threads, searches=search)
        np.testing.assert_array_equal(indices.numpy(), expected)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_few_rows_need_no_preparation(isa: str, name: str) -> None:
    for N, K, D in [(1, 150, 8), (3, 300, 64), (2, 70, 31)]:
        check(*hostile(name, N, K, D), searches=DIRECT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_few_rows_with_broken_numbers(isa: str, bad: float) -> None:
    x, codebook = normal(2, 16), normal(60, 16, seed=1)
    codebook[::3, 8] = bad
    check(x.half(), codebook, searches=DIRECT)
    x[1, 2] = bad
    check(x, codebook, searches=DIRECT)
    codebook[:, 0] = bad
    check(x, codebook, searches=DIRECT)


@pytest.mark.parametrize("metric", METRICS)
def test_many_codes_in_several_groups_of_panels(isa: str, metric: str) -> None:
    check(*hostile("collapsed", 20, 4096, 16), metric)
    check(*hostile("all codes tie", 4, 4096, 5), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_and_codes_that_are_not_finite(isa: str, bad: float, metric: str) -> None:
    x, codebook = normal(200, 9), normal(60, 9, seed=1)
    x[::7, 4] = bad
    codebook[::3, 8] = bad
    check(x, codebook, metric)
    codebook[:, 0] = bad
    check(x, codebook, metric)


def test_no_rows(isa: str) -> None:
    indices, distance = nearest_code(normal(0, 5), normal(3, 5))
    assert indices.shape == distance.shape == (0,)


def test_thread_counts_agree(isa: str) -> None:
    for name in ("lattice ties", "every magnitude"):
        x, codebook = hostile(name, 3001, 260, 12)
        expected = promised(x, codebook, "l2")
        for threads in (1, 2, 3):
            indices, _ = nearest_code(x, codebook, threads=threads)
            np.testing.assert_array_equal(indices.numpy(), expected)


def test_callers_floating_point_mode_changes_nothing(isa: str) -> None:
    x, codebook = hostile("subnormal", 100, 80, 8)
    expected = promised(x, codebook, "l2")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        indices, _ = nearest_code(x, codebook)
        flushed = torch.tensor([1e-40]).double().item()
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(indices.numpy(), expected)
    assert flushed == 0.0  # the mode was on, and the call gave it back


def test_several_python_threads_at_once() -> None:
    x, codebook = normal(4000, 16), normal(300, 16, seed=1)
    expected, _ = nearest_code(x, codebook)
    results: list[torch.Tensor] = []
    callers = [
        threading.Thread(target=lambda: results.append(nearest_code(x, codebook, threads=2)[0]))
        for _ in range(6)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 6
    assert all(torch.equal(result, expected) for result in results)


def _in_child(shared: ctypes.Array[ctypes.c_longlong]) -> None:
    indices = nearest_code(normal(4000, 16), normal(300, 16, seed=1), threads=2)[0]
    shared[:] = indices.tolist()


def test_after_fork() -> None:
    expected, _ = nearest_code(normal(4000, 16), normal(300, 16, seed=1), threads=2)
    fork = multiprocessing.get_context("fork")
    shared = fork.RawArray(ctypes.c_longlong, 4000)
    child = fork.Process(target=_in_child, args=(shared,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert list(shared) == expected.tolist()


_WITHOUT_TORCH = """
import ctypes, sys
import _fastvq_C
N, K, D = 4000, 300, 16
rows = (ctypes.c_float * (N * D))(*((i * 37 % 101) / 7 for i in range(N * D)))
codes = (ctypes.c_float * (K * D))(*((i * 53 % 97) / 7 for i in range(K * D)))
found = []
for threads in (1, 2):
    indices = (ctypes.c_longlong * N)()
    address = [ctypes.addressof(buffer) for buffer in (rows, codes, indices)]
    _fastvq_C.nearest_code(address[0], 0, address[1], 0, address[2], 0, N, K, D, 0, threads)
    found.append(list(indices))
assert "torch" not in sys.modules
assert found[0] == found[1] and len(set(found[0])) > 1
"""


def test_starts_threads_of_its_own_without_openmp() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_TORCH], check=True)


def test_isa_in_use_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTVQ_CPU_ISA", raising=False)
    available = _C.isa_available()
    assert available[0] == "generic"
    assert _C.isa_in_use() == ISAS[-1]
    for name in {"generic", "avx2", "avx512", "amx"}:
        monkeypatch.setenv("FASTVQ_CPU_ISA", name)
        if name in available:
            assert _C.isa_in_use() == name
        else:
            with pytest.raises(RuntimeError, match=f"FASTVQ_CPU_ISA={name} cannot run"):
                nearest_code(normal(2, 2), normal(2, 2))
    monkeypatch.setenv("FASTVQ_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match='generic, avx2, avx512 or amx; got "sse9"'):
        _C.isa_in_use()
