"""The C++ kernels, called by address, against a float64 loop that follows the index promise.

Each test runs under every instruction set the machine has: FASTVQ_CPU_ISA is read at every call.
What users call is `fastvq.ops` (tests/ops); here are only the kernels' own edges.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import threading

import numpy as np
import pytest
import torch

_C = pytest.importorskip("_fastvq_C", reason="the C++ kernels are not built")

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
METRICS = {"l2": 0, "dot": 1}
ISAS = [isa for isa in _C.isa_available() if isa != "amx"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTVQ_CPU_ISA", request.param)
    assert _C.isa_in_use() == request.param
    return str(request.param)


def nearest_code(
    x: torch.Tensor, codebook: torch.Tensor, metric: str = "l2", threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, distance) of the kernel on contiguous x (N, D) and codebook (K, D)."""
    assert x.is_contiguous()
    assert codebook.is_contiguous()
    indices = torch.full((len(x),), -7)
    distance = torch.full((len(x),), -7.0)
    _C.nearest_code(
        *(x.data_ptr(), DTYPES[x.dtype], codebook.data_ptr(), DTYPES[codebook.dtype]),
        *(indices.data_ptr(), distance.data_ptr(), *x.shape[:1], *codebook.shape),
        *(METRICS[metric], threads),
    )
    return indices, distance


def scores(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> np.ndarray:
    """The (N, K) canonical scores: float64, in the order d = 0 … D-1, each product rounded."""
    rows, codes = x.double().numpy(), codebook.double().numpy()
    total = np.zeros((len(rows), len(codes)))
    with np.errstate(invalid="ignore"):
        for d in range(rows.shape[1]):
            a, b = rows[:, d, None], codes[None, :, d]
            total += (a - b) * (a - b) if metric == "l2" else a * b
    return total


def promised(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> np.ndarray:
    """The index the promise names: lowest index of the best score, -1 where there is none."""
    cost = scores(x, codebook, metric) * (1 if metric == "l2" else -1)
    cost[:, ~torch.isfinite(codebook).all(1).numpy()] = np.inf
    index = cost.argmin(1)
    nowhere = ~torch.isfinite(x).all(1).numpy() | ~torch.isfinite(codebook).all(1).any().numpy()
    return np.where(nowhere, -1, index)


def check(x: torch.Tensor, codebook: torch.Tensor, metric: str = "l2") -> None:
    expected = promised(x, codebook, metric)
    indices, distance = nearest_code(x, codebook, metric)
    np.testing.assert_array_equal(indices.numpy(), expected)
    found = expected >= 0
    assert np.isnan(distance.numpy()[~found]).all()
    with np.errstate(over="ignore"):
        winner = scores(x[found], codebook, metric)[np.arange(found.sum()), expected[found]]
        np.testing.assert_array_equal(distance.numpy()[found], winner.astype(np.float32))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def hostile(name: str, N: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Data on which a float32 search alone goes wrong."""
    x, codes = normal(N, D), normal(K, D, seed=1)
    one = codes[:1]
    far = codes.clone()
    far[K // 2] *= 1e8
    return {
        "offset": lambda: (x + 1e4, codes + 1e4),
        "offset of x alone": lambda: (x + 1e6, codes),
        "offset of the codes alone": lambda: (x, codes + 1e6),
        "great offset, few distinct values": lambda: (x + 3e7, codes + 3e7),
        "collapsed": lambda: (x, one * (1 + 2**-23 * codes.round())),
        "last bits": lambda: (one + 1e-7 * x, one + 1e-7 * codes),
        "equal codes": lambda: (x, one.expand(K, D).contiguous()),
        "pairs of equal codes": lambda: (x, codes[: (K + 1) // 2].repeat(2, 1)[:K].contiguous()),
        "lattice ties": lambda: (x.round(), codes.round()),
        "all codes tie": lambda: (x * 0, codes.sign()),
        "nearly equal norms": lambda: (x * 0, torch.nn.functional.normalize(codes, dim=1)),
        "ties that rounding decides": lambda: (
            torch.full((N, D), 0.1) * (1 + x.round()[:, :1]),
            torch.stack([one[0, normal(D, seed=k).argsort()] for k in range(K)]),
        ),
        "rows on codes": lambda: (codes[torch.arange(N) % K].contiguous(), codes),
        "halfway between codes": lambda: ((codes[:N] + codes[1 : N + 1]) / 2, codes),
        "subnormal": lambda: (x * 1e-40, codes * 1e-40),
        "products underflow": lambda: (x * 1e-22, codes * 1e-22),
        "subnormal against ordinary": lambda: (x * 1e-40, codes),
        "squares overflow": lambda: (x * 1e25, codes * 1e25),
        "near the greatest float": lambda: (x.sign() * 3.4e38, codes.sign() * 3.4e38),
        "far code": lambda: (x, far),
        "every magnitude": lambda: (
            x * 10 ** (30 * normal(N, 1).tanh()),
            codes * 10 ** (30 * normal(K, D).tanh()),
        ),
    }[name]()


HOSTILE = [
    *("offset", "offset of x alone", "offset of the codes alone"),
    *("great offset, few distinct values", "collapsed", "last bits", "equal codes"),
    *("pairs of equal codes", "lattice ties", "all codes tie", "nearly equal norms"),
    *(
        "ties that rounding decides",
        "rows on codes",
        "halfway between codes",
        "subnormal",
        "products underflow",
    ),
    *("subnormal against ordinary", "squares overflow", "near the greatest float", "far code"),
    "every magnitude",
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers(isa: str, name: str, metric: str) -> None:
    for N, K, D in [(100, 150, 8), (40, 300, 64), (60, 70, 3), (8, 9, 31)]:
        check(*hostile(name, N, K, D), metric)


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


def test_isa_in_use_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTVQ_CPU_ISA", raising=False)
    available = _C.isa_available()
    assert available[0] == "generic"
    assert _C.isa_in_use() == ISAS[-1]
    for name in {"generic", "avx2", "avx512", "amx"}:
        monkeypatch.setenv("FASTVQ_CPU_ISA", name)
        if name in available:
            assert _C.isa_in_use() == ("avx512" if name == "amx" else name)
        else:
            with pytest.raises(RuntimeError, match=f"FASTVQ_CPU_ISA={name} cannot run"):
                nearest_code(normal(2, 2), normal(2, 2))
    monkeypatch.setenv("FASTVQ_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match='generic, avx2, avx512 or amx; got "sse9"'):
        _C.isa_in_use()
