"""The search's Triton kernels: every index equals the float64 argmin, whatever the data.

Runs on the GPU, or under Triton's interpreter where there is none (conftest.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.nearest_code_cases import KINDS, hostile, ordered_argmin
from tolerances import UNIT_ROUNDOFF
from torch import Tensor

from fastvq import ops
from fastvq.reference import nearest_code as reference

kernels = pytest.importorskip("fastvq.kernels.triton.nearest_code", reason="needs triton")
tiles_of = pytest.importorskip("fastvq.kernels.triton.nearest_code_tiles")

SHAPES = [  # N, K, D
    *((1, 1, 1), (5, 3, 3), (70, 97, 8), (33, 130, 16), (17, 600, 31)),
    *((40, 70, 64), (9, 33, 100), (6, 20, 256), (5, 18, 512), (3, 10, 1024)),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def search(x: Tensor, codebook: Tensor, device: str, **options: object) -> Tensor:
    options.setdefault("metric", "l2")
    books = codebook if codebook.dim() == 3 else codebook[None]
    rows = x if x.dim() == 3 else x[None]
    indices, _ = kernels.nearest_code_forward(rows.to(device), books.to(device), **options)
    return indices.cpu() if x.dim() == 3 else indices[0].cpu()


def count_unsettled(x: Tensor, codebook: Tensor, device: str) -> int:
    """Rows that the fast pass leaves to the resolver."""
    rows, books = x[None].to(device), codebook[None].to(device)
    tiles = tiles_of.choose_tiles(x.shape[1], None)
    codes = kernels._prepare_codes(books, tiles, 1, True)
    slots = kernels._search(rows, codes, tiles, True)
    indices = rows.new_empty((1, len(x)), dtype=torch.int64)
    kernels._certify(rows, books, codes, slots, tiles, True, True, indices, rows.new_empty(0))
    return int(codes.queued.sum())


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
def test_shapes(n: int, k: int, d: int, metric: str, device: str) -> None:
    x, codebook = hostile("random", n, k, d)
    expected = ordered_argmin(x, codebook, metric)
    assert torch.equal(search(x, codebook, device, metric=metric), expected)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("d", [5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_data(kind: str, d: int, metric: str, device: str) -> None:
    x, codebook = hostile(kind, 33, 70, d, seed=d)
    expected = ordered_argmin(x, codebook, metric)
    assert torch.equal(search(x, codebook, device, metric=metric), expected)


@pytest.mark.parametrize("dtypes", itertools.product(DTYPES, DTYPES))
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    x, codebook = hostile("random", 20, 30, 24)
    x, codebook = x.to(dtypes[0]), codebook.to(dtypes[1])
    assert torch.equal(search(x, codebook, device), ordered_argmin(x, codebook))


def shipped_cases() -> list[tuple[object, int]]:
    every = {tiles for entries in tiles_of.shipped().values() for tiles in entries}
    cases = []
    for tiles in sorted(every, key=str):
        cases.append((tiles, 7 if tiles.terms == 3 else min(tiles.chunk, 64) + 3))
    return cases


@pytest.mark.parametrize(("tiles", "d"), shipped_cases())
def test_shipped_tiles(tiles: object, d: int, device: str, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "LEAST_PROGRAMS", 1)
    x, codebook = hostile("integers", 20, 300, d)
    if device == "cuda" and tiles.tma and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs the tensor memory accelerator of sm_90")
    assert torch.equal(search(x, codebook, device, tiles=tiles), ordered_argmin(x, codebook))


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("d", [4, 20])
def test_shared_out_over_codes(d: int, programs: int, device: str, monkeypatch) -> None:
    """The winner is the same however the tiles of codes are split among programs."""
    monkeypatch.setattr(kernels, "LEAST_PROGRAMS", programs)
    x, codebook = hostile("integers", 3, 600, d)
    assert torch.equal(search(x, codebook, device), ordered_argmin(x, codebook))


@pytest.mark.parametrize("books", [1, 3])
def test_heads(books: int, device: str) -> None:
    x, codebook = torch.randn(3, 21, 6), torch.randn(books, 40, 6)
    x[1, 4, 2] = torch.nan
    found = search(x, codebook, device)
    for head in range(3):
        expected = ordered_argmin(x[head], codebook[head % books])
        assert torch.equal(found[head], expected)


def test_more_heads_than_a_grid_holds(device: str, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "MOST_HEADS", 2)
    x, codebook = torch.randn(3, 4, 2), torch.randn(3, 5, 2)
    expected = torch.stack([ordered_argmin(*pair) for pair in zip(x, codebook)])
    assert torch.equal(search(x, codebook, device), expected)


def test_strides(device: str) -> None:
    """Slices, transposes, expanded and unaligned storage, without a copy."""
    buffer, book = torch.randn(2, 31, 41), torch.randn(24, 90)
    for x, codebook in [
        (buffer[0, :, 1:13], book[:12, ::3].T),
        (buffer[1].T[3:20, ::2], book[2:18, 5:70].T),
        (torch.randn(1, 12).expand(20, 12), book[:12].T[1:]),
        (torch.randn(20, 1).expand(20, 12), torch.randn(30, 1).expand(30, 12)),
    ]:
        assert torch.equal(search(x, codebook, device), ordered_argmin(x, codebook))


def test_no_rows(device: str) -> None:
    assert search(torch.empty(0, 5), torch.ones(3, 5), device).shape == (0,)


def test_no_code_alive(device: str) -> None:
    codebook = torch.full((5, 4), torch.inf)
    assert search(torch.ones(3, 4), codebook, device).tolist() == [-1, -1, -1]


def test_ties_by_rounding_alone(device: str) -> None:
    """Permuted channels lie equally far; only the order of the float64 sum tells them apart."""
    g = torch.Generator().manual_seed(1)
    for d in (8, 19):
        base = torch.randn(d, generator=g) * 2.0 ** torch.arange(-d, d, 2)
        codebook = torch.stack([base[torch.randperm(d, generator=g)] for _ in range(40)])
        x = torch.tensor([0.0, 1e-3, 0.7, 30.0])[:, None].expand(4, d)
        expected = ordered_argmin(x, codebook)
        assert len(expected.unique()) > 1
        assert torch.equal(search(x, codebook, device), expected)


def test_more_ties_than_a_list_holds(device: str) -> None:
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)))
    codebook = signs[torch.randperm(256)]
    x = torch.stack([torch.zeros(8), codebook[200], torch.full((8,), 3.0), -codebook[77] * 0.1])
    assert torch.equal(search(x, codebook, device), ordered_argmin(x, codebook))


def test_rows_without_length(device: str) -> None:
    x, codebook = torch.zeros(3, 20), torch.randn(50, 20) * torch.logspace(-6, 6, 50)[:, None]
    assert torch.equal(search(x, codebook, device), ordered_argmin(x, codebook))


def test_centring_that_overflows(device: str) -> None:
    """x − m passes the largest float32; the row is settled without the centre."""
    codebook = 3e38 - 1e36 * torch.rand(40, 20)
    x = -3e38 + 1e36 * torch.rand(4, 20)
    x[0] = codebook[7]
    assert torch.equal(search(x, codebook, device), ordered_argmin(x, codebook))


@pytest.mark.parametrize("kind", ["collapsed", "near-duplicates", "offset", "duplicates"])
def test_hostile_codebooks_stay_in_the_fast_pass(kind: str, device: str) -> None:
    x, codebook = hostile(kind, 64, 96, 8)
    assert count_unsettled(x, codebook, device) <= 3


def close_pairs(d: int) -> tuple[Tensor, Tensor]:
    """Codes in pairs that differ by less than fp16 can see."""
    g = torch.Generator().manual_seed(2)
    codebook = torch.randn(40, d, generator=g)
    codebook[1::2] = codebook[::2] + 1e-5 * torch.randn(20, d, generator=g)
    return torch.randn(60, d, generator=g), codebook


def test_the_certificate_is_what_makes_it_exact(device: str) -> None:
    x, codebook = close_pairs(40)
    expected = ordered_argmin(x, codebook)
    assert (search(x, codebook, device, exact=False) != expected).any()
    assert count_unsettled(x, codebook, device) > 30
    assert torch.equal(search(x, codebook, device), expected)


@pytest.mark.parametrize("d", [6, 40])
def test_fast_errs_by_what_it_says(d: int, device: str) -> None:
    x, codebook = close_pairs(d)
    found = search(x, codebook, device, exact=False)
    squared = torch.cdist(x.double(), codebook.double()) ** 2
    lengths, longest = x.double().norm(dim=1), codebook.double().norm(dim=1).max()
    both = lengths + longest
    bound = (8 * 2.0**-11 + 2.0**-12) * both * longest + (d + 4) * 2.0**-22 * both**2
    excess = squared.gather(1, found[:, None])[:, 0] - squared.min(dim=1).values
    assert (excess <= bound).all()


def test_bits_of_padding_stay_finite(device: str) -> None:
    """An id packed into −∞ is a NaN, and a bound that is NaN certifies nothing."""
    for d in (8, 20):
        x, codebook = torch.randn(1, 5, d).to(device), torch.randn(1, 1, d).to(device)
        tiles = tiles_of.choose_tiles(d, None)
        codes = kernels._prepare_codes(codebook, tiles, 1, True)
        slots = kernels._search(x, codes, tiles, True)
        assert slots.second.isfinite().all()
        assert (slots.best > slots.second + 1e6).all()
        assert count_unsettled(x[0].cpu(), codebook[0].cpu(), device) == 0


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_distance(metric: str, device: str) -> None:
    x, codebook = hostile("integers", 30, 50, 20)
    x = x + 0.1
    x[3, 4] = torch.nan
    rows, books = x[None].to(device), codebook[None].to(device)
    indices, distance = kernels.nearest_code_forward(rows, books, metric=metric)
    chosen = codebook.double()[indices[0].clamp(min=0).cpu()]
    terms = (x.double() - chosen) ** 2 if metric == "l2" else x.double() * chosen
    bound = (x.shape[1] + 2) * UNIT_ROUNDOFF[torch.float32] * terms.abs().sum(dim=1)
    error = (distance[0].cpu().double() - terms.sum(dim=1)).abs()
    assert distance[0, 3].isnan()
    assert (error <= bound)[x.isfinite().all(dim=1)].all()


def test_through_the_op(device: str) -> None:
    x, codebook = torch.randn(2, 9, 5, device=device), torch.randn(12, 5, device=device)
    expected, distances = reference.nearest_code(x, codebook)
    indices, distance = ops.nearest_code(x, codebook, backend="triton", return_distance=True)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(distance, distances)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, codebook: Tensor) -> Tensor:
        return ops.nearest_code(x, codebook, backend="triton") + 1

    assert torch.equal(compiled(x, codebook), expected + 1)
    arguments = (x, codebook, "l2", "triton", "exact", False)
    torch.library.opcheck(torch.ops.fastvq.nearest_code.default, arguments)


def test_the_interpreter_runs_only_by_name(device: str) -> None:
    x, codebook = torch.ones(2, 3, device=device), torch.ones(1, 3, device=device)
    chosen = ops.explain("nearest_code", x, codebook).splitlines()[0]
    assert (chosen == "nearest_code: triton") == (device == "cuda")
    by_name = ops.explain("nearest_code", x, codebook, backend="triton")
    assert by_name.splitlines()[0] == "nearest_code: triton"


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(4096, 512, 64), (2048, 8192, 256), (9000, 1024, 8), (3000, 16384, 8), (1000, 65536, 128)],
)
def test_large(n: int, k: int, d: int, kind: str) -> None:
    x, codebook = (tensor.cuda() for tensor in hostile(kind, n, k, d))
    expected, _ = reference.nearest_code(x, codebook)
    assert torch.equal(ops.nearest_code(x, codebook, backend="triton"), expected)


@pytest.mark.cuda
def test_captured_in_a_graph() -> None:
    x, codebook = torch.randn(500, 64, device="cuda"), torch.randn(300, 64, device="cuda")
    ops.nearest_code(x, codebook, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = ops.nearest_code(x, codebook, backend="triton")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])
